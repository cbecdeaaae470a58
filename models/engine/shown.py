"""What the beginnings of answers showed of one MLP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Shown:
    """What the first W tokens behind each of the cache's prompts showed of one MLP: ``similar`` ``[B, W + 1]`` how
    similar it leaves them, ``ratio`` how long (the last column is nobody's); ``decided`` what the method says to it;
    and of whose answers the MLP was ``left`` out."""

    similar: Tensor
    ratio: Tensor
    left: list[bool]
    decided: tuple[list[bool], list[float]] | None = None

    def move(self, order: list[int]) -> None:
        """The cache's samples ``order`` take the places of all."""
        self.similar, self.ratio, self.decided = self.similar[order], self.ratio[order], None
        self.left = [self.left[b] for b in order]
