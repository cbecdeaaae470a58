"""The raster baselines: uniform, pool and downsample, against plain image operations."""

from __future__ import annotations

from typing import Any

import builders as B
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtprune


def bare(model: nn.Module, pixels: Tensor, name: str, **options: Any) -> tuple[Tensor, Any]:
    with vtprune.attach(model, name, **options) as handle, torch.no_grad():
        return model(pixels).last_hidden_state, handle.report()


def entering(model: nn.Module, inputs: dict[str, Tensor], name: str, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Embeddings and position ids that the first decoder layer gets, and the report (batch of one)."""
    seen: list[Any] = []
    with vtprune.attach(model, name, **options) as handle, torch.no_grad():
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append((a[0], k["position_ids"])), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        return seen[0][0][0], seen[0][1][0], handle.report()


@torch.no_grad()
def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Projected patches of a dense run, ``[36, D]``."""
    return model.model.multi_modal_projector(
        model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    )[0]


# --------------------------------------------------------------------------------------------------------------------
# uniform


@pytest.mark.parametrize(
    "keep, want",
    [(4, [7, 10, 25, 28]), (9, [0, 2, 4, 12, 14, 16, 24, 26, 28]), (36, list(range(36))), (1, [14]), (2, [13, 16])],
)
def test_uniform_keeps_the_cells_centres(keep: int, want: list[int]) -> None:
    """6 x 6 tokens in k near-square cells: of four equally central tokens the first stays."""
    model = B.llava()
    _, ids, report = entering(model, B.prompts([[4, 9]]), "uniform", keep=keep)
    assert report.stages[0].kept[0].tolist() == want
    assert ids.tolist() == [*range(4), *(4 + i for i in want), *range(40, 49)]


@pytest.mark.parametrize(
    "site, keep", [("projector", 5), ("projector", 35), ("vision.1", 11), ("vision.1", 1), ("llm.2", 7), ("llm.2", 23)]
)
def test_uniform_meets_any_budget_and_spreads(site: str, keep: int) -> None:
    """Exactly ``keep`` tokens everywhere, and none further from a kept one than a cell is wide."""
    model = B.llava(layers=3)
    with vtprune.attach(model, "uniform", keep=keep, site=site) as handle:
        B.final(model, B.prompts([[4, 9]]))
        (stage,) = handle.report().stages
    kept = stage.kept[0]
    assert stage.site == site and len(kept) == keep == len(set(kept.tolist()))
    at = torch.stack([torch.arange(36) // 6, torch.arange(36) % 6], 1).double()
    assert float(torch.cdist(at, at[kept]).min(1).values.max()) <= 1.5 * (36 / keep) ** 0.5


# --------------------------------------------------------------------------------------------------------------------
# pool


@pytest.mark.parametrize("keep, window", [(9, 2), (4, 3), (1, 6), (36, 1)])
def test_pool_is_average_pooling(keep: int, window: int) -> None:
    """Where the cells are square windows: the projected features' ``avg_pool2d``, each mean at the position of its
    cell's central token."""
    model, inputs = B.llava(), B.prompts([[4, 9]])
    x, ids, report = entering(model, inputs, "pool", keep=keep)
    raster = features(model, inputs["pixel_values"]).T.reshape(1, -1, 6, 6)
    B.close(x[4 : 4 + keep], F.avg_pool2d(raster, window)[0].flatten(1).T)
    (stage,) = report.stages
    cell = (torch.arange(36) // 6 // window) * (6 // window) + torch.arange(36) % 6 // window
    assert torch.equal(stage.assignment[0], cell)
    assert (ids[4 : 4 + keep] - 4).tolist() == stage.kept[0].tolist()


@pytest.mark.parametrize("keep", [2, 7, 11, 35])
def test_pool_averages_its_cells_at_any_budget(keep: int) -> None:
    model, inputs = B.llava(), B.prompts([[4, 9]])
    x, _, report = entering(model, inputs, "pool", keep=keep)
    (stage,), f = report.stages, features(model, inputs["pixel_values"])
    assert len(stage.kept[0]) == keep
    for slot, token in enumerate(stage.kept[0].tolist()):
        members = (stage.assignment[0] == slot).nonzero()[:, 0]
        assert token in members.tolist()
        B.close(x[4 + slot], f[members].mean(0))
        rows, columns = members // 6, members % 6
        assert len(members) == len(rows.unique()) * len(columns.unique())  # a rectangle


def test_pool_in_a_tower() -> None:
    model, pixels = B.tower("clip", 4), B.images(2)
    hidden, report = bare(model, pixels, "pool", keep=9, site="vision.1")
    with torch.no_grad():
        x = model(pixels, output_hidden_states=True).hidden_states[2]
        pooled = F.avg_pool2d(x[:, 1:].transpose(1, 2).reshape(2, -1, 6, 6), 2).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :1], pooled], 1)
        for block in model.encoder.layers[2:]:
            x = block(x, None)
    B.close(hidden, x)
    assert report.stages[0].tokens_out == [9, 9]


def test_pool_needs_the_whole_raster() -> None:
    stages = (
        vtprune.Stage(method="random", keep=20, options={"site": "vision.0"}),
        vtprune.Stage(method="pool", keep=4),
    )
    model = B.llava()
    with pytest.raises(vtprune.VtpruneError, match="raster"):
        vtprune.attach(model, vtprune.Recipe(name="x", stages=stages))


# --------------------------------------------------------------------------------------------------------------------
# downsample


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
@pytest.mark.parametrize(
    "keep, raster", [(9, (3, 3)), (8, (4, 2)), (1, (1, 1)), (31, (6, 5)), (26, (5, 5)), (36, (6, 6))]
)
def test_downsample_feeds_a_smaller_image(kind: str, keep: int, raster: tuple[int, int]) -> None:
    """The tower's output is that of the resized image with interpolated positions; the largest raster within the
    budget, squarest on ties."""
    model, pixels = B.tower(kind, 3), B.images(2)
    hidden, report = bare(model, pixels, "downsample", keep=keep)
    r, c = raster
    (stage,) = report.stages
    assert stage.site == "pixels" and stage.tokens_out == [r * c] * 2 and len(stage.kept[0]) == r * c
    with torch.no_grad():
        if keep == 36:
            want = model(pixels).last_hidden_state
        else:
            small = F.interpolate(
                pixels.float(), size=(8 * r, 8 * c), mode="bicubic", antialias=True, align_corners=False
            ).double()
            want = model(small, **({} if kind == "dinov2" else {"interpolate_pos_encoding": True})).last_hidden_state
            # Every token belongs to the low-resolution one over its centre, which stands where its own centre lies.
            row, column = ((torch.arange(6) + 0.5) * r / 6).long(), ((torch.arange(6) + 0.5) * c / 6).long()
            assert torch.equal(stage.assignment[0].reshape(6, 6), row[:, None] * c + column[None])
            at = [int((i + 0.5) * 6 / r) * 6 + int((j + 0.5) * 6 / c) for i in range(r) for j in range(c)]
            assert stage.kept[0].tolist() == at
    B.close(hidden, want)


def test_downsample_in_llava_puts_tokens_at_their_centres() -> None:
    model, inputs = B.llava(), B.prompts([[4, 9]])
    x, ids, report = entering(model, inputs, "downsample", keep=9)
    assert report.stages[0].kept[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    assert (ids[4:13] - 4).tolist() == report.stages[0].kept[0].tolist()
    small = F.interpolate(
        inputs["pixel_values"].float(), size=(24, 24), mode="bicubic", antialias=True, align_corners=False
    ).double()
    with torch.no_grad():
        want = model.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[
            -2
        ][:, 1:]
        B.close(x[4:13], model.model.multi_modal_projector(want)[0])


def test_downsample_in_timm() -> None:
    """A model of dynamic image size takes the smaller image; one of fixed size says that it cannot."""
    model, pixels = B.vit("avg-pool", dynamic_img_size=True), B.images(2)
    with torch.no_grad():
        want = model.norm(
            model.forward_features(
                F.interpolate(pixels, size=(24, 24), mode="bicubic", antialias=True, align_corners=False)
            )
        )
    with vtprune.attach(model, "downsample", keep=9) as handle, torch.no_grad():
        tokens, logits = model.forward_features(pixels), model(pixels)
        assignment = handle.report().stages[0].assignment
    B.close(tokens, want)
    B.close(logits, B.head(model, torch.stack([w[a] for w, a in zip(want, assignment, strict=True)])))
    with pytest.raises(vtprune.UnsupportedError, match="pixels"):
        vtprune.attach(B.vit("class"), "downsample", keep=9)
