"""Errors of the command line: one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from ..core.errors import VtpruneError, suggestion


def fail(message: object, code: int) -> int:
    """One line on stderr."""
    print("vtprune: error: " + " ".join(str(message).split()), file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text; names that are nearly right get a suggestion."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            if hint := suggestion(str(value), map(str, action.choices)):
                every = ", ".join(map(repr, action.choices))
                raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint} (choose from {every})")
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        raise SystemExit(fail(f"{message} (see {self.prog} --help)", 2))


def guarded(action: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command. What goes wrong becomes one line and code 1; ``--debug`` gives the traceback."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):  # what the locale cannot show is no reason to lose an answer
        stream.reconfigure(errors="backslashreplace")
    try:
        code = action(args)
        stream.flush()
        return code
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away
        _mute(stream)
        return 1
    except BaseException as e:
        if isinstance(e, Exception) and not args.debug:
            _mute(stream)
            expected = isinstance(e, VtpruneError | OSError)
            return fail(
                e
                if expected
                else f"unexpected {type(e).__name__}: {str(e)[:500] or 'no reason given'} (--debug shows where)",
                1,
            )
        raise


def _mute(stream: TextIO) -> None:
    """What is left in ``stream`` goes nowhere if it cannot be written: Python would try again at its end and
    complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
