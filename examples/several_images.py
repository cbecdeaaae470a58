"""One question about several images: a budget for each of them, or one for all.

With `--per image` every picture keeps its share; with `--per sample` all of them compete for one budget, and a picture
that says more may keep more.

    python examples/several_images.py --image one.jpg --image two.jpg --question "What has changed?" --per sample
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True, action="append", help="repeatable, in order")
parser.add_argument("--question", default="What is the difference between the pictures?")
parser.add_argument("--recipe", default="divprune", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
parser.add_argument("--per", choices=("image", "sample"), default="image", help="what the budget is for")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

content = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in args.image]
content.append({"type": "text", "text": args.question})
chat = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(device, model.dtype)


def answer():
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("answer, dense: ", answer())
with vtprune.attach(model, args.recipe, keep=args.keep, per=args.per) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, per=args.per, new_tokens=1, repeats=3)
first = 0  # tokens are numbered through all images
for path, (rows, columns) in zip(args.image, report.grids[0], strict=True):
    stayed = sum(first <= token < first + rows * columns for token in report.stages[-1].kept[0].tolist())
    print(f"{path}: {rows * columns} -> {stayed} visual tokens")
    first += rows * columns
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
