"""Train the small part that a method needs, beside a frozen model, on questions of your own; then prune with it.

CoViPAL's module reads visual tokens and question and scores the tokens. Each line of the data is `{"image": "cat.jpg",
"question": "What is it?", "answer": "a cat"}`. It is the command `vtprune train covipal` (`pip install
"vtprune[train]"`), with the untrained module and other methods compared at the end.

    python examples/train_module.py --data train.jsonl --image photo.jpg --steps 600
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.cli.main import main
from vtprune.inputs.chats import generate, prepare
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--data", required=True, help="questions to train on, pictures beside the file")
parser.add_argument("--image", required=True, help="a picture to ask about afterwards")
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
parser.add_argument("--steps", default="600")
parser.add_argument("--batch", default="8")
parser.add_argument("--out", type=Path, default=Path("module.safetensors"))
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
how = ["--device", device, "--dtype", "bfloat16" if device == "cuda" else "float32"]
where = ["--model", args.model, "--data", args.data, "--eval-data", args.data, "--out", str(args.out)]
code = main(["train", "covipal", *where, *how, "--keep", str(args.keep), "--steps", args.steps, "--batch", args.batch])
if code != 0:
    raise SystemExit(code)

model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)
inputs = prepare(processor, [Image.open(args.image).convert("RGB")], [args.question]).to(device, model.dtype)

print("answer, dense: ", generate(model, processor, inputs, 64)[0])
with vtprune.attach(model, "covipal", keep=args.keep, weights=str(args.out)) as handle:
    print("answer, pruned:", generate(model, processor, inputs, 64)[0])
    report = handle.report()

times = measure(model, inputs, "covipal", keep=args.keep, weights=str(args.out), new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's, the module's own included")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
