"""``python -m fedbe``: the same as the command ``fedbe``."""

import sys

from fedbe.cli import main

if __name__ == "__main__":
    sys.exit(main())
