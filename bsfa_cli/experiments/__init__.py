"""Measurements of the project itself, stored under profiles/results/."""

import sys
from collections.abc import Callable

from ..errors import BsfaError


def end(name: str, main: Callable[[], int]) -> None:
    """Leave Python with what `main` returns; what it cannot do is one sentence and its exit code."""
    try:
        sys.exit(main())
    except BsfaError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
