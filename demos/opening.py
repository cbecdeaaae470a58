"""What a page opens with: the first sample, and what both sides answer."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .messages import EXPECTED, GONE, why
from .worker import Worker

TOKEN = "opening"  # names it at the desk; pages have longer names
LENGTH = 32  # tokens of an answer, at most


class Opening:
    """The answers of both sides to one sample, asked once, when the demo starts, for every page that opens.

    Attributes:
        sample: path of the picture, question, right answer.
    """

    def __init__(self, worker: Worker, sample: list[str], recipe: str | None, seed: int):
        """``recipe``: of side B; ``None``: what the desk starts with."""
        self.worker, self.sample, self.recipe, self.seed = worker, sample, recipe, seed
        self._lock = threading.Lock()
        self._answers: Future[dict[str, Any]] | None = None

    def start(self) -> Future[dict[str, Any]]:
        """Asks, unless somebody has: the desk's last update, or one with ``message``."""
        with self._lock:
            if self._answers is None:
                self._answers = ThreadPoolExecutor(1).submit(self._ask)
            return self._answers

    def give_way(self) -> None:
        """Ends it if it still runs, for somebody who wants to know something else."""
        if self._answers is not None and not self._answers.done():
            self.worker.stop(TOKEN)

    def _ask(self) -> dict[str, Any]:
        path, question, truth = self.sample
        update: dict[str, Any] = {"message": GONE}
        try:
            desk = self.worker.desk
            right = self.recipe or desk.about()["start"]
            sides = [{"recipe": name, "file": None, "budget": "own", "seed": self.seed} for name in ("dense", right)]
            *_, update = desk.ask(TOKEN, path, question, sides, LENGTH, truth)
        except EXPECTED as e:
            update = {"message": why(e)}
        return update
