"""How a task wants its answers generated, as keywords for ``generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
USUAL_STOP = ["\n\n"]  # what lmms-eval fills in where a task says nothing; its own Hugging Face models ignore it too


def generation_settings(task: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Keywords for ``generate``, with ``until``; greedy unless the task asks for samples or sets a temperature.
    ``max_new_tokens``: for tasks that do not say."""
    until = task.get("until", USUAL_STOP)
    settings = {k: v for k, v in task.items() if k in GENERATION and v is not None}
    settings = {"max_new_tokens": max_new_tokens, **settings}
    warm, wanted = settings.get("temperature"), settings.get("do_sample")
    if wanted is not False and warm != 0 and (warm or wanted):
        settings["do_sample"] = True
    else:
        settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
        settings["do_sample"] = False
    stops = [until] if isinstance(until, str) else until
    return {**settings, "until": [stop for stop in stops if stop and [stop] != USUAL_STOP]}


def cut(text: str, until: Sequence[str]) -> str:
    """``text`` up to the first of what ends it."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
