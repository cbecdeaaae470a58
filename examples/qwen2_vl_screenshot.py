"""Qwen2-VL: a question about a screenshot or a page, whose empty areas never enter the vision tower.

PixelPrune leaves out blocks of pixels that their neighbours predict, so how many tokens stay follows from the picture.
The noise of a JPEG file leaves nothing out; `--tolerance 10` looks past differences of 10 levels.

    python examples/qwen2_vl_screenshot.py --image screenshot.png --question "What is the title?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--tolerance", type=int, default=0, help="levels of 255 that alike pixels differ by at most")
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
options = {"threshold": args.tolerance / 255, "std": tuple(processor.image_processor.image_std)}
with vtprune.attach(model, "pixelprune", **options) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

times = measure(model, inputs, "pixelprune", **options, new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
