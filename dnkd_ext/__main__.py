"""``python -m dnkd_ext`` is the command line."""

from dnkd_ext.cli import entry

entry()
