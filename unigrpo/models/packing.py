"""Training samples of text and images in any order, packed for one forward: splits, positions, attention, targets.

A sample is a list of splits. Attention is causal inside a text, full inside an image; every token sees all earlier
splits of its sample but the noised images, which nothing outside them may see: what follows a drawn image sees it through
a clean copy placed behind it. An image is one rotary position, a noised one shares it with the split that follows.
Source: data packing of BAGEL, arXiv 2505.14683 (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unigrpo.models.bagel import SpecialTokens
from unigrpo.models.configuration import MoTConfig
from unigrpo.models.embeddings import grid_places
from unigrpo.models.layers import Compact
from unigrpo.models.mot import MoTModel

CAUSAL, FULL, NOISE = 0, 1, 2


@dataclass(frozen=True)
class Text:
    """One segment, start to end token. With loss, every token but the first is predicted from those before it.

    Args:
        ids: (n,) int64.
    """

    ids: Tensor
    loss: bool = False


@dataclass(frozen=True)
class View:
    """An image that is looked at, by the vision tower.

    Args:
        pixels: (channels, H, W) in [-1, 1], sides multiples of the tower's patch.
    """

    pixels: Tensor


@dataclass(frozen=True)
class Clean:
    """An image's latents as a condition: what an edit starts from, or the copy of a drawn image that later splits see.

    Args:
        latents: (N, C) image tokens, row-major. grid: (rows, columns).
    """

    latents: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Noised:
    """An image to be drawn, at one noise level.

    Args:
        latents, noise: (N, C), the network sees (1 - sigma) * latents + sigma * noise and learns noise - latents.
        grid: (rows, columns). sigma: in [0, 1], after the schedule's shift.
    """

    latents: Tensor
    noise: Tensor
    grid: tuple[int, int]
    sigma: float


@dataclass(frozen=True)
class Dropped:
    """An image condition left out for classifier-free guidance: nothing to see, yet its rotary position passes."""


Split = Text | View | Clean | Noised | Dropped


@dataclass(frozen=True)
class Packed:
    """B samples, padded on the right, in the model's two streams: text, markers and views | latents.

    Args:
        tokens: (B, Tu) int64 ids; views stand on placeholders. lengths: (B,) real tokens. und_positions: (B, Tu).
        views: images in the order of their tokens. view_rows, view_columns: places of all their tokens in (B, Tu).
        latents, noise: (B, Tg, C) float32, noise 0 where clean. sigma: (B, Tg), 0 where clean or padding.
        places: (B, Tg) rows of the latent position table. gen_positions: (B, Tg).
        target: (B, Tg) bool, True on tokens of noised images.
        mask: (B, 1, Tu + Tg, Tu + Tg) bool. Padding sees itself only.
        label_rows, label_columns: (K,) places in (B, Tu) whose next token is predicted; labels: (K,) that token.
    """

    tokens: Tensor
    lengths: Tensor
    und_positions: Tensor
    views: tuple[Tensor, ...]
    view_rows: Tensor
    view_columns: Tensor
    latents: Tensor
    noise: Tensor
    sigma: Tensor
    places: Tensor
    gen_positions: Tensor
    target: Tensor
    mask: Tensor
    label_rows: Tensor
    label_columns: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on a device."""
        moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved, views=tuple(view.to(device) for view in self.views))


class _Stream:
    """Tokens of one sample in one stream: a value, a rotary position, a split and its kind for each."""

    def __init__(self) -> None:
        self.length = 0
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, **columns: Tensor) -> None:
        count = max(len(c) for c in columns.values())
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.expand(count, *column.shape[1:]))
        self.length += count


def pack(rows: Sequence[Sequence[Split]], special: SpecialTokens, config: MoTConfig) -> Packed:
    """Lay out samples for one forward.

    Args:
        rows: per sample its splits in order; at least one sample with at least one token.
    Raises: ValueError if a view meets a model without vision tower, or an image does not fit its grid or the tables.
    """
    streams = [_pack_row(row, special, config) for row in rows]
    und, gen = [s[0] for s in streams], [s[1] for s in streams]

    def padded(side: list[_Stream], name: str, padding: float, empty: Tensor) -> Tensor:
        return pad_sequence([torch.cat(s.columns[name]) if s.length else empty for s in side], batch_first=True,
                            padding_value=padding)

    none, no_tokens = torch.zeros(0, dtype=torch.int64), torch.zeros(0, config.token_channels)
    splits = [padded(side, "split", -1, none) for side in (und, gen)]
    kinds = [padded(side, "kind", CAUSAL, none) for side in (und, gen)]
    view_at = padded(und, "view", 0, none).nonzero()
    labels = padded(und, "label", -1, none)
    label_at = (labels >= 0).nonzero()
    return Packed(
        tokens=padded(und, "ids", special.pad, none), lengths=torch.tensor([s.length for s in und]),
        und_positions=padded(und, "position", 0, none),
        views=tuple(split.pixels for row in rows for split in row if isinstance(split, View)),
        view_rows=view_at[:, 0], view_columns=view_at[:, 1],
        latents=padded(gen, "latents", 0, no_tokens), noise=padded(gen, "noise", 0, no_tokens),
        sigma=padded(gen, "sigma", 0, torch.zeros(0)), places=padded(gen, "place", 0, none),
        gen_positions=padded(gen, "position", 0, none), target=kinds[1] == NOISE,
        mask=split_mask(torch.cat(splits, dim=1), torch.cat(kinds, dim=1)),
        label_rows=label_at[:, 0], label_columns=label_at[:, 1], labels=labels[label_at[:, 0], label_at[:, 1]])


def _pack_row(row: Sequence[Split], special: SpecialTokens, config: MoTConfig) -> tuple[_Stream, _Stream]:
    """The two streams of one sample."""
    und, gen, position = _Stream(), _Stream(), 0
    for number, split in enumerate(row):
        if isinstance(split, Dropped):
            position += 1
            continue
        kind = CAUSAL if isinstance(split, Text) else NOISE if isinstance(split, Noised) else FULL
        common = {"split": torch.tensor([number]), "kind": torch.tensor([kind])}
        if isinstance(split, Text):
            labels = torch.full_like(split.ids, -1)
            if split.loss:
                labels[:-1] = split.ids[1:]
            und.add(ids=split.ids, position=position + torch.arange(len(split.ids)), view=torch.zeros(1, dtype=torch.int64),
                    label=labels, **common)
            position += len(split.ids)
            continue
        common["position"] = torch.tensor([position])
        inside = _view_tokens(split, config) if isinstance(split, View) else 0
        ids = torch.full((inside + 2,), special.pad, dtype=torch.int64)
        ids[0], ids[-1] = special.image_start, special.image_end
        view = torch.ones_like(ids)
        view[[0, -1]] = 0
        und.add(ids=ids, view=view, label=torch.tensor([-1]), **common)
        if isinstance(split, Clean | Noised):
            place = grid_places(split.grid, config.max_latent_size, key="model.max_latent_size")
            if split.latents.shape != (len(place), config.token_channels):
                raise ValueError(f"an image of {split.grid[0]}x{split.grid[1]} tokens must have latents of shape "
                                 f"{(len(place), config.token_channels)}, got {tuple(split.latents.shape)}")
            latents, noise, sigma = split.latents.float(), torch.zeros(1, config.token_channels), 0.0
            if isinstance(split, Noised):
                if split.noise.shape != latents.shape:
                    raise ValueError(f"an image's noise must have the shape of its latents {tuple(latents.shape)}, "
                                     f"got {tuple(split.noise.shape)}")
                noise, sigma = split.noise.float(), float(split.sigma)
            gen.add(latents=latents, noise=noise, sigma=torch.tensor([sigma]), place=place, **common)
        position += 0 if isinstance(split, Noised) else 1
    return und, gen


def _view_tokens(split: View, config: MoTConfig) -> int:
    if config.vision is None:
        raise ValueError("a sample has an image to look at and the model has no vision tower (config.json: model.vision)")
    size = config.vision["patch_size"]
    return (split.pixels.shape[1] // size) * (split.pixels.shape[2] // size)


def split_mask(splits: Tensor, kinds: Tensor) -> Tensor:
    """Who sees whom.

    Args:
        splits: (B, Q) int64, the number of each token's split in its sample, -1 on padding. Tokens of a causal split
            stand in their order.
        kinds: (B, Q) CAUSAL, FULL or NOISE.
    Returns: (B, 1, Q, Q) bool.
    """
    order = torch.arange(splits.shape[1], device=splits.device)
    query, key, kind = splits[:, :, None], splits[:, None, :], kinds[:, None, :]
    earlier = (key < query) & (kind != NOISE)
    own = (key == query) & ((kind != CAUSAL) | (order <= order[:, None]))
    return (((earlier | own) & (key >= 0)) | (order == order[:, None]))[:, None]


def packed_forward(model: MoTModel, batch: Packed) -> tuple[Tensor, Tensor | None]:
    """One forward of a packed batch.

    Returns: final-normed states (B, Tu, D) of the understanding stream; velocities (B, Tg, C) float32 of the latents, or
        None where no sample has any.
    """
    und = model.embed_text(batch.tokens)
    if batch.views:
        seen = torch.cat(model.embed_image(batch.views))
        und = und.index_put((batch.view_rows, batch.view_columns), seen.to(und.dtype))
    compact = Compact.of(batch.lengths, batch.tokens.shape[1])
    if not batch.latents.shape[1]:
        return model(und, batch.und_positions, batch.mask, compact=compact)[0], None
    sigma = batch.sigma[..., None]
    latents = (1 - sigma) * batch.latents + sigma * batch.noise
    gen = model.embed_placed_latents(latents, batch.sigma, batch.places)
    hidden, out = model(und, batch.und_positions, batch.mask, gen, batch.gen_positions, compact=compact)
    return hidden, model.velocity(out[:, :, None], latents[:, :, None], batch.sigma)[:, :, 0]


def packed_losses(model: MoTModel, batch: Packed) -> tuple[Tensor, Tensor]:
    """Losses of a packed batch, not reduced, in row-major order of the batch.

    Returns: (K,) cross-entropies in nats of the predicted tokens; (M, C) squared velocity errors of the noised tokens.
        Either may be empty, and then carries no gradient.
    """
    hidden, velocity = packed_forward(model, batch)
    logits = model.logits(hidden[batch.label_rows, batch.label_columns])
    text = F.cross_entropy(logits, batch.labels, reduction="none")
    if velocity is None:
        return text, batch.latents.flatten(0, 1)
    wanted = (batch.noise - batch.latents)[batch.target]
    return text, (velocity[batch.target] - wanted).square()
