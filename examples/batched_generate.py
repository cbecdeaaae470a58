r"""Many questions in one padded batch, each with a budget and a report of its own.

Prompts of unequal length are padded on the left, as generate() wants it; padding changes no choice of tokens. A file
of questions has a picture and a question on each line.

    printf 'photo.jpg\tWhat is this?\nother.jpg\tWhich colour is it?\n' > questions.tsv
    python examples/batched_generate.py --questions questions.tsv --batch 8
"""

import argparse
import csv
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--questions", type=Path, required=True, help="lines of FILE<tab>QUESTION, files beside this one")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--recipe", default="divprune", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)
with args.questions.open(encoding="utf-8", newline="") as file:
    asked = [(args.questions.parent / path, question) for path, question in csv.reader(file, delimiter="\t")]


def prepare(rows):
    images = [[Image.open(path).convert("RGB")] for path, _ in rows]
    contents = [[{"type": "image"}, {"type": "text", "text": question}] for _, question in rows]
    chats = [[{"role": "user", "content": content}] for content in contents]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return inputs.to(device, model.dtype)


with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    for start in range(0, len(asked), args.batch):
        rows = asked[start : start + args.batch]
        inputs = prepare(rows)
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        report = handle.report()
        answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, ((path, question), answer) in enumerate(zip(rows, answers, strict=True)):
            tokens = f"{report.visual_tokens[i]} -> {report.stages[-1].tokens_out[i]} tokens"
            print(f"{path.name} | {question} | {answer.strip()} | {tokens}")
times = measure(model, prepare(asked[: args.batch]), args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"prefill FLOPs: {report.flops / report.dense_flops:.0%} of the dense model's in the last batch")
print(f"first token:   after {times['ratio']['ttft']['median']:.2f} of the dense model's time in the first")
