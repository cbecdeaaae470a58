"""A watch on the library's own code: what runs under it, and for how long."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Watch:
    """Notes when the library's own code runs. ``now()`` gives a moment; ``laps`` holds ``(sign, begin, end)``, one for
    every outermost call, sign -1 for what does not count although it is called from what does."""

    def __init__(self, now: Callable[[], Any]):
        self.now = now
        self.laps: list[tuple[int, Any, Any]] = []
        self._depth = 0

    def timed(self, function: Callable[..., Any], counts: bool = True) -> Callable[..., Any]:
        """``function``, its calls noted."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if counts == (self._depth > 0):  # inside what is noted already, or outside of what it would be taken from
                return function(*args, **kwargs)
            self._depth += counts
            begin = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.laps.append((1 if counts else -1, begin, self.now()))
                self._depth -= counts

        return call


watching: ContextVar[Watch | None] = ContextVar("vtprunewatching", default=None)


@contextmanager
def stopwatch(now: Callable[[], Any] = time.perf_counter) -> Iterator[Watch]:
    """A watch on every attachment that is made inside the block, for as long as the attachment lives: on its hooks and
    on decisions inside a tower's blocks. A routing method's side branch is a layer of the model, no overhead.
    Attachments made outside carry nothing."""
    watch = Watch(now)
    token = watching.set(watch)
    try:
        yield watch
    finally:
        watching.reset(token)
