"""Counts the matrix products that really run: for language models whose configuration does not say what a token costs
(experts, latent attention)."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ...core.types import UnsupportedError

PRODUCTS = {  # which arguments are multiplied
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "_scaled_mm": (0, 1),
    "_int_mm": (0, 1),
    "_grouped_mm": (0, 1),
    "grouped_mm_fallback": (0, 1),
}


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products in ``total``, of this thread alone; grouped products of experts too,
    which torch's own counter leaves out. ``blind``: attention ran in a kernel that is not known here."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.blind = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = str(func).split(".")[1] if "." in str(func) else str(func)  # "aten.mm.default"
        if name not in PRODUCTS and not name.startswith("_scaled_dot_product") and hasattr(func, "decompose"):
            with self:
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        out = func(*args, **(kwargs or {}))
        if name in PRODUCTS:
            a, b = (args[i].shape for i in PRODUCTS[name])
            self.total += a.numel() * b[-1]
        elif name.startswith("_scaled_dot_product"):
            q, k, v = (args[i].shape for i in range(3))
            self.total += q.numel() // q[-1] * k[-2] * (q[-1] + v[-1])
        elif "flash" in name or "attention" in name:
            self.blind = True
        return out


def fit(name: str, number: int, work: list[tuple[int, int]]) -> tuple[int, int]:
    """Multiply-adds per token, and per query and key, of layer ``number``. ``work``: tokens and multiply-adds of three
    prompts.

    Raises:
        UnsupportedError: they are not a whole number per token and one per pair of tokens.
    """
    (n, f), (m, g), (p, h) = work
    pair, left = divmod(g * n - f * m, m * n * (m - n))
    row, rest = divmod(f - pair * n * n, n)
    if left or rest or h != row * p + pair * p * p:
        raise UnsupportedError(
            f"{name}: the work of layer {number} is not so much per token and so much per pair of tokens ({f:,}, {g:,} "
            f"and {h:,} multiply-adds for "
            f"{n}, {m} and {p} tokens), so that what pruning saves could not be told"
        )
    return row, pair
