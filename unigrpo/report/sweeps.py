"""Sweeps and frontiers of a report: points found by which params they change, never by their names.

A point is a run of fewer steps than unigrpo. Its baseline is the point that differs from unigrpo in the fewest keys; which
sweep it belongs to follows from the keys in which it differs from the baseline. Points have one seed each, so nothing here has
a verdict stronger than "observed".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unigrpo.evaluation.outcomes import significant
from unigrpo.report.claims import NOT_RUN, OBSERVED, headline_measure, mean_over_seeds, sentinel_drift, trained_drift
from unigrpo.report.reading import Checkpoint, Inputs
from unigrpo.report.resampling import Statistics, across

REGULARIZER, WEIGHT, REWARD = "objective.image.regularizer", "objective.image.regularizer_weight", "reward."
SWEEPS = {                                   # prefix of the changed keys -> title; the first that fits
    "objective.image.ratio_norm": "RatioNorm", "rollout.window": "Steps that are trained (the SDE window)",
    "rollout.noise_level": "Noise of the SDE", "rollout.group_size": "Group size",
    "train.updates_per_rollout": "Updates per rollout", "objective.image.context_gradient": "Image loss in the text context",
    "credit.": "Scale of advantages",
}


def changes(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of the keys in which params differ; None where a key is gone."""
    return {key: settings.get(key) for key in sorted({*settings, *base}) if settings.get(key) != base.get(key)}


def baseline(inputs: Inputs) -> str | None:
    """The point that the other points are compared with."""
    full = inputs.settings.get("unigrpo", {})
    points = [run for run in inputs.settings if inputs.is_point(run)]
    return min(points, key=lambda run: (len(changes(inputs.settings[run], full)), run), default=None)


def listed(inputs: Inputs) -> list[str]:
    """All runs of the report, those without results too."""
    names = [c.name for c in inputs.checkpoints] + list(inputs.missing)
    return list(dict.fromkeys(name.partition("/")[0] for name in names if "/" in name))


def status(inputs: Inputs, run: str) -> str:
    """'ran', or why there is nothing of the run; 'ran, but ...' where some seeds are missing."""
    lost = {name.partition("/")[2]: why for name, why in inputs.missing.items() if name.partition("/")[0] == run}
    words = "; ".join(f"seed {seed} {why}" for seed, why in sorted(lost.items()))
    if any(c.run == run for c in inputs.checkpoints):
        return f"ran, but {words}" if lost else "ran"
    return next(iter(lost.values())) if len(set(lost.values())) == 1 else words or "not listed in params/experiment.yaml"


def accuracy(members: Sequence[Checkpoint], statistics: Statistics) -> dict[str, Any] | None:
    """Accuracy in the headline cell, as an entry of `arms`."""
    if not members:
        return None
    return across({c.seed: statistics.value(headline_measure(c)) for c in members})


def build_sweeps(inputs: Inputs, statistics: Statistics) -> list[dict[str, Any]]:
    """`sweeps` of the report: one a group of points, the baseline first. Regularisers and rewards are the frontier's."""
    base = baseline(inputs)
    if base is None:
        return []
    members = inputs.arms()
    groups: dict[str, list[str]] = {}
    for run in listed(inputs):
        changed = changes(inputs.settings.get(run, {}), inputs.settings[base])
        if run == base or not inputs.is_point(run) or any(key.startswith((REGULARIZER, REWARD)) for key in changed):
            continue
        prefix = next((p for p in SWEEPS if any(key.startswith(p) for key in changed)), " and ".join(changed) or "no change")
        groups.setdefault(prefix, []).append(run)
    found = []
    for prefix in sorted(groups, key=lambda name: (list(SWEEPS).index(name) if name in SWEEPS else len(SWEEPS), name)):
        keys = list(dict.fromkeys(key for run in groups[prefix]
                                  for key in changes(inputs.settings[run], inputs.settings[base])))
        rows = [sweep_point(run, base, keys, inputs, members, statistics) for run in (base, *groups[prefix])]
        found.append({"name": SWEEPS.get(prefix, prefix), "keys": keys, "baseline": base, "verdict": OBSERVED if any(
            row["difference"] for row in rows) else NOT_RUN, "points": rows})
    return found


def sweep_point(run: str, base: str, keys: Sequence[str], inputs: Inputs, members: Mapping[str, list[Checkpoint]],
                statistics: Statistics) -> dict[str, Any]:
    """One row of a sweep: what it changes, its exact accuracy, and the paired difference from the baseline."""
    seeds = {c.seed: c for c in members.get(base, [])}
    pairs = [(c, seeds[c.seed]) for c in members.get(run, []) if run != base and c.seed in seeds]
    difference = across({a.seed: statistics.difference(*(headline_measure(c) for c in (a, b)))
                         for a, b in pairs}) if pairs else None
    return {"run": run, "status": status(inputs, run), "values": {key: inputs.settings[run].get(key) for key in keys},
            "accuracy": accuracy(members.get(run, []), statistics), "difference": difference,
            "reward": mean_over_seeds([c.training.get("reward/mean") for c in members.get(run, [])])}


def build_frontier(inputs: Inputs, statistics: Statistics) -> list[dict[str, Any]]:
    """`frontier` of the report: every run that changes nothing but the regulariser, its weight and the reward.

    Accuracy is on held-out prompts, `validation` on those of the training's last probe, by which weights are chosen. Drift is
    measured alike for all, whatever they optimise: velocity MSE and latent KL to the reference over the last monitored steps,
    and the largest change of the sentinel's statistics at the evaluation (1 is allowed).
    `best` marks points that no other of their group (length, reward) beats in accuracy without more velocity drift.
    """
    members, full = inputs.arms(), inputs.settings.get("unigrpo")
    if full is None:
        return []
    found = []
    for run in listed(inputs):
        settings = inputs.settings.get(run)
        base = inputs.settings.get(baseline(inputs) or "", {}) if inputs.is_point(run) else full
        if settings is None or not all(key.startswith((REGULARIZER, REWARD)) for key in changes(settings, base)):
            continue
        runs = members.get(run, [])
        other = [key for key in changes(settings, full) if key.startswith(REWARD)]
        kind = settings[REGULARIZER]
        found.append({
            "run": run, "status": status(inputs, run), "steps": settings["train.num_steps"], "seeds": [c.seed for c in runs],
            "regularizer": kind, "weight": None if kind == "none" else settings[WEIGHT],
            "reward_is": reward_words(settings) if other else "exact", "accuracy": accuracy(runs, statistics),
            "validation": mean_over_seeds([c.training.get("probe/exact") for c in runs]),
            "reward": mean_over_seeds([c.training.get("reward/mean") for c in runs]),
            "velocity_mse": mean_over_seeds([trained_drift(c, inputs, "velocity_mse") for c in runs]),
            "latent_kl": mean_over_seeds([trained_drift(c, inputs, "latent_kl") for c in runs]),
            "sentinel": mean_over_seeds([sentinel_drift(c, inputs) for c in runs]),
            "alarms": sum(int(c.training.get("sentinel/alarms", 0)) for c in runs) if runs else None})
    for point in found:
        group = [one for one in found if (one["steps"], one["reward_is"]) == (point["steps"], point["reward_is"])]
        point["best"] = is_best(point, group)
    return sorted(found, key=lambda one: (one["reward_is"] != "exact", -one["steps"], one["regularizer"], one["weight"] or 0,
                                          one["run"]))


def reward_words(settings: Mapping[str, Any]) -> str:
    """The rewards and their weights."""
    start = "reward.weights."
    weights = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
    return " + ".join(name if value == 1 else f"{value:g} {name}" for name, value in weights.items()) or "another reward"


def is_best(point: Mapping[str, Any], group: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other point is as accurate with less drift, or more accurate with as little."""
    def place(one: Mapping[str, Any]) -> tuple[float, float] | None:
        if one["accuracy"] is None or one["velocity_mse"] is None:
            return None
        return -one["accuracy"]["value"], one["velocity_mse"]

    own = place(point)
    others = [place(one) for one in group]
    return own is not None and not any(one != own and one[0] <= own[0] and one[1] <= own[1] for one in others if one)


# -------------------------------------------------------------------------------------------------------------- sentences

def sweep_sentence(sweeps: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(verdict, sentence) of all sweeps: the changes whose interval over prompts leaves out 0."""
    points = [(sweep, point) for sweep in sweeps for point in sweep["points"] if point["difference"]]
    if not points:
        return NOT_RUN, f"{NOT_RUN.capitalize()}: there are no results of sweeps."
    clear = [(sweep, point) for sweep, point in points if point["difference"]["low"] is not None
             and not point["difference"]["low"] <= 0 <= point["difference"]["high"]]
    clear.sort(key=lambda pair: -abs(pair[1]["difference"]["value"]))
    said = [f"{point['run']} {100 * point['difference']['value']:+.1f} points ({100 * point['difference']['low']:+.1f} to "
            f"{100 * point['difference']['high']:+.1f})" for _, point in clear]
    names = ", ".join(dict.fromkeys(sweep["name"] for sweep, _ in points))
    return OBSERVED, (f"Observed on one seed at fewer steps ({names}): of {len(points)} points {len(clear)} differ from the "
                      "baseline by more than chance among prompts" + (f": {'; '.join(said)}" if said else "")
                      + ". One seed decides nothing.")


def frontier_sentence(frontier: Sequence[Mapping[str, Any]]) -> str:
    """What the hackable rewards did to each regulariser's best point, observed on single seeds."""
    texts = []
    for reward in dict.fromkeys(point["reward_is"] for point in frontier if point["reward_is"] != "exact"):
        points = [point for point in frontier if point["reward_is"] == reward and point["accuracy"]]
        best = [max((p for p in points if p["regularizer"] == kind), key=lambda p: p["accuracy"]["value"])
                for kind in dict.fromkeys(point["regularizer"] for point in points)]
        said = [f"{p['regularizer']}{'' if p['weight'] is None else ' at ' + format(p['weight'], 'g')} "
                f"{100 * p['accuracy']['value']:.1f} % exact with {p['alarms']} alarm{'' if p['alarms'] == 1 else 's'}"
                for p in best]
        texts += [f"Observed under the reward {reward}, the best weight of each penalty: {'; '.join(said)}."] if said else []
    return " ".join(texts)


def build_roster(inputs: Inputs, statistics: Statistics, named: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`roster` of the report: every run that is listed or that a claim names, with what it changes, whether it ran, and its
    counted cost (mean over seeds)."""
    members, full, base = inputs.arms(), inputs.settings.get("unigrpo", {}), baseline(inputs)
    found = {}
    for run in [*dict.fromkeys([*named, *listed(inputs)])]:
        runs, point = members.get(run, []), inputs.is_point(run)
        reference = inputs.settings[base] if point and base is not None and run != base else full
        settings = inputs.settings.get(run)
        costs = dict.fromkeys(key for c in runs for key in c.training if key.startswith("cost/"))
        found[run] = {
            "status": status(inputs, run), "seeds": [c.seed for c in runs], "point": point,
            "changes": None if settings is None else changes(settings, reference),
            "exact": accuracy(runs, statistics),
            "cost": {key.removeprefix("cost/"): significant(mean) for key in sorted(costs)
                     if (mean := mean_over_seeds([c.training.get(key) for c in runs])) is not None}}
    return found
