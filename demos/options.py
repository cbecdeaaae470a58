"""A method's options as inputs of the page, made from the fields of its dataclass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from vtprune.core.info import GROUPS, group
from vtprune.core.recipes import RECIPES
from vtprune.core.types import VtpruneError
from vtprune.methods.base import METHODS, MethodInfo

from . import TRAINED

PUBLISHED = "published settings"  # recipes that are no method's own
OWN = "default"  # a choice that leaves an option as the method has it
FILES = {"weights", "clip", "tokenizer"}  # name files of the machine that runs the demo
KINDS = ("choice", "switch", "number", "text")


@dataclasses.dataclass(frozen=True)
class Field:
    """One input.

    Attributes:
        name: of the option.
        kind: ``"choice"``, ``"switch"`` (yes or no), ``"number"`` or ``"text"`` (a word, or numbers with commas).
        start: what it shows to begin with; left so, the option is not set.
        whole: whether a number is whole; of a text, whether its numbers are.
        words: whether a text is a word and no list of numbers.
        single: whether a text may be one number that is no list.
        choices: of a choice, as value by what is shown.
        help: what it does.
    """

    name: str
    kind: str
    start: Any
    whole: bool = False
    words: bool = False
    single: bool = False
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    help: str = ""


def described(name: str) -> tuple[str, str]:
    """Where the recipe ``name`` decides first, in a word, and what it does, in a line."""
    if name not in RECIPES:
        return PUBLISHED, "" if name != TRAINED else "dpvr-lf with the side branch that comes with the model"
    if name in METHODS:
        info = METHODS.get(name)
        return GROUPS[group(info)], info.idea
    recipe = RECIPES.get(name)
    return PUBLISHED, recipe.source or " then ".join(stage.method for stage in recipe.stages)


def labelled(names: Collection[str]) -> list[tuple[str, str]]:
    """``names`` as choices ``(label, name)``: grouped by where they decide, each with a line on what it does."""
    told = {name: described(name) for name in names}
    groups = {where: [n for n in names if told[n][0] == where] for where in (*GROUPS.values(), PUBLISHED)}
    return [(f"{n} · {where}: {told[n][1]}", n) for where, mine in groups.items() for n in mine]


def fields(recipe: str) -> list[Field]:
    """The inputs of ``recipe``'s last method, in the order of its dataclass; none for ``"dense"`` and for what is not
    registered."""
    if recipe not in RECIPES:
        return []
    stage = RECIPES.get(recipe).stages[-1]
    return _fields(METHODS.get(stage.method), stage.options)


def _fields(info: MethodInfo, given: Mapping[str, Any]) -> list[Field]:
    assert info.cls is not None
    hints = get_type_hints(info.cls)
    mine = [f for f in dataclasses.fields(info.cls) if f.name not in FILES]
    return [_field(f, hints[f.name], given.get(f.name, f.default)) for f in mine]


def _field(field: Any, hint: Any, start: Any) -> Field:
    kinds = _kinds(hint)
    told = {"name": field.name, "help": field.metadata.get("help", "")}
    if choices := field.metadata.get("choices"):
        offered = {str(c): c for c in choices if c is not None}
    elif kinds == {bool} and start is None:
        offered = {"yes": True, "no": False}
    elif kinds == {bool}:
        return Field(kind="switch", start=start, **told)
    elif kinds <= {int, float} and not _listed(hint):
        return Field(kind="number", start=start, whole=kinds == {int}, **told)
    else:
        single = bool({int, float} & set(_parts(hint)))
        return Field(
            kind="text", start=_written(start), whole=kinds == {int}, words=str in kinds, single=single, **told
        )
    shown = OWN if start is None else str(start)
    return Field(kind="choice", start=shown, choices={**({OWN: None} if start is None else {}), **offered}, **told)


def _parts(hint: Any) -> Sequence[Any]:
    """The types of a union, or the one."""
    return (hint,) if get_origin(hint) is tuple or not get_args(hint) else get_args(hint)


def _listed(hint: Any) -> bool:
    return any(get_origin(part) is tuple for part in _parts(hint))


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a value, or each of a list, may have."""
    plain = {get_args(part)[0] if get_origin(part) is tuple else part for part in _parts(hint)}
    return plain - {type(None)}


def _written(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def most() -> Counter[str]:
    """How many inputs of each kind the method with most of them has."""
    out: Counter[str] = Counter()
    for name in METHODS:
        out |= Counter(field.kind for field in _fields(METHODS.get(name), {}))
    return out


def chosen(recipe: str, values: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The options that were changed. ``values``: by kind, of the :func:`fields` of that kind in their order, more of
    them behind. Raises :class:`VtpruneError` for a text that is no list of numbers and a choice that is none."""
    left = {kind: iter(values.get(kind, ())) for kind in KINDS}
    out = {}
    for field in fields(recipe):
        value = next(left[field.kind], field.start)
        if value in (field.start, None, "") or (field.kind == "choice" and value == OWN):
            continue
        out[field.name] = _value(field, value)
    return out


def _value(field: Field, value: Any) -> Any:
    if field.kind == "choice":
        if value not in field.choices:
            raise VtpruneError(f"{field.name}={value!r} is not one of {', '.join(map(repr, field.choices))}")
        return field.choices[value]
    if field.kind == "number":
        return int(value) if field.whole and isinstance(value, float) and value.is_integer() else value
    if field.kind == "switch" or field.words:
        return value
    try:
        numbers = [int(part) if field.whole else _number(part) for part in str(value).split(",")]
    except ValueError:
        what = "whole numbers" if field.whole else "numbers"
        raise VtpruneError(f"{field.name}={value!r}: write {what} with commas between them, such as 3, 6") from None
    return numbers[0] if field.single and len(numbers) == 1 else numbers


def _number(text: str) -> int | float:
    return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
