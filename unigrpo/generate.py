"""A pipeline in the shape of diffusers': prompts in, thinking and images out; edits and questions about images too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from unigrpo.adapters import load_adapter
from unigrpo.checkpoint import load_autoencoder, load_checkpoint
from unigrpo.checks import check_checkpoint
from unigrpo.contexts import THINK_PROMPT, ImagePart, Part, TextPart, build_contexts, read_system_prompt, take_rows
from unigrpo.flow.guidance import Renorm
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.images import SizeRule, rgb, to_image, to_pixels
from unigrpo.models.bagel import encode_segments
from unigrpo.models.embeddings import patchify
from unigrpo.rollout import BagelPolicy
from unigrpo.sampling import Guidance, denoise, think
from unigrpo.seeding import generator

if TYPE_CHECKING:
    from PIL.Image import Image

Posterior = Literal["mean", "sample"]
READ_PROMPT = "VLM_THINK_SYSTEM_PROMPT"  # BAGEL's constant for thinking about an image, beside THINK_PROMPT for drawing one


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns, prompt by prompt, `num_images_per_prompt` entries each.

    Args:
        images: PIL images. thinking: decoded texts, "" without thinking. seeds: an image is drawn again, alone, with its
            seed and num_images_per_prompt=1.
    """

    images: list[Image] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """One image to draw: its prompt's number, its seed, and which of the contexts read it starts from."""

    prompt: int
    seed: int
    context: int


@dataclass(frozen=True)
class _Settings:
    """The resolved arguments of a call."""

    thinking: bool
    guidance: tuple[float, float, Renorm, float, tuple[float, float]]
    sigmas: Tensor
    limit: int
    temperature: float


class UnifiedPipeline:
    """Thinking and images from one checkpoint.

    Args:
        policy: its model, tokenizer and autoencoder.
        system_prompt: the segment before a prompt when the model is to think: text, "@PATH/inferencer.py" for BAGEL's own
            from the official code, "" for none; None: a call with thinking is refused, as a model draws worse without the
            words it was trained with.
    """

    def __init__(self, policy: BagelPolicy, *, system_prompt: str | None = None) -> None:
        self.policy, self.model = policy, policy.model
        self.system_prompt = None if system_prompt is None else resolve_prompt(system_prompt)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                        system_prompt: str | None = None) -> Self:
        """Read a checkpoint folder; its autoencoder and adapters too, where it has them.

        Args:
            device, dtype: of the weights; dtype as stored by default.
            system_prompt: of thinking, see UnifiedPipeline.
        Raises: ValueError naming what the folder lacks.
        """
        folder = Path(folder)
        check_checkpoint(folder)
        model, tokenizer = load_checkpoint(folder, device=device, dtype=dtype)
        if (folder / "adapter").is_dir():
            load_adapter(model, folder / "adapter")
        autoencoder = load_autoencoder(folder)
        if autoencoder is None and model.config.latent_downsample > 1:
            raise ValueError(f"{folder} holds no autoencoder/ folder and its model draws latents, 1/"
                             f"{model.config.latent_downsample} of an image's side; import or train the checkpoint again")
        if autoencoder is not None:
            autoencoder.to(device)
        return cls(BagelPolicy(model, tokenizer, system_prompt="", autoencoder=autoencoder), system_prompt=system_prompt)

    @property
    def stride(self) -> int:
        """Sides of images are multiples of this, pixels."""
        return self.model.config.latent_patch_size * self.model.config.latent_downsample

    @torch.no_grad()
    def __call__(self, prompt: str | Sequence[str], image: Image | Sequence[Image] | None = None, *, think: bool = True,
                 guidance_scale: float = 4.0, image_guidance_scale: float | None = None, renorm: Renorm | None = None,
                 renorm_min: float = 0.0, interval: tuple[float, float] | None = None, posterior: Posterior = "mean",
                 num_inference_steps: int = 49, shift: float = 3.0, num_images_per_prompt: int = 1,
                 height: int | None = None, width: int | None = None, seed: int = 0, max_thinking_tokens: int = 1000,
                 temperature: float = 0.0, token_budget: int | None = None,
                 progress: Callable[[int], None] | None = None) -> PipelineOutput:
        """Draw images, or edit one.

        Args:
            prompt: one or P of them. image: to edit; one for all prompts, or P of them.
            think: write a thinking first, which then conditions the image token by token.
            guidance_scale, image_guidance_scale, renorm, renorm_min, interval: see unigrpo.flow.guidance; 1.0 means none.
                None takes BAGEL's: (1.0, "global", (0.4, 1.0)) for a prompt, (2.0, "text_channel", (0.0, 1.0)) for an edit.
            posterior: what an image to edit is read as: the mean of the autoencoder's posterior, or a sample, as BAGEL does.
                A sample is keyed by prompt and seed, so every image drawn then reads its input anew. Without an autoencoder
                there is no posterior.
            num_inference_steps: model calls of the conditional branch; BAGEL's "50" is 49.
            height, width: pixels; the model's own size, or the resized input's, by default.
            seed: image k of every prompt is drawn with seed + k, so it can be drawn again alone. Noise depends on seed and
                prompt only, not on what else is in the batch.
            max_thinking_tokens: the stop token is appended where the thinking reaches this length.
            temperature: of the thinking; 0 takes the most likely token, as BAGEL does by default.
            token_budget: cached tokens held at a time, which bounds memory, but for a single image that needs more; None:
                everything in one batch.
            progress: called with the number of images done.
        Returns: P * num_images_per_prompt images, and what belongs to each.
        Raises: ValueError for arguments that do not fit the model, words it does not know, or an image it cannot read.
        """
        prompts, inputs = self._inputs(prompt, image)
        if num_images_per_prompt < 1 or num_inference_steps < 1:
            raise ValueError(f"num_images_per_prompt and num_inference_steps must be at least 1, got {num_images_per_prompt} "
                             f"and {num_inference_steps}")
        if posterior not in get_args(Posterior):
            raise ValueError(f"unknown posterior {posterior!r}; choose one of {', '.join(get_args(Posterior))}")
        if think and self.system_prompt is None:
            raise ValueError("thinking needs the system prompt that the model was trained with: give system_prompt, as text or "
                             "as @PATH/inferencer.py of the official code, \"\" for none; or think=False")
        edit = image is not None
        settings = _Settings(think, (guidance_scale, (2.0 if edit else 1.0) if image_guidance_scale is None
                                     else image_guidance_scale, renorm or ("text_channel" if edit else "global"), renorm_min,
                                     interval or ((0.0, 1.0) if edit else (0.4, 1.0))),
                             sigma_schedule(num_inference_steps, shift), max_thinking_tokens, temperature)
        grids = [self._grid(source, height, width) for source in inputs]
        pairs = [(p, seed + k) for p in range(len(prompts)) for k in range(num_images_per_prompt)]
        if edit and posterior == "sample" and self.policy.autoencoder is not None:
            rows = [_Row(p, s, i) for i, (p, s) in enumerate(pairs)]
            parts = [self._parts(prompts[p], inputs[p], think, seed=s) for p, s in pairs]
        else:
            rows = [_Row(p, s, p) for p, s in pairs]
            parts = [self._parts(text, source, think) for text, source in zip(prompts, inputs, strict=True)]
        out = PipelineOutput()
        for chunk in self._chunks(rows, parts, grids, settings, token_budget):
            images, texts = self._draw(chunk, prompts, parts, grids[chunk[0].prompt], settings)
            out.images.extend(images)
            out.thinking.extend(texts)
            out.seeds.extend(row.seed for row in chunk)
            if progress is not None:
                progress(len(out.images))
        return out

    @torch.no_grad()
    def understand(self, prompt: str, image: Image, *, system_prompt: str = "", max_tokens: int = 1000,
                   temperature: float = 0.0, seed: int = 0) -> str:
        """Answer a question about an image, which is read by the vision tower alone.

        Args:
            system_prompt: a segment before the image: text, or "@PATH/inferencer.py" for BAGEL's own.
            max_tokens: of the answer. temperature: 0 for the likeliest tokens.
        Raises: ValueError if the model has no vision tower, or for words it does not know.
        """
        view = self._view(rgb(image))
        parts: list[Part] = [ImagePart(views=[view]), self._text([prompt])]
        if system_prompt:
            parts.insert(0, self._text([resolve_prompt(system_prompt, READ_PROMPT)]))
        contexts = build_contexts(self.model, self.policy.markers, parts, guided=False)
        context = take_rows(contexts.conditional, torch.zeros(1, dtype=torch.int64), max_tokens + 1)
        uniforms = generator(seed, "understand", prompt).random((1, max_tokens), dtype=np.float32)
        answer = think(self.model, self.policy.special, context, torch.from_numpy(uniforms), greedy=temperature == 0,
                       temperature=temperature or 1.0)
        return self.policy.texts(answer)[0]

    def _draw(self, chunk: Sequence[_Row], prompts: Sequence[str], parts: Sequence[Sequence[Part]], grid: tuple[int, int],
              settings: _Settings) -> tuple[list[Image], list[str]]:
        """Images and thinking of some rows that share a grid; every context is read once."""
        model, policy = self.model, self.policy
        scale, image_scale, renorm, renorm_min, interval = settings.guidance
        chosen = sorted({row.context for row in chunk})
        joined = [_stack(column, policy.special.pad) for column in zip(*(parts[c] for c in chosen), strict=True)]
        contexts = build_contexts(model, policy.markers, joined, guided=scale > 1, thinking=settings.thinking)
        rows = torch.tensor([chosen.index(row.context) for row in chunk])
        count = grid[0] * grid[1]
        room = count + 2 + (settings.limit + 2 if settings.thinking else 0)
        conditional = take_rows(contexts.conditional, rows, room)
        texts = [""] * len(chunk)
        if settings.thinking:
            uniforms = np.stack([generator(row.seed, "generate-thinking", prompts[row.prompt]).random(
                settings.limit, dtype=np.float32) for row in chunk])
            segment = think(model, policy.special, conditional, torch.from_numpy(uniforms), close=True,
                            greedy=settings.temperature == 0, temperature=settings.temperature or 1.0)
            texts = policy.texts(segment)
        guidance = None
        if contexts.text_dropped is not None:
            without = contexts.image_dropped if image_scale > 1 else None
            guidance = Guidance(take_rows(contexts.text_dropped, rows, count + 2), scale, renorm, interval,
                                None if without is None else take_rows(without, rows, count + 2), image_scale, renorm_min)
        noise = np.stack([generator(row.seed, "generate-latents", prompts[row.prompt]).standard_normal(
            (count, model.config.token_channels), np.float32) for row in chunk])
        drawing = denoise(model, policy.markers, conditional, torch.from_numpy(noise), settings.sigmas, guidance=guidance,
                          grid=grid)
        return [to_image(pixels) for pixels in policy.decode_grid(drawing.final_latents, grid)], texts

    def _chunks(self, rows: Sequence[_Row], parts: Sequence[Sequence[Part]], grids: Sequence[tuple[int, int]],
                settings: _Settings, budget: int | None) -> Iterator[list[_Row]]:
        """Consecutive rows that share the sizes of their images and fit the budget; at least one at a time."""
        branches = 1 if settings.guidance[0] <= 1 else 2 if settings.guidance[1] <= 1 else 3
        length = [sum(self._columns(part) for part in context) for context in parts]

        def columns(chunk: Sequence[_Row]) -> int:
            """What is cached: contexts as they were read, and for each image a copy with its thinking and tokens behind."""
            count = grids[chunk[0].prompt][0] * grids[chunk[0].prompt][1]
            contexts = len({row.context for row in chunk}) + len(chunk)
            own = branches * (count + 2) + settings.thinking * (settings.limit + 2)
            return branches * max(length[row.context] for row in chunk) * contexts + len(chunk) * own

        def shape(row: _Row) -> tuple[object, ...]:
            return grids[row.prompt], *(p.grid for p in parts[row.context] if isinstance(p, ImagePart))

        chunk: list[_Row] = []
        for row in rows:
            if chunk and (shape(row) != shape(chunk[0]) or (budget is not None and columns([*chunk, row]) > budget)):
                yield chunk
                chunk = []
            chunk.append(row)
        yield chunk

    def _columns(self, part: Part) -> int:
        """Cached columns of one sample's part."""
        if isinstance(part, TextPart):
            return part.tokens.shape[1]
        patch = self.model.config.vision["patch_size"] if self.model.config.vision else 1
        views = 0 if part.views is None else max(v.shape[-2] * v.shape[-1] for v in part.views) // patch**2 + 2
        return views + (0 if part.latents is None else part.latents.shape[1] + 2)

    def _inputs(self, prompt: str | Sequence[str],
                image: Image | Sequence[Image] | None) -> tuple[list[str], list[Image | None]]:
        """Prompts and, for each, its RGB image to edit or None."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(p.strip() for p in prompts):
            raise ValueError("a prompt must not be empty, and there must be at least one")
        if image is None:
            return prompts, [None] * len(prompts)
        images = list(image) if isinstance(image, Sequence) else [image] * len(prompts)
        if len(images) != len(prompts):
            raise ValueError(f"give one image for all prompts or one for each of the {len(prompts)}, got {len(images)}")
        return prompts, [rgb(i) for i in images]

    def _grid(self, image: Image | None, height: int | None, width: int | None) -> tuple[int, int]:
        """(rows, columns) of image tokens. Raises ValueError naming the nearest sizes."""
        own = tuple(self.model.config.image_size)
        if image is not None:
            own = SizeRule.autoencoder(self.model.config).size(*image.size)[::-1]
        most = self.stride * self.model.config.max_latent_size
        grid = []
        for name, side, default in (("height", height, own[0]), ("width", width, own[1])):
            side = default if side is None else side
            if side % self.stride or not 0 < side <= most:
                near = min(most, max(self.stride, round(side / self.stride) * self.stride))
                raise ValueError(f"{name} must be a multiple of {self.stride} from {self.stride} to {most} pixels, got {side}; "
                                 f"the nearest is {near}")
            grid.append(side // self.stride)
        return grid[0], grid[1]

    def _parts(self, prompt: str, image: Image | None, thinking: bool, *, seed: int | None = None) -> list[Part]:
        """What one context is made of: [system] [image] prompt. The image's latents are a sample where a seed is given."""
        parts: list[Part] = [self._text([self.system_prompt])] if thinking and self.system_prompt else []
        if image is not None:
            config = self.model.config
            source = SizeRule.autoencoder(config).resize(image)
            pixels = to_pixels(source)[None].to(self.model.device)
            latents, autoencoder = pixels, self.policy.autoencoder
            if autoencoder is not None:
                noise = None
                if seed is not None:
                    size = (source.height // autoencoder.downsample, source.width // autoencoder.downsample)
                    noise = torch.from_numpy(generator(seed, "generate-posterior", prompt).standard_normal(
                        (1, config.latent_channels, *size), np.float32))
                latents = autoencoder.encode(pixels, noise=noise)
            parts.append(ImagePart(patchify(latents, config.latent_patch_size),
                                   (source.height // self.stride, source.width // self.stride), [self._view(image)]))
        return [*parts, self._text([prompt])]

    def _view(self, image: Image) -> Tensor:
        """What the vision tower sees: resized for the autoencoder first, as BAGEL's inferencer does, then for the tower."""
        rule = SizeRule.vision(self.model.config)
        return to_pixels(rule.resize(SizeRule.autoencoder(self.model.config).resize(image)))

    def _text(self, texts: Sequence[str]) -> TextPart:
        return TextPart(*encode_segments(self.policy.tokenizer, [[text] for text in texts]))


def resolve_prompt(system_prompt: str, name: str = THINK_PROMPT) -> str:
    """The text itself, or with "@PATH/inferencer.py" the constant `name` of that file; see read_system_prompt."""
    return read_system_prompt(Path(system_prompt[1:]).expanduser(), name) if system_prompt.startswith("@") else system_prompt


def _stack(parts: Sequence[Part], filler: int) -> Part:
    """The same part of several samples as one."""
    if isinstance(first := parts[0], TextPart):
        texts = [p for p in parts if isinstance(p, TextPart)]
        tokens = torch.nn.utils.rnn.pad_sequence([p.tokens[0] for p in texts], batch_first=True, padding_value=filler)
        return TextPart(tokens, torch.cat([p.lengths for p in texts]))
    images = [p for p in parts if isinstance(p, ImagePart)]
    return ImagePart(torch.cat([p.latents for p in images if p.latents is not None]), first.grid,
                     [view for p in images for view in p.views or ()])
