"""``vtprune serve``: an OpenAI-compatible server whose model prunes."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vtprune.models.engine.host import release

from ..core.planning import ATTACH_OPTIONS, TARGETS, load_recipe
from ..core.recipe import Recipe
from ..core.solve import solve
from ..core.types import VtpruneError
from ..serving.guard import names
from ..serving.pruner import Pruner
from ..serving.vllm.launch import environment, server_command
from . import models
from .demo import port_number
from .options import engine_recipe, model_options, overrides, positive, recipe_options, words

NOT_VLLM = ("offer", "allow_host", "max_tokens", "max_megabytes", "device")
NEEDED = ("fastapi", "uvicorn", "openai")  # what transformers' own server needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune serve``."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=port_number, default=8000, metavar="N", help="default %(default)s")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which the server is asked, of a proxy say; repeatable",
    )
    add(
        "--offer",
        type=words,
        default=[],
        metavar="NAMES",
        help='further recipes, with commas, that a request may ask for ("recipe": NAME, "keep": NUMBER)',
    )
    add(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="vllm: vLLM's own server with vtprune's plug-in, --recipe for all requests, which may set a budget "
        "(docs/serving.md); what follows '--' is for 'vllm serve'",
    )
    add(
        "--encoded", action="store_true", help="with --engine vllm: take images that vtprune has encoded, and no others"
    )
    add("engine_arguments", nargs="*", metavar="-- ARGUMENTS", help="of 'vllm serve'")
    add("--max-tokens", type=positive, default=1024, metavar="N", help="new tokens of an answer (default %(default)s)")
    add("--max-images", type=positive, default=8, metavar="N", help="pictures in a request (default %(default)s)")
    add("--max-megabytes", type=positive, default=32, metavar="N", help="of a request (default %(default)s)")
    model_options(parser)
    recipe_options(parser)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in NOT_VLLM})


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to end; raises :class:`VtpruneError` for what the user can put right."""
    if args.engine == "vllm":
        return _vllm(args)
    if args.encoded or args.engine_arguments:
        what = "--encoded" if args.encoded else " ".join(args.engine_arguments)
        raise VtpruneError(f"{what} is for --engine vllm")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise VtpruneError(f"serving needs {', '.join(missing)}: pip install 'vtprune[serve]'")
    chosen = overrides(args)
    extra = {name: chosen.pop(name) for name in ATTACH_OPTIONS if name in chosen}
    target = {name: chosen.pop(name) for name in TARGETS if name in chosen}
    first = load_recipe(args.recipe).override(**chosen)
    offered = {name: load_recipe(name) for name in args.offer}
    with _listening(args.host, args.port) as sockets:
        return _serve(args, first, offered, target, extra, sockets)


def _vllm(args: argparse.Namespace) -> int:
    """``vllm serve`` in the place of this process."""
    recipe = None if args.encoded else engine_recipe(args)
    if args.encoded and (args.keep is not None or args.option):
        raise VtpruneError("--encoded: budgets and options are for where images are encoded")
    for name in NOT_VLLM:
        if getattr(args, name) != args.defaults[name]:
            raise VtpruneError(f"--{name.replace('_', '-')} is not known to vLLM's server; its own options follow '--'")
    if find_spec("vllm") is None:
        raise VtpruneError("there is no vLLM in this environment: pip install 'vtprune[vllm]'")
    started = server_command(args.model, args.host, args.port, args.dtype, args.max_images, args.engine_arguments)
    os.environ.update(environment(recipe))
    sys.stdout.flush()
    os.execv(started[0], started)


def _serve(
    args: argparse.Namespace,
    first: Recipe,
    offered: Mapping[str, Recipe],
    target: Mapping[str, Any],
    extra: Mapping[str, Any],
    sockets: list[socket.socket],
) -> int:
    import uvicorn

    try:
        from ..serving.server import Limits, app
    except ImportError as e:
        raise VtpruneError(f"the chat server of transformers {release()} is not the one this library knows: {e}") from e

    model, processor = models.load(args)
    if target:
        first = solve(model, first, **target, **extra)
    pruner = Pruner(model, {first.name: first, **offered}, **extra)
    name = Path(args.model).name if args.model else "vtprune-demo"
    limits = Limits(args.max_megabytes * 1_000_000, args.max_images, args.max_tokens)
    made = app(name, model, processor, pruner, limits, names(args.host, args.allow_host))
    config = uvicorn.Config(made, log_level="warning", timeout_graceful_shutdown=10)
    where = f"http://{args.host}:{args.port}/v1"
    with _quiet_end():
        print(f"{name} with {', '.join(pruner.names)} at {where}; requests are answered one by one", flush=True)
        uvicorn.Server(config).run(sockets)
    pruner.close()
    return 0


@contextmanager
def _listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A socket that is ours before the model is loaded. Raises :class:`VtpruneError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family)
    except OSError as e:
        raise VtpruneError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    with made:
        yield [made]


@contextmanager
def _quiet_end() -> Iterator[None]:
    """uvicorn sends itself again the signal that ended it; that is no error here."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
