"""DART (arXiv 2502.11494) against a slow transcription on transformers' own keys and hidden states."""

from __future__ import annotations

import math
from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor
from vtprune.models.engine.host import cache_of

import vtprune
from vtprune.core.types import Geometry, Text, TokenView
from vtprune.methods.base import Cut, make

PROMPTS = [[4, 9], [7, 2, 5], [3, 2]]


def cosine(a: list[float], b: list[float]) -> float:
    dot, aa, bb = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


def strongest(keys: dict[int, list[float]], most: int) -> list[int]:
    return sorted(keys, key=lambda i: -sum(abs(v) for v in keys[i]))[:most]


def transcription(
    states: dict[int, list[float]],
    keys: dict[int, list[float]],
    image: list[int],
    words: list[int],
    keep: int,
    visual_pivots: int = 4,
    text_pivots: int = 4,
    count: str = "exact",
) -> list[int]:
    """What stays of the tokens ``image``, in the order of choice; ``states`` after the final norm."""
    kept = strongest({i: keys[i] for i in image}, min(visual_pivots, keep) if count == "exact" else visual_pivots)
    pivots = kept + strongest({i: keys[i] for i in words}, text_pivots)
    pool = [i for i in image if i not in kept]
    share, more = divmod(keep - len(kept), len(pivots))
    if count == "official":
        share, more = int(keep / (visual_pivots + text_pivots)), 0
    for turn, pivot in enumerate(pivots):
        near = sorted(pool, key=lambda i: cosine(states[i], states[pivot]))
        picks = near[: share + (turn < more)]
        kept = kept + picks
        pool = [i for i in pool if i not in picks]
    return kept


def read(model: Any, inputs: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """What the dense model says: states that enter ``layer`` after its final norm ``[B, T, C]``, and the keys that the
    layer in front has cached ``[B, T, G d]``."""
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=True)
        states = model.model.language_model.norm(out.hidden_states[layer])
    return states, cache_of(out).layers[layer - 1].keys.transpose(1, 2).flatten(2)


def wanted(model: Any, inputs: dict[str, Tensor], layer: int, keep: int, text: str = "after", **how: Any) -> list[Any]:
    """Per sample the places of what stays among its visual tokens."""
    states, keys = read(model, inputs, layer)
    out = []
    for b, mask in enumerate(inputs["attention_mask"].bool()):
        s, k = (dict(enumerate(t[b][mask].tolist())) for t in (states, keys))
        visual, mine = B.visual_positions(inputs, b).tolist(), []
        for start in range(0, len(visual), B.N):
            image = visual[start : start + B.N]
            words = [i for i in s if i not in visual and (text == "all" or i > image[-1])]
            mine += sorted(transcription(s, k, image, words, keep, **how))
        out.append([visual.index(i) for i in mine])
    return out


@pytest.mark.parametrize("keep", [1, 3, 5, 9, 17, 35, 36])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_llava_equals_the_transcription(text, keep):
    model, inputs = B.llava(text=text, blocks=3, layers=4), B.prompts(PROMPTS)
    want = wanted(model, inputs, 2, keep)
    with vtprune.attach(model, "dart", keep=keep) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    assert [k.tolist() for k in stage.kept] == want
    assert stage.site == "llm.2" and stage.tokens_out == [keep, 2 * keep, keep]


@pytest.mark.parametrize(
    "options",
    [
        {"layer": 1},
        {"layer": 3, "visual_pivots": 2, "text_pivots": 6},
        {"text_pivots": 0},
        {"text": "all", "text_pivots": 7},
        {"count": "official"},
        {"count": "official", "visual_pivots": 3, "text_pivots": 1},
    ],
)
def test_options(options):
    """Each changes the choice as written out; text behind the image is shorter than the pivots asked for in one
    sample."""
    model, inputs = B.llava(text="qwen2", blocks=3, layers=4), B.prompts(PROMPTS)
    how = dict(options)
    want = wanted(model, inputs, how.pop("layer", 2), 18, **how)
    with vtprune.attach(model, "dart", keep=18, **options) as handle:
        B.final(model, inputs)
        (stage,) = handle.report().stages
    assert [k.tolist() for k in stage.kept] == want
    plain = wanted(model, inputs, 2, 18)
    assert want != plain


def test_padding_on_the_right():
    model, inputs = B.llava(blocks=3, layers=4), B.prompts(PROMPTS, left=False)
    want = wanted(model, inputs, 2, 11)
    with vtprune.attach(model, "dart", keep=11) as handle:
        B.final(model, inputs)
        assert [k.tolist() for k in handle.report().stages[0].kept] == want


def geometry(tokens: int) -> Geometry:
    return Geometry(
        family="x",
        arch="x",
        tokens=tokens,
        grid=(1, tokens),
        prefix=0,
        vision_layers=0,
        vision_depth=0,
        llm_layers=32,
        provides={"llm": frozenset({"keys", "states", "text"})},
    )


def test_the_official_count():
    """576 tokens with .778 dropped leave 124, not 128."""
    keep = vtprune.core.recipe.resolve(1 - 0.778, 576)
    plan = lambda **options: make("dart", options).plan(geometry(576), keep)[0]  # noqa: E731
    assert plan(count="official").keep == 124 and plan().keep == 127
    assert make("dart", {}).plan(geometry(576), 128)[0].keep == 128
    few = make("dart", {"count": "official"}).plan(geometry(576), 7)[0]
    assert few.keep == 4 and few.data["each"] == 0  # only the pivots stay
    assert make("dart", {"count": "official"}).plan(geometry(3), 2)[0].keep == 3


def view(
    image: Tensor,
    keys: Tensor,
    words: Tensor,
    word_keys: Tensor,
    counts: list[int] | None = None,
    protected: list[int] | None = None,
    after: Tensor | None = None,
) -> TokenView:
    """A view of states ``[B, N, C]`` whose keys have these norms ``[B, N]``, and of text likewise."""
    b, n, _ = image.shape
    index = torch.arange(n).expand(b, n)
    valid = index < torch.tensor(counts or [n] * b)[:, None]
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, protected or []] = True
    there = torch.ones(words.shape[:2], dtype=torch.bool)
    place = torch.arange(words.shape[1]).expand(b, -1)
    text = Text(words, there, there if after is None else after, place, word_keys[..., None, None])
    return TokenView(
        features=image,
        valid=valid,
        index=index,
        size=torch.ones(b, n),
        protected=held & valid,
        grid=(1, n),
        sources={
            "states": lambda layer, norm: image,
            "keys": lambda layer: keys[..., None, None],
            "text": lambda keys, norm: text,
        },
    )


def kept(view: TokenView, keep: int, each: int = 0, **options: Any) -> list[list[int]]:
    selection = make("dart", options).select(view, Cut(site="llm.2", keep=keep, data={"each": each}))
    return [row[row >= 0].tolist() for row in selection.kept]


def angles(*degrees: float) -> Tensor:
    at = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([at.cos(), at.sin()], -1)[None]


def test_visual_pivots_go_first():
    """The example of the specification: with the text pivot first it would be 0, 3 and 4."""
    seen = view(angles(0, 10, 80, 100, 175, 45), torch.tensor([[9.0, 1, 1, 1, 1, 1]]), angles(90), torch.ones(1, 1))
    assert kept(seen, 3, visual_pivots=1, text_pivots=1) == [[0, 1, 4]]
    assert kept(seen, 3, 1, visual_pivots=1, text_pivots=1, count="official") == [[0, 1, 4]]


def test_what_the_pivots_are():
    """Scaled keys and other text than the pivots change nothing; the tokens of the largest keys stay."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    image, keys, words, word_keys = draw(1, 20, 6), draw(1, 20), draw(1, 9, 6), draw(1, 9)
    want = kept(view(image, keys, words, word_keys), 11)
    assert {int(i) for i in keys[0].abs().topk(4).indices} <= set(want[0])
    assert kept(view(image, 7 * keys, words, 7 * word_keys), 11) == want
    rest = word_keys[0].abs().topk(9).indices[4:]
    shuffled = words.clone()
    shuffled[0, rest] = words[0, rest.roll(1)]
    assert kept(view(image, keys, shuffled, word_keys), 11) == want
    assert kept(view(image, keys, words, word_keys), 20, 4, text_pivots=0, count="official") == [list(range(20))]


@pytest.mark.parametrize("keep", [1, 3, 4, 9, 12])
@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_equal_tokens_leave_exact_counts(keep, value):
    """Also with padding, without text behind the image, and with an image of a single token."""
    same = torch.full((3, 12, 4), value)
    words, after = torch.full((3, 5, 4), value), torch.zeros(3, 5, dtype=torch.bool)
    for behind in (None, after):
        seen = view(same, same[..., 0], words, words[..., 0], [12, 5, 1], after=behind)
        rows = kept(seen, keep)
        assert [len(set(row)) for row in rows] == [len(row) for row in rows] == [keep, min(keep, 5), 1]
        assert all(i < 5 for i in rows[1]) and rows[2] == [0]


def test_tokens_that_must_stay_take_the_last_places():
    generator = torch.Generator().manual_seed(1)
    image, keys = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((1, 12, 6), (1, 12)))
    words, word_keys = image[:, :3] + 1, keys[:, :3]
    seen = view(image, keys, words, word_keys)
    score = make("dart", {}).select(seen, Cut(site="llm.2", keep=7)).score[0]
    order = sorted((i for i in range(12) if score[i] > -7), key=lambda i: -score[i])
    assert len(order) == 7
    held = next(i for i in range(12) if i not in order)
    assert kept(view(image, keys, words, word_keys, protected=[held]), 7) == [sorted([held, *order[:6]])]


def test_layer_zero_is_refused():
    with pytest.raises(vtprune.VtpruneError, match="layer >= 1"):
        make("dart", {"layer": 0}).plan(geometry(16), 4)
