"""The chat server, asked as its users ask it: with the client of OpenAI, and as nobody should."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import vtprune
from vtprune.cli.main import main
from vtprune.core.ledger import snapshot
from vtprune.core.planning import load_recipe
from vtprune.data import scenes
from vtprune.inputs.chats import generate, prepare
from vtprune.serving.guard import names
from vtprune.serving.pruner import Pruner

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from vtprune.serving.server import Limits, app  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(body=3_000_000, images=2, tokens=24)
QUESTIONS = ["what color is the circle ?", "how many red shapes are there ?", "what does the sign say ?"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def raw(port: int, method: str, path: str, body: bytes | None = b"", **headers: str) -> tuple[int, dict]:
    caller = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    caller.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = caller.getresponse()
    text = answer.read()
    return answer.status, json.loads(text) if text.startswith(b"{") else {"text": text.decode()}


class Service:
    """A server in a thread of its own, over the bundled model."""

    def __init__(self) -> None:
        self.model, self.processor = vtprune.load_demo_model()
        recipes = {"uniform": load_recipe("uniform").override(keep=36)}
        recipes |= {name: load_recipe(name) for name in ("pyramiddrop", "divprune", "tome")}
        self.pruner = Pruner(self.model, recipes)
        self.port = free_port()
        self.app = app("demo", self.model, self.processor, self.pruner, LIMITS, names("127.0.0.1"))
        self.server = uvicorn.Server(uvicorn.Config(self.app, "127.0.0.1", self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def ask(self, messages, **more):
        return self.client.chat.completions.create(model="demo", messages=messages, **more)

    def here(self, picture, question: str, recipe: str | None, **options) -> str:
        """The answer that the library gives, with another copy of the model."""
        model, processor = self.second
        inputs = prepare(processor, [picture], [question])
        if recipe is None:
            return generate(model, processor, inputs, LIMITS.tokens)[0]
        with vtprune.attach(model, recipe, **options):
            return generate(model, processor, inputs, LIMITS.tokens)[0]

    @property
    def second(self):
        if not hasattr(self, "_second"):
            self._second = vtprune.load_demo_model()
        return self._second

    def raw(self, method: str, path: str, body: bytes | None = b"", **headers: str) -> tuple[int, dict]:
        return raw(self.port, method, path, body, **headers)


@pytest.fixture(scope="module")
def service():
    one = Service()
    before = snapshot(one.model)
    yield one
    one.server.should_exit = True
    one.thread.join(timeout=20)
    one.pruner.close()
    assert snapshot(one.model) == before


def picture(number: int = 0) -> Image.Image:
    return Image.fromarray(scenes.scene(number, "test").image)


def url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(question: str, *urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("recipe", "keep"), [(None, None), ("pyramiddrop", None), ("divprune", 9), ("tome", 0.5), ("dense", None)]
)
def test_answers_are_the_librarys(service, recipe, keep):
    body = {name: value for name, value in (("recipe", recipe), ("keep", keep)) if value is not None}
    names = {None: "uniform", "dense": None}
    options = {"keep": 36} if recipe is None else {} if keep is None else {"keep": keep}
    for number, question in enumerate(QUESTIONS):
        told = service.ask(chat(question, url(picture(number))), extra_body=body)
        assert told.choices[0].message.content == service.here(
            picture(number), question, names.get(recipe, recipe), **options
        )
    assert told.usage.prompt_tokens > 144 and told.usage.completion_tokens >= 1
    if recipe == "dense":
        assert told.vtprune == {"recipe": "dense"}
    else:
        assert told.vtprune["visual_tokens"] == [144] and told.vtprune["recipe"].startswith(recipe or "uniform")
        assert told.vtprune["effective_tokens"] < 144 and told.vtprune["flops"] < told.vtprune["dense_flops"]


def test_streams_say_the_same_and_end_with_the_report(service):
    messages = chat(QUESTIONS[2], url(picture(3)))
    whole = service.ask(messages, extra_body={"recipe": "pyramiddrop"})
    chunks = list(service.ask(messages, stream=True, extra_body={"recipe": "pyramiddrop"}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == whole.choices[0].message.content.strip() and len(chunks) >= 3
    assert chunks[-1].vtprune == whole.vtprune and chunks[-1].usage == whole.usage


def test_text_alone_and_several_turns(service):
    told = service.ask([{"role": "user", "content": "hello"}])
    assert told.vtprune["visual_tokens"] == [0]
    turns = [*chat(QUESTIONS[0], url(picture())), {"role": "assistant", "content": "red"}, *chat(QUESTIONS[1])]
    assert service.ask(turns).vtprune["visual_tokens"] == [144]
    two = service.ask(chat(QUESTIONS[0], url(picture()), url(picture(1), "jpeg")))
    assert two.vtprune["visual_tokens"] == [288] and two.vtprune["layer_tokens"][0][0] == 72


def test_users_at_once_get_their_own_answers(service):
    recipes = ["uniform", "divprune", "dense", "pyramiddrop"] * 3

    def one(number: int) -> tuple[str, str]:
        told = service.ask(chat(QUESTIONS[number % 3], url(picture(number))), extra_body={"recipe": recipes[number]})
        return told.choices[0].message.content, told.vtprune["recipe"]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, range(12)))
    for number, (answer, recipe) in enumerate(found):
        assert recipe.startswith(recipes[number])
        name = None if recipes[number] == "dense" else recipes[number]
        options = {"keep": 36} if name == "uniform" else {}
        assert answer == service.here(picture(number), QUESTIONS[number % 3], name, **options), number


def large() -> str:
    return url(Image.new("L", (10_000, 10_000)))


PICTURE = url(Image.new("RGB", (32, 32), "red"))
ASKED = chat("what", PICTURE)
BAD = [
    ({"messages": ASKED, "recipe": "flowcut"}, "recipe 'flowcut' is not offered here; there are uniform, pyramiddrop"),
    ({"messages": ASKED, "recipe": ["a"]}, "is not offered here"),
    ({"messages": ASKED, "keep": 0}, "keep lies in 1..144"),
    ({"messages": ASKED, "keep": "64"}, "keep='64' is neither"),
    ({"messages": ASKED, "keep": True}, "keep=True is neither"),
    ({"messages": ASKED, "recipe": "dense", "keep": 4}, "dense model has no budget"),
    ({"messages": ASKED, "max_tokens": 25}, "more than the 24 served here"),
    ({"messages": ASKED, "max_tokens": 0}, "not a whole number"),
    ({"messages": ASKED, "temperature": 9}, "not a number from 0 to 2"),
    ({"messages": ASKED, "n": 2}, "'n' is not served here"),
    ({"messages": ASKED, "generation_config": "{}"}, "'generation_config' is not served here"),
    ({}, "list of at least one message"),
    ({"messages": "hello"}, "list of at least one message"),
    ({"messages": [{"role": "root", "content": "x"}]}, "has a role"),
    ({"messages": [{"role": "user"}]}, "a text or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "not 'video_url'"),
    ({"messages": chat("what", "http://127.0.0.1:1/a.png")}, "this server fetches nothing"),
    ({"messages": chat("what", "file:///etc/hostname")}, "this server fetches nothing"),
    ({"messages": chat("what", "data:image/png;base64,@@@")}, "base64 is damaged"),
    ({"messages": chat("what", "data:image/png;base64,aGVsbG8=")}, "the picture is not an image"),
    ({"messages": chat("what", PICTURE, PICTURE, PICTURE)}, "at most 2 pictures"),
    ({"messages": chat("what <image>", PICTURE)}, ""),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_get_one_line(service, body, said, stream):
    status, told = service.raw(
        "POST", "/v1/chat/completions", json.dumps({"stream": stream, **body}).encode(), content_type="application/json"
    )
    assert status == 400 and said in told["error"]["message"] and "\n" not in told["error"]["message"], told
    assert told["error"]["type"] == "invalid_request_error"


def test_pictures_of_100_megapixels_and_other_models(service):
    with pytest.raises(openai.BadRequestError, match="10000 x 10000 pixels; the limit is 50 megapixels"):
        service.ask(chat("what", large()))
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        service.client.chat.completions.create(model="gpt", messages=ASKED)
    assert [m.id for m in service.client.models.list()] == ["demo"]
    assert service.client.models.list().data[0].recipes == ["uniform", "pyramiddrop", "divprune", "tome", "dense"]


def test_bodies_that_are_too_large_or_no_json(service):
    path, kind = "/v1/chat/completions", {"content_type": "application/json"}
    assert service.raw("POST", path, b"x" * (LIMITS.body + 1), **kind)[0] == 413
    caller = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)  # without saying how long it is
    caller.request(
        "POST", path, (b"x" * 100_000 for _ in range(40)), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert caller.getresponse().status == 413
    for body in (b"{", b"[]", b"\xff\xfe"):
        status, told = service.raw("POST", path, body, **kind)
        assert status == 400 and "no JSON" in told["error"]["message"]
    assert service.raw("GET", "/docs")[0] == 404 and service.raw("POST", "/load_model", b"{}")[0] == 404


def test_pages_of_other_sites_are_refused(service):
    body = json.dumps({"messages": ASKED}).encode()
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": f"evil.example:{service.port}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ):
        for asked in (("POST", "/v1/chat/completions", body), ("GET", "/v1/models")):
            status, told = service.raw(*asked, **headers)
            assert status == 403 and told["error"]["type"] == "invalid_request_error", headers
    own = {"Origin": f"http://127.0.0.1:{service.port}", "Sec-Fetch-Site": "same-origin"}
    assert service.raw("GET", "/v1/models", **own)[0] == 200 and service.raw("GET", "/health")[0] == 200


@pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", 403), ("0.0.0.0", 200)])
def test_the_command_answers_under_its_own_names_alone(monkeypatch, host, elsewhere):
    """A page whose name was made to point here (DNS rebinding) asks under its own; no name points at an address."""
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7")
    monkeypatch.setattr(socket, "getfqdn", lambda: "gpu7.lab.example")
    expected = dict.fromkeys(("127.0.0.1", "[::1]", "localhost", "proxy.example"), 200)
    expected |= dict.fromkeys(("10.0.0.1", "[fe80::1]", "gpu7", "gpu7.lab.example"), elsewhere)
    expected |= dict.fromkeys(("evil.example", "localhost.evil.example", "10.0.0.1.evil.example"), 403)
    port, found, stock = free_port(), {}, uvicorn.Server.run

    def run(server, sockets):
        thread = threading.Thread(target=stock, args=(server, sockets), daemon=True)
        thread.start()
        for name in expected:
            authority = f"{name}:{port}"
            found[name] = raw(port, "GET", "/v1/models", Host=authority, Origin=f"http://{authority}")
        server.should_exit = True
        thread.join(timeout=20)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert main(["serve", "--host", host, "--port", str(port), "--allow-host", "Proxy.example"]) == 0
    assert {name: status for name, (status, _) in found.items()} == expected
    said = found["evil.example"][1]["error"]["message"]
    assert "vtprune serve --allow-host NAME" in said and "\n" not in said


def test_clients_that_leave_within_a_request_are_no_error(service):
    """Nothing is raised, of which uvicorn would print a traceback."""
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        pass

    headers = [(b"host", b"127.0.0.1"), (b"content-length", b"100")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    with ThreadPoolExecutor(1) as pool:  # the tests of a browser may have left a loop running in this thread
        pool.submit(asyncio.run, service.app(scope, receive, send)).result()
    assert parts == []


def test_clients_that_leave_free_the_model(service):
    """In the middle of a stream, and without reading an answer."""
    began = time.monotonic()
    for stream in (True, False):
        body = json.dumps({"messages": chat(QUESTIONS[2], url(picture())), "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", service.port)) as gone:
            gone.sendall(head.encode() + body)
            if stream:
                gone.recv(200)
    told = service.ask(chat(QUESTIONS[0], url(picture())))
    assert told.choices[0].message.content == service.here(picture(), QUESTIONS[0], "uniform", keep=36)
    assert time.monotonic() - began < 60


def test_an_error_of_the_model_is_told_and_the_next_request_answered(service, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('it said "no" and\nstopped')

    service.pruner.close()
    monkeypatch.setitem(service.model.__dict__, "generate", fails)
    body = {"messages": ASKED, "recipe": "dense"}
    status, told = service.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert status >= 400 and 'it said "no"' in told["error"]["message"]
    status, told = service.raw("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}).encode())
    events = [json.loads(e.removeprefix("data: ")) for e in told["text"].strip().split("\n\n")[:-1]]
    assert any('it said "no"' in e.get("error", {}).get("message", "") for e in events)
    monkeypatch.undo()
    assert service.ask(ASKED).choices


@pytest.mark.ci
def test_the_command_ends_when_it_is_told_to(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "vtprune", "serve", "--recipe", "uniform", "--keep", "36", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "answered one by one" in process.stdout.readline()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
    assert client.chat.completions.create(model="vtprune-demo", messages=ASKED).choices
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in second.stderr
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
