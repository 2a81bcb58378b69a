"""`python -m fastmim`, where the `fastmim` command is not on the PATH."""

import sys

from fastmim.cli import main

sys.exit(main())
