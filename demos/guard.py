"""Which requests the demo serves, and what browsers may do with its answers: no other site's page may use it, uploads
are bounded, pages load nothing from elsewhere. Knows no Gradio."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LARGEST_TEXT = 1_000_000  # bytes of a request that is no upload
LARGEST_UPLOAD = 64_000_000  # bytes of one upload, with all its files
UPLOADS = 1_000_000_000  # bytes of everything that lies in the folder of uploads
BLOCK = 4096  # bytes that even an empty file takes
LOCAL = ("localhost", "127.0.0.1", "::1")
ANY = ("0.0.0.0", "::")
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
}
SCRIPT = re.compile(rb"<script(?P<attributes>[^>]*)>(?P<code>.*?)</script>", re.S | re.I)


class TooLarge(Exception):
    """A request with more bytes than its share."""


def names(host: str, more: Iterable[str] = ()) -> Callable[[str], bool]:
    """Whether a name (without port) is one under which a server that listens on ``host`` is asked for: a page of
    another site whose name was made to point here (DNS rebinding) asks under its own. ``more``: further names, of a
    proxy for instance."""
    known = {n.lower() for n in (host, *more)}
    if host in (*LOCAL, *ANY):
        known |= {*LOCAL}
    if host not in LOCAL:
        known |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def taken(name: str) -> bool:
        return name in known or (host in ANY and _address(name))  # an address cannot be made to point elsewhere

    return taken


def _address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def name_of(authority: str) -> str:
    """``localhost`` of ``LOCALHOST:7860``, ``::1`` of ``[::1]:7860``; empty for what is none."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@\s]+))(?::\d{1,5})?", authority.lower())
    return (match[1] or match[2]).removesuffix(".") if match else ""


def policy(hashes: Iterable[str] = ()) -> str:
    """The content security policy: everything from here, pictures also as data, inline scripts only with one of
    ``hashes``."""
    scripts = " ".join(["'self' 'unsafe-eval'", *(f"'sha256-{h}'" for h in hashes)])
    return "; ".join(
        [
            "default-src 'self'",
            f"script-src {scripts}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "media-src 'self' data: blob:",
            "font-src 'self' data:",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def hashes(page: bytes) -> list[str]:
    """Of the inline scripts of a page, as a policy names them."""
    inline = [m["code"] for m in SCRIPT.finditer(page) if b"src=" not in m["attributes"]]
    return [base64.b64encode(hashlib.sha256(code).digest()).decode() for code in inline]


def used(folder: Path) -> int:
    """Bytes that lie in ``folder`` and below; every file and folder counts as one block at least."""
    total = 0
    for where, folders, files in os.walk(folder):
        total += BLOCK * len(folders)
        for name in files:
            try:
                total += max(BLOCK, (Path(where) / name).stat().st_size)
            except FileNotFoundError:  # tidied up just now
                continue
    return total


class Guard:
    """ASGI middleware. Refused with 403: a ``Host`` that is not ``taken``, an ``Origin`` that is not the host asked
    for, and what another site's page loads from here. Refused with 413: more than :data:`LARGEST_TEXT` bytes, of an
    upload more than :data:`LARGEST_UPLOAD`, and more than :data:`UPLOADS` in the folder ``uploads``."""

    def __init__(self, app: Any, taken: Callable[[str], bool], uploads: Path, scripts: Sequence[str] = ()):
        """``scripts``: hashes of inline scripts that the page inserts later."""
        self.app, self.taken, self.uploads, self.scripts = app, taken, uploads, tuple(scripts)
        self.arriving = 0  # bytes that uploads on their way may still bring

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if scope["type"] == "websocket":  # the page uses none
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif why := self.foreign(scope["method"], headers):
            await _answer(send, 403, why)
        else:
            await self._bounded(scope, headers, receive, self._careful(send))

    def foreign(self, method: str, headers: dict[str, str]) -> str:
        """Why a request is not one of the page's own or of its user's; empty if it is."""
        host = headers.get("host", "")
        if not self.taken(name_of(host)):
            return "this server has another name; vtprune demo --allow-host NAME adds one"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return "this request comes from another site's page"
        visit = (
            method in ("GET", "HEAD")
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not visit:
            return "this request comes from another site's page"
        return ""

    async def _bounded(self, scope: Any, headers: dict[str, str], receive: Receive, send: Send) -> None:
        upload = headers.get("content-type", "").lower().startswith("multipart/")
        limit = LARGEST_UPLOAD if upload else LARGEST_TEXT
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            await _answer(send, 413, f"at most {limit // 1_000_000} MB are taken at a time")
            return
        share = int(length) if length.isdecimal() else limit
        if upload and used(self.uploads) + self.arriving + share > UPLOADS:
            await _answer(send, 413, "there is no more room for uploads; they are deleted after an hour")
            return
        self.arriving += share if upload else 0
        came, begun = 0, False

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if begun:
                raise
            await _answer(send, 413, f"at most {limit // 1_000_000} MB are taken at a time")
        finally:
            self.arriving -= share if upload else 0

    def _careful(self, send: Send) -> Send:
        """``send``, with the headers that tell browsers to be careful. A page is held back until it is whole: the
        policy names its scripts."""
        start: Message | None = None
        body = b""

        async def out(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                page = any(k.lower() == b"content-type" and v.startswith(b"text/html") for k, v in message["headers"])
                if not page:
                    await send({**message, "headers": _replaced(message["headers"], policy())})
                    return
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await send(
                        {**start, "headers": _replaced(start["headers"], policy([*self.scripts, *hashes(body)]))}
                    )
                    await send({**message, "body": body})

        return out


def _replaced(headers: Iterable[tuple[bytes, bytes]], csp: str) -> list[tuple[bytes, bytes]]:
    ours = {**HEADERS, b"content-security-policy": csp.encode()}
    return [*((k, v) for k, v in headers if k.lower() not in ours), *ours.items()]


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": _replaced(headers, policy())})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
