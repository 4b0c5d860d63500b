"""The plan's arithmetic agrees with what a run then does."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from small import ROOT, sample, small_config, small_policy, small_prompts

from unigrpo.config import load_config
from unigrpo.footprint import Case, memory
from unigrpo.models.mot import MoTConfig
from unigrpo.plan import gpu_plan, make_plan, model_sizes, plan_run, show_gpu, vocabulary_size
from unigrpo.probe import measure
from unigrpo.update import trainable_experts


def test_counts_agree_with_a_rollout():
    config = small_config()
    policy = small_policy(config)
    plan = make_plan(config, vocabulary=policy.model.config.vocab_size, probe=False)
    rollouts = sample(policy, config, small_prompts(config.rollout.prompts_per_step))
    assert plan.counts["images a step"] == rollouts.cost["images"]
    assert plan.counts["model calls an image"] * plan.counts["images a step"] == rollouts.cost["model_calls"]
    assert plan.counts["trained denoising steps an image"] == rollouts.image.mask.shape[1]
    assert plan.counts["parameters"] == sum(p.numel() for p in policy.model.parameters())
    trained = trainable_experts(policy.model, config.train.experts)
    assert plan.counts["parameters trained by RL"] == sum(p.numel() for ps in trained.values() for p in ps.values())


def test_the_paper_s_arithmetic_by_hand():
    """tiny: 8 prompts x 16 rollouts = 128 images a step, two updates of 64."""
    config = load_config("tiny", run="unigrpo", root=ROOT)
    counts = make_plan(config, vocabulary=118, probe=False).counts
    assert counts["images a step"] == 128
    assert counts["rollouts an update"] == 64
    assert counts["images in all"] == 128 * config.train.num_steps


def test_probe_measures_every_stage():
    text = plan_run("smoke", "unigrpo", ROOT)
    assert "time on this machine with compute.threads=" in text
    for stage in ("base", "sft", "train", "evaluate, each checkpoint"):
        assert re.search(rf"^  {stage} +\d+:\d\d$", text, re.MULTILINE)


def test_probe_covers_autoencoder_and_adapters():
    """Scale small, shrunk: latents of an autoencoder that is trained first, adapters in RL; every stage takes its time."""
    config = load_config("small", run="unigrpo", root=ROOT)
    change = {"model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                        "num_key_value_heads": 2},
              "base": {"texts_per_step": 2}, "sft": {"texts_per_step": 2},
              "rollout": {"prompts_per_step": 2, "group_size": 2, "max_thinking_tokens": 6, "num_steps": 4},
              "train": {"micro_batch": 2}, "lora": {"rank": 2}, "evaluate": {"prompts": 2, "num_steps": 2}}
    config = config.model_copy(update={name: getattr(config, name).model_copy(update=values)
                                       for name, values in change.items()})
    training = config.autoencoder.training.model_copy(update={"images_per_step": 2})
    config = config.model_copy(update={"autoencoder": config.autoencoder.model_copy(update={"training": training})})
    threads = torch.get_num_threads()
    seconds = measure(config)
    assert torch.get_num_threads() == threads
    assert list(seconds) == ["base", "sft", "train", "evaluate, each checkpoint"]
    assert min(seconds.values()) > 0


def test_small_is_planned_for_this_machine():
    """No GPU is spoken of unless one is named, and the autoencoder's memory counts."""
    text = plan_run("small", "unigrpo", ROOT, probe=False)
    assert "h200" not in text
    assert "GPU-hours" not in text
    assert text.endswith("no time estimate: --no-probe")
    assert "on 1 x h100" in plan_run("small", "unigrpo", ROOT, gpu="h100", gpus=1)
    with pytest.raises(ValueError, match=r"without --gpu .* --price, --thinking would have no effect"):
        plan_run("small", "unigrpo", ROOT, probe=False, price=3.0, thinking=4)


def test_a_large_model_for_a_cpu_is_not_planned_for_gpus(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    path = tmp_path / "params" / "scales" / "bagel_7b.yaml"
    path.write_text(path.read_text().replace("device: auto", "device: cpu"))
    text = plan_run("bagel_7b", "unigrpo", tmp_path)
    assert "h200" not in text
    assert "no time estimate: models of up to 100,000,000 parameters are timed here; --gpu plans for a GPU" in text


# -- GPUs ------------------------------------------------------------------------------------------------------------


def bagel(**sections):
    config = load_config("bagel_7b", run="unigrpo", root=ROOT)
    return config.model_copy(update={name: getattr(config, name).model_copy(update=change)
                                     for name, change in sections.items()})


def test_the_released_model_is_counted():
    """14,607,260,128 parameters, encoder of images and tables included, and the autoencoder's 83.8M apart."""
    config = bagel()
    sizes = model_sizes(config, vocabulary_size(config, ROOT))
    assert sizes.total == 14_607_260_128
    assert sizes.trained == 2 * 6_525_625_344  # the final norms are frozen
    assert sizes.autoencoder == 83_819_683
    assert sizes.layer == 2 * 6_525_288_448 // 28


def plan_of(config, **kwargs):
    return gpu_plan(config, vocabulary=152_064, **{"gpu": "h200", "gpus": 8, **kwargs})


def gpu_memory(config):
    """Parts on one GPU, whether they fit or not."""
    model = MoTConfig(vocab_size=152_064, **config.model.model_dump())
    return memory(Case(config, model, model_sizes(config, 152_064), 1, 64, 9))


def test_memory_by_hand():
    """Full fine-tuning, spread over eight GPUs: 4 bytes of each weight, 4 + 8 + 4 of a trained one; adapters need none."""
    full = plan_of(bagel()).memory
    trained = 13_051_250_688
    assert full["gradients (fp32)"] == 4 * trained / 8
    assert full["optimizer (two moments, fp32)"] == 8 * trained / 8
    assert full["masters (fp32)"] == 0  # the weights are
    assert full["reference"] == 4 * trained / 8
    assert full["weights"] == 4 * 14_607_260_128 / 8
    assert full["whole weights for sampling"] == 2 * 14_607_260_128
    assert full["gathered embeddings and head"] == 2 * (14_607_260_128 - 2 * 6_525_288_448)
    one = gpu_memory(bagel(train={"precision": "fp32"}))
    assert (one["weights"], one["reference"]) == (4 * 14_607_260_128, 4 * trained)
    assert "gathered layers (two)" not in one
    several = plan_of(bagel(lora={"rank": 64}), gpus=8)
    assert several.memory["weights"] == plan_of(bagel(lora={"rank": 64}), gpus=1).memory["weights"]
    assert "Every GPU holds all weights" in show_gpu(several)
    assert "spread over them (compute.sharding: full)" in show_gpu(plan_of(bagel()))
    lora = plan_of(bagel(lora={"rank": 64}), gpus=1).memory
    assert lora["reference"] == lora["masters (fp32)"] == 0
    # 64 * (in + out) over q, k, v, o, gate, up, down of 28 layers and two experts.
    count = 56 * 64 * (2 * 7168 + 2 * 4096 + 3 * (3584 + 18944))
    assert lora["gradients (fp32)"] == 4 * count
    assert lora["weights"] == pytest.approx(29.2e9 + 4 * count, rel=0.001)


def test_a_plan_counts_what_adapters_train():
    config = bagel(lora={"rank": 64})
    counts = make_plan(config, vocabulary=152_064, probe=False).counts
    assert counts["parameters trained by RL"] == 56 * 64 * (2 * 7168 + 2 * 4096 + 3 * (3584 + 18944))


def test_moments_of_the_peak_by_hand():
    """Sampling holds caches and a layer's activations of all rows, an update those of a micro-batch."""
    plan = plan_of(bagel(), thinking=1022)  # 64 + 1022 + 2 + 4096 + 2 = 5186 columns, so 50 rollouts in a budget of 262,144
    memory = plan.memory                    # 96 rollouts a GPU: two turns of 48
    assert memory["caches of a rollout"] == 48 * 5186 * 57_344
    assert memory["activations of denoising"] == 48 * (4098 * (8 * 3584 + 3 * 18944) * 2 + 5186 * 2 * 3584 * 2)
    assert memory["decoding images"] == 4 * 1024**2 * 4 * 3 * 256  # four images, three tensors of 256 channels
    assert memory["logits"] == 1022 * 152_064 * 4 * 5
    sampling = memory["caches of a rollout"] + memory["activations of denoising"] + memory["whole weights for sampling"]
    moments = ("caches of a rollout", "activations of denoising", "whole weights for sampling", "decoding images",
               "activations of a micro-batch", "attention mask", "logits", "gathered layers (two)",
               "gathered embeddings and head", "gradients of a layer")
    assert plan.peak == sampling + sum(value for name, value in memory.items() if name not in moments)
    assert "peak, while sampling" in show_gpu(plan)


def test_memory_of_the_warm_up_by_hand():
    """Float32 states of 1/8 of the model, two gathered layers and the gradients of one, what is no layer, and what one
    micro-batch keeps."""
    config = bagel(sft={"micro_batch": 2})
    sizes = model_sizes(config, 152_064)
    tokens = 64 + 1024 + 2 + 4098
    kept = 3584 * 4 * 28 + (14 * 3584 + 4 * 18944) * 4
    row = tokens * kept + tokens**2 * 3 + 1024 * 152_064 * 4 * 3
    states = (4 * sizes.total + 12 * sizes.supervised) / 8 + 4 * sizes.autoencoder + 16 * sizes.layer
    states += 4 * (sizes.total - 28 * sizes.layer)
    assert plan_of(config).warmup == pytest.approx(states + 2 * row)
    assert plan_of(bagel(sft={"micro_batch": None})).warmup == pytest.approx(states + 8 * row)  # 64 texts on 8 GPUs
    assert plan_of(bagel(sft={"micro_batch": 999})).warmup == pytest.approx(states + 8 * row)
    small_texts = bagel(sft={"micro_batch": 1}, rollout={"max_thinking_tokens": 1})  # then encoding pictures is the peak
    assert plan_of(small_texts, thinking=0).warmup == pytest.approx(states + 4 * 1024**2 * 4 * 3 * 128)


def test_memory_of_an_evaluation_by_hand():
    """Weights in bfloat16, 32 images with and without their condition in the cache, a layer's activations of all."""
    plan = plan_of(bagel())
    columns = 64 + 1024 + 2 + 4098
    layer = 4098 * (8 * 3584 + 3 * 18944) * 2 + columns * 2 * 3584 * 2
    assert plan.evaluation == pytest.approx(2 * 14_607_260_128 + 4 * 83_819_683 + 32 * (2 * columns * 57_344 + layer))
    with_more = plan_of(bagel(evaluate={"batch": 128}))
    assert "evaluate does not fit: lower evaluate.batch" in show_gpu(with_more)


def test_the_plan_says_whether_sft_fits():
    """On one GPU RL with adapters fits; the warm-up, which trains every weight in float32, does not: 16 bytes of 14.6B."""
    lora = plan_of(bagel(lora={"rank": 64}), gpus=1)
    assert lora.warmup > 16 * 14.5e9
    assert f"sft does not fit: it needs --gpus {lora.warmup_gpus}" in show_gpu(lora)
    enough = plan_of(bagel(lora={"rank": 64}), gpus=lora.warmup_gpus)
    assert enough.warmup < enough.usable
    assert "does not fit" not in show_gpu(enough)
    assert plan_of(bagel(lora={"rank": 64}), gpus=lora.warmup_gpus // 2).warmup > lora.usable


def test_the_plan_names_what_is_not_there_yet(tmp_path):
    shutil.copytree(ROOT / "params", tmp_path / "params")
    text = plan_run("bagel_7b", "unigrpo", tmp_path)
    assert "not there yet: checkpoints/BAGEL-7B-MoT (base.checkpoint; `unigrpo import-bagel` writes it)" in text
    assert "not there yet: data/geneval/evaluation_metadata.jsonl (evaluate.geneval.metadata; docs/scoring.md)" in text
    assert "not there yet: checkpoints/dpt-hybrid-midas (evaluate.t2i_compbench.depth; docs/scoring_t2i.md)" in text
    (tmp_path / "data/warmup").mkdir(parents=True)
    (tmp_path / "data/warmup/examples.jsonl").touch()
    assert "examples.jsonl" not in plan_run("bagel_7b", "unigrpo", tmp_path)


def test_adapters_are_counted_as_peft_makes_them():
    from unigrpo.adapters import adapter_parameters, add_lora
    from unigrpo.footprint import adapter_count

    config = small_config(lora={"rank": 4})
    policy = small_policy(config)
    add_lora(policy.model, rank=4, alpha=8.0, targets=config.lora.targets, experts=config.train.experts)
    assert adapter_count(config, policy.model.config) == sum(p.numel() for p in adapter_parameters(policy.model).values())


def test_checkpointing_saves_activations_and_costs_a_forward():
    on, off = plan_of(bagel(), gpus=16), plan_of(bagel(train={"activation_checkpointing": False}), gpus=16)
    assert on.memory["activations of a micro-batch"] < off.memory["activations of a micro-batch"] / 5
    seconds = [next(s for stage, name, s in p.phases if stage.startswith("train") and name == "updates") for p in (on, off)]
    assert seconds[0] == pytest.approx(seconds[1] * 4 / 3)


def test_cost_follows_from_hours():
    plan = plan_of(bagel(), price=2.5)
    assert plan.images == 2000 * 768
    assert plan.gpu_hours == pytest.approx(8 * sum(plan.hours.values()))
    step = sum(s for stage, _, s in plan.phases if stage == "train, a step")
    assert plan.hours["train"] == pytest.approx(step * 2000 / 3600)
    assert f"cost {plan.gpu_hours * 2.5:,.0f} at 2.5 a GPU-hour" in show_gpu(plan)
    halved = plan_of(bagel(), gpus=16)
    assert halved.hours["train"] == pytest.approx(plan.hours["train"] / 2, rel=0.05)
    shorter = plan_of(bagel(), thinking=0)
    assert shorter.hours["train"] < plan.hours["train"]


def test_what_cannot_fit_is_refused_with_what_does():
    """One A100 holds no full fine-tuning: adapters or more GPUs do, and what is proposed then passes."""
    with pytest.raises(ValueError, match=r"(?s)bagel_7b needs \d+ GB on each of 1 GPUs, and a100-80 has 74 GB.*optimizer"
                                         r".*nearest settings that fit:.*lora\.rank 64.*GB") as refused:
        plan_of(bagel(), gpu="a100-80", gpus=1)
    assert "--gpus" in str(refused.value)
    assert "rollout.token_budget" in str(refused.value)
    plan_of(bagel(lora={"rank": 64}, rollout={"token_budget": 65_536}), gpu="a100-80", gpus=1)
    with pytest.raises(ValueError, match=r"(?s)nearest settings that fit:.*train\.micro_batch"):
        plan_of(bagel(lora={"rank": 64}, train={"micro_batch": 32}), gpus=1)
    with pytest.raises(ValueError, match=r"(?s)nearest settings that fit:.*rollout\.token_budget \d+"):
        plan_of(bagel(lora={"rank": 64}, rollout={"token_budget": None}), gpus=1)


def test_bad_requests_name_the_choices():
    with pytest.raises(ValueError, match=r"--gpus=7 must divide a step's 768 rollouts.*\[6, 8\]"):
        plan_of(bagel(), gpus=7)
    with pytest.raises(ValueError, match=r"--gpu must be one of \['a100-80', 'h100', 'h200'\], got 'v100'"):
        plan_of(bagel(), gpu="v100")
    with pytest.raises(ValueError, match=r"--gpus=0 must divide"):
        plan_run("bagel_7b", "unigrpo", ROOT, gpus=0)
    with pytest.raises(ValueError, match=r"--thinking=9999 must lie in \[0,"):
        plan_run("bagel_7b", "unigrpo", ROOT, thinking=9999)


def test_the_command_answers_for_the_large_model():
    text = plan_run("bagel_7b", "unigrpo", ROOT, price=3.0)
    for part in ("14,607,260,128", "on 8 x h200", "peak, while sampling", "train, a step: denoising", "GPU-hours"):
        assert part in text
