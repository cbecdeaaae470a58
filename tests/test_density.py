"""Density peaks with nearest neighbours against loops, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from vtprune.kernels import density

INF = math.inf


def apart(a: list[float], b: list[float]) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def slow_prominence(x: list[list[float]], able: list[bool], neighbours: int) -> dict[int, float]:
    """Density times distance of those that are able, by position."""
    mine, c = [i for i in range(len(x)) if able[i]], len(x[0])
    rho = {}
    for i in mine:
        near = sorted([0.0] + [apart(x[i], x[j]) / c for j in mine if j != i])[:neighbours]
        rho[i] = math.exp(-sum(near) / len(near))
    out = {}
    for i in mine:
        denser = [j for j in mine if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        far = [math.sqrt(apart(x[i], x[j]) / c) for j in (denser or mine)]
        out[i] = rho[i] * (min(far) if denser else max(far))
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_prominence(x: Tensor, able: Tensor, neighbours: int) -> None:
    got = density.prominence(x, able, neighbours)
    assert got.shape == able.shape and torch.isfinite(got[able]).all()
    for tokens, marks, row in zip(x.flatten(0, -3), able.flatten(0, -2), got.flatten(0, -2), strict=True):
        for i, want in slow_prominence(tokens.tolist(), marks.tolist(), neighbours).items():
            assert row[i].item() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("neighbours", [1, 2, 4, 50])
@pytest.mark.parametrize("tokens, channels", [(1, 3), (2, 5), (9, 4), (31, 6)])
def test_prominence_equals_the_loops(tokens: int, channels: int, neighbours: int) -> None:
    x, able = random(2, 3, tokens, channels, seed=tokens), torch.rand(2, 3, tokens, generator=torch.Generator()) < 0.7
    able[0, 0] = True
    check_prominence(x, able, neighbours)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_prominence_of_few_that_are_able(count: int) -> None:
    """Fewer than the neighbours asked for: those that are there are averaged; alone a token has no distance."""
    able = torch.zeros(1, 2, 7, dtype=torch.bool)
    able[..., 2 : 2 + count] = True
    x = random(1, 2, 7, 4)
    check_prominence(x, able, 4)
    got = density.prominence(x, able, 4)
    assert not torch.isnan(got).any() and (got[~able] <= 0).all()
    if count == 1:
        assert (got[able] == 0).all()
    if count > 1:
        assert (got[able] > 0).all()


def test_prominence_does_not_see_what_is_not_able() -> None:
    x, able = random(1, 12, 4), torch.arange(12)[None] % 3 > 0
    other = torch.where(able[..., None], x, x[:, :1] + 1e-3)  # a crowd
    torch.testing.assert_close(
        density.prominence(x, able, 4)[able], density.prominence(other, able, 4)[able], rtol=1e-9, atol=1e-12
    )


def test_of_equally_dense_tokens_the_lower_is_denser() -> None:
    """Integers, so that equal distances are equal: a square has four equal densities, a line two pairs of them."""
    square = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]]).double()
    able = torch.ones(1, 4, dtype=torch.bool)
    check_prominence(square, able, 2)
    (row,) = density.prominence(square, able, 2)
    rho = math.exp(-(0 + 4 / 2) / 2)
    assert row.tolist() == pytest.approx([rho * 2] + [rho * math.sqrt(2)] * 3)  # the first has the diagonal
    line = torch.tensor([[[0.0], [1.0], [3.0], [4.0]]]).double()
    check_prominence(line, able, 3)
    twice = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [1.0, 5.0], [3.0, 1.0], [0.0, 0.0]]]).double()
    five = torch.ones(1, 5, dtype=torch.bool)
    check_prominence(twice, five, 2)
    (row,) = density.prominence(twice, five, 2)
    assert row[2] == row[3] == 0 and (row[:2] > 0).all()  # the second of a pair has a denser one at no distance
    (row,) = density.prominence(torch.ones(1, 5, 3).double(), five, 4)
    assert row.tolist() == [0] * 5


def test_prominence_by_hand() -> None:
    """1, 2, 4 in one channel with two neighbours: densities e^-1/2, e^-1/2, e^-2."""
    x = torch.tensor([[[1.0], [2.0], [4.0]]]).double()
    (row,) = density.prominence(x, torch.ones(1, 3, dtype=torch.bool), 2)
    assert row.tolist() == pytest.approx([3 * math.exp(-0.5), 1 * math.exp(-0.5), 2 * math.exp(-2)])


def test_distances_are_squared_and_per_channel() -> None:
    x = random(2, 5, 7)
    got = density.distances(x)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                assert got[b, i, j].item() == pytest.approx(
                    apart(x[b, i].tolist(), x[b, j].tolist()) / 7, rel=1e-9, abs=1e-12
                )


@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_the_nearest_centre_equals_the_loops(count: int) -> None:
    x = random(2, 3, 9, 4)
    x[..., 5, :] = x[..., 2, :]  # two in one place: a centre is its own
    centres = torch.zeros(2, 3, 9, dtype=torch.bool)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(count))
    centres[..., order[:count]] = True
    if count == 3:
        centres[0, 0] = torch.isin(torch.arange(9), torch.tensor([2, 5, 7]))
    got = density.nearest(x, centres)
    for b in range(2):
        for f in range(3):
            marked, tokens = centres[b, f].nonzero()[:, 0].tolist(), x[b, f].tolist()
            for i in range(9):
                if not marked:
                    want = 0
                elif i in marked:
                    want = i
                else:
                    want = min(marked, key=lambda j: (apart(tokens[i], tokens[j]), j))  # noqa: B023
                assert got[b, f, i].item() == want


def test_of_centres_as_near_the_lower_counts() -> None:
    x = torch.tensor([[[1.0], [0.0], [2.0], [9.0], [0.0]]]).double()
    assert density.nearest(x, torch.tensor([[False, True, True, False, True]])).tolist() == [[1, 1, 2, 2, 4]]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_the_closest_member_of_a_group_equals_the_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "CHUNK", chunk)
    x, groups = random(2, 11, 4), random(2, 3, 5, 4, seed=1)
    there = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    there[0, 0], there[1, 1] = False, False  # nobody in them
    there[0, 1], there[1, 2, 1:] = True, False
    far, which = density.closest(x, groups, there)
    assert far.shape == which.shape == (2, 11, 3)
    for b in range(2):
        for n in range(11):
            for g in range(3):
                all_ = [
                    (math.sqrt(apart(x[b, n].tolist(), groups[b, g, a].tolist())), a)
                    for a in range(5)
                    if there[b, g, a]
                ]
                if not all_:
                    assert far[b, n, g] == INF
                    continue
                distance, member = min(all_)
                assert far[b, n, g].item() == pytest.approx(distance, rel=1e-9) and which[b, n, g] == member


def test_chunks_of_the_closest_are_as_small_as_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "CHUNK", 2 * 3 * 5 * 4)
    seen, real = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda p, q: (seen.append(p.shape[1]), real(p, q))[1])
    density.closest(random(2, 11, 4), random(2, 3, 5, 4), torch.ones(2, 3, 5, dtype=torch.bool))
    assert seen == [4, 4, 3]


def test_nan_does_not_stop_it() -> None:
    x, able = random(1, 2, 6, 3), torch.ones(1, 2, 6, dtype=torch.bool)
    x[0, 0, 2] = torch.nan
    got = density.prominence(x, able, 4)
    assert torch.isfinite(got[0, 1]).all()
    centres = torch.arange(6).expand(1, 2, 6) == 4
    got = density.nearest(x, centres)
    assert (got == 4).all()


def test_distances_are_the_same_both_ways() -> None:
    """Of more than 25 tokens PyTorch takes a matrix product: two that are nearest to one another are as dense."""
    x, able = random(1, 40, 8), torch.ones(1, 40, dtype=torch.bool)
    for dtype in (torch.float64, torch.float32):
        far = density.distances(x.to(dtype))
        assert torch.equal(far, far.mT)
    check_prominence(x[None], able[None], 2)
