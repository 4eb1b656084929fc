"""The command line. Errors become one readable message and an exit code from one table (kdcore.errors)."""

from __future__ import annotations

import sys
import traceback

from ..errors import KdError


def main(argv: list[str] | None = None) -> None:
    """Runs ``kdcore`` with these arguments (default: the process's) and exits."""
    from .app import build

    arguments = sys.argv[1:] if argv is None else argv
    try:
        build(arguments)(args=arguments, prog_name="kdcore")
    except KdError as error:
        _fail(f"{type(error).__name__}: {error}", error, error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from ..registry import is_blamed

        if is_blamed(error):
            last = traceback.format_exception(error, limit=-3)
            _fail("".join(last).rstrip(), None, 3)
        traceback.print_exception(error)
        _fail("This is a bug in kdcore.", None, 1)


def _fail(text: str, error: BaseException | None, code: int) -> None:
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    print(f"kdcore: {text}{notes}", file=sys.stderr)
    sys.exit(code)
