"""`python -m moe3d_deploy`, the same as the command `moe3d`."""

import sys

from moe3d_deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
