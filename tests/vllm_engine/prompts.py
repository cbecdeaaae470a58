"""One engine, all kinds of prompts: exits 1 with what is wrong. Run by ``test_engine.py``."""

from __future__ import annotations

import sys

import torch
from PIL import Image

import vtprune
from vtprune.inputs import demo_model
from vtprune.inputs.chats import image_part, prepare_chats, prompt_ids, text_part

NEW = 6


def pictures(count: int) -> list[Image.Image]:
    numbers = torch.Generator().manual_seed(0)
    return [Image.fromarray(p) for p in (torch.rand(count, 168, 168, 3, generator=numbers) * 255).byte().numpy()]


def chat(*parts: object) -> list[dict]:
    """A message of pictures and words."""
    content = [image_part(p) if isinstance(p, Image.Image) else text_part(p) for p in parts]
    return [{"role": "user", "content": content}]


def attached(model, processor, asked: list[dict], keep: object) -> list[int]:
    inputs = dict(prepare_chats(processor, [asked]))
    if not any(part["type"] == "image" for part in asked[0]["content"]):
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    else:
        with vtprune.attach(model, "divprune", keep=keep):
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def main() -> int:
    from vllm import LLM, SamplingParams

    model, processor = vtprune.load_demo_model()
    a, b, c = pictures(3)
    question = "what color is the circle ?"
    asked = {
        "one": (chat(a, question), 36),
        "two that follow each other": (chat(a, b, question), 36),
        "three": (chat(b, c, a, question), 36),
        "none": (chat(question), 36),
        "the same twice": (chat(a, a, question), 36),
        "one again": (chat(a, "how many red shapes are there ?"), 36),
        "fewer": (chat(a, question), 9),
        "a fraction": (chat(b, question), 0.5),
        "one row": (chat(a, question), 1),
        "all": (chat(a, question), 1.0),
    }
    engine = LLM(
        model=str(demo_model.FOLDER),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        enforce_eager=True,
        gpu_memory_utilization=0.3,  # of the machine's memory, on a CPU
        enable_mm_embeds=True,
        enable_prefix_caching=True,
        limit_mm_per_prompt={"image": 3},
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW)
    wrong = []

    def prompt(asked: list[dict], keep: object) -> dict:
        shown = [part["image"] for part in asked[0]["content"] if part["type"] == "image"]
        out: dict = {"prompt_token_ids": prompt_ids(processor, [asked])[0]}
        if shown:
            out["multi_modal_data"] = {"image": shown}
        if keep != 36:
            out["mm_processor_kwargs"] = {"vtprune": {"keep": keep}}
        return out

    want = {name: attached(model, processor, *case) for name, case in asked.items()}
    for _ in range(2):  # the second time from caches
        prompts = [prompt(*case) for case in asked.values()]
        for name, answer in zip(asked, engine.generate(prompts, greedy, use_tqdm=False), strict=True):
            got = list(answer.outputs[0].token_ids)
            if got != want[name]:
                wrong.append(f"{name}: {got} instead of {want[name]}")

    inputs = dict(prepare_chats(processor, [chat(a, question)]))
    rows = vtprune.encode(model, "divprune", inputs, keep=20)
    ids = prompt_ids(processor, [chat(a, question)])[0]
    refused = {
        "more than there are": ({**prompt(chat(a, question), 145)}, "keep"),
        "no budget": ({**prompt(chat(a, question), "many")}, "keep"),
        "another key": (
            {**prompt(chat(a, question), 36), "mm_processor_kwargs": {"vtprune": {"recipe": "tome"}}},
            "keep",
        ),
        "an image at the end": (
            {**prompt(chat(a, question), 36), "prompt_token_ids": ids[: ids.index(4) + 1]},
            "end with text",
        ),
        "rows without places": (
            {"prompt_token_ids": ids, "multi_modal_data": {"image": rows.embeds[0][None]}},
            "hidden",
        ),
        "a tensor for a picture": (
            {"prompt_token_ids": ids, "multi_modal_data": {"image": torch.zeros(1, 3, 168, 168)}},
            "encoded rows",
        ),
        "rows of another": (
            {"prompt_token_ids": ids, "multi_modal_data": {"image": torch.full_like(rows.placed[0], 0.5)[None]}},
            "do not say where",
        ),
    }
    for name, (bad, words) in refused.items():
        try:
            engine.generate([bad], greedy, use_tqdm=False)
            wrong.append(f"{name}: answered")
        except ValueError as e:
            if words not in str(e):
                wrong.append(f"{name}: {e}")
    wide = rows.placed[0]
    want_rows = attached(model, processor, chat(a, question), 20)
    for given in (wide[None], [wide], wide[None, None], [wide[None]]):  # as clients and vLLM's own parts put it
        placed = {"prompt_token_ids": ids, "multi_modal_data": {"image": given}}
        got = list(engine.generate([placed], greedy, use_tqdm=False)[0].outputs[0].token_ids)
        if got != want_rows:
            wrong.append(f"encoded outside: {got} instead of {want_rows}")
    print("\n".join(wrong))
    return 1 if wrong else 0


def room() -> int:
    """A prompt whose images would take more positions than the model has is refused, also when they are known."""
    from vllm import LLM, SamplingParams

    _, processor = vtprune.load_demo_model()
    engine = LLM(
        model=str(demo_model.FOLDER),
        dtype="float32",
        max_model_len=96,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        hf_overrides={"text_config": {"max_position_embeddings": 96}},
        limit_mm_per_prompt={"image": 3},
    )
    greedy, shown, wrong = SamplingParams(temperature=0, max_tokens=2), pictures(3), []
    for count, fits in ((1, True), (2, False), (2, False), (1, True)):  # of 4 * 96 - 96 positions each takes 144
        ids = prompt_ids(processor, [chat(*shown[:count], "what ?")])[0]
        asked = {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": shown[:count]},
            "mm_processor_kwargs": {"vtprune": {"keep": 9}},
        }
        try:
            engine.generate([asked], greedy, use_tqdm=False)
            wrong += [] if fits else [f"{count} images: answered"]
        except ValueError as e:
            wrong += [] if not fits and "positions" in str(e) else [f"{count} images: {e}"]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(room() if sys.argv[1:] == ["room"] else main())
