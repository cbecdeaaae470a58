"""Which requests a server answers: under its own names alone, not for another site's page, and none that is too large.
ASGI; knows no web framework."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

LOCAL = ("localhost", "127.0.0.1", "::1")
ANY = ("0.0.0.0", "::")


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


def declared(headers: dict[str, str], otherwise: int) -> int:
    """Bytes that a request says it has."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else otherwise


class Guard:
    """ASGI middleware. Refused with 403: a ``Host`` that is not ``taken``, an ``Origin`` that is not the host asked
    for, and what another site's page loads from here. Refused with 413: more than ``most`` bytes."""

    def __init__(
        self,
        app: Any,
        taken: Callable[[str], bool],
        most: int,
        command: str,
        refusal: Callable[[int, str], tuple[Headers, bytes]],
    ):
        """``command``: whose ``--allow-host`` adds names. ``refusal``: headers and body of a status and its reason."""
        self.app, self.taken, self.most, self.command, self.refusal = app, taken, most, command, refusal

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if scope["type"] == "websocket":  # no page of ours uses one
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        most = self.largest(headers)
        if why := self.foreign(scope["method"], headers):
            await self.refuse(send, 403, why)
        elif declared(headers, most) > most:
            await self.refuse(send, 413, _too_large(most))
        else:
            await self.bounded(scope, headers, receive, send, most)

    def foreign(self, method: str, headers: dict[str, str]) -> str:
        """Why a request is not one of the server's own pages or of its user's; empty if it is."""
        host = headers.get("host", "")
        if not self.taken(name_of(host)):
            return f"this server has another name; {self.command} --allow-host NAME adds one"
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

    def largest(self, headers: dict[str, str]) -> int:
        """Bytes that a request may have."""
        return self.most

    async def bounded(self, scope: Any, headers: dict[str, str], receive: Receive, send: Send, most: int) -> None:
        """Serves a request that says nothing against ``most`` bytes."""
        came, begun = 0, False

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
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
            await self.refuse(send, 413, _too_large(most))

    async def refuse(self, send: Send, status: int, why: str) -> None:
        headers, body = self.refusal(status, why)
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})


def _too_large(most: int) -> str:
    return f"at most {most / 1_000_000:g} MB are taken at a time"
