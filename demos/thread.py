"""The thread that owns the model: jobs in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

POLL = 0.05  # seconds between two looks at `stop` while others have the model
T = TypeVar("T")


class ModelThread:
    """Everything that touches the model runs here, one job after the other."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="vtprune-engine")
        self._worker_id = 0  # of the thread that works on the model

    def close(self) -> None:
        """Ends the thread; jobs that wait are cancelled."""
        self._worker.shutdown(cancel_futures=True)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        def work() -> T:
            self._worker_id = threading.get_ident()
            return job()

        return self._worker.submit(work)

    def settle(self, future: Future) -> None:
        """Returns when ``future`` is over or will never begin. The garbage collector may call this from the working
        thread, which cannot wait for itself."""
        if not future.cancel() and threading.get_ident() != self._worker_id:
            wait([future])

    def do(self, job: Callable[[], T], stop: threading.Event | None) -> T | None:
        """The job's value, ``None`` if ``stop`` came before its turn; its exceptions as they are."""
        future = self.submit(job)
        try:
            while not wait([future], POLL).done:
                if stop is not None and stop.is_set() and future.cancel():
                    return None
            return future.result()
        finally:
            self.settle(future)
