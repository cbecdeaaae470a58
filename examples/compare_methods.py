"""Methods compared on questions of your own, at equal effective tokens.

Each line of the file is `{"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}`; an answer is right if it
is the same but for spaces and case, so ask for one word. Runs lie in a folder and are not done again.

    python examples/compare_methods.py --questions questions.jsonl --methods divprune visionzip --budgets 0.25 0.1
    vtprune report out/compare                                    # the same as a page with figures
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune.measure import bench
from vtprune.measure.samples import Sample

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--questions", type=Path, required=True, help="a JSON object a line, pictures beside the file")
parser.add_argument("--methods", nargs="+", default=["divprune", "pyramiddrop", "random", "uniform"])
parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25], help="shares of the effective tokens")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--results", type=Path, default=Path("out/compare"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)
lines = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
samples = [
    Sample(args.questions.parent / row["image"], row["question"], row["answer"], row.get("ability", "own"))
    for row in lines
]

(args.results / "runs").mkdir(parents=True, exist_ok=True)
how = {"seeds": 3, "batch": args.batch, "timing": 3, "folder": args.results / "runs"}
table = bench.table(model, processor, samples, args.methods, args.budgets, **how)
(args.results / "bench.json").write_text(json.dumps(table), encoding="utf-8")
print(f"{'method':16} {'budget':>6} {'right':>6} {'95 % interval':>14} {'tokens':>7} {'FLOPs':>6} {'prefill':>8}")
for row in table["rows"]:
    if "error" in row:
        print(f"{row['method']:16} {row['budget']:6.0%} {row['error']}")
        continue
    low, high = row["average_interval"]
    costs = f"{row['effective_tokens']:7.1f} {row['flops_share']:6.0%} {row.get('prefill_ratio', 1.0):8.2f}"
    print(f"{row['method']:16} {row['budget']:6.0%} {row['average']:6.0%} {low:7.0%} {high:6.0%} {costs}")
