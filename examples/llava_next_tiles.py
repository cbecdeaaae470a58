"""LLaVA-NeXT: a question about a large image, which is cut into tiles beside an overview.

One picture is up to 2,880 visual tokens. HiRED shares the budget among overview and tiles by how much the tower looks
at each of them; `--per tile` gives each its own share instead.

    python examples/llava_next_tiles.py --image photo.jpg --question "What is in this picture?" --per tile
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="llava-hf/llava-v1.6-mistral-7b-hf", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="hired", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.2, help="share of the visual tokens that stays")
parser.add_argument("--per", choices=("image", "tile"), default="image", help="what a budget is for")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

image = Image.open(args.image).convert("RGB")
question = {"type": "text", "text": args.question}
chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
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
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")

first = 0
for number, (rows, columns) in enumerate(report.grids[0]):
    inside = [i for i in report.stages[-1].kept[0].tolist() if first <= i < first + rows * columns]
    print(f"{'tiles' if number else 'overview'}: {len(inside)} of {rows} x {columns} tokens stayed")
    first += rows * columns
