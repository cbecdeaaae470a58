"""Arguments of a block's forward, which come by position or by name."""

from __future__ import annotations

from typing import Any


class Arguments:
    """Finds and replaces them. ``names``: the forward's parameters, in order."""

    def __init__(self, names: list[str]):
        self.names = names

    def first(self, args: tuple, kwargs: dict) -> Any:
        return args[0] if args else kwargs[self.names[0]]

    def put_first(self, args: tuple, kwargs: dict, value: Any) -> tuple[tuple, dict]:
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, self.names[0]: value})

    def find(self, args: tuple, kwargs: dict, name: str) -> Any:
        place = self._place(args, name)
        return args[place] if place < len(args) else kwargs.get(name)

    def put(self, args: tuple, kwargs: dict, name: str, value: Any) -> tuple[tuple, dict]:
        place = self._place(args, name)
        if place < len(args):
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}

    def _place(self, args: tuple, name: str) -> int:
        return self.names.index(name) if name in self.names else len(args)


LAYER = Arguments(["hidden_states"])  # of decoder layers and their halves
