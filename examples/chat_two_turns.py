"""A chat about an image with a second question, which chooses the visual tokens again.

What the first question keeps may lack what the second asks for. `shelve=True` keeps the rows in front of the first cut,
so that the second turn answers as a new prompt of the whole conversation would, without running tower and first layers
again. It is for methods inside the language model.

    python examples/chat_two_turns.py --image photo.jpg --question "What is this?" --then "And what stands behind it?"
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="hub id or folder")
parser.add_argument("--image", required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--then", default="Where in the picture is it?", help="the second question")
parser.add_argument("--recipe", default="pyramiddrop", help="see `vtprune recipes`")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens behind the last cut")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(args.model)

image = Image.open(args.image).convert("RGB")
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(device, model.dtype)
how = {"max_new_tokens": 64, "do_sample": False}

with vtprune.attach(model, args.recipe, keep=args.keep, shelve=True) as handle:
    first = model.generate(**inputs, **how, return_dict_in_generate=True)
    said = first.sequences[:, inputs["input_ids"].shape[1] :]
    answer = processor.decode(said[0], skip_special_tokens=True)
    print("first answer: ", answer.strip())
    print("chosen from:  ", *(f"{s.site} {s.tokens_in[0]} -> {s.tokens_out[0]}" for s in handle.report().stages))

    chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    chat.append({"role": "user", "content": [{"type": "text", "text": args.then}]})
    whole = processor.apply_chat_template(chat, add_generation_prompt=True)
    behind = processor.tokenizer(whole[len(prompt) + len(answer) :], add_special_tokens=False, return_tensors="pt")
    ended = said[0, -1].item() in processor.tokenizer.all_special_ids  # the template ends the answer itself
    turn = torch.cat([first.sequences[:, : -1 if ended else None], behind["input_ids"].to(device)], 1)
    # cache= is called past_key_values= in transformers before 5.24
    second = model.generate(turn, attention_mask=torch.ones_like(turn), cache=first.past_key_values, **how)
    report = handle.report()
print("second answer:", processor.decode(second[0, turn.shape[1] :], skip_special_tokens=True).strip())
print("chosen again: ", *(f"{s.site} {s.tokens_in[0]} -> {s.tokens_out[0]}" for s in report.stages))
print(f"second turn:   {report.flops / 1e9:.3f} GFLOPs, {report.shelved_bytes / 2**20:.1f} MiB on the shelf")
