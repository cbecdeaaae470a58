"""open_clip: zero-shot classification with a pruned image tower, and how far its embedding moved.

Only the tower of images is pruned; text embeddings stay. The same cosine tells whether an index of stored embeddings
can go on being used.

    python examples/open_clip_zero_shot.py --image photo.jpg --label "a cat" --label "a dog"
"""

import argparse
from time import perf_counter

import open_clip
import torch
from PIL import Image

import vtprune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", help="or local-dir:FOLDER")
parser.add_argument("--image", required=True)
parser.add_argument("--label", action="append", required=True, help="repeatable: what the picture may show")
parser.add_argument("--recipe", default="tome", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.5, help="share of the patches that is left behind the last block")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model, _, transform = open_clip.create_model_and_transforms(args.model, device=device)
model.eval()
image = transform(Image.open(args.image).convert("RGB"))[None].to(device)
with torch.no_grad():
    text = model.encode_text(open_clip.get_tokenizer(args.model)(args.label).to(device), normalize=True)


@torch.no_grad()
def embed(repeats=10):
    """The image's embedding, and the seconds it took."""
    out = model.encode_image(image, normalize=True)
    began = perf_counter()
    for _ in range(repeats):
        model.encode_image(image, normalize=True).sum().item()  # a number waits for the device
    return out, (perf_counter() - began) / repeats


def told(embedding):
    shares = (100 * embedding @ text.T).softmax(-1)[0].tolist()
    return ", ".join(f"{label} {share:.0%}" for label, share in zip(args.label, shares, strict=True))


dense, slow = embed()
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    pruned, fast = embed()
    report = handle.report()

print("labels, dense: ", told(dense))
print("labels, pruned:", told(pruned))
print(f"embedding:      cosine {(dense * pruned).sum():.3f} to the dense one")
print(f"patches:        {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
print(f"FLOPs:          {report.flops / report.dense_flops:.0%} of the dense tower's")
print(f"one picture:    {fast / slow:.2f} of the dense tower's time")
