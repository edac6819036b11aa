"""`python -m sepme_cli` is `sepme`."""

from sepme_cli.app import main

main()
