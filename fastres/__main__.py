"""The entry point of `python -m fastres`."""

import sys

from fastres.cli import main

if __name__ == "__main__":
    sys.exit(main())
