"""The pure maths against numbers that public implementations produced (float64, rtol 1e-7).

Every output of a case must be claimed: a function returns what it reproduces by name, and KNOWN_BUGS lists the recorded
outputs that are mistakes of their source, which ours must not reproduce.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden_files
from torch import Tensor

from unigrpo import advantages, objectives, text
from unigrpo.flow import guidance, schedule, sde

F64 = torch.float64
KNOWN_BUGS = {
    "flow_grpo_value",                                                                          # bias shared by the batch
    "verl_omni_shared_scale", "log_ratio_hat_verl_omni_shared_scale", "loss_verl_omni",         # std averaged over steps
}


def cases_of(path: Path) -> list[dict[str, Any]]:
    cases = json.loads(path.read_text())["cases"]
    if not cases:
        raise pytest.UsageError(f"{path} holds no golden case")
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        found = [(path, case) for path in golden_files(metafunc.config, "algorithm.json") for case in cases_of(path)]
        metafunc.parametrize("golden", [case for _, case in found], ids=[f"{p.parent.name}/{c['id']}" for p, c in found])


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64)


def step(inputs: dict[str, Any], kind: sde.TransitionKind, **kwargs: Any) -> sde.Transition:
    """One transition on (1, 1, elements)."""
    row = {name: tensor(inputs[name])[None, None] for name in ("x", "v", "noise")}
    return sde.transition(row["x"], row["v"], inputs["sigma"], inputs["sigma_next"], kind=kind, noise=row["noise"],
                          sigma_max=inputs.get("sigma_max", inputs["sigma_next"]), noise_level=inputs["eta"], **kwargs)


def sigma_schedule(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    steps = expected["n_transitions"]  # BAGEL's count is of points: one more than its transitions
    sigmas = schedule.sigma_schedule(steps, inputs["shift"], F64)
    assert steps in (inputs["num_steps"], inputs["num_steps"] - 1)
    return {"sigmas": sigmas[:len(expected["sigmas"])], "n_transitions": len(sigmas) - 1}


def flow_sde_step(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    out = step(inputs, "flow_sde")
    result = {"mean": out.mean[0, 0], "std": out.std[0], "std_dev_t": out.diffusion_coef[0],
              "sqrt_dt": math.sqrt(inputs["sigma"] - inputs["sigma_next"]), "prev_sample": out.next_latents[0, 0]}
    if expected["log_prob"] is None:  # the source divides by zero where the step is deterministic
        assert out.log_prob.item() == 0
        return result | {"log_prob": None, "log_prob_quadratic_only": None, "note": expected["note"]}
    constants = out.std.log() + 0.5 * math.log(2 * math.pi)
    return result | {"log_prob": out.log_prob[0], "log_prob_quadratic_only": (out.log_prob + constants)[0]}


def cps_step(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    out = step(inputs, "cps")
    constants = torch.where(out.std > 0, out.std.log() + 0.5 * math.log(2 * math.pi), 0.0)
    quadratic = (out.log_prob + constants) * 2 * out.std**2  # the source drops all constants and 1 / (2 std^2)
    return {"mean": out.mean[0, 0], "std": out.std[0], "prev_sample": out.next_latents[0, 0], "log_prob": quadratic[0]}


def dance_sde_step(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    out = step(inputs, "dance")
    return {"mean": out.mean[0, 0], "std": out.std[0], "prev_sample": out.next_latents[0, 0], "log_prob": out.log_prob[0]}


def group_advantage(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    groups = tensor(inputs["groups"])

    def ours(rewards: Tensor = groups, **kwargs: Any) -> Tensor:
        return advantages.group_advantages(rewards.flatten(), groups.shape[1], **kwargs)[0]

    return {
        "flow_grpo_group": ours(), "flow_grpo_global": ours(std="batch"),
        "verl_omni_group": ours(ddof=1), "verl_omni_global": ours(std="batch", ddof=1),
        "trl_group_ddof1_eps1e-4": ours(ddof=1), "ddof1_eps1e-8_group_UniRL_normalize_grouped": ours(ddof=1, eps=1e-8),
        "unirl_track_group_fp32": ours(groups.float(), eps=1e-8, eps_inside=True), "mean_only_drgrpo": ours(std="none"),
    }


def float32_rounding(inputs: dict[str, Any]) -> float:
    """What rounding a group's mean to float32 does to an advantage, where the std is smallest."""
    variances = tensor(inputs["groups"]).var(dim=1, correction=0)
    return 2**-23 / float(variances[variances > 0].min() + 1e-8) ** 0.5


def clipped_loss(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    new, old, values = (tensor(inputs[name])[:, None] for name in ("new_logp", "old_logp", "advantages"))
    if "adv_clip_max" in inputs:
        values = values.clamp(-inputs["adv_clip_max"], inputs["adv_clip_max"])
    low = inputs["clip_low"]
    high = low if inputs.get("clip_high") is None else inputs["clip_high"]

    def loss(rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
        weights = torch.full_like(new[rows], 1 / len(new[rows]))
        return objectives.clipped_surrogate_loss(new[rows], old[rows], values[rows, 0], weights,
                                                 clip_low=low, clip_high=high)

    mean, metrics = loss()
    single = [loss(slice(i, i + 1)) for i in range(len(new))]
    ratios = [one["ratio_mean"] for _, one in single]
    count = len(new)
    variance = (metrics["ratio_variation"] - (metrics["ratio_mean"] - 1) ** 2) * count / (count - 1)
    shares = {"ratio_mean": metrics["ratio_mean"], "ratio_std": variance.sqrt(),
              "fraction": metrics["above_fraction"] + metrics["below_fraction"]}
    if "adv_clip_max" in inputs:
        return {"mean": mean, "actor/ppo_kl": (old - new).mean(), "actor/pg_clipfrac": shares["fraction"],
                "actor/pg_clipfrac_higher": metrics["above_fraction"],
                "actor/pg_clipfrac_lower": metrics["below_fraction"],
                "actor/ratio_mean": shares["ratio_mean"], "actor/ratio_std": shares["ratio_std"]}
    return {"mean": mean, "per_element": torch.stack([one for one, _ in single]), "ratio_mean": shares["ratio_mean"],
            "ratio_std": shares["ratio_std"], "ratio_min": min(ratios), "ratio_max": max(ratios),
            "clip_fraction": shares["fraction"], "clipfrac_gt_one": metrics["above_fraction"],
            "clipfrac_lt_one": metrics["below_fraction"], "approx_kl": metrics["approx_kl"]}


def text_loss_aggregation(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    rows = tensor(inputs["per_token"]).split(inputs["lengths"])
    losses = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(losses.shape[1]) < torch.tensor(inputs["lengths"])[:, None]

    def total(name: text.Aggregation) -> Tensor:
        return (text.sequence_weights(mask, name, horizon=inputs["horizon"], dtype=F64) * losses).sum()

    return {"token_mean": total("token_mean"), "seq_mean_token_mean": total("sequence_mean"),
            "seq_mean_token_sum_norm": total("sequence_sum_norm")}


def text_token_logp(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    logits = tensor(inputs["logits"])
    every = logits.expand(len(logits), -1)
    return {"recorded_logp": text.token_log_probs(every, torch.arange(len(logits)), inputs["temperature"]),
            "sampling_probs_topk2": text.sampling_probs(logits, inputs["temperature"], inputs["top_k"])}


def gaussian(mean: Tensor, value: Tensor, std: Tensor) -> Tensor:
    """Mean log-prob over elements under a Gaussian whose mean is given, from torch's own distribution."""
    return torch.distributions.Normal(mean, std[..., None]).log_prob(value).mean(-1)


def ratio_norm(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    if "diff" in inputs:
        diff = tensor(inputs["diff"])[:, None]
        # At std 1 and equal log-probs the log-ratio is half the squared term, one per sample.
        ours = 2 * objectives.ratio_norm_log_ratio(torch.zeros(len(diff), 1, dtype=F64), torch.zeros(len(diff), 1, dtype=F64),
                                                   diff, torch.zeros_like(diff), torch.ones(1, dtype=F64))
        return {"per_sample_value": ours[:, 0], "flow_grpo_value": ours[:, 0]}
    one_sample = "steps" in inputs
    mu_old, mu_theta, drawn = (tensor(inputs[name]) for name in ("mu_old", "mu_theta", "x_prev"))
    lead = (lambda t: t[None]) if one_sample else (lambda t: t[:, None])      # (B, W, elements)
    std = tensor(inputs["std"]).expand(len(mu_old))
    old, new = (lead(gaussian(mean, drawn, std)) for mean in (mu_old, mu_theta))
    raw = new - old
    hat = objectives.ratio_norm_log_ratio(new, old, lead(mu_theta), lead(mu_old), lead(std))
    torch.testing.assert_close(objectives.projected_log_ratio(lead(mu_theta), lead(mu_old), lead(drawn), lead(std)), hat,
                               rtol=1e-7, atol=1e-14)
    values = tensor([inputs["advantage"]] if one_sample else inputs["advantages"])
    weights = torch.full_like(hat, 1 / hat.numel())
    clip = {"clip_low": inputs["clip"], "clip_high": inputs["clip"]}

    def loss(w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return objectives.clipped_surrogate_loss(hat, torch.zeros_like(hat), values, w, **clip)

    plain, metrics = loss(weights)
    if one_sample:
        reweight = objectives.inverse_dt_weights(tensor(inputs["sqrt_dt"]) ** 2)
        shared = tensor(inputs["std_dev_t"]).mean() * tensor(inputs["sqrt_dt"]).mean()
        assert (lead(std) != shared).all()
        return {"log_ratio_raw": raw[0], "log_ratio_hat_per_step": hat[0], "loss_unirl_no_reweight": plain,
                "unirl_grad_reweight_weights": reweight, "loss_unirl_grad_reweight": loss(weights * reweight)[0],
                "verl_omni_shared_scale": std, "log_ratio_hat_verl_omni_shared_scale": hat[0], "loss_verl_omni": plain}
    return {"logp_old": old[:, 0], "logp_theta": new[:, 0], "log_ratio_raw": raw[:, 0], "ratio_raw": raw[:, 0].exp(),
            "dmu2_mean": objectives.velocity_mse(lead(mu_theta), lead(mu_old))[:, 0], "log_ratio_hat": hat[:, 0],
            "ratio_hat": hat[:, 0].exp(), "loss_unirl_no_reweight": plain,
            "loss_guard_div_dt": loss(weights / inputs["sqrt_dt"] ** 2)[0],
            "clip_fraction": metrics["above_fraction"] + metrics["below_fraction"]}


def ratio_gradient(inputs: dict[str, Any], expected: dict[str, Any], guard: bool) -> dict[str, Any]:
    mu_old, drawn = (tensor(inputs[name])[:, None] for name in ("mu_old", "x_prev"))
    mu_theta = tensor(inputs["mu_theta"])[:, None].requires_grad_()
    std = tensor([[inputs["std"]]]).expand(len(mu_old), 1)
    new, old = gaussian(mu_theta, drawn, std), gaussian(mu_old, drawn, std)
    if guard:
        new, old = objectives.ratio_norm_log_ratio(new, old, mu_theta, mu_old, std), torch.zeros_like(old)
    loss, _ = objectives.clipped_surrogate_loss(new, old, tensor(inputs["advantages"]), torch.full_like(new, 1 / len(new)),
                                                clip_low=inputs["clip"], clip_high=inputs["clip"])
    loss.backward()
    assert mu_theta.grad is not None
    return {"loss": loss, "grad_mu_theta": mu_theta.grad[:, 0]}


def latent_kl(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    mu, ref = (tensor(inputs[name])[None, None] for name in ("mu_theta", "mu_ref"))
    coef = tensor([[inputs["std_dev_t"]]])
    std = coef * inputs["sqrt_dt"]
    # The KL of two transitions that differ in their velocity by 1 everywhere is the weight of the velocity MSE.
    zero = torch.zeros(1, 1, 6, dtype=F64)
    pair = [sde.transition(zero, zero + v, inputs["sigma"], inputs["sigma_next"], sigma_max=inputs["sigma_next"],
                           noise_level=inputs["eta"], noise=zero) for v in (0.0, 1.0)]
    weight = objectives.latent_kl(pair[1].mean[:, None], pair[0].mean[:, None], std=pair[0].std[:, None])
    return {"peer_kl_no_dt": objectives.latent_kl(mu, ref, std=std, diffusion_coef=coef, true=False)[0, 0],
            "true_kl_mean_per_element": objectives.latent_kl(mu, ref, std=std)[0, 0],
            "kl_weight_on_velocity_mse": weight[0, 0]}


def velocity_mse(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    mse = objectives.velocity_mse(tensor(inputs["v_theta"])[None, None], tensor(inputs["v_ref"])[None, None])
    return {"mse": mse[0, 0], "loss_term": inputs["mse_weight"] * mse[0, 0]}


def k3_kl(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    kl = objectives.k3_kl(tensor(inputs["logp"]), tensor(inputs["ref_logp"]))
    return {"per_token": kl, "mean": kl.mean()}


def bagel_cfg_combine(inputs: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    v, u, w = (tensor(inputs[name]) for name in ("v", "v_cfg_text", "v_cfg_img"))
    return {"v_out": guidance.combine_guidance(v, u, w, text_scale=inputs["cfg_text_scale"],
                                               image_scale=inputs["cfg_img_scale"], renorm=inputs["renorm_type"],
                                               renorm_min=inputs["renorm_min"])}


FUNCTIONS: dict[str, Callable[..., dict[str, Any]]] = {f.__name__: f for f in (
    sigma_schedule, flow_sde_step, cps_step, dance_sde_step, group_advantage, clipped_loss, text_loss_aggregation,
    text_token_logp, ratio_norm, ratio_gradient, latent_kl, velocity_mse, k3_kl, bagel_cfg_combine)}


def test_golden(golden: dict[str, Any]) -> None:
    assert golden["function"] in FUNCTIONS, f"no check for {golden['function']!r}; known: {', '.join(FUNCTIONS)}"
    expected = golden["outputs"]
    extra = {"guard": "guard" in golden["id"]} if golden["function"] == "ratio_gradient" else {}
    ours = FUNCTIONS[golden["function"]](golden["inputs"], expected, **extra)
    assert set(expected) <= set(ours), f"outputs nobody checks: {sorted(set(expected) - set(ours))}"
    for name, value in expected.items():
        if value is None or isinstance(value, str):
            assert ours[name] == value, name
            continue
        got, want = torch.as_tensor(ours[name]).double().detach(), tensor(value)
        if name in KNOWN_BUGS:
            assert not torch.allclose(got, want.expand_as(got), rtol=1e-3), f"{name} reproduces a known mistake"
            continue
        rtol, atol = (1e-5, float32_rounding(golden["inputs"])) if name.endswith("_fp32") else (1e-7, 1e-14)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
