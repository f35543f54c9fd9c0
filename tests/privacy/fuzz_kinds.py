"""All kinds of inputs, by name."""

from tests.privacy import fuzz_data
from tests.privacy import fuzz_records
from tests.privacy import fuzz_settings

KINDS = {
  **fuzz_records.KINDS,
  **fuzz_data.KINDS,
  **fuzz_settings.KINDS,
}
