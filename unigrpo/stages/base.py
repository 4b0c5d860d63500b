"""The base model: trained from scratch on rendered scenes and their captions, or a released checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from unigrpo.checkpoint import load_training_state
from unigrpo.config import load_config
from unigrpo.cost import supervised_cost
from unigrpo.models.bagel import word_tokenizer
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.prompts.curate import split_of
from unigrpo.rollout import BagelPolicy
from unigrpo.schema import Config, SupervisedConfig
from unigrpo.seeding import generator
from unigrpo.sft import Example, SupervisedBatch, collate, supervised_optimizers, train_supervised
from unigrpo.stages.imported import import_base
from unigrpo.stages.loading import compute_device, is_spread, restore_progress, save_policy, save_progress, spread
from unigrpo.stages.pixels import autoencoder_of, reconstruction_error
from unigrpo.stages.session import Session, session, tail_mean
from unigrpo.worlds.shapes import caption_text, plan_text, random_scene, render, vocabulary


def run(scale: str, *, root: Path = Path("."), provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Train the base model of a scale, or check and link the released one. Returns its metrics."""
    source = load_config(scale, root=root).base.checkpoint
    with session("base", scale, scale=scale, output=f"artifacts/{scale}/base", inputs=() if source is None else (source,),
                 root=root, provenance=provenance) as stage:
        config = stage.config
        if source is not None:
            metrics = import_base(root / source, stage.output / "checkpoint", config) if stage.world.main else {}
            stage.log(0, metrics)
            return stage.write(metrics)
        policy = fresh_policy(config)
        metrics = {}
        if config.autoencoder is not None:
            if stage.world.main:  # the others find it finished
                autoencoder_of(config.autoencoder, stage.folder, size=max(config.model.image_size), device=policy.model.device)
            stage.world.wait()
            policy.autoencoder = autoencoder_of(config.autoencoder, stage.folder, size=max(config.model.image_size),
                                                device=policy.model.device)
            metrics["autoencoder/rmse"] = reconstruction_error(policy.autoencoder, config.autoencoder)
        if is_spread(config, stage.world):
            policy = spread(policy, stage.world)
        train_stage(stage, policy, config.base, lambda step: caption_batch(policy, config, step))
        save_policy(stage.output / "checkpoint", policy, world=stage.world)
        return stage.write({**summary(stage, policy, config.base), **metrics})


def fresh_policy(config: Config) -> BagelPolicy:
    """A new model with keyed initial weights."""
    tokenizer = word_tokenizer(vocabulary())
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(config.base.seed, "weights").integers(2**63)))
        model = MoTModel(MoTConfig(vocab_size=len(tokenizer), **config.model.model_dump()))
    model.to(compute_device(config.compute.device))  # type: ignore[arg-type]
    return BagelPolicy(model, tokenizer, system_prompt=config.rollout.system_prompt)


def caption_batch(policy: BagelPolicy, config: Config, step: int) -> SupervisedBatch:
    """Random scenes with their plan, a literal caption, both (the caption, then its plan), or neither (dropout)."""
    settings, rng = config.base, generator(config.base.seed, "base", step)
    shares = config.curate.shares.model_dump()

    def reserved(key: str) -> bool:
        return split_of(key, config.curate.seed, shares) in ("validation", "eval")

    scenes = [random_scene(rng) for _ in range(settings.texts_per_step)]
    examples = []
    for scene in scenes:
        drop, kind = rng.random(2)
        if drop < settings.condition_dropout:
            examples.append(Example((), None))
        elif kind < settings.plan_share:
            examples.append(Example((), plan_text(scene, rng)))
        elif kind < settings.plan_share + settings.pair_share:
            examples.append(Example((caption_text(scene, rng, reserved=reserved),), plan_text(scene, rng)))
        else:
            examples.append(Example((), caption_text(scene, rng, reserved=reserved)))
    return collate(policy, examples, render(scenes, rng), rng, images_per_text=settings.images_per_text,
                   posterior=posterior_of(config))


def posterior_of(config: Config) -> str:
    """mean or sample: what training images are encoded to, where there is an autoencoder."""
    return "mean" if config.autoencoder is None else config.autoencoder.posterior


def train_stage(stage: Session, policy: BagelPolicy, settings: SupervisedConfig, batches) -> None:
    """Supervised training that resumes, logs and saves; shared by base and sft."""
    policy.model.train()
    if settings.activation_checkpointing:
        policy.model.activation_checkpointing_enable()
    policy.settle()
    optimizers = supervised_optimizers(policy.model, settings, stage.world)
    start = 0
    if (found := load_training_state(stage.folder)) is not None:
        state, tensors = found
        restore_progress(policy, optimizers, tensors)
        stage.restore(state)
        start = int(state["step"])
    stage.begin("", settings.steps, start, stepwise=True)

    def log(step: int, metrics: dict[str, float]) -> None:
        if step % settings.log_every == 0 or step == settings.steps - 1:
            stage.log(step, metrics, image_loss=metrics["image/loss"], text_loss=metrics["text/loss"])
        elif stage.progress is not None:
            stage.progress.step(step + 1)

    def save(step: int) -> None:
        leaving = stage.asked_to_leave()
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps or leaving:
            save_progress(stage.folder, step + 1, policy, optimizers, lambda _: stage.state(), stage.world)
        if leaving:
            stage.leave(step + 1)

    train_supervised(policy, optimizers, batches, settings, log=log, save=save, start_step=start, world=stage.world)
    if settings.activation_checkpointing:
        policy.model.activation_checkpointing_disable()
    policy.model.eval()


def summary(stage: Session, policy: BagelPolicy, settings: SupervisedConfig) -> dict[str, float]:
    """Losses at the end and counted work."""
    return {"loss/image": tail_mean(stage.curves, "image/loss", 5), "loss/text": tail_mean(stage.curves, "text/loss", 5),
            **supervised_cost(policy.model.config, settings, tail_mean(stage.curves, "text/tokens", len(stage.curves)))}
