"""Methods that save something else than tokens (AdaSkip, SwiftKV, MuE) on the bundled VLM, untrained.

``python benchmarks/layers.py [--scenes 20] [--settings NAME:VALUE,...] [--save FILE]``

``adaskip:4`` leaves out four sub-layers, fitted on training scenes (``vtprune fit adaskip``); ``swiftkv:9`` takes keys
and values from layer 9 on from that layer's input; ``mue:0.9`` lets images exit at a cosine of 0.9. Every question
about ``--scenes`` test scenes is answered greedily. Right answers with 95 % intervals, pictures drawn as a whole, and
the paired difference to the dense model; FLOPs of the prefill and bytes of the cache over the dense model's, and the
time of a prefill in one thread's CPU time over dense, in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from vtprune.inputs import demo_model
from vtprune.measure import timing
from vtprune.measure.environment import environment, in_words
from vtprune.measure.fit import left_out
from vtprune.measure.run import evaluate
from vtprune.measure.samples import scenes_samples
from vtprune.measure.statistics import bootstrap

SETTINGS = "adaskip:2,adaskip:4,adaskip:8,swiftkv:9,swiftkv:6,mue:0.99,mue:0.9,mue:0.8"


def options(model: Any, processor: Any, setting: str) -> tuple[Any, dict[str, Any]]:
    """The recipe of a setting, and what it is attached with."""
    name, _, value = setting.partition(":")
    if name == "adaskip":
        return left_out(model, processor, scenes_samples(16, "train"), sublayers=int(value)).recipe, {}
    return name, {"layer": int(value)} if name == "swiftkv" else {"threshold": float(value)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20, help="about 11 questions each (default %(default)s)")
    parser.add_argument("--settings", default=SETTINGS, help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the prefill's time (default %(default)s)")
    parser.add_argument("--save", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    timing.use_cpu_time(torch.device("cpu"))
    model, processor = demo_model.load()
    samples = scenes_samples(args.scenes)
    rows: list[dict[str, Any]] = []
    for setting in ("dense", *args.settings.split(",")):
        recipe, given = (None, {}) if setting == "dense" else options(model, processor, setting)
        found = evaluate(model, processor, samples, recipe, timing=0 if recipe is None else args.rounds, **given)
        told = ("correct", "answers", "flops", "dense_flops", "kv_bytes", "dense_kv_bytes", "prefill_ratio")
        rows.append({"setting": setting, **{k: found[k] for k in told if k in found}})
        print(setting, sum(found["correct"]) / len(samples), file=sys.stderr, flush=True)
    asked = [{"source": s.source, "question": s.question, "answer": s.answer, "ability": s.ability} for s in samples]
    command = " ".join(["benchmarks/layers.py", *(Path(a).name for a in sys.argv[1:])])
    result = {"command": command, "environment": environment(model), "questions": asked, "rows": rows}
    if args.save:
        args.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    groups, dense = [q["source"] for q in result["questions"]], result["rows"][0]
    lines = [
        f"`{result['command']}`: {in_words(result['environment'])}",
        "",
        f"{len(groups)} questions about {len(set(groups))} scenes.",
        "",
        "| | right, % | minus dense | prefill FLOPs | cache | prefill time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    base = [float(c) for c in dense["correct"]]
    for row in result["rows"]:
        good = [float(c) for c in row["correct"]]
        low, high = (100 * x for x in bootstrap(good, [0.0] * len(good), groups=groups))
        right = f"{100 * sum(good) / len(good):.1f} [{low:.1f}, {high:.1f}]"
        if row is dense:
            lines.append(f"| dense | {right} | | 1 | 1 | 1 |")
            continue
        low, high = (100 * x for x in bootstrap(good, base, groups=groups))
        change = f"{100 * (sum(good) - sum(base)) / len(good):+.1f} [{low:+.1f}, {high:+.1f}]"
        shares = [f"{row[k] / row['dense_' + k]:.3f}" for k in ("flops", "kv_bytes")]
        lines.append(f"| {row['setting']} | {right} | {change} | {' | '.join(shares)} | {row['prefill_ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
