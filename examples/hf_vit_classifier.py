"""A Hugging Face image classifier: the best classes for one picture, dense and with patches merged.

ToMe merges the most similar patches behind every block, so that each block is faster than the one before. Nothing is
trained, and the head is the checkpoint's own.

    python examples/hf_vit_classifier.py --image photo.jpg --keep 0.25
"""

import argparse
from time import perf_counter

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vtprune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="google/vit-base-patch16-224", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--recipe", default="tome", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the patches that is left behind the last block")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageClassification.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoImageProcessor.from_pretrained(args.model)
inputs = processor(images=Image.open(args.image).convert("RGB"), return_tensors="pt").to(device, model.dtype)


@torch.no_grad()
def classes():
    best = model(**inputs).logits[0].softmax(-1).topk(min(3, model.config.num_labels))
    return ", ".join(
        f"{model.config.id2label[i]} {p:.0%}" for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)
    )


def seconds(repeats=10):
    classes()
    began = perf_counter()
    for _ in range(repeats):
        classes()  # reads the numbers, so it waits for the device
    return (perf_counter() - began) / repeats


print("classes, dense: ", classes())
dense = seconds()
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("classes, pruned:", classes())
    pruned = seconds()
    report = handle.report()

print(f"patches:         {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"FLOPs:           {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"one picture:     {pruned / dense:.2f} of the dense model's time")
