"""The requests of one call, answered batch by batch: what fails in a batch is tried alone, what is done is noted in a
journal and not done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from tqdm import tqdm

from ..core.failures import FAILURES
from ..core.types import VtpruneError
from ..measure.runs import Journal, digest
from .errors import first_line


def own(requests: Sequence[Instance]) -> list[int]:
    """The places of the requests that count; the rest evens out the ranks and is thrown away."""
    return [i for i, r in enumerate(requests) if not (r.metadata or {}).get("__padding_only__")]


def batches(
    left: Sequence[int], requests: Sequence[Instance], size: int, alike: Callable[[Instance], str] | None
) -> Iterator[list[int]]:
    """Neighbours of one task that are ``alike`` (``None``: all are), ``size`` at most."""

    def key(i: int) -> Any:
        return None if alike is None else (alike(requests[i]), requests[i].args[-2])

    part: list[int] = []
    for i in left:
        if part and (len(part) == size or key(i) != key(part[0])):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


class Work:
    """Requests on their way to answers.

    Attributes:
        answers: by place among ``requests``, those of the journal to begin with.
        left: the places, out of ``places``, that have no answer yet.
    """

    def __init__(
        self,
        requests: Sequence[Instance],
        places: Sequence[int],
        journal: Journal,
        costs: list[dict[str, Any]],
        failures: list[str],
    ):
        self.requests, self.journal, self.costs, self.failures = requests, journal, costs, failures
        self.places = places
        self.answers: dict[int, Any] = {places[r["i"]]: r["answer"] for r in journal.records}
        for batch in journal.batches:
            costs += batch["costs"]
        self.left = [i for i in places if i not in self.answers]
        self._numbers = {i: k for k, i in enumerate(places)}  # in the journal

    def run(self, parts: Iterator[list[int]], ask: Callable[[list[Instance]], list[Any]], quiet: bool) -> None:
        """Asks for the answers of ``parts``, see :func:`batches`."""
        with tqdm(total=len(self.places), initial=len(self.answers), disable=quiet, desc="vtprune") as bar:
            for part in parts:
                self._try(part, ask)
                bar.update(len(part))

    def _try(self, part: list[int], ask: Callable[[list[Instance]], list[Any]]) -> None:
        """A batch; if it fails, its samples one by one."""
        before = len(self.costs)
        try:
            answers = ask([self.requests[i] for i in part])
        except FAILURES as e:
            del self.costs[before:]
            if len(part) == 1:
                self.failures.append(_failure(self.requests[part[0]], e))
                return
            for i in part:
                self._try([i], ask)
            return
        pairs = list(zip(part, answers, strict=True))
        self.journal.add([{"i": self._numbers[i], "answer": a} for i, a in pairs], costs=self.costs[before:])
        self.answers.update(pairs)


def _failure(request: Instance, e: Exception) -> str:
    _, number, task, split = request.args[-4:]
    reason = first_line(e) if isinstance(e, VtpruneError) else f"{type(e).__name__}: {first_line(e)}"
    return f"{task} {split} {number}: {reason}"


def make_folder(folder: Path) -> None:
    """Raises :class:`VtpruneError` if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot make the folder {folder}: {e.strerror or e}") from e


def what_is_asked(requests: Sequence[Instance], settings: Callable[[Instance], Any] | None) -> str:
    """Tells calls apart: a digest of the requests and of what ``settings`` says of each."""
    return digest(
        [
            [
                *r.args[-3:],
                r.idx,
                *(a for a in r.args[:2] if isinstance(a, str)),
                settings is not None and settings(r),
            ]
            for r in requests
        ]
    )
