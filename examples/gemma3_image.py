"""Gemma 3: a question about a wide image, with pan and scan.

Pan and scan adds crops of a picture that is far from square, 256 visual tokens each. To the model these are images of
their own, and so they are to the budget, `keep` of each. Sliding windows and two-way attention among an image's tokens
stay as they were.

    python examples/gemma3_image.py --image photo.jpg --question "What is in this picture?" --no-pan-and-scan
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google/gemma-3-4b-it", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="divprune", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
parser.add_argument("--pan-and-scan", action=argparse.BooleanOptionalAction, default=True)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

image = Image.open(args.image).convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": args.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"images_kwargs": {"do_pan_and_scan": args.pan_and_scan}},
).to(device, model.dtype)


def answer():
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("answer, dense: ", answer())
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
print(f"images:         {len(report.grids[0])}, crops included")
