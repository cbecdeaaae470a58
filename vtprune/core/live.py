"""What is attached to which model, and what steers it. A steering stands around an attachment, whichever came first: it
is lifted off while an attachment is made or removed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

# Handles are kept alive by their hooks in the model: a strong value here would keep the model alive for good.
attached: WeakKeyDictionary[Any, ReferenceType[Any]] = WeakKeyDictionary()
steered: WeakKeyDictionary[Any, ReferenceType[Any]] = WeakKeyDictionary()

changing = threading.RLock()  # one attachment or steering is made or removed at a time

STEERED = (
    "shelve=True: a later turn that chooses again reads the whole conversation as a new prompt would, which would be "
    "steered by vectors of its own; steer a model without it"
)


def handle_of(registry: WeakKeyDictionary[Any, ReferenceType[Any]], model: Any) -> Any:
    """The live handle of ``model`` in one of the tables above, ``None`` if there is none."""
    known = registry.get(model)
    return None if known is None else known()


@contextmanager
def lifted(model: Any) -> Iterator[None]:
    """Within it nothing steers ``model``; then what did so stands around what is attached now."""
    steering = handle_of(steered, model)
    if steering is None:
        yield
        return
    steering.lift()
    try:
        yield
    finally:
        steering.settle()
