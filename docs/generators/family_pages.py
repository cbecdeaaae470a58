"""One page per model family, from the registry and docs/support.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import facts
from facts import cell, plain
from vtprune.models.base import ADAPTERS

from vtprune.core.info import grouped

# A published checkpoint of each family, the method of its example and that method's budget.
EXAMPLES = {
    "causal-lm": ("HuggingFaceTB/SmolLM2-135M-Instruct", "promptdistill", "keep=0.5"),
    "gemma3": ("google/gemma-3-4b-it", "divprune", "keep=0.25"),
    "generic": ("llava-hf/vip-llava-7b-hf", "divprune", "keep=0.25"),
    "glm4v": ("zai-org/GLM-4.1V-9B-Thinking", "divprune", "keep=0.25"),
    "hf-vit": ("openai/clip-vit-large-patch14-336", "tome", "keep=0.5"),
    "internvl": ("OpenGVLab/InternVL3-1B-hf", "divprune", "keep=0.25"),
    "llava": ("llava-hf/llava-1.5-7b-hf", "divprune", "keep=0.25"),
    "llava-next": ("llava-hf/llava-v1.6-mistral-7b-hf", "divprune", "keep=0.25"),
    "llava-onevision": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "divprune", "keep=0.25"),
    "mistral3": ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "divprune", "keep=0.25"),
    "open-clip": ("ViT-B-32", "tome", "keep=0.5"),
    "paligemma": ("google/paligemma2-3b-mix-224", "divprune", "keep=0.25"),
    "qwen2-vl": ("Qwen/Qwen2-VL-7B-Instruct", "divprune", "keep=0.25"),
    "qwen2.5-vl": ("Qwen/Qwen2.5-VL-7B-Instruct", "divprune", "keep=0.25"),
    "qwen3-vl": ("Qwen/Qwen3-VL-8B-Instruct", "divprune", "keep=0.25"),
    "qwen3-vl-moe": ("Qwen/Qwen3-VL-30B-A3B-Instruct", "divprune", "keep=0.25"),
    "smolvlm": ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "divprune", "keep=0.25"),
    "timm-vit": ("vit_small_patch16_224.augreg_in21k_ft_in1k", "tome", "keep=0.5"),
}
CHAT = """
import vtprune
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{name}"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(name)

content = [
    {{"type": "image", "image": image}},
    {{"type": "text", "text": "What is in the picture?"}},
]
chat = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)

with vtprune.attach(model, "{method}", {budget}) as handle:
    answer = model.generate(**inputs, max_new_tokens=64)
report = handle.report()
print(report.effective_tokens, "of", report.visual_tokens[0], "visual tokens")
"""
PROMPT = """
import vtprune
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

name = "{name}"
model = PaliGemmaForConditionalGeneration.from_pretrained(name, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(name)
inputs = processor(images=image, text="<image>answer en What is in the picture?", return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)

with vtprune.attach(model, "{method}", {budget}) as handle:
    answer = model.generate(**inputs, max_new_tokens=64)
report = handle.report()
print(report.effective_tokens, "of", report.visual_tokens[0], "visual tokens")
"""
TEXT = """
import vtprune
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
model = AutoModelForCausalLM.from_pretrained(name).eval()
tokenizer = AutoTokenizer.from_pretrained(name)

with vtprune.attach(model, "{method}", {budget}) as handle:
    answer = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64)  # text: a long prompt
print(handle.report().effective_tokens)
"""
TOWER = """
import vtprune
from transformers import AutoImageProcessor, CLIPVisionModel

name = "{name}"
model = CLIPVisionModel.from_pretrained(name).eval()
processor = AutoImageProcessor.from_pretrained(name)

with vtprune.attach(model, "{method}", {budget}) as handle:
    features = model(**processor(images=image, return_tensors="pt"))
print(handle.report().effective_tokens, "tokens per block")
"""
TIMM = """
import timm
import vtprune

model = timm.create_model("{name}", pretrained=True).eval()

with vtprune.attach(model, "{method}", {budget}) as handle:
    logits = model(pixels)  # pixels: [B, 3, H, W] as the model's own transform makes them
print(handle.report().effective_tokens, "tokens per block")
"""
OPEN_CLIP = """
import open_clip
import vtprune

model, _, transform = open_clip.create_model_and_transforms("{name}", pretrained="laion2b_s34b_b79k")

with vtprune.attach(model.eval(), "{method}", {budget}) as handle:
    features = model.encode_image(pixels)  # pixels: transform(image) in a batch
print(handle.report().effective_tokens, "tokens per block")
"""
FORMS = {
    "causal-lm": TEXT,
    "hf-vit": TOWER,
    "timm-vit": TIMM,
    "open-clip": OPEN_CLIP,
    "paligemma": PROMPT,
}


def uri(family: str) -> str:
    return f"families/{family}.md"


def page(family: str) -> str:
    """The Markdown of a family's page."""
    info = ADAPTERS.get(family)
    lines = [f"# {family}", "", f"{info.idea[0].upper()}{info.idea[1:]}.", "", *_example(family)]
    lines += ["", "## What works", "", *_works(family), *_not(family)]
    lines += ["", "## How it is tested", ""]
    lines.append(
        f"Tiny random models of this family ({', '.join(f'`{v}`' for v in info.tiny)}) go through the correctness "
        "contract under every method that is not refused: a full budget equals the unpatched model, pruned equals the "
        "dense model under the equivalent mask, cached equals uncached, batches equal single samples, `remove()` "
        "restores everything. `vtprune verify --model FOLDER --recipe NAME` runs the same on your checkpoint, and "
        "`vtprune doctor` tells whether the family computes right with the releases that you have."
    )
    if info.package:
        lines += ["", f"This family needs the package `{info.package}`."]
    return "\n".join(lines) + "\n"


def _example(family: str) -> Iterator[str]:
    name, method, budget = EXAMPLES[family]
    code = FORMS.get(family, CHAT).format(name=name, method=method, budget=budget).strip()
    yield from ["## On a checkpoint", "", "```python", *code.splitlines(), "```", ""]
    yield "`image` is a PIL picture. " if family not in ("causal-lm", "timm-vit", "open-clip") else ""
    yield "The tests run this program with the family's tiny random model in the checkpoint's place; the checkpoint "
    yield "itself was not downloaded for them."


def _works(family: str) -> Iterator[str]:
    signs = facts.support()[family]
    yield "Methods, by where they decide. All take `keep=`, `effective_tokens=` or `flops=` where they have a budget."
    yield from ["", "| | with their defaults | with an option, or in some variants |", "|---|---|---|"]
    for title, infos in grouped(facts.every_method()).items():
        whole = ", ".join(f"[{i.name}](../methods/{i.name}.md)" for i in infos if signs[i.name] == "●")
        some = ", ".join(f"[{i.name}](../methods/{i.name}.md)" for i in infos if signs[i.name] == "◐")
        if whole or some:
            yield f"| **{title}** | {whole or '–'} | {some or '–'} |"


def _not(family: str) -> Iterator[str]:
    notes = facts.reasons().get(family, [])
    for sign, title, head in (("◐", "With an option", "which, or where"), ("–", "Refused", "why")):
        mine = [(names, why) for s, names, why in notes if s == sign]
        if not mine:
            continue
        yield from ["", f"## {title}", "", f"| methods | {head} |", "|---|---|"]
        for names, why in mine:
            links = ", ".join(f"[{n}](../methods/{n}.md)" for n in names)
            yield f"| {links} | {cell(plain(why))} |"


def index() -> str:
    lines = [
        "| family | what it is | an example |",
        "|---|---|---|",
        *(
            f"| [{name}]({name}.md) | {cell(info.idea)} | `{EXAMPLES[name][0]}` |"
            for name, info in ADAPTERS.items()
            if ADAPTERS.distribution(name) is None
        ),
    ]
    return "\n".join(lines)


def nav() -> list[Any]:
    return ["families/index.md", {"What works where": "support.md"}, *({name: uri(name)} for name in families())]


def families() -> list[str]:
    """Ours."""
    return [name for name in ADAPTERS if ADAPTERS.distribution(name) is None]
