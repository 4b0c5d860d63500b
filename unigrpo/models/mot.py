"""The BAGEL Mixture-of-Transformers decoder, one class for both scales.

Two expert sets share one attention: text and image markers use the understanding experts, image latents the
generation experts (`*_moe_gen`). Tokens therefore travel as two streams, `und` and `gen`, each a plain batch of
matrices: no gather, no scatter, no Python loop over samples. Order within a stream carries no meaning: rotary positions
and the attention mask say where a token stands.

Official state-dict keys, norms, positions and time embedding: BAGEL, arXiv 2505.14683 (ByteDance-Seed/Bagel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from unigrpo.models.configuration import MoTConfig
from unigrpo.models.embeddings import PositionTable, TimeEmbedder, grid_places, patchify, sincos_table, unpatchify
from unigrpo.models.layers import Compact, MoTLayer, RMSNorm

__all__ = ["Compact", "Context", "MoTConfig", "MoTModel", "patchify", "sincos_table", "unpatchify"]


@dataclass
class Context:
    """Cached keys and values of what an image, or the next text token, may attend to.

    Args:
        keys, values: per layer (B, heads_kv, L, head_dim), keys after norm and rotary embedding. Columns from `used`
            on are reserved room.
        mask: (B, L) bool, True on columns that hold a token of that row.
        positions: (B,) int64, the next rotary position.
        used: columns filled so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    positions: Tensor
    used: int

    def repeat(self, group_size: int, room: int = 0) -> Context:
        """Each row `group_size` times (one prompt's siblings share its prefix), with `room` free columns behind."""
        def grow(cache: Tensor) -> Tensor:
            rows, heads, _, width = cache.shape
            out = cache.new_zeros(rows * group_size, heads, self.used + room, width)
            out[:, :, :self.used] = cache[:, :, :self.used].repeat_interleave(group_size, dim=0)
            return out

        mask = F.pad(self.mask[:, :self.used].repeat_interleave(group_size, dim=0), (0, room))
        return Context([grow(k) for k in self.keys], [grow(v) for v in self.values], mask,
                       self.positions.repeat_interleave(group_size), self.used)


class Decoder(nn.Module):
    """Embedding, layers and the two final norms (`language_model.model`)."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LanguageModel(nn.Module):
    """Decoder and head, named as in the official state dict."""

    def __init__(self, config: MoTConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MoTModel(PreTrainedModel):
    """The unified model: text logits from the understanding stream, velocities from the generation stream."""

    config_class = MoTConfig
    config: MoTConfig
    base_model_prefix = ""
    main_input_name = "und"
    supports_gradient_checkpointing = True

    def __init__(self, config: MoTConfig) -> None:
        super().__init__(config)
        self.language_model = LanguageModel(config)
        self.time_embedder = TimeEmbedder(config)
        self.vae2llm = nn.Linear(config.token_channels, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.token_channels)
        self.latent_pos_embed = PositionTable(config.max_latent_size, config.hidden_size)
        if config.vision is not None:
            from unigrpo.models.vision import Connector, VisionTower  # here: pixel-space models need none of it

            self.vit_model = VisionTower(config.vision)
            self.connector = Connector(config.vision["hidden_size"], config.hidden_size)
            self.vit_pos_embed = PositionTable(config.vit_max_patches, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Gaussian matrices, zero biases; llm2vae starts at zero, as BAGEL initialises it."""
        if isinstance(module, nn.Linear):
            std = 0.0 if module is self.llm2vae else self.config.initializer_range
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PositionTable):
            places, width = module.pos_embed.shape
            module.pos_embed.data.copy_(sincos_table(isqrt(places), width))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D)."""
        return self.language_model.model.embed_tokens(tokens)

    def embed_image(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Images as the understanding stream reads them: SigLIP features, projected, with 2-D positions added.

        Args:
            pixels: images (channels, H, W) in [-1, 1] of any sizes; sides are multiples of the patch size.
        Returns: per image (N, D), N its patches, row-major; the two markers are not included.
        Raises: ValueError if the model has no vision tower, or an image does not fit its tables.
        """
        if self.config.vision is None:
            raise ValueError("this checkpoint reads no images (config.json has no model.vision); take one with a vision "
                             "tower, such as an imported BAGEL-7B-MoT")
        if not pixels:
            return []
        features, places = self.vit_model(pixels, side=self.config.vit_max_patches)
        embeds = self.connector(torch.cat(features))
        embeds = embeds + self.vit_pos_embed.pos_embed[torch.cat(places)].to(embeds.dtype)
        return list(embeds.split([len(at) for at in places]))

    def embed_latents(self, latents: Tensor, sigma: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens at their noise levels, with the table of 2-D positions added.

        Args:
            latents: (B, M, N, C), M image blocks of N tokens each, row-major over the grid.
            sigma: broadcastable to (B, M), in [0, 1].
            grid: (rows, columns) of tokens; the config's image size by default.
        Returns: (B, M, N, D).
        Raises: ValueError if the grid does not fit N or the position table (a wide grid would silently wrap).
        """
        grid = grid or self.config.grid
        if grid[0] * grid[1] != latents.shape[-2]:
            raise ValueError(f"image grid must have {latents.shape[-2]} tokens, got {grid[0]}x{grid[1]}")
        index = grid_places(grid, self.config.max_latent_size, key="model.max_latent_size", device=latents.device)
        place = self.latent_pos_embed.pos_embed[index]                                          # (N, D)
        time = self.time_embedder(sigma.to(latents.device).expand(latents.shape[:2]))[:, :, None]  # (B, M, 1, D)
        return self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + (time + place.to(time.dtype))

    def embed_placed_latents(self, latents: Tensor, sigma: Tensor, places: Tensor) -> Tensor:
        """Image tokens of images of any sizes side by side.

        Args:
            latents: (B, T, C), sigma: (B, T) in [0, 1], 0 for clean images, places: (B, T) rows of the position table.
        Returns: (B, T, D).
        """
        time = self.time_embedder(sigma)
        place = self.latent_pos_embed.pos_embed[places]                                         # (B, T, D)
        return self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + (time + place.to(time.dtype))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B, T) positions -> cos, sin (B, T, head_dim), computed in float32; recomputed, so no buffer to load."""
        width = self.config.head_dim
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        angles = positions[..., None].float() * self.config.rope_theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, und: Tensor, und_positions: Tensor, mask: Tensor | None, gen: Tensor | None = None,
                gen_positions: Tensor | None = None, context: Context | None = None,
                compact: Compact | None = None) -> tuple[Tensor, Tensor | None]:
        """Both streams through all layers and their final norms.

        Args:
            und: (B, Tu, D) embeddings for the understanding experts (text, markers).
            und_positions: (B, Tu) rotary positions.
            mask: bool, broadcastable to (B, 1, Tu + Tg, Lc + Tu + Tg); True where a query may attend to a key. Keys
                are ordered [context | und | gen]. Every query needs at least one key. None: all attend to all.
            gen, gen_positions: (B, Tg, D) and (B, Tg) for the generation experts (latents), or None.
            context: cached keys and values; new ones are written behind its `used` columns, which the caller advances.
            compact: which of the und tokens are real; the others are neither computed nor attended to (mask them).
        Returns: final-normed hidden states (B, Tu, D) and (B, Tg, D) or None.
        """
        decoder = self.language_model.model
        if compact is not None:
            und, und_positions = compact.gather(und), compact.gather(und_positions)
        rotary_und = self.rotary(und_positions, und.dtype)
        rotary_gen = None if gen_positions is None else self.rotary(gen_positions, und.dtype)
        for i, layer in enumerate(decoder.layers):
            cache = None if context is None else (context.keys[i], context.values[i], context.used)
            und, gen = layer(und, gen, rotary_und, rotary_gen, mask, cache, compact)
        und = decoder.norm(und) if compact is None else compact.spread(decoder.norm(und))
        return und, None if gen is None else decoder.norm_moe_gen(gen)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) understanding states -> (..., V) float32 logits."""
        return self.language_model.lm_head(hidden).float()

    def velocity(self, hidden: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        """Generation states -> velocity noise - clean, float32.

        Args:
            hidden: (B, M, N, D), latents: (B, M, N, C) the network's input, sigma: broadcastable to (B, M).
        """
        out = self.llm2vae(hidden).float()
        if self.config.prediction == "velocity":
            return out
        sigma = sigma.to(latents.device).expand(latents.shape[:2])[..., None, None].float()
        return (latents.float() - out) / sigma.clamp(min=self.config.min_sigma)

    def empty_context(self, rows: int, length: int) -> Context:
        """A context without tokens and room for `length` columns."""
        config, weight = self.config, self.llm2vae.weight
        def zeros() -> list[Tensor]:
            return [weight.new_zeros(rows, config.num_key_value_heads, length, config.head_dim)
                    for _ in range(config.num_hidden_layers)]
        return Context(zeros(), zeros(), torch.zeros(rows, length, dtype=torch.bool, device=weight.device),
                       torch.zeros(rows, dtype=torch.int64, device=weight.device), 0)


