"""Copies of models that tests build again and again, each made once."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from vtprune.models.base import ADAPTERS

T = TypeVar("T")


class Mould(pickle.Pickler):
    """Something with tensors in it, as bytes and tensors: casts copies in a sixth of the time of ``copy.deepcopy``."""

    def __init__(self, made: Any):
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}
        self.file = io.BytesIO()
        super().__init__(self.file, protocol=pickle.HIGHEST_PROTOCOL)
        self.dump(made)

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self.places[id(obj)]

    def cast(self) -> Any:
        return _Cast(self).load()


class _Cast(pickle.Unpickler):
    def __init__(self, mould: Mould):
        super().__init__(io.BytesIO(mould.file.getvalue()))
        self.tensors = mould.tensors
        self.made: dict[int, Tensor] = {}

    def persistent_load(self, place: int) -> Tensor:
        if place not in self.made:  # tied weights stay tied
            self.made[place] = copy.deepcopy(self.tensors[place])
        return self.made[place]


def moulded(build: Callable[..., T]) -> Callable[..., T]:
    """``build``, run once for the same arguments; every call returns a copy of its own."""
    mould = functools.cache(lambda *args, **kwargs: Mould(build(*args, **kwargs)))
    return functools.wraps(build)(lambda *args, **kwargs: mould(*args, **kwargs).cast())


@moulded
def tiny(family: str = "llava", variant: str = "clip-llama") -> tuple[Any, dict[str, Tensor]]:
    """The family's tiny random model and inputs for it."""
    return ADAPTERS.get(family).tiny[variant]()
