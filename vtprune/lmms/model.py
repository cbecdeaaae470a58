"""The lmms-eval model ``vtprune``: any supported checkpoint with a recipe attached, or another lmms-eval model with a
recipe attached to it.

``--model_args pretrained=FOLDER_OR_ID,recipe=flowcut,keep=64``; lists are joined with ``+`` (``layers=8+16+24``),
``recipe=dense`` attaches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from ..core.ledger import UndoLedger
from ..core.planning import load_recipe
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..inputs.images import whole_pictures
from ..measure.environment import environment
from ..measure.run import identity
from ..measure.runs import Journal, fingerprint
from ..models.engine.host import backend
from . import meter, outcome
from .arguments import check_unknown, divide, number_of_frames, number_of_samples, unquoted
from .base import build, listen
from .conversations import Conversations
from .errors import REFUSED, fatal, usable
from .generation import answers
from .likelihood import likelihoods
from .loading import load, placed, plain
from .pruned import PrunedModel
from .settings import generation_settings
from .work import Work, batches, make_folder, own, what_is_asked


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
            of a video, evenly spaced; a model without a place for videos is shown them as images.
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
        max_frames: int | str = 32,
        trust_remote_code: bool = False,
        report: str | Path | None = None,
        journal: str | Path | None = None,
        exits: bool = True,
        loaded: tuple[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.exits = exits
        self.report_file = None if report is None else Path(report)
        self.journal = None if journal is None else Path(journal)
        self.failures: list[str] = []
        self.base: Any = None
        self._calls = 0
        self._ledger = UndoLedger()
        with fatal(exits, REFUSED), plain():
            usable()
            self.batch_size = number_of_samples(batch_size)
            self.max_new_tokens = max_new_tokens or 1024
            self.conversations = Conversations(unquoted(system_prompt), number_of_frames(max_frames))
            chosen = None if recipe == "dense" else load_recipe(recipe)
            self.options, rest = divide(chosen, options)
            if base is None:
                check_unknown(rest, chosen)
            self._distribute(device)
            if base is None:
                made = loaded or load(pretrained, self._device, dtype, attn_implementation, trust_remote_code)
                self.pruned = PrunedModel(*made, self._device)
                self.conversations = replace(self.conversations, processor=made[1])
            else:
                optional: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
                optional |= {"system_prompt": self.conversations.system_prompt, "max_new_tokens": max_new_tokens}
                optional |= {"trust_remote_code": trust_remote_code or None, **rest}
                self._wrap(base, pretrained, optional)
            self.pruned.seed = self.options.get("seed", 0)
            if chosen is not None:
                self.pruned.attach(chosen, self.options)

    # setting up
    # -----------------------------------------------------------------------------------------------------------

    def _distribute(self, device: str | None) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = placed(device, self.accelerator.local_process_index, self._world_size)

    def _wrap(self, base: str, pretrained: str, optional: dict[str, Any]) -> None:
        """Builds the lmms-eval model ``base``, from those arguments that are not ``None``, and listens to its model's
        ``generate``."""
        if self.journal is not None:
            raise VtpruneError("journal= is for our own model class: with base=, use lmms-eval's --use_cache")
        arguments = {"pretrained": pretrained, "device": str(self._device)}
        self.base = build(base, self.batch_size, arguments | {k: v for k, v in optional.items() if v is not None})
        self.is_simple = self.base.is_simple
        self._ledger.replace(self.base, "task_dict", self.task_dict)
        self.pruned = PrunedModel(self.base.model, None, self._device)
        listen(self.pruned, base, self.failures, self._ledger)

    # what lmms-eval asks for
    # ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.pruned.model

    @property
    def config(self) -> Any:
        return self.pruned.model.config

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def costs(self) -> list[dict[str, Any]]:
        """Of every batch so far."""
        return self.pruned.costs

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        if self.base is not None:
            self.base.set_cache_hook(cache_hook)

    def clean(self) -> None:
        """Takes the recipe out and lets go of the model; its owner, if there is another, keeps it as it was."""
        if self.pruned.handle is not None:
            self.pruned.handle.remove()
        self._ledger.undo()
        if self.base is not None:
            self.base.clean()
        self.pruned.model = self.base = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        if self.base is not None:
            return self._through_base("generate_until", requests)

        def ask(part: list[Instance]) -> list[str]:
            return self._answer([self._chat(r) for r in part], [r.args[-3] for r in part], self._settings(part[0]))

        def alike(request: Instance) -> str:
            return json.dumps(self._settings(request), sort_keys=True, default=str)

        return self._work("generate_until", requests, ask, alike)

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        """Round by round: the task builds each round's conversation from the answers before it; one sample at a
        time."""
        if self.base is not None:
            return self._through_base("generate_until_multi_round", requests)
        with fatal(self.exits):
            if self.is_simple:
                raise VtpruneError("tasks of several rounds need the chat class: leave --force_simple out")

        def ask(part: list[Instance]) -> list[list[str]]:
            return [self._rounds(part[0])]

        return self._work("generate_until_multi_round", requests, ask, None)

    def _rounds(self, request: Instance) -> list[str]:
        """A sample's answers, one a round."""
        _, to_messages, _, number, task, split = request.args
        doc, done, info = self.task_dict[task][split][number], list[str](), None
        messages = to_messages(doc)
        while True:
            chat = self.conversations.of_messages(messages)
            done += self._answer([chat], [number], self._settings(request))
            turn = to_messages(doc, round_idx=len(done), previous_output=list(done), previous_round_info=info)
            if not (isinstance(turn, tuple) and len(turn) == 4) or turn[1]:
                return done
            messages, _, _, info = turn

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Per request the summed negative log-likelihood of the continuation (lmms-eval takes the smallest) and whether
        greedy decoding would give it; wrapped, since lmms-eval 0.7 turns a bare pair into a string."""
        if self.base is not None:
            return self._through_base("loglikelihood", requests)
        scores = self._work("loglikelihood", requests, self._likelihoods, None)
        return [GenerationResult(text=(loss, bool(greedy))) for loss, greedy in scores]

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
        unless they are log-likelihoods)."""
        places = own(requests)
        size = self.batch_size if alike is not None or kind == "loglikelihood" else 1
        with fatal(self.exits), whole_pictures(), self._notes(kind, [requests[i] for i in places]) as journal:
            work = Work(requests, places, journal, self.costs, self.failures)
            work.run(batches(work.left, requests, size, alike), ask, quiet=self._rank != 0)
            self._conclude(kind, len(places))
        # for requests that only even out the ranks
        nothing: Any = {"generate_until": "", "loglikelihood": [0.0, False]}.get(kind, [])
        return [work.answers.get(i, nothing) for i in range(len(requests))]

    def _notes(self, kind: str, requests: list[Instance]) -> Journal:
        """The journal of this call: in memory, or in the journal's folder."""
        self._calls += 1
        if self.journal is None:
            return Journal(None, {})
        make_folder(self.journal)
        asked = what_is_asked(requests, None if kind == "loglikelihood" else self._settings)
        head = {"type": "vtprune.Answers", "kind": kind, "requests": asked, **self.facts(), **environment(self.model)}
        return Journal(self.journal / f"{kind}-{self._calls}-{self._rank}-of-{self._world_size}.jsonl", head)

    def _through_base(self, kind: str, requests: list[Instance]) -> Any:
        with fatal(self.exits):
            out = getattr(self.base, kind)(requests)
            self._conclude(kind, len(requests))
        return out

    def _conclude(self, kind: str, total: int) -> None:
        """Sums up over all processes."""
        costs, failures, total = outcome.gathered(self.costs, self.failures, total, self._world_size)
        summary = {**meter.summary(costs, self._device), "failed": len(failures)}
        if self._rank == 0:
            outcome.log(costs, summary)
            if self.report_file is not None:
                facts = {**self.facts(), **environment(self.model), "processes": self._world_size}
                outcome.write_report(self.report_file, facts, summary, failures)
        outcome.check_complete(kind, failures, total, self.journal)

    def facts(self) -> dict[str, Any]:
        """What makes this run this run."""
        attention = backend(self.model.config)
        return {
            "model": {
                "name": Path(str(self.model.config._name_or_path)).name,
                "fingerprint": fingerprint(self.model),
            },
            **identity(None if self.pruned.handle is None else self.pruned.handle.recipe),
            "seed": self.pruned.seed,
            "base": None if self.base is None else type(self.base).__name__,
            "attention": attention,
            "system_prompt": self.conversations.system_prompt,
            "options": self.options,
            "max_frames": self.conversations.max_frames,
        }

    def _settings(self, request: Instance) -> dict[str, Any]:
        """Keywords for ``generate``, with ``until``."""
        return generation_settings(request.args[1 if self.is_simple else -4], self.max_new_tokens)

    def _chat(self, request: Instance) -> list[dict[str, Any]]:
        """The conversation of a request."""
        return self.conversations.of_request(request, self.task_dict, self.is_simple)

    def _answer(self, chats: list[list[dict[str, Any]]], numbers: list[int], settings: dict[str, Any]) -> list[str]:
        """One batch."""
        return answers(self.pruned, chats, numbers, settings)

    def _likelihoods(self, part: list[Instance]) -> list[tuple[float, bool]]:
        """One batch."""
        if not self.is_simple:
            raise VtpruneError("log-likelihood tasks need lmms-eval's simple interface: add --force_simple")
        chats, numbers, endings = [], [], []
        for request in part:
            _, ending, _, number, task, split = request.args
            chats.append(self._chat(request))
            numbers.append(number)
            words = ending(self.task_dict[task][split][number]) if callable(ending) else ending
            endings.append(self.pruned.processor.tokenizer(words, add_special_tokens=False)["input_ids"])
        return likelihoods(self.pruned, chats, numbers, endings)


class Simple(Chat):
    """The same through lmms-eval's simple interface (``--force_simple``), which log-likelihood tasks need: images
    first, then the context."""

    is_simple = True
