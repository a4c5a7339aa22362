"""`python -m bertfast.cli`: the command line."""

import sys

from bertfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
