"""``vtprune run``: a question about images or a video, answered dense and pruned."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vtprune

from ..core.paths import output
from ..core.planning import load_recipe
from ..core.report import Report
from ..core.types import VtpruneError
from ..inputs import videos
from ..inputs.chats import generate, image_part, prepare_chats, text_part, video_parts
from ..inputs.images import open_image
from ..inputs.videos import Video
from ..measure.turns import turns
from ..show import pictures, theatre, web
from ..show.views import views_or_blank
from ..version import __version__
from . import models
from .options import model_options, overrides, positive, recipe_options

FRAMES = 8  # of a video


def rounds(text: str) -> int:
    return 0 if text == "0" else positive(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune run``."""
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--image", type=Path, action="append", metavar="FILE", help="repeatable: several, in order")
    shown.add_argument(
        "--video",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a video, an animated picture (GIF, WebP ...), or its frames in order as picture files; a model that "
        "takes no videos sees them as images",
    )
    parser.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help=f"of a video at most so many, evenly spaced (default {FRAMES})",
    )
    parser.add_argument("--question", required=True)
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="OUT",
        help="the tokens that each stage kept: .png a strip of pictures, .html an interactive page",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=16)
    parser.add_argument(
        "--timing",
        type=rounds,
        default=3,
        metavar="N",
        help="rounds of dense and pruned answers in turns that are timed (default %(default)s; 0: none)",
    )
    parser.add_argument("--json", action="store_true")
    model_options(parser)
    recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code; raises :class:`VtpruneError` for what the user can put right."""
    recipe = load_recipe(args.recipe)
    video, images = _seen(args)
    picture, chosen = output(args.picture, ".png", ".html"), overrides(args)
    model, processor = models.load(args)
    parts = [image_part(i) for i in images] if video is None else video_parts(processor, video)
    chat = [{"role": "user", "content": [*parts, text_part(args.question)]}]
    inputs = prepare_chats(processor, [chat]).to(model.device, model.dtype)
    dense = generate(model, processor, inputs, args.max_new_tokens)[0]
    with vtprune.attach(model, recipe, **chosen) as handle:
        pruned = generate(model, processor, inputs, args.max_new_tokens)[0]
        report = handle.report()
    times = {}
    if args.timing:
        times = turns(model, inputs, recipe, chosen, new_tokens=args.max_new_tokens, rounds=args.timing)
    if picture is not None:
        moments = () if video is None else videos.seconds(video)
        views, missing = views_or_blank(processor, inputs, report, frames=video is not None, times=moments)
        if missing:  # the answers are there all the same
            print(f"vtprune: note: drawn without the picture behind the tokens: {missing}", file=sys.stderr)
        if picture.suffix.lower() == ".html":
            titles = (f"dense: {dense}", f"{handle.recipe.name}: {pruned}")
            web.write(picture, _theatre(args, report, views, *titles).encode())
        else:
            web.write(picture, pictures.sheet(views, report, caption=args.question))
    if args.json:
        told = {"question": args.question, "dense": dense, "pruned": pruned, "times": times or None}
        print(json.dumps({**told, **report.to_dict()}))
        return 0
    answers = [("question", args.question), ("answer, dense", dense), ("answer, pruned", pruned)]
    drawn = [("picture", str(picture))] if picture is not None else []
    rows = [("recipe", report.recipe), *answers, *_costs(report), *_times(args, times), *drawn]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


def _seen(args: argparse.Namespace) -> tuple[Video | None, list[Image.Image]]:
    """The video, or the images, that the question is about."""
    if args.video is None:
        if args.frames is not None:
            raise VtpruneError("--frames is about a --video")
        if moving := [str(path) for path in args.image if videos.is_animated(path)]:
            raise VtpruneError(f"{moving[0]} is animated: give it as --video, its frames are all shown then")
        return None, [open_image(path) for path in args.image]
    frames = args.frames or FRAMES
    if len(args.video) == 1:
        return videos.read(args.video[0], frames), []
    if moving := [str(path) for path in args.video if videos.is_animated(path)]:
        raise VtpruneError(f"{moving[0]} is a video of its own: several files are the frames of one, a picture each")
    return videos.of_pictures([open_image(path) for path in args.video], frames), []


def _theatre(args: argparse.Namespace, report: Report, views: Sequence[Any], dense: str, pruned: str) -> str:
    """The interactive page of both runs; ``dense`` and ``pruned`` are their titles."""
    scenes = [
        theatre.scene(theatre.dense(report), views, title=dense),
        theatre.scene(report, views, title=pruned),
    ]
    model = args.model or "the bundled VLM"
    names = [path.name for path in args.video or args.image]
    shown = ", ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])
    facts = f"{shown} | vtprune {__version__} | {model}, {args.device}, {args.dtype}"
    return theatre.page(scenes, args.question, facts)


def _times(args: argparse.Namespace, times: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, and with which clock."""
    if not times:
        return []

    def line(span: Mapping[str, Any]) -> str:
        low, high = span["range"]
        between = f", rounds {low:.2f} to {high:.2f}" if times["rounds"] > 1 else ""
        between += ": within noise" if low < 1 < high else ""
        return f"{span['dense_ms']:.1f} ms dense, {span['pruned_ms']:.1f} ms pruned ({span['ratio']:.2f}x{between})"

    how = f"{times['clock']}, {times['rounds']} round{'s' * (times['rounds'] > 1)} in turns, medians; {args.device}"
    threads = f", {torch.get_num_threads()} thread(s)" if args.device == "cpu" else ""
    return [
        ("first token", line(times["first_token"])),
        ("whole answer", line(times["answer"])),
        ("clock", f"{how}{threads}, {args.dtype}"),
    ]


def _costs(report: Report) -> list[tuple[str, str]]:
    """What each stage kept or left out, and what of the dense model's costs is left."""
    visual, effective = report.visual_tokens[0], report.effective_tokens
    stages = [
        (f"{stage.site} {stage.method}", f"{stage.tokens_in[0]} -> {stage.tokens_out[0]} visual tokens")
        for stage in report.stages
    ]
    if report.skipped and report.skipped[0]:
        stages.append(("left out", " ".join(report.skipped[0])))
    if report.skipped_online and report.skipped_online[0]:
        stages.append(("left out later", " ".join(report.skipped_online[0])))
    flops, dense_flops = report.flops, report.dense_flops
    cache, dense_cache = report.kv_bytes, report.dense_kv_bytes
    return [
        *stages,
        ("tokens per layer", " ".join(map(str, report.layer_tokens[0]))),
        ("effective tokens", f"{effective:.1f} of {visual} ({100 * (effective / visual):.1f} %)"),
        (
            "prefill FLOPs",
            f"{flops / 1e9:.3f} of {dense_flops / 1e9:.3f} G ({100 * (flops / dense_flops):.1f} %)",
        ),
        (
            "KV cache",
            f"{cache / 1024:.1f} of {dense_cache / 1024:.1f} KiB ({100 * (cache / dense_cache):.1f} %)",
        ),
    ]
