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
from .stops import Stops

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
    """A :class:`Desk` in another process. :attr:`desk` waits until the model is there.

    Attributes:
        process: the other one.
        asking: who, on which page, has asked and waits; known before the desk hears of it.
    """

    def __init__(self, model: str | None, device: str, dtype: str):
        self.asking = Stops()
        self._model = (model, device, dtype)
        self._trouble = ""
        # A forked process keeps the torch that is imported here already; elsewhere, or once CUDA is in use, it starts
        # anew.
        self._start("fork" if sys.platform == "linux" else "spawn")

    def _start(self, how: str) -> None:
        self._manager = _Manager(ctx=multiprocessing.get_context(how))
        # of the socket between the two: made here, it goes with this process, however the other one ends
        util.get_temp_dir()
        before = multiprocessing.active_children()
        self._manager.start(_begin)
        (self.process,) = [p for p in multiprocessing.active_children() if p not in before]
        self._desk: Any = self._manager.Desk()  # type: ignore[attr-defined]
        self._loaded = ThreadPoolExecutor(1).submit(self._desk.load, *self._model)

    def restart(self) -> None:
        """Starts a process that has ended anew. Raises what loading raises."""
        self._trouble = self._ended()
        self._start("spawn")  # this one has threads by now, whose locks a fork would keep
        self._loaded.result()
        self._trouble = ""

    @property
    def desk(self) -> Any:
        """The desk, once the model is loaded. Raises what loading raised."""
        self._loaded.result()
        return self._desk

    def stop(self, token: str) -> None:
        """Ends what ``token`` has running or waiting, here and, where the model is loaded, at the desk."""
        self.asking.stop(token)
        if self._loaded.done():
            self.desk.stop(token)

    def state(self) -> str:
        """What is wrong with the process, which has ended or is being started again; empty while all is well. One that
        ends before its model is loaded is not started again."""
        why = self._ended()
        worked = self._loaded.done() and self._loaded.exception() is None
        if (why and worked) or self._trouble:
            return f"{why or self._trouble}; it is being started again"
        return why

    def _ended(self) -> str:
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
        """Returns when the process has ended: why."""
        connection.wait([self.process.sentinel])
        while not (why := self._ended()):  # another thread may be collecting its code just now
            time.sleep(0.01)
        return why

    def close(self) -> None:
        """Ends the process."""
        self._manager.shutdown()
