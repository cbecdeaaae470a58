"""What is known of one call of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .run import Run


@dataclass(eq=False)
class EncoderCall:
    """One call of an encoder: what it was given, pixels by their shape alone, and the tower's passes that it made, row
    by row."""

    inputs: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def passes(self) -> list[tuple[Run, int]]:
        return [(run, g) for run in self.runs for g in range(run.images)]
