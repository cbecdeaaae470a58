"""The folder of checkpoints: what they belong to, and which of them a run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.types import VtpruneError
from ..measure.runs import read

PLAN = "plan.json"  # in the folder of checkpoints: what they belong to


@contextmanager
def no_empty(folder: Path, arguments: Any) -> Iterator[None]:
    """The Trainer makes its folder at once; one that was made for nothing goes."""
    made = not folder.exists()
    try:
        yield
    finally:
        if made and arguments.process_index == 0 and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _newest(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def last_of(folder: Path, plan: Mapping[str, Any]) -> Path:
    """The newest checkpoint in ``folder``. Raises :class:`VtpruneError` if there is none, or one of another run."""
    last = _newest(folder)
    if last is None or not (folder / PLAN).is_file():
        raise VtpruneError(f"no checkpoint to go on from in {folder}")
    before = read(folder / PLAN)
    now = json.loads(json.dumps(plan))
    if other := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        raise VtpruneError(f"the checkpoints in {folder} are of another run: {other[0]} was another")
    return last


def begin(folder: Path, plan: Mapping[str, Any], last: Path | None) -> None:
    """Writes what the checkpoints in ``folder`` belong to. Raises :class:`VtpruneError` if there are some of an earlier
    run that is not gone on with."""
    if last is None and _newest(folder) is not None:
        raise VtpruneError(f"{folder} holds checkpoints already: --resume goes on with them, or remove the folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json.dumps(plan) + "\n", encoding="utf-8")
