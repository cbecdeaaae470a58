"""A budget in effective tokens or in FLOPs: the solver finds the schedule, and a file keeps it.

Methods spend a final number of tokens very differently, depending on where they cut. Effective tokens, the mean over
the language model's layers, make them comparable: here each method gets the schedule that meets the same mean.

    python examples/budget.py --image photo.jpg --effective-tokens 0.25 --recipes pyramiddrop divprune fastv
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipes", nargs="+", default=["pyramiddrop", "divprune", "fastv"], help="see `vtprune recipes`")
budget = parser.add_mutually_exclusive_group()
budget.add_argument("--effective-tokens", type=float, default=0.25, help="share of the dense model's (default 0.25)")
budget.add_argument("--flops", type=float, help="share of the dense prefill's instead")
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


target = {"effective_tokens": args.effective_tokens} if args.flops is None else {"flops": args.flops}
print("dense:", answer())
for name in args.recipes:
    recipe = vtprune.solve(model, name, **target, inputs=inputs)
    recipe.save(f"{name}-solved.yaml")  # for attach(), for `vtprune run --recipe FILE`
    with vtprune.attach(model, recipe) as handle:
        print(f"{name}: {answer()}")
        report = handle.report()
    ratio = measure(model, inputs, recipe, new_tokens=1, repeats=3)["ratio"]["ttft"]["median"]
    tokens = f"{report.effective_tokens:.1f} of {report.visual_tokens[0]} effective tokens"
    print(
        f"  {tokens}, {report.flops / report.dense_flops:.0%} of the FLOPs, first token after {ratio:.2f} of the time"
    )
