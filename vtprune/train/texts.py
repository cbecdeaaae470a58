"""Prompts and answers without images, for language models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.types import VtpruneError
from ..inputs import chats
from .data import Answers, Spoken, padded

TEXT = "text"


@dataclass(frozen=True)
class Texts(Answers):
    """Prompts, and what is answered."""

    rows: list[Spoken]
    pad: int = 0
    noun = "texts"
    shown = 0

    def digest(self) -> str:
        """What tells them from others."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()[:16]

    def batch(self, rows: list[Spoken], device: torch.device) -> dict[str, Any]:
        """Right-padded keyword arguments of the stock forward for ``rows``; labels are -100 everywhere but on the
        answers."""
        told = padded([(r.ids, r.answer) for r in rows], self.pad)
        return {name: values.to(device) for name, values in told.items()}


def lines_of(path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The lines of a file of JSON objects that hold the texts ``fields``. Raises :class:`VtpruneError` for a file that
    is none, a line that is none, or no line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise VtpruneError(f"{path} cannot be read as text: {e}") from e
    found = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise VtpruneError(f"{path}, line {number} is not JSON: {e}") from e
        if not isinstance(told, dict) or not all(isinstance(told.get(k), str) and told[k] for k in fields):
            words = f"{', '.join(fields[:-1])} and {fields[-1]}"
            raise VtpruneError(f"{path}, line {number} does not have the texts {words}")
        found += 1
        yield told
    if not found:
        raise VtpruneError(f"{path} holds no questions")


def text_items(path: Path) -> list[tuple[str, str]]:
    """``(prompt, answer)`` of a file of lines ``{"prompt": ..., "answer": ...}``."""
    return [(told["prompt"], told["answer"]) for told in lines_of(path, ("prompt", "answer"))]


def encode(tokenizer: Any, items: Iterable[tuple[str, str]]) -> Texts:
    """Tokenises ``items``: prompts through the tokenizer's chat template where it has one, else as they stand; behind
    the answer its end token. Raises :class:`VtpruneError` for a tokenizer without one, for none and for what the
    template does not take."""
    end = tokenizer.eos_token_id
    if end is None:
        raise VtpruneError("the tokenizer has no end token (eos_token), which an answer is trained to end with")
    rows = []
    for number, (prompt, answer) in enumerate(items):
        text, special = prompt, True
        if tokenizer.chat_template:
            said = [{"role": "user", "content": prompt}]
            try:
                text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            except chats.PROCESSING as e:
                told = " ".join(str(e).split())[:300]
                raise VtpruneError(f"the tokenizer's chat template fails on {prompt[:40]!r}: {told}") from e
            special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        ids = list(tokenizer(text, add_special_tokens=special).input_ids)
        while ids and ids[-1] == end and not tokenizer.chat_template:  # some end every text
            ids.pop()
        if not ids:
            raise VtpruneError(f"the prompt {prompt[:40]!r} has no tokens")
        rows.append(Spoken(number, TEXT, ids, tokenizer(answer, add_special_tokens=False).input_ids + [end]))
    if not rows:
        raise VtpruneError("there is nothing to train on: no prompts")
    return Texts(rows, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
