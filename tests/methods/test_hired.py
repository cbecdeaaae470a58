"""HiRED (arXiv 2408.10945) against a slow transcription on the tiles that transformers cuts and the attention that it
shows."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

import vtprune
from vtprune.core.types import Geometry, TokenView
from vtprune.methods.base import make
from vtprune.methods.hired import shares

Token = tuple[int, int]  # pass and place within it; (-1, -1): a new line


def image_of(model: nn.Module, size: Tensor) -> tuple[list[list[Token]], list[list[Token]]]:
    """Rows of an image's tokens: of its small version (pass 0), and of the tiles, by transformers' own unpadding."""
    v = model.config.vision_config
    side = v.image_size // v.patch_size
    down, right = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, v.image_size)
    plane = torch.empty(2, down * side, right * side)
    for r in range(down * side):
        for c in range(right * side):
            plane[0, r, c] = 1 + (r // side) * right + c // side
            plane[1, r, c] = (r % side) * side + c % side
    left = unpad_image(plane, size).long()
    rows = [[(int(p), int(k)) for p, k in zip(*row, strict=True)] + [(-1, -1)] for row in left.transpose(0, 1)]
    return [[(0, r * side + c) for c in range(side)] for r in range(side)], rows


def hired(
    small: list[list[Token]],
    rows: list[list[Token]],
    first: list[list[float]],
    last: list[list[float]],
    keep: int,
    *,
    overview: float = 0.5,
    content: float = 0.5,
    tiles: str = "plane",
) -> list[int]:
    """Tokens kept, with lists: ``first`` and ``last`` the class attention of each pass in the two blocks."""
    tokens = [t for row in [*small, *rows] for t in row]
    n, count = len(small) * len(small[0]), max(p for p, _ in tokens)
    keep = min(keep, len(tokens))
    chosen = sorted(range(n), key=lambda i: -first[0][i])[: int(n * content)]
    fallen = [0] * count
    for i in chosen:
        r, c = divmod(i, len(small[0]))
        if tiles == "chunks":
            fallen[i * count // n] += 1
        else:
            y, x = (r + 0.5) / len(small), (c + 0.5) / len(small[0])
            made = [t for t in rows[int(y * len(rows))] if t[0] >= 0]
            fallen[made[int(x * len(made))][0] - 1] += 1
    groups = [[i for i, (p, _) in enumerate(tokens) if p == q] for q in range(count + 1)]
    whole = min(int(keep * overview), n)
    each = by_hand(keep - whole, fallen, [len(g) for g in groups[1:]])
    whole = min(n, keep - sum(each))
    kept = []
    for group, quota in zip(groups, [whole, *each], strict=True):
        kept += sorted(group, key=lambda i: -last[tokens[i][0]][tokens[i][1]])[:quota]
    lines = [i for i, (p, _) in enumerate(tokens) if p < 0]
    return sorted(kept + lines[: keep - len(kept)])


def by_hand(total: int, weight: list[int], room: list[int]) -> list[int]:
    """Largest remainders, again for what did not fit."""
    given = [0] * len(room)
    while sum(given) < min(total, sum(room)):
        left, free = total - sum(given), [i for i in range(len(room)) if given[i] < room[i]]
        mass = {i: weight[i] if any(weight[j] for j in free) else 1 for i in free}
        exact = {i: left * mass[i] / sum(mass.values()) for i in free}
        more = {i: int(exact[i] + 1e-9) for i in free}
        for i in sorted(free, key=lambda i: more[i] - exact[i])[: left - sum(more.values())]:
            more[i] += 1
        given = [min(given[i] + more.get(i, 0), room[i]) for i in range(len(room))]
    return given


def test_shares():
    assert shares(10, [1, 1, 1], [9, 9, 9]) == [4, 3, 3]
    assert shares(10, [0, 3, 1], [9, 9, 9]) == [0, 8, 2]  # 7.5 and 2.5: the first of equal remainders
    assert shares(10, [0, 3, 1], [9, 4, 9]) == [0, 4, 6]
    assert shares(10, [0, 1, 0], [3, 4, 9]) == [3, 4, 3]
    assert shares(99, [1, 0], [3, 4]) == [3, 4]
    assert shares(0, [1, 2], [3, 4]) == [0, 0]
    for total in range(30):
        for weight in ([5, 3, 8, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
            room = [4, 16, 2, 7]
            assert shares(total, weight, room) == by_hand(total, weight, room)
            assert sum(shares(total, weight, room)) == min(total, 29)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 12},
        {"keep": 1},
        {"keep": 2},
        {"keep": 19},
        {"keep": 60},
        {"keep": 500},
        {"keep": 17, "tiles": "chunks"},
        {"keep": 17, "overview": 0.2, "content": 0.3},
        {"keep": 17, "overview": 0.0, "content": 0.0},
        {"keep": 17, "overview": 1.0},
    ],
)
@pytest.mark.parametrize("variant", ["clip-llama", "siglip-mistral-window"])
def test_llava_next_equals_the_transcription(variant, options, tiny):
    model, inputs = tiny("llava-next", variant)
    B.randomise(model, 5)
    inputs["pixel_values"] = (
        inputs["pixel_values"].double() * torch.tensor([0.3, 1.0, 3.0, 1.0, 2.0])[:, None, None, None]
    )
    with vtprune.attach(model, "hired", **options) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    prefix = 1 if variant.startswith("clip") else 0
    want: list[list[int]] = []
    sizes = []
    for size, pixels in zip(inputs["image_sizes"], inputs["pixel_values"], strict=True):
        small, rows = image_of(model, size)
        passes = 1 + max(p for row in rows for p, _ in row)
        attentions = B.watched(model.model.vision_tower, pixels[:passes])[1]
        scores = []
        for block in (0, 2):  # three of four blocks are used
            weights = attentions[block].mean(1)
            seen = weights[:, 0, 1:] if prefix else weights.mean(1)
            scores.append(seen.tolist())
        want.append(hired(small, rows, *scores, **options))
        sizes.append(sum(map(len, [*small, *rows])))
    assert report.stages[-1].kept[0].tolist() == want[0] + [sizes[0] + i for i in want[1]]
    assert report.stages[-1].kept[1].tolist() == want[2]
    assert [len(w) for w in want] == [min(options["keep"], n) for n in sizes]


@pytest.mark.parametrize("keep", [1, 7, 20, 36])
def test_llava_keeps_the_best(keep):
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9], [7, 2, 5]])
    with vtprune.attach(model, "hired", keep=keep) as handle, torch.no_grad():
        B.final(model, inputs)
        report = handle.report()
    weights = B.watched(model.model.vision_tower, inputs["pixel_values"])[1][2]
    best = [sorted(weights[i].mean(0)[0, 1:].argsort(descending=True)[:keep].tolist()) for i in range(3)]
    assert report.stages[-1].kept[0].tolist() == best[0]
    assert report.stages[-1].kept[1].tolist() == best[1] + [B.N + i for i in best[2]]


GRIDS = ((24, 24), (48, 49))  # the small version, and four tiles with a new-line token behind each row


def geometry(overview: int = 0, **more: Any) -> Geometry:
    known: dict[str, Any] = {
        "family": "x",
        "arch": "x",
        "tokens": 576,
        "grid": (24, 24),
        "prefix": 1,
        "vision_layers": 23,
        "vision_depth": 24,
        "llm_layers": 2,
        "provides": {"projector": frozenset({"origin"})},
        "seen_layers": 23,
        "overview": overview,
    }
    return Geometry(**{**known, **more})


def view(first: Tensor, last: Tensor, origin: Tensor, rasters: tuple, protected: list[int] | None = None) -> TokenView:
    b, n = first.shape
    ones = torch.ones(b, n)
    held = torch.zeros(b, n, dtype=torch.bool)
    held[:, protected or []] = True
    return TokenView(
        features=torch.zeros(b, n, 1),
        valid=ones.bool(),
        index=torch.arange(n).expand(b, n),
        size=ones,
        protected=held,
        grid=(n, 1),
        rasters=(rasters,) * b,
        sources={
            "note vision.0": lambda: first,
            "note vision.22": lambda: last,
            "origin": lambda: torch.stack([torch.zeros_like(origin), origin], -1).expand(b, -1, -1),
        },
    )


def tiled() -> Tensor:
    """The passes of the tokens of an image of 2 x 2 tiles."""
    rows = torch.arange(48)[:, None] // 24 * 2 + torch.arange(48) // 24 + 1
    return torch.cat([torch.zeros(576).long(), nn.functional.pad(rows, (0, 1), value=-1).flatten()])


def counts(kept: Tensor, origin: Tensor) -> list[int]:
    """Of the small version, the four tiles and new-line tokens."""
    made = origin[kept[kept >= 0]]
    return [int((made == i).sum()) for i in (0, 1, 2, 3, 4, -1)]


def select(shown: TokenView, keep: int, overview: int = 0, **options: Any) -> Any:
    method = make("hired", options)
    return method.select(shown, method.plan(geometry(overview), keep)[-1])


def test_a_budget_of_five_crops():
    """A fifth of 5 x 576 tokens: 576, of which 288 for the small version; the rest goes where its content is, or to
    chunks of its raster."""
    assert int(5 * 576 * 0.2) == 576
    origin, n = tiled(), 576 + 48 * 49
    first, last = torch.zeros(1, n), torch.rand(1, n)
    content = torch.zeros(24, 24)
    content[:12, :12], content[12:, 12:] = 2, 1  # half of the small version: two quarters
    first[0, :576] = content.flatten()
    lines = origin < 0
    first[:, lines] = last[:, lines] = torch.nan
    kept = select(view(first, last, origin, GRIDS), 576).kept[0]
    assert counts(kept, origin) == [288, 144, 0, 0, 144, 0]
    kept = select(view(first, last, origin, GRIDS), 576, tiles="chunks").kept[0]
    assert counts(kept, origin) == [288, 72, 72, 72, 72, 0]  # of each six rows half
    kept = select(view(first, last, origin, GRIDS), 576, content=0.25).kept[0]
    assert counts(kept, origin) == [288, 288, 0, 0, 0, 0]
    kept = select(view(first, last, origin, GRIDS), 1500, content=0.25).kept[0]
    assert counts(kept, origin) == [576, 576, 116, 116, 116, 0]  # a tile is full: 174 more for each of the others
    for keep in (2880, 2900, n):
        assert counts(select(view(first, last, origin, GRIDS), keep).kept[0], origin)[-1] == keep - 2880


def test_the_small_version_may_come_last():
    """Tiles that are rasters of their own: where they lie is not said, but chunks of the raster can be made."""
    origin = torch.arange(3).repeat_interleave(16)
    first, last = torch.rand(2, 48), torch.rand(2, 48)
    first[:, 32:40] += 1
    shown = view(first, last, origin, ((4, 4),) * 3)
    kept = select(shown, 8, overview=-1, tiles="chunks").kept
    assert [int((origin[kept[0]] == i).sum()) for i in range(3)] == [4, 0, 4]
    with pytest.raises(vtprune.UnsupportedError, match="how the 2 tiles of an image lie side by side"):
        select(shown, 8, overview=-1)


@pytest.mark.parametrize("keep", [1, 2, 3, 40, 95])
def test_counts_are_exact(keep):
    """Attention that is the same everywhere, or not a number; tokens that must stay."""
    rasters = ((4, 4), (8, 10))
    rows = torch.arange(8)[:, None] // 4 * 3 + torch.arange(9) // 4 + 1
    origin = torch.cat([torch.zeros(16).long(), nn.functional.pad(rows, (0, 1), value=-1).flatten()])
    for scores in (torch.zeros(3, 96), torch.full((3, 96), torch.nan)):
        for held in ([], [95], [0, 40]):
            kept = select(view(scores, scores, origin, rasters, held), keep).kept
            assert kept.shape == (3, keep) and bool((kept.diff(dim=1) > 0).all())
            if keep >= 2:
                assert set(held) <= set(kept[0].tolist())


def test_an_image_does_not_see_its_batch():
    """Units of the same rasters that came from different numbers of tiles."""
    rasters, n = ((4, 4), (4, 9)), 52
    lines = [nn.functional.pad((1 + torch.arange(8) // k).repeat(4, 1), (0, 1), value=-1).flatten() for k in (4, 1)]
    two, eight = (torch.cat([torch.zeros(16).long(), passes]) for passes in lines)
    first, last = torch.rand(2, n), torch.rand(2, n)
    for tiles in ("plane", "chunks"):
        both = select(view(first, last, torch.stack([two, eight]), rasters), 20, tiles=tiles).kept
        for b, origin in enumerate((two, eight)):
            alone = select(view(first[b : b + 1], last[b : b + 1], origin[None], rasters), 20, tiles=tiles).kept
            assert torch.equal(alone[0], both[b])


def test_what_it_cannot_work_on_is_refused(tiny):
    with pytest.raises(vtprune.UnsupportedError, match="does not show"):
        make("hired", {}).plan(geometry(seen_layers=0), 64)
    with pytest.raises(vtprune.UnsupportedError, match="behind the projector"):
        make("hired", {}).plan(geometry(provides={"vision": frozenset()}), 64)
    model, inputs = B.llava("clip", "llama", blocks=4, layers=2), B.prompts([[4, 9, 3]])
    with (
        vtprune.attach(model, "hired", keep=20, per="sample"),
        torch.no_grad(),
        pytest.raises(vtprune.UnsupportedError, match="a budget is for several images"),
    ):
        model(**inputs)
