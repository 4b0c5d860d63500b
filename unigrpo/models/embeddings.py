"""What enters the layers besides text: patches of images, their places in a grid, and the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unigrpo.models.configuration import MoTConfig

TIME_FREQUENCIES = 256


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of sigma in [0, 1] (not times 1000), [cos | sin], then a two-layer MLP."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, config.hidden_size), nn.SiLU(),
                                 nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, sigma: Tensor) -> Tensor:
        """(...,) -> (..., D)."""
        half = TIME_FREQUENCIES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angles = sigma.float()[..., None] * torch.exp(-math.log(10_000.0) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class PositionTable(nn.Module):
    """Frozen 2-D sin-cos table: first half of the channels encodes the column, second half the row."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_table(side, width), requires_grad=False)


def sincos_table(side: int, width: int) -> Tensor:
    """(side * side, width) float32; each half is [sin | cos] with base 10000 (MAE, DiT and BAGEL alike)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies                    # (side, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)                                      # (side, width/2)
    column, row = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def grid_places(grid: tuple[int, int], side: int, *, key: str, device: torch.device | None = None) -> Tensor:
    """Rows of a `side` x `side` position table for a grid anchored at its top left.

    Args:
        grid: (rows, columns) of patches. key: the setting that holds `side`, for the message.
    Returns: (rows * columns,) int64, row * side + column, row-major.
    Raises: ValueError if a side of the grid exceeds the table's: a wide grid would silently wrap to the next row.
    """
    rows, columns = grid
    if not (0 < rows <= side and 0 < columns <= side):
        raise ValueError(f"an image grid must have sides from 1 to {key}={side}, got {rows}x{columns}")
    return (torch.arange(rows, device=device)[:, None] * side + torch.arange(columns, device=device)).flatten()


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C): tokens row-major, features in the order (row, column, channel)."""
    rows, channels, height, width = images.shape
    x = images.view(rows, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(rows, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (B, N, patch * patch * C) -> (B, C, H, W)."""
    rows, channels = tokens.shape[0], tokens.shape[2] // patch**2
    x = tokens.view(rows, grid[0], grid[1], patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(rows, channels, grid[0] * patch, grid[1] * patch)
