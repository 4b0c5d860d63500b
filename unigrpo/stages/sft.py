"""The warm-up: thinking and drawing from (prompt, thinking, image), with a stated share of wrong plans.

The picture of a thinking sample is the plan's, right or wrong, so that the thinking is what is drawn. A gate refuses a
checkpoint that draws worse than its base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from unigrpo.checkpoint import load_checkpoint, save_checkpoint
from unigrpo.config import Config
from unigrpo.prompts.records import read_records
from unigrpo.rollout import BagelPolicy
from unigrpo.seeding import generator, shuffled_index
from unigrpo.sft import Example, SupervisedBatch, collate, supervised_losses
from unigrpo.stages.base import summary, train_stage
from unigrpo.stages.session import session
from unigrpo.types import PromptRecord
from unigrpo.worlds.shapes import parse_plan, plan_satisfies, plan_text, random_scene, render, sample_scene


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Warm up the base model of a scale. Returns its metrics. Raises ValueError where the drift gate refuses."""
    prompts, base = f"artifacts/{scale}/prompts", f"artifacts/{scale}/base/checkpoint"
    with session("sft", scale, scale=scale, output=f"artifacts/{scale}/sft", inputs=(prompts, base), root=root,
                 provenance=provenance) as stage:
        config = stage.config
        records = read_records(root / prompts / "sft.jsonl")
        policy = BagelPolicy(*load_checkpoint(root / base), system_prompt=config.rollout.system_prompt)
        before = heldout_image_loss(policy, config)
        train_stage(stage, policy, config.sft, lambda step: warmup_batch(policy, records, config, step))
        after = heldout_image_loss(policy, config)
        limit = config.sft.drift.max_image_loss_ratio
        if not after <= limit * before:
            raise ValueError(f"the warm-up draws worse than its base: held-out image loss {after:.4g} against {before:.4g}, "
                             f"more than sft.drift.max_image_loss_ratio={limit:g} times; lower sft.muon_lr, sft.adam_lr or "
                             f"sft.steps in params/scales/{scale}.yaml")
        save_checkpoint(stage.output / "checkpoint", policy.model, policy.tokenizer)
        return stage.write({**summary(stage, policy, config.sft), "drift/image_loss_before": before,
                            "drift/image_loss_after": after, "drift/image_loss_ratio": after / before,
                            **exposure(records)})


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
    return collate(policy, examples, render(scenes, rng), rng, images_per_text=settings.images_per_text)


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
