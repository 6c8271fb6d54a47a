"""What the steps that a row has missed would have done to it, as one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

Matrix = tuple[tuple[float, float], tuple[float, float]]

_BLOCK = 512  # about the root of the steps of a long run: what a step multiplies is no longer


class MissedSteps:
    """The steps of a table, each of which does the same linear thing to every row not in use.

    Step t makes ``M(t) @ (weight, momentum)`` of an element's weight and momentum. A row that has
    last been up to date after step s needs ``M(now) @ ... @ M(s + 1)``. These products are kept for
    every s, so that none is ever divided by another, in two factors: what came after s in its block
    of steps, and what came after that block. A step then multiplies the last block and one matrix
    for each other, and nothing else. Float64, 32 bytes a step.

    Attributes:
        count: how many steps have been recorded.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with no step."""
        self.count = 0
        self._within = torch.eye(2, dtype=torch.float64, device=device).repeat(_BLOCK, 1, 1)
        self._after = torch.eye(2, dtype=torch.float64, device=device).repeat(1, 1, 1)

    def record(self, step: Matrix) -> None:
        """Add a step: what it makes of (weight, momentum) of a row that it does not use."""
        matrix = torch.tensor(step, dtype=torch.float64, device=self._within.device)
        block = self.count // _BLOCK
        for products in (self._within[block * _BLOCK : self.count + 1], self._after[:block]):
            products.copy_(matrix @ products)
        self.count += 1
        if self.count % _BLOCK == 0:
            self._make_room()

    def _make_room(self) -> None:
        # Twice as much each time, so that copying it costs a step nothing that grows.
        blocks = self.count // _BLOCK + 1
        if blocks > len(self._after):
            eye = torch.eye(2, dtype=torch.float64, device=self._within.device)
            self._within = torch.cat([self._within, eye.expand(blocks * _BLOCK, 2, 2)])
            self._after = torch.cat([self._after, eye.expand(blocks, 2, 2)])

    def move_to(self, device: torch.device) -> None:
        """Keep the products on another device."""
        self._within, self._after = self._within.to(device), self._after.to(device)

    def since(self, steps: Tensor) -> Tensor:
        """Return the product of all steps after these, shape ``(U, 2, 2)`` for ``(U)``."""
        steps = steps.long()
        return self._after[steps.div(_BLOCK, rounding_mode="floor")] @ self._within[steps]
