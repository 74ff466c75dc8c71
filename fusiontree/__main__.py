"""`python -m fusiontree <verb>` is `fusiontree <verb>`."""

from fusiontree.cli.main import main

if __name__ == "__main__":
    main()
