"""A language model without images: a question behind a long text, whose prompt is pruned once.

GemFilter reads the prompt up to one early layer, keeps what that layer's last token attends to, and the model starts
anew on it alone. The answer's own tokens are never pruned.

    python examples/causal_lm_long_prompt.py --text report.txt --question "What does the report recommend?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vtprune
from vtprune.measure.generation import measure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen3-4B-Instruct-2507", help="hub id or folder")
parser.add_argument("--text", type=Path, required=True, help="a text file in UTF-8")
parser.add_argument("--question", default="What is this text about?")
parser.add_argument("--recipe", default="gemfilter", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the prompt that stays")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()
tokenizer = AutoTokenizer.from_pretrained(args.model)

message = {"role": "user", "content": f"{args.text.read_text(encoding='utf-8')}\n\n{args.question}"}
inputs = tokenizer.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(device)


def answer():
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


print("answer, dense: ", answer())
with vtprune.attach(model, args.recipe, keep=args.keep) as handle:
    print("answer, pruned:", answer())
    report = handle.report()

times = measure(model, inputs, args.recipe, keep=args.keep, new_tokens=1, repeats=3)
print(f"prompt tokens:  {report.visual_tokens[0]} -> {report.stages[-1].tokens_out[0]} of those that may go")
print(f"prefill FLOPs:  {report.flops / report.dense_flops:.0%} of the dense model's")
print(f"first token:    after {times['ratio']['ttft']['median']:.2f} of the dense model's time")
