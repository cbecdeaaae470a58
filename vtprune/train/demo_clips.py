"""Trains the bundled VLM's language model on clips (:mod:`vtprune.data.clips`); tower and projector stay as they are.

    python -m vtprune.train.demo_clips cache --out work/clips       # what tower and projector make of the frames, once
    python -m vtprune.train.demo_clips fit --features work/clips --out models/demo_vlm --minutes 40
    python -m vtprune.train.demo_clips test --features work/clips --out work/clips-test.json

As in :mod:`vtprune.train.demo_vlm`, many question-answer pairs share one prefix, here "<s> user :" and the frames, one
behind the other, and each pair is exactly what the model meets at inference. A cached clip is seen in any order of its
frames, with new questions each time. Every fourth batch is one of single scenes, so that these are not forgotten. The
first part of the training leaves out most tokens of the background, to save time. Two
heads exist in training only: which frame an image token is of, and where in each frame a mentioned object is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import clips, scenes
from ..inputs.demo_model import CLIPS, load
from .demo_model import PATCH, SIDE, TOKENS
from .demo_packing import cell_number, judge, mask_of
from .demo_trainee import decoder_layer, weights_of

FRAMES = clips.FRAMES
AWAY = scenes.CELLS**2  # the class of an object that a frame does not show
THIN, THINNED = 48, 0.6  # tokens per frame in the first part of the training, and how long that is
HELD_OUT = 12  # clips of the validation split that are looked at while training


class _Named(Protocol):
    """What both generators' questions have."""

    @property
    def ability(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...


Places = dict[tuple[str, str], list[int]]  # (colour, shape) -> its cell in each frame, or AWAY
Row = tuple[Tensor, Sequence[_Named], Places, Tensor]  # features [F * TOKENS, C], questions, places, tokens in use


# ----------------------------------------------------------------------------------------------------------------
# features


@torch.no_grad()
def cache(out: Path, split: str, start: int, stop: int, shard: int = 25) -> None:
    """Writes what tower and projector make of clips ``start .. stop`` of ``split`` (``scenes-train``: scenes)."""
    out.mkdir(parents=True, exist_ok=True)
    model, processor = load()
    for lo in range(start, stop, shard):
        parts = []
        for i in range(lo, min(lo + shard, stop)):
            frames = scenes.scene(i).image[None] if split == "scenes-train" else clips.clip(i, split).frames
            pixels = processor.image_processor(list(frames), return_tensors="pt")["pixel_values"]
            parts.append(torch.stack(list(model.get_image_features(pixels).pooler_output)))
        temporary = out / f".{split}-{lo:06d}.tmp"
        torch.save(torch.stack(parts).half(), temporary)
        temporary.rename(out / f"{split}-{lo:06d}.pt")
        print(f"{split} {lo + len(parts)}", flush=True)


class Clips:
    """The cached clips and scenes, drawn from at random; shards that appear meanwhile are taken up."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, np.random.RandomState(seed)
        self.features: dict[str, dict[int, Tensor]] = {"train": {}, "val": {}, "test": {}, "scenes-train": {}}
        self.order: dict[str, list[int]] = {"train": [], "scenes-train": []}
        self.read: set[Path] = set()
        self.tokens = TOKENS  # per frame of a training clip

    def load(self, split: str) -> dict[int, Tensor]:
        for path in sorted(set(self.folder.glob(f"{split}-*.pt")) - self.read):
            first = int(path.stem.rpartition("-")[2])
            self.read.add(path)
            self.features[split].update(enumerate(torch.load(path, weights_only=True), first))
        return self.features[split]

    def draw(self, split: str, count: int) -> list[Row]:
        order = self.order[split]
        if len(order) < count:
            order[:] = list(self.rng.permutation(list(self.load(split))))
        return [(self.clip if split == "train" else self.scene)(int(order.pop())) for _ in range(count)]

    def clip(self, index: int) -> Row:
        """A training clip with its frames in any order."""
        order = [int(f) for f in self.rng.permutation(FRAMES)]
        tracks = clips.reorder(clips.clip_tracks(index, "train"), order)
        questions = clips.questions(self.rng, tracks, 6)
        features = self.features["train"][index][order].float().flatten(0, 1)
        return features, self._mixed(questions), _places(tracks), self._thinned(tracks)

    def _thinned(self, tracks: Sequence[clips.Track]) -> Tensor:
        """Numbers of the tokens in use: those on objects first, others at random."""
        chosen = []
        for f in range(FRAMES):
            rank = self.rng.rand(SIDE, SIDE)
            for box in (t.boxes[f] for t in tracks):
                if box is not None:
                    left, top, right, bottom = (int(x // PATCH) for x in box)
                    rank[top : bottom + 1, left : right + 1] += 1
            chosen += [f * TOKENS + i for i in np.sort(np.argsort(-rank, axis=None)[: self.tokens])]
        return torch.tensor(chosen)

    def scene(self, index: int) -> Row:
        s = scenes.scene(index, per_ability=5)
        places = {(i.color, i.kind): [cell_number(*i.center)] for i in s.items if i.kind != "sign"}
        features = self.features["scenes-train"][index].float().flatten(0, 1)
        return features, self._mixed(s.questions), places, torch.arange(TOKENS)

    def _mixed(self, questions: Sequence[Any]) -> list[Any]:
        return [questions[i] for i in self.rng.permutation(len(questions))]


def _places(tracks: Iterable[clips.Track]) -> Places:
    out = {}
    for t in tracks:
        items = [t.item(f) for f in range(len(t.boxes))]
        out[t.color, t.kind] = [AWAY if i is None else cell_number(*i.center) for i in items]
    return out


def pack(rows: Sequence[Row], tokenizer: Any, room: int) -> dict[str, Any]:
    """A batch of rows with equally many tokens in use: as many pairs as fit into ``room`` tokens behind each prefix.
    Tokens out of use leave their positions empty."""
    prefix, end_of_prefix = 3 + len(rows[0][3]), 3 + len(rows[0][0])
    n, total = len(rows), prefix + room
    ids = torch.full((n, total), tokenizer.pad_token_id)
    labels, group = torch.full((n, total), -100), torch.full((n, total), -1)
    position = torch.arange(total).repeat(n, 1)
    mention = torch.full((n, total, FRAMES), -100)
    kinds: list[list[str]] = [[] for _ in rows]
    ids[:, :3] = torch.tensor(tokenizer("<s> user :").input_ids)
    group[:, :prefix] = 0
    for b, (_, questions, places, used) in enumerate(rows):
        position[b, 3:prefix] = 3 + used
        at = prefix
        for q in questions:
            words = q.text.split()
            asked = tokenizer(" ".join([*words, "assistant", ":"])).input_ids
            answer = tokenizer(q.answer).input_ids + [tokenizer.eos_token_id]
            end = at + len(asked) + len(answer)
            if end > total:
                continue
            kinds[b].append(q.ability)
            ids[b, at:end] = torch.tensor(asked + answer)
            labels[b, end - len(answer) : end] = torch.tensor(answer)
            group[b, at:end] = len(kinds[b])
            position[b, at:end] = end_of_prefix + torch.arange(end - at)
            for i in range(1, len(words)):
                cells = places.get((words[i - 1], words[i]))
                if cells is not None:
                    mention[b, at + i, : len(cells)] = torch.tensor(cells)
            at = end
    return {
        "image": torch.stack([row[0][row[3]] for row in rows]),
        "ids": ids,
        "labels": labels[:, prefix:],
        "group": group[:, prefix:],
        "mention": mention[:, prefix:],
        "position": position,
        "mask": mask_of(group, torch.float32),
        "kinds": kinds,
    }


# ----------------------------------------------------------------------------------------------------------------
# training


class ClipTrainee(nn.Module):
    """The language model in float32 and the two heads that only training has."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.lm, self.head = llava.model.language_model, llava.lm_head
        width = llava.config.text_config.hidden_size
        self.frame = nn.Linear(width, FRAMES)
        self.place = nn.Linear(width, FRAMES * (AWAY + 1))

    def forward(self, b: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits from the last prefix token on, of each image token's frame, and of each later token's places."""
        prefix = 3 + b["image"].shape[1]
        x = self.lm.embed_tokens(b["ids"])
        x = torch.cat([x[:, :3], b["image"], x[:, prefix:]], dim=1)
        cos, sin = (t[:, None] for t in self.lm.rotary_emb(x, b["position"]))
        for i, layer in enumerate(self.lm.layers):
            x = decoder_layer(x, weights_of(layer, x.dtype), cos, sin, b["mask"])
            if i == 1:
                frame = self.frame(F.rms_norm(x[:, 3:prefix], x.shape[-1:]))
            if i == len(self.lm.layers) // 2:
                place = self.place(F.rms_norm(x[:, prefix:], x.shape[-1:])).unflatten(-1, (FRAMES, AWAY + 1))
        out = F.rms_norm(x[:, prefix - 1 :], (x.shape[-1],), self.lm.norm.weight, 1e-6)
        return self.head(out), frame, place


def losses(net: ClipTrainee, b: dict[str, Any]) -> dict[str, Tensor]:
    """Cross-entropies of a batch: answers, frames of image tokens, places of mentioned objects."""
    logits, frame, place = net(b)
    asked, named = b["labels"] != -100, b["mention"] != -100
    which = (b["position"][:, 3 : 3 + frame.shape[1]] - 3) // TOKENS
    return {
        "answer": F.cross_entropy(logits[:, :-1][asked], b["labels"][asked]),
        "frame": F.cross_entropy(frame.flatten(0, 1), which.flatten()),
        "place": F.cross_entropy(place[named], b["mention"][named]),
    }


def _rows(data: Clips, split: str) -> list[Row]:
    """All cached clips of a split as they are, with three questions of each ability."""
    found = [(f, clips.clip(i, split, per_ability=3)) for i, f in data.load(split).items()]
    return [(f.float().flatten(0, 1), c.questions, _places(c.tracks), torch.arange(len(f) * TOKENS)) for f, c in found]


@torch.no_grad()
def accuracy(
    net: ClipTrainee, rows: Sequence[Row], tokenizer: Any, blind: bool = False, size: int = 4
) -> dict[str, float]:
    """Share of pairs whose answer tokens are all the arg-max (teacher forcing; equal to greedy decoding for an exact
    match), per ability; ``blind``: without visual tokens from the first layer on."""
    hits: dict[str, list[bool]] = {}
    for lo in range(0, len(rows), size):
        b = pack(rows[lo : lo + size], tokenizer, 288)
        if blind:
            prefix = 3 + b["image"].shape[1]
            b["mask"][:, :, prefix:, 3:prefix] = torch.finfo(torch.float32).min
        judge(net(b)[0], b["labels"], b["group"], b["kinds"], hits)
    return {k: round(sum(v) / len(v), 4) for k, v in sorted(hits.items())}


def fit(
    features: Path,
    out: Path,
    *,
    minutes: float,
    batch: int,
    room: int,
    lr: float,
    seed: int,
    threads: int,
    start_from: Path | None = None,
) -> None:
    """Trains for ``minutes`` of wall clock and writes ``clips.safetensors`` and ``clips.json`` into ``out`` every 100
    steps; the learning rate warms up over 30 steps and falls to zero over the last half. ``start_from``: a folder with
    the ``clips.safetensors`` to go on from."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    llava, processor = load() if start_from is None else load(clips=True, folder=start_from)
    tokenizer, data = processor.tokenizer, Clips(features, seed)
    net = ClipTrainee(llava)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    held_out = _rows(data, "val")[:HELD_OUT]
    began, step, log, running = time.time(), 0, list[dict[str, Any]](), dict[str, float]()

    def keep() -> None:
        log.append({"step": step, "seconds": round(time.time() - began), **accuracy(net, held_out, tokenizer)})
        print(json.dumps(log[-1]), flush=True)
        facts: dict[str, Any] = {
            "steps": step,
            "seconds": round(time.time() - began),
            "seed": seed,
            "batch": batch,
            "room": room,
        }
        facts |= {"lr": lr, "minutes": minutes, "threads": threads, "torch": torch.__version__, "frames": FRAMES}
        facts |= {"clips": len(data.features["train"]), "scenes": len(data.features["scenes-train"]), "log": log}
        save(llava, out, facts)

    while (done := (time.time() - began) / (60 * minutes)) < 1:
        step += 1
        data.tokens = THIN if done < THINNED else TOKENS
        rows = data.draw("scenes-train", 2 * batch) if step % 4 == 0 else data.draw("train", batch)
        rate = lr * min(1.0, step / 30) * min(1.0, (1 - done) / 0.5 + 0.01)
        for group in optimiser.param_groups:
            group["lr"] = rate
        parts = losses(net, pack(rows, tokenizer, room if step % 4 else 192))
        (parts["answer"] + max(0.0, 1 - done / 0.9) * (0.5 * parts["place"] + 0.1 * parts["frame"])).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for name, value in parts.items():
            name = name if step % 4 else f"scenes {name}"
            running[name] = 0.9 * running.get(name, float(value.detach())) + 0.1 * float(value.detach())
        if step % 20 == 0:
            means = " ".join(f"{k} {v:.3f}" for k, v in running.items())
            print(f"step {step} t {time.time() - began:.0f}s clips {len(data.features['train'])} {means}", flush=True)
        if step % 100 == 0:
            keep()
    keep()


def save(llava: Any, out: Path, facts: dict[str, Any]) -> None:
    """Writes the language model in half precision and how it was made."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().half().contiguous()
        for name, tensor in llava.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    save_file(weights, out / f".{CLIPS}.tmp", metadata={"format": "pt"})
    (out / f".{CLIPS}.tmp").chmod(0o644)  # safetensors writes for the owner only
    (out / f".{CLIPS}.tmp").rename(out / CLIPS)
    (out / CLIPS).with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def test(features: Path, out: Path, threads: int) -> None:
    """Writes the finished model's accuracy on the cached clips of the test split, with and without visual tokens."""
    torch.set_num_threads(threads)
    data = Clips(features, 0)
    rows = _rows(data, "test")
    answers: dict[str, Counter[str]] = {}
    for q in (q for row in rows for q in row[1]):
        answers.setdefault(q.ability, Counter())[q.answer] += 1
    llava, processor = load(clips=True)
    net = ClipTrainee(llava)
    facts = {
        "clips": len(rows),
        "questions": {k: c.total() for k, c in answers.items()},
        "majority answer": {k: round(c.most_common(1)[0][1] / c.total(), 4) for k, c in answers.items()},
        "dense": accuracy(net, rows, processor.tokenizer),
        "no visual tokens": accuracy(net, rows, processor.tokenizer, blind=True),
        "threads": threads,
        "torch": torch.__version__,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    c = sub.add_parser("cache", help="compute the features of frames")
    c.add_argument("--out", type=Path, required=True)
    c.add_argument("--split", choices=("train", "val", "test", "scenes-train"), default="train")
    c.add_argument("--start", type=int, default=0)
    c.add_argument("--stop", type=int, default=400)
    f = sub.add_parser("fit", help="train the language model")
    f.add_argument("--features", type=Path, required=True)
    f.add_argument("--out", type=Path, required=True)
    f.add_argument("--minutes", type=float, default=40.0)
    f.add_argument("--batch", type=int, default=4, help="clips per step (twice as many scenes)")
    f.add_argument("--room", type=int, default=256, help="tokens of questions and answers per clip")
    f.add_argument("--lr", type=float, default=1e-3)
    f.add_argument("--seed", type=int, default=0)
    f.add_argument("--start-from", type=Path, help="a folder that an earlier fit has written")
    f.add_argument("--threads", type=int, default=2)
    t = sub.add_parser("test", help="measure the finished model")
    t.add_argument("--features", type=Path, required=True)
    t.add_argument("--out", type=Path, required=True)
    t.add_argument("--threads", type=int, default=2)
    options = vars(parser.parse_args())
    commands: dict[str, Callable[..., None]] = {"cache": cache, "fit": fit, "test": test}
    commands[options.pop("what")](**options)


if __name__ == "__main__":
    main()
