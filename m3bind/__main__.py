"""``python -m m3bind`` is ``m3bind``."""

from m3bind.cli import main

main()
