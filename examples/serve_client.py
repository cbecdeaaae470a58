"""A chat server whose model prunes, asked with the client of OpenAI; each request may choose its recipe and budget.

Start the server (`pip install "vtprune[serve]"`), then ask the same question dense and pruned:

    vtprune serve --model Qwen/Qwen2.5-VL-3B-Instruct --recipe divprune --keep 0.25 --offer pyramiddrop --port 8000
    python examples/serve_client.py --image photo.jpg --question "What is in this picture?"
"""

import argparse
import base64
from mimetypes import guess_type
from pathlib import Path
from time import perf_counter

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--image", type=Path, required=True)
parser.add_argument("--question", default="What is in this picture?")
parser.add_argument("--recipe", default="divprune", help="one that the server was started with or offers")
parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens that stays")
args = parser.parse_args()

client = OpenAI(base_url=args.url, api_key="none")
data = f"data:{guess_type(args.image)[0]};base64,{base64.b64encode(args.image.read_bytes()).decode()}"
content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": args.question}]
name = client.models.list().data[0].id


def ask(**asked):
    began = perf_counter()
    told = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0, extra_body=asked
    )
    return told, perf_counter() - began


ask(recipe="dense")  # the first request of a server takes longer
dense, slow = ask(recipe="dense")
pruned, fast = ask(recipe=args.recipe, keep=args.keep)
report = pruned.vtprune
print("answer, dense: ", dense.choices[0].message.content)
print("answer, pruned:", pruned.choices[0].message.content)
print(f"visual tokens:  {report['visual_tokens'][0]}, {report['effective_tokens']:.1f} effective ones left")
print(f"prefill FLOPs:  {report['flops'] / report['dense_flops']:.0%} of the dense model's")
print(f"whole request:  {fast / slow:.2f} of the dense one's time")
