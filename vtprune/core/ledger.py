"""The only code that registers hooks or sets attributes of foreign objects, and takes them back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn

from .stopwatch import watching
from .types import UnsupportedError

_ABSENT = object()

COPIED = (
    "this is a copy of an attached model, and hooks cannot tell it from the original: attach() it anew, which takes "
    "the copied hooks out, "
    "or copy the model before it is attached"
)


class _Refusal:
    """What stands in a copy in the place of something attached: calling it is refused, :func:`strip` takes it out."""

    def __init__(self, original: Any):
        self.original = original  # what was there before the attachment, or _ABSENT

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(COPIED)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        return self


class Own:
    """A function that the library has put into a foreign module. It does not travel: copies of the module refuse,
    pickles do."""

    def __init__(self, function: Callable[..., Any], before: Any = _ABSENT):
        # first: it copies the attributes of what it wraps, which may be one of these
        functools.update_wrapper(self, function)
        self.function, self.before = function, before

    @property
    def __code__(self) -> Any:  # torch.export looks for the names of a forward's arguments there
        return inspect.unwrap(self.function).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            live()
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        return _Refusal(self.before)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "an attached model cannot be pickled: call remove() on its handle first, or save its state_dict()"
        )


class UndoLedger:
    """Records every change to a foreign module and takes them all back, newest first. ``torch.compile`` runs hooks as
    they are instead of tracing them: what they decide differs from prompt to prompt."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._watch = watching.get()
        self.undone = False

    def timed(self, function: Callable[..., Any], counts: bool = True) -> Callable[..., Any]:
        """``function`` under the :func:`stopwatch` that runs, if one does; hooks are under it without this."""
        return function if self._watch is None else self._watch.timed(function, counts)

    def before(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
        """A forward pre-hook ``hook(module, args, kwargs)``."""
        own = Own(torch.compiler.disable(self.timed(hook)))
        self._undo.append(module.register_forward_pre_hook(own, with_kwargs=True, prepend=first).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = True, always: bool = False) -> None:
        """A forward hook ``hook(module, args, kwargs, output)``. ``first``: run before hooks that were there (they then
        see the changed output)."""
        own = Own(torch.compiler.disable(self.timed(hook)))
        self._undo.append(module.register_forward_hook(own, with_kwargs=True, prepend=first, always_call=always).remove)

    def replace(self, module: Any, name: str, value: Any) -> None:
        """Sets an attribute of a module (neither a parameter nor a sub-module), or of any other object that has a
        ``__dict__``. Where somebody else has put something of his own around it by the time it is taken back, that
        stays and finds what was there before."""
        before = module.__dict__.get(name, _ABSENT)
        fallback: Any = getattr(module, name, None)
        own = Own(value, before) if callable(value) else value

        def undo() -> None:
            if module.__dict__.get(name) is not own and isinstance(own, Own):
                own.function = fallback
            elif before is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before

        self._undo.append(undo)
        module.__dict__[name] = own

    def undo(self) -> None:
        """Takes everything back; may be called more than once."""
        self.undone = True
        while self._undo:
            self._undo.pop()()


def strip(model: nn.Module) -> None:
    """Takes out of a copy of an attached model what was copied of the attachment."""
    for module in model.modules():
        for name, value in [(n, v) for n, v in module.__dict__.items() if isinstance(v, _Refusal)]:
            if value.original is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value.original
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(hook, _Refusal)]:
                del hooks[number]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(number, None)


def renew(cache_layer: Any, **values: Any) -> None:
    """Gives a layer of one request's key-value cache other contents, for good: caches are no part of a model."""
    for name, value in values.items():
        setattr(cache_layer, name, value)


MARK = "_vtprune_pruned"


class _Mark:
    """What a pruned cache carries. A deep copy of the cache is closed at once: it has lost what tells which tokens it
    holds."""

    def __init__(self, cache: Any):
        self.cache = ref(cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        twin = memo.get(id(self.cache()))
        if twin is None:
            return self
        close(twin, "this cache is a copy of a pruned one: only the one that the prompt was read into goes on")
        return _Mark(twin)


def mark(cache: Any, pruned: bool) -> None:
    """Notes on a key-value cache whether a prompt was pruned in it. Copies carry the note, so they are known for what
    they are."""
    if pruned:
        setattr(cache, MARK, _Mark(cache))
    else:
        for name in [n for n, v in cache.__dict__.items() if n == MARK or isinstance(v, _Follower)]:
            del cache.__dict__[name]


class _Follower:
    """A method of one pruned cache that moves its rows, and what else (of ``whose``) has to move with them. It belongs
    to that cache alone."""

    def __init__(self, function: Callable[..., Any], then: Callable[[Any], None], whose: str = ""):
        self.function, self.then, self.whose = function, then, whose

    def without(self, whose: str) -> Callable[..., Any]:
        """The method without what followed it of the same owner: of a prompt that was read into the cache before."""
        inner = self.function.without(whose) if isinstance(self.function, _Follower) else self.function
        return inner if self.whose == whose else _Follower(inner, self.then, self.whose)

    def __call__(self, index: Any, *args: Any, **kwargs: Any) -> Any:
        out = self.function(index, *args, **kwargs)
        self.then(index)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return functools.partial(
            _refuse, "this cache is a copy of a pruned one: only the one that the prompt was read into goes on"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "the cache of a pruned prompt cannot be pickled: what tells which tokens it holds would stay behind"
        )


def _refuse(why: str, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedError(why)


def follow(cache: Any, methods: Mapping[str, Callable[[Any], None]], whose: str = "") -> None:
    """After each of ``methods`` of ``cache``, called with an index or a number, the function beside it is called with
    the same. ``whose``: it takes the place of what followed of the same owner, and stands beside others'."""
    for name, then in methods.items():
        function = getattr(cache, name, None)
        if isinstance(function, _Follower):
            function = function.without(whose)
        if function is not None:
            cache.__dict__[name] = _Follower(function, then, whose)


def bar(cache: Any, name: str, why: str) -> None:
    """The method ``name`` of ``cache`` is refused with the reason, until another prompt is read into it."""
    cache.__dict__[name] = _Follower(functools.partial(_refuse, why), lambda index: None)


def live() -> None:
    """Refuses recordings: what is dropped differs from prompt to prompt, and a recorded program would repeat the choice
    of one."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise UnsupportedError(
            "an attached model cannot be traced or exported: it would repeat the choice made for one prompt; remove() "
            "the attachment first"
        )


def close(cache: Any, why: str) -> None:
    """From now on nothing can be added to ``cache``: a model that tries gets an :class:`UnsupportedError` with the
    reason."""
    cache.__dict__["update"] = functools.partial(_refuse, why)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that an attachment could leave behind: attributes, hooks, classes, state-dict keys, training flags,
    configuration, and transformers' attention table.

    Two snapshots of an untouched model are equal. What transformers itself leaves on modules is not counted: hooks that
    it installs lazily to capture outputs, and the Qwen-VL models' ``rope_deltas`` of the last prompt.
    """
    import sys

    out: dict[str, Any] = {"state": tuple(model.state_dict())}
    for name, module in model.named_modules():
        hooks = {
            kind: tuple(
                k
                for k, h in getattr(module, kind).items()
                if not getattr(h, "__module__", "").startswith("transformers.")
            )
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        }
        keep = {
            k: id(v)
            for k, v in module.__dict__.items()
            if not k.startswith(("_forward_", "_backward_", "_output_capturing", "rope_deltas"))
        }
        out[name] = (type(module), hooks, keep, module.training, tuple(module._modules), tuple(module._parameters))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        out["config"] = repr(config.to_dict())
    host = sys.modules.get("transformers.modeling_utils")  # looked at only: it may never have been imported
    if host is not None:
        attention = host.ALL_ATTENTION_FUNCTIONS
        out["attention"] = tuple(sorted((k, id(attention[k])) for k in attention.valid_keys()))
    return out
