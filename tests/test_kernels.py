"""The contract of every registered kernel: Triton equals the reference, the reference equals a slow transcription.
Without a GPU Triton's interpreter runs it (conftest.py sets that up); with one, the kernels run there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vtprune.kernels import KERNELS
from vtprune.kernels.base import cosines, interpreted, run

import vtprune
from vtprune import kernels
from watch import Largest

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (1, 63, 577, 1000)
ROOT = Path(__file__).resolve().parents[1]


def cases() -> list:
    """Every case at small sizes in one dtype, the first one in every dtype; at 577 tokens the first, in one; the
    rest is slow."""
    out = []
    for name in KERNELS:
        for number, case in enumerate(KERNELS.get(name).cases):
            for n in SHAPES:
                for i, dtype in enumerate(DTYPES):
                    small = i == number % len(DTYPES) or (number == 0 and n > 1)
                    quick = small and (n > 1 or number == 0) if n < 100 else n == 577 and number == i == 0
                    marks = () if quick or DEVICE == "cuda" else pytest.mark.slow
                    out.append(
                        pytest.param(name, case, n, dtype, marks=marks, id=f"{name}-{case}-{n}-{str(dtype)[6:]}")
                    )
    return out


def moved(value, device: str):
    """Tensors in (nested) tuples and lists to ``device``, strides kept."""
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(moved(v, device) for v in value) if isinstance(value, tuple | list) else value


def leaves(value) -> list[Tensor]:
    """The tensors in (nested) tuples and lists."""
    return (
        [value]
        if isinstance(value, Tensor)
        else [t for v in value for t in leaves(v)]
        if isinstance(value, tuple | list)
        else []
    )


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel allocates is full of NaN or of the lowest integer, so that a place it does not write shows."""
    stock = torch.empty

    def empty(*args, **kwargs):
        out = stock(*args, **kwargs)
        return out.fill_(
            math.nan
            if out.is_floating_point()
            else torch.iinfo(out.dtype).max
            if out.dtype == torch.uint8
            else torch.iinfo(out.dtype).min
        )

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name, case, n, dtype", cases())
def test_triton_equals_the_reference(name, case, n, dtype, poisoned):
    info = KERNELS.get(name)
    arguments = info.example(case, n, dtype, torch.Generator().manual_seed(n))
    want = info.reference(*arguments)
    given = moved(arguments, DEVICE)
    before = [t.clone() for t in leaves((arguments, given))]
    got = moved(info.triton()(*given), "cpu")
    info.close(arguments, got, want)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves((arguments, given)), strict=True)), (
        "an input was changed"
    )


@pytest.mark.parametrize("name", list(KERNELS))
def test_strided_cases_are_not_contiguous(name):
    """The contract's non-contiguous inputs are what they claim to be."""
    arguments = KERNELS.get(name).example("strided", 63, torch.float32, torch.Generator().manual_seed(0))
    assert any(not t.is_contiguous() for t in leaves(arguments))


# --------------------------------------------------------------------------------------------- the reference against
# loops


def cosine(a: Tensor, b: Tensor) -> float:
    length = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / length if length else 0.0


def slow_match(x, sources, targets, protected, penalty, padded):
    score, index = torch.full(sources.shape, -torch.inf, dtype=torch.float64), torch.full(sources.shape, -1)
    for b in range(len(x)):
        for m, i in enumerate(sources[b].tolist()):
            for k, j in enumerate(targets[b].tolist()):
                if i < 0 or j < 0 or (protected is not None and (protected[b, i] or protected[b, j])):
                    continue
                s = cosine(x[b, i], x[b, j]) - (0 if penalty is None else float(penalty[b, k]))
                if s > float(score[b, m]) + 1e-12:
                    score[b, m], index[b, m] = s, k
    return score, index


def slow_energy(x, function, margin, alpha, nearest, valid, itself):
    out = torch.zeros(x.shape[:2], dtype=torch.float64)
    for b in range(len(x)):
        real = [j for j in range(x.shape[1]) if valid is None or valid[b, j]]
        for i in real:
            s = [cosine(x[b, i], x[b, j]) for j in real if itself or j != i]
            if function == "nearest":
                best = sorted(s, reverse=True)[:nearest]
                out[b, i] = sum(best) / len(best) if best else -math.inf
                continue
            f = {
                "elu": lambda c: c - margin if c > margin else alpha * (math.exp(c - margin) - 1),
                "jump": lambda c: c if c >= margin else alpha * (math.exp(c - margin) - 1),
                "above": lambda c: float(c >= margin),
                "exp": lambda c: math.exp((c - margin) / alpha),
            }[function]
            out[b, i] = sum(map(f, s)) / (1 if function == "above" else max(len(s), 1))
    return out


def slow_softmax(logits: list[float | None]) -> list[float]:
    weights = [0.0 if s is None else math.exp(s) for s in logits]
    return [w / sum(weights) if sum(weights) else 0.0 for w in weights]


def slow_query_scores(q, k, scale, weight, seen, bias, cos, sin, cap):
    b, h, r, d = q.shape
    g, n = k.shape[1:3]
    out = torch.zeros(b, n, dtype=torch.float64)
    for image in range(b):
        for head in range(h):
            for row in range(r):
                logits: list[float | None] = []
                for j in range(n):
                    key = k[image, head * g // h, j].clone()
                    if cos is not None:
                        turned = torch.cat([-key[d // 2 :], key[: d // 2]])
                        at = image if len(cos) > 1 else 0
                        key = key * cos[at, j] + turned * sin[at, j]
                    s = float(q[image, head, row] @ key) * scale
                    s = s if cap is None else math.tanh(s / cap) * cap
                    s += 0 if bias is None else float(bias[image, j])
                    hidden = seen is not None and not seen[image, min(row, seen.shape[1] - 1), j]
                    logits.append(None if hidden else s)
                out[image] += float(weight[image, row]) / h * torch.tensor(slow_softmax(logits), dtype=torch.float64)
    return out


def slow_flow_scores(query, value, k, v, scale, value_scale, bias, value_seen):
    b, h, n, _ = k.shape
    attention, similarity, strength = (torch.zeros(b, n, dtype=torch.float64) for _ in range(3))
    for image in range(b):
        for head in range(h):
            logits: list[float | None] = [float(query[image, head] @ k[image, head, j]) * scale for j in range(n)]
            if bias is not None:
                logits = [
                    None if bias[image, j] == -math.inf else s + float(bias[image, j]) for j, s in enumerate(logits)
                ]
            attention[image] += torch.tensor(slow_softmax(logits), dtype=torch.float64) / h
            hidden = [value_seen is not None and not value_seen[image, j] for j in range(n)]
            logits = [
                None if hidden[j] else float(value[image, head] @ v[image, head, j]) * value_scale for j in range(n)
            ]
            similarity[image] += torch.tensor(slow_softmax(logits), dtype=torch.float64) / h
        for j in range(n):
            strength[image, j] = sum(
                abs(sum(float(v[image, head, j, c]) for head in range(h)) / h) for c in range(v.shape[3])
            )
    return attention, similarity, strength


def slow_gather(index, tensors):
    out = []
    for t in tensors:
        rows = [
            [t[b if len(t) > 1 else 0, i] if i >= 0 else torch.zeros_like(t[0, 0]) for i in row]
            for b, row in enumerate(index.tolist())
        ]
        out.append(torch.stack([torch.stack(row) for row in rows]))
    return out


def slow_merge(x, target, slots, weight, size):
    mean, sizes = torch.zeros(len(x), slots, x.shape[2], dtype=x.dtype), torch.zeros(len(x), slots, dtype=size.dtype)
    for b in range(len(x)):
        for slot in range(slots):
            members = (target[b] == slot).nonzero()[:, 0].tolist()
            total = sum(float(weight[b, n]) for n in members)
            for n in members:
                mean[b, slot] += x[b, n] * (float(weight[b, n]) / total)
                sizes[b, slot] += size[b, n]
    return mean, sizes


def slow_maxmin(x, keep, valid):
    out = torch.full((len(x), keep), -1)
    for b in range(len(x)):
        free = [j for j in range(x.shape[1]) if valid is None or valid[b, j]]
        chosen: list[int] = []
        everybody = list(free)
        while free and len(chosen) < keep:

            def gap(j: int, b: int = b, others: tuple = tuple(chosen or everybody)) -> float:
                return min((1 - cosine(x[b, j], x[b, i]) for i in others if i != j), default=math.inf)

            far = max(round(gap(j), 9) for j in free)
            chosen.append(next(j for j in free if round(gap(j), 9) == far))
            free.remove(chosen[-1])
        out[b, : len(chosen)] = torch.tensor(chosen)
    return out


def slow_dpp(x, keep, relevance, valid):
    """By the determinants themselves."""
    out = torch.full((len(x), keep), -1)
    for b in range(len(x)):
        free = [j for j in range(x.shape[1]) if valid is None or valid[b, j]]
        r = [1.0 if relevance is None else float(relevance[b, j]) for j in range(x.shape[1])]
        kernel = torch.tensor(
            [[r[i] * cosine(x[b, i], x[b, j]) * r[j] for j in range(x.shape[1])] for i in range(x.shape[1])],
            dtype=torch.float64,
        )
        chosen: list[int] = []
        base = 1.0
        while free and len(chosen) < keep:
            gains = {j: float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]])) / base for j in free}
            gains = {j: g if g > 1e-6 * r[j] ** 2 else -1 / (1 + r[j]) for j, g in gains.items()}
            top = max(gains.values())
            pick = next(j for j in free if abs(gains[j] - top) <= 1e-9 * abs(top))
            base *= gains[pick] if gains[pick] > 0 else 1.0
            chosen.append(pick)
            free.remove(pick)
            if gains[pick] < 0:  # what is left adds nothing: by relevance
                rest = sorted(free, key=lambda j: (-r[j], j))[: keep - len(chosen)]
                chosen, free = [*chosen, *rest], []
        out[b, : len(chosen)] = torch.tensor(chosen)
    return out


def slow_coverage(x, keep, prior, relevance, weight, rows, temperature, diversity, scale, valid):
    """By the sums themselves."""
    out = torch.full((len(x), keep), -1)
    for b in range(len(x)):
        n = x.shape[1]
        real = [j for j in range(n) if valid is None or valid[b, j]]
        s = {(i, j): cosine(x[b, i], x[b, j]) for i in range(n) for j in range(n)}
        if temperature:
            s = {ij: math.exp((c - 1) / temperature) for ij, c in s.items()}
        free, chosen = list(real), []

        def covered(u: int, s: dict = s, chosen: list = chosen) -> float:
            return max([0.0 if relevance is None else -math.inf, *(s[u, v] for v in chosen)])

        def gain(v: int, b: int = b, s: dict = s, chosen: list = chosen, real: list = real) -> float:
            total = sum((1 if weight is None else float(weight[b, u])) * max(0.0, s[u, v] - covered(u)) for u in real)
            for r in range(0 if rows is None else rows.shape[1]):
                total += max(0.0, float(rows[b, r, v]) - max([0.0, *(float(rows[b, r, t]) for t in chosen)]))
            return round(total, 11)

        while free and len(chosen) < keep:
            score = {v: 0.0 if relevance is None else float(relevance[b, v]) for v in free}
            if chosen or relevance is None:
                terms = [({v: gain(v) for v in free}, 1.0)]
                if diversity:
                    terms.append(({v: round(1 - covered(v), 11) for v in free}, diversity))
                for number, (term, factor) in enumerate(terms):
                    low = min(term.values()) if scale == "range" else 0.0
                    by = {
                        "none": 1.0,
                        "mean": sum(term.values()) / len(term),
                        "range": max(term.values()) - low,
                    }[scale]
                    for v in free:
                        p = 1.0 if prior is None or number else float(prior[b, v])
                        score[v] += factor * p * ((term[v] - low) / by if by > 0 else 0.0)
            best = max(score.values())
            chosen.append(next(v for v in free if score[v] >= best - 1e-9 * abs(best)))
            free.remove(chosen[-1])
        out[b, : len(chosen)] = torch.tensor(chosen)
    return out


def doubles(value):
    """Floats in 64 bits, so that two ways to sum give the same choice."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(doubles(v) for v in value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name, case", [(n, c) for n in KERNELS for c in KERNELS.get(n).cases])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_the_reference_equals_a_slow_transcription(name, case, n):
    info = KERNELS.get(name)
    arguments = doubles(info.example(case, n, torch.float32, torch.Generator().manual_seed(n)))
    got, want = info.reference(*arguments), globals()[f"slow_{name}"](*arguments)
    for a, b in zip(*((r if isinstance(r, tuple | list) else (r,)) for r in (got, want)), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_benchmarks_opponent_computes_the_same(name):
    """Plain torch, against which the benchmark compares, does the same work."""
    info = KERNELS.get(name)
    arguments = info.example(info.cases[0], 40, torch.float32, torch.Generator().manual_seed(5))
    info.close(arguments, info.plain(*arguments), info.reference(*arguments))


@pytest.mark.parametrize("n", [577, 3000])
@pytest.mark.parametrize("name", ["match", "energy", "maxmin", "dpp", "coverage", "query_scores"])
def test_references_in_chunks_equal_the_whole(name, n):
    """Sizes at which the reference works in chunks, or without the matrix, against plain torch with it."""
    info = KERNELS.get(name)
    arguments = info.example(info.cases[0], n, torch.float32, torch.Generator().manual_seed(1))
    if name in ("maxmin", "dpp", "coverage") and n > 1000:
        arguments = (arguments[0][:1], 12, *(a[:1] if isinstance(a, Tensor) else a for a in arguments[2:]))
        assert n > arguments[0].shape[2]  # no matrix
    got, want = info.reference(*arguments), info.plain(*arguments)
    if name in ("maxmin", "dpp", "coverage"):
        assert (got == want).float().mean() == 1
    else:
        info.close(arguments, got, want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["match", "energy", "query_scores", "flow_scores", "maxmin", "dpp", "coverage"])
def test_no_reference_makes_a_map_of_all_tokens(name):
    """The largest tensor alive inside the reference grows with N, not with its square."""
    info = KERNELS.get(name)
    found = []
    for n in (4096, 8192):
        arguments = info.example(info.cases[0], n, torch.float32, torch.Generator().manual_seed(1))
        if name in ("maxmin", "dpp", "coverage"):
            arguments = (arguments[0], 4, *arguments[2:])
        with Largest() as watch:
            info.reference(*arguments)
        found.append(watch.bytes // 4)
    assert found[1] <= 2.2 * found[0] and found[1] < 8192 * 8192 / 4


# -------------------------------------------------------------------------------------------------- dispatch and
# registration


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0))


def test_tensors_on_the_cpu_run_the_reference(monkeypatch):
    ran = []
    info = KERNELS.get("energy")
    monkeypatch.setitem(info.loaded, "triton", lambda *a: ran.append(a) or torch.zeros(2, 9))
    kernels.energy(tokens())
    assert not ran
    with kernels.use("reference"):
        kernels.energy(tokens())
    assert not ran
    if interpreted():
        kernels.energy(tokens(), backend="triton")
        with kernels.use("triton"):
            kernels.energy(tokens())
        assert len(ran) == 2
        with pytest.raises(vtprune.VtpruneError, match="64-bit"):
            kernels.energy(tokens().double(), backend="triton")
        kernels.energy(tokens().requires_grad_(), backend="triton")
        with pytest.raises(vtprune.VtpruneError, match="gradient"):
            kernels.merge(tokens().requires_grad_(), torch.zeros(2, 9).long(), 1, backend="triton")


def test_without_a_gpu_triton_is_refused_with_the_reason(tmp_path):
    code = """
import json, torch, vtprune
from vtprune import kernels
try:
    kernels.energy(torch.randn(1, 4, 8), backend="triton")
except vtprune.VtpruneError as e:
    print(json.dumps(str(e)))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot run here" in json.loads(done.stdout), done.stderr


def test_bad_calls_say_what_is_wrong():
    x = tokens()
    for call, words in (
        (lambda: kernels.energy(x, backend="cuda"), "backend='cuda'"),
        (lambda: kernels.energy(x, "relu"), "function='relu'"),
        (lambda: kernels.energy(x, "nearest", nearest=17), "nearest=17"),
        (lambda: kernels.energy(x[0]), r"\[B, N, C\]"),
        (lambda: kernels.energy(x, valid=torch.ones(2, 8, dtype=torch.bool)), "valid must be"),
        (lambda: kernels.match(x, torch.arange(4), torch.arange(4, 9), penalty=torch.zeros(2, 4)), "penalty must be"),
        (lambda: kernels.query_scores(torch.ones(1, 3, 1, 8), torch.ones(1, 2, 9, 8)), "divisor"),
        (
            lambda: kernels.query_scores(
                torch.ones(1, 2, 1, 8), torch.ones(1, 2, 9, 8), seen=torch.ones(1, 9, dtype=torch.bool)
            ),
            "seen must be",
        ),
        (
            lambda: kernels.flow_scores(
                torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 9, 8), torch.ones(1, 2, 8, 8), scale=1.0
            ),
            "v must be",
        ),
        (lambda: kernels.gather(torch.zeros(2, 3).long(), x, x[:, :4]), "gather"),
        (lambda: kernels.merge(x, torch.zeros(2, 8).long(), 1), "target must be"),
        (lambda: kernels.maxmin(x, -1), "keep=-1"),
        (lambda: kernels.dpp(x, 3, relevance=torch.ones(9)), "relevance must be"),
        (lambda: kernels.coverage(x, 3, prior=torch.ones(9)), "prior must be"),
        (lambda: kernels.coverage(x, 3, rows=torch.ones(2, 4, 8)), "rows must be"),
        (lambda: kernels.coverage(x, 3, scale="max"), "scale='max'"),
        (lambda: kernels.coverage(x, 3, temperature=-1.0), "temperature=-1"),
        (lambda: kernels.KERNELS.get("macth"), "did you mean match"),
    ):
        with pytest.raises(vtprune.VtpruneError, match=words):
            call()
    with pytest.raises(AttributeError, match="enrgy"):
        _ = kernels.enrgy


def test_merge_and_gather_carry_gradients():
    x = tokens().double().requires_grad_()
    target = torch.randint(-1, 3, (2, 9), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: kernels.merge(t, target, 3, weight=weight)[0], (x,))
    assert torch.autograd.gradcheck(lambda t: kernels.gather(target, t)[0], (x,))


@pytest.mark.ci
@pytest.mark.parametrize("name", list(KERNELS))
def test_ops_are_compiled_without_a_break(name):
    """On the CPU torch.compile traces the reference as a whole."""
    info = KERNELS.get(name)
    arguments = info.example(info.cases[0], 20, torch.float32, torch.Generator().manual_seed(0))
    want = info.reference(*arguments)
    got = torch.compile(info.reference, backend="eager", fullgraph=True)(*arguments)
    info.close(arguments, got, want)


TRACE = """
import json, sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from vtprune.kernels import KERNELS
found = {}
for name in KERNELS:
    info = KERNELS.get(name)
    arguments = info.example(info.cases[0], 63, torch.bfloat16, torch.Generator().manual_seed(0))
    with FakeTensorMode() as mode:
        def fake(v):
            if isinstance(v, torch.Tensor):
                return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
            return type(v)(fake(x) for x in v) if isinstance(v, (tuple, list)) else v
        out = info.triton()(*fake(arguments))
        found[name] = [[list(t.shape), str(t.dtype), str(t.device)] for t in (out if isinstance(out, (tuple, list)) else [out])]
        assert hasattr(torch.ops.vtprune, name)
print(json.dumps(found))
"""  # noqa: E501


@pytest.mark.ci
def test_kernels_are_registered_ops_whose_shapes_are_known_without_a_gpu(tmp_path):
    """What torch.compile needs of them: traced with fake CUDA tensors they give the shapes and dtypes of the
    reference."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACE], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in KERNELS:
        info = KERNELS.get(name)
        want = info.reference(*info.example(info.cases[0], 63, torch.bfloat16, torch.Generator().manual_seed(0)))
        want = want if isinstance(want, tuple | list) else [want]
        assert found[name] == [[list(t.shape), str(t.dtype), "cuda:0"] for t in want]


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(("first", "first", "first", "90"), id="sm90", marks=pytest.mark.ci),
        pytest.param(("all", "all", "all", "80", "89", "90"), id="all", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(scope, tmp_path):
    """To machine code, by Triton's own compiler, with the types and sizes that the launchers use."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/compile_kernels.py"), *scope],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert {f"{name}_triton" for name in KERNELS} <= compiled


@pytest.mark.ci
def test_tokens_that_are_not_finite_are_similar_to_nothing():
    """They neither win a maximum nor open what is closed, on both backends."""
    for bad in (math.nan, math.inf):
        x = tokens(12).clone()
        x[0, 0], x[1, 3] = bad, bad
        protected = torch.zeros(2, 12, dtype=torch.bool)
        protected[:, 3] = True
        valid = ~torch.isnan(x * 0).any(-1)
        for backend in ("reference", "triton"):
            given = moved((x, protected, valid), DEVICE if backend == "triton" else "cpu")
            y, closed, real = given
            at = torch.arange(12, device=y.device)
            score, index = kernels.match(y, at[1:6], at[6:], backend=backend)
            assert bool(score.isfinite().all()) and bool((index < 6).all())
            index = kernels.match(y, at[4:9], at[[3, 10, 11]], protected=closed, backend=backend)[1]
            assert bool((index > 0).all())
            assert bool(kernels.energy(y, backend=backend).isfinite().all())
            for chosen in (
                kernels.maxmin(y, 12, valid=real, backend=backend),
                kernels.dpp(y, 12, valid=real, backend=backend),
                kernels.coverage(y, 12, valid=real, backend=backend),
            ):
                assert [sorted(row) for row in chosen.tolist()] == [
                    [-1, *range(1, 12)],
                    [-1, *(i for i in range(12) if i != 3)],
                ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "backend, width",
    [
        ("reference", 3),
        ("reference", 64),
        pytest.param("triton", 64, marks=pytest.mark.ci),
        pytest.param("triton", 3, marks=pytest.mark.slow),
    ],
)
def test_what_adds_nothing_comes_by_position(backend, width):
    """Two directions, many times each, in 3 or 64 channels (with and without the matrix): two choices cover all, the
    rest has no gain."""
    x = torch.zeros(1, 12, width)
    x[0, torch.arange(12), torch.arange(12) % 2] = torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    valid = torch.arange(12)[None] != 4
    prior = torch.linspace(1, 2, 12)[None]
    device = DEVICE if backend == "triton" else "cpu"

    def choose(keep=12, **more):
        given = {k: moved(v, device) for k, v in {"valid": valid, **more}.items()}
        return kernels.coverage(moved(x, device), keep, backend=backend, **given)[0].tolist()

    rest = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert choose() == [1, 0, 2, 3, 5, 6, 7, 8, 9, 10, 11, -1]  # there are more of the second
    assert choose(prior=prior) == [11, 10, *rest, -1]
    assert choose(prior=-prior) == [0, 2, 6, 8, 10, 1, 3, 5, 7, 9, 11, -1]  # nothing is more than less
    nan = torch.where(torch.arange(12) == 0, math.nan, prior)
    assert choose(prior=nan) == [11, 10, *rest[1:], 0, -1]
    assert choose(keep=0) == []
    for scale in ("none", "mean", "range"):
        far = choose(relevance=prior, diversity=1.0, scale=scale)
        assert far == [11, 10, 9, 8, 7, 6, 5, 3, 2, 1, 0, -1]  # what is covered is ranked by relevance
    rows = torch.zeros(1, 2, 12)
    four = torch.randn(4, width, generator=torch.Generator().manual_seed(1)).repeat(10, 1)  # products are rounded
    many = moved((four * torch.linspace(1, 2, 40)[:, None])[None], device)
    picks = kernels.coverage(many, 40, prior=moved(torch.linspace(1, 2, 40)[None], device), backend=backend)[0].tolist()
    assert sorted(p % 4 for p in picks[:4]) == [0, 1, 2, 3] and picks[4:] == sorted(picks[4:])
    rows[0, 0, 7], rows[0, 1, 8] = 3.0, 2.0
    assert choose(rows=rows, weight=torch.zeros(1, 12))[:4] == [7, 8, 0, 1]
    assert choose(rows=rows, prior=prior)[:4] == [7, 8, 0, 1]


def test_masks_and_positions_of_other_types_are_refused():
    x, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    for call in (
        lambda: kernels.energy(x, valid=mask),
        lambda: kernels.match(x, torch.arange(4), torch.arange(4, 9), protected=mask),
        lambda: kernels.match(x, torch.arange(4).int(), torch.arange(4, 9)),
        lambda: kernels.maxmin(x, 2, valid=mask),
        lambda: kernels.dpp(x, 2, valid=mask),
        lambda: kernels.coverage(x, 2, valid=mask),
        lambda: kernels.query_scores(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 9, 8), seen=mask[:, None]),
        lambda: kernels.merge(x, mask.int(), 2),
    ):
        with pytest.raises(vtprune.VtpruneError, match="must be (bool|int64), got int"):
            call()


def test_positions_beyond_the_end_never_reach_another_image():
    x = torch.arange(12.0).reshape(2, 3, 2)
    beyond = torch.tensor([[0, 3, 0], [0, 1, 1]])
    with pytest.raises(vtprune.VtpruneError, match="up to 3, there are 3"):
        kernels.gather(beyond, x)
    with pytest.raises(vtprune.VtpruneError, match="up to 3, there are 2"):
        kernels.merge(x, beyond, 2)
    info = KERNELS.get("gather")
    assert moved(info.triton()(*moved((beyond, [x]), DEVICE)), "cpu")[0][0, 1].tolist() == [0, 0]


def test_autocast_does_not_lower_the_precision():
    for name in KERNELS:
        info = KERNELS.get(name)
        arguments = info.example(info.cases[0], 40, torch.float32, torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16), kernels.use("reference"):
            got = run(name, None, *arguments)
        info.close(arguments, got, info.reference(*arguments))


def test_cosines_of_a_few_rows():
    x, q = tokens().to(torch.bfloat16), tokens(4).to(torch.bfloat16)
    x[0, 2], q[1, 3] = math.nan, 0
    with torch.autocast("cpu", torch.bfloat16):
        got = cosines(q, x)
    for b in range(2):
        for i in range(4):
            for j in range(9):
                want = 0.0 if (b, j) == (0, 2) else cosine(q[b, i].double(), x[b, j].double())
                assert abs(float(got[b, i, j]) - want) < 1e-6


@pytest.mark.parametrize(
    "name, case", [("match", "ranked"), ("energy", "others"), ("query_scores", "rows"), ("query_scores", "many")]
)
def test_small_chunks_change_nothing(name, case, monkeypatch):
    info = KERNELS.get(name)
    arguments = info.example(case, 67, torch.float32, torch.Generator().manual_seed(3))
    want = info.reference(*arguments)
    monkeypatch.setattr(sys.modules[info.reference.__module__], "CHUNK", 700)
    info.close(arguments, info.reference(*arguments), want)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["maxmin", "dpp", "coverage"])
def test_equal_tokens_are_chosen_from_the_front_whatever_is_beside_them(name, backend):
    """New-line tokens are all equal: which of them is chosen must not hang on the rounding of a larger product."""
    g = torch.Generator().manual_seed(0)
    for _ in range(40 if backend == "reference" else 2):
        n = int(torch.randint(20, 90 if backend == "reference" else 30, (1,), generator=g))
        x = torch.randn(1, n, 96, generator=g)
        equal = torch.randperm(n, generator=g)[:6].sort().values
        x[0, equal] = x[0, equal[0]].clone()
        batch = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, 13)), torch.randn(2, n + 13, 96, generator=g)])
        valid = torch.ones(3, n + 13, dtype=torch.bool)
        valid[0, n:] = False
        alone = getattr(kernels, name)(x, n // 3, backend=backend)[0]
        beside = getattr(kernels, name)(batch, n // 3, valid=valid, backend=backend)[0]
        assert torch.equal(alone, beside)
        of_them = [p for p in alone.tolist() if p in equal]
        assert of_them == equal.tolist()[: len(of_them)]
