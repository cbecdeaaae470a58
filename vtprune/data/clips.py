"""``clips``: a generated video question set where every answer needs several frames.

A clip is a few frames of one background. Coloured shapes (those of :mod:`vtprune.data.scenes`, by the same renderer)
stay, move along a line, appear, vanish, flash up in one frame or miss one; five kinds of question (:data:`ABILITIES`)
ask for it in the words that the bundled model knows, where a frame is an "image" and "is there an image of A not of B"
asks whether A came before B. As in ``scenes``, an index always gives the same clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scenes import COLORS, SHAPES, SIZE, Item, background, draw

FRAMES = 4
ABILITIES = ("order", "counting", "direction", "when", "constant")
GAP = 24  # pixels: a shorter way is no move
_SPLITS = {"train": 0, "val": 1, "test": 2}
_CLIPS = 20011  # sets the random stream apart from that of scenes

Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


@dataclass(frozen=True)
class Track:
    """One shape through the clip: its box in every frame, ``None`` where it is not there."""

    kind: str
    color: str
    boxes: tuple[Box | None, ...]

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def seen(self) -> tuple[int, ...]:
        """Numbers of the frames that show it, from 0."""
        return tuple(f for f, box in enumerate(self.boxes) if box is not None)

    def item(self, frame: int) -> Item | None:
        box = self.boxes[frame]
        return None if box is None else Item(self.kind, self.color, box)


@dataclass(frozen=True)
class Question:
    """``boxes``: the places that a reader has to look at, ``(frame from 0, box)``."""

    ability: str
    text: str
    answer: str
    boxes: tuple[tuple[int, Box], ...]


@dataclass(frozen=True)
class Clip:
    """``frames``: uint8 ``[F, SIZE, SIZE, 3]``."""

    frames: np.ndarray
    tracks: tuple[Track, ...]
    questions: tuple[Question, ...]


def clip(index: int, split: str = "train", *, frames: int = FRAMES, max_items: int = 5, per_ability: int = 2) -> Clip:
    """Clip number ``index`` of ``split`` with up to ``per_ability`` questions of each ability. Raises ``ValueError``
    for an unknown split, a negative index, fewer than 3 or more than 6 frames, or fewer than 3 items."""
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(_SPLITS)}")
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    if not 3 <= frames <= 6:
        raise ValueError(f"a clip has 3 to 6 frames, got {frames}")
    if max_items < 3:
        raise ValueError(f"max_items must be at least 3, got {max_items}")
    rng = np.random.RandomState([_CLIPS, _SPLITS[split], index])
    tracks = layout(rng, frames, max_items)
    return Clip(_render(rng, tracks, frames), tracks, tuple(questions(rng, tracks, per_ability)))


def clip_tracks(index: int, split: str = "train", *, frames: int = FRAMES, max_items: int = 5) -> tuple[Track, ...]:
    """The tracks of a clip, without drawing it."""
    return layout(np.random.RandomState([_CLIPS, _SPLITS[split], index]), frames, max_items)


def reorder(tracks: Sequence[Track], order: Sequence[int]) -> tuple[Track, ...]:
    """The tracks of the clip whose frames are those of the given numbers, in that order."""
    return tuple(Track(t.kind, t.color, tuple(t.boxes[f] for f in order)) for t in tracks)


# ----------------------------------------------------------------------------------------------------------------
# layout and rendering


def layout(rng: np.random.RandomState, frames: int, max_items: int) -> tuple[Track, ...]:
    """``max_items`` tracks or one less, of different names, that never touch each other (fewer where there is no
    room)."""
    tracks: list[Track] = []
    names: set[tuple[str, str]] = set()
    for _ in range(rng.randint(max_items - 1, max_items + 1)):
        shown = _shown(rng, frames)
        for _ in range(30):
            kind, color = SHAPES[rng.randint(len(SHAPES))], list(COLORS)[rng.randint(len(COLORS))]
            way = _way(rng, frames)
            track = Track(kind, color, tuple(box if s else None for box, s in zip(way, shown, strict=True)))
            if (color, kind) not in names and not any(_touch(track, other) for other in tracks):
                names.add((color, kind))
                tracks.append(track)
                break
    return tuple(tracks)


def _shown(rng: np.random.RandomState, frames: int) -> list[bool]:
    """In which frames a track is there: all, all but one, one, from one on, up to one."""
    what = rng.choice(5, p=(0.25, 0.25, 0.15, 0.2, 0.15))
    one, later = rng.randint(frames), rng.randint(min(2, frames - 2), max(2, frames - 1))
    rule: Callable[[int], bool] = (
        lambda f: True,
        lambda f: f != one,
        lambda f: f == one,
        lambda f: f >= later,
        lambda f: f < later,
    )[what]
    return [rule(f) for f in range(frames)]


def _way(rng: np.random.RandomState, frames: int) -> list[Box]:
    """Boxes of a shape that stays (one of three) or moves straight on along one axis."""
    radius = rng.uniform(10, 16)
    length = 0.0 if rng.rand() < 0.33 else rng.uniform(54, 112) * (1 if rng.rand() < 0.5 else -1)
    free = SIZE - 2 * radius - 4 - abs(length)
    along = radius + 2 + rng.uniform(0, free) + max(0.0, -length)
    across = rng.uniform(radius + 2, SIZE - radius - 2)
    upright = rng.rand() < 0.5
    boxes = []
    for f in range(frames):
        a = along + length * f / (frames - 1)
        x, y = (across, a) if upright else (a, across)
        boxes.append((x - radius, y - radius, x + radius, y + radius))
    return boxes


def _touch(a: Track, b: Track) -> bool:
    return any(
        p is not None and q is not None and max(p[0] - q[2], q[0] - p[2], p[1] - q[3], q[1] - p[3]) < 1
        for p, q in zip(a.boxes, b.boxes, strict=True)
    )


def _render(rng: np.random.RandomState, tracks: tuple[Track, ...], frames: int) -> np.ndarray:
    """Everything but the grain is the same in all frames."""
    empty = background(rng)
    looks = [(np.array(COLORS[t.color], float) + rng.uniform(-9, 9, size=3), rng.uniform(-0.3, 0.3)) for t in tracks]
    out = []
    for f in range(frames):
        canvas = empty.copy()
        for track, (color, turn) in zip(tracks, looks, strict=True):
            item = track.item(f)
            if item is not None:
                draw(canvas, item, color, turn)
        canvas += rng.normal(0, 4.0, size=canvas.shape)
        out.append(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))
    return np.stack(out)


# -------------------------------------------------------------------------------------------------------------
# questions


def questions(rng: np.random.RandomState, tracks: tuple[Track, ...], per_ability: int) -> list[Question]:
    """Up to ``per_ability`` different questions of each ability."""
    makers = {"order": _order, "counting": _counting, "direction": _direction, "when": _when, "constant": _constant}
    out: list[Question] = []
    for ability in ABILITIES:
        found: dict[str, Question] = {}
        for _ in range(4 * per_ability):
            q = makers[ability](rng, tracks)
            if q is not None:
                found.setdefault(q.text, q)
            if len(found) == per_ability:
                break
        out += found.values()
    return out


def _pick(rng: np.random.RandomState, options: Sequence[Any]) -> Any:
    return options[rng.randint(len(options))]


def _places(tracks: Sequence[Track]) -> tuple[tuple[int, Box], ...]:
    return tuple((f, box) for t in tracks for f, box in enumerate(t.boxes) if box is not None)


def _order(rng: np.random.RandomState, tracks: tuple[Track, ...]) -> Question | None:
    """Whether one came before another; the answer is drawn first. "No" needs the first to be there only together with
    the second, so that words and order agree."""
    late = rng.rand() < 0.85  # both after the first frame, which would otherwise tell most orders
    both = [(a, b) for a in tracks for b in tracks if (min(a.seen[0], b.seen[0]) > 0) == late]
    before = [(a, b) for a, b in both if a.seen[0] < b.seen[0]]
    after = [(a, b) for a, b in both if a.seen[0] > b.seen[0] and set(a.seen) <= set(b.seen)]
    if not before or not after:
        return None
    yes = rng.rand() < 0.5
    a, b = _pick(rng, before if yes else after)
    text = f"is there a image of the {a.name} not of the {b.name} ?"
    return Question("order", text, "yes" if yes else "no", _places((a, b)))


def _counting(rng: np.random.RandomState, tracks: tuple[Track, ...]) -> Question | None:
    """How many of the clip's objects one frame lacks; draws the count first, then a frame that has it."""
    want = rng.choice(4, p=(0.3, 0.15, 0.2, 0.35))
    lacks = [sum(t.boxes[f] is None for t in tracks) for f in range(len(tracks[0].boxes))]
    options = [f for f, n in enumerate(lacks) if n == want]
    if not options:
        return None
    f = _pick(rng, options)
    return Question("counting", f"how many objects are not present in image {f + 1} ?", str(lacks[f]), _places(tracks))


def _direction(rng: np.random.RandomState, tracks: tuple[Track, ...]) -> Question | None:
    """Where an object has moved from the first to the last frame."""
    word = _pick(rng, ("left", "right", "above", "below"))
    last = len(tracks[0].boxes) - 1
    hit = [t for t in tracks if _moved(t, last) == word]
    if not hit:
        return None
    t = _pick(rng, hit)
    text = f"in image {last + 1} is the {t.name} left right above below of image 1 ?"
    return Question("direction", text, word, tuple(p for p in _places((t,)) if p[0] in (0, last)))


def _moved(track: Track, last: int) -> str | None:
    a, b = track.boxes[0], track.boxes[last]
    if a is None or b is None:
        return None
    dx, dy = b[0] - a[0], b[1] - a[1]
    if max(abs(dx), abs(dy)) < GAP:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _when(rng: np.random.RandomState, tracks: tuple[Track, ...]) -> Question | None:
    """The only frame with an object, or without it; the frame is drawn first."""
    frames = len(tracks[0].boxes)
    f, there = rng.randint(frames), rng.rand() < 0.5
    hit = [t for t in tracks if len(t.seen) == (1 if there else frames - 1) and (f in t.seen) == there]
    if not hit:
        return None
    t = _pick(rng, hit)
    text = f"in what image is the {t.name} {'' if there else 'not '}present ?"
    return Question("when", text, str(f + 1), _places((t,)))


def _constant(rng: np.random.RandomState, tracks: tuple[Track, ...]) -> Question | None:
    """Whether one object is there all the time (the answer is drawn first), or which one is."""
    frames = len(tracks[0].boxes)
    every = " ".join(str(f + 1) for f in range(frames))
    stay = [t for t in tracks if len(t.seen) == frames]
    some = [t for t in tracks if 1 < len(t.seen) < frames]
    if rng.rand() < 0.3 and stay and some:
        yes = rng.rand() < 0.5
        t = _pick(rng, stay if yes else some)
        text = f"is the {t.name} present in image {every} ?"
        return Question("constant", text, "yes" if yes else "no", _places((t,)))
    if len(stay) != 1:
        return None
    (t,) = stay
    what, answer = ("color", t.color) if rng.rand() < 0.5 else ("shape", t.kind)
    return Question("constant", f"what {what} is the object present in image {every} ?", answer, _places((t,)))
