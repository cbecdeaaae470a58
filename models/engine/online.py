"""MLPs that are left out of an answer by what its first tokens showed (AdaSkip, arXiv 2501.02336, its online part).

Of the first ``watch`` tokens behind a prompt it is noted how an MLP, with its residual sum, changes them: ``z = y +
MLP(norm y)``. From then on the method says for which samples it is left out: ``z`` becomes ``y`` times a factor. Every
token is judged by those in front of it alone, so that one by one, several at once and a whole sequence give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from ..base import PlannedCut
from . import host
from .arguments import LAYER
from .description import Decoder
from .halves import Halves, probe_order, silence
from .request import Call, Shown
from .rows import rows_of, same, with_rows
from .skipping import check_rows, entering, probe_halves
from .toy import toy_prompt

_reads: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()  # language model -> of each layer, as below


class Online:
    """Watches the MLPs at ``cuts``; ``now()``: the forward that the thread is in."""

    def __init__(self, decoder: Decoder, cuts: list[PlannedCut], ledger: UndoLedger, now: Callable[[], Call | None]):
        self.now, self.watched = now, {(planned.cut.layer, planned.cut.half) for planned in cuts}
        if not cuts:
            return
        probe_halves(decoder)
        names = reads_between(decoder)
        for planned in cuts:
            number, watch = planned.cut.layer, planned.cut.watch
            layer, learn = decoder.layers[number], ledger.timed(planned.learn)
            mlp = getattr(layer, host.HALVES["mlp"])
            ledger.before(getattr(layer, names[number]), self._between(number))
            ledger.replace(mlp, "forward", self._forward(number, layer, mlp, watch, learn))
            ledger.after(layer, self._leave(number, watch, learn))

    def _between(self, number: int) -> Callable:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            call = self.now()
            if call is not None and call.request is not None and not call.aside:
                call.between[number] = LAYER.first(args, kwargs)

        return enter

    def _forward(self, number: int, layer: nn.Module, module: nn.Module, watch: int, learn: Callable) -> Callable:
        own = module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered = entering(self.now(), number, "mlp", layer, args, kwargs)
            if entered is None:
                return own(*args, **kwargs)
            call, x = entered
            behind = _behind(call, x) >= watch  # [B, T]
            if bool(behind.all()) and all(_decided(call, number, learn)[0]):
                return silence("mlp", x)
            return own(*args, **kwargs)

        return torch.compiler.disable(forward, recursive=False)

    def _leave(self, number: int, watch: int, learn: Callable) -> Callable:
        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = self.now()
            if call is None or call.request is None or call.aside:
                return None
            z, y = rows_of(output), call.between.pop(number, None)
            place = _behind(call, z)
            if int(place.max()) < 0:
                return None
            if y is None or y.shape != z.shape:
                raise UnsupportedError(REPLACED.format(f"norm in front of the MLP of layer {number}"))
            _note(call, number, place, y, z, watch)
            if int(place.max()) < watch:
                return None
            left, scale = _decided(call, number, learn)
            gone = torch.tensor(left)[:, None] & (place >= watch)
            if not bool(gone.any()):
                return None
            shown = call.request.shown[number]
            shown.left = [before or now for before, now in zip(shown.left, gone.any(1).tolist(), strict=True)]
            factor = torch.tensor(scale, dtype=z.dtype)[:, None, None].to(z.device)
            return with_rows(output, torch.where(gone[..., None].to(z.device), y * factor, z))

        return leave


REPLACED = "the {} was replaced since attach(), what stands there now is not watched: remove() and attach again"


def _behind(call: Call, x: Tensor) -> Tensor:
    """The how many-th token behind its prompt each row of ``x`` ``[B, T, C]`` is, ``[B, T]`` on the CPU, the first 0;
    -1: of the prompt, padding, or of a sample without tokens that could be pruned."""
    request = call.request
    assert request is not None
    if call.places is None:
        if call.prefill:
            check_rows(call)
            assert call.level is not None and call.question is not None
            question, valid = (t.cpu() for t in (call.question, call.level.valid))
            column = torch.arange(valid.shape[1])
            first = torch.where(question & valid, column, valid.shape[1]).amin(1, keepdim=True)
            real, whole = valid & (column > first), torch.tensor(request.levels[0].counts) == 0
            request.behind = torch.where(whole, -1, real.sum(1)).tolist()
            request.origin = list(range(len(real)))
            before = torch.zeros_like(first)
        else:
            real, before = _real(call).cpu(), torch.tensor(request.behind)[:, None]
            whole = before[:, 0] < 0
        place = torch.where(real & ~whole[:, None], before + real.long().cumsum(1) - 1, -1)
        call.places = place[:, -x.shape[1] :]
    return call.places


def _real(call: Call) -> Tensor:
    """Which tokens behind the prompt are no padding, ``[B, new]``, also where a model was given its masks ready made:
    those that the last row sees of a mask of full attention."""
    request, mask = call.request, call.mask
    assert request is not None and call.tail is not None
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return call.tail
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    seen = None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    # a window that has left the whole prompt behind also hides tokens of the answer, which are no padding
    if seen is None or not bool(seen[:, : request.length].any(1).all()):
        raise UnsupportedError(
            "which tokens behind the prompt are padding is not known of such a mask, and those are not to be watched: "
            "pass a 2-D attention_mask [B, T]"
        )
    return seen[:, request.length : request.length + call.tail.shape[1]]


def _note(call: Call, number: int, place: Tensor, y: Tensor, z: Tensor, watch: int) -> None:
    """Writes down what the MLP of layer ``number`` made of the rows ``y`` ``[B, T, C]``, if they are watched."""
    request, now = call.request, (place >= 0) & (place < watch)
    assert request is not None
    if not bool(now.any()):
        return
    if number not in request.shown:
        empty = torch.zeros(len(place), watch + 1, dtype=torch.float64, device=z.device)
        request.shown[number] = Shown(empty, empty.clone(), [False] * len(place))
    shown, at = request.shown[number], torch.where(now, place, watch).to(z.device)
    y, z = y.detach().double(), z.detach().double()
    before, after = y.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny), z.norm(dim=-1)
    similar = (y * z).sum(-1) / (before * after).clamp_min(torch.finfo(torch.float64).tiny)
    shown.similar, shown.ratio = shown.similar.scatter(1, at, similar), shown.ratio.scatter(1, at, after / before)
    shown.decided = None


def _decided(call: Call, number: int, learn: Callable) -> tuple[list[bool], list[float]]:
    """For which of the cache's samples the MLP of layer ``number`` is left out behind what was watched, and what then
    passes by goes on times."""
    assert call.request is not None
    shown = call.request.shown[number]
    if shown.decided is None:
        left, scale = learn(shown.similar[:, :-1], shown.ratio[:, :-1])
        shown.decided = left.tolist(), scale.tolist()
    return shown.decided


def reads_between(decoder: Decoder) -> tuple[str, ...]:
    """The name of each layer's part that is given what stands between its attention and its MLP, ``[B, T, C]``: the
    norm in front of the MLP, or the MLP itself.

    Raises:
        UnsupportedError: there is none.
    """
    probe_order(decoder)
    with toy_prompt(decoder, "between the halves") as toy:
        if toy is None:
            return _reads[decoder.lm]
        ledger, names = UndoLedger(), list[str]()

        def check(number: int, layer: nn.Module, own: Callable) -> Callable:
            @functools.wraps(own)
            def forward(*args: Any, **kwargs: Any) -> Any:
                given.clear()
                x = LAYER.first(args, kwargs)
                between = halves.run(own, {"attention": x.roll(1, -1), "mlp": None}, args, kwargs)
                alike = [name for name, x in given.items() if same(x, between)]
                if not alike or list(given).index(alike[0]) > list(given).index(host.HALVES["mlp"]):
                    raise UnsupportedError(
                        f"{toy.name}: no part of layer {number} reads what stands between its attention and its MLP, "
                        "so it cannot be told how the MLP changes it"
                    )
                names.append(alike[0])
                return between

            return forward

        def note(name: str) -> Callable:
            def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
                if args and isinstance(args[0], Tensor):
                    given.setdefault(name, args[0])

            return enter

        given = dict[str, Tensor]()
        try:
            halves = Halves(decoder.layers, ledger)
            for number, layer in enumerate(decoder.layers):
                for name, part in layer.named_children():
                    ledger.before(part, note(name))
                ledger.replace(layer, "forward", check(number, layer, layer.forward))
            toy.root(toy.ids, attention_mask=toy.mask)
        finally:
            ledger.undo()
        _reads[decoder.lm] = tuple(names)
    return _reads[decoder.lm]
