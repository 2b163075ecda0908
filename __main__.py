"""`python -m s4v` is `s4v`."""

from .cli import main

main()
