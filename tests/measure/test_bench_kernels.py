"""The kernel benchmark: its memory meter, its refusal, its tables."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vtprune.kernels import KERNELS

CPU = torch.device("cpu")
HEADS = [
    "op",
    "width",
    "batch",
    "tokens",
    "plain ms",
    "reference ms",
    "floor ms",
    "plain / ours",
    "ours / floor",
    "plain MB",
    "reference MB",
]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module; tests of the ops are said to pass, speeds are made up, memory is measured at three small
    sizes."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "tests_pass", lambda op, device: True)
    monkeypatch.setattr(module, "speeds", lambda device, dtype: {"bytes_per_s": 1e10, "flops_per_s": 1e11})
    monkeypatch.setattr(module, "GROWTH", (32, 64, 128))
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    return module


def chained(x):
    """Two matrices alive at once at the peak, one afterwards."""
    return (x @ x.T).exp()


@pytest.mark.parametrize(
    "call, matrices",
    [
        (lambda x: x @ x.T, 1),
        (chained, 2),
        (lambda x: (x @ x.T).exp_(), 1),
        (lambda x: chained(x).sum(), 2),
        (lambda x: [(x @ x.T).sum() for _ in range(3)], 1),  # freed between turns
        (lambda x: [x @ x.T for _ in range(3)], 3),  # the result counts
        (lambda x: x.T, 0),
    ],
)
def test_the_meter_counts_what_is_alive_at_once(bench, call, matrices):
    x = torch.randn(700, 16)
    assert bench.peak_bytes(lambda: call(x), CPU) == pytest.approx(matrices * 4 * 700 * 700, abs=4096)


def test_the_meter_sees_what_an_operator_takes_inside(bench):
    """argsort gives 8 bytes per element, and sorts the 4 bytes of the values on the way."""
    x = torch.randn(100_000)
    assert bench.peak_bytes(x.argsort, CPU) >= 12 * len(x)


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_memory_of_plain_torch_is_foreseen(bench, name):
    """Within a quarter, from sizes four and eight times smaller; the room for an over-large one is never taken."""
    info, shape = KERNELS.get(name), (2, 32)
    given = bench.arguments(info, shape, 1, 1024, CPU, torch.float32)
    assert bench.foreseen_bytes(info, shape, 1, 1024, CPU, torch.float32) == pytest.approx(
        bench.peak_bytes(lambda: info.plain(*given), CPU), rel=0.25
    )


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_arguments_are_what_the_op_takes(bench, name):
    """In the bench's shape, and the op's own example where the bench has none: reference and plain torch agree on
    both."""
    info = KERNELS.get(name)
    for shape in (bench.SHAPES[name][0], None):
        given = bench.arguments(info, shape, 2, 72, CPU, torch.float32)
        info.close(given, info.plain(*given), info.reference(*given))


def test_a_tiny_run_gives_every_column(bench, tmp_path, capsys):
    code = bench.main(
        [
            "--device",
            "cpu",
            "--sizes",
            "72",
            "--repeats",
            "3",
            "--json",
            str(tmp_path / "o.json"),
            "--table",
            str(tmp_path / "o.md"),
        ]
    )
    result, text = json.loads((tmp_path / "o.json").read_text()), (tmp_path / "o.md").read_text()
    assert code == 0 and text in capsys.readouterr().out
    assert {r["op"] for r in result["rows"]} == {g["op"] for g in result["growth"]} == set(KERNELS) and result[
        "refused"
    ] == []
    table = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert table[0] == HEADS and len(table[2 : 2 + len(result["rows"])]) == sum(map(len, bench.SHAPES.values()))
    for cells in table[2 : 2 + len(result["rows"])]:
        assert len(cells) == len(HEADS) and "–" not in cells
    for r in result["rows"]:
        assert (
            all(0 < t["p20"] <= t["median"] <= t["p80"] for t in r["ms"].values())
            and r["floor_ms"] > 0
            and min(r["peak_bytes"].values()) > 0
        )
        assert r["floor_ms"] == pytest.approx(1000 * max(r["bytes"] / 1e10, r["flops"] / 1e11))
    assert (
        str(tmp_path) in result["command"]
        and set(result["versions"]) >= {"torch", "triton"}
        and result["device"]["threads"]
        and result["date"]
    )


def test_plain_torch_beyond_the_limit_is_a_dash(bench, capsys):
    assert bench.main(["--device", "cpu", "--ops", "energy", "--sizes", "72", "--repeats", "3", "--limit", "0"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| energy"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert [h for h, c in zip(HEADS, cells, strict=True) if c == "–"] == ["plain ms", "plain / ours", "plain MB"]


def test_no_number_for_an_op_whose_tests_fail(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "tests_pass", lambda op, device: op != "energy")
    assert bench.main(["--device", "cpu", "--ops", "energy,merge", "--sizes", "72", "--repeats", "3"]) == 1
    out = capsys.readouterr().out.splitlines()
    energy = [line for line in out if line.startswith("| energy")]
    assert len(energy) == 1 and "refused" in energy[0] and not any(c.isdigit() for c in energy[0])
    assert sum(line.startswith("| merge") for line in out) == 2


@pytest.mark.ci
def test_the_ops_own_tests_decide(bench, monkeypatch):
    """pytest in a process of its own: any exit code but 0 refuses, also that of no test at all."""
    spec = importlib.util.spec_from_file_location("bench_again", bench.__file__)
    assert spec is not None and spec.loader is not None
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    assert not stock.tests_pass("no_such_op", CPU)
    seen = []

    def process(command, **options):
        seen.append((command, options))
        return SimpleNamespace(returncode=len(seen) - 1, stdout="", stderr="")

    monkeypatch.setattr(stock.subprocess, "run", process)
    assert stock.tests_pass("match", CPU) and not stock.tests_pass("match", CPU)
    command, options = seen[0]
    assert (
        command[0] == sys.executable and command[-2:] == ["-k", "match"] and options["env"]["TRITON_INTERPRET"] == "1"
    )
    stock.tests_pass("match", torch.device("cuda"))
    assert "TRITON_INTERPRET" not in seen[-1][1]["env"]


@pytest.mark.parametrize("words", [["--ops", "macth"], ["--sizes", "2"], ["--repeats", "1"], ["--no-tests"]])
def test_bad_words_are_refused(bench, words):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--device", "cpu", *words])
    assert caught.value.code == 2
