"""VScan (arXiv 2505.22654) against a slow transcription: windows, merges in projected space, the last word."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor

import oracles as O
import vtprune
from vtprune.core.select import combine
from vtprune.core.types import NOTE, Action, Geometry, TokenView
from vtprune.methods.base import Cut, make

PROMPTS = [[4, 9], [7, 2, 5]]
SITES = ("vision.0", "vision.2")


def window_of(i: int, rows: int, columns: int, side: int) -> tuple[int, int]:
    return i // columns * min(side, rows) // rows, i % columns * min(side, columns) // columns


def scan(early: list[float], last: list[float], rows: int, columns: int, keep: int, side: int, drop: bool) -> list[int]:
    """Tokens that stay behind the projector, with lists."""
    n = len(early)
    if keep >= n:
        return list(range(n))
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(n):
        windows.setdefault(window_of(i, rows, columns, side), []).append(i)
    half, picked = keep // 2, []
    for mine in windows.values():
        mine.sort(key=lambda i: -early[i])
    turn = 0
    while len(picked) < half:
        now = sorted((mine[turn] for mine in windows.values() if turn < len(mine)), key=lambda i: -early[i])
        if drop and len(now) > half - len(picked):
            break
        picked += now[: half - len(picked)]
        turn += 1
    rest = [i for i in O._descending(last) if i not in picked]
    return sorted(picked + rest[: keep - half])


def merge(x: list[Tensor], kept: list[int]) -> tuple[list[Tensor], list[int]]:
    """The kept tokens with the most similar others averaged in, and whom each of all tokens went into."""
    groups, into = {k: [x[k]] for k in kept}, []
    for i, token in enumerate(x):
        near = i if i in kept else max(kept, key=lambda k: float(torch.cosine_similarity(token, x[k], dim=0)))
        into.append(kept.index(near))
        if i not in kept:
            groups[near].append(token)
    return [sum(g) / len(g) for g in groups.values()], into


def attention(weights: Tensor, prefix: int) -> list[float]:
    """What the class token, or every token, attends to the patches, mean over heads; weights ``[H, n, n]``."""
    mean = weights.mean(0)
    return (mean[0] if prefix else mean.mean(0))[prefix:].tolist()


def check(vision: str, keep: int, blocks: tuple[int, int] = (0, 2), **options: Any) -> None:
    model, inputs = B.llava(vision, "qwen2", blocks=4, layers=5), B.prompts(PROMPTS)
    first, side = options.get("first", 3.0), options.get("windows", 4)
    layer, drop = options.get("layer", 2), options.get("remainder") == "drop"
    _, weights = B.watched(model.model.vision_tower, inputs["pixel_values"])
    embeddings = B.embeddings(model, inputs)
    with vtprune.attach(model, "vscan", keep=keep, **options) as handle, torch.no_grad():
        hidden, report = B.final(model, inputs), handle.report()
    assert [s.site for s in report.stages] == ["projector", f"llm.{layer}"]
    prefix, image, lm = int(vision != "siglip"), 0, model.model.language_model
    for b, x in enumerate(embeddings):
        at = B.visual_positions(inputs, b).tolist()
        behind, into, gone, x = [], [], set(), x.clone()
        for start in range(0, len(at), B.N):
            mine = at[start : start + B.N]
            scores = [attention(weights[i][image], prefix) for i in blocks]
            kept = scan(*scores, B.SIDE, B.SIDE, min(B.N, int(first * keep)), side, drop)
            slots, members = merge(list(x[mine]), kept)
            into += [m + len(behind) for m in members]
            behind += [start + k for k in kept]
            for k, slot in zip(kept, slots, strict=True):
                x[mine[k]] = slot
            gone |= {p for i, p in enumerate(mine) if i not in kept}
            image += 1
        assert report.stages[0].kept[b].tolist() == behind
        if len(behind) < len(at):
            assert report.stages[0].assignment[b].tolist() == into
        rows = [p for p in range(len(x)) if p not in gone]
        x = x[rows]
        with torch.no_grad():
            for i in range(len(lm.layers)):
                if i == layer:
                    row, stay = O.lm_attention_row(lm, i, x, rows, len(x) - 1), []
                    for start in range(0, len(at), B.N):
                        mine = [j for j, p in enumerate(rows) if p in at[start : start + B.N]]
                        stay += [mine[c] for c in O._top([row[j] for j in mine], keep)]
                    left = [j for j, p in enumerate(rows) if p not in at or j in stay]
                    assert report.stages[1].kept[b].tolist() == [at.index(rows[j]) for j in sorted(stay)]
                    x, rows = x[left], [rows[j] for j in left]
                x = O._run_lm_layer(lm, i, x, rows)
            B.close(hidden[b][rows], lm.norm(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("keep", [1, 2, 4, 7, 11, 12, 36])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_llava_equals_the_transcription(vision: str, keep: int) -> None:
    check(vision, keep)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options, blocks",
    [
        ({"first": 1.5}, (0, 2)),
        ({"local": 1}, (1, 2)),
        ({"local": 2}, (2, 2)),
        ({"windows": 3}, (0, 2)),
        ({"windows": 9}, (0, 2)),
        ({"windows": 2, "remainder": "drop"}, (0, 2)),
        ({"windows": 3, "remainder": "drop"}, (0, 2)),
        ({"layer": 0}, (0, 2)),
        ({"layer": 4}, (0, 2)),
    ],
)
def test_options_equal_the_transcription(options: dict[str, Any], blocks: tuple[int, int]) -> None:
    check("dinov2" if options.get("layer") == 4 else "clip", 7, blocks, **options)


def geometry(**changes: Any) -> Geometry:
    sites = {"vision": frozenset({"projections"}), "projector": frozenset(), "llm": frozenset({"query_attention"})}
    return Geometry("llava", "clip", 576, (24, 24), 1, 23, 24, 32, sites, **{"seen_layers": 23, **changes})


def test_the_official_schedules() -> None:
    """Blocks 5 and 22 of 24; 96 tokens until layer 16 and 32 from there, 64 a layer; 288 and 96 are 192."""
    for keep, first, mean in ((32, 96, 64), (96, 288, 192)):
        *notes, behind, inside = make("vscan", {}).plan(geometry(), keep)
        assert [(c.site, c.action) for c in notes] == [("vision.5", Action.NOTE), ("vision.22", Action.NOTE)]
        assert (behind.site, behind.keep, inside.site, inside.keep) == ("projector", first, "llm.16", keep)
        assert (16 * behind.keep + 16 * inside.keep) / 32 == mean
    assert make("vscan", {}).plan(geometry(), 300)[-2].keep == 576
    assert make("vscan", {"first": 1.0}).plan(geometry(), 300)[-2].keep == 300


def test_what_cannot_be_planned_says_so() -> None:
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        make("vscan", {}).plan(geometry(seen_layers=0), 32)
    with pytest.raises(vtprune.VtpruneError, match="blocks 0..22"):
        make("vscan", {"local": 23}).plan(geometry(), 32)
    with pytest.raises(vtprune.UnsupportedError, match="vscan"):
        vtprune.attach(B.tower("clip", 3), "vscan")


# --------------------------------------------------------------------------------------------------------------------
# views made by hand


def view(
    early: Tensor,
    last: Tensor,
    grid: tuple[int, int],
    features: Tensor | None = None,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
    size: Tensor | None = None,
) -> TokenView:
    b, n = early.shape
    valid = torch.ones(b, n, dtype=torch.bool) if valid is None else valid
    if features is None:
        features = torch.randn(b, n, 5, generator=torch.Generator().manual_seed(3)).double()
    return TokenView(
        features=features,
        valid=valid,
        index=torch.where(valid, torch.arange(n), -1),
        size=valid.double() if size is None else size,
        protected=torch.zeros_like(valid) if protected is None else protected,
        grid=grid,
        sources={NOTE + SITES[0]: lambda: early, NOTE + SITES[1]: lambda: last},
    )


def scanned(made: TokenView, keep: int, **options: Any):
    return make("vscan", options).select(made, Cut(site="projector", keep=keep, data={"sites": SITES}))


def random(b: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    early, last = torch.rand(2, b, n, generator=torch.Generator().manual_seed(seed)).double()
    return early, last


def test_sixty_tokens_of_the_official_code_are_46() -> None:
    """``int(60 / 2) // 16`` = 1 for each of 16 windows and 30 of the whole image; in turns they are 60."""
    early, last = random(1, 576)
    made = view(early, last, (24, 24))
    assert scanned(made, 60, remainder="drop").counts.tolist() == [46]
    assert scanned(made, 60).counts.tolist() == [60]
    for keep in (32, 96, 288):  # multiples of 32 are exact, and the same
        got = [scanned(made, keep, remainder=r).kept[0].tolist() for r in ("turns", "drop")]
        assert len(got[0]) == keep and got[0] == got[1]
    assert scanned(made, 576, remainder="drop").counts.tolist() == [576]


def test_every_window_has_its_tokens() -> None:
    """Of 96 tokens each 6 x 6 window gives the three that an early block ranks highest."""
    early, last = random(1, 576)
    kept = set(scanned(view(early, last, (24, 24)), 96).kept[0].tolist())
    for row in range(4):
        for column in range(4):
            mine = [r * 24 + c for r in range(6 * row, 6 * row + 6) for c in range(6 * column, 6 * column + 6)]
            assert set(sorted(mine, key=lambda i: -float(early[0, i]))[:3]) <= kept


def test_merging_conserves_mass() -> None:
    early, last = random(2, 36)
    size = torch.randint(1, 4, (2, 36), generator=torch.Generator().manual_seed(1)).double()
    made = view(early, last, (6, 6), size=size)
    selection = scanned(made, 10)
    rows, sizes = combine(made.features, selection, size)
    torch.testing.assert_close((rows * sizes[..., None]).sum(1), (made.features * size[..., None]).sum(1))
    assert sizes.sum(1).tolist() == size.sum(1).tolist()


@pytest.mark.parametrize("grid", [(1, 24), (24, 1), (3, 8), (2, 12), (5, 7)])
@pytest.mark.parametrize("keep", [1, 2, 9, 23])
def test_other_rasters_equal_the_transcription(grid: tuple[int, int], keep: int) -> None:
    early, last = random(1, grid[0] * grid[1], keep)
    for drop in (False, True):
        kept = scanned(view(early, last, grid), keep, remainder="drop" if drop else "turns").kept[0].tolist()
        assert kept == scan(early[0].tolist(), last[0].tolist(), *grid, keep, 4, drop)


@pytest.mark.parametrize("keep", [1, 2, 5, 11, 20])
def test_hostile_views_leave_exact_counts(keep: int) -> None:
    """Equal tokens, equal scores, tokens that the tower did not make, protected ones, ragged rows."""
    generator = torch.Generator().manual_seed(7)
    valid = torch.arange(20) < torch.tensor([[20], [7], [1], [20]])
    protected = (torch.arange(20) == 4) & valid
    early, last = random(4, 20)
    lines = torch.arange(20) % 5 == 4
    lines = lines | torch.tensor([[False], [False], [False], [True]])  # one image of nothing else
    for score in ((early, last), (torch.ones_like(early),) * 2):
        for features in (torch.ones(4, 20, 3).double(), torch.randn(4, 20, 3, generator=generator).double()):
            for missing in (torch.zeros_like(valid), lines.expand(4, -1)):
                notes = [s.masked_fill(missing | ~valid, torch.nan) for s in score]
                selection = scanned(view(*notes, (4, 5), features, valid, protected), keep)
                for b, row in enumerate(selection.kept):
                    row, there = row[row >= 0].tolist(), int(valid[b].sum())
                    assert len(row) == len(set(row)) == min(keep, there) and row == sorted(row) and max(row) < there
                    assert not bool(protected[b].any()) or 4 in row
                if selection.target is not None:  # what the tower did not make is dropped, or stays as it is
                    dropped = valid.clone().scatter(1, selection.kept.clamp_min(0), False)
                    assert not bool((selection.target[dropped & missing] >= 0).any())
                    assert bool((selection.target >= 0)[selection.target >= 0].all())
                    rows, _ = combine(features, selection, valid.double())
                    assert bool(torch.isfinite(rows).all())


def test_new_lines_neither_merge_nor_absorb() -> None:
    early, last = random(1, 12)
    line = torch.tensor([[False, False, False, True] * 3])
    notes = [t.masked_fill(line, torch.nan) for t in (early, last)]
    features = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(2)).double()
    selection = scanned(view(*notes, (3, 4), features), 10)
    assert selection.kept[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10] and selection.target is None
    protected = torch.arange(12)[None] == 11
    kept = scanned(view(*notes, (3, 4), features, protected=protected), 4).kept[0]
    features[0, ~torch.isin(torch.arange(12), kept)] = features[0, 11].clone()  # what goes is most like it
    selection = scanned(view(*notes, (3, 4), features, protected=protected), 4)
    column = selection.kept[0].tolist().index(11)
    assert (selection.target[0] == column).nonzero()[:, 0].tolist() == [11]
    assert (selection.target[0] == -1).nonzero()[:, 0].tolist() == [3, 7]


def test_training_samples_without_an_answer_stay_whole() -> None:
    model, inputs = B.llava("clip", "llama", blocks=3, layers=4), B.prompts([[3, 8], [3, 8]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    with vtprune.attach(model, "vscan", keep=5) as handle:
        model(**inputs, labels=labels).loss.backward()
        report = handle.report()
    assert [s.tokens_out for s in report.stages] == [[15, 15], [5, 15]]


def test_rasters_have_shares_in_front_of_the_language_model_only() -> None:
    from vtprune.models.base import ADAPTERS

    info = ADAPTERS.get("llava-next")
    model, inputs = info.tiny[next(iter(info.tiny))]()
    with vtprune.attach(model, "vscan", keep=0.2) as handle, torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
        behind, inside = handle.report().stages
    among = [[len(u[u >= 0].unique()) for u in stage.units] for stage in (behind, inside)]
    assert all(a >= b for a, b in zip(*among, strict=True)) and sum(among[0]) > sum(among[1])
