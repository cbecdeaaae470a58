"""What the demo asks of a request beside what every server does, and what browsers may do with its answers: uploads are
bounded, one by one and together, pages load nothing from elsewhere. Knows no Gradio."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vtprune.serving import guard
from vtprune.serving.guard import Message, Receive, Send, declared

LARGEST_TEXT = 1_000_000  # bytes of a request that is no upload
LARGEST_UPLOAD = 64_000_000  # bytes of one upload, with all its files
UPLOADS = 1_000_000_000  # bytes of everything that lies in the folder of uploads
BLOCK = 4096  # bytes that even an empty file takes
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
}
SCRIPT = re.compile(rb"<script(?P<attributes>[^>]*)>(?P<code>.*?)</script>", re.S | re.I)


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


class Guard(guard.Guard):
    """Takes :data:`LARGEST_TEXT` bytes, of an upload :data:`LARGEST_UPLOAD`; refused with 413: more than
    :data:`UPLOADS` in the folder ``uploads``."""

    def __init__(self, app: Any, taken: Callable[[str], bool], uploads: Path, scripts: Sequence[str] = ()):
        """``scripts``: hashes of inline scripts that the page inserts later."""
        super().__init__(app, taken, LARGEST_TEXT, "vtprune demo", _refusal)
        self.uploads, self.scripts = uploads, tuple(scripts)
        self.arriving = 0  # bytes that uploads on their way may still bring

    def largest(self, headers: dict[str, str]) -> int:
        return LARGEST_UPLOAD if _upload(headers) else LARGEST_TEXT

    async def bounded(self, scope: Any, headers: dict[str, str], receive: Receive, send: Send, most: int) -> None:
        share = declared(headers, most) if _upload(headers) else 0
        if _upload(headers) and used(self.uploads) + self.arriving + share > UPLOADS:
            await self.refuse(send, 413, "there is no more room for uploads; they are deleted after an hour")
            return
        self.arriving += share
        try:
            await super().bounded(scope, headers, receive, self._careful(send), most)
        finally:
            self.arriving -= share

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


def _refusal(status: int, why: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    return _replaced(headers, policy()), f"{why}\n".encode()


def _upload(headers: dict[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith("multipart/")
