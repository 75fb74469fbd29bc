"""The command `python -m parity_tests.compare`."""

import sys

from parity_tests.compare.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
