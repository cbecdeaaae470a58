"""Trains the side branch of DPVR-LF (arXiv 2606.09131, section 3) beside a frozen LLaVA, and compares it with the
controls that cost no training.

    vtprune train dpvr-lf --out branch.safetensors               # the bundled VLM, about ten minutes on two cores
    vtprune train dpvr-lf --out branch.safetensors --compare-only

The model is used through :func:`vtprune.attach` and its own forward: labels in, its own loss out. Every parameter of
the model is frozen, so the gradient runs from the answers through the keys and values of the last ``fusion`` layers
into the branch and nowhere else. The visual tokens of an image are computed once (transformers 5.18 and later take
them; older ones get the pixels each time) and serve all of its questions.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vtprune

from ..check.attach import attach
from ..core.planning import bind
from ..core.types import UnsupportedError, VtpruneError
from ..data import easyvqa, scenes
from ..inputs.images import open_image
from ..measure.runs import read
from ..models.engine.host import ENCODED, features

if TYPE_CHECKING:
    from PIL.Image import Image

METHOD = "dpvr-lf"
EASY = "easy-vqa"
KINDS = (*scenes.ABILITIES, EASY)
WARM_UP = 0.03  # share of the run; the cosine, weight decay 0 and AdamW are the paper's, the clipping norm is ours
CLIP = 1.0
BRANCH = ("split", "fusion", "branch_layers", "init", "variant")  # options of the method that a branch was trained with

Item = tuple["Image", list[tuple[str, str, str]]]  # an image and its (kind, question, answer)
Say = Callable[[str], None]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------
# data


@dataclass(frozen=True)
class Row:
    """One question: ``image`` number, ``kind`` one of :data:`KINDS`, ``ids`` the prompt with visual placeholders,
    ``answer`` the reply with its end token."""

    image: int
    kind: str
    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Questions:
    """``images`` ``[I, N, C]`` projected visual tokens if ``projected``, else pixels ``[I, 3, H, W]``; ``pad`` the
    padding token."""

    images: Tensor
    projected: bool
    rows: list[Row]
    pad: int = 0

    def batch(self, rows: list[Row], device: torch.device) -> dict[str, Any]:
        """Right-padded keyword arguments of the stock forward for ``rows``; labels are -100 everywhere but on the
        answers."""
        width = max(len(r.ids) + len(r.answer) for r in rows)
        ids = torch.full((len(rows), width), self.pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for b, r in enumerate(rows):
            start, end = len(r.ids), len(r.ids) + len(r.answer)
            ids[b, :end] = torch.tensor(r.ids + r.answer)
            labels[b, start:end] = torch.tensor(r.answer)
            mask[b, :end] = 1
        out: dict[str, Any] = {
            "input_ids": ids.to(device),
            "labels": labels.to(device),
            "attention_mask": mask.to(device),
        }
        images = self.images[[r.image for r in rows]].to(device)
        if not self.projected:
            return {**out, "pixel_values": images}
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {**out, ENCODED: {"image": BaseModelOutputWithPooling(pooler_output=list(images))}}


def takes_projected(model: nn.Module) -> bool:
    """Whether the model's forward accepts visual tokens that were computed before (transformers 5.23 does, 5.17 does
    not)."""
    return ENCODED in inspect.signature(model.forward).parameters


def scene_items(split: str, start: int, stop: int, per_ability: int) -> Iterator[Item]:
    """Generated scenes ``start .. stop`` of ``split``."""
    from PIL import Image

    for i in range(start, stop):
        s = scenes.scene(i, split, per_ability=per_ability)
        yield Image.fromarray(s.image), [(q.ability, q.text, q.answer) for q in s.questions]


def easy_items(split: str, count: int) -> Iterator[Item]:
    """The first ``count`` images of easy-VQA, each with all of its questions."""

    if count == 0:
        return
    try:
        questions = easyvqa.questions(split)
    except ModuleNotFoundError as e:
        raise VtpruneError(f"{e}, or do without it: --easy 0 --eval-easy 0") from e
    grouped: dict[str, list[tuple[str, str, str]]] = {}
    for q in questions:
        if q.image in grouped or len(grouped) < count:
            grouped.setdefault(q.image, []).append((EASY, q.text, q.answer))
    for path, rows in grouped.items():
        yield open_image(path), rows


def encode(
    model: Any, processor: Any, items: Iterable[Item], *, dtype: torch.dtype = torch.float32, size: int = 32
) -> Questions:
    """Tokenises ``items`` with the processor's chat template and, where the model allows it, runs tower and projector
    once per image (``size`` at a time)."""
    adapter = bind(model)
    geometry = adapter.geometry
    if geometry.family != "llava":
        raise UnsupportedError(
            f"questions are laid out for LLaVA, one run of visual tokens per image; this is a {geometry.family} model"
        )
    tokenizer, tokens, place = processor.tokenizer, geometry.tokens, adapter.image_token
    projected, device = takes_projected(model), next(model.parameters()).device
    stored: list[Tensor] = []
    rows: list[Row] = []
    waiting: list[Image] = []

    def flush() -> None:
        if not waiting:
            return
        pixels = processor.image_processor(waiting, return_tensors="pt")["pixel_values"]
        waiting.clear()
        if projected:
            with torch.no_grad(), arithmetic(model, dtype):
                pixels = torch.stack(
                    list(features(model.get_image_features(pixel_values=pixels.to(device, model.dtype))))
                )
        stored.append(pixels.to("cpu", dtype))

    for number, (image, asked) in enumerate(items):
        waiting.append(image)
        for kind, question, answer in asked:
            message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            ids = tokenizer(processor.apply_chat_template(message, add_generation_prompt=True)).input_ids
            at = ids.index(place)
            reply = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            rows.append(Row(number, kind, ids[:at] + [place] * tokens + ids[at + 1 :], reply))
        if len(waiting) == size:
            flush()
    flush()
    if not rows:
        raise VtpruneError("there are no questions: give more scenes or easy-VQA images")
    return Questions(
        torch.cat(stored), projected, rows, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )


# --------------------------------------------------------------------------------------------------------------
# training


def arithmetic(model: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic over float32 weights (two to three times as fast on recent CPUs); weights of another type are
    used as they are."""
    p = next(model.parameters())
    return (
        torch.autocast(p.device.type, dtype) if p.dtype == torch.float32 and dtype != torch.float32 else nullcontext()
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` gets a gradient inside; afterwards each has its flag back."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def train(
    model: Any,
    data: Questions,
    *,
    split: int,
    steps: int,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    minutes: float = math.inf,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains ``handle.modules["dpvr-lf"]`` of ``attach(model, "dpvr-lf", split=split, **options)`` on ``data``; the
    model is left exactly as it was.

    AdamW without weight decay over float32 copies of the branch's weights, linear warm-up, cosine to zero over
    ``steps`` or ``minutes`` of wall clock, whichever ends first. ``options``: ``fusion``, ``branch_layers``, ``init``,
    ``variant`` and ``weights`` (to go on from).

    Returns:
        the branch and JSON-safe facts; ``facts["loss"]`` is the answer loss (nats per token), at most 100 means over
        equal parts of the run.
    """
    for name, value in (("steps", steps), ("batch", batch), ("lr", lr), ("minutes", minutes)):
        if not value > 0:
            raise VtpruneError(f"{name}={value} must be above 0")
    if options.get("variant", "lf") == "lf" and options.get("fusion", 1) == 0:
        raise VtpruneError(
            "fusion=0 leaves nothing to train: no layer that sees the answers ever sees what the branch made (use "
            "fusion=1 or more)"
        )
    options = {"split": split, **options}
    device, began = next(model.parameters()).device, time.monotonic()
    rng, order, losses = random.Random(seed), list[Row](), list[float]()
    with frozen(model), attach(model, METHOD, **options) as handle:
        branch: nn.Module = handle.modules[METHOD]
        weights = list(branch.parameters())
        masters = [w.detach().float() for w in weights]  # of float32 weights these are the weights themselves
        optimiser = torch.optim.AdamW(masters, lr=lr, weight_decay=0.0)
        for step in range(steps):
            done = max(step / steps, (time.monotonic() - began) / (60 * minutes))
            if done >= 1:
                break
            if len(order) < batch:
                order = rng.sample(data.rows, len(data.rows)) + order
            rows, order = order[-batch:], order[:-batch]
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, (done + 1 / steps) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
            with arithmetic(model, dtype):
                loss = model(**data.batch(rows, device), use_cache=False).loss
            loss.backward()
            for master, w in zip(masters, weights, strict=True):
                master.grad, w.grad = None if w.grad is None else w.grad.float(), None
            norm = nn.utils.clip_grad_norm_(masters, CLIP)
            if step == 0 and not float(norm) > 0:
                raise VtpruneError(
                    "the branch gets no gradient: the layers behind it do not read the visual tokens (a larger fusion= "
                    "may)"
                )
            optimiser.step()
            with torch.no_grad():
                for master, w in zip(masters, weights, strict=True):
                    w.copy_(master)
            losses.append(float(loss.detach()))
            if step % 20 == 19:
                recent = losses[-20:]
                say(
                    f"step {step + 1} t {time.monotonic() - began:.0f}s lr {optimiser.param_groups[0]['lr']:.1e} loss "
                    f"{sum(recent) / len(recent):.4f}"
                )
    branch.requires_grad_(False)
    own, whole = sum(w.numel() for w in weights), sum(p.numel() for p in model.parameters())
    width = max(1, math.ceil(len(losses) / 100))
    curve = [round(sum(part) / len(part), 5) for part in (losses[i : i + width] for i in range(0, len(losses), width))]
    return branch, {
        "method": METHOD,
        **{k: v for k, v in options.items() if k in BRANCH},
        "steps": len(losses),
        "seconds": round(time.monotonic() - began, 1),
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "images": len(data.images),
        "questions": len(data.rows),
        "parameters": own,
        "parameter_share": own / whole,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"vtprune": _own_version()},
        "loss": curve,
    }


def _own_version() -> str:
    return vtprune.__version__


def save(branch: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Writes the branch in half precision (``attach(..., weights=path)`` reads it) and, beside it as ``.json``, how it
    was made."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, str] = {name: str(facts[name]) for name in ("split", "branch_layers") if name in facts}
    save_file(
        {k: v.detach().cpu().half().contiguous() for k, v in branch.state_dict().items()},
        path,
        metadata={"format": "pt", "method": METHOD, **told},
    )
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_facts(path: Path) -> dict[str, Any]:
    """The facts beside a saved branch. Raises :class:`VtpruneError` if either file is missing or is none."""
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise VtpruneError(f"no such file {needed}; train first: vtprune train {METHOD} --out {path}")
    return read(path.with_suffix(".json"))


# ------------------------------------------------------------------------------------------------------------
# comparison


@torch.no_grad()
def evaluate(
    model: Any,
    data: Questions,
    recipe: str | None = None,
    *,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """One pass over ``data`` under ``recipe`` (``None``: unpruned).

    Returns:
        ``accuracy`` per kind, the share of questions whose answer tokens are all the arg-max, which is when greedy
        decoding gives exactly that answer; ``mean`` over kinds; ``tokens`` the share of visual tokens per layer and
        ``flops`` that of the dense prefill, tower included (:class:`vtprune.Report`); ``parameters`` of the recipe's
        own modules.
    """
    device = next(model.parameters()).device
    hits: dict[str, list[bool]] = {}
    spent = dense = parameters = 0
    processed = visual = 0.0
    with nullcontext() if recipe is None else attach(model, recipe, **options) as handle:
        for lo in range(0, len(data.rows), batch):
            rows = data.rows[lo : lo + batch]
            inputs = data.batch(rows, device)
            labels = inputs.pop("labels")
            with arithmetic(model, dtype):
                logits = model(**inputs, use_cache=False).logits
            right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
            for r, ok in zip(rows, right.all(1).tolist(), strict=True):
                hits.setdefault(r.kind, []).append(ok)
            if handle is not None:
                report = handle.report()
                spent, dense = spent + report.flops, dense + report.dense_flops
                processed, visual = processed + report.effective_tokens * len(rows), visual + sum(report.visual_tokens)
        if handle is not None:
            parameters = sum(p.numel() for module in handle.modules.values() for p in module.parameters())
    accuracy = {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS if kind in hits}
    shares = (
        {"tokens": processed / visual, "flops": spent / dense} if recipe is not None else {"tokens": 1.0, "flops": 1.0}
    )
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy), **shares, "parameters": parameters}


def withdrawal_curve(
    model: Any, data: Questions, *, batch: int = 32, dtype: torch.dtype = torch.float32, say: Say = tell
) -> list[dict[str, Any]]:
    """What taking the image away before layer 0, 1, … costs without training (the last entry: never): ``layer``,
    ``accuracy`` per kind, ``mean``."""
    depth = bind(model).geometry.llm_layers
    curve = []
    for layer in range(depth + 1):
        found = (
            evaluate(model, data, batch=batch, dtype=dtype)
            if layer == depth
            else evaluate(model, data, "drop-all", batch=batch, dtype=dtype, layer=layer)
        )
        curve.append({"layer": layer, "mean": found["mean"], "accuracy": found["accuracy"]})
        say(
            f"image withdrawn before layer {layer:2d}: mean accuracy {found['mean']:.3f}"
            + " (never)" * (layer == depth)
        )
    return curve


def choose_split(curve: list[dict[str, Any]], fusion: int) -> int:
    """The deepest layer where withdrawal costs at least half of what the image is worth (unpruned minus blind): later,
    little is left to recover.

    At least one layer stays without visual tokens. The paper's own rule (four layers before the 50 % transition of a
    logit-lens curve) is made for 32 layers.
    """
    blind, whole = curve[0]["mean"], curve[-1]["mean"]
    if whole - blind < 0.02:
        raise VtpruneError(
            f"the image makes no difference to this model's answers ({blind:.3f} without, {whole:.3f} with it); give "
            "--split a number"
        )
    last = max(1, len(curve) - 1 - fusion - 1)
    return max((p["layer"] for p in curve[1 : last + 1] if whole - p["mean"] >= 0.5 * (whole - blind)), default=1)


def compare(
    model: Any,
    processor: Any,
    weights: Path | None = None,
    *,
    split: int,
    eval_scenes: int = 100,
    eval_easy: int = 30,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> dict[str, Any]:
    """The table of :func:`compare_on` over the scenes test split (two questions of each ability per image) and easy-VQA
    test."""
    items = chain(scene_items("test", 0, eval_scenes, 2), easy_items("test", eval_easy))
    return compare_on(
        model,
        encode(model, processor, items, dtype=dtype),
        weights,
        split=split,
        batch=batch,
        dtype=dtype,
        say=say,
        **options,
    )


def compare_on(
    model: Any,
    data: Questions,
    weights: Path | None = None,
    *,
    split: int,
    batch: int = 32,
    dtype: torch.dtype = torch.float32,
    say: Say = tell,
    **options: Any,
) -> dict[str, Any]:
    """One table: the unpruned model, the image withdrawn at ``split`` without training, DPVR-LF with an untrained
    branch (identity, copy) and with ``weights``.

    A second withdrawal, later, spends as many effective tokens as late fusion. The paper's tables have none of these
    controls, so a trained branch is not told apart from what late fusion gives by itself.
    """
    options = {"split": split, **{k: v for k, v in options.items() if k != "init"}}
    fusion = options.get("fusion", 1)
    runs: list[tuple[str, str | None, dict[str, Any]]] = [
        ("unpruned", None, {}),
        (f"withdrawn at layer {split}", "drop-all", {"layer": split}),
        (
            f"withdrawn at layer {split + fusion}: as many visual tokens as {METHOD}",
            "drop-all",
            {"layer": split + fusion},
        ),
        (f"{METHOD}, identity branch, untrained", METHOD, {**options, "init": "identity"}),
        (f"{METHOD}, copied branch, untrained", METHOD, {**options, "init": "copy"}),
    ]
    if weights is not None:
        runs.append((f"{METHOD}, trained", METHOD, {**options, "weights": str(weights)}))
    whole = sum(p.numel() for p in model.parameters())
    rows = []
    for name, recipe, extra in runs:
        found = evaluate(model, data, recipe, batch=batch, dtype=dtype, **extra)
        trained = found.pop("parameters") if "weights" in extra else 0
        rows.append({"name": name, **found, "trained_share": trained / whole})
        say(f"{name}: mean accuracy {found['mean']:.3f}")
    counts: dict[str, int] = {}
    for r in data.rows:
        counts[r.kind] = counts.get(r.kind, 0) + 1
    return {"options": options, "questions": counts, "rows": rows}


def markdown(table: dict[str, Any]) -> str:
    """The result of :func:`compare` as a markdown table; accuracies in percent, the number of questions under each
    name."""
    kinds = list(table["questions"])
    head = [
        "",
        *(f"{k} ({table['questions'][k]})" for k in kinds),
        "mean",
        "trained parameters",
        "visual tokens",
        "prefill FLOPs",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in table["rows"]:
        cells = [row["name"], *(f"{100 * row['accuracy'][k]:.1f}" for k in kinds), f"{100 * row['mean']:.1f}"]
        cells += [f"{100 * row['trained_share']:.2f} %", f"{100 * row['tokens']:.1f} %", f"{100 * row['flops']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
