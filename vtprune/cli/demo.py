"""``vtprune demo``: its options, and starting the model and the page side by side."""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import vtprune
from vtprune.demos import TRAINED

from ..core.errors import suggestion
from ..core.ledger import UndoLedger
from ..core.planning import FILES
from ..core.recipes import offer
from ..core.types import VtpruneError
from ..inputs.demo_model import bundled
from ..inputs.models import is_local
from ..serving.guard import LOCAL
from .options import model_options

SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported
ENDS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows knows no SIGHUP


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of ``vtprune demo``."""
    add = parser.add_argument
    add("--port", type=port_number, metavar="N", help="default: the first free one from 7860 on")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default %(default)s: this machine only); 0.0.0.0 lets everybody in who reaches it",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which browsers reach the demo, of a proxy say; repeatable",
    )
    add(
        "--recipe",
        metavar="NAME_OR_FILE",
        help="of the right side, to begin with (default flowcut where the model takes it; 'vtprune recipes'); a .json "
        "/ .yaml file is offered under its own name",
    )
    add(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="result files (.json of bench, analyze ...) for the tab that draws them; they can be uploaded as well",
    )
    model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command until it is interrupted: 0. Raises :class:`VtpruneError` for what the user can put right, and
    when the model's process has ended."""
    _check(args)
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    from vtprune.demos.worker import Worker

    gc.disable()  # imports leave no garbage, and looking for it takes a fifth of their time
    worker = Worker(args.model, args.device, args.dtype)
    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
            # tidies up as Ctrl-C does; not in the worker, forked above
            signal.signal(number, signal.default_int_handler)
    folder = tempfile.TemporaryDirectory(prefix="vtprune-demo-")
    # nobody else reads it, and it goes with the demo
    os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(folder.name) / "uploads"))
    try:
        _serve(worker, Path(folder.name), args)
    except KeyboardInterrupt:
        return 0
    finally:
        for number in ENDS:  # a second one must not leave half of it behind
            signal.signal(number, signal.SIG_IGN)
        worker.close()
        folder.cleanup()


def _check(args: argparse.Namespace) -> None:
    """Raises :class:`VtpruneError` for what can be told before anything is started."""
    if find_spec("gradio") is None:
        raise VtpruneError("the demo needs gradio: pip install 'vtprune[demo]'")
    if args.results is not None and not args.results.is_dir():
        raise VtpruneError(f"no such folder: {args.results}")
    if args.recipe is not None and args.recipe.endswith(FILES):
        args.recipe = offer(args.recipe)
    if args.recipe is not None and args.recipe not in (known := ("dense", TRAINED, *vtprune.recipes())):
        hint = suggestion(args.recipe, known)
        raise VtpruneError(f"unknown recipe {args.recipe!r}; {hint}{' ' * bool(hint)}there are {', '.join(known)}")
    if args.model is None:
        bundled()  # says now that it is not installed
    is_local(args.model)  # says now what can be neither a folder nor a hub id
    if args.port is not None:
        refuse_taken(args.host, args.port)


def _serve(worker: Any, folder: Path, args: argparse.Namespace) -> NoReturn:
    """Shows the page, and starts the model's process again whenever it ends. Raises :class:`VtpruneError` when it ends
    before its model is loaded."""
    with without_stubs():
        from vtprune.demos import app

    page = app.build(worker, folder, recipe=args.recipe, seed=args.seed, results=args.results)
    url = app.launch(page, worker, args.host, args.port, args.allow_host)
    gc.enable()
    if args.host not in LOCAL:
        print(f"vtprune demo: everybody who reaches {args.host} can use this model", file=sys.stderr)
    print(f"vtprune demo: {url} (Ctrl-C ends it)", flush=True)
    try:
        worker.desk.about()  # raises what loading raised
        while True:
            print("vtprune demo: the model is loaded", flush=True)
            print(f"vtprune demo: {worker.wait()}; it is being started again", file=sys.stderr, flush=True)
            worker.restart()
    except (EOFError, ConnectionError):  # it ended while it loaded
        why = worker.wait()
    print(f"vtprune demo: {why}", file=sys.stderr, flush=True)
    time.sleep(app.LINGER)  # every page is told
    raise VtpruneError(f"{why}; start vtprune demo again")


@contextmanager
def without_stubs() -> Iterator[None]:
    """Gradio parses its components' sources to write .pyi stubs whenever it is imported, half of its time; it leaves
    out classes without a source file."""

    def getfile(thing: Any) -> str:
        if getattr(thing, "__module__", "").partition(".")[0] == "gradio":
            raise OSError
        return stock(thing)

    ledger, stock = UndoLedger(), inspect.getfile
    ledger.replace(inspect, "getfile", getfile)
    try:
        yield
    finally:
        ledger.undo()


def refuse_taken(host: str, port: int) -> None:
    """Raises :class:`VtpruneError` if nobody can listen there, before anything heavy is loaded."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as e:
        raise VtpruneError(f"cannot listen on {host} port {port}: {e.strerror or e}") from e
