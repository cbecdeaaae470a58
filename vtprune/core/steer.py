"""VISTA (arXiv 2502.03628, ICML 2025): steers a model, pruned or not, towards what its images add to the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from vtprune.models.engine.host import forget_compiled
from vtprune.models.engine.steering import Steerer

from .ledger import UndoLedger, strip
from .live import STEERED, attached, changing, handle_of, steered
from .planning import bind
from .types import UnsupportedError, VtpruneError
from .wrappers import unwrap

if TYPE_CHECKING:
    from torch import nn

    from vtprune.models.engine.description import Decoder
    from vtprune.models.engine.steered import Steered


MOST = 10_000  # lambda: beyond it a vector is all that is left


def steer(
    model: nn.Module,
    *,
    lam: float = 0.1,
    alpha: float = 0.3,
    window: tuple[int, int] | None = None,
    final_norm: bool = False,
) -> Steering:
    """Steers ``model`` and returns the :class:`Steering` that takes it back (also a context manager).

    Every prompt with images is read twice more before it is answered, once with its images and once without. The
    difference of each layer's outputs at the prompt's last token, ``v_l = h_l(images, prompt) - h_l(prompt)``, turns
    what that layer's MLP adds to the residual stream, in the prompt and in all that follows it:
    ``x <- |x| n(n(x) + lam (1 + max(0, cos(x, -v_l))) n(v_l))``, with n the L2 normalisation (visual steering vector,
    section 4.1). Logits become ``(1 - alpha) logits + alpha mean_l head(h_l)`` over a window of layers (self-logits
    augmentation, section 4.2). Samples without an image are the unsteered model's.

    Args:
        model: a multimodal Hugging Face model, with :func:`vtprune.attach` before, behind, or not at all: the vectors
            are those of the model as the attachment leaves it.
        lam: lambda, from 0 to 10,000; the paper's code uses 0.17 for CHAIR and 0.01 for POPE with LLaVA-1.5. 0: no
            vectors.
        alpha: the share of the layers in ``window`` in the logits, in [0, 1]. 0: logits stay.
        window: the first and the last of these layers, counted from 1; by default 25 and 30 of 32, scaled to the
            model's depth and rounded down.
        final_norm: their outputs go through the final norm; neither the paper's formula nor its code does so.

    Raises:
        VtpruneError: an option out of its range, a model that is steered already; :class:`UnsupportedError` for models
            that read no images, are built otherwise, or choose again at later turns (``shelve=True``).
    """
    model = unwrap(model)
    for name, value, most in (("lam", lam, MOST), ("alpha", alpha, 1)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise VtpruneError(f"{name}={value!r} is not a number from 0 to {most}")
    if not isinstance(final_norm, bool):
        raise VtpruneError(f"final_norm={final_norm!r} is not True or False")
    with changing:
        if model in steered:
            raise VtpruneError("this model is steered already; call remove() on its handle first")
        handle = handle_of(attached, model)
        if handle is None:
            strip(model)
        adapter = bind(model) if handle is None else handle.adapter
        if adapter.geometry.llm_layers == 0:
            raise UnsupportedError(f"a {type(model).__name__} has no language model that could be steered")
        own = getattr(adapter, "own", None)  # images are images, also where text is pruned
        decoder = (own or adapter).describe()
        if decoder.text is not None:
            raise UnsupportedError(f"a {type(model).__name__} reads no images, towards which it could be steered")
        if handle is not None and adapter.decoder.shelving is not None:
            raise UnsupportedError(STEERED)
        window = _window(window, len(decoder.layers))
        options = {"strength": float(lam), "share": float(alpha), "window": window, "normed": final_norm}
        return Steering(model, decoder, follows=tuple(adapter.follows), **options)


def _window(window: tuple[int, int] | None, depth: int) -> tuple[int, int]:
    if window is None:
        return max(25 * depth // 32, 1), max(30 * depth // 32, 1)
    whole = isinstance(window, tuple | list) and len(window) == 2
    if not whole or any(isinstance(n, bool) or not isinstance(n, int) for n in window):
        raise VtpruneError(f"window={window!r} is not two numbers of layers")
    if not 1 <= window[0] <= window[1] <= depth:
        raise VtpruneError(f"window={window!r} is not within the layers 1 to {depth}, the first one first")
    return window[0], window[1]


class Steering:
    """Owns one steering. Leaving its context, or :meth:`remove`, restores the model exactly, also after an exception.
    Made by :func:`steer`."""

    def __init__(self, model: nn.Module, decoder: Decoder, **options: Any):
        self.options = options
        self._decoder = decoder
        self._requests: WeakKeyDictionary[Any, Steered] = WeakKeyDictionary()
        self._model: Any = model
        self._ledger = UndoLedger()
        self.settle()
        steered[model] = ref(self)

    def settle(self) -> None:
        """Puts the hooks around what is attached now."""
        handle, self._ledger = handle_of(attached, self._model), UndoLedger()
        within = None if handle is None or not handle.geometry.llm_layers else handle.adapter.decoder
        try:
            self._engine = Steerer(
                self._decoder, self._ledger, requests=self._requests, attached=within, owner=self, **self.options
            )
        except BaseException:
            self._ledger.undo()
            steered.pop(self._model, None)
            raise
        forget_compiled()

    def lift(self) -> None:
        """Takes the hooks out, for as long as an attachment is made or removed; what was read stays known."""
        self._ledger.undo()

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restores the model; may be called more than once. Caches of prompts with images are closed: the model alone
        cannot go on with them."""
        with changing:
            if self._model is None:
                return
            self._ledger.undo()
            self._engine.end()
            forget_compiled()
            steered.pop(self._model, None)
            self._model = None
