"""SmolVLM: a question about a large image, pruned, and beside it the model's own way to spend fewer tokens.

The processor (it needs `pip install num2words`) splits a picture into tiles; without splitting the model reads the
overview alone. Pruning takes tokens from everywhere instead and leaves details in.

    python examples/smolvlm_image.py --image photo.jpg --question "What is in this picture?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolVLM2-2.2B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="divprune", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

image = Image.open(args.image).convert("RGB")
question = {"type": "text", "text": args.question}
chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]


def prepare(split):
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    more = {"images_kwargs": {"do_image_splitting": split}}
    return processor.apply_chat_template(chat, **how, processor_kwargs=more).to(device, model.dtype)


def answer(inputs):
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


inputs = prepare(split=True)
print("answer, dense: ", answer(inputs))
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("answer, pruned:", answer(inputs))
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")

print("answer, dense, without splitting:", answer(prepare(split=False)))
