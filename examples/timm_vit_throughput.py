"""A timm vision transformer: pictures per second at several budgets.

One attachment per budget, the same batch, and how many classes stay those of the dense model. On a CPU or a small batch
the gain is less than the FLOPs say.

    python examples/timm_vit_throughput.py --image photo.jpg --batch 64 --budgets 0.75 0.5 0.25
"""

import argparse
from time import perf_counter

import timm
import torch
from PIL import Image

import vtprune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="hf-hub:timm/deit_small_patch16_224.fb_in1k", help="or local-dir:FOLDER")
parser.add_argument("--image", required=True, action="append", help="repeatable; repeated until the batch is full")
parser.add_argument("--recipe", default="tome", help="see `vtprune recipes`")
parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the patches")
parser.add_argument("--batch", type=int, default=32)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = timm.create_model(args.model, pretrained=True).to(device).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pictures = [transform(Image.open(path).convert("RGB")) for path in args.image]
batch = torch.stack([pictures[i % len(pictures)] for i in range(args.batch)]).to(device)


@torch.no_grad()
def run(repeats=5):
    """The classes, and pictures per second."""
    best = model(batch).argmax(-1).tolist()
    began = perf_counter()
    for _ in range(repeats):
        model(batch).argmax(-1).tolist()  # a list waits for the device
    return best, repeats * len(batch) / (perf_counter() - began)


dense, rate = run()
print(f"dense:     {rate:8.1f} pictures/s")
for budget in args.budgets:
    with vtprune.attach(model, args.recipe, keep=budget) as handle:
        classes, fast = run()
        report = handle.report()
    same = sum(a == b for a, b in zip(classes, dense, strict=True))
    print(
        f"keep {budget:4.0%}: {fast:8.1f} pictures/s ({fast / rate:.2f} x), {report.flops / report.dense_flops:.0%} of "
        f"the FLOPs, {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]} patches, {same} of {len(dense)} "
        "classes as before"
    )
