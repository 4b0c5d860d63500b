"""Counted work: floating-point operations from shapes alone, so that a cost is the same on every machine."""

from __future__ import annotations

from unigrpo.models.mot import MoTConfig
from unigrpo.schema import Config, SupervisedConfig


def layer_parameters(config: MoTConfig) -> int:
    """Weights of one expert's matrices in one layer."""
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    return 2 * width * width + 2 * width * kv + 3 * width * config.intermediate_size


def forward_flops(config: MoTConfig, *, tokens: float, keys: float, head_tokens: float = 0.0) -> float:
    """FLOPs of a forward pass: two per weight and token, and attention's two products.

    Args:
        tokens: of both streams together. keys: how many keys a token attends to, on average.
        head_tokens: tokens whose logits are wanted.
    """
    linear = 2.0 * layer_parameters(config) * config.num_hidden_layers * tokens
    attention = 4.0 * config.hidden_size * config.num_hidden_layers * tokens * keys
    return linear + attention + 2.0 * config.hidden_size * config.vocab_size * head_tokens


def supervised_cost(config: MoTConfig, settings: SupervisedConfig, text_tokens: float) -> dict[str, float]:
    """Cost of supervised training. `text_tokens`: of a batch, on average."""
    rows, blocks, image = settings.texts_per_step, settings.images_per_text, config.grid[0] * config.grid[1]
    tokens = text_tokens + rows * blocks * (image + 2)
    keys = text_tokens / rows + image + 2
    flops = 3.0 * settings.steps * forward_flops(config, tokens=tokens, keys=keys, head_tokens=text_tokens)
    return {"cost/prompts": float(settings.steps * rows), "cost/images": float(settings.steps * rows),
            "cost/text_tokens": float(round(settings.steps * text_tokens)), "cost/updates": float(settings.steps),
            "cost/model_calls": float(settings.steps * rows * blocks), "cost/flops": flops}


def rollout_flops(config: MoTConfig, *, rollouts: int, prompt_tokens: float, thinking_tokens: float, prompts: int,
                  model_calls: int) -> float:
    """FLOPs of sampling: the prompts once per group, one decode step a thinking token, one block a model call."""
    image = config.grid[0] * config.grid[1] + 2
    context = prompt_tokens + thinking_tokens
    return (forward_flops(config, tokens=prompts * prompt_tokens, keys=prompt_tokens / 2)
            + forward_flops(config, tokens=rollouts * thinking_tokens, keys=context, head_tokens=rollouts * thinking_tokens)
            + forward_flops(config, tokens=model_calls * image, keys=context + image))


def replay_flops(config: MoTConfig, *, rollouts: int, text_tokens: float, thinking_tokens: float, window: int) -> float:
    """FLOPs of one packed forward over text and window steps (0: the text alone); a backward costs twice that."""
    image = config.grid[0] * config.grid[1] + 2 if window else 0
    return forward_flops(config, tokens=rollouts * (text_tokens + window * image), keys=text_tokens + image,
                         head_tokens=rollouts * thinking_tokens)


def reinforcement_flops(model: MoTConfig, config: Config, *, rollouts: int, prompts: int, prompt_tokens: float,
                        thinking_tokens: float, model_calls: int, reference: float, images: float = 1.0,
                        dropped_tokens: float = 0.0) -> float:
    """FLOPs of RL: sampling, and replays for the anchors, with the backward pass, and of the reference.

    Steps that measure anchor every rollout, the others those of the later updates: the first one's replay is its anchor.

    Args:
        prompt_tokens, thinking_tokens, dropped_tokens: a rollout, on average; dropped: of guidance's text-dropped context.
        model_calls: of all images. reference, images: shares of the steps that replay the reference, and the images.
    """
    sampling = rollout_flops(model, rollouts=rollouts, prompt_tokens=prompt_tokens, thinking_tokens=thinking_tokens,
                             prompts=prompts, model_calls=model_calls)
    window = config.rollout.window
    blocks = window.range[1] - window.range[0] if window.kind == "all" else window.size
    text_tokens = prompt_tokens + thinking_tokens + 1
    text = replay_flops(model, rollouts=rollouts, text_tokens=text_tokens, thinking_tokens=thinking_tokens, window=0)
    whole = replay_flops(model, rollouts=rollouts, text_tokens=text_tokens, thinking_tokens=thinking_tokens, window=blocks)
    if config.rollout.guidance_scale > 1:
        whole += replay_flops(model, rollouts=rollouts, text_tokens=dropped_tokens, thinking_tokens=0.0, window=blocks)
    replay = images * whole + (1 - images) * text
    # What is frozen needs no backward pass: the text where its experts are, the images where the loss has none.
    image_loss = config.objective.image.weight > 0 or config.objective.image.regularizer != "none"
    trained = (whole if image_loss else text) - (0.0 if "understanding" in config.train.experts else text)
    later, measuring = 1 - 1 / config.train.updates_per_rollout, 1 / config.train.monitor_every
    anchors = measuring + (1 - measuring) * later
    return sampling + (anchors + reference + 1) * replay + 2 * trained
