"""``vtprune eval``: lmms-eval with recipes attached, resumable, one JSON file per run."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.paths import folder, output
from ..core.types import VtpruneError
from ..inputs.models import is_local
from ..lmms import tasks
from ..lmms.commands import line, surroundings
from ..lmms.errors import usable
from ..lmms.jobs import plan
from ..lmms.one import one
from ..lmms.suites import NOTES, SUITES
from ..lmms.table import cells
from ..measure.runs import write
from .options import fractions, keep_value, key_value, model_options, positive, words
from .tables import show, table_options


def _keeps(text: str) -> list[int | float]:
    return list(dict.fromkeys(keep_value(part) for part in words(text)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune eval``, in the order in which ``--help`` shows them."""
    _recipe_arguments(parser)
    _size_arguments(parser)
    _lmms_arguments(parser)
    _other_arguments(parser)
    model_options(parser)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tasks, which recipes, at which budgets."""
    add = parser.add_argument
    add(
        "--tasks",
        type=words,
        default=["easy_vqa", "scenes"],
        help="lmms-eval tasks, with commas (default easy_vqa,scenes, which need no download)",
    )
    add("--suite", choices=list(SUITES), help="a named list of tasks instead (--list-suites shows them)")
    add("--list-suites", action="store_true", help="print the suites and stop")
    add(
        "--recipe",
        "--recipes",
        dest="recipes",
        type=words,
        metavar="NAMES",
        default=["pyramiddrop"],
        help="recipes, with commas; 'all' is every method that needs no fit (default pyramiddrop)",
    )
    add("--no-baselines", action="store_true", help="leave the baselines and the dense model out")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--budgets",
        type=fractions,
        default=[],
        help="fractions of the dense effective tokens (default: each recipe on its own schedule)",
    )
    budget.add_argument(
        "--keep",
        type=_keeps,
        default=[],
        metavar="N_OR_FRACTION",
        help="visual tokens left after the last cut, with commas: 64,0.25",
    )
    add(
        "--option",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option for the named recipes, value as JSON; repeatable",
    )


def _size_arguments(parser: argparse.ArgumentParser) -> None:
    """How much of it, and on how many processes."""
    add = parser.add_argument
    add("--seeds", type=positive, default=3, help="runs of random methods (default 3)")
    add("--limit", type=positive, metavar="N", help="only the first N samples of every task")
    add(
        "--samples",
        type=positive,
        default=100,
        metavar="N",
        help="size of the local tasks, as for 'vtprune bench' (default 100)",
    )
    add("--batch", type=positive, default=1)
    add(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="data-parallel processes (one GPU each, or one CPU process each)",
    )


def _lmms_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes on to lmms-eval and to the model inside it, and where its results go."""
    add = parser.add_argument
    add("--include-path", type=Path, metavar="FOLDER", help="your own task folders")
    add(
        "--base",
        metavar="NAME",
        help="attach to this lmms-eval model instead of our own, for protocols that depend on its prompts",
    )
    add("--system-prompt", metavar="TEXT", help="put in front of every conversation")
    add("--max-new-tokens", type=positive, metavar="N", help="for tasks that do not say (default 1024)")
    add("--attn-implementation", metavar="NAME", help="sdpa (default), eager, flash_attention_2 ...")
    add(
        "--results",
        type=Path,
        default=Path("out/eval"),
        metavar="FOLDER",
        help="what is there is not done again (default out/eval)",
    )
    add("--force-simple", action="store_true", help="lmms-eval's simple interface, which log-likelihood tasks need")


def _other_arguments(parser: argparse.ArgumentParser) -> None:
    """What is done instead of a run, and what is printed."""
    add = parser.add_argument
    add(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="only write easy_vqa and scenes as lmms-eval task folders into FOLDER",
    )
    add("--dry-run", action="store_true", help="print the commands and stop")
    table_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every run ended well. Raises :class:`RunError` if one did not, with everything before it kept."""
    if args.list_suites:
        show(args, _suites())
        return 0
    if find_spec("lmms_eval") is None:
        raise VtpruneError("lmms-eval is not installed: pip install 'vtprune[lmms-eval]'")
    if args.export is not None:
        for path in tasks.export(folder(args.export) or args.export, args.samples):
            print(path)
        return 0
    usable()
    names = list(SUITES[args.suite] if args.suite else args.tasks)
    if not names:
        raise VtpruneError("no tasks: name them with --tasks, or a --suite")
    jobs = plan(args)  # what is wrong with recipes and options is told first
    is_local(args.model)
    runs = args.results / "runs" if args.dry_run else folder(args.results / "runs")
    assert runs is not None
    include = _task_folders(args, names)
    rows = []
    for job in jobs:
        command = line(args, job, names, include, runs)
        if args.dry_run:
            print(" ".join([*(f"{k}={v}" for k, v in surroundings(args).items()), shlex.join(command)]))
        else:
            rows.append(one(args, job, names, command, runs))
    return 0 if args.dry_run else _finish(args, names, rows)


def _suites() -> list[list[str]]:
    """The table of suites, header first."""
    rows = [[suite, task, NOTES.get(task, "")] for suite, names in SUITES.items() for task in names]
    return [["suite", "task", "remark"], *rows]


def _task_folders(args: argparse.Namespace, names: Sequence[str]) -> list[Path]:
    """The folder of task files that lmms-eval is to read, if any: the user's own, or ours, written for the tasks of
    ``names`` that are ours."""
    wanted = tuple(n for n in names if n in tasks.TASKS)
    if args.include_path:
        if absent := [n for n in wanted if not any(args.include_path.rglob(f"{n}.yaml"))]:
            raise VtpruneError(
                f"{absent[0]} is not in {args.include_path}: 'vtprune eval --export {args.include_path}' puts it there"
            )
        return [args.include_path]
    if not wanted:
        return []
    place = args.results / f"tasks-{args.samples}"
    if not args.dry_run and any(not (place / n / f"{n}.yaml").is_file() for n in wanted):
        tasks.export(folder(place) or place, args.samples, wanted)
    return [place]


def _finish(args: argparse.Namespace, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> int:
    """Writes and shows the result of all runs. Raises :class:`VtpruneError` if there is none."""
    result = {
        "type": "vtprune.Eval",
        "version": 1,
        "command": "vtprune " + " ".join(args.argv),
        "tasks": names,
        "rows": rows,
    }
    write(output(args.results / "eval.json") or args.results / "eval.json", json.dumps(result) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        show(args, cells(rows))
    if all("error" in r for r in rows):
        raise VtpruneError("no recipe could be measured; the notes say why")
    return 0
