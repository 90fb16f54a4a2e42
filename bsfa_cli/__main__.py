"""`bsfa` and `python -m bsfa_cli`."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with the exit code of `bsfa_cli.errors`."""
    import sys

    from .app import run

    sys.exit(run())


if __name__ == "__main__":
    main()
