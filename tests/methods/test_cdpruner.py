"""CDPruner (arXiv 2506.10967) against brute force: the kernel written out, determinants of every candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import auxiliary as A
import builders as B
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

import vtprune
from vtprune.check.verify import check
from vtprune.core.types import NOTE, Geometry, Text, TokenView
from vtprune.methods.base import Cut, make

PROMPTS = [[4, 9], [7, 2, 5], [3, 30]]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def scaled(relevance: list[float]) -> list[float]:
    low, high = min(relevance), max(relevance)
    return [(r - low + 1e-6) / (high - low) for r in relevance]


def greedy(tokens: Tensor, relevance: list[float], keep: int) -> list[int]:
    """Again and again the token with which the determinant of the kernel's block is largest."""
    r = torch.tensor(relevance, dtype=torch.float64)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    kernel = r[:, None] * (unit @ unit.T) * r
    kernel.diagonal().copy_(r.square())  # unrounded: ties stay ties
    picks: list[int] = []
    while len(picks) < keep:
        left = [j for j in range(len(tokens)) if j not in picks]
        blocks = torch.stack([kernel[picks + [j]][:, picks + [j]] for j in left])
        picks.append(left[int(torch.linalg.slogdet(blocks).logabsdet.argmax())])
    return picks


def wanted(
    model: Any, inputs: dict[str, Tensor], keep: int, relevance: Callable[[int, Tensor, int, list[int]], list[float]]
) -> list[list[int]]:
    """Per sample the places of what stays; ``relevance(sample, x, image, words)`` of an image's tokens."""
    out, image = [], 0
    for b, x in enumerate(B.embeddings(model, inputs)):
        at, mine = B.visual_positions(inputs, b).tolist(), []
        for start in range(0, len(at), B.N):
            words = [i for i in range(len(x)) if i not in at and i > at[start + B.N - 1]]
            picks = greedy(x[at[start : start + B.N]], relevance(b, x, image, words), keep)
            mine += [start + i for i in sorted(picks)]
            image += 1
        out.append(mine)
    return out


def pruned(model: Any, inputs: dict[str, Tensor], keep: int, **options: Any) -> list[list[int]]:
    with vtprune.attach(model, "cdpruner", keep=keep, **options) as handle:
        B.final(model, inputs)
        stage = handle.report().stages[-1]
    assert stage.site == "projector"
    return [k.tolist() for k in stage.kept]


@pytest.mark.parametrize("keep", [1, 2, 9, 20, 36])
@pytest.mark.parametrize("tower, text", [("clip", "llama"), ("siglip", "mistral")])
def test_llava_equals_brute_force(tower, text, keep):
    """Relevance is the cosine with the mean of the question's embeddings, on what a dense run gives the language
    model."""
    model, inputs = B.llava(tower, text, blocks=3, layers=2), B.prompts(PROMPTS)

    def relevance(b, x, image, words):
        at = B.visual_positions(inputs, b)
        number = image - sum(len(p) - 1 for p in PROMPTS[:b])
        return scaled([cosine(v, x[words].mean(0)) for v in x[at[number * B.N : (number + 1) * B.N]]])

    assert pruned(model, inputs, keep) == wanted(model, inputs, keep, relevance)


def test_the_whole_prompt_may_ask():
    model, inputs = B.llava(blocks=3, layers=2), B.prompts([[8, 3]])
    (x,), at = B.embeddings(model, inputs), B.visual_positions(inputs, 0).tolist()
    every = x[[i for i in range(len(x)) if i not in at]].mean(0)
    want = sorted(greedy(x[at], scaled([cosine(v, every) for v in x[at]]), 9))
    assert pruned(model, inputs, 9, text="all") == [want] != pruned(model, inputs, 9)


def test_the_scale_is_each_image_s_own():
    """The official code scales over the batch; here a sample is decided as if it were alone."""
    model, inputs = B.llava(blocks=3, layers=2), B.prompts([[4, 9], [7, 5]])
    both = pruned(model, inputs, 7)
    for b, pixels in enumerate(inputs["pixel_values"]):
        mask = inputs["attention_mask"][b].bool()
        one = {k: inputs[k][b : b + 1, mask] for k in ("input_ids", "attention_mask", "position_ids")}
        assert pruned(model, {**one, "pixel_values": pixels[None]}, 7) == [both[b]]


def view(
    features: Tensor,
    hidden: Tensor | None = None,
    counts: list[int] | None = None,
    protected: list[int] | None = None,
    after: Tensor | None = None,
    noted: Tensor | None = None,
    ids: Tensor | None = None,
) -> TokenView:
    b, n, c = features.shape
    index = torch.arange(n).expand(b, n)
    valid = index < torch.tensor(counts or [n] * b)[:, None]
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, protected or []] = True
    hidden = torch.ones(b, 3, c, dtype=features.dtype) if hidden is None else hidden
    there = torch.ones(hidden.shape[:2], dtype=torch.bool)
    place = torch.arange(hidden.shape[1]).expand(b, -1)
    text = Text(hidden, there, there if after is None else after, place, None, ids)
    return TokenView(
        features=features,
        valid=valid,
        index=index,
        size=torch.ones(b, n),
        protected=held & valid,
        grid=(1, n),
        sources={"text": lambda: text, NOTE + "vision.1": lambda: noted},
    )


def kept(view: TokenView, keep: int, **options: Any) -> list[list[int]]:
    cut = Cut(site="projector", keep=keep, data={"seen": "vision.1"})
    selection = make("cdpruner", options).select(view, cut)
    return [row[row >= 0].tolist() for row in selection.kept]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_a_question_every_token_is_as_relevant():
    features = random(2, 12, 14)
    after = torch.tensor([[False] * 3, [True] * 3])
    seen = view(features, random(2, 3, 14, seed=1), after=after)
    first, second = kept(seen, 5)
    asked = scaled([cosine(v, seen.source("text").hidden[1].mean(0)) for v in features[1]])
    assert first == sorted(greedy(features[0], [1.0] * 12, 5)) and second == sorted(greedy(features[1], asked, 5))


@pytest.mark.parametrize("keep", [1, 3, 7, 12])
@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_equal_tokens_leave_exact_counts(keep, value):
    """Also where the kernel's rank is far below the budget, and in an image of one token."""
    rows = kept(view(torch.full((3, 12, 4), value), counts=[12, 5, 1]), keep)
    assert [len(set(row)) for row in rows] == [len(row) for row in rows] == [keep, min(keep, 5), 1]
    assert all(i < 5 for i in rows[1]) and rows[2] == [0]


def test_beyond_the_rank_counts_are_exact_and_the_rank_comes_first():
    six = random(6, 8)
    features = six[torch.arange(42) % 6][None]
    (row,) = kept(view(features, random(1, 3, 8, seed=1)), 10)
    assert len(set(row)) == len(row) == 10 and {i % 6 for i in row} == set(range(6))


def test_padding_changes_nothing():
    features, hidden = random(2, 12, 16), random(2, 3, 16, seed=1)
    short = view(features[1:, :7], hidden[1:])
    assert kept(view(features, hidden, [12, 7]), 5)[1:] == kept(short, 5)


def test_tokens_that_must_stay_take_the_last_places():
    features, hidden = random(1, 12, 16), random(1, 3, 16, seed=1)
    order = greedy(features[0], scaled([cosine(v, hidden[0].mean(0)) for v in features[0]]), 12)
    assert kept(view(features, hidden, protected=[order[-1]]), 4) == [sorted([order[-1], *order[:3]])]


# ------------------------------------------------------------------------------------------------------------ with CLIP


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auxiliary")
    clip, words = A.clip_folder(folder / "clip"), A.words_folder(folder / "words")
    return {"clip": str(clip), "tokenizer": str(words)}


def by_clip(model: Any, inputs: dict[str, Tensor], folders: dict[str, str], sign: float) -> Callable:
    """The relevance as the whole CLIP model gives it: patches of the last block that is used, segments of ten
    tokens."""
    clip, spell = CLIPModel.from_pretrained(folders["clip"]), CLIPTokenizer.from_pretrained(folders["clip"])
    hidden, _ = B.watched(model.model.vision_tower, inputs["pixel_values"])
    whole = CLIPModel.from_pretrained(folders["clip"]).double()
    norm = dict(whole.vision_model.named_modules())
    norm = next(m for name, m in norm.items() if name.endswith("post_layernorm"))

    @torch.no_grad()
    def relevance(b, x, image, words):
        patches = whole.visual_projection(norm(hidden[-2][image, 1:]))
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][words].tolist()
        spelled = spell(" ".join(f"w{i}" for i in ids), add_special_tokens=False).input_ids
        segments = [spelled[i : i + A.LENGTH - 2] for i in range(0, len(spelled), A.LENGTH - 2)]
        known = [
            clip.get_text_features(torch.tensor([[spell.bos_token_id, *s, spell.eos_token_id]])).pooler_output[0]
            for s in segments
        ]
        assert len(known) > 1
        return scaled([sum(sign * cosine(p, g.double()) for g in known) / len(known) for p in patches])

    return relevance


@pytest.mark.parametrize("keep", [1, 9, 20])
@pytest.mark.parametrize("options, sign", [({}, 1.0), ({"sign": "official"}, -1.0)])
def test_clip_s_embeddings_equal_brute_force(folders, keep, options, sign):
    model, inputs = B.llava(blocks=3, layers=2), B.prompts(PROMPTS)
    want = wanted(model, inputs, keep, by_clip(model, inputs, folders, sign))
    got = pruned(model, inputs, keep, **folders, **options)
    assert got == want != pruned(model, inputs, keep)


def test_tokens_that_the_tower_did_not_make_are_the_least_relevant(folders):
    """New-line tokens have no state in the tower."""
    features, noted = random(1, 10, 16), random(1, 10, 20, seed=1)
    noted[0, [3, 7]] = torch.nan
    seen = view(features, noted=noted, ids=torch.tensor([[5, 6, 7]]))
    (row,) = kept(seen, 7, **folders)  # the eighth is itself the least relevant
    assert len(row) == 7 and not {3, 7} & set(row)
    assert kept(seen, 10, **folders) == [list(range(10))]


def test_without_words_every_token_is_as_relevant(folders):
    """No text behind the image, or special tokens alone."""
    features, noted = random(3, 12, 14), random(3, 12, 20, seed=1)
    after, ids = torch.tensor([[False] * 3, [True] * 3, [True] * 3]), torch.tensor([[5, 6, 7], [1, 2, 0], [5, 6, 7]])
    silent = [sorted(greedy(f, [1.0] * 12, 5)) for f in features]
    got = kept(view(features, after=after, noted=noted, ids=ids), 5, **folders)
    assert got[:2] == silent[:2] and got[2] != silent[2]


def test_any_tiles_with_clip(tiny, folders):
    """LLaVA-NeXT: several passes of the tower and new-line tokens in one image, in a padded batch and alone."""
    model, inputs = tiny("llava-next", "clip-llama")
    for name in ("batch_is_singles", "prefill_is_masked_dense", "decode_is_masked_dense", "counts_are_true"):
        result = check(name, model, "cdpruner", inputs, keep=6, **folders)
        assert result.passed, f"{name}: {result.detail}"


def test_half_precision_is_finite(tiny, folders):
    model, inputs = tiny("llava", "clip-llama")
    result = check("finite_in_half", model, "cdpruner", inputs, keep=6, **folders)
    assert result.passed, result.detail


def geometry(arch: str = "clip", provides: tuple[str, ...] = ("vision", "projector", "llm")) -> Geometry:
    return Geometry(
        family="x",
        arch=arch,
        tokens=16,
        grid=(4, 4),
        prefix=1,
        vision_layers=4,
        vision_depth=5,
        seen_layers=4,
        llm_layers=6,
        provides={kind: frozenset({"text"}) for kind in provides},
    )


@pytest.mark.parametrize(
    "options, where, says",
    [
        ({"clip": "x"}, {}, "clip= needs the question's words; give tokenizer= too"),
        ({"tokenizer": "x"}, {}, "tokenizer= says how to read CLIP's embeddings"),
        ({"sign": "official"}, {}, "sign= says how to read CLIP's embeddings"),
        ({"clip": "openai/clip", "tokenizer": "x"}, {}, "clip='openai/clip' is no folder"),
        ({"clip": "x", "tokenizer": "x"}, {"arch": "siglip"}, "looks at the states of a CLIP tower"),
        ({}, {"provides": ("vision", "pixels")}, "works at projector; this model .* offers vision / pixels"),
    ],
)
def test_what_cannot_be_is_refused(options, where, says):
    with pytest.raises(vtprune.VtpruneError, match=says):
        make("cdpruner", options).plan(geometry(**where), 4)


def test_another_model_s_clip_is_refused(tiny, tmp_path, folders):
    model, inputs = tiny("llava", "clip-llama")
    wide = A.clip_folder(tmp_path / "wide", width=48)
    with (
        vtprune.attach(model, "cdpruner", keep=4, clip=str(wide), tokenizer=folders["tokenizer"]),
        pytest.raises(vtprune.VtpruneError, match="whose tower is 48 wide, and this one is 32"),
    ):
        model(**inputs)
