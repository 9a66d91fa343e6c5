"""``python -m everyrank`` is the ``everyrank`` command."""

import sys

from everyrank.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
