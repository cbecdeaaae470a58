"""A question about a video, whose frames are compared with one another.

EVS drops what looks as in the frame before; the budget counts for the whole video, so a still scene costs little and
movement keeps its tokens. Other methods for videos: vidcom2, dycoke, fastvid, holitom, framefusion, prunevid.

    python examples/video.py --video clip.mp4 --frames 16 --question "What happens?"
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.inputs.chats import generate, prepare_chats, text_part, video_parts
from vtprune.inputs.videos import read
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--video", required=True, help="a video file (with `pip install av`) or an animated GIF or WebP")
parser.add_argument("--frames", type=int, default=16, help="at most so many, evenly spaced")
parser.add_argument("--question", default="What happens in this video?")
parser.add_argument("--recipe", default="evs", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

# a model that takes no videos is shown the frames as images by the same line
content = [*video_parts(processor, read(args.video, args.frames)), text_part(args.question)]
inputs = prepare_chats(processor, [[{"role": "user", "content": content}]]).to(device, model.dtype)

print("answer, dense: ", generate(model, processor, inputs, 64)[0])
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("answer, pruned:", generate(model, processor, inputs, 64)[0])
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
first, stayed = 0, []
for rows, columns in report.grids[0]:  # of a frame or two; LLaVA-OneVision's end with a token of its own
    stayed.append(sum(first <= token < first + rows * columns for token in report.stages[-1].kept[0].tolist()))
    first += rows * columns
print("by frame:      ", *stayed)
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
