"""The lmms-eval model ``vtprune``: any supported checkpoint with a recipe attached, or another lmms-eval model with a
recipe attached to it.

``--model_args pretrained=FOLDER_OR_ID,recipe=flowcut,keep=64``; lists are joined with ``+`` (``layers=8+16+24``),
``recipe=dense`` attaches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from ..check.attach import attach
from ..core.failures import FAILURES
from ..core.ledger import UndoLedger
from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..inputs import loading
from ..inputs.chats import image_part, kinds, prepare_chats, text_part, video_part
from ..inputs.images import open_image, whole_pictures
from ..measure.environment import environment
from ..measure.run import dense_report, identity
from ..measure.runs import Journal, RunError, digest, fingerprint
from ..measure.runs import write as write_file
from ..measure.samples import sample_seed
from ..methods.base import METHODS, OWN_BUDGETS
from ..models.engine.host import backend
from . import meter
from .evaluate import FAILED, REFUSED, usable

GENERATION = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "do_sample",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
)
LOADING: tuple[type[Exception], ...] = (*FAILURES, ImportError, SafetensorError)
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
USUAL_STOP = ["\n\n"]  # what lmms-eval fills in where a task says nothing; its own Hugging Face models ignore it too


@contextmanager
def fatal(exits: bool, prefix: str = FAILED) -> Iterator[None]:
    """lmms-eval logs an error and still ends with code 0: where ``exits`` is set, errors of the library end the process
    with code 1."""
    try:
        yield
    except VtpruneError as e:
        if not exits:
            raise
        raise SystemExit(prefix + " ".join(str(e).split())) from e


@contextmanager
def _plain() -> Iterator[None]:
    """What other libraries raise while a model is made, as errors of ours."""
    try:
        yield
    except VtpruneError:
        raise
    except LOADING as e:
        raise VtpruneError(f"{type(e).__name__}: {_line(e)}") from e


class Chat(lmms):
    """Answers through the checkpoint's chat template, in batches, on a CPU or a GPU, alone or data-parallel.

    Args:
        pretrained: folder or hub id of a model and its processor. recipe: a registered name, a recipe file, or
            ``dense``.
        base: an lmms-eval model instead: it is built with ``pretrained`` and all arguments given that are not about
            pruning, and keeps its own prompts; what it swallows as an empty answer is counted here. ``random`` then
            draws one set of tokens for all samples; there is no journal.
        batch_size: samples per batch. device: default ``cuda`` if there is one. dtype: default ``auto`` on a GPU,
            ``float32`` on a CPU.
        system_prompt: put in front of every conversation. max_new_tokens: for tasks that do not say (1024). max_frames:
            of a video.
        report: a JSON file for the costs of the run and all facts needed to repeat it. journal: a folder that keeps the
            answers: an interrupted run goes on, and the same requests with the same settings are answered from there.
        exits: end the process with code 1 on an error (``python -m lmms_eval`` would end with 0); otherwise errors are
            raised.
        **options: ``keep``, ``effective_tokens``, ``flops``, ``seed``, ``positions``, ``per`` and the options of the
            recipe's last method.

    Raises:
        VtpruneError: unknown arguments, or what :func:`vtprune.attach` refuses; a :class:`RunError` after the last
            request if some of them failed.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        recipe: str | Recipe = "dense",
        base: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        max_frames: int = 32,
        trust_remote_code: bool = False,
        report: str | Path | None = None,
        journal: str | Path | None = None,
        exits: bool = True,
        loaded: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.exits, self.report_file, self.journal = (
            exits,
            None if report is None else Path(report),
            None if journal is None else Path(journal),
        )
        self.costs: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.handle: Any = None
        self.base: Any = None
        self._calls = 0
        self._ledger = UndoLedger()
        with fatal(exits, REFUSED), _plain():
            usable()
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise VtpruneError(f"batch_size={batch_size!r} is not a number of samples")
            self.batch_size = int(batch_size)
            self.max_new_tokens, self.max_frames = max_new_tokens or 1024, max_frames
            # the quotation marks that kept its commas together
            self.system_prompt = None if system_prompt is None else str(system_prompt).strip('"')
            chosen = None if recipe == "dense" else load_recipe(recipe)
            self.options, rest = _divide(chosen, options)
            if rest and base is None:
                known = ", ".join([*_known(chosen), "pretrained", "base", "dtype", "device", "report", "journal"])
                raise VtpruneError(f"unknown argument {sorted(rest)[0]!r}; there are {known}")
            self._distribute(device)
            if base is not None:
                if journal is not None:
                    raise VtpruneError("journal= is for our own model class: with base=, use lmms-eval's --use_cache")
                given = {
                    "dtype": dtype,
                    "attn_implementation": attn_implementation,
                    "system_prompt": self.system_prompt,
                    "max_new_tokens": max_new_tokens,
                }
                given |= {"trust_remote_code": trust_remote_code or None, **rest}
                self._wrap(
                    base,
                    {
                        "pretrained": pretrained,
                        "device": str(self._device),
                        **{k: v for k, v in given.items() if v is not None},
                    },
                )
            else:
                self._model, self.processor = loaded or self._load(
                    pretrained, dtype, attn_implementation, trust_remote_code
                )
            self.seed = self.options.get("seed", 0)
            if chosen is not None:
                self.handle = attach(self._model, chosen, **self.options)
            self.draws = chosen is not None and any(METHODS.get(s.method).draws for s in chosen.stages)

    # setting up
    # -----------------------------------------------------------------------------------------------------------

    def _distribute(self, device: str | None) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and self._world_size > 1:
            name = f"cuda:{self.accelerator.local_process_index}"
        self._device = torch.device(name)

    def _load(self, pretrained: str, dtype: str | None, attention: str | None, trust: bool) -> tuple[Any, Any]:
        if not pretrained:
            raise VtpruneError("say which model: pretrained=FOLDER_OR_ID")
        kind = dtype or ("auto" if self._device.type == "cuda" else "float32")
        extra = {"attn_implementation": attention} if attention else {}
        model, processor = loading.load(
            pretrained, dtype=kind, local=Path(pretrained).is_dir(), trust_remote_code=trust, **extra
        )
        return model.to(self._device), processor

    def _wrap(self, base: str, arguments: dict[str, Any]) -> None:
        """Builds the lmms-eval model ``base`` and listens to its model's ``generate``."""
        from lmms_eval.models import get_model

        cls = get_model(base)
        self.base = cls(batch_size=self.batch_size, **arguments)
        self._model = self.base.model
        self.is_simple = self.base.is_simple
        self._ledger.replace(self.base, "task_dict", self.task_dict)
        inner = self._model.generate

        def listened(*args: Any, **kwargs: Any) -> Any:
            if args or "input_ids" not in kwargs:
                raise VtpruneError(
                    f"base={base} calls generate() without input_ids by name, which cannot be measured; use our own "
                    "model class"
                )
            names = {"generation_config", "stopping_criteria", "logits_processor", "streamer", "synced_gpus"}
            settings = {k: v for k, v in kwargs.items() if k in names or not isinstance(v, torch.Tensor | list)}
            inputs = {k: v for k, v in kwargs.items() if k not in settings}
            try:
                out, cost = meter.generate(_Inner(self._model, inner), inputs, lambda: self._told(inputs), **settings)
            except FAILURES as e:
                self.failures.append(f"{type(e).__name__}: {_line(e)}")
                raise
            self.costs.append(cost)
            return out

        self._ledger.replace(self._model, "generate", listened)

    # what lmms-eval asks for
    # ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self._model

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._device

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        if self.base is not None:
            self.base.set_cache_hook(cache_hook)

    def clean(self) -> None:
        """Takes the recipe out and lets go of the model; its owner, if there is another, keeps it as it was."""
        if self.handle is not None:
            self.handle.remove()
        self._ledger.undo()
        if self.base is not None:
            self.base.clean()
        self._model = self.base = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        if self.base is not None:
            return self._through_base("generate_until", requests)

        def ask(part: list[Instance]) -> list[str]:
            return self._answer([self._chat(r) for r in part], [r.args[-3] for r in part], self._settings(part[0]))

        return self._work(
            "generate_until", requests, ask, lambda r: json.dumps(self._settings(r), sort_keys=True, default=str)
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Round by round: the task builds each round's conversation from the answers before it; one sample at a
        time."""
        if self.base is not None:
            return self._through_base("generate_until_multi_round", requests)
        with fatal(self.exits):
            if self.is_simple:
                raise VtpruneError("tasks of several rounds need the chat class: leave --force_simple out")

        def ask(part: list[Instance]) -> list[list[str]]:
            _, to_messages, _, number, task, split = part[0].args
            doc, answers, told = self.task_dict[task][split][number], list[str](), None
            messages = to_messages(doc)
            while True:
                answers += self._answer([self._messages(messages)], [number], self._settings(part[0]))
                turn = to_messages(doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=told)
                if not (isinstance(turn, tuple) and len(turn) == 4) or turn[1]:
                    return [answers]
                messages, _, _, told = turn

        return self._work("generate_until_multi_round", requests, ask, None)

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Per request the summed negative log-likelihood of the continuation (lmms-eval takes the smallest) and whether
        greedy decoding would give it; wrapped, since lmms-eval 0.7 turns a bare pair into a string."""
        if self.base is not None:
            return self._through_base("loglikelihood", requests)
        found = self._work("loglikelihood", requests, self._likelihoods, None)
        return [GenerationResult(text=(loss, bool(greedy))) for loss, greedy in found]

    # the work
    # ---------------------------------------------------------------------------------------------------------------

    def _work(
        self,
        kind: str,
        requests: list[Instance],
        ask: Callable[[list[Instance]], list[Any]],
        alike: Callable[[Instance], str] | None,
    ) -> list[Any]:
        """Answers in the order of ``requests``, in batches of neighbours that are ``alike`` (``None``: one by one
        unless they are log-likelihoods). What fails in a batch is tried alone, and counted."""
        real = [
            i for i, r in enumerate(requests) if not (r.metadata or {}).get("__padding_only__")
        ]  # the rest evens out the ranks and is thrown away
        answers: dict[int, Any] = {}
        with fatal(self.exits), whole_pictures(), self._notes(kind, [requests[i] for i in real]) as journal:
            answers.update({real[r["i"]]: r["answer"] for r in journal.records})
            for batch in journal.batches:
                self.costs += batch["costs"]
            place = {i: k for k, i in enumerate(real)}
            with tqdm(total=len(real), initial=len(answers), disable=self._rank != 0, desc="vtprune") as bar:
                for part in self._batches([i for i in real if i not in answers], requests, kind, alike):
                    for tried in self._tries(part, requests, ask, journal, place):
                        answers |= tried
                    bar.update(len(part))
            self._conclude(kind, len(real))
        # for requests that only even out the ranks
        nothing: Any = {"generate_until": "", "loglikelihood": [0.0, False]}.get(kind, [])
        return [answers.get(i, nothing) for i in range(len(requests))]

    def _batches(
        self, left: list[int], requests: list[Instance], kind: str, alike: Callable[[Instance], str] | None
    ) -> Iterator[list[int]]:
        size = self.batch_size if alike is not None or kind == "loglikelihood" else 1
        part: list[int] = []
        for i in left:
            same = (
                not part
                or alike is None
                or (alike(requests[i]), requests[i].args[-2]) == (alike(requests[part[0]]), requests[part[0]].args[-2])
            )
            if part and (len(part) == size or not same):
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def _tries(
        self, part: list[int], requests: list[Instance], ask: Callable, journal: Journal, place: dict[int, int]
    ) -> Iterator[dict[int, Any]]:
        """The answers of a batch; if it fails, those of its samples one by one."""
        before = len(self.costs)
        try:
            found = ask([requests[i] for i in part])
        except FAILURES as e:
            del self.costs[before:]
            if len(part) > 1:
                for i in part:
                    yield from self._tries([i], requests, ask, journal, place)
                return
            _, number, task, split = requests[part[0]].args[-4:]
            self.failures.append(
                f"{task} {split} {number}: "
                f"{_line(e) if isinstance(e, VtpruneError) else f'{type(e).__name__}: {_line(e)}'}"
            )
            return
        journal.add([{"i": place[i], "answer": a} for i, a in zip(part, found, strict=True)], costs=self.costs[before:])
        yield dict(zip(part, found, strict=True))

    def _notes(self, kind: str, requests: list[Instance]) -> Journal:
        """The journal of this call: in memory, or in the journal's folder."""
        self._calls += 1
        if self.journal is None:
            return Journal(None, {})
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise VtpruneError(f"cannot make the folder {self.journal}: {e.strerror or e}") from e
        asked = digest(
            [
                [
                    *r.args[-3:],
                    r.idx,
                    *(a for a in r.args[:2] if isinstance(a, str)),
                    kind != "loglikelihood" and self._settings(r),
                ]
                for r in requests
            ]
        )
        head = {"type": "vtprune.Answers", "kind": kind, "requests": asked, **self.facts(), **environment(self._model)}
        return Journal(self.journal / f"{kind}-{self._calls}-{self._rank}-of-{self._world_size}.jsonl", head)

    def _through_base(self, kind: str, requests: list[Instance]) -> Any:
        with fatal(self.exits):
            out = getattr(self.base, kind)(requests)
            self._conclude(kind, len(requests))
        return out

    def _conclude(self, kind: str, total: int) -> None:
        """Sums up over all processes; failed requests end the run, so that none is scored as an empty answer."""
        costs, failures, totals = self.costs, self.failures, [total]
        if self._world_size > 1:
            everything: list[Any] = [None] * self._world_size
            torch.distributed.all_gather_object(everything, (self.costs, self.failures, total))
            costs, failures = [c for e in everything for c in e[0]], [f for e in everything for f in e[1]]
            totals = [e[2] for e in everything]
        told = {**meter.summary(costs, self._device), "failed": len(failures)}
        if self._rank == 0:
            from lmms_eval.models.model_utils.gen_metrics import log_metrics

            tokens, seconds = sum(c["new_tokens"] * c["samples"] for c in costs), sum(c["seconds"] for c in costs)
            log_metrics(
                seconds,
                tokens,
                tokens / seconds if seconds else 0.0,
                {k: v for k, v in told.items() if k not in ("samples", "batches")},
            )
            if self.report_file is not None:
                facts = {"type": "vtprune.Costs", "version": 1, **self.facts(), **environment(self._model)}
                write_file(
                    self.report_file,
                    json.dumps({**facts, "processes": self._world_size, **told, "failures": failures}, indent=1) + "\n",
                )
        if failures:
            kept = (
                f"; the other answers are kept in {self.journal} and the same command goes on from there"
                if self.journal is not None
                else ""
            )
            raise RunError(
                f"{len(failures)} of {sum(totals)} requests ({kind}) failed, nothing is scored{kept}; the first: "
                f"{failures[0]}"
            )

    def facts(self) -> dict[str, Any]:
        """What makes this run this run."""
        attention = backend(self._model.config)
        return {
            "model": {
                "name": Path(str(self._model.config._name_or_path)).name,
                "fingerprint": fingerprint(self._model),
            },
            **identity(None if self.handle is None else self.handle.recipe),
            "seed": self.seed,
            "base": None if self.base is None else type(self.base).__name__,
            "attention": attention,
            "system_prompt": self.system_prompt,
            "options": self.options,
            "max_frames": self.max_frames,
        }

    def _settings(self, request: Instance) -> dict[str, Any]:
        """Keywords for ``generate``, with ``until``; greedy unless the task asks for samples or sets a temperature."""
        asked = dict(request.args[-4] if not self.is_simple else request.args[1])
        until = asked.pop("until", USUAL_STOP)
        found = {
            "max_new_tokens": self.max_new_tokens,
            **{k: v for k, v in asked.items() if k in GENERATION and v is not None},
        }
        warm, wanted = found.get("temperature"), found.get("do_sample")
        if wanted is not False and warm != 0 and (warm or wanted):
            found["do_sample"] = True
        else:
            found = {k: v for k, v in found.items() if k not in ("temperature", "top_p", "top_k")} | {
                "do_sample": False
            }
        return {
            **found,
            "until": [u for u in ([until] if isinstance(until, str) else until) if u and [u] != USUAL_STOP],
        }

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        """The conversation of a request."""
        if not self.is_simple:
            _, to_messages, _, number, task, split = request.args
            return self._messages(to_messages(self.task_dict[task][split][number]))
        context, (to_visual, number, task, split) = request.args[0], request.args[-4:]
        visuals = _flat(to_visual(self.task_dict[task][split][number]))
        return self._system() + [
            {"role": "user", "content": [*map(self._shown, visuals), text_part(context.replace("<image>", "").strip())]}
        ]

    def _messages(self, messages: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages as the processors take them."""
        out = self._system()
        for m in messages:
            content = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            parts = [text_part(c["text"]) if c["type"] == "text" else self._shown(c["url"], c["type"]) for c in content]
            out.append({"role": m["role"], "content": parts})
        return out

    def _shown(self, source: Any, kind: str = "image") -> dict[str, Any]:
        """A picture (or its file) or a video file as a part of a message."""
        if kind == "video" or (isinstance(source, str) and source.lower().endswith(VIDEOS)):
            return video_part(source, self.max_frames)
        if kind != "image":
            raise VtpruneError(
                f"this model class takes text, images and videos, not {kind}: use base= with an lmms-eval model that "
                "does"
            )
        return image_part(source.convert("RGB") if isinstance(source, Image.Image) else open_image(source))

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": [text_part(self.system_prompt)]}] if self.system_prompt else []

    @torch.no_grad()
    def _answer(
        self, chats: Sequence[list[dict[str, Any]]], numbers: Sequence[int], settings: dict[str, Any]
    ) -> list[str]:
        """One batch. Samples that show different kinds of things go apart; where answers are drawn at random, each goes
        alone, on a seed of its own."""
        settings = dict(settings)
        until = settings.pop("until")
        out: dict[int, str] = {}
        for group in [[i] for i in range(len(chats))] if settings["do_sample"] else _alike(chats):
            asked = meter.clock(self._device)()
            inputs = prepare_chats(self.processor, [chats[i] for i in group]).to(self._device, self._model.dtype)
            if self.draws:
                self.handle.reseed(
                    [sample_seed(self.seed, numbers[i]) for i in group for _ in range(settings.get("num_beams") or 1)]
                )
            if settings["do_sample"]:
                torch.manual_seed(sample_seed(self.seed, numbers[group[0]]))
            told = partial(self._told, inputs, bool(kinds(chats[group[0]])))
            sequences, cost = meter.generate(self._model, inputs, told, asked, **settings)
            self.costs.append(cost)
            texts = self.processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(group, texts, strict=True):
                out[i] = _stopped(text, until).strip()
        return [out[i] for i in range(len(chats))]

    def _told(self, inputs: Any, seen: bool = True) -> Any:
        """The report of the prefill that has just run; text alone is never pruned."""
        return self.handle.report() if self.handle is not None and seen else dense_report(self._model, inputs)

    def _likelihoods(self, part: list[Instance]) -> list[tuple[float, bool]]:
        if not self.is_simple:
            raise VtpruneError("log-likelihood tasks need lmms-eval's simple interface: add --force_simple")
        chats, numbers, endings = [], [], []
        for r in part:
            _, ending, to_visual, number, task, split = r.args
            chats.append(self._chat(r))
            numbers.append(number)
            words = ending(self.task_dict[task][split][number]) if callable(ending) else ending
            endings.append(self.processor.tokenizer(words, add_special_tokens=False)["input_ids"])
        out: dict[int, tuple[float, bool]] = {}
        for group in _alike(chats):
            inputs = prepare_chats(self.processor, [chats[i] for i in group])
            ids = inputs["input_ids"]
            start, width = ids.shape[1], max(len(endings[i]) for i in group)
            tail, real = (
                torch.zeros(len(group), width, dtype=ids.dtype),
                torch.zeros(len(group), width, dtype=torch.bool),
            )
            for row, i in enumerate(group):
                tail[row, : len(endings[i])], real[row, : len(endings[i])] = torch.tensor(endings[i]), True
            for name in [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.shape == ids.shape]:
                more = tail if name == "input_ids" else real if name == "attention_mask" else torch.zeros_like(tail)
                inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], 1)
            inputs = inputs.to(self._device, self._model.dtype)
            if self.draws:
                self.handle.reseed([sample_seed(self.seed, numbers[i]) for i in group])
            clock = meter.clock(self._device)
            began = clock()
            # as long as the prompt, also when pruned
            logits = self._model(**inputs, use_cache=False).logits[:, start - 1 : -1].float()
            chances = logits.log_softmax(-1).gather(2, tail.to(self._device)[..., None])[..., 0]
            self.costs.append(meter.scored(self._told(inputs, bool(kinds(chats[group[0]]))), clock() - began))
            hit = logits.argmax(-1) == tail.to(self._device)
            real = real.to(self._device)
            for row, i in enumerate(group):
                out[i] = (-float(chances[row][real[row]].sum()), bool(hit[row][real[row]].all()))
        return [out[i] for i in range(len(part))]


class Simple(Chat):
    """The same through lmms-eval's simple interface (``--force_simple``), which log-likelihood tasks need: images
    first, then the context."""

    is_simple = True


class _Inner:
    """A model whose ``generate`` is the one from before we listened."""

    def __init__(self, model: Any, generate: Callable[..., Any]):
        self.device, self.generate = model.device, generate


def _divide(recipe: Recipe | None, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that ``attach`` takes, with lists told by ``+``, and all others."""
    known = _known(recipe)
    own = {k: _list(v) for k, v in options.items() if k in known}
    return own, {k: v for k, v in options.items() if k not in known}


def _known(recipe: Recipe | None) -> list[str]:
    if recipe is None:
        return []
    return ["keep", *TARGETS, *ATTACH_OPTIONS, *OWN_BUDGETS, *METHODS.get(recipe.stages[-1].method).options]


def _list(value: Any) -> Any:
    """``8+16+24`` as a list of numbers."""
    if not isinstance(value, str) or "+" not in value:
        return value
    return [utils.handle_arg_string(v) for v in value.split("+")]


def _line(e: BaseException) -> str:
    return (str(e).strip() or "no reason given").splitlines()[0]


def _flat(visuals: Any) -> list[Any]:
    """A task's visuals: nothing, one, or lists of them."""
    if visuals is None:
        return []
    return [v for entry in visuals for v in _flat(entry)] if isinstance(visuals, list | tuple) else [visuals]


def _alike(chats: Sequence[list[dict[str, Any]]]) -> list[list[int]]:
    """Samples that can share a batch: those that show the same kinds of things."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, chat in enumerate(chats):
        groups.setdefault(kinds(chat), []).append(i)
    return list(groups.values())


def _stopped(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text
