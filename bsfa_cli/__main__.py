"""`bsfa` and `python -m bsfa_cli`."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with the exit code of `bsfa_cli.errors`."""
    import gc
    import sys

    from .app import run

    code = run()
    gc.freeze()  # or Python looks for garbage among all that torch made, once more, before it ends
    sys.exit(code)


if __name__ == "__main__":
    main()
