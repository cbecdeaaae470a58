"""PixelPrune (arXiv 2604.00886) against a slow transcription of its predictive coding."""

from __future__ import annotations

import random

import pytest
import torch
from vtprune.models.base import ADAPTERS

import vtprune
from vtprune.core.types import UnsupportedError, VtpruneError
from vtprune.methods.pixelprune import unpredicted

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm4v")


def coded(blocks: list[list[list[float]]], threshold: float = 0.0) -> list[int]:
    """Row by row, what a reader of the kept blocks alone would see in the place of each: the picture so far."""
    seen: list[list[list[float]]] = []
    kept = []

    def alike(a: list[float], b: list[float]) -> bool:
        return all(abs(p - q) <= threshold for p, q in zip(a, b, strict=True))

    for r, row in enumerate(blocks):
        seen.append([])
        for c, x in enumerate(row):
            if r == c == 0:
                guess = None
            elif r == 0:
                guess = seen[0][c - 1]
            elif c == 0:
                guess = seen[r - 1][0]
            else:
                left, above, corner = seen[r][c - 1], seen[r - 1][c], seen[r - 1][c - 1]
                guess = above if alike(corner, left) and not alike(corner, above) else left
            if guess is None or not alike(x, guess):
                kept.append(r * len(row) + c)
                guess = x
            seen[r].append(guess)
    return kept


def kept(blocks: list[list[list[float]]], threshold: float = 0.0) -> list[int]:
    x = torch.tensor([[block for row in blocks for block in row]], dtype=torch.float64)
    return unpredicted(x, (len(blocks), len(blocks[0])), threshold)[0].nonzero()[:, 0].tolist()


def picture(rows: int, columns: int, colour) -> list[list[list[float]]]:
    return [[[float(colour(r, c))] for c in range(columns)] for r in range(rows)]


def test_the_examples_of_the_specification():
    assert kept(picture(4, 4, lambda r, c: 0)) == [0]
    assert kept(picture(4, 4, lambda r, c: c >= 2)) == [0, 2]  # a vertical edge
    assert kept(picture(4, 4, lambda r, c: (r + c) % 2)) == list(range(16))
    assert kept(picture(4, 4, lambda r, c: r >= 2)) == [0, 8]  # a horizontal one: the first column predicts the rest


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 8), (9, 4)])
def test_the_transcription(shape, threshold):
    draw = random.Random(sum(shape))
    for _ in range(20):
        blocks = [[[draw.randrange(4) / 8, draw.randrange(2) / 8] for _ in range(shape[1])] for _ in range(shape[0])]
        for r in range(1, shape[0]):  # some rows repeat
            if draw.random() < 0.4:
                blocks[r] = [list(b) for b in blocks[r - 1]]
        assert kept(blocks, threshold) == coded(blocks, threshold)


def test_a_gradient_is_followed_from_the_block_that_stands():
    """Each step is below the threshold, but not the way from the block that stays."""
    blocks = picture(1, 8, lambda r, c: 0.1 * c)
    assert kept(blocks, 0.25) == coded(blocks, 0.25) == [0, 3, 6]


def painted(inputs: dict, name: str, grid: list[int], first: int, colours: list[list[float]], patch: int) -> None:
    """Paints the image whose patches begin at row ``first``: square (r, c) in ``colours[r][c]``."""
    squares = [(r, c) for r in range(grid[1] // 2) for c in range(grid[2] // 2)]
    for t in range(grid[0]):
        for n, (r, c) in enumerate(squares):
            at = first + t * grid[1] * grid[2] + 4 * n
            inputs[name][at : at + 4] = colours[r][c]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_in_a_model_is_what_the_picture_says(family, tiny):
    """Also where the tower sees the blocks window by window."""
    model, inputs = tiny(family, "dense" if family == "glm4v" else "images")
    draw, first, want = random.Random(1), 0, []
    for grid in inputs["image_grid_thw"].tolist():
        colours = [[draw.randrange(3) / 4 for _ in range(grid[2] // 2)] for _ in range(grid[1] // 2)]
        painted(inputs, "pixel_values", grid, first, colours, 4)
        first += grid[0] * grid[1] * grid[2]
        want.append((len(colours) * len(colours[0]), coded([[[x] for x in row] for row in colours])))
    with vtprune.attach(model, "pixelprune") as handle, torch.no_grad():
        out = model(**inputs).logits
        (stage,) = handle.report().stages
    (n0, a), (_, b), (_, c) = want
    assert stage.site == "pixels"
    assert [row.tolist() for row in stage.kept] == [a + [n0 + i for i in b], c]
    assert out.isfinite().all()


def test_the_first_moment_of_a_step_decides(tiny):
    """Channels come first in a row of pixels, then the moments of the step."""
    model, inputs = tiny("qwen2-vl", "video")
    pixels = inputs["pixel_values_videos"].view(-1, 3, 2, 16)
    pixels[:, :, 0] = 0.5
    with vtprune.attach(model, "pixelprune") as handle, torch.no_grad():
        model(**inputs)
        (stage,) = handle.report().stages
    assert [i for i in stage.kept[0].tolist() if i < 16] == [0, 8]  # two steps of eight blocks
    pixels[:, 1, 0] = torch.arange(len(pixels))[:, None] // 4  # every block another green
    with vtprune.attach(model, "pixelprune") as handle, torch.no_grad():
        model(**inputs)
        (stage,) = handle.report().stages
    assert [i for i in stage.kept[0].tolist() if i < 16] == list(range(16))


def test_std_undoes_the_normalisation(tiny):
    """A difference of 0.1 of the range, in a channel that was divided by 0.25."""
    model, inputs = tiny("qwen2-vl", "images")
    pixels = inputs["pixel_values"].view(-1, 4, 3, 2, 16)  # [squares, patches, channels, moments, n]
    pixels[:] = 0
    pixels[1::2, :, 2] = 0.1 / 0.25

    def counts(**options) -> int:
        with vtprune.attach(model, "pixelprune", **options) as handle, torch.no_grad():
            model(**inputs)
            return sum(handle.report().stages[0].tokens_out)

    assert counts(threshold=0.11, std=(0.5, 0.5, 0.25)) == 3  # the first of each image
    assert counts(threshold=0.09, std=(0.5, 0.5, 0.25)) > 3
    assert counts(threshold=0.11, std=(0.5,)) > 3
    with pytest.raises(VtpruneError, match="std= has 2 numbers, and pixels have 3 channels"):
        counts(std=(0.5, 0.5))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "glm4v"])
def test_nothing_alike_is_the_dense_model(family, tiny):
    model, inputs = tiny(family, "video")
    with torch.no_grad():
        want = model(**inputs).logits
        with vtprune.attach(model, "pixelprune"):
            torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0)


def test_it_goes_with_stages_behind_it(tiny):
    model, inputs = tiny("qwen2.5-vl", "images")
    inputs["pixel_values"][: 4 * 8] = 0.25  # half of the first image
    recipe = vtprune.Recipe(
        name="both",
        stages=(vtprune.Stage(method="pixelprune"), vtprune.Stage(method="fastv", keep=4, options={"layer": 1})),
    )
    with vtprune.attach(model, recipe) as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
    assert report.stages[0].tokens_out == [16 - 7 + 8, 12] and report.stages[1].tokens_out == [8, 4]


def test_where_it_cannot_be(tiny):
    for family in ("llava", "internvl", "smolvlm"):
        model, _ = tiny(family, next(iter(ADAPTERS.get(family).tiny)))
        with pytest.raises(UnsupportedError, match="pixel"):
            vtprune.attach(model, "pixelprune")
    model, _ = tiny("qwen2-vl", "images")
    with pytest.raises(VtpruneError, match="takes no keep="):
        vtprune.attach(model, "pixelprune", keep=0.5)
    with pytest.raises(VtpruneError, match="threshold"):
        vtprune.attach(model, "pixelprune", threshold=1.5)
    with pytest.raises(UnsupportedError, match="max_pixels"):
        vtprune.attach(model, "downsample", keep=0.5)
    layers = vtprune.Recipe(
        name="late", stages=(vtprune.Stage(method="divprune", keep=4), vtprune.Stage(method="pixelprune"))
    )
    with pytest.raises(VtpruneError, match="execution order"):
        vtprune.attach(model, layers)
