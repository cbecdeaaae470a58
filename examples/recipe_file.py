"""A recipe from a file: two methods at different places, one behind the other.

examples/two_stages.yaml keeps half of the tokens in front of the language model and drops most of these inside it. The
same file works for every command: `vtprune verify --recipe examples/two_stages.yaml`.

    python examples/recipe_file.py --image photo.jpg --recipe examples/two_stages.yaml
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default=str(Path(__file__).with_name("two_stages.yaml")), help="a YAML or JSON file")
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
with vtprune.attach(model, args.recipe) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

for stage in report.stages:
    print(f"{stage.site}: {stage.method} {stage.tokens_in[0]} -> {stage.tokens_out[0]} visual tokens")
times = measure(model, inputs, args.recipe, new_tokens=1, repeats=3)
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
