"""The command line. Errors become one readable message and an exit code from one table (kdcore.errors)."""

from __future__ import annotations

import os
import signal
import sys
import traceback

from ..errors import KdError


def main(argv: list[str] | None = None) -> None:
    """Runs ``kdcore`` with these arguments (default: the process's) and exits."""
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # an import that Ctrl-C breaks may raise anything
    try:
        from .app import build

        build(arguments)(args=arguments, prog_name="kdcore")
    except KdError as error:
        _fail(f"{type(error).__name__}: {error}", error, error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail_unforeseen(error)


def _fail_unforeseen(error: Exception) -> None:
    from ..origin import is_blamed

    if is_blamed(error):
        head, _, remote = str(error).partition("\nTraceback")  # a worker's, which says more than this process's
        local = "".join(traceback.format_tb(error.__traceback__, limit=-3))
        print(f"Traceback{remote}" if remote else local, end="", file=sys.stderr)
        _fail(f"a plugin failed: {head if remote else f'{type(error).__name__}: {error}'}", error, 3)
    traceback.print_exception(error)
    _fail("this is a bug in kdcore, not in your recipe. Please report the lines above.", None, 1)


def _fail(text: str, error: BaseException | None, code: int) -> None:
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    print(f"kdcore: {text}{notes}", file=sys.stderr)
    sys.exit(code)
