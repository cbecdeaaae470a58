"""Who has what running: events that end it, by the page that asked."""

from __future__ import annotations

import threading


class Stops:
    """Events by ``token``, which names the asking page."""

    def __init__(self) -> None:
        self.running: dict[str, set[threading.Event]] = {}
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.running)

    def stop(self, token: str) -> None:
        """Ends everything that ``token`` has running or waiting."""
        with self.lock:
            for event in self.running.get(token, ()):
                event.set()

    def has(self, token: str) -> bool:
        """Whether ``token`` has something running or waiting."""
        return token in self.running

    def registered(self, token: str) -> Registered:
        return Registered(self, token)


class Registered:
    """An event that :meth:`Stops.stop` finds for as long as the block runs."""

    def __init__(self, stops: Stops, token: str):
        self.stops, self.token, self.event = stops, token, threading.Event()

    def __enter__(self) -> threading.Event:
        with self.stops.lock:
            self.stops.running.setdefault(self.token, set()).add(self.event)
        return self.event

    def __exit__(self, *exc: object) -> None:
        self.event.set()
        with self.stops.lock:
            self.stops.running[self.token].discard(self.event)
            if not self.stops.running[self.token]:
                del self.stops.running[self.token]
