"""What methods may read beside the model: a CLIP model, a tokenizer. Each comes from a folder that an option names,
once per process; nothing is downloaded, no code of the folder's own is run, and whatever is wrong with it is one
sentence. transformers is loaded when the first is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .types import VtpruneError

T = TypeVar("T")
_made: dict[tuple[str, Path], Any] = {}  # by kind and folder
_making = Lock()


def clip(option: str, folder: str) -> Clip:
    """The CLIP model in ``folder``, which ``option`` names. Raises :class:`VtpruneError` for anything but a folder that
    holds a whole CLIP model and its tokenizer."""
    return _once("clip", option, folder, lambda path: Clip(folder, *_clip(option, path)))


def words(option: str, folder: str) -> Words:
    """The tokenizer in ``folder``, which ``option`` names. Raises :class:`VtpruneError` for anything but a folder that
    holds one."""
    return _once("words", option, folder, lambda path: Words(folder, _tokenizer(option, path)))


class Clip:
    """The parts of a CLIP model that put texts and the states of its vision tower into one space of d numbers."""

    def __init__(self, folder: str, model: Any, tokenizer: Any):
        vision = dict(model.vision_model.named_modules())
        norm = next(module for name, module in vision.items() if name.rpartition(".")[2] == "post_layernorm")
        parts = {
            "words": model.text_model,
            "project_words": model.text_projection,
            "norm": norm,
            "project": model.visual_projection,
        }
        self.folder, self.tokenizer = folder, tokenizer
        self.width: int = model.visual_projection.in_features  # of the tower's states
        self.length: int = model.config.text_config.max_position_embeddings  # of a segment
        self._parts = {torch.device("cpu"): nn.ModuleDict(parts).eval().requires_grad_(False)}
        self._lock = Lock()

    def text(self, words: str, device: torch.device) -> Tensor:
        """Embeddings of ``words``, ``[M, d]`` on ``device``: longer texts are cut into M segments, each with the tokens
        that begin and end a text."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        with self._lock:  # a tokenizer serves one thread at a time
            ids = self.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
        step = self.length - 2
        segments = [[first, *ids[i : i + step], last] for i in range(0, max(len(ids), 1), step)]
        # a text ends with its first end: what fills a row is not seen
        rows = torch.tensor([s + [last] * (len(segments[0]) - len(s)) for s in segments], device=device)
        parts: Any = self._on(device)
        return parts["project_words"](parts["words"](rows).pooler_output)

    def image(self, states: Tensor) -> Tensor:
        """Embeddings ``[..., d]`` of the tower's ``states`` ``[..., C]``, at least 32 bits. Raises
        :class:`VtpruneError` for states of another width than the model's own tower has."""
        if states.shape[-1] != self.width:
            raise VtpruneError(
                f"{self.folder} holds a CLIP model whose tower is {self.width} wide, and this one is "
                f"{states.shape[-1]}: name the folder of the model that the tower was taken from"
            )
        parts: Any = self._on(states.device)
        norm, project = parts["norm"], parts["project"]
        x = states.to(torch.promote_types(states.dtype, torch.float32))
        x = nn.functional.layer_norm(x, (self.width,), norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return nn.functional.linear(x, project.weight.to(x.dtype))

    def _on(self, device: torch.device) -> nn.ModuleDict:
        """The parts on ``device``, copied there the first time."""
        with self._lock:
            if device not in self._parts:
                self._parts[device] = copy.deepcopy(self._parts[torch.device("cpu")]).to(device)
            return self._parts[device]


class Words:
    """A language model's tokenizer, backwards."""

    def __init__(self, folder: str, tokenizer: Any):
        self.folder, self.tokenizer = folder, tokenizer
        self._lock = Lock()

    def __call__(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` stand for, without special tokens. Raises :class:`VtpruneError` for tokens that the
        tokenizer does not know."""
        if ids and max(ids) >= len(self.tokenizer):
            raise VtpruneError(
                f"the tokenizer in {self.folder} knows {len(self.tokenizer)} tokens, and the prompt holds token "
                f"{max(ids)}: name the folder of the model's own"
            )
        with self._lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True)


def _once(kind: str, option: str, folder: str, make: Callable[[Path], T]) -> T:
    if not Path(folder).is_dir():
        raise VtpruneError(
            f"{option}={folder!r} is no folder: nothing is downloaded, so a hub id does not do; download the model and "
            "name the folder"
        )
    key = kind, Path(folder).resolve()
    with _making:
        if key not in _made:
            _made[key] = make(key[1])
        return _made[key]


def _clip(option: str, path: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, CLIPModel

    what = f"{option}: cannot load {path}"
    with told(what):
        kind = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).model_type
    if kind != "clip":
        raise VtpruneError(f"{option}: {path} holds a {kind} model, and a whole CLIP model (clip) is needed")
    with quietly(), told(what):
        model, info = CLIPModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    if missing := sorted(map(str, info["missing_keys"])):
        raise VtpruneError(f"{what}: its files lack {len(missing)} of the model's weights, {missing[0]} among them")
    tokenizer = _tokenizer(option, path)
    text = model.config.text_config
    ends = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id  # 2: files from before it was told
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id != ends:
        raise VtpruneError(f"{what}: its tokenizer does not end texts with the token that the model looks for, {ends}")
    return model, tokenizer


def _tokenizer(option: str, path: Path) -> Any:
    from transformers import AutoTokenizer

    what = f"{option}: cannot load a tokenizer from {path}"
    with quietly(), told(what):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    names = ("tokenizer.json", "tokenizer.model", "tekken.json", *tokenizer.vocab_files_names.values())
    if not any((path / name).is_file() for name in names):  # transformers makes an empty one of the right class
        raise VtpruneError(f"{what}: there is no tokenizer.json in it, nor another file of one")
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Within it transformers reports nothing by itself: neither how far loading is, nor, in many lines, what does not
    fit."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever the libraries that read model folders raise, as a :class:`VtpruneError` that begins with ``what``. They
    have no common class of errors: those in Rust raise bare ones, cut files ``SafetensorError``, pickles
    ``UnpicklingError``, configurations errors of their own."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, Exception) and not isinstance(e, VtpruneError):
            raise VtpruneError(f"{what}: {reason(e)}") from e
        raise


def reason(e: BaseException, most: int = 300) -> str:
    """What an exception says, on one line of at most ``most`` characters; of several paragraphs the first."""
    text = " ".join(str(e).strip().split("\n\n")[0].split())
    text = text if len(text) <= most else text[: most - 3] + "..."
    return (
        text if isinstance(e, OSError | VtpruneError) and text else f"{type(e).__name__}: {text or 'no reason given'}"
    )
