"""The model in a process of its own: it starts at the same time as the page, which stays quick while the model
computes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, util
from multiprocessing.managers import BaseManager, IteratorProxy  # type: ignore[attr-defined]
from typing import Any

from .desk import Desk

KILL = 9  # what Linux does to a process when memory runs out


class _Manager(BaseManager):
    """Serves a :class:`Desk`, one thread per caller."""


_Manager.register(
    "Desk",
    Desk,
    exposed=("load", "about", "ask", "compare", "stop"),
    method_to_typeid={"ask": "Iterator", "compare": "Iterator"},
)
_Manager.register("Iterator", proxytype=IteratorProxy, create_method=False)


def _begin() -> None:
    """In the new process: it ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes sends it to both; the parent tidies up

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Worker:
    """A :class:`Desk` in another process. :attr:`desk` waits until the model is there."""

    def __init__(self, model: str | None, device: str, dtype: str):
        # A forked process keeps the torch that is imported here already; elsewhere, or once CUDA is in use, it starts
        # anew.
        self._manager = _Manager(ctx=multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"))
        # of the socket between the two: made here, it goes with this process, however the other one ends
        util.get_temp_dir()
        before = multiprocessing.active_children()
        self._manager.start(_begin)
        (self.process,) = [p for p in multiprocessing.active_children() if p not in before]
        self._desk: Any = self._manager.Desk()  # type: ignore[attr-defined]
        self._loaded = ThreadPoolExecutor(1).submit(self._desk.load, model, device, dtype)

    @property
    def desk(self) -> Any:
        """The desk, once the model is loaded. Raises what loading raised."""
        self._loaded.result()
        return self._desk

    def state(self) -> str:
        """Why the process has ended; empty while it lives."""
        if (code := self.process.exitcode) is None:
            return ""
        how = (
            f"code {code}"
            if code >= 0
            else f"{signal.Signals(-code).name}{', perhaps for want of memory' if -code == KILL else ''}"
        )
        return f"the model's process has ended ({how})"

    def wait(self) -> str:
        """Returns when the process has ended, and :meth:`state`."""
        connection.wait([self.process.sentinel])
        while not (why := self.state()):  # another thread may be collecting its code just now
            time.sleep(0.01)
        return why

    def close(self) -> None:
        """Ends the process."""
        self._manager.shutdown()
