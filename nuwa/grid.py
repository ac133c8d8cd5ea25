"""The patch grid: regions, distances and places of an image's tokens, in raster order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """``height`` rows by ``width`` columns of patches; token ``i`` sits at row ``i // width``, column ``i % width``."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"patch grid {self.height}x{self.width} must have at least one row and one column")

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @cached_property
    def coordinates(self) -> Tensor:
        """``(tokens, 2)`` float32: row and column of every token."""
        rows = torch.arange(self.height).repeat_interleave(self.width)
        columns = torch.arange(self.width).repeat(self.height)
        return torch.stack([rows, columns], dim=-1).float()

    @property
    def max_squared_distance(self) -> int:
        """Squared distance, in patches, between opposite corners: 1058 = 23² + 23² on CLIP's 24x24 grid."""
        return (self.height - 1) ** 2 + (self.width - 1) ** 2

    def regions(self, side: int, device: torch.device | str = "cpu") -> Tensor:
        """``(tokens,)`` int64: the region of every token when the grid is cut into ``side x side`` patches.

        Regions at the right and bottom edge are smaller where the grid does not divide.
        """
        _check_side(side)
        across = -(-self.width // side)
        rows = torch.arange(self.height, device=device) // side
        columns = torch.arange(self.width, device=device) // side
        return (rows[:, None] * across + columns).flatten()

    def region_sizes(self, side: int) -> list[int]:
        """Tokens in every region of :meth:`regions`, in the order of their numbers."""
        _check_side(side)
        heights = [min(side, self.height - top) for top in range(0, self.height, side)]
        widths = [min(side, self.width - left) for left in range(0, self.width, side)]
        return [height * width for height in heights for width in widths]

    def distances(self, indices: Tensor) -> Tensor:
        """Euclidean distance in patches from some tokens ``(batch, some)`` to all tokens: ``(batch, some, tokens)``."""
        rows = torch.arange(self.height, device=indices.device)
        columns = torch.arange(self.width, device=indices.device)
        # Rows and columns apart, as the square of the distance is a sum over the two: nothing is larger than the result.
        down = ((indices // self.width)[..., None] - rows).square().float()
        across = ((indices % self.width)[..., None] - columns).square().float()
        return (down[..., :, None] + across[..., None, :]).sqrt_().flatten(-2)


def _check_side(side: int) -> None:
    if side < 1:
        raise ValueError(f"region side {side} must be at least 1 patch")
