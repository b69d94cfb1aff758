"""`python -m pdserve.router`."""

import sys

from pdserve.router.main import main

if __name__ == "__main__":
    sys.exit(main())
