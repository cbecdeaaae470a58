"""``vtprune serve``: transformers' own chat endpoint, OpenAI-compatible, over a model that recipes are attached to."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ..core.recipe import asked_budget
from ..core.types import VtpruneError
from ..inputs.chats import PROCESSING, image_part, text_part
from ..inputs.images import read_image
from .guard import Guard
from .pruner import Asked, Pruner, asked, told

# What a request may say; anything else is refused instead of being ignored.
FIELDS = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
}
# What clients send beside it, with the values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
}
OURS = ("recipe", "keep")
PREFIX = "data:image/"


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        body: bytes.
        images: pictures in all its messages; each has at most ``vtprune.inputs.images.MEGAPIXELS``.
        tokens: new ones, also for requests that do not say how many.
    """

    body: int = 32_000_000
    images: int = 8
    tokens: int = 1024


class OneByOne(GenerateManager):
    """transformers' thread for generation, with each request's recipe attached there."""

    def __init__(self, pruner: Pruner):
        super().__init__()
        self.pruner = pruner

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().submit(partial(self.pruner.run, asked.get(), fn), *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(partial(self.pruner.run, asked.get(), fn), *args, **kwargs)


class Chats(ChatCompletionHandler):
    """Requests to ``/v1/chat/completions``."""

    def __init__(self, name: str, model: Any, processor: Any, pruner: Pruner, limits: Limits):
        super().__init__(ModelManager(device="cpu"), GenerationState())
        self.name, self.model, self.processor, self.pruner, self.limits = name, model, processor, pruner, limits
        self.generation_state._generate_managers[name] = OneByOne(pruner)

    async def handle_request(self, body: dict, request_id: str) -> JSONResponse | StreamingResponse:
        ours = {name: body.pop(name, None) for name in OURS}
        request = Asked(self.pruner.chosen(ours["recipe"], asked_budget(ours["keep"])))
        self._checked(body)
        body["messages"] = await run_in_threadpool(partial(_messages, body.get("messages"), self.limits.images))
        asked.set(request)
        response = await super().handle_request(body, request_id)
        if isinstance(response, StreamingResponse):
            response.body_iterator = _stream(response.body_iterator, request)
            return response
        content = {**json.loads(bytes(response.body)), "vtprune": told(request.report)}
        return JSONResponse(content, status_code=response.status_code)

    def _checked(self, body: dict) -> None:
        """Raises :class:`VtpruneError` for a request that cannot be served as it stands; fills in the limit."""
        for name in [n for n, v in body.items() if v is None or v in NEUTRAL.get(n, ())]:
            del body[name]
        unknown = sorted(set(body) - FIELDS)
        if unknown:
            raise VtpruneError(
                f"{', '.join(map(repr, unknown))} is not served here; there are {', '.join(sorted(FIELDS))}"
            )
        if body.get("model") not in (None, self.name):
            raise HTTPException(404, f"there is no model {body['model']!r} here, only {self.name!r}")
        wanted = body.pop("max_completion_tokens", None) or body.get("max_tokens")
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise VtpruneError(f"max_tokens={wanted!r} is not a whole number of at least 1")
        if wanted is not None and wanted > self.limits.tokens:
            raise VtpruneError(f"max_tokens={wanted} is more than the {self.limits.tokens} served here")
        body["max_tokens"] = self.limits.tokens if wanted is None else wanted
        for name, low, high in (("temperature", 0, 2), ("top_p", 0, 1)):
            value = body.get(name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and low <= value <= high):
                raise VtpruneError(f"{name}={value!r} is not a number from {low} to {high}")

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        return self.name, self.model, self.processor

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
        return messages  # read before


def _messages(messages: Any, most: int) -> list[dict[str, Any]]:
    """A conversation as processors take it, with its pictures read. Raises :class:`VtpruneError`."""
    if not isinstance(messages, list) or not messages:
        raise VtpruneError("messages is a list of at least one message")
    out, pictures = [], 0
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise VtpruneError("a message has a role, which is system, user or assistant, and a content")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise VtpruneError("the content of a message is a text or a list of parts")
        pictures += sum(isinstance(p, dict) and p.get("type") == "image_url" for p in parts)
        if pictures > most:
            raise VtpruneError(f"a request has at most {most} pictures here")
        out.append({"role": message["role"], "content": [_part(part) for part in parts]})
    return out


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text_part(part["text"])
    if kind != "image_url":
        raise VtpruneError(f"parts of a message are text and image_url, not {kind!r}")
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    head, comma, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not head.startswith(PREFIX) or not comma:
        raise VtpruneError("pictures come with the request (data:image/png;base64,…): this server fetches nothing")
    try:
        raw = base64.b64decode(data, validate=True)
    except binascii.Error as e:
        raise VtpruneError(f"the picture's base64 is damaged: {e}") from e
    return image_part(read_image(io.BytesIO(raw), "the picture"))


async def _stream(chunks: AsyncIterable[Any], request: Asked) -> AsyncIterator[str]:
    """transformers' chunks; the one that ends the answer tells of the prefill as well."""
    try:
        async for chunk in chunks:
            for event in (chunk.decode() if isinstance(chunk, bytes) else chunk).split("\n\n"):
                if event:
                    yield f"data: {json.dumps(await _event(event.removeprefix('data: '), request))}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def _event(text: str, request: Asked) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError:  # transformers puts the message of an error between quotes as it is
        message = text.removeprefix('{"error": "').removesuffix('"}')
        return {"error": {"message": message, "type": "server_error"}}
    if isinstance(event.get("error"), str):
        return {"error": {"message": event["error"], "type": "server_error"}}
    if any(choice.get("finish_reason") for choice in event.get("choices", ())):
        await asyncio.wrap_future(request.done)
        event["vtprune"] = told(request.report)
    return event


def _refusal(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status_code=status)


def _refused(status: int, message: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    answer = _refusal(status, message)
    return answer.raw_headers, bytes(answer.body)


def app(
    name: str,
    model: Any,
    processor: Any,
    pruner: Pruner,
    limits: Limits,
    taken: Callable[[str], bool],
) -> FastAPI:
    """The web application.

    Args:
        name: under which the model is asked for.
        model, processor: that answer.
        pruner: of the model.
        limits: of one request.
        taken: whether it is asked under a name (:func:`vtprune.serving.guard.names`).
    """
    chats = Chats(name, model, processor, pruner, limits)
    made = FastAPI(title="vtprune", docs_url=None, redoc_url=None, openapi_url=None)

    @made.exception_handler(VtpruneError)
    async def refused(request: Request, error: VtpruneError) -> JSONResponse:
        return _refusal(400, str(error))

    @made.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, str(error.detail))

    @made.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> JSONResponse:
        return _refusal(400, "the request ended before it was whole")  # nobody reads it

    @made.post("/v1/chat/completions")
    async def completions(request: Request) -> Any:
        try:
            body = json.loads(await request.body())
        except ValueError as e:
            raise VtpruneError(f"the request is no JSON: {e}") from e
        if not isinstance(body, Mapping):
            raise VtpruneError("the request is no JSON object")
        try:
            return await chats.handle_request(dict(body), f"chatcmpl-{id(request):x}")
        except (VtpruneError, HTTPException):
            raise
        except PROCESSING as e:  # what a processor or the model raises on inputs that it does not take
            raise VtpruneError(f"this model does not take this request: {type(e).__name__}: {e}") from e

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "vtprune", "recipes": pruner.names}
        return {"object": "list", "data": [entry]}

    @made.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    made.add_middleware(Guard, taken=taken, most=limits.body, command="vtprune serve", refusal=_refused)
    return made
