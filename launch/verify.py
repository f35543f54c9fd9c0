r"""Checks the whole record of a run. Imports no jax.

  python -m launch.verify --workdir=/tmp/digits

Exit codes: 0 the record is whole and agrees with what the run left; 1 it does
not; 2 wrong usage.
"""

from dpdist import errors
from dpdist.files import json_fields
from dpdist.workdir import verify

from .cli import common_flags
from .cli import exit_codes
from .cli import flag_parsing
from .cli import runs

_WORKDIR = common_flags.workdir()
_LEDGER = common_flags.ledger()
_JSON = common_flags.json()


def main() -> int:
  """Returns an exit code."""
  try:
    ledger = runs.open_begun(_WORKDIR.value, _LEDGER.value)
    findings = verify.verify(_WORKDIR.value, ledger)
  except ValueError as error:
    return flag_parsing.usage_error(error)
  except errors.LedgerError as error:
    findings = [verify.Finding("ledger", "damaged", str(error))]
  sound = not any(finding.problem for finding in findings)
  if _JSON.value:
    rows = [finding._asdict() for finding in findings]
    print(json_fields.text({"sound": sound, "findings": rows}))
  else:
    for finding in findings:
      mark = "WRONG" if finding.problem else "ok"
      print(f"{mark:<5}  {finding.what:<13}  {finding.found}")
      if finding.problem:
        print(f"       {'':<13}  {finding.problem}")
    print("The record is sound." if sound else "The record is NOT sound.")
    if any(x.what == "guarantee" and x.found != "holds" for x in findings):
      print("The guarantee of this run is void.")
  return exit_codes.DONE if sound else exit_codes.UNSOUND


if __name__ == "__main__":
  flag_parsing.run(main)
