"""Cached contexts of text and images, block by block, and the three contexts that classifier-free guidance compares.

A text segment is causal and advances the rotary position by one a token. An image is one block, markers included, in which
all tokens see each other; it advances the position by one. An edit reads an image twice: as clean latents (generation
experts, noise level 0), then as the vision tower sees it (understanding experts).
Source: BAGEL arXiv:2505.14683, inferencer.py of the released code.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unigrpo.models.bagel import causal_mask
from unigrpo.models.mot import Compact, Context, MoTModel

THINK_PROMPT = "GEN_THINK_SYSTEM_PROMPT"


@dataclass(frozen=True)
class TextPart:
    """One text segment (or several in a row) of every sample.

    Args:
        tokens: (B, L) int64 padded on the right, start and end tokens included. lengths: (B,), possibly 0.
    """

    tokens: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class ImagePart:
    """One image of every sample, as an edit or a question reads it.

    Args:
        latents: (B, N, C) clean image tokens; None where the image is only looked at (understanding).
        grid: (rows, columns) of the latents.
        views: B images (channels, H, W) in [-1, 1] for the vision tower, of any sizes; None leaves it out.
    """

    latents: Tensor | None = None
    grid: tuple[int, int] | None = None
    views: Sequence[Tensor] | None = None


Part = TextPart | ImagePart


@dataclass
class Contexts:
    """What the branches of guidance attend to; see `build_contexts`.

    Args:
        conditional: everything. text_dropped: without the last text. image_dropped: texts alone, without thinking; None
            where it equals the conditional context, whose velocity then stands in for it.
    """

    conditional: Context
    text_dropped: Context | None = None
    image_dropped: Context | None = None

    def columns(self) -> int:
        """Cached columns of one sample, over all contexts."""
        return sum(c.used for c in (self.conditional, self.text_dropped, self.image_dropped) if c is not None)


def prefill(model: MoTModel, tokens: Tensor, lengths: Tensor, *, room: int = 0) -> Context:
    """Cache the keys and values of a padded batch of text.

    Args:
        tokens: (B, L) int64 padded on the right, lengths: (B,) of real tokens, possibly 0.
        room: free columns to reserve behind the text.
    """
    context = model.empty_context(len(tokens), tokens.shape[1] + room)
    extend_text(model, context, tokens, lengths)
    return context


def extend_text(model: MoTModel, context: Context, tokens: Tensor, lengths: Tensor) -> Tensor | None:
    """Append a right-padded batch of text, causally, in place.

    Args:
        context: with room for L columns. tokens: (B, L) int64, lengths: (B,) of real tokens, possibly 0.
    Returns: (B, L, D) final states of the text, zeros or meaningless where padded; None if L is 0.
    """
    columns = tokens.shape[1]
    if not columns:
        return None
    device = context.mask.device
    tokens, lengths = tokens.to(device), lengths.to(device)
    index, mask = torch.arange(columns, device=device), causal_mask(lengths, columns)
    if context.used:
        mask = torch.cat([context.mask[:, None, None, :context.used].expand(-1, -1, columns, -1), mask], dim=-1)
    hidden, _ = model(model.embed_text(tokens), context.positions[:, None] + index, mask, context=context,
                      compact=Compact.of(lengths, columns))
    _advance(context, index < lengths[:, None], lengths)
    return hidden


def extend_image(model: MoTModel, context: Context, markers: Tensor, embeds: Sequence[Tensor]) -> Tensor:
    """Append one image a sample as the vision tower sees it, in place.

    Args:
        context: with room for the largest image's N + 2 columns. markers: (2,) ids of image start and end.
        embeds: B tensors (N_i, D) from MoTModel.embed_image.
    Returns: (B, max N + 2, D) final states of [start, image, end], meaningless where padded.
    """
    start, end = model.embed_text(markers.to(context.mask.device))[:, None]
    blocks = [torch.cat([start, image.to(start), end]) for image in embeds]
    lengths = torch.tensor([len(block) for block in blocks], device=context.mask.device)
    und = pad_sequence(blocks, batch_first=True)
    columns = und.shape[1]
    valid = torch.arange(columns, device=und.device) < lengths[:, None]
    seen = torch.cat([context.mask[:, :context.used], valid], dim=1)[:, None, None]   # padding sees it too, and is not seen
    hidden, _ = model(und, context.positions[:, None].expand(-1, columns), seen, context=context,
                      compact=Compact.of(lengths, columns))
    _advance(context, valid, torch.ones_like(lengths))
    return hidden


def extend_latents(model: MoTModel, context: Context, markers: Tensor, latents: Tensor, grid: tuple[int, int]) -> None:
    """Append one clean image a sample as its latents, at noise level 0, in place.

    Args:
        context: with room for N + 2 columns; they hold [start, end, image], an order that no attention depends on.
        latents: (B, N, C) image tokens. grid: (rows, columns) of tokens.
    """
    und, gen = image_query(model, markers, latents, torch.zeros(()), grid=grid)
    attend_image(model, und, gen, context, visible(context, gen.shape[1] + 2))
    _advance(context, torch.ones(len(latents), gen.shape[1] + 2, dtype=torch.bool, device=context.mask.device),
             torch.ones_like(context.positions))


def image_query(model: MoTModel, markers: Tensor, latents: Tensor, sigma: Tensor, *,
                grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings of an image block, the same whatever the context: markers (B, 2, D) and image tokens (B, N, D)."""
    gen = model.embed_latents(latents[:, None], sigma, grid=grid)
    return model.embed_text(markers.to(latents.device)).expand(len(latents), 2, -1), gen[:, 0]


def attend_image(model: MoTModel, und: Tensor, gen: Tensor, context: Context, mask: Tensor | None) -> Tensor:
    """(B, N, D) final states of an image block against a context, which is left as it was but for its free columns.

    Args:
        und, gen: see image_query. context: with room for N + 2 columns. mask: see visible.
    """
    positions = context.positions[:, None]
    _, out = model(und, positions.expand(-1, und.shape[1]), mask, gen, positions.expand(-1, gen.shape[1]), context=context)
    return out


def visible(context: Context, columns: int) -> Tensor | None:
    """Mask of an image block of `columns` tokens: the whole context and the block itself, (B, 1, 1, used + columns).

    None on an accelerator where nothing is masked: attention without a mask has faster kernels there.
    """
    known = context.mask[:, :context.used]
    if known.device.type != "cpu" and bool(known.all()):
        return None
    return torch.cat([known, known.new_ones(len(known), columns)], dim=1)[:, None, None]


def take_rows(context: Context, rows: Tensor, room: int = 0) -> Context:
    """A copy of some rows, repeats allowed, with `room` free columns behind: a prompt's siblings share its prefix.

    Args:
        rows: (R,) int64 indices.
    """
    rows = rows.to(context.mask.device)

    def grow(cache: Tensor) -> Tensor:
        out = cache.new_zeros(len(rows), cache.shape[1], context.used + room, cache.shape[3])
        out[:, :, :context.used] = cache[rows, :, :context.used]
        return out

    mask = torch.nn.functional.pad(context.mask[rows, :context.used], (0, room))
    return Context([grow(k) for k in context.keys], [grow(v) for v in context.values], mask, context.positions[rows],
                   context.used)


def put_rows(context: Context, rows: Tensor, taken: Context) -> None:
    """Write back, in place, the columns that a copy of some rows has gained since `take_rows`; the other rows' are masked.

    Args:
        rows: (R,) int64, none twice. taken: R rows, at least as many columns used.
    """
    gained = slice(context.used, taken.used)
    for cache, part in zip((*context.keys, *context.values), (*taken.keys, *taken.values), strict=True):
        cache[rows, :, gained] = part[:, :, gained]
    context.mask[rows, gained] = taken.mask[:, gained]
    context.positions = context.positions.index_copy(0, rows, taken.positions)
    context.used = taken.used


def build_contexts(model: MoTModel, markers: Tensor, parts: Sequence[Part], *, guided: bool = True,
                   thinking: bool = False) -> Contexts:
    """Read the parts of B samples, in order, into the contexts of guidance.

                    without image              with image (edit)
        conditional    [system] prompt         [system] image prompt       + thinking, decoded later
        text_dropped   [system]                [system] image              before the last text; after a later image, again
        image_dropped  [system] prompt         [system] prompt             never with thinking

    Args:
        parts: at least one.
        guided: False builds the conditional context alone.
        thinking: whether thinking will follow, so that the image-dropped context differs from the conditional one even
            without an image.
    Returns: contexts without free columns; `take_rows` makes room.
    Raises: ValueError if an image has neither latents nor views.
    Source: bagel's inferencer.py. Its evaluation scripts have variants (thinking kept, system segment left out).
    """
    device = model.device
    rows = max(len(p.tokens) if isinstance(p, TextPart) else len(p.latents if p.latents is not None else p.views or ())
               for p in parts)
    conditional = model.empty_context(rows, 0)
    texts = model.empty_context(rows, 0)
    images = any(isinstance(part, ImagePart) for part in parts)
    dropped = conditional
    for part in parts:
        if isinstance(part, TextPart):
            dropped = conditional
            conditional = conditional.repeat(1, part.tokens.shape[1])
            extend_text(model, conditional, part.tokens, part.lengths)
            if guided and images:
                texts = texts.repeat(1, part.tokens.shape[1])
                extend_text(model, texts, part.tokens, part.lengths)
            continue
        if part.latents is None and part.views is None:
            raise ValueError("an image input needs latents, views for the vision tower, or both; got neither")
        if part.latents is not None:
            conditional = conditional.repeat(1, part.latents.shape[1] + 2)
            extend_latents(model, conditional, markers, part.latents.to(device), part.grid or model.config.grid)
        if part.views is not None:
            embeds = model.embed_image([view.to(device) for view in part.views])
            conditional = conditional.repeat(1, max(len(e) for e in embeds) + 2)
            extend_image(model, conditional, markers, embeds)
        dropped = conditional
    if not guided:
        return Contexts(conditional)
    without_image = texts if images else conditional if thinking else None
    return Contexts(conditional, dropped, without_image)


def read_system_prompt(inferencer: Path, name: str = THINK_PROMPT) -> str:
    """A text constant of the official inferencer.py, read as data: the file is parsed, never executed or imported.

    Args:
        inferencer: the file in the user's checkout of the official code. name: of the constant, assigned at the top level.
    Raises: ValueError naming what is missing.
    """
    if not inferencer.is_file():
        raise ValueError(f"the official code's inferencer.py must be a file, and {inferencer} is none; give its path in a "
                         "checkout of ByteDance-Seed/Bagel, or the system prompt's text itself")
    try:
        body = ast.parse(inferencer.read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise ValueError(f"{inferencer} must be Python source: {error}") from error
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = node.value  # type: ignore[attr-defined]
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
            raise ValueError(f"{name} in {inferencer} must be a plain string, and is computed there")
    raise ValueError(f"{inferencer} must assign {name} at its top level, and does not")


def _advance(context: Context, valid: Tensor, positions: Tensor) -> None:
    """Count columns that the model has just written, and the rotary positions they took."""
    columns = valid.shape[1]
    context.mask[:, context.used:context.used + columns] = valid
    context.used, context.positions = context.used + columns, context.positions + positions
