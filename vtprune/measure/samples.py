"""Questions with known answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.types import VtpruneError
from ..data import clips, easyvqa, scenes
from ..inputs.images import open_image
from .runs import digest


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        image: RGB picture or a path.
        question: about it.
        answer: in the letters of the benchmark.
        ability: what it asks for.
        boxes: (left, top, right, bottom) pixels where the answer lies.
        source: ``"<set>/<image>"``, by default the picture itself.
        frames: all pictures of a clip, of which ``image`` is the first.
    """

    image: Image.Image | str | Path
    question: str
    answer: str
    ability: str
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    source: str = ""
    frames: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.source:
            what = (
                self.image
                if not isinstance(self.image, Image.Image)
                else digest(self.image.size, self.image.tobytes().hex())
            )
            object.__setattr__(self, "source", f"questions/{what}")

    @property
    def set(self) -> str:
        return self.source.partition("/")[0]

    def picture(self) -> Image.Image:
        return self.image if isinstance(self.image, Image.Image) else open_image(self.image)

    def shown(self) -> list[Image.Image]:
        """What the question is about, in order: the picture, or a clip's frames."""
        return list(self.frames) or [self.picture()]


def easy_vqa_samples(n: int, split: str = "test") -> list[Sample]:
    """``n`` questions of easy-VQA: colour, shape, yes/no in turn (yes and no in turn); always the same. Raises
    :class:`VtpruneError` without the package."""
    if n < 1:
        raise VtpruneError(f"the number of samples must be at least 1, got {n}")
    try:
        questions = easyvqa.questions(split)
    except ModuleNotFoundError as e:
        raise VtpruneError(str(e)) from e
    order = np.random.RandomState(0).permutation(len(questions))
    pools: dict[str, list] = {"color": [], "shape": [], "yes": [], "no": []}
    for i in order:
        q = questions[i]
        pools[q.answer if q.type == "yes/no" else q.type].append(q)
    binary = [q for pair in zip(pools["yes"], pools["no"], strict=False) for q in pair]
    turns = zip(pools["color"], pools["shape"], binary, strict=False)
    chosen = itertools.islice(itertools.chain.from_iterable(turns), n)
    return [Sample(q.image, q.text, q.answer, q.type, source=f"easy-vqa/{Path(q.image).stem}") for q in chosen]


def scenes_samples(n_scenes: int, split: str = "test") -> list[Sample]:
    """All questions (about 11 each, two per ability) of the first ``n_scenes`` scenes of ``split``."""
    if n_scenes < 1:
        raise VtpruneError(f"the number of scenes must be at least 1, got {n_scenes}")
    out = []
    for i in range(n_scenes):
        scene = scenes.scene(i, split, per_ability=2)
        image = Image.fromarray(scene.image)
        out += [Sample(image, q.text, q.answer, q.ability, q.boxes, f"scenes/{i}") for q in scene.questions]
    return out


def clips_samples(n_clips: int, split: str = "test") -> list[Sample]:
    """All questions (about 6 each, up to two per ability) of the first ``n_clips`` clips of ``split``."""
    if n_clips < 1:
        raise VtpruneError(f"the number of clips must be at least 1, got {n_clips}")
    out = []
    for i in range(n_clips):
        clip = clips.clip(i, split)
        frames = tuple(Image.fromarray(frame) for frame in clip.frames)
        out += [
            Sample(frames[0], q.text, q.answer, q.ability, source=f"clips/{i}", frames=frames) for q in clip.questions
        ]
    return out


SETS: dict[str, Callable[[int], list[Sample]]] = {
    "clips": clips_samples,
    "easy-vqa": easy_vqa_samples,
    "scenes": scenes_samples,
}


def matches(answer: str, expected: str) -> bool:
    """Exact match, without spaces and case."""
    return "".join(answer.lower().split()) == "".join(expected.lower().split())


def sample_seed(seed: int, number: int) -> int:
    """The seed of the ``number``-th sample of a set, in every harness: a sample's draw depends on nothing else."""
    return seed * 1_000_003 + number


def numbers(samples: Sequence[Sample]) -> list[int]:
    """The place of every sample within its set."""
    seen: Counter[str] = Counter()
    out = []
    for s in samples:
        out.append(seen[s.set])
        seen[s.set] += 1
    return out
