"""`python -m bem`: the command line."""

from bem.cli import main

main()
