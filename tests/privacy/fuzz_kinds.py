"""All kinds of inputs, by name."""

from tests.privacy import fuzz_records

KINDS = {**fuzz_records.KINDS}
