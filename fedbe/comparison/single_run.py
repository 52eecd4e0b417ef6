"""One run in a process of its own: ``python -m fedbe.comparison.single_run fit --config …``."""

import sys

from fedbe.cli import main

if __name__ == "__main__":
    sys.exit(main())
