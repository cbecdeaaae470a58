"""Which requests the demo serves, without a server: the middleware around a small application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from vtprune.demos import guard
from vtprune.demos.guard import Guard, policy

from vtprune.serving.guard import name_of, names

PAGE = b"<html><script>one()</script><script src=a.js></script><SCRIPT data-x>\ntwo()\n</SCRIPT></html>"


def run(coroutine):
    """In a thread of its own: a browser's tests may have left a loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def call(app, method="GET", body=(), **headers):
    """``(status, headers, body)`` of a request in pieces."""
    pieces, sent = list(body), []

    async def receive():
        piece = pieces.pop(0) if pieces else b""
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    found = [(k.replace("_", "-").encode(), v.encode()) for k, v in {"host": "localhost:7860", **headers}.items()]
    run(app({"type": "http", "method": method, "path": "/", "headers": found}, receive, send))
    start, *rest = sent
    return start["status"], dict(start["headers"]), b"".join(m.get("body", b"") for m in rest)


class Application:
    """Answers in two pieces once it has read everything."""

    def __init__(self, kind=b"text/html; charset=utf-8"):
        self.kind, self.read, self.calls = kind, 0, 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        while True:
            message = await receive()
            self.read += len(message["body"])
            if not message["more_body"]:
                break
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", self.kind), (b"X-Content-Type-Options", b"x")],
            }
        )
        await send({"type": "http.response.body", "body": PAGE[:20], "more_body": True})
        await send({"type": "http.response.body", "body": PAGE[20:]})


@pytest.fixture
def inner():
    return Application()


@pytest.fixture
def app(inner, tmp_path):
    return Guard(inner, names("127.0.0.1"), tmp_path, ["later"])


@pytest.mark.parametrize(
    "host", ["localhost:7860", "127.0.0.1:7860", "127.0.0.1", "[::1]:7860", "LOCALHOST:9000", "localhost.:7860"]
)
def test_its_own_names_are_served(app, host):
    assert call(app, host=host)[0] == 200
    assert call(app, host=host, origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:7860",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example:7860",
        "10.0.0.1:7860",
        "",
        ":7860",
        "localhost@evil.example",
        "localhost:7860, evil.example",
        "127.0.0.1:7860/x",
    ],
)
def test_other_names_are_not(app, inner, host):
    status, _, body = call(app, host=host)
    assert status == 403 and b"--allow-host" in body and inner.calls == 0


def test_what_any_address_listens_to():
    everywhere, one = names("0.0.0.0", ["Proxy.example"]), names("gpu.example")
    assert all(map(everywhere, ("10.0.0.1", "fe80::1", "localhost", "proxy.example"))) and not everywhere(
        "evil.example"
    )
    assert one("gpu.example") and not one("10.0.0.1") and not one("evil.example")
    assert names("127.0.0.1", ["proxy.example"])("proxy.example")
    assert (name_of("[FE80::1]:80"), name_of("a:b"), name_of("a:7860")) == ("fe80::1", "", "a")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost"},
        {"origin": "http://127.0.0.1:7860"},
        {"origin": "file://"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_other_sites_pages_are_refused(app, inner, headers, method):
    assert call(app, method, **headers)[0] == 403 and inner.calls == 0


def test_a_link_on_another_site_may_lead_here(app):
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert call(app, **link)[0] == 200 and call(app, "POST", **link)[0] == 403
    assert (
        call(app, "POST", origin="http://localhost:7860", sec_fetch_site="same-origin", sec_fetch_mode="cors")[0] == 200
    )
    assert call(app, "POST")[0] == 200, "programs send no origin"


def test_sockets_are_closed(app, inner):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    run(app({"type": "websocket", "path": "/", "headers": [(b"host", b"localhost")]}, receive, send))
    assert sent == ["websocket.close"] and inner.calls == 0


UPLOAD = {"content_type": "multipart/form-data; boundary=x"}


def test_requests_are_bounded(app, inner, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST_TEXT", 100)
    monkeypatch.setattr(guard, "LARGEST_UPLOAD", 1000)
    assert call(app, "POST", [b"x" * 100])[0] == 200
    assert call(app, "POST", [], content_length="101")[0] == 413
    assert call(app, "POST", [b"x" * 60] * 3)[0] == 413, "told nothing beforehand"
    assert call(app, "POST", [b"x" * 60] * 3, content_length="10")[0] == 413
    assert call(app, "POST", [b"x" * 500] * 2, **UPLOAD)[0] == 200
    inner.read = 0
    status, _, body = call(app, "POST", [b"x" * 500] * 20, **UPLOAD)
    assert status == 413 and body.startswith(b"at most") and inner.read <= 1000
    assert app.arriving == 0


def test_uploads_together_are_bounded(app, inner, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "UPLOADS", 3 * guard.BLOCK)
    assert call(app, "POST", [b"x"], content_length="1", **UPLOAD)[0] == 200
    for i in range(3):
        (tmp_path / "below").mkdir(exist_ok=True)
        (tmp_path / "below" / str(i)).touch()
    inner.calls = 0
    status, _, body = call(app, "POST", [b"x"], content_length="1", **UPLOAD)
    assert status == 413 and b"room" in body and inner.calls == 0
    assert call(app, "POST", [b"x"], content_length="1")[0] == 200, "what is no upload needs no room"


def test_uploads_on_their_way_count(app, monkeypatch):
    monkeypatch.setattr(guard, "UPLOADS", 1000)

    async def slow(scope, receive, send):
        assert app.arriving == 600
        inside = asyncio.get_running_loop()
        sent = []

        async def note(message):
            sent.append(message)

        app.app = Application()
        headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data"), (b"content-length", b"600")]
        await app({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive, note)
        assert sent[0]["status"] == 413 and inside.is_running()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app.app = slow
    assert call(app, "POST", [b"x"], content_length="600", **UPLOAD)[0] == 200 and app.arriving == 0


def test_answers_tell_browsers_to_be_careful(app, inner, tmp_path):
    _, headers, body = call(app)
    told = headers[b"content-security-policy"].decode()
    assert (
        body == PAGE
        and headers[b"x-content-type-options"] == b"nosniff"
        and headers[b"referrer-policy"] == b"no-referrer"
    )
    for code in (b"one()", b"\ntwo()\n"):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'" in told
    assert "'sha256-later'" in told and "frame-ancestors 'none'" in told and "form-action 'none'" in told
    scripts = next(part for part in told.split("; ") if part.startswith("script-src"))
    assert "unsafe-inline" not in scripts and "http" not in told and "*" not in told
    for other in (call(Guard(Application(b"image/png"), names("127.0.0.1"), tmp_path)), call(app, host="evil.example")):
        assert other[1][b"content-security-policy"].decode() == policy() and other[1][b"x-frame-options"] == b"DENY"
