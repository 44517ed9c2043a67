"""Run the `sparselogits` command as `python -m sparselogits`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C exits with code 130, even while modules are imported."""
    try:
        from sparselogits.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
