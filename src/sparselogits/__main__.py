"""`python -m sparselogits` is the same as the `sparselogits` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; Ctrl-C is clean from its first moment, while the command line is loading too."""
    try:
        from sparselogits.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
