"""`python -m sepme_cli` is `sepme`."""

from sepme_cli.app import main

if __name__ == "__main__":
    main()
