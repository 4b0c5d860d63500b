"""The page's sections about claims: verdicts, frontier, sweeps, arms, their pictures side by side, the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from unigrpo.evaluation.outcomes import HEADLINE
from unigrpo.report import markup
from unigrpo.report.claims import REFUTED, SUPPORTED, signed, unit
from unigrpo.report.claims_figures import KIND_NAMES
from unigrpo.report.data import PREFIX
from unigrpo.report.reading import Checkpoint, Inputs
from unigrpo.report.table import arm_order

SHOWN = 8                   # prompts drawn by every arm in the gallery
DASH = "<td>–</td>"
COSTS = {"model_calls": "image model calls", "text_tokens": "text tokens", "flops": "FLOPs"}
READING = ("A verdict follows its interval: supported where it lies wholly on the claimed side, not supported where it lies "
           "on the other, undecided otherwise or with fewer than three seeds. docs/experiments.md says how to read them.")
CLAIM_CAPTION = ("Large dots and bars: mean and 95 % interval over seeds. Small dots: single seeds. Dotted: the margin that is "
                 "allowed. Green and red: on and against the claimed side. In brackets: shown beside, decides nothing.")
Section = tuple[str, str, list[str]]


def sections(report: Mapping[str, Any], inputs: Inputs, colors: Mapping[str, str],
             pictures: Mapping[str, bytes]) -> list[Section]:
    """(anchor, title, parts) of each section."""
    return [("claims", "Claims and verdicts", claims(report, pictures)),
            ("frontier", "Accuracy against drift", frontier(report, pictures)),
            ("sweeps", "Sweeps", sweeps(report, pictures)),
            ("arms", "Arms", arms(report, colors)),
            ("side", "Arms side by side", side_by_side(inputs, report, colors)),
            ("paper", "The paper's figures", paper(report))]


def setting(value: Any) -> str:
    """A value of params for people."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "unset"}[value]
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def tag(verdict: str) -> str:
    """A verdict that can be told at a glance."""
    kind = {SUPPORTED: "right", REFUTED: "wrong"}.get(verdict, "open")
    return f'<span class="verdict {kind}">{escape(verdict)}</span>'


def minus(text: str) -> str:
    """A number with a real minus."""
    return text.replace("-", "−")


def percent(entry: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """A cell: a value in percent over its interval."""
    if entry is None:
        return DASH
    form = "+.1f" if sign else ".1f"
    bounds = "" if entry["low"] is None else f"<small>{100 * entry['low']:{form}} to {100 * entry['high']:{form}}</small>"
    return minus(f"<td>{100 * entry['value']:{form}}{bounds}</td>")


def number(value: float | None, form: str = ".3g") -> str:
    """A cell with a plain number."""
    return DASH if value is None else minus(f"<td>{value:{form}}</td>")


# --------------------------------------------------------------------------------------------------------------- claims

def claims(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> list[str]:
    """All verdicts, then each claim with its figure and its comparisons."""
    rows = [[f'<a href="#claim-{claim["name"]}">{escape(claim["title"])}</a>', f"<td>{tag(claim['verdict'])}</td>",
             f"<td>{escape(minus_words(claim['sentence']))}</td>"] for claim in report["claims"]]
    parts = [markup.table(["claim", "verdict", "in a sentence"], rows, kind="plain verdicts"),
             markup.paragraph(READING, note=True)]
    for claim in report["claims"]:
        parts.append(f'<h3 id="claim-{claim["name"]}">{escape(claim["title"])} {tag(claim["verdict"])}</h3>')
        parts.append(markup.paragraph(claim["statement"]))
        if picture := pictures.get(f"claim_{claim['name']}"):
            parts.append(markup.figure(picture, f"intervals of the claim {claim['title']}", CLAIM_CAPTION))
        if claim["comparisons"]:
            parts.append(comparisons(claim["comparisons"]))
    return parts


def minus_words(text: str) -> str:
    """A sentence whose negative numbers have a real minus."""
    return "".join("−" if c == "-" and text[i + 1:i + 2].isdigit() and text[i - 1:i] in (" ", "(") else c
                   for i, c in enumerate(text))


def comparisons(found: Sequence[Mapping[str, Any]]) -> str:
    """One row a comparison: what, where, difference, single seeds, rule and verdict."""
    seeds = sorted({single["seed"] for one in found for single in one["seeds"] if single["seed"] is not None})
    rows = []
    for one in found:
        where = one["cell"].replace("cfg_", "guidance ").replace("-thinking_", ", thinking ").replace(" - ", " − ")
        where += "" if one["prompts"] == "all" else f"; {one['prompts'].replace(' - ', ' − ')} prompts"
        name = one["a"] if one["a"] == one["b"] else f"{one['a']} − {one['b']}"
        singles = {single["seed"]: single for single in one["seeds"]}
        where = where if one["metric"].startswith("bench/") else unit(one["metric"])[2]
        rows.append([f"{escape(name)}<br><small>{escape(where)}</small>",
                     difference(one["mean"], one, one["metric"]),
                     *(difference(singles[seed]["value"], singles[seed], one["metric"]) if seed in singles else DASH
                       for seed in seeds),
                     f"<td>{escape(minus(one['rule']))}{'' if one['decides'] else '<small>decides nothing</small>'}</td>",
                     f"<td>{tag(one['verdict'])}</td>"])
    header = ["difference", "over seeds", *(f"seed {escape(str(seed))}" for seed in seeds), "supported if", ""]
    return markup.table(header, rows)


def difference(value: float | None, entry: Mapping[str, Any], metric: str) -> str:
    """A cell with a difference over its interval."""
    if value is None:
        return DASH
    bounds = "" if entry["low"] is None else f"<small>{signed(entry['low'], metric)} to {signed(entry['high'], metric)}</small>"
    return minus(f'<td class="gain">{signed(value, metric)}{bounds}</td>')


# --------------------------------------------------------------------------------------------------- frontier and sweeps

def frontier(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> list[str]:
    """Accuracy against drift for every penalty and weight."""
    points = report["frontier"]
    parts = [markup.paragraph(
        "Every run that changes nothing but the penalty to the reference, its weight and the reward. Drift is measured alike "
        "for all of them, whatever they optimise: by the velocity, by the latents, and by what nobody rewards (the largest "
        "change among the sentinel's statistics, 1 being what it allows).")]
    if picture := pictures.get("frontier"):
        parts.append(markup.figure(
            picture, "exact accuracy against drift", "A line joins the weights of one penalty; numbers are weights, bars 95 % "
            "intervals, hollow points had an alarm. Up and to the left is better."))
    rows = [[f"{escape(one['run'])}<br><small>{escape(one['reward_is'])} reward, {one['steps']} steps</small>",
             f"<td>{escape(KIND_NAMES.get(one['regularizer'], one['regularizer']))}</td>", number(one["weight"], "g"),
             percent(one["accuracy"]), number(one["validation"], ".3f"), number(one["reward"]), number(one["velocity_mse"]),
             number(one["latent_kl"]), number(one["sentinel"], ".2f"),
             DASH if one["alarms"] is None else f"<td>{one['alarms']}</td>",
             f"<td>{'yes' if one['best'] else ''}</td>" if one["accuracy"] else f"<td>{escape(one['status'])}</td>"]
            for one in points]
    header = ["run", "penalty", "weight", "exact, %", "validation", "reward at the end", "velocity MSE", "latent KL",
              "sentinel", "alarms", "on the frontier"]
    return [*parts, markup.table(header, rows)] if rows else [*parts, markup.paragraph("There are no such runs.")]


def sweeps(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> list[str]:
    """One small table a sweep."""
    parts = [markup.paragraph(
        "One setting at a time, fewer steps, one seed, the headline cell: what was observed, and no verdict. Intervals are "
        "over prompts, so they know nothing of how much another seed would move a point.")]
    if picture := pictures.get("sweeps"):
        parts.append(markup.figure(picture, "differences of all sweep points from the baseline", "All points at once."))
    for sweep in report["sweeps"]:
        rows = [[escape(point["run"]) + (" (baseline)" if point["run"] == sweep["baseline"] else ""),
                 *(f"<td>{escape(setting(point['values'][key]))}</td>" for key in sweep["keys"]), percent(point["accuracy"]),
                 percent(point["difference"], sign=True), number(point["reward"]),
                 f"<td>{escape('' if point['status'] == 'ran' else point['status'])}</td>"] for point in sweep["points"]]
        keys = [f"<code>{escape(key)}</code>" for key in sweep["keys"]]
        parts.append(markup.table(["", *keys, "exact, %", "from the baseline", "reward at the end", ""], rows,
                                  caption=f"{sweep['name']}: {sweep['verdict']}"))
    return parts if report["sweeps"] else [*parts, markup.paragraph("There are no such runs.")]


# ------------------------------------------------------------------------------------------------------------------ arms

def arms(report: Mapping[str, Any], colors: Mapping[str, str]) -> list[str]:
    """Every arm with what it changes, whether it ran, its accuracy and its counted cost."""
    def row(name: str, found: Mapping[str, Any]) -> list[str]:
        changed = found["changes"]
        text = "not in params/runs.yaml" if changed is None else ", ".join(
            f"{key}: {setting(value)}" for key, value in changed.items() if value is not None)
        seeds = ", ".join(str(seed) for seed in found["seeds"])
        return [markup.dotted(name, colors), f"<td>{escape(text) or 'nothing'}</td>",
                f"<td>{escape(found['status'])}<small>{'seeds ' + escape(seeds) if seeds else ''}</small></td>",
                percent(found["exact"]), *(f"<td>{markup.amount(found['cost'].get(key))}</td>" for key in COSTS)]

    header = ["", "changes", "", "exact, %", *COSTS.values()]
    roster = report["roster"]
    full = [row(name, roster[name]) for name in arm_order(roster) if not roster[name]["point"]]
    points = [row(name, roster[name]) for name in arm_order(roster) if roster[name]["point"]]
    lost = sum(not found["seeds"] for found in roster.values())
    parts = [markup.paragraph(f"{len(roster)} arms; {lost} of them without results. Cost is counted, mean over seeds, each "
                              "arm's own training after the common warm-up."),
             markup.table(header, full, caption="Full length", kind="plain")]
    return parts + ([markup.table(header, points, caption="Sweep points", kind="plain")] if points else [])


def side_by_side(inputs: Inputs, report: Mapping[str, Any], colors: Mapping[str, str]) -> list[str]:
    """The first evaluation prompts, drawn by every full-length arm from the same noise."""
    roster = report["roster"]
    chosen: dict[str, Checkpoint] = {}
    for checkpoint in inputs.checkpoints:
        if checkpoint.run != "base" and not roster.get(checkpoint.run, {}).get("point"):
            chosen.setdefault(checkpoint.run, checkpoint)
    drawn = {run: {(s["prompt_id"], s["sample"]): s for s in c.samples if (s["cfg"], s["cell"]) == HEADLINE}
             for run, c in chosen.items()}
    drawn = {run: found for run, found in drawn.items() if found}
    if len(drawn) < 2:
        return [markup.paragraph("There are no samples of two arms for the same prompts.")]
    shared = [key for key in next(iter(drawn.values())) if all(key in found for found in drawn.values())][:SHOWN]
    blocks = []
    for key in shared:
        cards = [f"<div><p class=\"name\">{markup.dotted(run, colors)}</p>"
                 + markup.picture((chosen[run].folder / "samples" / found[key]["image"]).read_bytes(), found[key]["prompt"])
                 + f'<p class="mark {"right" if found[key]["exact"] else "wrong"}">'
                 + f'{"✓ right" if found[key]["exact"] else "✗ wrong"}</p></div>' for run, found in drawn.items()]
        prompt = next(iter(drawn.values()))[key]["prompt"]
        blocks.append(f'<article class="card"><p class="prompt">{escape(prompt)}</p>'
                      f'<div class="row">{"".join(cards)}</div></article>')
    seeds = ", ".join(f"{run} {c.seed}" for run, c in chosen.items() if c.seed is not None)
    return [markup.paragraph(f"The first {len(shared)} evaluation prompts, not chosen: the same prompt and initial noise for "
                             f"every arm, thinking sampled, no guidance. Seeds: {seeds}."), *blocks]


def paper(report: Mapping[str, Any]) -> list[str]:
    """The published figures, and ours below them."""
    rows = [[escape(one["system"]), f"<td>{escape(one['benchmark'])}</td>", f"<td>{escape(format(one['value']))}</td>",
             f"<td>{escape(one['source'])}<small>{escape(one['note'])}</small></td>"] for one in report["published"]]
    ours = []
    for arm in ("base", "sft", "unigrpo"):
        found = report["arms"].get(arm, {})
        for metric, name in ((f"{PREFIX}exact", "exact accuracy"), (f"{PREFIX}geneval", "GenEval's rules"),
                             (f"{PREFIX}cfg_on-thinking_on/geneval", "GenEval's rules, with guidance")):
            if entry := found.get(metric):
                ours.append([escape(arm), f"<td>{escape(name)}</td>", percent(entry)])
    text = ("Another model, another scale, another world: BAGEL has 7 billion active parameters, draws photographs and is "
            "judged by a detector; ours has two million, draws coloured shapes of 32 pixels and is judged exactly. GenEval's "
            "rules are applied to both, on other prompts. No difference between a row of the one table and a row of the other "
            "means anything; directions may be compared.")
    return [markup.paragraph(text),
            markup.table(["system", "benchmark", "published", "source"], rows, caption="Published, not ours", kind="plain"),
            markup.table(["checkpoint", "measure", "%"], ours, caption=f"Ours, scale {report['scale']}", kind="plain")]
