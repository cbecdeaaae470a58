"""The command line: ``vtprune COMMAND``, see ``--help``. Model libraries are loaded by the commands that need a
model."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import vtprune
from vtprune.demos import command
from vtprune.models.base import ADAPTERS

from ..core.planning import load_recipe
from ..core.recipes import RECIPES
from ..core.registry import Registry
from ..core.types import VtpruneError
from ..data import scenes
from ..inputs import demo_model
from ..inputs.chats import generate, prepare
from ..inputs.images import open_image
from ..lmms import evaluate
from ..measure import analyze, bench, text
from ..measure import samples as samples_module
from ..methods.base import METHODS
from ..show import page, pictures, theatre
from ..train import dpvr_lf
from ..version import __version__
from . import doctor, options
from .errors import Parser, guarded
from .options import (
    chosen_options,
    folder,
    fractions,
    key_value,
    model_options,
    output,
    overrides,
    positive,
    recipe_options,
    show,
    words,
)


def cmd_methods(args: argparse.Namespace) -> int:
    names = vtprune.methods(args.pattern)
    if not names and not set("*?[") & set(args.pattern):
        vtprune.describe(args.pattern)  # raises, naming close matches
    infos = [vtprune.describe(n) for n in names]
    if args.json:
        entries = []
        for i in infos:
            needs = {kind: sorted(n) for kind, n in i.needs.items()}
            facts = {"name": i.name, "paper": i.paper, "idea": i.idea, "sites": i.kinds, "needs": needs, "keep": i.keep}
            source = {"distribution": METHODS.distribution(i.name)}
            entries.append({**facts, "options": i.options, "help": i.option_help, "score": i.score, **source})
        print(json.dumps(entries, indent=1))
        return 0
    rows = [[i.name, ", ".join(i.kinds), "-" if i.keep is None else f"{i.keep:.3g}", i.paper, i.idea] for i in infos]
    show(_with_distributions(METHODS, [["method", "sites", "keep", "paper", "idea"], *rows]))
    if len(infos) == 1:
        print(f"\nranks by: {infos[0].score or 'nothing'}\n")
        show(
            [
                ["option", "default", "meaning"],
                *([n, json.dumps(d), infos[0].option_help[n]] for n, d in infos[0].options.items()),
            ]
        )
    return 0


def cmd_recipes(args: argparse.Namespace) -> int:
    single = not set("*?[") & set(args.pattern)
    names = [args.pattern] if single else vtprune.recipes(args.pattern)
    found = [RECIPES.get(n) for n in names]
    if args.json:
        listed = [
            {**r.to_dict(), "key": r.key(), "distribution": RECIPES.distribution(n)}
            for n, r in zip(names, found, strict=True)
        ]
        print(found[0].to_json() if single else json.dumps(listed, indent=1))
        return 0
    rows = [[n, " + ".join(s.method for s in r.stages), r.source] for n, r in zip(names, found, strict=True)]
    show(_with_distributions(RECIPES, [["recipe", "stages", "source"], *rows]))
    return 0


def cmd_adapters(args: argparse.Namespace) -> int:
    names = vtprune.adapters(args.pattern) if set("*?[") & set(args.pattern) else [args.pattern]
    found = [(n, ADAPTERS.get(n).idea) for n in names]
    if args.json:
        listed = [{"name": n, "idea": idea, "distribution": ADAPTERS.distribution(n)} for n, idea in found]
        print(json.dumps(listed, indent=1))
        return 0
    show(_with_distributions(ADAPTERS, [["family", "models"], *([n, idea] for n, idea in found)]))
    return 0


def _with_distributions(registry: Registry, table: list[list[str]]) -> list[list[str]]:
    """``table``, whose rows below the head begin with a registered name, with a column that says which distribution
    each comes from, if any of them comes from a plug-in."""
    head, *rows = table
    sources = [registry.distribution(row[0]) for row in rows]
    if not any(sources):
        return table
    return [[*head, "distribution"], *([*row, source or "vtprune"] for row, source in zip(rows, sources, strict=True))]


def cmd_run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)
    image, picture, chosen = open_image(args.image), output(args.picture, ".png", ".html"), overrides(args)
    model, processor = options.load(args)
    inputs = prepare(processor, [image], [args.question]).to(model.device, model.dtype)
    dense = generate(model, processor, inputs, args.max_new_tokens)[0]
    with vtprune.attach(model, recipe, **chosen) as handle:
        pruned = generate(model, processor, inputs, args.max_new_tokens)[0]
        page = handle.report()
    views, missing = ([], "") if picture is None else pictures.views_or_blank(processor, inputs, page)
    if missing:  # the answers are there all the same
        print(f"vtprune: note: the picture is left out: {missing}", file=sys.stderr)
    if picture is not None and picture.suffix.lower() == ".html":
        scenes = [
            theatre.scene(theatre.dense(page), views, title=f"dense: {dense}"),
            theatre.scene(page, views, title=f"{handle.recipe.name}: {pruned}"),
        ]
        facts = (
            f"{args.image.name} | vtprune {_version()} | {args.model or 'the bundled VLM'}, {args.device}, {args.dtype}"
        )
        pictures.write(picture, theatre.page(scenes, args.question, facts).encode())
    elif picture is not None:
        pictures.write(picture, pictures.sheet(views, page, caption=args.question))
    if args.json:
        print(json.dumps({"question": args.question, "dense": dense, "pruned": pruned, **page.to_dict()}))
        return 0
    visual, effective = page.visual_tokens[0], page.effective_tokens
    share = [effective / visual, page.flops / page.dense_flops, page.kv_bytes / page.dense_kv_bytes]
    rows = [
        ["recipe", page.recipe],
        ["question", args.question],
        ["answer, dense", dense],
        ["answer, pruned", pruned],
    ]
    rows += [[f"{s.site} {s.method}", f"{s.tokens_in[0]} -> {s.tokens_out[0]} visual tokens"] for s in page.stages]
    rows += [["tokens per layer", " ".join(map(str, page.layer_tokens[0]))]]
    rows += [["effective tokens", f"{effective:.1f} of {visual} ({100 * share[0]:.1f} %)"]]
    rows += [["prefill FLOPs", f"{page.flops / 1e9:.3f} of {page.dense_flops / 1e9:.3f} G ({100 * share[1]:.1f} %)"]]
    rows += [
        ["KV cache", f"{page.kv_bytes / 1024:.1f} of {page.dense_kv_bytes / 1024:.1f} KiB ({100 * share[2]:.1f} %)"]
    ]
    rows += [["picture", str(picture)]] if picture is not None else []
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


def cmd_bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    for path in args.out:
        output(path, ".json", ".md")
    output(args.rows, ".png")
    unknown = [name for name in args.abilities if name not in samples_module.SETS]
    if unknown or not args.abilities:
        raise VtpruneError(
            f"unknown question set {', '.join(unknown) or '(none)'!r}; there are {', '.join(samples_module.SETS)}"
        )
    names = vtprune.methods() if args.methods is None else args.methods
    methods = [load_recipe(n) for n in names]
    if not args.no_baselines:
        methods += [load_recipe(n) for n in bench.baselines() if n not in {m.name for m in methods}]
    chosen = dict.fromkeys((m.name for m in methods[: len(names)]), chosen_options(args.option, "seed", "budgets"))
    if args.cpu_time and args.device != "cpu":
        raise VtpruneError("--cpu-time is for --device cpu")
    runs = folder(args.results and args.results / "runs")
    trained = demo_model.branch() if args.model is None and any(m.name == "dpvr-lf" for m in methods) else None
    fixed = [] if trained is None else [(trained, trained.source)]
    model, processor = options.load(args)
    samples = [s for name in args.abilities for s in samples_module.SETS[name](args.samples)]
    with tqdm(
        total=len(samples) * bench.runs(methods, args.budgets, args.seeds, len(fixed)), unit="question", disable=None
    ) as bar:
        result = bench.table(
            model,
            processor,
            samples,
            methods,
            args.budgets,
            seeds=args.seeds,
            seed=args.seed,
            batch=args.batch,
            timing=args.timing,
            cpu_time=args.cpu_time,
            options=chosen,
            fixed=fixed,
            folder=runs,
            progress=bar.update,
            started=bar.set_description,
            command="vtprune " + " ".join(args.argv),
        )
    own = [args.results / f"bench.{kind}" for kind in ("json", "md")] if args.results else []
    for path in (*own, *args.out):
        text.save(result, path)
    if args.rows is not None and (kept := text.kept_per_row(result)):
        pictures.write(args.rows, pictures.row_bias_figure(kept))
    if args.json:
        print(json.dumps(result))
        return 0
    show(text.cells(result))
    if all("error" in r for r in result["rows"][1:]):
        raise VtpruneError("no method could be measured at these budgets; the notes say why")
    return 0


def cmd_analyze(args: argparse.Namespace) -> int:
    return analyze.run(args)


def cmd_verify(args: argparse.Namespace) -> int:
    from PIL import Image

    recipe = load_recipe(args.recipe)
    images = (
        [open_image(args.image)] * 2
        if args.image
        else [Image.fromarray(scenes.scene(i, "test").image) for i in range(2)]
    )
    model, processor = options.load(args)
    inputs = prepare(processor, images, [args.question, "what color is it ?"]).to(model.device, model.dtype)
    page = vtprune.verify(model, recipe, dict(inputs), **overrides(args))
    if args.json:
        print(json.dumps(page.to_dict(), indent=1))
    else:
        state = {True: "ok", False: "FAILED", None: "-"}
        show([["check", "result", "detail"], *([c.name, state[c.passed], c.detail] for c in page.checks)])
        print(f"\n{page.recipe}: {'passed' if page.passed else 'FAILED'}")
    return 0 if page.passed else 1


def cmd_doctor(args: argparse.Namespace) -> int:
    return doctor.run(args)


def cmd_train(args: argparse.Namespace) -> int:
    return dpvr_lf.run(args)


def cmd_eval(args: argparse.Namespace) -> int:
    return evaluate.run(args)


def cmd_demo(args: argparse.Namespace) -> int:
    return command.run(args)


def cmd_report(args: argparse.Namespace) -> int:
    return page.run(args)


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = Parser(
        prog="vtprune",
        description="Visual-token pruning, merging and routing inside unmodified multimodal models and vision transformers.",  # noqa: E501
    )
    top.add_argument("--version", action="version", version=f"vtprune {_version()}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, action: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        found = sub.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        found.set_defaults(action=action)
        found.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return found

    lists = (
        ("methods", cmd_methods, "list the methods; one name also lists its options"),
        ("recipes", cmd_recipes, "list the named recipes; one name with --json prints a recipe file"),
        ("adapters", cmd_adapters, "list the model families"),
    )
    for name, action, help in lists:
        p = add(name, action, help)
        p.add_argument("pattern", nargs="?", default="*", help="only names that match, e.g. 'py*'")
        p.add_argument("--json", action="store_true")

    p = add("run", cmd_run, "answer a question about an image, dense and pruned")
    p.add_argument("--image", type=Path, required=True)
    p.add_argument("--question", required=True)
    p.add_argument(
        "--picture",
        type=Path,
        metavar="OUT",
        help="the tokens that each stage kept: .png a strip of pictures, .html an interactive page",
    )
    p.add_argument("--max-new-tokens", type=positive, default=16)
    p.add_argument("--json", action="store_true")
    model_options(p)
    recipe_options(p)

    p = add("bench", cmd_bench, "compare methods at equal effective tokens")
    p.add_argument(
        "--abilities",
        type=words,
        default=["scenes"],
        metavar="SETS",
        help="question sets: scenes, easy-vqa, or both with a comma (default scenes)",
    )
    p.add_argument(
        "--samples",
        type=positive,
        default=100,
        metavar="N",
        help="questions of easy-VQA, or scenes of about 11 questions each (default 100)",
    )
    p.add_argument(
        "--budgets",
        type=fractions,
        default=[0.75, 0.5, 0.25, 0.11],
        help="fractions of the dense effective tokens (default 0.75,0.5,0.25,0.11)",
    )
    p.add_argument(
        "--methods",
        type=words,
        metavar="NAMES",
        help="recipes, with commas (default: every method); the baselines are always added",
    )
    p.add_argument("--no-baselines", action="store_true", help="leave the baselines out")
    what = "an option for all of them, or positions= or per=, value as JSON; repeatable"
    p.add_argument("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help=what)
    p.add_argument("--seeds", type=positive, default=3, help="runs of random methods (default 3)")
    p.add_argument("--batch", type=positive, default=16)
    p.add_argument("--timing", type=int, default=5, help="repeats of the prefill measurement (default 5; 0: none)")
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="time the prefill in one thread's CPU time: for a CPU that others use as well",
    )
    p.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the result: everything as .json, tables as .md; repeatable",
    )
    p.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="one JSON per run in FOLDER/runs, bench.json and bench.md; what is there is not done again",
    )
    p.add_argument(
        "--rows",
        type=Path,
        metavar="FILE.png",
        help="heat map of the image rows where tokens are kept, at the budget nearest to 25 %%",
    )
    p.add_argument("--json", action="store_true")
    model_options(p)

    analyze.add_arguments(
        add("analyze", cmd_analyze, "say whether recipes pay on a model and this device, and from which budget on")
    )

    p = add("verify", cmd_verify, "check the correctness contract on a model; exit code 1 if a check fails")
    p.add_argument("--image", type=Path, help="default: two generated pictures")
    p.add_argument("--question", default="how many red shapes are there ?")
    p.add_argument("--json", action="store_true")
    model_options(p)
    recipe_options(p)

    doctor.add_arguments(
        add(
            "doctor",
            cmd_doctor,
            "say which releases are installed and tested, and which families pass; exit code 1 if something fails",
        )
    )

    p = add("eval", cmd_eval, "run lmms-eval with recipes attached, resumable, one JSON per run")
    evaluate.add_arguments(p)

    p = add("train", cmd_train, "train what a method needs trained")
    kinds = p.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    branch = kinds.add_parser("dpvr-lf", help="the side branch of DPVR-LF")
    branch.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    dpvr_lf.add_arguments(branch)

    p = add("demo", cmd_demo, "open a page on which to ask, compare recipes and watch the tokens")
    command.add_arguments(p)
    model_options(p)

    page.add_arguments(add("report", cmd_report, "show result files as one self-contained page with figures"))
    return top


def _version() -> str:
    return __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 only on success, 1 for an error, 2 for a wrong call, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(given)
    except SystemExit as e:  # help and version end with 0
        return e.code if isinstance(e.code, int) else 2
    args.argv = given
    if not args.debug:
        warnings.filterwarnings("ignore")
    return guarded(args.action, args)
