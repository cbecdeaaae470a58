"""Qwen3-VL: a question about one image, with visual tokens dropped in stages inside the language model.

DeepStack adds further features of the tower to the visual tokens in the first layers; those of a dropped token go with
it. The models with experts run by the same line: --model Qwen/Qwen3-VL-30B-A3B-Instruct

    python examples/qwen3_vl_image.py --image photo.jpg --question "What is in this picture?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen3-VL-4B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="pyramiddrop", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
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
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
print("tokens by layer:", *report.layer_tokens[0])
