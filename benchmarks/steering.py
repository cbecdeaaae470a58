"""Does steering (VISTA, ``vtprune.steer``) help the bundled VLM, dense or pruned?

``python benchmarks/steering.py [--method pyramiddrop] [--effective 0.25] [--scenes 20] [--settings L:A,...]
[--dense L:A,...] [--save FILE]``

Every question about ``--scenes`` test scenes is answered by the pruned and by the dense model, unsteered and for each
of its settings ``lambda:alpha``, greedily. Right answers with 95 % intervals, images drawn as a whole; the difference
to the unsteered model of the same budget is paired, question by question. Beside it: what the first batch's first token
costs, in one thread's CPU time, over the unsteered model's.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

import vtprune
from vtprune.inputs import chats, demo_model
from vtprune.measure import timing
from vtprune.measure.environment import environment, in_words
from vtprune.measure.samples import matches, scenes_samples
from vtprune.measure.statistics import bootstrap

SETTINGS = "0.01:0,0.1:0,0.1:0.3"
PLAIN = "unsteered"


@torch.no_grad()
def answers(model: Any, processor: Any, samples: list[Any], batch: int) -> tuple[list[str], list[float]]:
    """What is said to each question, and seconds up to the first token of the first batch."""
    said, seconds = [], []
    for begin in range(0, len(samples), batch):
        some = samples[begin : begin + batch]
        inputs = chats.prepare(processor, [s.picture() for s in some], [s.question for s in some])
        if not seconds:
            start = timing.timer()
            model(**inputs, use_cache=True, logits_to_keep=1)
            seconds.append(timing.timer() - start)
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    return said, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="pyramiddrop", help="(default %(default)s)")
    parser.add_argument("--effective", type=float, default=0.25, help="effective tokens (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=20, help="about 11 questions each (default %(default)s)")
    parser.add_argument("--settings", default=SETTINGS, help="lambda:alpha, ... (default %(default)s)")
    parser.add_argument("--dense", default="0.1:0.3", help="the same of the dense model (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    parser.add_argument("--save", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    timing.use_cpu_time(torch.device("cpu"))
    model, processor = demo_model.load()
    samples = scenes_samples(args.scenes)
    rows: list[dict[str, Any]] = []
    for budget, settings in ((f"{args.effective:.0%}", args.settings), ("dense", args.dense)):
        for setting in (PLAIN, *settings.split(",")):
            with ExitStack() as stack:
                if budget != "dense":
                    stack.enter_context(vtprune.attach(model, args.method, effective_tokens=args.effective))
                if setting != PLAIN:
                    lam, alpha = map(float, setting.split(":"))
                    stack.enter_context(vtprune.steer(model, lam=lam, alpha=alpha))
                said, seconds = answers(model, processor, samples, args.batch)
            good = [matches(text, s.answer) for text, s in zip(said, samples, strict=True)]
            print(f"{budget} {setting}: {100 * sum(good) / len(good):.1f}", file=sys.stderr, flush=True)
            rows.append({"budget": budget, "setting": setting, "good": good, "answers": said, "seconds": seconds})
    told = {"command": " ".join(["benchmarks/steering.py", *(Path(a).name for a in sys.argv[1:])])}
    asked = [{"source": s.source, "question": s.question, "answer": s.answer, "ability": s.ability} for s in samples]
    facts = {"method": args.method, "environment": environment(model), "questions": asked, "rows": rows}
    if args.save:
        args.save.with_suffix(".json").write_text(json.dumps({**told, **facts}, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table({**told, **facts}), encoding="utf-8")
    print(table({**told, **facts}))
    return 0


def table(result: dict[str, Any]) -> str:
    groups = [q["source"] for q in result["questions"]]
    lines = [
        f"`{result['command']}`: {in_words(result['environment'])}",
        "",
        f"{len(groups)} questions about {len(set(groups))} scenes; pruned: `{result['method']}`.",
        "",
        "| effective tokens | lambda | alpha | right, % | minus unsteered | gained | lost | first token, time |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        plain = next(r for r in result["rows"] if r["budget"] == row["budget"] and r["setting"] == PLAIN)
        good, base = ([float(g) for g in r["good"]] for r in (row, plain))
        low, high = (100 * x for x in bootstrap(good, [0.0] * len(good), groups=groups))
        right = f"{100 * sum(good) / len(good):.1f} [{low:.1f}, {high:.1f}]"
        if row is plain:
            lines.append(f"| {row['budget']} | – | – | {right} | | | | |")
            continue
        (lam, alpha), (low, high) = row["setting"].split(":"), bootstrap(good, base, groups=groups)
        change = 100 * (sum(good) - sum(base)) / len(good)
        gained, lost = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((good, base), (base, good)))
        time = median(a / b for a, b in zip(row["seconds"], plain["seconds"], strict=True))
        lines.append(
            f"| {row['budget']} | {lam} | {alpha} | {right} | {change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | "
            f"{gained} | {lost} | {time:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
