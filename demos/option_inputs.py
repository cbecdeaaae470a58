"""The inputs of a side's options: as many of each kind as the method with most of them has, filled and shown for the
one that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .options import KINDS, OWN, Field, fields, most

MADE = {"choice": gr.Dropdown, "switch": gr.Checkbox, "number": gr.Number, "text": gr.Textbox}


def _shown(kind: str, field: Field | None, side: str) -> Any:
    """An input of this kind as it is for ``field``; out of sight without one."""
    # what the page still holds may be of the recipe before; gradio would refuse it in words of its own
    how: dict[str, Any] = {"allow_custom_value": True} if kind == "choice" else {}
    if field is None:
        return MADE[kind](label=f"{side}: no option", visible=False, **how)
    how |= {"label": f"{side}: {field.name}", "info": field.help, "value": field.start, "visible": True}
    if kind == "choice":
        how["choices"] = list(field.choices)
    elif kind == "number":
        how |= {"precision": 0 if field.whole else None, "placeholder": OWN}
    elif kind == "text":
        how["placeholder"] = OWN
    return MADE[kind](**how)


def _shelf(recipe: str, kind: str, side: str, count: int) -> list[Any]:
    """So many inputs of one kind, the first ones for the options of ``recipe``."""
    mine = [field for field in fields(recipe) if field.kind == kind]
    return [_shown(kind, field, side) for field in (*mine, *[None] * (count - len(mine)))]


@dataclass(frozen=True)
class Inputs:
    """All inputs of one side, by kind.

    Attributes:
        recipe: holds the one that they are made for; the page may already show another.
    """

    side: str
    recipe: gr.Textbox
    slots: dict[str, list[Any]]

    def all(self) -> list[Any]:
        return [self.recipe, *(slot for kind in KINDS for slot in self.slots[kind])]

    def made_for(self, recipe: str) -> list[Any]:
        """:meth:`all` of them for the options of ``recipe``."""
        shelves = (_shelf(recipe, kind, self.side, len(self.slots[kind])) for kind in KINDS)
        return [recipe, *(slot for shelf in shelves for slot in shelf)]

    @staticmethod
    def sent(recipe: Any, values: Sequence[Any]) -> dict[str, list[Any]]:
        """The values of :meth:`all` by kind; none where the inputs are still those of another recipe."""
        if not values or values[0] != recipe:
            return {}
        left, count = iter(values[1:]), most()
        return {kind: [next(left) for _ in range(count[kind])] for kind in KINDS}


def option_inputs(side: str, recipe: Any, start: str) -> Inputs:
    """The inputs of ``side``, which follow its field ``recipe``, in the group that is being made."""
    count = most()
    # sent by the page with the values that it holds: what the server knows may be newer than they are
    mark = gr.Textbox(start, label=f"{side}: options of", visible="hidden")
    made = Inputs(side, mark, {kind: _shelf(start, kind, side, count[kind]) for kind in KINDS})
    how: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
    recipe.change(made.made_for, recipe, made.all(), **how)
    return made
