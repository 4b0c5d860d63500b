"""The control of RL: the warm-up goes on from its checkpoint for the floating-point operations that RL would have taken.

A training like any other (train.method: sft), in the output folder, resume folder and MLflow run of its name. The number of
steps is counted before the first one, from shapes and the texts of the prompts alone, so it is the same wherever it runs.
The learning rate follows a schedule of its own over these steps; the run's seed moves the order of the data and the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from unigrpo.config import Config, load_config
from unigrpo.cost import reinforcement_flops, supervised_cost
from unigrpo.flow.guidance import model_calls
from unigrpo.flow.schedule import sigma_schedule
from unigrpo.models.bagel import encode_segments
from unigrpo.prompts.examples import read_examples
from unigrpo.prompts.records import read_records
from unigrpo.rollout import BagelPolicy
from unigrpo.sft import SupervisedBatch
from unigrpo.stages.base import summary, train_stage
from unigrpo.stages.loading import is_spread, load_policy, masters, save_policy
from unigrpo.stages.session import session
from unigrpo.stages.sft import folder_batch, split_examples, warmup_batch

Pairs = Sequence[tuple[str, str | None]]


def run(scale: str, *, run: str, seed: int, root: Path = Path("."),
        provenance: Mapping[str, str] | None = None) -> dict[str, float]:
    """Train one run of params/runs.yaml whose train.method is sft. Returns its metrics."""
    prompts, sft = f"artifacts/{scale}/prompts", f"artifacts/{scale}/sft/checkpoint"
    data = load_config(scale, run=run, root=root).sft.data
    inputs = (prompts, sft) if data is None else (prompts, sft, data)
    with session("train", f"{scale}-{run}-{seed}", scale=scale, run=run, seed=seed, output=f"artifacts/{scale}/{run}/{seed}",
                 inputs=inputs, root=root, provenance=provenance) as stage:
        policy = load_policy(root / sft, stage.config, on_cpu=is_spread(stage.config, stage.world))
        dtype = policy.model.dtype
        policy = masters(policy, stage.config, stage.world)  # as in the warm-up
        records = read_records(root / prompts / "train.jsonl")
        if data is None:
            warmup = read_records(root / prompts / "sft.jsonl")
            pairs: Pairs = [(record.prompt, record.thinking) for record in warmup]
        else:
            examples, _ = split_examples(read_examples(root / data), stage.config)
            pairs = [(example.prompt, example.thinking) for example in examples]
        wanted, steps = equal_steps(policy, stage.config, prompts=[record.prompt for record in records], pairs=pairs)
        config = longer(stage.config, steps)
        batches: Callable[[int], SupervisedBatch] = (
            partial(warmup_batch, policy, warmup, config) if data is None else partial(folder_batch, policy, examples, config))
        train_stage(stage, policy, config.sft, batches)
        save_policy(stage.output / "checkpoint", policy, origin=root / sft, dtype=dtype, world=stage.world)
        if stage.world.main:
            gallery = stage.output / "gallery"  # nothing is sampled; a file in it, because DVC warns of an empty folder
            gallery.mkdir(exist_ok=True)
            (gallery / "gallery.json").write_text("[]\n", encoding="utf-8")
        return stage.write({**summary(stage, policy, config.sft), "cost/flops_wanted": wanted})


def longer(config: Config, steps: int) -> Config:
    """The warm-up's section with so many steps, and a seed that the warm-up itself never had."""
    settings = config.sft.model_copy(update={"steps": steps, "seed": config.sft.seed + 1 + config.seed})
    return config.model_copy(update={"sft": settings})


def equal_steps(policy: BagelPolicy, config: Config, *, prompts: Sequence[str], pairs: Pairs) -> tuple[float, int]:
    """(FLOPs of the run if it were RL, supervised steps that come nearest to them).

    Args:
        prompts: that RL would train on. pairs: (prompt, thinking or None) of the warm-up; a policy that was warmed up on
            them thinks about as long as they do.
    """
    model, rollout = policy.model.config, config.rollout
    thinking = [length - 1 for length in lengths(policy, [(text,) for _, text in pairs if text])]  # the start token is fed
    limited = mean([min(length, rollout.max_thinking_tokens) for length in thinking])
    system = (policy.system_prompt,) if policy.system_prompt else ()
    rollouts = config.train.num_steps * rollout.prompts_per_step * rollout.group_size
    interval = rollout.guidance_interval if rollout.guidance_scale > 1 else None
    wanted = reinforcement_flops(
        model, config, rollouts=rollouts, prompts=config.train.num_steps * rollout.prompts_per_step,
        prompt_tokens=mean(lengths(policy, [(*system, prompt) for prompt in prompts])), thinking_tokens=limited,
        model_calls=model_calls(sigma_schedule(rollout.num_steps, rollout.shift), interval) * rollouts,
        reference=float(config.objective.image.regularizer != "none"), dropped_tokens=float(policy.dropped_tokens))
    one = config.sft.model_copy(update={"steps": 1})
    step = supervised_cost(model, one, config.sft.texts_per_step * warmup_tokens(policy, config, pairs))["cost/flops"]
    return wanted, max(1, round(wanted / step))


def warmup_tokens(policy: BagelPolicy, config: Config, pairs: Pairs) -> float:
    """Tokens of a text of the warm-up on average, over its mixture: with thinking, without, and without the condition."""
    settings = config.sft
    system = (policy.system_prompt,) if policy.system_prompt else ()
    plain = lengths(policy, [(prompt,) for prompt, _ in pairs])
    head, = lengths(policy, [system])
    tokens = []
    for (_, thinking), short, whole in zip(pairs, plain, lengths(policy, [
            (*system, prompt, *filter(None, [thinking])) for prompt, thinking in pairs]), strict=True):
        direct = settings.direct_share if thinking else 1.0
        given = (1 - direct) * whole + direct * short
        tokens.append((1 - settings.condition_dropout) * given + settings.condition_dropout * (1 - direct) * head)
    return mean(tokens)


def lengths(policy: BagelPolicy, texts: Sequence[tuple[str, ...]]) -> list[int]:
    """Tokens of every context."""
    return encode_segments(policy.tokenizer, texts)[1].tolist()


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
