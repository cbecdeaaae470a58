"""Every registered kernel against plain torch with the full matrix, and against the floor of the machine.

``python benchmarks/kernels.py [--device D] [--ops a,b] [--sizes N,N] [--batch B,B] [--dtype T] [--repeats N] [--limit
GB] [--cpu-time] [--json F] [--table F] [--save]``

First the op's own tests run, in a process of their own; an op whose tests fail gets no number, and the exit code is 1.
There is no way around that.

A row is one op at one shape. Its sides are ``plain`` (``info.plain``), ``reference`` (``info.reference``) and on CUDA
``triton`` (what the op's dispatch runs). They take turns, in blocks of calls that last at least :data:`BLOCK`; times
are medians over the rounds with 20th and 80th percentiles, and a ratio is the median of the ratios within a round.
*Ours* is Triton on CUDA and the reference elsewhere. The floor is the larger of bytes / bandwidth and operations /
matmul rate, from ``info.work``; both speeds are measured here: a large copy (bytes read plus bytes written) and a large
square matmul of the same dtype. Small inputs stay in the caches, which are faster than the copy.

Memory is the peak of what the call allocates beyond what was there before, results included. Plain torch is left out
where, by its use at two small sizes, it would need more than ``--limit``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines; read when torch is loaded

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from vtprune.kernels import KERNELS, KernelInfo
from vtprune.kernels.base import run

from vtprune import VtpruneError
from vtprune.measure import timing
from vtprune.measure.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (576, 2880, 8192)
BATCHES = {"cpu": (1,), "cuda": (1, 8, 32)}
GROWTH = (1024, 2048, 4096, 8192, 16384)  # tokens at which the memory of the references is measured
BLOCK = 0.002  # seconds
PATIENCE = 6.0  # seconds for one row's rounds, of which there are at least three
KEEP = 64  # what maxmin, dpp and coverage choose

# Heads and channels of one head, or 1 and the channels of a token: tower keys, hidden states, a 7B model's layer,
# CLIP-L's layer.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "match": ((1, 64), (1, 1024)),
    "energy": ((1, 64), (1, 1024)),
    "query_scores": ((32, 128),),
    "flow_scores": ((16, 64),),
    "gather": ((1, 4096),),
    "merge": ((1, 1024),),
    "maxmin": ((1, 4096),),
    "dpp": ((1, 4096),),
    "coverage": ((1, 4096),),
}
NARROWER = {(op, "cpu"): ((1, 1024),) for op in ("maxmin", "dpp", "coverage")}


def arguments(
    info: KernelInfo, shape: tuple[int, int] | None, batch: int, n: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """What ``info.reference`` takes, random, at a realistic width; without ``shape`` the op's own example."""
    if shape is None:
        example = info.example(info.cases[0], n, dtype, torch.Generator().manual_seed(n))
        return tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, example)
    heads, width = shape
    generator = torch.Generator(device).manual_seed(n)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, n), generator=generator, device=device)

    at = torch.arange(n, device=device)
    match info.name:
        case "match":
            return random(batch, n, width), at[::2].expand(batch, -1), at[1::2].expand(batch, -1), None, None, False
        case "energy":
            return random(batch, n, width), "elu", 0.4, 1.0, 1, None, True
        case "query_scores":
            weight = torch.ones(batch, 1, device=device)
            return (
                random(batch, heads, 1, width),
                random(batch, heads, n, width),
                width**-0.5,
                weight,
                None,
                None,
                None,
                None,
                None,
            )
        case "flow_scores":
            query, value, k, v = (random(batch, heads, *m, width) for m in ((), (), (n,), (n,)))
            return query, value, k, v, width**-0.5, 1.0, None, None
        case "gather":
            index = random(batch, n).argsort(1)[:, : n // 4].sort(1).values
            return index, [random(batch, n, width), random(1, n, 128), random(1, n, 128), at[None]]
        case "merge":
            size = integers(1, 5).float()
            return random(batch, n, width), integers(0, n // 2), n // 2, size, size
        case "maxmin":
            return random(batch, n, width), KEEP, None
        case "dpp":
            return random(batch, n, width), KEEP, random(batch, n).float().abs() + 0.1, None
        case "coverage":
            saliency = random(batch, n).float().abs() + 0.1
            return random(batch, n, width), KEEP, saliency, None, None, None, 0.0, 0.0, "none", None
    raise KeyError(f"SHAPES names {info.name!r}, and nothing here makes its arguments")


# ---------------------------------------------------------------------------------------------------------------
# measuring


def tests_pass(op: str, device: torch.device) -> bool:
    """Whether the op's tests pass in this environment: on CUDA those of the GPU, elsewhere Triton's in its
    interpreter."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}  # the installed package, as here
    env.pop("TRITON_INTERPRET", None)
    if device.type != "cuda":
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_kernels.py", "-q", "-k", op],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
    return done.returncode == 0


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that ``call`` holds at once beyond what was there before, its result included, by the records of
    torch's allocator: also what operators take inside themselves, but not the buffers of MKL."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        result = call()  # noqa: F841  (lives until the profile ends)
    live = peak = 0
    for event in sorted(
        (e for e in seen.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def foreseen_bytes(
    info: KernelInfo, shape: tuple[int, int] | None, batch: int, n: int, device: torch.device, dtype: torch.dtype
) -> float:
    """The peak of ``info.plain`` at n tokens, by ``a n + b n^2`` through two small sizes."""
    small = 128
    one, two = (
        peak_bytes(partial(info.plain, *arguments(info, shape, batch, m, device, dtype)), device)
        for m in (small, 2 * small)
    )
    square = max(0.0, (two - 2 * one) / (2 * small**2))
    return (one / small - square * small) * n + square * n**2


def turns(sides: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds per call of each warmed side, in turns of calls that last at least :data:`BLOCK`."""
    once = {name: min(timing.clock(call, device) for _ in range(2)) for name, call in sides.items()}
    calls = {name: math.ceil(1000 * BLOCK / ms) for name, ms in once.items()}
    most = int(1000 * PATIENCE / sum(once[name] * calls[name] for name in sides))
    return timing.rounds(sides, max(3, min(repeats, most)), device, warmup=0, calls=calls)


def speeds(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a large copy and operations per second of a large matmul, the best of several."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 28, 2048)
    source, a = torch.ones(size, dtype=torch.uint8, device=device), torch.ones(side, side, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copies, products = (
        min(timing.clock(call, device) for _ in range(12)) / 1000
        for call in (lambda: target.copy_(source), lambda: a @ a)
    )
    return {"bytes_per_s": 2 * size / copies, "flops_per_s": 2 * side**3 / products}


def row(
    info: KernelInfo, shape: tuple[int, int] | None, batch: int, n: int, setup: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """One line of the table: milliseconds and bytes; a side that does not fit has ``None``."""
    device, dtype, speed = setup["device"], setup["dtype"], setup["speeds"]
    given = arguments(info, shape, batch, n, device, dtype)
    sides: dict[str, Callable[[], Any]] = {
        "plain": partial(info.plain, *given),
        "reference": partial(info.reference, *given),
    }
    if device.type == "cuda":
        sides["triton"] = partial(run, info.name, None, *given)
    ours = list(sides)[-1]
    names = list(sides)
    if foreseen_bytes(info, shape, batch, n, device, dtype) > setup["limit"]:
        del sides["plain"]
    memory: dict[str, int] = {}
    for name, call in list(sides.items()):
        try:
            call()
            memory[name] = peak_bytes(call, device)
        except torch.OutOfMemoryError:
            del sides[name]
    times = turns(sides, repeats, device)
    moved, flops = info.work(given)
    floor = 1000 * max(moved / speed["bytes_per_s"], flops / speed["flops_per_s"])
    ratio = (
        timing.spread([p / o for p, o in zip(times["plain"], times[ours], strict=True)])
        if "plain" in sides and ours in sides
        else None
    )
    return {
        "op": info.name,
        "heads": shape and shape[0],
        "width": shape and shape[1],
        "batch": batch,
        "tokens": n,
        "ours": ours,
        "ms": {name: timing.spread(times[name]) if name in sides else None for name in names},
        "peak_bytes": {name: memory.get(name) for name in names},
        "bytes": moved,
        "flops": flops,
        "floor_ms": floor,
        "plain_over_ours": ratio,
        "ours_over_floor": statistics.median(times[ours]) / floor if ours in sides else None,
        "rounds": len(next(iter(times.values()), [])),
    }


def growth(info: KernelInfo, setup: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of the reference at :data:`GROWTH` tokens of narrow keys, and the slope of their logarithms over the
    last three sizes."""
    shape = ((16, 64) if SHAPES[info.name][0][0] > 1 else (1, 64)) if info.name in SHAPES else None
    found = []
    for n in GROWTH:
        given = arguments(info, shape, 1, n, setup["device"], setup["dtype"])
        found.append(peak_bytes(partial(info.reference, *given), setup["device"]))
    slope = math.log(found[-1] / found[-3]) / math.log(GROWTH[-1] / GROWTH[-3])
    return {
        "op": info.name,
        "heads": shape and shape[0],
        "width": shape and shape[1],
        "tokens": list(GROWTH),
        "peak_bytes": found,
        "slope": slope,
    }


def measure(
    ops: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    limit: float,
) -> dict[str, Any]:
    """All tables, JSON-safe. ``refused``: the ops whose tests fail, of which nothing is measured."""
    about = environment(torch.nn.Linear(1, 1, device=device, dtype=dtype))
    about["versions"] = {
        **{k: v for k, v in about["versions"].items() if k != "transformers"},
        "triton": version("triton"),
    }
    refused = []
    for op in ops:
        print(f"testing {op}", file=sys.stderr, flush=True)
        if not tests_pass(op, device):
            refused.append(op)
    measured = [KERNELS.get(op) for op in ops if op not in refused]
    speed = speeds(device, dtype)
    setup = {"device": device, "dtype": dtype, "limit": limit, "speeds": speed}
    rows = []
    for info in measured:
        for shape in NARROWER.get((info.name, device.type), SHAPES.get(info.name, (None,))):
            for batch, n in [(b, n) for b in batches for n in sizes]:
                rows.append(row(info, shape, batch, n, setup, repeats))
                print(cells(rows[-1]), file=sys.stderr, flush=True)
    return {
        **about,
        "date": datetime.date.today().isoformat(),
        "timer": "CPU" if timing.timer is time.thread_time else "wall",
        "speeds": speed,
        "limit_bytes": limit,
        "repeats": repeats,
        "refused": refused,
        "rows": rows,
        "growth": [growth(info, setup) for info in measured],
    }


# -------------------------------------------------------------------------------------------------------------------
# table


def megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:.{2 if value < 1e7 else 1 if value < 1e8 else 0}f}"


def form(shape: dict[str, Any]) -> str:
    """Heads and width in words."""
    return (
        "as tested"
        if shape["width"] is None
        else f"{shape['heads']} x {shape['width']}"
        if shape["heads"] > 1
        else str(shape["width"])
    )


def cells(r: dict[str, Any]) -> list[str]:
    times = ["–" if t is None else f"{t['median']:.3g} [{t['p20']:.3g}, {t['p80']:.3g}]" for t in r["ms"].values()]
    ratio, over = r["plain_over_ours"], r["ours_over_floor"]
    ratios = ["–" if ratio is None else f"{ratio['median']:.2f}", "–" if over is None else f"{over:.1f}"]
    return [
        r["op"],
        form(r),
        str(r["batch"]),
        str(r["tokens"]),
        *times,
        f"{r['floor_ms']:.3g}",
        *ratios,
        *map(megabytes, r["peak_bytes"].values()),
    ]


def lines(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    text = ["| " + " | ".join(c) + " |" for c in (heads, *body)]
    return [text[0], "|---" + "|--:" * (len(heads) - 1) + "|", *text[1:]]


def markdown(result: dict[str, Any]) -> str:
    """The table of times and memory, and that of the references' memory by length."""
    about, speed = result["device"], result["speeds"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    sides = ["plain", "reference", *(["triton"] if about["type"] == "cuda" else [])]
    heads = [
        "op",
        "width",
        "batch",
        "tokens",
        *(f"{s} ms" for s in sides),
        "floor ms",
        "plain / ours",
        "ours / floor",
        *(f"{s} MB" for s in sides),
    ]
    missing = [[op, "refused: its tests fail", *["–"] * (len(heads) - 2)] for op in result["refused"]]
    out = [
        f"`{result['command']}`  ",
        f"{about['name']}, {about['threads']} thread{'s' * (about['threads'] > 1)}, {about['dtype']}; {versions}; "
        f"{result['date']}; time: {result['timer']}  ",
        f"Measured for the floor: copy {speed['bytes_per_s'] / 1e9:.1f} GB/s, matmul {speed['flops_per_s'] / 1e9:.0f} "
        "GFLOP/s",
        "",
        f"Time per call: median [20th, 80th percentile] of up to {result['repeats']} rounds; ours: {sides[-1]}; MB "
        "(10^6): peak beyond the inputs, results",
        f"included; –: plain torch would need more than {result['limit_bytes'] / 1e9:.0f} GB, or the side ran out of "
        "memory",
        "",
        *lines(heads, [*map(cells, result["rows"]), *missing]),
        "",
        "## Memory of scoring",
        "",
        "MB that a reference allocates at its peak, by tokens; slope of log MB over log tokens between"
        f" {GROWTH[-3]} and {GROWTH[-1]}: 1 is linear, a full matrix has 2, less than 1 a tile of fixed size that "
        "still outweighs the rest",
        "",
    ]
    body = [[g["op"], form(g), *map(megabytes, g["peak_bytes"]), f"{g['slope']:.2f}"] for g in result["growth"]]
    out += lines(["op", "width", *map(str, GROWTH), "slope"], body)
    return "\n".join(out) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where an op is refused."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description="Time and memory of the kernels, of plain torch and of the machine's floor; refused where tests fail."  # noqa: E501
    )

    def listed(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument(
        "--ops",
        type=lambda text: text.split(","),
        default=list(KERNELS),
        help="comma-separated; default: all registered",
    )
    parser.add_argument("--sizes", type=listed, default=SIZES, help="tokens, comma-separated")
    parser.add_argument("--batch", type=listed, help="images, comma-separated; default: 1, on CUDA 1,8,32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: float32, on CUDA bfloat16")
    parser.add_argument("--repeats", type=int, default=30, help="rounds, of which a slow row does fewer")
    parser.add_argument(
        "--limit", type=float, help="GB that plain torch may take; default: 6, on CUDA nine tenths of what is free"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread and its CPU time: for machines that others use as well"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--save", action="store_true", help="both, into benchmarks/results/kernels-<device>")
    args = parser.parse_args(argv)
    if min(args.sizes) < 8 or args.repeats < 3:
        parser.error("sizes start at 8 tokens and repeats at 3")
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if args.cpu_time:
        try:
            timing.use_cpu_time(device)
        except VtpruneError as e:
            parser.error(str(e))
    dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    limit = 1e9 * args.limit if args.limit is not None else 0.9 * torch.cuda.mem_get_info(device)[0] if cuda else 6e9
    unknown = [op for op in args.ops if op not in KERNELS]
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(KERNELS)}")
    result = measure(args.ops, args.sizes, args.batch or BATCHES[device.type], args.repeats, device, dtype, limit)
    result["command"] = " ".join(["python", "benchmarks/kernels.py", *argv])
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        name = "-".join(result["device"]["name"].lower().split()) if cuda else "cpu"
        args.json, args.table = (
            args.json or RESULTS / f"kernels-{name}.json",
            args.table or RESULTS / f"kernels-{name}.md",
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.table:
        args.table.write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 1 if result["refused"] else 0


if __name__ == "__main__":
    sys.exit(main())
