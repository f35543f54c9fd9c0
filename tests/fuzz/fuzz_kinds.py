"""All kinds of inputs, by name."""

from tests.fuzz import fuzz_data
from tests.fuzz import fuzz_records
from tests.fuzz import fuzz_settings

KINDS = {
  **fuzz_records.KINDS,
  **fuzz_data.KINDS,
  **fuzz_settings.KINDS,
}
