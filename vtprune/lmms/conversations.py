"""From lmms-eval's requests to conversations as the processors take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from ..core.types import VtpruneError
from ..inputs import videos
from ..inputs.chats import image_part, text_part, video_parts
from ..inputs.images import open_image

VIDEOS = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".flv", ".wmv", ".ts")


@dataclass(frozen=True)
class Conversations:
    """Makes conversations.

    Attributes:
        system_prompt: put in front of every conversation, unless it is empty or ``None``.
        max_frames: of a video, evenly spaced.
        processor: of the model; where it takes no videos, their frames are shown as images.
    """

    system_prompt: str | None
    max_frames: int
    processor: Any = None

    def of_request(self, request: Instance, documents: Mapping[str, Any], simple: bool) -> list[dict[str, Any]]:
        """Of one request; ``documents``: by task, split and number; ``simple``: lmms-eval's interface in which images
        come first, then the context."""
        if not simple:
            _, to_messages, _, number, task, split = request.args
            return self.of_messages(to_messages(documents[task][split][number]))
        context, (to_visual, number, task, split) = request.args[0], request.args[-4:]
        visuals = flat(to_visual(documents[task][split][number]))
        text = context.replace("<image>", "").replace("<video>", "").strip()
        parts = [part for v in visuals for part in self._shown(v)]
        return [*self._system(), {"role": "user", "content": [*parts, text_part(text)]}]

    def of_messages(self, messages: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages as the processors take them."""
        out = self._system()
        for m in messages:
            content = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            parts = [
                [text_part(c["text"])] if c["type"] == "text" else self._shown(c["url"], c["type"]) for c in content
            ]
            out.append({"role": m["role"], "content": [part for shown in parts for part in shown]})
        return out

    def _shown(self, source: Any, kind: str = "image") -> list[dict[str, Any]]:
        """A picture (or its file), or a video as :func:`vtprune.inputs.videos.read` takes it, as parts of a message."""
        times: dict[str, Any] = {}
        if isinstance(source, dict):
            kind, times = source.get("type", kind), {k: source.get(f"video_{k}") for k in ("start", "end")}
            source = _address(source)
        if kind not in ("image", "video"):
            raise VtpruneError(
                f"this model class takes text, images and videos, not {kind}: use base= with an lmms-eval model that "
                "does"
            )
        if kind == "video" or _moves(source):
            return video_parts(self.processor, videos.read(source, self.max_frames, **times))
        return [image_part(source.convert("RGB") if isinstance(source, Image.Image) else open_image(source))]

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": [text_part(self.system_prompt)]}] if self.system_prompt else []


def _address(visual: dict[str, Any]) -> Any:
    """What a task's visual that is a dict points to."""
    named = [visual[k] for k in ("url", "path", "video", "image") if visual.get(k) is not None]
    if not named:
        raise VtpruneError(f"a visual with {', '.join(map(str, visual)) or 'nothing'} names no file: give it a path")
    return named[0]


def _moves(source: Any) -> bool:
    """Whether a visual that is not said to be a video is one: a file by its name, an animated picture, and whatever is
    no picture (frames as an array, a reader of frames)."""
    if isinstance(source, Image.Image):
        return False
    if isinstance(source, str | Path):
        return str(source).lower().endswith(VIDEOS) or videos.is_animated(source)
    return True


def flat(visuals: Any) -> list[Any]:
    """A task's visuals: nothing, one, or lists of them."""
    if visuals is None:
        return []
    return [v for entry in visuals for v in flat(entry)] if isinstance(visuals, list | tuple) else [visuals]
