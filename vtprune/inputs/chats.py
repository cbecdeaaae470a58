"""Questions about images, as model inputs through the processor's chat template, and batched greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from ..core.types import VtpruneError
from . import videos

# What a processor or its chat template raises on inputs that it does not take; templates are programs of the model's
# maker.
PROCESSING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
    TemplateError,
)


def prepare(processor: Any, images: Sequence[Image.Image | Sequence[Image.Image]], questions: Sequence[str]) -> Any:
    """Left-padded model inputs for one question about each image, or about several: ``input_ids`` and
    ``attention_mask`` ``[B, T]``, ``pixel_values`` ``[B, 3, H, W]``.

    Raises :class:`VtpruneError` for lists of unequal or zero length and for what :func:`prepare_chats` refuses.
    """
    if not images or len(images) != len(questions):
        raise VtpruneError(f"give one question per image; got {len(images)} images and {len(questions)} questions")
    shown = [[i] if isinstance(i, Image.Image) else i for i in images]
    return prepare_chats(processor, about(shown, questions))


def about(images: Sequence[Sequence[Any]], questions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A conversation for each question about its images."""
    contents = [[*map(image_part, shown), text_part(q)] for shown, q in zip(images, questions, strict=True)]
    return [[{"role": "user", "content": content}] for content in contents]


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image", "image": image}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def video_parts(processor: Any, video: videos.Video) -> list[dict[str, Any]]:
    """A video (:func:`vtprune.inputs.videos.read`) as ``processor`` takes it: as a video, or where it has no place for
    one as a picture for each frame, in order."""
    if videos.takes_videos(processor):
        return [{"type": "video", "video": video}]
    return [image_part(picture) for picture in videos.pictures_of(video)]


def seconds(parts: Sequence[dict[str, Any]]) -> list[float]:
    """When the frames of the one video of ``parts`` (:func:`video_parts`) are shown; none where that is not known."""
    if [p["type"] for p in parts] == ["video"]:
        return videos.seconds(parts[0]["video"])
    shown = [p["image"].info for p in parts if p["type"] == "image"]
    return [info["seconds"] for info in shown] if all("seconds" in info for info in shown) else []


def prepare_chats(processor: Any, chats: Sequence[Sequence[dict[str, Any]]]) -> Any:
    """Left-padded model inputs for conversations that the model is to go on with.

    Args:
        chats: per sample the messages, ``{"role": ..., "content": [part, ...]}`` with :func:`image_part`,
            :func:`video_parts` and :func:`text_part`; all samples must show the same kinds of things (:func:`kinds`).

    Raises :class:`VtpruneError` for a processor without chat template, for one that takes no videos, for a mixture of
    kinds, for text that holds the mark of an image or video, for a template that leaves no place for them, and where
    the processor or its template fails.
    """
    seen = _checked(processor, chats)
    texts = _texts(processor, chats)
    special = _special(processor, texts)
    media = _media(processor, chats, seen)
    with _in_one_line(type(processor).__name__):
        inputs = processor(
            **media, text=texts, padding=True, padding_side="left", add_special_tokens=special, return_tensors="pt"
        )
    _check_places(processor, inputs["input_ids"], seen)
    return inputs


def prompt_ids(processor: Any, chats: Sequence[Sequence[dict[str, Any]]]) -> list[list[int]]:
    """The prompts of :func:`prepare_chats` as engines take them, with one placeholder for each image."""
    _checked(processor, chats)
    texts = _texts(processor, chats)
    return processor.tokenizer(texts, add_special_tokens=_special(processor, texts))["input_ids"]


def _special(processor: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer has to add the start token: not to what a template begins with it."""
    start = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    return not (start and texts[0].startswith(start))


def _checked(processor: Any, chats: Sequence[Sequence[dict[str, Any]]]) -> tuple[str, ...]:
    """What all of ``chats`` show (:func:`kinds`). Raises :class:`VtpruneError` for what no template can put."""
    if not getattr(processor, "chat_template", None):
        raise VtpruneError(
            f"{type(processor).__name__} has no chat template, so it cannot say how a question is put to the model"
        )
    if len(shown := {kinds(chat) for chat in chats}) > 1:
        raise VtpruneError(
            "samples that show different kinds of things cannot share a batch: "
            f"{' / '.join(', '.join(k) or 'text' for k in sorted(shown))}"
        )
    texts = [text for chat in chats for text in _parts(chat, "text")]
    for mark in marks(processor):
        if any(mark in text for text in texts):
            raise VtpruneError(
                f"the text holds {mark!r}, which stands for a picture in this model's prompts: leave it out, pictures "
                "are put in by themselves"
            )
    return shown.pop()


def _texts(processor: Any, chats: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """The prompts, through the chat template."""
    with _in_one_line(f"the chat template of {type(processor).__name__}"):
        bare = [_bare(chat) for chat in chats]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in bare]
    if not all(isinstance(t, str) for t in texts):
        raise VtpruneError(f"the chat template of {type(processor).__name__} gives no text")
    return texts


def _media(processor: Any, chats: Sequence[Sequence[dict[str, Any]]], seen: tuple[str, ...]) -> dict[str, Any]:
    """Pictures and videos, as keywords of the processor."""
    out: dict[str, Any] = {"images": None}
    if "image" in seen:
        images = [_parts(chat, "image") for chat in chats]
        out["images"] = [part[0] for part in images] if all(len(part) == 1 for part in images) else images
    if "video" in seen:
        if not videos.takes_videos(processor):
            raise VtpruneError(f"{type(processor).__name__} takes no videos")
        shown = [_parts(chat, "video") for chat in chats]
        out["videos"] = [[frames for frames, _ in part] for part in shown]
        out["video_metadata"] = [[metadata for _, metadata in part] for part in shown]
        out["do_sample_frames"] = False
    return out


def _check_places(processor: Any, ids: torch.Tensor, seen: tuple[str, ...]) -> None:
    """``ids`` ``[B, T]`` hold a place for what is seen: a template that forgets it leaves the model to guess, and not
    every processor counts."""
    tokenizer = getattr(processor, "tokenizer", None)
    if not seen or tokenizer is None:
        return
    known = {number for number in map(tokenizer.convert_tokens_to_ids, marks(processor)) if isinstance(number, int)} - {
        tokenizer.unk_token_id
    }
    places = torch.tensor(sorted(known), device=ids.device)
    if known and not torch.isin(ids, places).any(1).all():
        raise VtpruneError(
            f"the chat template of {type(processor).__name__} leaves no place for the {seen[0]} in the prompt"
        )


def marks(processor: Any) -> set[str]:
    """What stands for pictures and videos in a prompt: the words that the processor holds as ``..._token`` or
    ``..._tag``, and that of the placeholder."""
    words = {value for name, value in vars(processor).items() if name.endswith(("_token", "_tag"))}
    place = getattr(processor, "image_token_id", None)
    if isinstance(place, int):
        words.add(processor.tokenizer.convert_ids_to_tokens(place))
    return {word for word in words if isinstance(word, str) and word}


@contextmanager
def _in_one_line(who: str) -> Iterator[None]:
    """What ``who`` raises, as an error of ours in one line."""
    try:
        yield
    except VtpruneError:
        raise
    except PROCESSING as e:
        raise VtpruneError(
            f"{who} fails on this: {type(e).__name__}: {' '.join(str(e).split())[:300] or 'no reason given'}"
        ) from e


def _parts(chat: Sequence[dict[str, Any]], kind: str) -> list[Any]:
    return [part[kind] for message in chat for part in message["content"] if part["type"] == kind]


def kinds(chat: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """What a conversation shows: ``()``, ``("image",)``, ``("video",)`` or both."""
    return tuple(kind for kind in ("image", "video") if _parts(chat, kind))


def _bare(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation for the template: images and videos are placeholders."""
    return [{**m, "content": [p if p["type"] == "text" else {"type": p["type"]} for p in m["content"]]} for m in chat]


@torch.no_grad()
def generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int = 5) -> list[str]:
    """Greedy continuations of ``inputs`` (see :func:`prepare`), decoded and stripped."""
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return [
        text.strip()
        for text in processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def ask(
    model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 5
) -> list[str]:
    """The model's greedy answers to one question about each image, as one batch."""
    return generate(model, processor, prepare(processor, images, questions), max_new_tokens)
