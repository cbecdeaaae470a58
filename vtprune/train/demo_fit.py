"""Fits the bundled VLM in two phases: half of its layers, then, grown, all of them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .demo_model import GROWN_FROM, PREFIX, build_model, grow, processor_and_tokenizer, save
from .demo_packing import Packed, judge
from .demo_trainee import Trainee

HEADS = ("kind.", "color.", "place.", "compare.")  # only there in training, and carried from phase to phase


def accuracy(net: nn.Module, data: Packed, size: int = 20) -> dict[str, float]:
    """Share of pairs whose answer tokens are all the arg-max (teacher forcing; equal to greedy decoding for an exact
    match), per kind."""
    hits: dict[str, list[bool]] = {}
    with torch.no_grad():
        for lo in range(0, len(data.items) - size + 1, size):
            b = data.batch(data.items[lo : lo + size], shuffle=False)
            logits, *_ = net(b["features"], b["ids"], b["position"], b["mask"])
            judge(logits, b["labels"][:, PREFIX:], b["group"][:, PREFIX:], b["kinds"], hits)
    return {k: sum(v) / len(v) for k, v in sorted(hits.items())}


def fit(
    features: Path,
    out: Path,
    *,
    minutes: tuple[float, float],
    batch: int,
    lr: float,
    seed: int,
    threads: int,
    start_from: Path | None = None,
) -> None:
    """Trains projector and language model, first with half of the layers, then :func:`grow`-n to all; saves model,
    processor and ``training.json``.

    Each phase has its own wall-clock budget in minutes; its learning rate warms up over 60 steps and falls to zero over
    the last part of the budget. ``start_from``: a folder saved after the first phase; only the second is run then.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    processor = processor_and_tokenizer()
    tok = processor.tokenizer
    images = _Images(features, tok, seed)
    began, log, step = time.time(), list[dict[str, Any]](), 0
    llava = _begin(tok, start_from)
    heads: dict[str, Tensor] = {}
    images.data["val"].load(list(features.glob("val-*.pt")))
    for phase, budget in enumerate(minutes):
        if phase == 0 and start_from is not None:
            continue
        if phase and start_from is None:
            llava = grow(llava, tok)
        net = Trainee(llava, compile=True)
        net.load_state_dict(heads, strict=False)
        run = _Phase(phase, budget, net, images, began, batch, lr)
        while (done := run.done()) < 1:
            step += 1
            run.step(done, step)
            if step % 200 == 0:
                log.append(run.entry(step))
                torch.save(llava.state_dict(), out.with_suffix(".last.pt"))
        heads = {k: v for k, v in net.state_dict().items() if k.startswith(HEADS)}
        log.append(run.entry(step))
        facts = {
            "steps": step,
            "seconds": round(time.time() - began),
            "seed": seed,
            "batch": batch,
            "lr": lr,
            "minutes": minutes,
            "threads": threads,
            "torch": torch.__version__,
            "scenes": len(images.data["train"].items),
            "easy_vqa": len(images.data["easy-train"].items),
            "log": log,
        }
        save(llava if phase else grow(llava, tok), processor, out, facts)


def _begin(tokenizer: Any, start_from: Path | None) -> Any:
    """The model at the beginning: untrained with half of its layers, or a saved first phase."""
    if start_from is None:
        return build_model(tokenizer, GROWN_FROM)
    from transformers import LlavaForConditionalGeneration

    build_model(tokenizer, GROWN_FROM)  # draws what a run from the start draws
    return LlavaForConditionalGeneration.from_pretrained(start_from, dtype=torch.float32, trust_remote_code=False)


class _Images:
    """The shards in the folder ``features``, drawn from epoch by epoch."""

    def __init__(self, features: Path, tokenizer: Any, seed: int) -> None:
        self.features = features
        self.data = {name: Packed([], tokenizer, seed) for name in ("train", "easy-train", "val")}
        self.rng = random.Random(seed)
        self.order: dict[str, list[int]] = {"train": [], "easy-train": []}

    def draw(self, name: str, count: int) -> list:
        """The next ``count`` images of ``name``; a new epoch also picks up shards that were written meanwhile."""
        items, order = self.data[name].items, self.order[name]
        if len(order) < count:
            self.data[name].load(list(self.features.glob(f"{name}-*.pt")))
            order[:] = self.rng.sample(range(len(items)), len(items))
        return [items[order.pop()] for _ in range(count)]

    def batch(self, size: int) -> dict:
        """Scenes, and an eighth of easy-VQA."""
        return self.data["train"].batch(self.draw("train", size - size // 8) + self.draw("easy-train", size // 8))


class _Phase:
    """One phase of the training: its wall clock, its optimisers, and how the losses run."""

    def __init__(
        self, phase: int, minutes: float, net: Trainee, images: _Images, began: float, batch: int, lr: float
    ) -> None:
        self.phase, self.minutes, self.net, self.images = phase, minutes, net, images
        self.began, self.batch, self.lr = began, batch, lr
        self.optimisers = _optimisers(net, lr)
        self.steps, self.running = 0, {"answer": 0.0, "dense": 0.0, "mention": 0.0, "side": 0.0}
        self.start = time.time()

    def done(self) -> float:
        """The share of the phase's time that is over."""
        return (time.time() - self.start) / (60 * self.minutes)

    def step(self, done: float, number: int) -> None:
        """One batch, the run's ``number``-th, at ``done`` of the phase."""
        self.steps += 1
        train = self.images.data["train"]
        train.simple = min(1.0, max(0.0, (0.6 - done) / 0.2))
        b = self.images.batch(self.batch)
        rate = self._rate(done)
        for o in self.optimisers:
            for g in o.param_groups:
                g["lr"] = rate
        answer, dense, mention, dx, dy = _losses(self.net, b)
        weight = max(0.0, 0.5 * (1 - done / 0.6)) if self.phase == 0 else 0.0
        (answer + weight * dense + max(0.0, 1 - done / 0.8) * (0.3 * mention + dx + dy)).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for o in self.optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        for k, v in (("answer", answer), ("dense", dense), ("mention", mention), ("side", dx + dy)):
            self.running[k] = 0.96 * self.running[k] + 0.04 * float(v.detach())
        if number % 25 == 0:
            norm = 1 - 0.96**self.steps
            means = " ".join(f"{k} {v / norm:.3f}" for k, v in self.running.items())
            print(
                f"phase {self.phase} step {number} t {time.time() - self.began:.0f}s images {len(train.items)} lr "
                f"{rate:.1e} {means}",
                flush=True,
            )

    def _rate(self, done: float) -> float:
        """The learning rate of this step: a warm-up of 60 steps, and down to zero over the last part of the budget."""
        return (
            (1.0, 0.6)[self.phase]
            * self.lr
            * min(1.0, self.steps / 60)
            * min(1.0, (1 - done) / (0.35, 0.5)[self.phase] + 0.02)
        )

    def entry(self, step: int) -> dict[str, Any]:
        """The log's line on the validation images, printed as well."""
        seconds = round(time.time() - self.began)
        entry = {"phase": self.phase, "step": step, "seconds": seconds, **accuracy(self.net, self.images.data["val"])}
        print(json.dumps(entry), flush=True)
        return entry


def _optimisers(net: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of language model and projector, AdamW for the rest."""
    matrices = [p for m in (net.lm.layers, net.projector) for p in m.parameters() if p.ndim == 2]
    held = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _losses(net: Trainee, b: dict) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropies of a batch: answers, what lies in each patch, where a mentioned object stands, and how it lies to
    another one (left to right, top to bottom)."""
    logits, kind, color, place, compare = net(b["features"], b["ids"], b["position"], b["mask"])
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    target = b["labels"][:, PREFIX:].reshape(-1)
    asked = target != -100
    answer = F.cross_entropy(flat[asked].float(), target[asked])
    image = zip((kind, color), b["dense"].unbind(1), strict=True)
    dense = torch.stack(
        [F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), ignore_index=-1) for x, y in image]
    ).sum()
    mention, dx, dy = (
        F.cross_entropy(x[y != -100].float(), y[y != -100])
        for x, y in zip((place, compare[..., :3], compare[..., 3:]), b["targets"][:, :, PREFIX:], strict=True)
    )
    return answer, dense, mention, dx, dy
