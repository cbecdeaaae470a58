"""Recipes: frozen data that says which method runs where, on which budget, with which options."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .types import VtpruneError

VERSION = 1


def resolve(keep: int | float, tokens: int) -> int:
    """The one rounding rule: a fraction in (0, 1] keeps ``floor(fraction * tokens)``, at least one token; an int is a count. Raises :class:`VtpruneError`."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or keep != keep:
        raise VtpruneError(f"keep must be an int (tokens per image) or a float in (0, 1], got {keep!r}")
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise VtpruneError(f"keep={keep}: a fraction lies in (0, 1]; use an int for a number of tokens (1..{tokens})")
        return max(1, math.floor(keep * tokens + 1e-9))
    if not 1 <= keep <= tokens:
        raise VtpruneError(f"keep={keep}: the model has {tokens} visual tokens per image, so keep lies in 1..{tokens}")
    return keep


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``method`` with its ``options``, on budget ``keep`` (``None``: the method's default); the method itself says at which sites it cuts."""

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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named tuple of stages; stages at different places compose. ``source`` says where the numbers come from (paper, table)."""

    name: str
    stages: tuple[Stage, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise VtpruneError(f"recipe {self.name!r} has no stages")
        object.__setattr__(self, "stages", tuple(self.stages))

    def override(self, *, keep: int | float | None = None, **options: Any) -> Recipe:
        """The recipe with another budget or other options in its last stage (the one that decides how many tokens are left)."""
        last = self.stages[-1]
        last = replace(last, keep=last.keep if keep is None else keep, options={**last.options, **options})
        return replace(self, stages=(*self.stages[:-1], last))

    def to_dict(self) -> dict[str, Any]:
        stages = [{"method": s.method, "keep": s.keep, "options": _plain(s.options)} for s in self.stages]
        return {"type": "vtprune.Recipe", "version": VERSION, "name": self.name, "source": self.source, "stages": stages}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def key(self) -> str:
        """A short stable string for file names and result tables: same stages, same key (the name does not count)."""
        text = json.dumps(self.to_dict()["stages"], sort_keys=True)
        return "+".join(s.method for s in self.stages) + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`. Unknown fields, a wrong type or a newer version raise :class:`VtpruneError`."""
        if not isinstance(data, Mapping) or data.get("type") != "vtprune.Recipe":
            raise VtpruneError("not a recipe: it needs 'type': 'vtprune.Recipe'")
        if data.get("version") != VERSION:
            raise VtpruneError(f"recipe version {data.get('version')!r} is not known here (this is version {VERSION})")
        _only(data, {"type", "version", "name", "source", "stages"}, "recipe")
        stages = []
        if not isinstance(data.get("stages"), list | tuple):
            raise VtpruneError("a recipe needs 'stages', a list")
        for entry in data["stages"]:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
                raise VtpruneError("every stage of a recipe needs 'method', a name")
            if not isinstance(entry.get("options") or {}, Mapping):
                raise VtpruneError(f"the options of stage {entry['method']!r} must be names with values")
            _only(entry, {"method", "keep", "options"}, f"stage {entry['method']!r}")
            stages.append(Stage(method=entry["method"], keep=entry.get("keep"), options=entry.get("options") or {}))
        return Recipe(name=data.get("name", "recipe"), stages=tuple(stages), source=data.get("source", ""))

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads a ``.json``, ``.yaml`` or ``.yml`` file. Raises :class:`VtpruneError` if it is missing or malformed."""
        path = Path(path)
        try:
            text = path.read_text()
        except OSError as e:
            raise VtpruneError(f"cannot read recipe {path}: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise VtpruneError(f"cannot read recipe {path}: it is not text") from e
        if path.suffix == ".json":
            try:
                data = json.loads(text)
            except json.JSONDecodeError as e:
                raise VtpruneError(f"{path} is not JSON: {e}") from e
        else:
            import yaml

            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as e:
                raise VtpruneError(f"{path} is not YAML: {e}") from e
        return Recipe.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Writes JSON or, by the file's ending, YAML."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.to_json() + "\n")
        else:
            import yaml

            path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _only(data: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = set(data) - known
    if unknown:
        raise VtpruneError(f"unknown field {sorted(unknown)[0]!r} in {what}; there are {', '.join(sorted(known))}")
