"""Recipes: frozen data that says which method runs where, on which budget, with which options."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .types import VtpruneError

VERSION = 1
LARGEST = 100_000  # bytes of a recipe file
MOST = 100  # stages


def resolve(keep: int | float, tokens: int) -> int:
    """The one rounding rule: a fraction in (0, 1] keeps ``floor(fraction * tokens)``, at least one token; an int is a
    count. Raises :class:`VtpruneError`."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or keep != keep:
        raise VtpruneError(f"keep must be an int (tokens per image) or a float in (0, 1], got {keep!r}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            most = f" (1..{tokens})" if tokens > 1 else ""  # 1: only the fraction's form is asked for
            raise VtpruneError(f"keep={keep}: a fraction lies in (0, 1]; use an int for a number of tokens{most}")
        return max(1, math.floor(keep * tokens + 1e-9))
    if not 1 <= keep <= tokens:
        raise VtpruneError(f"keep={keep}: the model has {tokens} visual tokens per image, so keep lies in 1..{tokens}")
    return keep


def asked_budget(keep: Any) -> int | float | None:
    """A budget as a client of a server writes it. Raises :class:`VtpruneError` for what is none."""
    if keep is None or _number(keep):
        return keep
    raise VtpruneError(f"keep={keep!r} is neither a number of tokens (64) nor a fraction (0.25)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``method`` with its ``options``, on budget ``keep`` (``None``: the method's default); the method itself says at
    which sites it cuts."""

    method: str
    keep: int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __hash__(self) -> int:
        return hash((self.method, self.keep, json.dumps(dict(self.options), sort_keys=True)))

    def __reduce__(self):  # a mapping proxy does not pickle
        return _stage, (self.method, self.keep, dict(self.options))


def _stage(method: str, keep: int | float | None, options: dict[str, Any]) -> Stage:
    return Stage(method=method, keep=keep, options=options)


def _read_stage(entry: Any) -> Stage:
    """A stage from an entry of a recipe's ``stages``. Raises :class:`VtpruneError`."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        raise VtpruneError("every stage of a recipe needs 'method', a name")
    method, keep, options = _short(entry["method"]), entry.get("keep"), entry.get("options")
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(k, str) for k in options):
        raise VtpruneError(f"the options of stage {method} must be names with values")
    _only(entry, {"method", "keep", "options"}, f"stage {method}")
    if keep is not None and not _number(keep):
        raise VtpruneError(
            f"keep of stage {method} must be an int (tokens per image) or a float in (0, 1], got {_short(keep)}"
        )
    for key, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not all(v is None or isinstance(v, bool | str) or _number(v) for v in values):
            raise VtpruneError(
                f"option {_short(key)} of stage {method} must be a number, a word, true, false or a list of "
                f"such, got {_short(value)}"
            )
    return Stage(method=entry["method"], keep=keep, options=options)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named tuple of stages; stages at different places compose. ``source`` says where the numbers come from (paper,
    table)."""

    name: str
    stages: tuple[Stage, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise VtpruneError(f"recipe {self.name!r} has no stages")
        object.__setattr__(self, "stages", tuple(self.stages))

    def override(self, *, keep: int | float | None = None, **options: Any) -> Recipe:
        """The recipe with another budget or other options in its last stage (the one that decides how many tokens are
        left)."""
        last = self.stages[-1]
        last = replace(last, keep=last.keep if keep is None else keep, options={**last.options, **options})
        return replace(self, stages=(*self.stages[:-1], last))

    def to_dict(self) -> dict[str, Any]:
        stages = [{"method": s.method, "keep": s.keep, "options": _plain(s.options)} for s in self.stages]
        return {
            "type": "vtprune.Recipe",
            "version": VERSION,
            "name": self.name,
            "source": self.source,
            "stages": stages,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def key(self) -> str:
        """A short stable string for file names and result tables: same stages, same key (the name does not count)."""
        text = json.dumps(self.to_dict()["stages"], sort_keys=True)
        return "+".join(s.method for s in self.stages) + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; a ``key``, as tables of recipes have, must be that of the stages, their
        ``distribution`` does not count. Unknown fields,
        values of another type, names that JSON cannot hold and a newer version raise :class:`VtpruneError`."""
        if not isinstance(data, Mapping) or data.get("type") != "vtprune.Recipe":
            raise VtpruneError("not a recipe: it needs 'type': 'vtprune.Recipe'")
        if type(data.get("version")) is not int or data["version"] != VERSION:  # True is 1 as well
            raise VtpruneError(
                f"recipe version {_short(data.get('version'))} is not known here (this is version {VERSION})"
            )
        _only(data, {"type", "version", "name", "source", "stages", "key", "distribution"}, "recipe")
        name, source, entries = data.get("name", "recipe"), data.get("source", ""), data.get("stages")
        for field_, value in (("name", name), ("source", source)):
            if not isinstance(value, str) or not _printable(value if field_ == "name" else " ".join(value.split())):
                raise VtpruneError(
                    f"the {field_} of a recipe is text{' on one line' * (field_ == 'name')}, got {_short(value)}"
                )
        if not isinstance(entries, list | tuple) or len(entries) > MOST:
            raise VtpruneError(f"a recipe needs 'stages', a list of at most {MOST}, got {_short(entries)}")
        out = Recipe(name=name, stages=tuple(_read_stage(entry) for entry in entries), source=source)
        if data.get("key", out.key()) != out.key():
            raise VtpruneError(
                f"the key {_short(data['key'])} is not that of the stages, {out.key()!r}: leave it out after a change"
            )
        return out

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads a ``.json``, ``.yaml`` or ``.yml`` file in UTF-8. Raises :class:`VtpruneError` if it is missing, larger
        than :data:`LARGEST` bytes or malformed."""
        path = Path(path)
        try:
            if path.is_file() and path.stat().st_size > LARGEST:
                raise VtpruneError(f"{path} is no recipe: it has more than {LARGEST} bytes")
            text = path.read_text(encoding="utf-8-sig")
        except OSError as e:
            raise VtpruneError(f"cannot read recipe {path}: {e.strerror}") from e
        except ValueError as e:  # not UTF-8, or a name that no file can have
            raise VtpruneError(f"cannot read recipe {path}: it is not text in UTF-8") from e
        if path.suffix == ".json":
            try:
                data = json.loads(text, object_pairs_hook=_once)
            except RecursionError as e:
                raise VtpruneError(f"{path} is not a recipe: it is nested too deeply") from e
            except VtpruneError as e:
                raise VtpruneError(f"{path} is {e}") from e
            except ValueError as e:  # also whole numbers of thousands of digits
                raise VtpruneError(f"{path} is not JSON: {e}") from e
        else:
            import yaml

            try:
                if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                    raise VtpruneError("not a recipe: it uses YAML's aliases (*name), which no recipe needs")
                data = yaml.load(text, Loader=_loader())
            except RecursionError as e:
                raise VtpruneError(f"{path} is not a recipe: it is nested too deeply") from e
            except VtpruneError as e:
                raise VtpruneError(f"{path} is {e}") from e
            except (
                yaml.YAMLError,
                ValueError,
                TypeError,
                LookupError,
                AttributeError,
            ) as e:  # the latter for values that YAML's types cannot hold
                raise VtpruneError(f"{path} is not YAML: {' '.join(str(e).split())[:300]}") from e
        try:
            return Recipe.from_dict(data)
        except VtpruneError as e:
            raise VtpruneError(f"{path}: {e}") from e

    def save(self, path: str | Path) -> None:
        """Writes JSON or, by the file's ending, YAML, in UTF-8."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.to_json() + "\n", encoding="utf-8")
        else:
            import yaml

            path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _number(value: Any) -> bool:
    """A number that a computer's integer or float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _printable(text: str) -> bool:
    """Without control characters and halves of surrogate pairs, which break tables, file names and JSON readers."""
    return not any(unicodedata.category(c) in ("Cc", "Cs") for c in text)


def _short(value: Any) -> str:
    """A value for a message, however large it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too large to print"


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping whose keys differ: of two values under one name nobody knows which is meant."""
    listed = list(pairs)
    out = dict(listed)
    if len(out) < len(listed):
        seen: set[Any] = set()
        twice = next(k for k, _ in listed if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise VtpruneError(f"not a recipe: {_short(twice)} is there twice")
    return out


def _loader() -> Any:
    """YAML's plain types, every key once."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(
        yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
        lambda loader, node: _once(loader.construct_pairs(node, deep=True)),
    )
    return Loader


def _only(data: Mapping[Any, Any], known: set[str], what: str) -> None:
    unknown = [key for key in data if key not in known]
    if unknown:
        raise VtpruneError(f"unknown field {_short(unknown[0])} in {what}; there are {', '.join(sorted(known))}")
