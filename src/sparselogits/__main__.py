"""`python -m sparselogits` is the same as the `sparselogits` command."""

from sparselogits.cli import main

if __name__ == "__main__":
    main()
