"""``python -m vtprune.cli.quickstart``: every method on the bundled VLM and real test questions, in minutes on a CPU.
Writes ``out/quickstart.{html,png,json}``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vtprune

from ..core.paths import output
from ..core.recipe import Recipe
from ..core.types import VtpruneError
from ..inputs import demo_model
from ..inputs.chats import generate, prepare
from ..measure import bench, text
from ..measure.samples import Sample, easy_vqa_samples, scenes_samples
from ..show import web
from ..show.pictures import contact_sheet, token_picture
from ..show.row_bias import row_bias_figure
from ..show.views import model_view
from . import models
from .errors import Parser, guarded
from .options import fractions, model_options, positive

BUDGETS = (0.5, 0.25)
WORK = 2400  # questions in all, divided among the passes
QUESTIONS_PER_SCENE = 11
SHOWN = ("uniform", "downsample", "tome", "flowcut", "fastv", "pyramiddrop", "dpvr-lf")  # methods in the pictures


def parser() -> argparse.ArgumentParser:
    out = Parser(prog="python -m vtprune.cli.quickstart", description=__doc__)
    out.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="easy-VQA questions per row (default: what takes about four minutes in all)",
    )
    out.add_argument(
        "--scenes",
        type=positive,
        metavar="N",
        help="generated scenes per row, about 11 questions each (default: a tenth of the samples)",
    )
    out.add_argument(
        "--budgets",
        type=fractions,
        default=list(BUDGETS),
        help="fractions of the dense effective tokens (default 0.5,0.25)",
    )
    out.add_argument("--seeds", type=positive, default=3, help="runs of random methods (default 3)")
    out.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER")
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")
    model_options(out)
    return out


def pictures(
    model: Any,
    processor: Any,
    samples: Sequence[Any],
    methods: Sequence[str],
    budget: float,
    options: Mapping[str, Any],
) -> list[tuple[str, Any]]:
    """``(label, picture)`` for each of ``methods`` on each of ``samples``, with the answer it led to."""
    out = []
    for sample in samples:
        image = sample.picture()
        inputs = prepare(processor, [image], [sample.question]).to(model.device, model.dtype)
        seen = model_view(processor, image)
        x, y = seen.width / image.width, seen.height / image.height
        boxes = [(a * x, b * y, c * x, d * y) for a, b, c, d in sample.boxes]
        for name in methods:
            how = options.get(name, {"effective_tokens": budget})
            try:
                with vtprune.attach(model, name, **how) as handle:
                    answer = generate(model, processor, inputs)[0]
                    report = handle.report()
            except VtpruneError:  # the table says why
                continue
            label = (
                f"{name} ({report.effective_tokens:.0f} effective tokens): {sample.question}  answer: {answer}  "
                f"(right: {sample.answer})"
            )
            out.append((label, token_picture(seen, report, 0, boxes=boxes, panel=192)))
    return out


def run(args: argparse.Namespace) -> int:
    """The whole tour. Raises :class:`VtpruneError` for what the user can put right."""
    args.out.mkdir(parents=True, exist_ok=True)
    page, sheet, data = (args.out / f"quickstart.{kind}" for kind in ("html", "png", "json"))
    for path in (page, sheet, data):
        output(path)
    methods = [name for name in vtprune.methods() if bench.of_pictures(name)]
    trained = demo_model.branch() if args.model is None else None
    fixed = [] if trained is None else [(trained, trained.source)]
    passes = bench.runs(methods, args.budgets, args.seeds, len(fixed))
    easy = args.samples or max(24, WORK // passes // 2)
    scenes = args.scenes or max(2, round(easy / QUESTIONS_PER_SCENE))
    model, processor = models.load(args)
    samples = easy_vqa_samples(easy) + scenes_samples(scenes)
    print(f"{easy} easy-VQA questions and {len(samples) - easy} questions about {scenes} scenes; {passes} passes")
    command = f"python -m vtprune.cli.quickstart --samples {easy} --scenes {scenes}"
    result = _measure(args, model, processor, samples, methods, fixed, passes, command)
    table = text.cells(result, abilities=False)
    print(text.text(table))
    print(
        "prefill x: pruned over dense in turns [least, most of the rounds]; noise: they tell nothing; ?: slower for "
        "less work, unexplained"
    )
    own = {"dpvr-lf": trained.stages[-1].options} if trained is not None else {}
    shown = [m for m in SHOWN if m in methods]
    drawn = pictures(model, processor, [samples[0], _busiest(samples)], shown, args.budgets[0], own)
    text.save(result, data)
    web.write(sheet, contact_sheet(drawn))
    _write_page(page, result, table, drawn)
    print(f"wrote {page}, {sheet}, {data}")
    return 0


def _measure(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    fixed: Sequence[tuple[Recipe, str]],
    passes: int,
    command: str,
) -> dict[str, Any]:
    """The table of all methods; ``command`` is what it says of how it was made."""
    from tqdm import tqdm

    with tqdm(total=len(samples) * passes, unit="question", disable=None) as bar:
        return bench.table(
            model,
            processor,
            samples,
            methods,
            args.budgets,
            seeds=args.seeds,
            seed=args.seed,
            batch=32,
            timing=3,
            cpu_time=model.device.type == "cpu",
            fixed=fixed,
            progress=bar.update,
            started=bar.set_description,
            command=command,
        )


def _busiest(samples: Sequence[Sample]) -> Sample:
    """The question about a scene's attributes or places that has the most to look at."""
    return max(
        (s for s in samples if s.set == "scenes" and s.ability in ("attribute", "location")),
        key=lambda s: s.question.count("sign") + len(s.boxes),
    )


def _write_page(
    path: Path, result: Mapping[str, Any], table: Sequence[Sequence[str]], drawn: Sequence[tuple[str, Any]]
) -> None:
    """The result as one page: how it was made, the table, where tokens are kept, and the pictures of ``drawn``."""
    kept = text.kept_per_row(result)
    figures = [("Where tokens are kept: image rows, all questions", row_bias_figure(kept))] if kept else []
    about, versions = result["device"], ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    facts = f"{result['command']} | {about['name']}, {about['threads']} threads, {about['dtype']} | {versions}"
    timer = "CPU time of one thread" if result["timer"] == "CPU" else "time"
    intro = (
        f"Every method at equal effective tokens (the mean over language-model layers). Prefill x: {timer} of a "
        "prefill divided by dense, in turns, with the least and most of its rounds; noise: they tell nothing; ?: "
        "slower for less work, which neither own code nor noise explains."
    )
    web.html_report(table, [*figures, *drawn], path, title="vtprune quickstart", intro=intro, facts=facts)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 only on success; see :func:`vtprune.cli.main.main` for the other codes."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 2
    return guarded(run, args)


if __name__ == "__main__":
    raise SystemExit(main())
