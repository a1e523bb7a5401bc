"""``python -m dnkd_ext`` is the command line."""

import sys

from dnkd_ext.cli import main

sys.exit(main())
