"""The demo as its users see it: a real server, a real browser. Screenshots are left in the folder that
VTPRUNE_SCREENSHOTS names (``make screenshots``)."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

import vtprune
from vtprune.core.types import VtpruneError

sync_api = pytest.importorskip("playwright.sync_api")
if find_spec("gradio") is None:
    pytest.skip("no gradio", allow_module_level=True)
ROOT = Path(__file__).resolve().parents[2]
SECOND = 1000  # playwright's milliseconds
WAIT = 90 * SECOND  # other tests share the cores


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """``vtprune demo`` in a process of its own."""

    def __init__(self, *options: str):
        self.port = free_port()
        command = [sys.executable, "-m", "vtprune", "demo", "--port", str(self.port), *options]
        self.folder = tempfile.TemporaryDirectory()
        env = {**os.environ, "TMPDIR": self.folder.name}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = ""

    def ready(self) -> Server:
        """Waits until it says that the model is loaded."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if "model is loaded" in line:
                return self
        raise AssertionError(f"the demo ended with code {self.process.wait()}")

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it said; it ends by itself when told to, and leaves nothing behind."""
        self.process.send_signal(number)
        told = self.process.communicate(timeout=30)[0]
        assert self.process.returncode == 0
        self.left_nothing()
        return self.said + told

    def left_nothing(self) -> None:
        assert [
            p.name for p in Path(self.folder.name).iterdir() if not p.name.startswith("torch")
        ] == []  # torch keeps its compiler's cache there

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Status and body of a request that no browser makes."""
        caller = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        caller.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = caller.getresponse()
        return answer.status, answer.read()

    def upload(self, name: str, data: bytes, **headers: str) -> tuple[int, bytes]:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="'
            + name.encode()
            + b'"\r\n\r\n'
            + data
            + b"\r\n--x--\r\n"
        )
        return self.request(
            "POST", "/gradio_api/upload", body, **{"content_type": "multipart/form-data; boundary=x", **headers}
        )

    def children(self) -> set[int]:
        """The process that has the model; once it was started again also Python's tracker of resources."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        found = {pid for task in tasks.iterdir() for pid in (task / "children").read_text(encoding="ascii").split()}
        return set(map(int, found))


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    # under nohup it is ignored, also by what is started, which the demo respects
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        one = Server("--results", str(ROOT / "benchmarks" / "results" / "fastv-layer-1")).ready()
    finally:
        signal.signal(signal.SIGHUP, inherited)
    yield one
    assert one.process.poll() is None, "the server did not live through the tests"
    status, body = one.upload("a.png", b"x")
    assert status == 200 and Path(json.loads(body)[0]).is_file()
    told = one.end(signal.SIGHUP)  # a terminal that closes leaves no uploads
    assert "Traceback" not in told, told


REMEMBER = """() => { window.told = []; new MutationObserver(() => {
    for (const box of document.querySelectorAll('[role=alert]')) window.told.push(box.innerText);
}).observe(document, {subtree: true, childList: true, characterData: true}); }"""  # messages pop up for seconds only


def fewer_colours(path: Path) -> None:
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


class Seat:
    """One user: a browser context of its own, and what went wrong in it."""

    def __init__(self, chromium, server: Server, **context):
        self.context = chromium.new_context(
            accept_downloads=True, **{"viewport": {"width": 1360, "height": 900}, **context}
        )
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        # gradio 6.25's own page tells, on leaving, that it gave up what it was waiting for
        self.page.on("pageerror", lambda e: None if "AbortError" in str(e) else self.errors.append(str(e)))
        self.page.on(
            "request",
            lambda r: self.elsewhere.append(r.url) if urlsplit(r.url).hostname not in ("127.0.0.1", None) else None,
        )
        self.page.set_default_timeout(WAIT)
        self.page.goto(server.url)
        self.page.evaluate(REMEMBER)
        self.page.get_by_text("visual tokens per image").wait_for()
        self.page.locator("#status .vtp-status", has_not_text="the model answers the sample").wait_for()
        self.seen()

    def clear(self) -> None:
        """Takes the picture away, if there is one."""
        clear = self.page.locator("#picture button[aria-label='Clear']")
        if clear.count():
            clear.click()

    def upload(self, path: Path) -> None:
        """Chooses a file as picture and waits until it is there."""
        self.clear()
        with self.page.expect_response(re.compile("/upload")):
            self.page.locator("#picture input[type=file]").set_input_files(path)
        self.page.wait_for_timeout(300)

    def question(self, text: str) -> None:
        self.page.locator("#question textarea, #question input").fill(text)

    def choose(self, where: str, name: str) -> None:
        box = self.page.locator(f"#{where} input")
        box.click()
        box.fill(name)
        shown = re.compile(f"^{re.escape(name)} · ")
        self.page.locator(f"#{box.get_attribute('aria-controls')}").get_by_role("option", name=shown).click()
        sync_api.expect(box).to_have_value(shown)

    def status(self, text: str, where: str = "status") -> None:
        self.page.locator(f"#{where} .vtp-status", has_text=re.compile(text)).wait_for()

    def told(self, text: str) -> None:
        """Waits until a message has popped up, also one that is gone again."""
        self.page.wait_for_function("text => window.told.some((t) => t.includes(text))", arg=text)

    def seen(self) -> None:
        """Marks the headline that is there, so that :meth:`done` waits for another."""
        self.page.evaluate("for (const s of document.querySelectorAll('#status .vtp-status')) s.dataset.old = '1'")

    def done(self) -> str:
        """Waits until all is done: the headline."""
        fresh = self.page.locator("#status .vtp-headline:not([data-old])")
        fresh.wait_for()
        said = fresh.inner_text()
        self.seen()
        return said

    def ask(self) -> str:
        """Asks, and waits until all is done: what is in between may be too short to be seen."""
        self.seen()
        self.page.locator("#ask").click()
        return self.done()

    def answer(self, side: str) -> str:
        return self.page.locator(f"#answer-{side} .vtp-said").inner_text()

    def more(self) -> None:
        """Opens what most leave as it is."""
        if not self.page.locator("#budget-a").is_visible():
            self.page.locator("#more button").first.click()

    def shot(self, name: str, full: bool = True) -> None:
        if folder := os.environ.get("VTPRUNE_SCREENSHOTS"):
            path = Path(folder) / f"demo-{name}.png"
            self.page.screenshot(path=path, full_page=full)
            fewer_colours(path)

    def leave(self) -> None:
        self.context.close()
        assert self.errors == []
        assert self.elsewhere == [], "the page asked another host"


@pytest.fixture
def seat(chromium, server):
    made: list[Seat] = []

    def sit(**context) -> Seat:
        made.append(Seat(chromium, server, **context))
        return made[-1]

    yield sit
    for one in made:
        one.leave()


@pytest.fixture(scope="module")
def sat_at(chromium, server) -> Iterator[Seat]:
    one = Seat(chromium, server)
    yield one
    one.leave()


@pytest.fixture
def desk(sat_at) -> Seat:
    """The page that the test before has left, without its picture and question: one of its own takes seconds."""
    assert sat_at.errors == []
    sat_at.page.get_by_role("tab", name="Watch").click()
    sat_at.clear()
    sat_at.question("")
    return sat_at


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[tuple[Path, str, str]]:
    """Files with a question each and what the dense model answers."""
    from vtprune.demos.samples import samples

    from vtprune.inputs.chats import ask

    folder, out = tmp_path_factory.mktemp("pictures"), []
    model, processor = vtprune.load_demo_model()
    for i, sample in enumerate(samples(3)[1:]):
        path = folder / f"scene-{i}.png"
        sample.picture().save(path)
        out.append((path, sample.question, ask(model, processor, [sample.picture()], [sample.question], 32)[0]))
    assert out[0][2] != out[1][2], "two users must be told apart"
    return out


def clip(path: Path) -> Path:
    """A circle that crosses a scene, as a GIF."""
    from vtprune.demos.samples import samples

    frames = []
    for i in range(8):
        frame = samples(2)[1].picture().resize((168, 168))
        ImageDraw.Draw(frame).ellipse((4 + 18 * i, 60 + 5 * i, 36 + 18 * i, 92 + 5 * i), (220, 40, 40), (20, 20, 20))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120)
    return path


def test_the_first_screen_shows_what_pruning_gains(seat):
    """Without a click: a sample, its question, both answers with their marks, the headline, both pictures whole, in
    1280 x 720; and every figure of the headline is one of the table."""
    from vtprune.demos.samples import samples

    (sample,) = samples(1)
    one = seat(viewport={"width": 1280, "height": 720})
    headline = one.page.locator("#status .vtp-headline").inner_text()
    assert one.page.locator("#question textarea, #question input").input_value() == sample.question
    assert one.page.locator("#picture img").first.is_visible() and not one.page.locator("#ask-stop").is_visible()
    marks = one.page.locator("#answers .vtp-mark").all_inner_texts()
    assert marks == ["✓ right" if one.answer(s) == sample.answer else "✗ wrong" for s in "ab"]
    assert ("same answer" in headline) == (one.answer("a") == one.answer("b"))
    for picture in one.page.locator("vt-theatre .vt-picture").all():
        box, column = picture.bounding_box(), picture.locator("..").bounding_box()
        assert box["y"] + box["height"] <= 720 and box["width"] >= column["width"] - 1, "whole, as wide as its column"
    rows = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in
            one.page.locator(".vtp-metrics tbody tr").all()}  # fmt: skip
    dense, pruned = (float(v) for v in rows["effective visual tokens"][:2])
    assert headline.startswith(f"{round(10 * (1 - pruned / dense))} of 10 visual tokens gone, ")
    (ratio,) = (told[3] for name, told in rows.items() if name.startswith("time to first token"))
    found = re.search(r"first token ([\d.]+)× (sooner|later)", headline)
    if found is None:
        assert "noise" in ratio or "too few" in headline
    else:
        middle = float(re.match(r"x ([\d.]+)", ratio)[1])
        told = 1 / middle if found[2] == "sooner" else middle
        assert float(found[1]) == pytest.approx(told, rel=0.06), "rounded to two digits"


@pytest.mark.ci
def test_the_program_of_a_sample_runs_in_an_empty_folder(seat, tmp_path):
    one = seat()
    with one.page.expect_download() as found:
        one.page.locator("#get-repeat-py").click()
    found.value.save_as(tmp_path / "repeat.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "repeat.py"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(" (", 1)[0] for line in done.stdout.strip().splitlines()] == [one.answer("a"), one.answer("b")]


@pytest.mark.ci
def test_stop_says_stopped_at_every_moment(desk, pictures):
    path, question, dense = pictures[0]
    one = desk
    one.upload(path)
    one.question(question)
    for wait in (0, 0, 100, 300, 600, 0, 200, 400):
        one.page.locator("#ask").click()
        stop = one.page.locator("#ask-stop")
        stop.wait_for()
        one.page.wait_for_timeout(wait)
        if not stop.is_visible():  # it was done before
            continue
        stop.click()
        stop.wait_for(state="hidden")
        assert one.page.locator("#status").inner_text() == "stopped"
        one.page.wait_for_timeout(300)
        assert one.page.locator("#status").inner_text() == "stopped", "nothing says something else later"
    one.ask()
    assert one.answer("a") == dense and not one.page.locator("#ask-stop").is_visible()


@pytest.mark.ci
def test_a_visit_by_keyboard_alone(seat):
    """Sample, question, recipe, asking, the timeline, a patch, a tab: without a pointer."""
    one = seat()
    page = one.page

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                assert page.evaluate("document.activeElement.checkVisibility()")
                return
        raise AssertionError(f"Tab does not lead to {selector}")

    page.evaluate("document.body.focus()")
    tab_to("#question textarea, #question input")
    page.keyboard.press("Control+A")
    page.keyboard.type("how many objects are there ?")
    tab_to("#samples button")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#truth textarea, #truth input")).to_have_value("1")
    tab_to("#recipe-b input")
    page.keyboard.type("divprune", delay=30)
    page.wait_for_timeout(500)  # the list follows what is typed a little later
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#recipe-b input")).to_have_value(re.compile("^divprune · "))  # chosen, not only typed
    one.seen()
    tab_to("#ask")
    page.keyboard.press("Enter")
    one.done()
    assert page.locator("#answers").inner_text().count("divprune") == 1
    page.evaluate("document.querySelector('#ask').focus()")  # it was not to be had while it ran
    tab_to("vt-theatre .vt-step")
    page.keyboard.press("Home")
    assert page.locator("vt-theatre").get_attribute("data-step") == "0"
    tab_to("vt-theatre .vt-picture")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert "Token 1:" in page.locator("vt-theatre .vt-details").inner_text()
    tab_to("#get-vtprune-png, #get-vtprune-png *")
    with page.expect_download() as found:
        page.keyboard.press("Enter")
    assert Path(found.value.path()).read_bytes().startswith(b"\x89PNG")
    page.get_by_role("tab", name="Watch").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#compare").wait_for()


AXE = os.environ.get("VTPRUNE_AXE")  # axe.min.js of the npm package axe-core


@pytest.mark.ci
@pytest.mark.skipif(not AXE, reason="VTPRUNE_AXE names no axe.min.js")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(seat, scheme):
    one = seat(viewport={"width": 1280, "height": 720}, color_scheme=scheme)
    one.page.evaluate(Path(str(AXE)).read_text(encoding="utf-8"))

    def found(where: str) -> list[str]:
        one.page.wait_for_timeout(700)  # colours move for a while
        told = one.page.evaluate("async () => (await axe.run(document)).violations")
        bad = [v for v in told if v["impact"] in ("serious", "critical")]
        return [f"{where}: {v['id']}: {n['html'][:120]}" for v in bad for n in v["nodes"]]

    out = found("first screen")
    one.more()
    out += found("options")
    one.page.locator("#recipe-b input").click()
    out += found("recipes")
    one.page.keyboard.press("Escape")
    one.page.get_by_label("B: further options, JSON").fill("{]")
    one.page.locator("#ask").click()
    one.page.locator(".toast-body").first.wait_for()
    out += found("a message")
    one.page.get_by_role("tab", name="All methods").click()
    one.page.locator("#compare").click()
    one.page.locator(".vtp-cards li").first.wait_for()
    out += found("cards")
    one.page.locator("#compare-stop").click()
    one.page.get_by_role("tab", name="Results").click()
    one.status("done", "results-status")
    out += found("results")
    assert out == []


@pytest.mark.ci
def test_a_gif_is_shown_frame_by_frame(seat, tmp_path):
    """The bundled model takes no videos: it sees the frames as images."""
    one = seat()
    one.upload(clip(tmp_path / "clip.gif"))
    one.question("what color is the circle ?")
    one.choose("recipe-b", "framefusion")
    one.ask()
    theatre = one.page.locator("vt-theatre")
    time, which = theatre.locator(".vt-time"), theatre.locator(".vt-which")
    assert which.inner_text() == "frame 1 of 8, 0.0 s" and theatre.locator(".vt-frame").count() == 16
    pruned = theatre.locator(".vt-scene").nth(1)
    left = [int(text.split("/")[0]) for text in pruned.locator(".vt-frame").all_inner_texts()]
    assert sum(left) == int(re.search(r"(\d+) of 1152 tokens", pruned.locator(".vt-caption").inner_text())[1]) < 1152
    time.focus()
    for _ in range(4):
        one.page.keyboard.press("ArrowRight")
    assert which.inner_text().startswith("frame 5 of 8, ")
    assert len(pruned.get_attribute("data-kept").split(",")) == left[4]
    pruned.locator(".vt-picture").click(position={"x": 9, "y": 9})
    assert "(frame 1 of 8, 0.0 s)" in theatre.locator(".vt-told li", has_text="merged into").first.inner_text()
    one.shot("video")
    if folder := os.environ.get("VTPRUNE_SCREENSHOTS"):
        theatre.screenshot(path=Path(folder) / "theatre-video.png")
        fewer_colours(Path(folder) / "theatre-video.png")


@pytest.mark.ci
def test_a_visit(seat, pictures, tmp_path):
    """Upload, ask, move the slider, compare two recipes, export; what is drawn is what the recipe, run here,
    reports."""
    path, question, dense = pictures[0]
    one = seat()
    one.shot("desktop")
    one.upload(path)
    one.question(question)
    one.choose("recipe-b", "pyramiddrop")
    one.ask()
    assert one.answer("a") == dense and one.page.locator("#answers .vtp-mark").count() == 0
    truth = one.page.locator("#truth textarea, #truth input")
    assert truth.input_value() == "", "the sample's right answer is not that of another picture"
    theatre = one.page.locator("vt-theatre")
    assert theatre.locator(".vt-scene").count() == 2

    # The slider, by keyboard; at every step the tokens drawn are those that the report of the same recipe names.
    with one.page.expect_download() as found:
        one.page.locator("#get-recipe-b-json").click()
    found.value.save_as(tmp_path / "recipe.json")
    model, processor = vtprune.load_demo_model()
    from vtprune.inputs.chats import generate, prepare
    from vtprune.inputs.images import open_image

    with vtprune.attach(model, tmp_path / "recipe.json") as handle:
        generate(model, processor, prepare(processor, [open_image(path)], [question]), 1)
        report = handle.report()
    slider = theatre.locator(".vt-step")
    slider.focus()
    slider.press("Home")
    steps = int(slider.get_attribute("max")) - int(slider.get_attribute("min")) + 1
    drawn = []
    for step in range(steps):
        assert theatre.get_attribute("data-step") == str(step)
        drawn.append(
            [[int(t) for t in s.get_attribute("data-kept").split(",") if t] for s in theatre.locator(".vt-scene").all()]
        )
        slider.press("ArrowRight")
    assert all(first == list(range(144)) for first, _ in drawn), "dense drops nothing"
    layers = [second for _, second in drawn[-len(report.layer_tokens[0]) :]]
    assert [len(kept) for kept in layers] == report.layer_tokens[0]
    for stage in report.stages:
        assert layers[int(stage.site.removeprefix("llm."))] == stage.kept[0].tolist(), stage.site

    # Why a patch went: with the keyboard, and the scores.
    theatre.locator(".vt-heat input, input.vt-heat").first.check()
    slider.press("End")
    picture = theatre.locator(".vt-scene [tabindex='0']").last
    picture.focus()
    picture.press("ArrowRight")
    picture.press("Enter")
    details = theatre.locator(".vt-details").inner_text()
    assert re.search(r"rank \d+ of \d+", details), details
    one.shot("heat")

    # Two recipes.
    one.choose("recipe-a", "tome")
    one.choose("recipe-b", "fastv")
    one.ask()
    assert one.page.locator(".vtp-metrics").inner_text().count("tome") and one.page.locator(
        ".vtp-metrics"
    ).inner_text().count("fastv")
    one.shot("two-recipes")
    saved = {}
    for name in ("vtprune-png", "theatre-html", "repeat-py", "recipe-a-json", "recipe-b-json"):
        with one.page.expect_download() as found:
            one.page.locator(f"#get-{name}").click()
        saved[name] = tmp_path / name
        found.value.save_as(saved[name])
    assert Image.open(saved["vtprune-png"]).width > 400
    assert vtprune.Recipe.from_dict(json.loads(saved["recipe-a-json"].read_text())).stages[0].method == "tome"
    assert "<vt-theatre" in saved["theatre-html"].read_text()
    shutil.copy(path, tmp_path)
    done = subprocess.run(
        [sys.executable, saved["repeat-py"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(" (", 1)[0] for line in done.stdout.strip().splitlines()] == [one.answer("a"), one.answer("b")]


@pytest.mark.slow  # test_demo_engine.py compares them all, test_stop_leaves_the_model_free sees the first
def test_all_methods(seat, pictures):
    path, question, answer = pictures[1]
    one = seat()
    one.upload(path)
    one.question(question)
    one.page.locator("#truth textarea, #truth input").fill(answer)
    one.page.get_by_role("tab", name="All methods").click()
    one.page.locator("#compare").click()
    one.status("all done", "compare-status")
    cards = one.page.locator(".vtp-cards li")
    shown = cards.locator("h2").all_inner_texts()
    model, _ = vtprune.load_demo_model()
    for name in vtprune.methods():  # what this model refuses is not shown
        try:
            vtprune.attach(model, name).remove()
        except VtpruneError:
            continue
        assert name in shown
    assert shown[0] == "dense" and "right" in cards.first.inner_text()
    one.shot("all-methods")
    with one.page.expect_download() as found:
        one.page.locator("#all-methods-png").click()
    assert Path(found.value.path()).read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci
def test_results(desk):
    one = desk
    one.page.get_by_role("tab", name="Results").click()
    one.status("done", "results-status")  # without a click on "Draw"
    inside = one.page.frame_locator("#results iframe")
    assert inside.locator("figure img").count() >= 2
    one.shot("results")


@pytest.mark.parametrize(
    "name, context",
    [
        pytest.param("phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True}, marks=pytest.mark.ci),
        pytest.param("small", {"viewport": {"width": 360, "height": 740}, "has_touch": True}, marks=pytest.mark.slow),
        pytest.param("dark", {"color_scheme": "dark"}, marks=pytest.mark.slow),
    ],
)
def test_phone_and_dark(seat, pictures, name, context):
    path, question, dense = pictures[0]
    one = seat(**context)
    one.upload(path)
    one.question(question)
    one.page.locator("#question textarea, #question input").press("Enter")
    one.done()
    assert one.answer("a") == dense
    assert one.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert one.page.evaluate(
        "(() => { const t = document.querySelector('.vtp-scroll'); return t.scrollWidth <= t.clientWidth; })()"
    ), "the figures scroll sideways"
    ratio = one.page.locator(".vtp-metrics tbody tr").first.locator("td").last
    assert (
        re.search(r"x \d.*\(\d.* to \d|too few rounds", ratio.inner_text())
        and ratio.bounding_box()["x"] + 40 < one.page.viewport_size["width"]
    )
    if name == "dark":
        light = one.page.evaluate(
            "getComputedStyle(document.querySelector('vt-theatre .vt-caption')).color.match(/[0-9.]+/g).slice(0, "
            "3).map(Number)"
        )
        assert min(light) > 100, f"dark text on a dark page: {light}"
    if name != "small":
        one.shot(name)


@pytest.mark.ci
def test_two_users_get_their_own_answers(seat, pictures):
    users = [seat(), seat()]
    for one, (path, question, _) in zip(users, pictures, strict=True):
        one.upload(path)
        one.question(question)
    for one in users:
        one.page.locator("#ask").click()
    for one, (_, _, dense) in zip(users, pictures, strict=True):
        one.done()
        assert one.answer("a") == dense
    titles = [one.page.locator("vt-theatre").text_content() for one in users]
    assert pictures[0][2] in titles[0] and pictures[1][2] in titles[1] and pictures[0][2] != pictures[1][2]


@pytest.mark.ci
def test_what_cannot_be_answered_gets_a_message(desk, pictures, tmp_path):
    path, question, dense = pictures[0]
    Image.new("L", (10000, 10000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture at all")
    one = desk
    one.page.locator("#ask").click()
    one.status("type a question|choose a picture")
    one.upload(path)
    one.page.locator("#ask").click()
    one.status("type a question")
    one.question(question)
    for name, message in (("large.png", "megapixels"), ("text.png", "not an image")):
        one.upload(tmp_path / name)
        one.page.locator("#ask").click()
        one.status(message)
    one.upload(path)
    one.more()
    further = one.page.get_by_label("B: further options, JSON")
    further.fill("{]")
    one.page.locator("#ask").click()
    one.status("B: options: not JSON")
    further.fill('{"layerz": 3}')
    one.page.locator("#ask").click()
    one.status("layerz")
    further.fill("")
    one.choose("recipe-b", "fastv")
    layer = one.page.get_by_label("B: layer")
    layer.fill("99")
    one.page.locator("#ask").click()
    one.status("B: fastv: .*99")
    layer.fill("4")
    one.page.get_by_label("B: rope").uncheck()
    one.ask()
    with one.page.expect_download() as found:
        one.page.locator("#get-recipe-b-json").click()
    (stage,) = json.loads(Path(found.value.path()).read_text(encoding="utf-8"))["stages"]
    assert stage["options"] == {"layer": 4, "rope": False}, "what was chosen, and no more"
    seed = one.page.get_by_label("B: seed, for methods that draw at random")
    seed.fill("-1")
    one.page.locator("#ask").click()
    one.status("B: seed=-1 is not a whole number")
    seed.fill("0")
    one.question("what is {{constructor}} and ${7*7} <b>here</b> ?")
    one.ask()
    one.question(question)
    one.ask()
    assert one.answer("a") == dense


@pytest.mark.ci
def test_stop_leaves_the_model_free(desk, pictures):
    path, question, dense = pictures[0]
    one = desk
    one.upload(path)
    one.question(question)
    one.page.get_by_role("tab", name="All methods").click()
    one.page.locator("#compare").click()
    one.page.locator(".vtp-cards li").first.wait_for()
    one.page.locator("#compare-stop").click()
    one.page.locator("#compare-stop").wait_for(state="hidden")
    one.status("stopped", "compare-status")
    one.page.get_by_role("tab", name="Watch").click()
    one.ask()
    assert one.answer("a") == dense


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another site: its address and what was asked of it."""
    asked: list[str] = []

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}", asked
        site.shutdown()


def recipe_file(folder: Path, name: str, **fields: object) -> Path:
    """A recipe file; ``fields`` of its one stage, or ``top`` level ones."""
    path = folder / name
    top = fields.pop("top", {})
    path.write_text(
        json.dumps(
            {"type": "vtprune.Recipe", "version": 1, "name": "mine", "stages": [{"method": "fastv", **fields}], **top}
        ),
        encoding="utf-8",
    )
    return path


@pytest.mark.ci
def test_markup_in_names_stays_text(seat, pictures, elsewhere, tmp_path):
    """Names of files, recipes, fields, methods and options that hold HTML are shown as they are, and ask nobody for
    anything."""
    site, asked = elsewhere
    evil = f"<img src={site}/x onerror=document.title='owned'><form action={site}/f><input name=password></form>"
    path, question, _ = pictures[0]
    one = seat()
    shutil.copy(path, tmp_path / "<b>bold<img src=x>.png")
    one.upload(tmp_path / "<b>bold<img src=x>.png")
    one.question(question)
    one.more()
    box = one.page.locator("#file-b")
    files = [
        recipe_file(tmp_path, "method.json", method=evil),
        recipe_file(tmp_path, "field.json", **{evil: 1}),
        recipe_file(tmp_path, "option.json", options={evil: 1}),
        recipe_file(tmp_path, "top.json", top={evil: 1}),
        recipe_file(tmp_path, "version.json", top={"version": evil}),
        recipe_file(tmp_path, "value.json", options={"layer": evil}),
        recipe_file(tmp_path, "link.json", options={"query": f"<a href={site}/a>click</a> [me]({site}/b) <img src=x>"}),
    ]
    for file in files:
        box.locator("input[type=file]").set_input_files(file)
        box.get_by_text(file.stem).first.wait_for()
        one.page.locator("#ask").click()
        one.status("B: .*<img src=")
        toast = one.page.locator(".toast-body").last
        toast.wait_for()
        assert "<img src=" in toast.inner_text()
        assert (
            one.page.locator(
                ".toast-body img, .toast-body form, .toast-body a, #status img, #status form, #status a"
            ).count()
            == 0
        )
        # of several, one may be fading away, and cannot be clicked any more
        one.page.evaluate("document.querySelectorAll('.toast-close').forEach((button) => button.click())")
        one.page.wait_for_function("!document.querySelector('.toast-body')")
        box.locator("button[aria-label='Clear'], button[aria-label='Remove this file']").first.click()
    box.locator("input[type=file]").set_input_files(
        recipe_file(tmp_path, "good.json", top={"name": evil + "{{#each}} ${x}"})
    )
    box.get_by_text("good").first.wait_for()
    one.ask()
    assert evil + "{{#each}} ${x}" in one.page.locator(".vtp-metrics").inner_text()
    assert evil in one.page.locator("vt-theatre").text_content()
    assert asked == [] and one.page.title() == "vtprune"


@pytest.mark.ci
def test_what_is_injected_reaches_nobody(seat, elsewhere):
    """If something slipped through all the same: no picture from elsewhere, no script, no form, no frame."""
    site, asked = elsewhere
    one = seat()
    blocked = one.page.evaluate(
        """async (site) => {
            const found = [];
            document.addEventListener("securitypolicyviolation", (e) => found.push(e.effectiveDirective));
            document.body.insertAdjacentHTML("beforeend", `<img src=${site}/img onerror="document.title='owned'"><iframe src=${site}/frame></iframe>
                <form action=${site}/form target=_blank><button id=sign>sign in</button></form><link rel=stylesheet href=${site}/css>`);
            document.getElementById("sign").click();
            await fetch(`${site}/fetch`).catch(() => 0);
            await new Promise((done) => setTimeout(done, 1000));
            return found;
        }""",  # noqa: E501
        site,
    )
    assert {"img-src", "frame-src", "form-action", "style-src-elem", "connect-src", "script-src-attr"} <= set(blocked)
    assert asked == [] and one.page.title() == "vtprune"
    assert one.errors, "the browser tells what it blocked"
    one.errors.clear()
    one.elsewhere.clear()


@pytest.mark.ci
def test_other_sites_and_large_uploads_are_refused(server):
    assert server.request("GET", "/")[0] == 200 and server.request("GET", "/gradio_api/startup-events")[0] == 200
    assert server.upload("a.png", b"x")[0] == 200
    for headers in (
        {"Host": f"evil.example:{server.port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        for path in (
            "/",
            "/config",
            "/gradio_api/info",
            "/gradio_api/queue/data?session_hash=a",
            "/gradio_api/file=/etc/hostname",
        ):
            assert server.request("GET", path, **headers)[0] == 403, (path, headers)
        assert server.upload("a.png", b"x", **headers)[0] == 403
        assert (
            server.request("POST", "/gradio_api/queue/join", b"{}", content_type="application/json", **headers)[0]
            == 403
        )
    assert server.upload("a.png", b"x", content_length="65000000")[0] == 413
    assert (
        server.request(
            "POST", "/gradio_api/queue/join", b"x", content_type="application/json", content_length="1000001"
        )[0]
        == 413
    )


@pytest.mark.ci
def test_a_model_s_process_that_dies_is_told_everywhere_and_started_again(chromium, pictures):
    """On the terminal, on a page that asks, and on one that does nothing."""
    server = Server().ready()
    path, question, dense = pictures[0]
    asking, idle = Seat(chromium, server), Seat(chromium, server)
    asking.upload(path)
    asking.question(question)
    asking.page.get_by_role("tab", name="All methods").click()
    asking.page.locator("#compare").click()
    asking.page.locator(".vtp-cards li").first.wait_for()
    (killed,) = server.children()
    os.kill(killed, signal.SIGKILL)
    asking.status("has ended and is being started again", "compare-status")
    idle.told("the model's process has ended (SIGKILL")
    server.ready()
    idle.told("the model is loaded again")
    assert killed not in server.children()
    idle.page.get_by_role("button", name="Dismiss this message").click()
    assert not idle.page.locator(".vtp-ended").is_visible()
    asking.page.get_by_role("tab", name="Watch").click()
    asking.ask()
    assert asking.answer("a") == dense
    for one in (asking, idle):
        one.context.close()
    told = server.end()
    assert "the model's process has ended (SIGKILL" in told and "Traceback" not in told


def first_answer(chromium, path: Path, question: str, expected: str) -> float:
    """Seconds from the command to the dense answer on the page."""
    begin = time.monotonic()
    server = Server()
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", server.port)).close()
                break
            except OSError:
                assert server.process.poll() is None and time.monotonic() < begin + 60
                time.sleep(0.05)
        context = chromium.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.locator("#picture input[type=file]").set_input_files(path)
        page.locator("#question textarea, #question input").fill(question)
        page.locator("#ask").click()
        page.wait_for_function(
            "text => document.querySelector('#answer-a textarea').value === text",
            arg=expected,
            polling=50,
            timeout=60 * SECOND,
        )
        seconds = time.monotonic() - begin
        context.close()
        return seconds
    finally:
        server.end()


@pytest.mark.slow
def test_the_first_answer_comes_within_ten_seconds(chromium, pictures):
    """The best of a few starts: other work on the machine, this browser's included, only adds to it."""
    times = [first_answer(chromium, *pictures[0]) for _ in range(4)]
    print("first answers after", ", ".join(f"{t:.1f}" for t in times), "s")
    assert min(times) < 10
