"""Generated pictures to try the demo with."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from PIL import Image

from vtprune.core.types import VtpruneError
from vtprune.data import scenes
from vtprune.inputs import images
from vtprune.measure import samples as samples_module


def samples(n: int) -> list[samples_module.Sample]:
    """``n`` generated test pictures with one question each and its right answer, abilities in turn; always the same.
    Raises :class:`VtpruneError` for ``n < 1``."""
    if n < 1:
        raise VtpruneError(f"the number of samples must be at least 1, got {n}")
    order = ("attribute", "counting", "text", "location", "relation", "existence")
    out: list[samples_module.Sample] = []
    for index in itertools.count():
        scene, ability = scenes.scene(index, "test"), order[len(out) % len(order)]
        for q in [q for q in scene.questions if q.ability == ability][:1]:
            out.append(
                samples_module.Sample(
                    Image.fromarray(scene.image), q.text, q.answer, ability, q.boxes, f"scenes/{index}"
                )
            )
        if len(out) == n:
            return out
    raise AssertionError("there is always another scene")


def number(path: Path) -> int | None:
    """Which of the :func:`samples` a file shows, from 1 on; ``None``: none of them, whatever its name."""
    named = re.fullmatch(r"sample-([1-9])\.png", path.name)
    if named is None:
        return None
    mine = samples(int(named[1]))[-1].picture()
    shown = images.open_image(path)
    return int(named[1]) if shown.size == mine.size and shown.tobytes() == mine.tobytes() else None


def saved(n: int, folder: Path) -> list[list[str]]:
    """The :func:`samples`, pictures written into ``folder``: path, question, right answer."""
    out = []
    for i, sample in enumerate(samples(n)):
        path = folder / f"sample-{i + 1}.png"
        sample.picture().save(path)
        out.append([str(path), sample.question, sample.answer])
    return out
