"""The generated data set: deterministic, balanced, and its answers true by an independent reading of the layout."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from vtprune.data import easyvqa, scenes


def test_scene_is_frozen():
    """The picture of an index never changes (a digest of layout and questions; the pixels to within rounding of
    libm)."""
    s = scenes.scene(0, "test")
    text = repr([(i.kind, i.color, i.cell, i.text) for i in s.items]) + repr([(q.text, q.answer) for q in s.questions])
    again = scenes.scene(0, "test")
    assert np.array_equal(s.image, again.image) and s.questions == again.questions
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FROZEN
    assert s.image.shape == (168, 168, 3) and s.image.dtype == np.uint8


FROZEN = "60e82f47101681cc"


def test_splits_differ_and_bad_arguments_raise():
    assert not np.array_equal(scenes.scene(0, "train").image, scenes.scene(0, "test").image)
    with pytest.raises(ValueError, match="unknown split"):
        scenes.scene(0, "dev")
    with pytest.raises(ValueError, match=">= 0"):
        scenes.scene(-1)


def _truth(question: scenes.Question, items: tuple[scenes.Item, ...]) -> str:
    """Answers a question from the layout alone, word by word, written apart from the generator."""
    shapes = [i for i in items if i.kind != "sign"]
    w = question.text.split()

    def one(color: str, kind: str) -> scenes.Item:
        (found,) = [i for i in shapes if (i.color, i.kind) == (color, kind)]
        return found

    if question.text.startswith("is there"):
        if w[2] == "anything":
            return "yes" if any(i.color == w[3] for i in shapes) else "no"
        wanted = set(w[3:-1])
        return "yes" if any(wanted <= {i.color, i.kind} for i in shapes) else "no"
    if question.text.startswith("what color"):
        (found,) = [i for i in shapes if i.kind == w[4]]
        return found.color
    if question.text.startswith("what shape"):
        (found,) = [i for i in shapes if i.color == w[4]]
        return found.kind
    if question.text.startswith("how many"):
        return str(sum(w[2] in (i.color, i.kind) for i in shapes))
    if question.text.startswith("where"):
        return one(w[3], w[4]).cell
    if question.text.startswith("what does"):
        signs = [i for i in items if i.kind == "sign" and (len(w) == 6 or i.color == w[3])]
        (found,) = signs
        return " ".join(found.text)
    a, b = one(w[2], w[3]), one(w[-3], w[-2])
    (ax, ay), (bx, by) = a.center, b.center
    return "yes" if {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[w[4]] else "no"


def test_answers_are_true_boxes_hold_the_objects_and_nothing_overlaps():
    for i in range(150):
        s = scenes.scene(i, "val", per_ability=4)
        assert len({item.cell for item in s.items if item.kind != "sign"}) == sum(
            item.kind != "sign" for item in s.items
        )
        for q in s.questions:
            assert q.answer == _truth(q, s.items), q
            assert all(0 <= b[0] < b[2] <= scenes.SIZE and 0 <= b[1] < b[3] <= scenes.SIZE for b in q.boxes)


@pytest.mark.ci
def test_answers_are_balanced():
    """No ability has an answer that is right much more often than chance, and the words of yes/no questions tell
    nothing."""
    answers: dict[str, Counter] = {}
    by_text: dict[str, Counter] = {}
    for i in range(600):
        for q in scenes.scene(i, "val").questions:
            answers.setdefault(q.ability, Counter())[q.answer] += 1
            by_text.setdefault(q.text, Counter())[q.answer] += 1
    share = {a: c.most_common(1)[0][1] / c.total() for a, c in answers.items()}
    assert (
        share["existence"] < 0.56 and share["relation"] < 0.56 and share["counting"] < 0.35 and share["attribute"] < 0.2
    )
    assert share["location"] < 0.12 and share["text"] < 0.03
    yes = [c["yes"] / c.total() for t, c in by_text.items() if t.startswith("is there") and c.total() >= 20]
    assert yes and max(yes) < 0.8 and min(yes) > 0.2


def test_colors_are_drawn_where_the_items_are():
    s = scenes.scene(3, "test")
    for item in s.items:
        if item.kind in ("circle", "square"):
            x, y = item.center
            pixel = s.image[int(y), int(x)].astype(int)
            nearest = min(scenes.COLORS, key=lambda c: np.abs(pixel - scenes.COLORS[c]).sum())
            assert nearest == item.color


def test_easy_vqa_types():
    test = easyvqa.questions("test")
    assert len(test) == 9673 and Counter(q.type for q in test) == {"yes/no": 7136, "shape": 1257, "color": 1280}
    assert easyvqa.normalise("What color is the shape?") == "what color is the shape ?"
    with pytest.raises(ValueError, match="unknown split"):
        easyvqa.questions("val")
