"""``python -m xtuner`` is the command `xtuner`."""

import sys

from xtuner.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
