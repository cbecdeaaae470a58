"""What a call came to: costs and failures of all processes together, logged, written down, and an error if a request
failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..measure.runs import RunError
from ..measure.runs import write as write_file


def gathered(
    costs: list[dict[str, Any]], failures: list[str], total: int, processes: int
) -> tuple[list[dict[str, Any]], list[str], int]:
    """Costs, failures and the number of requests over all processes."""
    if processes == 1:
        return costs, failures, total
    everything: list[Any] = [None] * processes
    torch.distributed.all_gather_object(everything, (costs, failures, total))
    all_costs = [cost for entry in everything for cost in entry[0]]
    all_failures = [failure for entry in everything for failure in entry[1]]
    return all_costs, all_failures, sum(entry[2] for entry in everything)


def log(costs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Puts the costs among lmms-eval's own results."""
    from lmms_eval.models.model_utils.gen_metrics import log_metrics

    tokens, seconds = sum(c["new_tokens"] * c["samples"] for c in costs), sum(c["seconds"] for c in costs)
    more = {k: v for k, v in summary.items() if k not in ("samples", "batches")}
    log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, more)


def write_report(path: Path, facts: Mapping[str, Any], summary: Mapping[str, Any], failures: Sequence[str]) -> None:
    """The costs of the run and all ``facts`` needed to repeat it, as JSON."""
    head = {"type": "vtprune.Costs", "version": 1}
    write_file(path, json.dumps({**head, **facts, **summary, "failures": failures}, indent=1) + "\n")


def check_complete(kind: str, failures: Sequence[str], total: int, journal: Path | None) -> None:
    """Failed requests end the run, so that none is scored as an empty answer: raises :class:`RunError`."""
    if not failures:
        return
    kept = (
        f"; the other answers are kept in {journal} and the same command goes on from there"
        if journal is not None
        else ""
    )
    raise RunError(
        f"{len(failures)} of {total} requests ({kind}) failed, nothing is scored{kept}; the first: {failures[0]}"
    )
