"""The command line: ``vtprune COMMAND``, see ``--help``. Model libraries are loaded by the commands that need a
model."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .types import VtpruneError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
DTYPES = ("float32", "float16", "bfloat16")


def fail(message: object, code: int) -> int:
    """One line on stderr."""
    print("vtprune: error: " + " ".join(str(message).split()), file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(fail(f"{message} (see {self.prog} --help)", 2))


def guarded(action: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command. What goes wrong becomes one line and code 1; ``--debug`` gives the traceback."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):  # what the locale cannot show is no reason to lose an answer
        stream.reconfigure(errors="backslashreplace")
    try:
        code = action(args)
        stream.flush()
        return code
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away
        _mute(stream)
        return 1
    except BaseException as e:
        if isinstance(e, Exception) and not args.debug:
            _mute(stream)
            expected = isinstance(e, VtpruneError | OSError)
            return fail(
                e
                if expected
                else f"unexpected {type(e).__name__}: {str(e)[:500] or 'no reason given'} (--debug shows where)",
                1,
            )
        raise


def _mute(stream: TextIO) -> None:
    """What is left in ``stream`` goes nowhere if it cannot be written: Python would try again at its end and
    complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------------------------------------
# options


def keep_value(text: str) -> int | float:
    """``64`` is a number of tokens, ``0.25`` a fraction."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens (64) nor a fraction (0.25)") from None


def key_value(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``; the value is JSON, or else a word."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def fractions(text: str) -> list[float]:
    """``0.5,0.25``."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of fractions such as 0.5,0.25") from None
    if any(not 0 < f <= 1 for f in found):
        raise argparse.ArgumentTypeError(f"budgets are fractions in (0, 1], got {text!r}")
    return list(dict.fromkeys(found))


def seed_value(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def output(path: Path | None, *endings: str) -> Path | None:
    """``path`` if a file can be put there, told before the long work, and its name ends in one of ``endings`` (none:
    anyhow). Raises :class:`VtpruneError`."""
    if path is not None and endings and path.suffix.lower() not in endings:
        raise VtpruneError(f"cannot write {path}: its name ends in {' or '.join(endings)}, which says what is written")
    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        what = (
            "is a folder"
            if path.is_dir()
            else "lies in a folder that cannot be written"
            if path.parent.is_dir()
            else "lies in a folder that does not exist"
        )
        raise VtpruneError(f"cannot write {path}: it {what}")
    return path


def folder(path: Path | None) -> Path | None:
    """``path``, made if need be. Raises :class:`VtpruneError` if it cannot be written."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise VtpruneError(f"cannot make the folder {path}: {e.strerror or e}") from e
    if not os.access(path, os.W_OK):
        raise VtpruneError(f"the folder {path} cannot be written")
    return path


def model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder of a model and its processor, or a hub id (default: the bundled VLM, no network)",
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    group.add_argument("--dtype", default="float32", choices=DTYPES)
    group.add_argument("--seed", type=seed_value, default=0, help="for methods that draw at random (default 0)")


def recipe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add(
        "--recipe",
        default="pyramiddrop",
        metavar="NAME_OR_FILE",
        help="a name ('vtprune recipes') or a .json / .yaml file (default %(default)s)",
    )
    add("--keep", type=keep_value, metavar="N_OR_FRACTION", help="visual tokens left after the last cut: 64, or 0.25")
    what = "an option of the last method, or positions= or per=, value as JSON; repeatable"
    add("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help=what)


def chosen_options(given: Sequence[tuple[str, Any]], *own: str) -> dict[str, Any]:
    """What ``--option`` gave, by name: options of methods, of recipes and of ``attach`` alike. Raises
    :class:`VtpruneError` for one that is given twice and for those that are ``own`` options of the command."""
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise VtpruneError(f"--option {name}= is given {names.count(name)} times")
        if name in own:
            raise VtpruneError(f"--option {name}=: this is --{name} here")
        if name in ("model", "recipe", "self"):
            raise VtpruneError(f"there is no option {name!r}")
    return dict(given)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for ``attach``."""
    return {
        "seed": args.seed,
        **({} if args.keep is None else {"keep": args.keep}),
        **chosen_options(args.option, *["keep"] * (args.keep is not None)),
    }


def is_local(model: str | None) -> bool:
    """Whether ``--model`` names a folder (or the bundled VLM) and no hub id. Raises :class:`VtpruneError` if it can be
    neither."""
    if model is None or Path(model).is_dir():
        return True
    if not HUB_ID.fullmatch(model):
        raise VtpruneError(f"no such model folder: {model}")
    return False


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """``(model, processor)``. A folder is read without a network, anything else is a hub id (``HF_HUB_OFFLINE=1``: as
    cached). :class:`VtpruneError` for a device that is not there and for a folder or hub id that holds no such model or
    cannot be reached."""
    import torch

    import vtprune

    try:
        device = torch.device(args.device)
    except RuntimeError as e:
        raise VtpruneError(f"unknown device {args.device!r}") from e
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise VtpruneError(
            f"device {args.device!r} is not available here; there are cpu and {torch.cuda.device_count()} CUDA devices"
        )
    local = is_local(args.model)
    from transformers.utils import logging

    if local:
        logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        return vtprune.load_demo_model(args.device, dtype)
    from . import loading

    model, processor = loading.load(args.model, dtype=dtype, local=local)
    with loading.told(f"cannot move {args.model} to {device}"):
        return model.to(device), processor


def show(table: Sequence[Sequence[str]]) -> None:
    from .bench import text

    print(text(table))


# --------------------------------------------------------------------------------------------------------------
# commands


def cmd_methods(args: argparse.Namespace) -> int:
    import vtprune

    names = vtprune.methods(args.pattern)
    if not names and not set("*?[") & set(args.pattern):
        vtprune.describe(args.pattern)  # raises, naming close matches
    infos = [vtprune.describe(n) for n in names]
    if args.json:
        entries = []
        for i in infos:
            needs = {kind: sorted(n) for kind, n in i.needs.items()}
            facts = {"name": i.name, "paper": i.paper, "idea": i.idea, "sites": i.kinds, "needs": needs, "keep": i.keep}
            entries.append({**facts, "options": i.options, "help": i.option_help, "score": i.score})
        print(json.dumps(entries, indent=1))
        return 0
    rows = [[i.name, ", ".join(i.kinds), "-" if i.keep is None else f"{i.keep:.3g}", i.paper, i.idea] for i in infos]
    show([["method", "sites", "keep", "paper", "idea"], *rows])
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
    import vtprune

    from .recipes import RECIPES

    single = not set("*?[") & set(args.pattern)
    found = [RECIPES.get(n) for n in ([args.pattern] if single else vtprune.recipes(args.pattern))]
    if args.json:
        print(found[0].to_json() if single else json.dumps([{**r.to_dict(), "key": r.key()} for r in found], indent=1))
        return 0
    show([["recipe", "stages", "source"], *([r.name, " + ".join(s.method for s in r.stages), r.source] for r in found)])
    return 0


def cmd_adapters(args: argparse.Namespace) -> int:
    import vtprune
    from vtprune.models.base import ADAPTERS

    names = vtprune.adapters(args.pattern) if set("*?[") & set(args.pattern) else [args.pattern]
    found = [(n, ADAPTERS.get(n).idea) for n in names]
    if args.json:
        print(json.dumps([{"name": n, "idea": idea} for n, idea in found], indent=1))
        return 0
    show([["family", "models"], *([n, idea] for n, idea in found)])
    return 0


def cmd_run(args: argparse.Namespace) -> int:
    import vtprune

    from . import render, theatre
    from .answer import generate, open_image, prepare
    from .attach import load_recipe

    recipe = load_recipe(args.recipe)
    image, picture, options = open_image(args.image), output(args.picture, ".png", ".html"), overrides(args)
    model, processor = load(args)
    inputs = prepare(processor, [image], [args.question]).to(model.device, model.dtype)
    dense = generate(model, processor, inputs, args.max_new_tokens)[0]
    with vtprune.attach(model, recipe, **options) as handle:
        pruned = generate(model, processor, inputs, args.max_new_tokens)[0]
        report = handle.report()
    views, missing = ([], "") if picture is None else render.views_or_blank(processor, inputs, report)
    if missing:  # the answers are there all the same
        print(f"vtprune: note: the picture is left out: {missing}", file=sys.stderr)
    if picture is not None and picture.suffix.lower() == ".html":
        scenes = [
            theatre.scene(theatre.dense(report), views, title=f"dense: {dense}"),
            theatre.scene(report, views, title=f"{handle.recipe.name}: {pruned}"),
        ]
        facts = (
            f"{args.image.name} | vtprune {_version()} | {args.model or 'the bundled VLM'}, {args.device}, {args.dtype}"
        )
        render.write(picture, theatre.page(scenes, args.question, facts).encode())
    elif picture is not None:
        render.write(picture, render.sheet(views, report, caption=args.question))
    if args.json:
        print(json.dumps({"question": args.question, "dense": dense, "pruned": pruned, **report.to_dict()}))
        return 0
    visual, effective = report.visual_tokens[0], report.effective_tokens
    share = [effective / visual, report.flops / report.dense_flops, report.kv_bytes / report.dense_kv_bytes]
    rows = [
        ["recipe", report.recipe],
        ["question", args.question],
        ["answer, dense", dense],
        ["answer, pruned", pruned],
    ]
    rows += [[f"{s.site} {s.method}", f"{s.tokens_in[0]} -> {s.tokens_out[0]} visual tokens"] for s in report.stages]
    rows += [["tokens per layer", " ".join(map(str, report.layer_tokens[0]))]]
    rows += [["effective tokens", f"{effective:.1f} of {visual} ({100 * share[0]:.1f} %)"]]
    rows += [
        ["prefill FLOPs", f"{report.flops / 1e9:.3f} of {report.dense_flops / 1e9:.3f} G ({100 * share[1]:.1f} %)"]
    ]
    rows += [
        ["KV cache", f"{report.kv_bytes / 1024:.1f} of {report.dense_kv_bytes / 1024:.1f} KiB ({100 * share[2]:.1f} %)"]
    ]
    rows += [["picture", str(picture)]] if picture is not None else []
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


def cmd_bench(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    import vtprune

    from . import bench, render
    from .attach import load_recipe
    from .models import _demo

    for path in args.out:
        output(path, ".json", ".md")
    output(args.rows, ".png")
    unknown = [name for name in args.abilities if name not in bench.SETS]
    if unknown or not args.abilities:
        raise VtpruneError(
            f"unknown question set {', '.join(unknown) or '(none)'!r}; there are {', '.join(bench.SETS)}"
        )
    names = vtprune.methods() if args.methods is None else args.methods
    methods = [load_recipe(n) for n in names]
    if not args.no_baselines:
        methods += [load_recipe(n) for n in bench.baselines() if n not in {m.name for m in methods}]
    options = dict.fromkeys((m.name for m in methods[: len(names)]), chosen_options(args.option, "seed", "budgets"))
    if args.cpu_time and args.device != "cpu":
        raise VtpruneError("--cpu-time is for --device cpu")
    runs = folder(args.results and args.results / "runs")
    trained = _demo.branch() if args.model is None and any(m.name == "dpvr-lf" for m in methods) else None
    fixed = [] if trained is None else [(trained, trained.source)]
    model, processor = load(args)
    samples = [s for name in args.abilities for s in bench.SETS[name](args.samples)]
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
            options=options,
            fixed=fixed,
            folder=runs,
            progress=bar.update,
            started=bar.set_description,
            command="vtprune " + " ".join(args.argv),
        )
    own = [args.results / f"bench.{kind}" for kind in ("json", "md")] if args.results else []
    for path in (*own, *args.out):
        bench.save(result, path)
    if args.rows is not None and (kept := bench.kept_per_row(result)):
        render.write(args.rows, render.row_bias_figure(kept))
    if args.json:
        print(json.dumps(result))
        return 0
    show(bench.cells(result))
    if all("error" in r for r in result["rows"][1:]):
        raise VtpruneError("no method could be measured at these budgets; the notes say why")
    return 0


def cmd_analyze(args: argparse.Namespace) -> int:
    from . import analyze

    return analyze.run(args)


def cmd_verify(args: argparse.Namespace) -> int:
    from PIL import Image

    import vtprune

    from .answer import open_image, prepare
    from .attach import load_recipe
    from .data import scenes

    recipe = load_recipe(args.recipe)
    images = (
        [open_image(args.image)] * 2
        if args.image
        else [Image.fromarray(scenes.scene(i, "test").image) for i in range(2)]
    )
    model, processor = load(args)
    inputs = prepare(processor, images, [args.question, "what color is it ?"]).to(model.device, model.dtype)
    report = vtprune.verify(model, recipe, dict(inputs), **overrides(args))
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        state = {True: "ok", False: "FAILED", None: "-"}
        show([["check", "result", "detail"], *([c.name, state[c.passed], c.detail] for c in report.checks)])
        print(f"\n{report.recipe}: {'passed' if report.passed else 'FAILED'}")
    return 0 if report.passed else 1


def cmd_doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(args)


def cmd_train(args: argparse.Namespace) -> int:
    from .train import dpvr_lf

    return dpvr_lf.run(args)


def cmd_eval(args: argparse.Namespace) -> int:
    from .lmms import evaluate

    return evaluate.run(args)


def cmd_demo(args: argparse.Namespace) -> int:
    from vtprune.demos import command

    return command.run(args)


def cmd_report(args: argparse.Namespace) -> int:
    from . import report

    return report.run(args)


# ----------------------------------------------------------------------------------------------------------------
# parser


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

    from . import analyze

    analyze.add_arguments(
        add("analyze", cmd_analyze, "say whether recipes pay on a model and this device, and from which budget on")
    )

    p = add("verify", cmd_verify, "check the correctness contract on a model; exit code 1 if a check fails")
    p.add_argument("--image", type=Path, help="default: two generated pictures")
    p.add_argument("--question", default="how many red shapes are there ?")
    p.add_argument("--json", action="store_true")
    model_options(p)
    recipe_options(p)

    from . import doctor

    doctor.add_arguments(
        add(
            "doctor",
            cmd_doctor,
            "say which releases are installed and tested, and which families pass; exit code 1 if something fails",
        )
    )

    from .lmms import evaluate
    from .train import dpvr_lf

    p = add("eval", cmd_eval, "run lmms-eval with recipes attached, resumable, one JSON per run")
    evaluate.add_arguments(p)

    p = add("train", cmd_train, "train what a method needs trained")
    kinds = p.add_subparsers(dest="what", required=True, metavar="METHOD", parser_class=Parser)
    branch = kinds.add_parser("dpvr-lf", help="the side branch of DPVR-LF")
    branch.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    dpvr_lf.add_arguments(branch)

    from vtprune.demos import command

    from . import report

    p = add("demo", cmd_demo, "open a page on which to ask, compare recipes and watch the tokens")
    command.add_arguments(p)
    model_options(p)

    report.add_arguments(add("report", cmd_report, "show result files as one self-contained page with figures"))
    return top


def _version() -> str:
    from . import __version__

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
