"""LLaVA-OneVision: a question about one image (in tiles) or about several (one view each).

The processor decides between the two, and the number of visual tokens with it. A budget given as a share fits both;
DivPrune keeps what is most diverse in each image, in front of the language model.

    python examples/llava_onevision_images.py --image one.jpg --image two.jpg --question "What has changed?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="llava-hf/llava-onevision-qwen2-7b-ov-hf", help="hub id or folder")
parser.add_argument("--image", required=True, action="append", help="repeatable")
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="divprune", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

content = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in args.image]
chat = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
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
print("rasters:       ", ", ".join(f"{rows} x {columns}" for rows, columns in report.grids[0]))
