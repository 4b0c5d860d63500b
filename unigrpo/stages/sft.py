"""The warm-up: thinking and drawing from (prompt, thinking, image), with a stated share of wrong plans.

The picture of a thinking sample is the plan's, right or wrong, so that the thinking is what is drawn. Where sft.data names
a JSONL of prompts, thinking and pictures, they are trained on instead. A gate refuses a checkpoint that draws worse than
its base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from unigrpo.config import Config, load_config
from unigrpo.prompts.examples import ImageExample, load_images, read_examples
from unigrpo.prompts.records import read_records
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator, shuffled_index
from unigrpo.sft import Example, SupervisedBatch, collate, supervised_losses
from unigrpo.stages.base import posterior_of, summary, train_stage
from unigrpo.stages.loading import is_spread, load_policy, masters, save_policy
from unigrpo.stages.session import session
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import parse_plan, plan_satisfies, plan_text, random_scene, render, sample_scene


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Warm up the base model of a scale. Returns its metrics. Raises ValueError where the drift gate refuses."""
    prompts, base = f"artifacts/{scale}/prompts", f"artifacts/{scale}/base/checkpoint"
    data = load_config(scale, root=root).sft.data
    inputs = (prompts, base) if data is None else (prompts, base, data)
    with session("sft", scale, scale=scale, output=f"artifacts/{scale}/sft", inputs=inputs, root=root,
                 provenance=provenance) as stage:
        config = stage.config
        policy = load_policy(root / base, config, on_cpu=is_spread(config, stage.world))
        dtype = policy.model.dtype
        policy = masters(policy, config, stage.world)
        batches: Callable[[int], SupervisedBatch]
        heldout: Callable[[BagelPolicy, Config], float]
        if data is None:
            records = read_records(root / prompts / "sft.jsonl")
            batches, heldout = partial(warmup_batch, policy, records, config), heldout_image_loss
            facts = exposure(records)
        else:
            train, held = split_examples(read_examples(root / data), config)
            batches, heldout = partial(folder_batch, policy, train, config), partial(heldout_example_loss, examples=held)
            facts = {"data/examples": float(len(train)), "data/heldout": float(len(held)),
                     "data/with_thinking": sum(bool(e.thinking) for e in train) / len(train)}
        before = heldout(policy, config)
        train_stage(stage, policy, config.sft, batches)
        after = heldout(policy, config)
        limit = config.sft.drift.max_image_loss_ratio
        if not after <= limit * before:
            raise ValueError(f"the warm-up draws worse than its base: held-out image loss {after:.4g} against {before:.4g}, "
                             f"more than sft.drift.max_image_loss_ratio={limit:g} times; lower sft.muon_lr, sft.adam_lr or "
                             f"sft.steps in params/scales/{scale}.yaml")
        save_policy(stage.output / "checkpoint", policy, origin=root / base, dtype=dtype, world=stage.world)
        return stage.write({**summary(stage, policy, config.sft), "drift/image_loss_before": before,
                            "drift/image_loss_after": after, "drift/image_loss_ratio": after / before,
                            **facts})


def warmup_batch(policy: BagelPolicy, records: Sequence[PromptRecord], config: Config, step: int) -> SupervisedBatch:
    """Prompts of one step: most think and draw, some draw directly, some have their text condition dropped."""
    settings, rng = config.sft, generator(config.sft.seed, "sft", step)
    size = settings.texts_per_step
    system = (config.rollout.system_prompt,) if config.rollout.system_prompt else ()
    scenes, examples = [], []
    for i in range(step * size, (step + 1) * size):
        record = records[shuffled_index(i, len(records), settings.seed, "sft-order")]
        direct, drop = rng.random(2) < (settings.direct_share, settings.condition_dropout)
        plan = parse_plan(record.thinking or "")
        if plan is None:
            raise ValueError(f"every sft prompt needs a thinking that parses as a plan, got {record.thinking!r} "
                             f"({record.id}); rerun the curate stage")
        scenes.append(sample_scene(record, rng) if direct else plan)
        mode = () if direct else system
        if drop:
            examples.append(Example(mode, None))
        else:
            examples.append(Example((*mode, record.prompt), None if direct else record.thinking))
    return collate(policy, examples, render(scenes, rng), rng, images_per_text=settings.images_per_text,
                   posterior=posterior_of(config))


def split_examples(examples: Sequence[ImageExample], config: Config) -> tuple[list[ImageExample], list[ImageExample]]:
    """(trained on, held out): a keyed tenth, at most sft.drift.scenes, is held out for the gate.

    Raises: ValueError if there are fewer than two examples.
    """
    if len(examples) < 2:
        raise ValueError(f"sft.data must hold at least 2 examples, one of them is held out, got {len(examples)}")
    order = generator(config.sft.seed, "sft-heldout").permutation(len(examples)).tolist()
    count = min(config.sft.drift.scenes, max(1, len(examples) // 10))
    held = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in order[:count]]


def folder_batch(policy: BagelPolicy, rows: Sequence[ImageExample], config: Config, step: int) -> SupervisedBatch:
    """Examples of one step, mixed as `warmup_batch` does; those without thinking always draw directly."""
    settings, rng = config.sft, generator(config.sft.seed, "sft", step)
    size = settings.texts_per_step
    system = (config.rollout.system_prompt,) if config.rollout.system_prompt else ()
    chosen = [rows[shuffled_index(i, len(rows), settings.seed, "sft-order")] for i in range(step * size, (step + 1) * size)]
    examples = []
    for row in chosen:
        direct, drop = rng.random(2) < (settings.direct_share, settings.condition_dropout)
        direct = direct or not row.thinking
        mode = () if direct else system
        examples.append(Example(mode, None) if drop else Example((*mode, row.prompt), None if direct else row.thinking))
    return collate(policy, examples, load_images(chosen, config.model.image_size), rng,
                   images_per_text=settings.images_per_text, posterior=posterior_of(config))


@torch.no_grad()
def heldout_example_loss(policy: BagelPolicy, config: Config, *, examples: Sequence[ImageExample]) -> float:
    """Mean squared velocity error on held-out examples, conditioned on prompt and thinking; the same noise every time."""
    policy.model.eval()
    rng, losses = generator(config.sft.seed, "drift"), []
    system = (config.rollout.system_prompt,) if config.rollout.system_prompt else ()
    for start in range(0, len(examples), config.sft.texts_per_step):
        part = examples[start:start + config.sft.texts_per_step]
        texts = [Example((*system, e.prompt), e.thinking) if e.thinking else Example((e.prompt,), None) for e in part]
        batch = collate(policy, texts, load_images(part, config.model.image_size), rng, images_per_text=2)
        losses += [supervised_losses(policy, batch)[1].item()] * len(part)
    return sum(losses) / len(losses)


@torch.no_grad()
def heldout_image_loss(policy: BagelPolicy, config: Config) -> float:
    """Mean squared velocity error on scenes no training step saw, conditioned on their plan; the same noise every time."""
    policy.model.eval()
    rng = generator(config.sft.seed, "drift")
    scenes = [random_scene(rng) for _ in range(config.sft.drift.scenes)]
    batch = collate(policy, [Example((), plan_text(scene, rng)) for scene in scenes], render(scenes, rng), rng,
                    images_per_text=2)
    return supervised_losses(policy, batch)[1].item()


def exposure(records: Sequence[PromptRecord]) -> dict[str, float]:
    """What the warm-up data hold: shares of reasoning prompts and of wrong plans."""
    wrong = [r for r in records if not plan_satisfies(parse_plan(r.thinking or ""), r)]
    reasoning = [r for r in records if r.needs_reasoning]
    return {"data/reasoning_share": len(reasoning) / len(records), "data/wrong_plans": len(wrong) / len(records),
            "data/wrong_plans_of_reasoning": len(wrong) / max(1, len(reasoning)), "data/prompts": float(len(records))}
