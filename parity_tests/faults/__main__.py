"""`python -m parity_tests.faults`: a row for each fault, and the check that catches it. Exit status 1 if one is missed.

`--json FILE` keeps the table for parity_tests.report.
"""

import json
import sys
import time
from dataclasses import asdict

from parity_tests import faults
from parity_tests.packages import PACKAGES


def main(argv: list[str]) -> int:
    """Plant the faults of a command line; return the exit status."""
    planted, file = faults.command("python -m parity_tests.faults", "Plant porting mistakes.", argv)
    started_s, results = time.monotonic(), []
    width = max((len(fault.name) for fault in planted), default=0)
    with faults.operation_by_operation():
        for fault in planted:
            result = faults.catch(fault)
            results.append(result)
            verdict = f"{result.caught_by}: {result.quantity}" if result.caught_by else "MISSED"
            print(f"{fault.name:{width}}  {fault.package:7}  {result.seconds:5.1f} s  {verdict}", flush=True)
    if file:
        file.write_text(json.dumps([asdict(result) for result in results], indent=1))
    for package in PACKAGES:
        ours = [result for result in results if result.package == package.name]
        print(f"{package.name}: {sum(bool(result.caught_by) for result in ours)} of {len(ours)} caught")
    print(f"{time.monotonic() - started_s:.0f} s")
    return 0 if all(result.caught_by for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
