"""`python -m snowmelt`."""

from snowmelt.cli import main

main()
