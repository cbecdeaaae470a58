"""Does the bundled VLM need its visual tokens? Dense, without any, random ones, and an oracle that keeps the tokens
around the objects asked about.

python -m vtprune.train.sensitivity --out models/demo_vlm/sensitivity.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..check.attach import attach
from ..core.select import from_mask
from ..inputs import models
from ..inputs.chats import generate, prepare
from ..measure.environment import environment
from ..measure.run import evaluate
from ..measure.samples import Sample, easy_vqa_samples, matches, scenes_samples
from ..measure.statistics import means
from ..methods._sites import cells


def majority(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of each ability's most frequent answer."""
    answers: dict[str, Counter[str]] = {}
    for s in samples:
        answers.setdefault(s.ability, Counter())[s.answer] += 1
    return {a: c.most_common(1)[0][1] / c.total() for a, c in answers.items()}


def oracle_tokens(sample: Sample, grid: tuple[int, int], size: int, keep: int) -> Tensor:
    """The ``keep`` tokens nearest to the sample's boxes (distance from a patch's centre to the box, pixels), bool
    ``[N]``; without boxes an even grid."""
    rows, columns = grid
    if not sample.boxes:
        return cells(rows, columns, keep)[0]
    y = (torch.arange(rows) + 0.5) * size / rows
    x = (torch.arange(columns) + 0.5) * size / columns
    best = torch.full((rows, columns), torch.inf)
    for left, top, right, bottom in sample.boxes:
        dx = torch.maximum(torch.maximum(left - x, x - right), torch.zeros(()))[None]
        dy = torch.maximum(torch.maximum(top - y, y - bottom), torch.zeros(()))[:, None]
        centre = ((x - (left + right) / 2)[None] ** 2 + (y - (top + bottom) / 2)[:, None] ** 2).sqrt()
        best = torch.minimum(best, (dx**2 + dy**2).sqrt() + 1e-3 * centre)
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[best.flatten().argsort()[:keep]] = True
    return mask


def oracle(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    keep: int,
    batch: int,
    progress: Callable[[int], object] | None = None,
) -> list[bool]:
    """Right or wrong per sample when only the oracle's tokens enter the language model: a stage behind the projector,
    decided by the oracle."""
    out: list[bool] = []
    config = model.config.vision_config
    for lo in range(0, len(samples), batch):
        part = samples[lo : lo + batch]
        with attach(model, "random", keep=keep) as handle:
            masks = torch.stack([oracle_tokens(s, handle.geometry.grid, config.image_size, keep) for s in part])
            engine = handle.adapter.decoder
            engine.entry = [
                replace(cut, select=lambda view, masks=masks: from_mask(masks.to(view.valid.device) & view.valid))
                for cut in engine.entry
            ]
            answers = generate(
                model, processor, prepare(processor, [s.picture() for s in part], [s.question for s in part])
            )
        out += [matches(a, s.answer) for a, s in zip(answers, part, strict=True)]
        if progress is not None:
            progress(len(part))
    return out


def per_ability(correct: Sequence[float], samples: Sequence[Sample]) -> dict[str, float]:
    return means([float(c) for c in correct], (s.ability for s in samples))


def measure(model: Any, processor: Any, scenes: int, easy: int, batch: int = 32, seeds: int = 3) -> dict[str, Any]:
    """All rows, accuracy per ability (easy-VQA: dense only). 25 % of the visual tokens stay for random and oracle."""
    samples = scenes_samples(scenes)
    keep = model.config.image_seq_length // 4
    rows: dict[str, dict[str, float]] = {"majority answer": majority(samples)}
    rows["dense"] = per_ability(evaluate(model, processor, samples, None, batch=batch)["correct"], samples)
    rows["no visual tokens"] = per_ability(
        evaluate(model, processor, samples, "drop-all", batch=batch, layer=0)["correct"], samples
    )
    draws = [
        evaluate(model, processor, samples, "random", batch=batch, seed=s, keep=keep)["correct"] for s in range(seeds)
    ]
    rows["random 25 %"] = per_ability([sum(d) / seeds for d in zip(*draws, strict=True)], samples)
    rows["oracle 25 %"] = per_ability(oracle(model, processor, samples, keep, batch), samples)
    questions = easy_vqa_samples(easy)
    easy_rows = per_ability(evaluate(model, processor, questions, None, batch=batch)["correct"], questions)
    return {
        "scenes": rows,
        "easy_vqa": easy_rows,
        "samples": {"scenes": len(samples), "easy_vqa": len(questions)},
        **environment(model),
    }


def markdown(result: dict[str, Any]) -> str:
    rows = result["scenes"]
    abilities = list(rows["majority answer"])
    lines = ["| | " + " | ".join(abilities) + " | average |", "|---|" + "--:|" * (len(abilities) + 1)]
    for name, row in rows.items():
        values = [row[a] for a in abilities]
        lines.append(f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in (*values, sum(values) / len(values))) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--easy", type=int, default=1500)
    parser.add_argument("--model", help="a folder (default: the bundled model)")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    model, processor = models.load(a.model, "cpu", "float32")
    result = measure(model, processor, a.scenes, a.easy)
    print(markdown(result))
    print(json.dumps(result["easy_vqa"]))
    if a.out is not None:
        a.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
