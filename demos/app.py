"""The page of ``vtprune demo``: wiring only. The model lives in :mod:`vtprune.demos.worker`'s process, drawing in
:mod:`vtprune.demos.render` and :mod:`vtprune.show.theatre`."""

from __future__ import annotations

import html
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ListFiles
from gradio_client.utils import is_valid_file
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from vtprune.core.ledger import UndoLedger
from vtprune.core.types import VtpruneError
from vtprune.show import page as report
from vtprune.show import theatre
from vtprune.show.figures import accuracy

from .guard import Guard, hashes, names
from .samples import saved
from .worker import NAMES, Worker

SAMPLES = 6
LARGEST_FILE = "20mb"
LONGEST_MESSAGE = 1000  # characters
WAITING = 16  # questions in the queue
BUDGETS = [
    ("its own", "own"),
    ("tokens kept", "keep"),
    ("effective tokens", "effective"),
]  # behind the last cut; averaged over layers, solved
SIDE = ("recipe", "file", "budget", "share", "options", "seed")  # what :meth:`Desk.side` takes
DOWNLOADS = {
    "vtprune.png": "Picture (PNG)",
    "theatre.html": "Theatre (HTML)",
    "repeat.py": "Program (Python)",
    "recipe-a.json": "Recipe A (JSON)",
    "recipe-b.json": "Recipe B (JSON)",
}
SHEET = {"methods.png": "Contact sheet (PNG)", "repeat.py": "Program (Python)"}
TOLD = (
    VtpruneError,
    EOFError,
    ConnectionError,
)  # what the user can put right; the last two: the model's process has ended
GONE = "the model's process has ended; start vtprune demo again"
Files = dict[str, gr.DownloadButton]


def status_html(text: str, done: int | None = None, of: int | None = None) -> str:
    """A line that screen readers tell, with a bar if something can be counted."""
    bar = "" if done is None else f'<progress value="{done}" max="{of}">{done} of {of}</progress> {done} of {of}: '
    return f'<div class="vtp-status" role="status">{bar}{html.escape(text)}</div>'


def _html(value: str = "", **how: Any) -> gr.HTML:
    """HTML with its own style alone."""
    return gr.HTML(value, apply_default_css=False, **how)


def why(e: Exception, *folders: str | Path) -> str:
    """What to tell of one of :data:`TOLD`: without ``folders``, which are the server's affair, not too long, and with
    nothing that a stream cannot carry."""
    text = str(e) if isinstance(e, VtpruneError) else GONE
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(str(folder), "the folder")
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."


def warn(message: str) -> None:
    """A message in the corner of the page, which takes HTML."""
    gr.Warning(html.escape(message))


def served(updates: Callable[[], Iterator[dict[str, Any]]], shown: str | None = None) -> Iterator[dict[str, Any]]:
    """``updates``, what the user can put right as a last one with ``message``, in which the file ``shown`` has no
    folder."""
    try:
        yield from updates()
    except TOLD as e:
        yield {"message": why(e, Path(shown).parent) if shown else why(e)}


def stopped(worker: Worker, request: gr.Request) -> str:
    """Ends what the asking page has running: what to tell about it."""
    try:
        worker.desk.stop(str(request.session_hash))
    except TOLD as e:
        return why(e)
    return "stopped"


def own_upload(component: Any, payload: Any) -> Any:
    """What arrived in a picture's or file's field, as paths. Raises :class:`gradio.Error` for one outside the folder of
    uploads or with the wrong ending: a request made by hand can name any file, and gradio looks only at those that
    carry its mark."""
    if payload is None:
        return None
    if isinstance(payload, ListFiles):
        return [own_upload(component, one) for one in payload]
    if payload.path is None:
        return None
    if not Path(payload.path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):
        raise gr.Error("this file was not uploaded here", print_exception=False)
    kinds = getattr(component, "file_types", None)
    if kinds and not is_valid_file(payload.path, kinds):
        raise gr.Error(
            f"this field takes {' and '.join(k.removeprefix('.') for k in kinds)} files", print_exception=False
        )
    return payload.path


def _upload(make: Any, **how: Any) -> Any:
    """A field for a picture or for files. What arrives is opened where it can be refused with a message; gradio would
    open it on the way."""
    field = make(**how)
    UndoLedger().replace(field, "preprocess", partial(own_upload, field))
    return field


def _choice(make: Any, *args: Any, **how: Any) -> Any:
    """A field with a choice. Whether there is such a choice is told by what takes it: gradio's own message would hold
    what was asked for as HTML."""
    field = make(*args, **how)
    UndoLedger().replace(field, "preprocess", lambda value: value)
    return field


def handed_out(buttons: Files, files: Mapping[str, bytes], folder: str) -> dict[Any, Any]:
    """The download buttons with what there is to download."""
    out = {}
    for name, button in buttons.items():
        path = Path(folder) / name
        if name in files:
            path.write_bytes(files[name])
        out[button] = (
            gr.DownloadButton(value=str(path), interactive=True)
            if name in files
            else gr.DownloadButton(value=None, interactive=False)
        )
    return out


def _downloads(named: Mapping[str, str], prefix: str) -> Files:
    with gr.Row(elem_classes="vtp-downloads"):
        return {
            name: gr.DownloadButton(
                label, interactive=False, size="sm", min_width=120, elem_id=f"{prefix}-{name.replace('.', '-')}"
            )
            for name, label in named.items()
        }


def _side(name: str, recipe: str, seed: int) -> dict[str, Any]:
    """The controls of one side, by the names in :data:`SIDE`."""
    low = name.lower()
    with gr.Column(min_width=260), gr.Group():
        with gr.Row():
            made: dict[str, Any] = {
                "recipe": _choice(
                    gr.Dropdown, [recipe], value=recipe, label=f"{name}: recipe", min_width=140, elem_id=f"recipe-{low}"
                )
            }
            made["budget"] = _choice(
                gr.Dropdown, BUDGETS, value="own", label="Budget", min_width=140, elem_id=f"budget-{low}"
            )
        made["share"] = gr.Slider(
            1, 100, value=25, step=1, label="Share of the tokens, %", visible=False, elem_id=f"share-{low}"
        )
        made["budget"].change(
            lambda kind: gr.Slider(visible=kind != "own"),
            made["budget"],
            made["share"],
            show_progress="hidden",
            api_visibility="private",
        )
        with gr.Accordion("Options, seed, recipe file", open=False):
            made["options"] = gr.Textbox(label="Options of the method, JSON", placeholder='{"layer": 3}', max_lines=3)
            made["seed"] = gr.Number(seed, precision=0, label="Seed, for methods that draw at random")
            made["file"] = _upload(
                gr.File,
                label="Recipe file (JSON) instead of a name",
                file_types=[".json"],
                height=110,
                elem_id=f"file-{low}",
            )
    return made


def _sent(values: Sequence[Any]) -> dict[str, Any]:
    """One side's values in the order of :data:`SIDE`, as :meth:`Desk.side` takes them. Raises :class:`VtpruneError` for
    a file that is no text."""
    given = dict(zip(SIDE, values, strict=True))
    if given["file"] is not None:
        path = Path(given["file"])
        try:
            given["file"] = path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
        except UnicodeDecodeError as e:
            raise VtpruneError(f"{path.name} is no recipe file: it is not text") from e
    return {**given, "share": given["share"] / 100, "seed": int(given["seed"] or 0)}


def build(
    worker: Worker, folder: Path, *, recipe: str = "pyramiddrop", seed: int = 0, results: Path | None = None
) -> gr.Blocks:
    """The page. ``folder`` takes the sample pictures; ``recipe``: side B's to begin with; ``results``: a folder of
    result files for the third tab."""
    with gr.Blocks(title="vtprune", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _html(
            '<header class="vtp-head"><h1>vtprune</h1><p>Ask about a picture and watch which visual tokens the model '
            "keeps, layer by layer.</p></header>"
        )
        about = _html(status_html("the model is being loaded"), elem_id="about")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = _upload(
                    gr.Image,
                    label="Picture: drop, paste or choose one",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=280,
                    buttons=[],
                    elem_id="picture",
                )
                video = _upload(
                    gr.File, label="or a video", file_types=["video"], visible=False, height=110, elem_id="video"
                )
                question = gr.Textbox(label="Question", max_lines=4, elem_id="question")
                truth = gr.Textbox(label="Right answer, if you know it", elem_id="truth")
                _samples(folder, [image, question, truth])
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Watch"):
                    sides = _side_by_side(worker, [image, video, question], recipe, seed)
                with gr.Tab("All methods"):
                    _all_methods(worker, [image, video, question, truth], seed)
                with gr.Tab("Results"):
                    _results(results)
        page.load(
            lambda: _welcome(worker), None, [about, video, *sides], show_progress="hidden", api_visibility="private"
        )

        def leave(request: gr.Request) -> None:
            stopped(worker, request)

        page.unload(leave)
    return page


def _samples(folder: Path, inputs: list[Any]) -> None:
    found = saved(SAMPLES, folder)
    rows = gr.Dataset(
        components=["image"],
        samples=[[path] for path, *_ in found],
        type="index",
        layout="gallery",
        label="Samples",
        elem_id="samples",
    )
    rows.click(lambda number: found[number], rows, inputs, show_progress="hidden", api_visibility="private")


def _welcome(worker: Worker) -> list[Any]:
    """What the page shows once the model is there."""
    try:
        told = worker.desk.about()
    except TOLD as e:
        return [status_html(why(e)), gr.skip(), gr.skip(), gr.skip()]
    refused = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in told["refused"])
    more = (
        f"<details><summary>{len(told['refused'])} recipes that this model does not "
        f"take</summary><ul>{refused}</ul></details>"
        if refused
        else ""
    )
    choices = gr.Dropdown(["dense", *told["recipes"]])
    return [
        f'<div class="vtp-about">{html.escape(told["model"])}{more}</div>',
        gr.File(visible=told["videos"]),
        choices,
        choices,
    ]


# ---------------------------------------------------------------------------------------------------------- side by
# side


def _side_by_side(worker: Worker, asked: list[Any], recipe: str, seed: int) -> list[gr.Dropdown]:
    with gr.Row():
        sides = [_side(name, start, seed) for name, start in zip(NAMES, ("dense", recipe), strict=True)]
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    status = _html(status_html("choose a picture, type a question, ask"), elem_id="status")
    with gr.Row():
        answers = [
            gr.Textbox(label=f"Answer {name}", lines=2, interactive=False, elem_id=f"answer-{name.lower()}")
            for name in NAMES
        ]
    theatre_ = _html(elem_id="theatre")
    metrics = _html(elem_id="metrics")
    buttons = _downloads(DOWNLOADS, "get")
    length = gr.Slider(1, 256, value=32, step=1, label="Length of an answer, at most this many tokens")

    def run(
        request: gr.Request, image: str | None, video: str | None, question: str, length: int, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        def updates() -> Iterator[dict[str, Any]]:
            chosen = [_sent(values[: len(SIDE)]), _sent(values[len(SIDE) :])]
            return worker.desk.ask(str(request.session_hash), video or image, question, chosen, int(length))

        empty: dict[Any, Any] = dict.fromkeys([*answers, theatre_, metrics], "")
        yield {status: status_html("waiting for the model"), **empty, **handed_out(buttons, {}, "")}
        for update in served(updates, video or image):
            if "message" in update:
                warn(update["message"])
                yield {status: status_html(update["message"])}
            elif "text" in update:
                yield {answers[update["side"]]: update["text"]}
            elif "files" in update:
                with tempfile.TemporaryDirectory() as folder:  # gradio takes copies before it asks for more
                    done: dict[Any, Any] = {
                        theatre_: update["theatre"],
                        metrics: update["metrics"],
                        **dict(zip(answers, update["answers"], strict=True)),
                    }
                    yield {
                        status: status_html(update["status"]),
                        **done,
                        **handed_out(buttons, update["files"], folder),
                    }
            else:
                yield {status: status_html(update["status"])}

    given = [*asked, length, *(side[name] for side in sides for name in SIDE)]
    out = [status, *answers, theatre_, metrics, *buttons.values()]
    events = [
        listen(
            run,
            given,
            out,
            concurrency_id="model",
            concurrency_limit=4,
            show_progress="minimal",
            show_progress_on=status,
            api_visibility="private",
        )
        for listen in (ask.click, asked[-1].submit)
    ]
    _stops(worker, stop, status, events)
    return [side["recipe"] for side in sides]


def _stops(worker: Worker, button: gr.Button, status: gr.HTML, events: list[Any]) -> None:
    def stop(request: gr.Request) -> str:
        return status_html(stopped(worker, request))

    button.click(stop, None, status, cancels=events, queue=False, api_visibility="private")
    for event in events:
        event.failure(
            lambda: status_html("this failed; the terminal that runs the demo says why"),
            None,
            status,
            queue=False,
            api_visibility="private",
        )


# ----------------------------------------------------------------------------------------------------------- all
# methods


def _all_methods(worker: Worker, asked: list[Any], seed: int) -> None:
    with gr.Row():
        budget = _choice(
            gr.Dropdown, [b for b in BUDGETS if b[1] != "own"], value="effective", label="Budget", min_width=160
        )
        share = gr.Slider(
            1, 100, value=25, step=1, label="Budget in % of the tokens", min_width=160, elem_id="share-all"
        )
        chance = gr.Number(seed, precision=0, label="Seed", min_width=80)
    with gr.Row():
        go = gr.Button("Compare all methods", variant="primary", elem_id="compare")
        stop = gr.Button("Stop", variant="stop")
    status = _html(status_html("every method answers the same question at the same budget"), elem_id="compare-status")
    cards = _html(elem_id="cards")
    buttons = _downloads(SHEET, "all")

    def run(
        request: gr.Request,
        image: str | None,
        video: str | None,
        question: str,
        truth: str,
        budget: str,
        share: int,
        seed: float | None,
    ) -> Iterator[dict[Any, Any]]:
        def updates() -> Iterator[dict[str, Any]]:
            return worker.desk.compare(
                str(request.session_hash), video or image, question, share / 100, budget, int(seed or 0), truth
            )

        yield {status: status_html("waiting for the model"), cards: "", **handed_out(buttons, {}, "")}
        for update in served(updates, video or image):
            if "message" in update:
                warn(update["message"])
                yield {status: status_html(update["message"])}
                continue
            with tempfile.TemporaryDirectory() as folder:
                ready = handed_out(buttons, update["files"], folder) if "files" in update else {}
                yield {
                    status: status_html(update["status"], update["done"], update["of"]),
                    cards: update["cards"],
                    **ready,
                }

    event = go.click(
        run,
        [*asked, budget, share, chance],
        [status, cards, *buttons.values()],
        concurrency_id="model",
        concurrency_limit=4,
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )
    _stops(worker, stop, status, [event])


# ---------------------------------------------------------------------------------------------------------------
# results

FOLDERS = re.compile(r"(?<![\w.~/+-])(?:/[\w.@~+-]+)+/(?=[\w.@~+-])")


def without_folders(page: str) -> str:
    """A page that leaves out of its text where on the server files lie (commands hold paths)."""
    return re.sub(r">[^<]+<", lambda m: FOLDERS.sub("", m[0]), page)


def _results(folder: Path | None) -> None:
    files = _upload(
        gr.File,
        label="Result files (.json of vtprune bench, ...)",
        file_types=[".json"],
        file_count="multiple",
        height=110,
        elem_id="results-files",
    )
    with gr.Row():
        budget = gr.Slider(
            1, 100, value=25, step=1, label="Budget of the figures that show one, % (the nearest is taken)"
        )
        cost = _choice(gr.Radio, [("effective tokens", "tokens"), ("FLOPs", "flops")], value="tokens", label="Cost")
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
    status = _html(
        status_html("upload result files" if folder is None else f"draws {folder.name}, or what is uploaded"),
        elem_id="results-status",
    )
    shown = _html(elem_id="results")

    def run(files: list[str] | None, budget: int, cost: str) -> list[str]:
        with tempfile.TemporaryDirectory() as mine:
            for i, path in enumerate(files or ()):
                name = Path(path).name
                shutil.copy(path, Path(mine) / (f"{i}-{name}" if (Path(mine) / name).exists() else name))
            source = Path(mine) if files else folder
            if source is None:
                return [status_html("upload result files first"), ""]
            try:
                if cost not in [*accuracy.COST]:
                    raise VtpruneError(f"no such cost: {cost!r}; there are {', '.join(accuracy.COST)}")
                drawn = report.page(
                    source,
                    budget=budget / 100,
                    cost=cost,
                    title=f"Results: {'uploaded files' if files else source.resolve().name}",
                )
            except VtpruneError as e:
                warn(told := why(e, source, source.resolve()))
                return [status_html(told), ""]
            drawn = drawn if files else without_folders(drawn)
        frame = f'<iframe class="vtp-report" title="accuracy, cost and kept rows" sandbox srcdoc="{html.escape(drawn)}"></iframe>'  # noqa: E501
        return [status_html("done"), frame]

    draw.click(
        run,
        [files, budget, cost],
        [status, shown],
        show_progress="minimal",
        show_progress_on=status,
        api_visibility="private",
    )


# ----------------------------------------------------------------------------------------------------------------
# launch

CSS = """
.vtp-ended { position: sticky; top: 0; z-index: 10; padding: .6rem 1rem; background: #8b1a1a; color: #fff; font-weight: 600; }
.vtp-head h1 { margin: 0; font-size: 1.5rem; font-weight: 700; } .vtp-head p { margin: .1rem 0 0; }
.vtp-status { min-height: 1.6rem; color: var(--body-text-color); overflow-wrap: anywhere; } .vtp-status progress { vertical-align: middle; }
.vtp-about { font-size: .85rem; opacity: .8; }
.vtp-report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: 6px; background: white; }
@media (prefers-color-scheme: dark) { .vtp-report { background: #14161a; } }
"""  # noqa: E501


POLL = 2  # seconds between two questions of the page whether the model's process still lives
LINGER = 3 * POLL  # seconds that the page is served after its end
STATE = "/vtprune-state"
WATCH = """
(() => {
  const tell = (text) => {
    let box = document.querySelector(".vtp-ended");
    if (!box) {
      box = document.createElement("div");
      box.className = "vtp-ended";
      box.setAttribute("role", "alert");
      document.body.prepend(box);
    }
    box.textContent = text;
  };
  const timer = setInterval(async () => {
    let text = "vtprune demo has ended; start it again and reload this page";
    try { text = await (await fetch("PATH")).text(); } catch (e) { clearInterval(timer); }
    if (text) tell(text);
  }, EVERY);
})();
""".replace("PATH", f".{STATE}").replace("EVERY", str(1000 * POLL))


def launch(page: gr.Blocks, worker: Worker, host: str, port: int | None, allowed: Sequence[str] = ()) -> str:
    """Serves the page in the background: its address. No telemetry, nothing from elsewhere, no public link.
    ``allowed``: further names of this server."""

    async def state(request: Request) -> PlainTextResponse:
        return PlainTextResponse(worker.state(), headers={"cache-control": "no-store"})

    plain = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    theme = gr.themes.Base(
        font=plain, font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")], primary_hue="blue"
    )
    head = f"{theatre.head()}<script>{WATCH}</script>"
    guard = Middleware(Guard, names(host, allowed), Path(os.environ["GRADIO_TEMP_DIR"]), hashes(head.encode()))
    page.queue(max_size=WAITING, api_open=False)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        theme=theme,
        css=CSS,
        head=head,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        inbrowser=False,
        app_kwargs={"middleware": [guard], "routes": [Route(STATE, state)]},
    )
    return url
