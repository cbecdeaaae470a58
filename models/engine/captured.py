"""Outputs of a block's modules, caught while it runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...core.ledger import UndoLedger
from ...core.types import UnsupportedError
from .run import Run


def catcher(
    capture: Callable[[nn.Module], dict[str, nn.Module]], ledger: UndoLedger, run: Callable[[], Run | None]
) -> Callable[[nn.Module, list[nn.Module]], None]:
    """``catch(block, caught)``: hooks the modules of ``capture(block)`` that are not ``caught`` yet; those that took
    their places since (adapters, quantised layers) too. Their outputs go to the pass ``run()`` that a thread is in."""

    def catch(block: nn.Module, caught: list[nn.Module]) -> None:
        try:
            modules = capture(block)
        except AttributeError as e:
            raise UnsupportedError(
                f"the attention of a {type(block).__name__} was replaced by something this adapter does not know: {e}"
            ) from e
        for name, module in modules.items():
            if not any(module is m for m in caught):
                ledger.after(module, keeper(name))
                caught.append(module)

    def keeper(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            now = run()
            if now is not None:
                now.captured[name] = output

        return keep

    return catch
