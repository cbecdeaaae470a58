"""``scenes``: a generated visual question answering set where every answer is local.

Each image holds a few coloured shapes and at most two small signs on a 4 x 4 grid of cells (``a1`` top left, ``d4``
bottom right), and six kinds of question (:data:`ABILITIES`) whose answer sits in known boxes. The renderer is our own
(signed distance functions and a 5 x 7 bitmap alphabet): no font, no picture and no licence from anybody. Random numbers
come from ``numpy.random.RandomState``, whose stream is frozen by NumPy, so an index always gives the same image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE = 168  # pixels, square
CELLS = 4  # per side
CELL = SIZE // CELLS
ABILITIES = ("existence", "attribute", "counting", "relation", "location", "text")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (205, 32, 36),
    "green": (36, 150, 58),
    "blue": (36, 70, 200),
    "yellow": (240, 215, 40),
    "orange": (243, 128, 24),
    "purple": (130, 48, 160),
    "black": (18, 18, 20),
    "white": (246, 246, 244),
}
PLATES = ("white", "yellow")  # sign colours
_SPLITS = {"train": 0, "val": 1, "test": 2}

# 5 x 7 bitmaps, one string of seven rows each, base 32: bit 4 is the left-most pixel.
_GLYPHS = {
    "a": (14, 17, 17, 31, 17, 17, 17),
    "c": (14, 17, 16, 16, 16, 17, 14),
    "e": (31, 16, 16, 30, 16, 16, 31),
    "f": (31, 16, 16, 30, 16, 16, 16),
    "h": (17, 17, 17, 31, 17, 17, 17),
    "j": (7, 2, 2, 2, 2, 18, 12),
    "k": (17, 18, 20, 24, 20, 18, 17),
    "l": (16, 16, 16, 16, 16, 16, 31),
    "p": (30, 17, 17, 30, 16, 16, 16),
    "t": (31, 4, 4, 4, 4, 4, 4),
    "u": (17, 17, 17, 17, 17, 17, 14),
    "x": (17, 17, 10, 4, 10, 17, 17),
    "y": (17, 17, 10, 4, 4, 4, 4),
    "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (14, 17, 1, 6, 1, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
}
ALPHABET = tuple(_GLYPHS)


@dataclass(frozen=True)
class Item:
    """One thing in the image: a shape (``kind`` in :data:`SHAPES`) or a sign (``kind == "sign"``). ``box`` = (left,
    top, right, bottom), pixels."""

    kind: str
    color: str
    box: tuple[float, float, float, float]
    text: str = ""

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def cell(self) -> str:
        x, y = self.center
        return f"{'abcd'[int(x // CELL)]}{int(y // CELL) + 1}"


@dataclass(frozen=True)
class Question:
    """``boxes`` are the places a reader has to look at (empty when the whole image has to be searched)."""

    ability: str
    text: str
    answer: str
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    """``image``: uint8 ``[SIZE, SIZE, 3]``."""

    image: np.ndarray
    items: tuple[Item, ...]
    questions: tuple[Question, ...]


def scene(index: int, split: str = "train", *, max_items: int = 6, per_ability: int = 2) -> Scene:
    """Scene number ``index`` of ``split`` with up to ``per_ability`` questions of each ability. Raises ``ValueError``
    for an unknown split or a negative index."""
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(_SPLITS)}")
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    rng = np.random.RandomState([_SPLITS[split], index])
    items = layout(rng, max_items)
    return Scene(_render(rng, items), items, tuple(_questions(rng, items, per_ability)))


# ----------------------------------------------------------------------------------------------------------------
# layout


def layout(rng: np.random.RandomState, max_items: int) -> tuple[Item, ...]:
    free = {(r, c) for r in range(CELLS) for c in range(CELLS)}
    items: list[Item] = []
    plates = list(rng.permutation(PLATES))[: rng.choice(3, p=(0.3, 0.4, 0.3))]
    for plate in plates:  # a sign takes two neighbouring cells of one row
        spots = [(r, c) for r, c in sorted(free) if (r, c + 1) in free]
        r, c = spots[rng.randint(len(spots))]
        free -= {(r, c), (r, c + 1)}
        text = "".join(ALPHABET[i] for i in rng.randint(len(ALPHABET), size=rng.randint(2, 4)))
        w, h = 23 * len(text) + 5, 36
        x = c * CELL + rng.uniform(1, 2 * CELL - w - 1)
        y = r * CELL + rng.uniform(1, CELL - h - 1)
        items.append(Item("sign", str(plate), (x, y, x + w, y + h), text))
    n = rng.randint(min(3, max_items), max_items + 1)
    # Repeating one shape or one colour makes the counts (and the hard negatives) that independent draws would not.
    theme, repeat = rng.randint(2), rng.randint(1, 5)
    shape0, color0 = SHAPES[rng.randint(len(SHAPES))], list(COLORS)[rng.randint(len(COLORS))]
    seen: set[tuple[str, str]] = set()
    for k in range(n):
        for _ in range(20):
            shape = shape0 if theme == 0 and k < repeat else SHAPES[rng.randint(len(SHAPES))]
            color = color0 if theme == 1 and k < repeat else list(COLORS)[rng.randint(len(COLORS))]
            if (shape, color) not in seen:
                break
        else:
            continue
        seen.add((shape, color))
        cells = sorted(free)
        r, c = cells[rng.randint(len(cells))]
        free.discard((r, c))
        radius = rng.uniform(9.5, 18.5)
        slack = CELL / 2 - radius - 0.5
        x, y = (c + 0.5) * CELL + rng.uniform(-slack, slack), (r + 0.5) * CELL + rng.uniform(-slack, slack)
        items.append(Item(shape, color, (x - radius, y - radius, x + radius, y + radius)))
    return tuple(items)


# -------------------------------------------------------------------------------------------------------------
# rendering


def _polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon (negative inside), pixels."""
    best = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < ax + (y - ay) * ex / (by - ay))
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float, turn: float) -> np.ndarray:
    """Signed distance of pixel offsets ``(x, y)`` to a shape of radius ``r``, turned by ``turn`` radians."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * r) - 0.26 * r
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = cos * x + sin * y, -sin * x + cos * y
    if shape == "square":
        half = 0.78 * r
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 0.92 * r, b - 0.3 * r), np.maximum(b - 0.92 * r, a - 0.3 * r))
    points = 3 if shape == "triangle" else 10
    angle = -np.pi / 2 + 2 * np.pi * np.arange(points) / points
    radius = np.full(points, r)
    if shape == "star":
        radius[1::2] *= 0.42
    return _polygon(x, y, np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))


def _paint(canvas: np.ndarray, alpha: np.ndarray, color: np.ndarray, top: int, left: int) -> None:
    h, w = alpha.shape
    view = canvas[top : top + h, left : left + w]
    view += alpha[..., None] * (color - view)


def background(rng: np.random.RandomState) -> np.ndarray:
    """A muted grey-ish gradient with soft blobs, so that "empty" patches are not all alike: float ``[SIZE, SIZE,
    3]``."""
    base = rng.uniform(105, 160) + rng.uniform(-14, 14, size=3)
    coarse = rng.uniform(-16, 16, size=(7, 7, 1)) + rng.uniform(-5, 5, size=(7, 7, 3))
    grid = np.linspace(0, 5.999, SIZE)
    i0, frac = grid.astype(int), (grid % 1)[:, None, None]
    rows = coarse[i0] * (1 - frac) + coarse[i0 + 1] * frac
    frac = (grid % 1)[None, :, None]
    return base + rows[:, i0] * (1 - frac) + rows[:, i0 + 1] * frac


def draw(canvas: np.ndarray, item: Item, color: np.ndarray, turn: float = 0.0) -> None:
    """Paints a shape, turned by ``turn`` radians, or the plate of a sign."""
    left, top = int(item.box[0]) - 1, int(item.box[1]) - 1
    right, bottom = math.ceil(item.box[2]) + 1, math.ceil(item.box[3]) + 1
    top, left = max(top, 0), max(left, 0)
    y, x = np.mgrid[top : min(bottom, SIZE), left : min(right, SIZE)] + 0.5
    if item.kind == "sign":
        inside = (x > item.box[0]) & (x < item.box[2]) & (y > item.box[1]) & (y < item.box[3])
        _paint(canvas, inside.astype(float), color, top, left)
        return
    (cx, cy), r = item.center, (item.box[2] - item.box[0]) / 2
    d = _distance(item.kind, x - cx, y - cy, r - 0.5, turn)
    _paint(canvas, np.clip(0.5 - d, 0, 1), color, top, left)


def _render(rng: np.random.RandomState, items: tuple[Item, ...]) -> np.ndarray:
    canvas = background(rng)
    for item in items:
        color = np.array(COLORS[item.color], float) + rng.uniform(-9, 9, size=3)
        if item.kind != "sign":
            draw(canvas, item, color, rng.uniform(-0.3, 0.3))
            continue
        draw(canvas, item, color)
        ink = rng.uniform(10, 60, size=3)
        for k, char in enumerate(item.text):  # one glyph pixel = 4 x 4 image pixels
            bits = np.array([[row >> (4 - b) & 1 for b in range(5)] for row in _GLYPHS[char]], float)
            gy, gx = round(item.box[1] + 4), round(item.box[0] + 4 + 23 * k)
            _paint(canvas, np.kron(bits, np.ones((4, 4))), ink, gy, gx)
    canvas += rng.normal(0, 4.0, size=canvas.shape)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------
# questions


def _questions(rng: np.random.RandomState, items: tuple[Item, ...], per_ability: int) -> list[Question]:
    shapes = [i for i in items if i.kind != "sign"]
    makers = {
        "existence": _existence,
        "attribute": _attribute,
        "counting": _counting,
        "relation": _relation,
        "location": _location,
        "text": _text,
    }
    out: list[Question] = []
    for ability in ABILITIES:
        questions: dict[str, Question] = {}
        for _ in range(4 * per_ability):
            q = makers[ability](rng, shapes if ability != "text" else [i for i in items if i.kind == "sign"])
            if q is not None:
                questions.setdefault(q.text, q)
            if len(questions) == per_ability:
                break
        out += questions.values()
    return out


def _pick(rng: np.random.RandomState, options: list) -> Any:
    return options[rng.randint(len(options))]


def _existence(rng: np.random.RandomState, items: list[Item]) -> Question | None:
    """The answer is drawn first, so that no wording gives it away; half of the negatives are there in shape and in
    colour, but not together."""
    yes, form = rng.rand() < 0.5, rng.choice(3, p=(0.2, 0.2, 0.6))
    have_s, have_c = {i.kind for i in items}, {i.color for i in items}
    if form == 0:
        options = [s for s in SHAPES if (s in have_s) == yes]
        if not options:
            return None
        s = _pick(rng, options)
        text, hit = f"is there a {s} ?", [i for i in items if i.kind == s]
    elif form == 1:
        options = [c for c in COLORS if (c in have_c) == yes]
        c = _pick(rng, options)
        text, hit = f"is there anything {c} ?", [i for i in items if i.color == c]
    else:
        pairs = {(i.color, i.kind) for i in items}
        every = [(c, s) for c in COLORS for s in SHAPES if ((c, s) in pairs) == yes]
        hard = [(c, s) for c, s in every if c in have_c and s in have_s]
        c, s = _pick(rng, hard if not yes and hard and rng.rand() < 0.5 else every)
        text, hit = f"is there a {c} {s} ?", [i for i in items if (i.color, i.kind) == (c, s)]
    return Question("existence", text, "yes" if yes else "no", tuple(i.box for i in hit))


def _attribute(rng: np.random.RandomState, items: list[Item]) -> Question | None:
    if rng.rand() < 0.5:
        unique = [i for i in items if sum(j.kind == i.kind for j in items) == 1]
        if not unique:
            return None
        i = _pick(rng, unique)
        return Question("attribute", f"what color is the {i.kind} ?", i.color, (i.box,))
    unique = [i for i in items if sum(j.color == i.color for j in items) == 1]
    if not unique:
        return None
    i = _pick(rng, unique)
    return Question("attribute", f"what shape is the {i.color} object ?", i.kind, (i.box,))


def _counting(rng: np.random.RandomState, items: list[Item]) -> Question | None:
    """Draws the count first (0 to 4), then a shape or colour that has it."""
    want = rng.choice(5, p=(0.1, 0.15, 0.25, 0.25, 0.25))
    options = [("shape", s) for s in SHAPES if sum(i.kind == s for i in items) == want]
    options += [("color", c) for c in COLORS if sum(i.color == c for i in items) == want]
    if not options:
        return None
    kind, name = _pick(rng, options)
    hit = [i for i in items if name in (i.kind, i.color)]
    text = f"how many {name} objects are there ?" if kind == "color" else f"how many {name} shapes are there ?"
    return Question("counting", text, str(want), tuple(i.box for i in hit))


def _relation(rng: np.random.RandomState, items: list[Item]) -> Question | None:
    if len(items) < 2:
        return None
    a, b = (items[k] for k in rng.permutation(len(items))[:2])
    axis = rng.randint(2)
    gap = a.center[axis] - b.center[axis]
    if abs(gap) < 24:
        return None
    # "is A left of B" is asked with the true or the false word, half and half.
    word = ("left of", "right of") if axis == 0 else ("above", "below")
    k = rng.randint(2)
    yes = (gap < 0) == (k == 0)
    return Question(
        "relation",
        f"is the {a.color} {a.kind} {word[k]} the {b.color} {b.kind} ?",
        "yes" if yes else "no",
        (a.box, b.box),
    )


def _location(rng: np.random.RandomState, items: list[Item]) -> Question | None:
    if not items:
        return None
    i = items[rng.randint(len(items))]
    return Question("location", f"where is the {i.color} {i.kind} ?", i.cell, (i.box,))


def _text(rng: np.random.RandomState, signs: list[Item]) -> Question | None:
    if not signs:
        return None
    i = signs[rng.randint(len(signs))]
    which = f"{i.color} " if len(signs) > 1 else ""
    return Question("text", f"what does the {which}sign say ?", " ".join(i.text), (i.box,))


def vocabulary() -> list[str]:
    """Every word of every question and answer, sorted."""
    words = "is there a anything what color shape is the object objects shapes how many are where left right of above below does sign say yes no ?".split()  # noqa: E501
    cells = [f"{c}{r}" for c in "abcd" for r in range(1, 5)]
    return sorted({*words, *SHAPES, *COLORS, *cells, *ALPHABET, *map(str, range(7))})
