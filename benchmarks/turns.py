"""A second question about the same prompt: go on with what was chosen for the first, choose again, or start anew?

``python benchmarks/turns.py [MODEL] [--method pyramiddrop] [--effective 0.53] [--count 30] [--length 512]
[--save FILE]``

Without ``MODEL`` the bundled VLM is asked two questions about each of ``--count`` test scenes (one pair of each two
abilities that follow each other); with a folder (see ``benchmarks/needle.py``) a text model is asked about two of the
plain sentences of a prompt of ``--length`` tokens. Four ways to read the second question, in turns, in one process:

* ``dense``: the unpruned model goes on with its cache;
* ``kept``: the pruned model goes on with what it kept for the first question;
* ``again``: it chooses again (``shelve=True``);
* ``anew``: it reads the whole conversation as a new prompt.

All but the first see the answer that the dense model gave to the first question, so that only the second one's reading
differs. Times are of one thread's CPU up to the second answer's first token, over ``anew``; FLOPs are the reports'.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from needle import CITIES, load, sentences, wilson
from vtprune.models.engine.host import cache_of, cached

import vtprune
from vtprune.inputs import chats, demo_model
from vtprune.measure import timing
from vtprune.measure.environment import environment, in_words
from vtprune.measure.samples import matches, scenes_samples

WAYS = ("dense", "kept", "again", "anew")
Talk = tuple[dict[str, Any], list[int], list[int], str]  # the first prompt, its answer, what follows, the right answer


def scenes(model: Any, processor: Any, count: int) -> Iterator[Talk]:
    """Pairs of questions about a scene, and the first one's dense answer."""
    samples = scenes_samples(count)
    tokenizer = processor.tokenizer
    for one, two in zip(samples, samples[1:], strict=False):
        if one.source != two.source or one.ability == two.ability:
            continue
        inputs = chats.prepare(processor, [one.picture()], [one.question])
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        told = answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer
        more = f"</s><s> user : {two.question} assistant :"
        yield dict(inputs), told, tokenizer(more, add_special_tokens=False)["input_ids"], two.answer


def needles(model: Any, tokenizer: Any, count: int, length: int) -> Iterator[Talk]:
    """Two codes in a long prompt, at different depths; each is asked for in a turn of its own."""
    for seed in range(count):
        rng = random.Random(f"turns {seed}")
        chosen, numbers = rng.sample(CITIES, 2), rng.sample(range(1000, 9999), 2)
        hay, text = sentences(rng), list[str]()
        while len(tokenizer(" ".join(text))["input_ids"]) < length - 60:
            text.append(next(hay))
        for city, number, depth in zip(chosen, numbers, rng.sample((0.2, 0.4, 0.6, 0.8), 2), strict=True):
            text.insert(round(depth * len(text)), f"The code of {city} is {number}.")
        told = "Read the text, then answer in one short sentence.\n\n" + " ".join(text)
        chat = [{"role": "user", "content": f"{told}\n\nWhat is the code of {chosen[0]}?"}]
        how = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
        first = tokenizer.apply_chat_template(chat, **how)
        chat += [
            {"role": "assistant", "content": f"The code of {chosen[0]} is {numbers[0]}."},
            {"role": "user", "content": f"What is the code of {chosen[1]}?"},
        ]
        whole = tokenizer.apply_chat_template(chat, **how)
        answer = tokenizer(f"The code of {chosen[0]} is {numbers[0]}.", add_special_tokens=False)["input_ids"]
        assert whole[: len(first) + len(answer)] == [*first, *answer], "the chat template changes what was said"
        ids = torch.tensor([first])
        yield (
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            answer,
            whole[len(first) + len(answer) :],
            str(numbers[1]),
        )


@torch.no_grad()
def second(model: Any, talk: Talk, way: str) -> tuple[list[int], float]:
    """The second answer's tokens, and seconds up to the first of them."""
    inputs, answer, question, _ = talk
    whole = torch.cat([inputs["input_ids"], torch.tensor([[*answer, *question]])], 1)
    if way == "anew":
        given = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        begin = timing.timer()
        out = model(**given, use_cache=True, logits_to_keep=1)
    else:
        cache = cache_of(model(**inputs, use_cache=True, logits_to_keep=1))
        for token in answer:
            model(input_ids=torch.tensor([[token]]), **cached(model, cache))
        begin = timing.timer()
        out = model(input_ids=torch.tensor([question]), logits_to_keep=1, **cached(model, cache))
    seconds, cache, told = timing.timer() - begin, cache_of(out), [int(out.logits[0, -1].argmax())]
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops or []
    while told[-1] not in stops and len(told) < 16:
        out = model(input_ids=torch.tensor([told[-1:]]), **cached(model, cache))
        told.append(int(out.logits[0, -1].argmax()))
    return told, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--method", default="pyramiddrop", help="(default %(default)s)")
    parser.add_argument("--effective", type=float, default=0.53, help="effective tokens (default %(default)s)")
    parser.add_argument("--count", type=int, default=30, help="scenes, or prompts (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text prompt (default %(default)s)")
    parser.add_argument("--save", type=Path, help="writes FILE.json and FILE.md")
    args = parser.parse_args()
    timing.use_cpu_time(torch.device("cpu"))
    if args.model is None:
        model, processor = demo_model.load()
        tokenizer, talks = processor.tokenizer, list(scenes(model, processor, args.count))
    else:
        model, tokenizer = load(args.model)
        talks = list(needles(model, tokenizer, args.count, args.length))
    rows: list[dict[str, Any]] = []
    for number, talk in enumerate(talks):
        for way in WAYS:
            report = None
            if way == "dense":
                told, seconds = second(model, talk, way)
            else:
                options = {"effective_tokens": args.effective, "shelve": way == "again"}
                with vtprune.attach(model, args.method, **options) as handle:
                    told, seconds = second(model, talk, way)
                    report = handle.report()
            text = tokenizer.decode(told, skip_special_tokens=True).strip()
            good = matches(text, talk[3]) if args.model is None else talk[3] in text
            row: dict[str, Any] = {"talk": number, "way": way, "answer": text, "right": talk[3], "good": good}
            if report is not None and way != "kept":  # whose report is of the first prompt
                shares = {k: getattr(report, k) for k in ("flops", "dense_flops", "kv_bytes", "shelved_bytes")}
                row |= {**shares, "effective": report.effective_tokens / report.visual_tokens[0]}
            rows.append({**row, "seconds": seconds, "tokens": told})
    told = {"command": " ".join(["benchmarks/turns.py", *(Path(a).name for a in sys.argv[1:])]), "method": args.method}
    result = {**told, "environment": environment(model), "rows": rows}
    if args.save:
        args.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.save.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    by = {way: [r for r in result["rows"] if r["way"] == way] for way in WAYS}
    lines = [
        f"`{result['command']}`: {in_words(result['environment'])}",
        "",
        f"{len(by['anew'])} second questions, `{result['method']}`.",
        "",
    ]
    lines += [
        "| second question | right, % | as anew, % | time / anew | FLOPs / anew | shelved / cache |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way in WAYS:
        good = sum(r["good"] for r in by[way])
        low, high = wilson(good, len(by[way]))
        alike = sum(a["tokens"] == b["tokens"] for a, b in zip(by[way], by["anew"], strict=True)) / len(by[way])
        time = median(a["seconds"] / b["seconds"] for a, b in zip(by[way], by["anew"], strict=True))
        work, shelf = "", ""
        if way == "again":
            work = f"{median(a['flops'] / b['flops'] for a, b in zip(by[way], by['anew'], strict=True)):.2f}"
            shelf = f"{median(r['shelved_bytes'] / r['kv_bytes'] for r in by[way]):.2f}"
        elif way == "dense":
            work = f"{median(a['dense_flops'] / b['flops'] for a, b in zip(by['again'], by['anew'], strict=True)):.2f}"
        elif way == "anew":
            work = "1"
        lines.append(
            f"| {way} | {100 * good / len(by[way]):.0f} [{100 * low:.0f}, {100 * high:.0f}] | {100 * alike:.0f} | "
            f"{time:.2f} | {work} | {shelf} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
