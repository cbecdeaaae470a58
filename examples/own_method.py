"""A method of your own in one file: it keeps the tokens that differ most from the mean of their picture.

Importing this file registers the method; from then on its name works everywhere. Run as a program it answers a question
and checks the method against the library's correctness contract on your model.

    python examples/own_method.py --image photo.jpg
"""

import argparse
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.core.select import top
from vtprune.inputs.chats import generate, prepare
from vtprune.methods.base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="off-mean",
        paper="an example, of no paper",
        idea="keeps tokens that differ most from the mean token",
        kinds=("projector",),
        cases=({"keep": 0.75}, {"keep": 2}),
        score="distance to the mean token",
    )
)
@dataclass(frozen=True, kw_only=True)
class OffMean(Method):
    def plan(self, geometry, keep):
        return (Cut(site="projector", keep=keep),)

    def select(self, view, cut):
        real = view.valid[..., None]  # [B, N, 1]; features are [B, N, C]
        mean = (view.features * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return top((view.features - mean).norm(dim=2), cut.keep, view.valid, view.protected)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", default="What is in this picture?")
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    inputs = prepare(processor, [Image.open(args.image).convert("RGB")], [args.question])
    print("answer, dense: ", generate(model, processor, inputs, 64)[0])
    with vtprune.attach(model, "off-mean", keep=0.25) as handle:
        print("answer, pruned:", generate(model, processor, inputs, 64)[0])
        report = handle.report()
    print(f"visual tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]}")
    print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
    checked = vtprune.verify(model, "off-mean", dict(inputs), keep=0.25)
    failed = [f"{check.name}: {check.detail}" for check in checked.checks if check.passed is False]
    print("the contract:  ", "holds" if checked.passed else "; ".join(failed))
