"""From lmms-eval's requests to conversations as the processors take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from ..core.types import VtpruneError
from ..inputs.chats import image_part, text_part, video_part
from ..inputs.images import open_image

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


@dataclass(frozen=True)
class Conversations:
    """Makes conversations.

    Attributes:
        system_prompt: put in front of every conversation, unless it is empty or ``None``.
        max_frames: of a video.
    """

    system_prompt: str | None
    max_frames: int

    def of_request(self, request: Instance, documents: Mapping[str, Any], simple: bool) -> list[dict[str, Any]]:
        """Of one request; ``documents``: by task, split and number; ``simple``: lmms-eval's interface in which images
        come first, then the context."""
        if not simple:
            _, to_messages, _, number, task, split = request.args
            return self.of_messages(to_messages(documents[task][split][number]))
        context, (to_visual, number, task, split) = request.args[0], request.args[-4:]
        visuals = flat(to_visual(documents[task][split][number]))
        parts = [*map(self._shown, visuals), text_part(context.replace("<image>", "").strip())]
        return [*self._system(), {"role": "user", "content": parts}]

    def of_messages(self, messages: Any) -> list[dict[str, Any]]:
        """lmms-eval's messages as the processors take them."""
        out = self._system()
        for m in messages:
            content = [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            parts = [text_part(c["text"]) if c["type"] == "text" else self._shown(c["url"], c["type"]) for c in content]
            out.append({"role": m["role"], "content": parts})
        return out

    def _shown(self, source: Any, kind: str = "image") -> dict[str, Any]:
        """A picture (or its file) or a video file as a part of a message."""
        if kind == "video" or (isinstance(source, str) and source.lower().endswith(VIDEOS)):
            return video_part(source, self.max_frames)
        if kind != "image":
            raise VtpruneError(
                f"this model class takes text, images and videos, not {kind}: use base= with an lmms-eval model that "
                "does"
            )
        return image_part(source.convert("RGB") if isinstance(source, Image.Image) else open_image(source))

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": [text_part(self.system_prompt)]}] if self.system_prompt else []


def flat(visuals: Any) -> list[Any]:
    """A task's visuals: nothing, one, or lists of them."""
    if visuals is None:
        return []
    return [v for entry in visuals for v in flat(entry)] if isinstance(visuals, list | tuple) else [visuals]
