"""report.html: one self-contained page from the report's numbers, the curves and the saved samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from unigrpo.config import Config
from unigrpo.evaluation.outcomes import CFG, HEADLINE, THINKING
from unigrpo.report import claims_page, effects, markup
from unigrpo.report.benchmarks import main_rows, order
from unigrpo.report.claims_figures import all_figures
from unigrpo.report.data import PREFIX
from unigrpo.report.figures import SUPERVISED_PANELS, arm_colors, curves_figure, results_figure, training_panels
from unigrpo.report.reading import Checkpoint, Inputs
from unigrpo.report.table import ROWS, arm_order, footnote

THINKING_NAMES = {"on": "sampled", "greedy": "greedy", "off": "off", "shuffled": "another prompt's",
                  "truncated": "its first half"}
COST_NAMES = {"prompts": "prompts", "images": "images", "text_tokens": "text tokens", "model_calls": "image model calls",
              "updates": "optimizer updates", "flops": "FLOPs"}
DEFINITIONS = {
    "exact accuracy": "share of images that show everything the prompt asks for and nothing else (the exact verifier)",
    "GenEval's rules": "the benchmark's own verdict, which tolerates some extra objects; mean over its categories",
    "thinking right": "share of thinkings whose plan satisfies the prompt exactly; sampled at temperature 1, or greedy",
    "image right, given a right plan": "exact accuracy among the images whose thinking was right: how well plans are drawn",
}


def render_page(report: Mapping[str, Any], inputs: Inputs, config: Config, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: as full_report returns it. inputs: what it was made from. config: for the number of updates and the gallery.
        pictures: figures by name, as `figures` makes them.
    Returns: HTML with style and images inside; the same inputs give the same bytes.
    """
    arms = shown_arms(report)
    colors = arm_colors(arms)
    sections = [
        *(claims_page.sections(report, inputs, colors, pictures) if "claims" in report else []),
        ("results", "Results", results(report, arms, colors, pictures)),
        *([("benchmarks", "GenEval and T2I-CompBench", benchmarks(report, arms, colors))] if "scores" in report else []),
        *([("categories", "By category and kind of reasoning", categories(report, arms, colors)),
           ("grid", "Guidance and thinking", grid(report, arms, colors)),
           ("understanding", "Understanding", effects.understanding(report))] if shapes(report) else []),
        ("curves", "Training curves", curves(inputs, config, colors)),
        ("sentinel", "Sentinel", effects.sentinel(report)),
        ("gallery", "Before and after", gallery(inputs, config, colors)),
        ("leakage", "Leakage between splits", leakage(inputs)),
        ("prompts", "Prompts", prompts(inputs)),
        ("cost", "Counted cost", cost(report)),
        ("measured", "How it was measured", how(report)),
    ]
    links = "\n".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections)
    head = "\n".join([
        f'<p class="kicker">UniGRPO (arXiv 2603.23500) · scale {escape(str(report["scale"]))} · '
        f'{"main report" if report["report"] == "main" else "all experiments"}</p>',
        "<h1>One policy that thinks, then draws</h1>",
        f'<p class="headline">{escape(report["headline"]["sentence"])}</p>', f"<nav>{links}</nav>"])
    body = "\n".join([head, *(markup.section(anchor, title, *parts) for anchor, title, parts in sections)])
    return markup.document(f"UniGRPO report, scale {report['scale']}", body)


def shown_arms(report: Mapping[str, Any]) -> list[str]:
    """The arms that get a column: all but points of sweeps."""
    roster = report.get("roster", {})
    return [arm for arm in arm_order(report["arms"]) if not roster.get(arm, {}).get("point")]


def figures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> PNG, of the figures that follow from report.json alone."""
    found = {"results": results_figure(report, arms=shown_arms(report))} if shapes(report) else {}
    return found | (all_figures(report) if "claims" in report else {})


def shapes(report: Mapping[str, Any]) -> bool:
    """Whether the prompts of the shapes world were drawn."""
    return any(metric.startswith(PREFIX) for found in report["arms"].values() for metric in found)


# ------------------------------------------------------------------------------------------------------------- tables

def interval_cell(entry: Mapping[str, Any] | None, *, gain: bool = False) -> str:
    """A value in percent over its interval."""
    if entry is None:
        return "<td>–</td>"
    form = "+.1f" if gain else ".1f"
    bounds = "" if entry["low"] is None else f"<small>{100 * entry['low']:{form}} to {100 * entry['high']:{form}}</small>"
    start = '<td class="gain">' if gain else "<td>"
    return f"{start}{100 * entry['value']:{form}}{bounds}</td>".replace("-", "−")


def main_differences(report: Mapping[str, Any]) -> list[str]:
    """The differences that get a column: unigrpo against sft, and in the main report sft against base."""
    wanted = ("unigrpo-sft", "sft-base") if report["report"] == "main" else ("unigrpo-sft",)
    return [name for name in wanted if name in report["differences"]]


def metric_table(report: Mapping[str, Any], arms: Sequence[str], colors: Mapping[str, str], names: Mapping[str, str],
                 caption: str = "", prefix: str = PREFIX) -> str:
    """Metrics below bench/shapes/ (or another prefix) as rows, arms and differences as columns, in percent with intervals."""
    pairs = main_differences(report)
    header = ["", *(markup.dotted(arm, colors) for arm in arms), *(escape(pair.replace("-", " − ")) for pair in pairs)]
    rows = [[escape(label), *(interval_cell(report["arms"][arm].get(prefix + name)) for arm in arms),
             *(interval_cell(report["differences"][pair].get(prefix + name), gain=True) for pair in pairs)]
            for name, label in names.items() if any(prefix + name in report["arms"][arm] for arm in arms)]
    return markup.table(header, rows, caption=caption)


def results(report: Mapping[str, Any], arms: Sequence[str], colors: Mapping[str, str],
            pictures: Mapping[str, bytes]) -> list[str]:
    """The main table, its figure, every seed singly and what the words mean."""
    rows = {PREFIX + name: label for name, label in ROWS.items()} | main_rows(report.get("scores", {}))
    parts = [metric_table(report, arms, colors, rows, "Percent, with 95 % intervals; differences in points", prefix=""),
             markup.paragraph(footnote(report), note=True)]
    if not shapes(report):
        return parts + (differences(report) if report["report"] != "main" else [])
    parts.append(markup.figure(pictures["results"], "values of every arm with intervals", "The same values as a picture."))
    parts += differences(report) if report["report"] != "main" else []
    words = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS.items())
    return [*parts, f"<dl>{words}</dl>"]


def benchmarks(report: Mapping[str, Any], arms: Sequence[str], colors: Mapping[str, str]) -> list[str]:
    """Every score of the other benchmarks in every cell."""
    names = {metric: report["scores"][metric] for metric in sorted(report["scores"], key=order)}
    text = ("A score is called by the name that its detector, models and prompts allow; compare numbers of one name only. "
            "GenEval's overall is the mean over its tasks of the share of right images, T2I-CompBench's categories are means "
            "over images; intervals resample prompts. " + " ".join(f"{line}." for line in report["measured"]["benchmarks"]))
    return [metric_table(report, arms, colors, names, "Percent, with 95 % intervals; differences in points", prefix=""),
            markup.paragraph(text, note=True)]


def differences(report: Mapping[str, Any]) -> list[str]:
    """Headline differences between arms, over seeds and seed by seed."""
    metric = report["measured"]["headline_metric"]
    found = {pair: entries[metric] for pair, entries in report["differences"].items() if metric in entries}
    seeds = sorted({seed for entry in found.values() for seed in entry["seeds"]}, key=int)
    rows = [[escape(pair.replace("-", " − ")), interval_cell(entry, gain=True),
             *(interval_cell(entry["seeds"].get(seed), gain=True) for seed in seeds)] for pair, entry in found.items()]
    what = report.get("scores", {}).get(metric, "exact accuracy")
    return [markup.table([f"{escape(what)}, points", "all seeds", *(f"seed {escape(seed)}" for seed in seeds)], rows,
                         caption="Differences between arms"),
            markup.paragraph("All seeds: mean and t interval over seeds. Single seeds: paired bootstrap over prompts. Seeds "
                             "vary the RL alone; everything is conditional on one base and one warm-up.", note=True)]


def categories(report: Mapping[str, Any], arms: Sequence[str], colors: Mapping[str, str]) -> list[str]:
    """Exact accuracy by GenEval category and by kind of reasoning, headline cell."""
    names = sorted({metric.removeprefix(PREFIX) for arm in arms for metric in report["arms"][arm]})
    tags = {name: name.removeprefix("exact/").replace("_", " ") for name in names
            if name.startswith("exact/") and name not in ("exact/plain", "exact/reasoning")}
    kinds = {name: name.removeprefix("reasoning/").replace("_", " ") for name in names if name.startswith("reasoning/")}
    parts = [metric_table(report, arms, colors, tags, "Exact accuracy by category, percent")]
    if kinds:
        parts.append(metric_table(report, arms, colors, kinds, "Exact accuracy by kind of reasoning, percent"))
    return parts


def grid(report: Mapping[str, Any], arms: Sequence[str], colors: Mapping[str, str]) -> list[str]:
    """Exact accuracy of every cell, its exposure in the warm-up, and what the thinking contributes."""
    shown = report["exposure"]
    rows = []
    for cfg in CFG:
        for thinking in THINKING:
            name = f"cfg_{cfg}-thinking_{thinking}"
            if not any(f"{PREFIX}{name}/exact" in report["arms"][arm] for arm in arms):
                continue
            without = shown["unconditional"].get(name)
            seen = f"{100 * shown['cells'][name]:.1f} %"
            if without is not None:
                seen += f"<small>+ {100 * without:.1f} % without text</small>"
            label = f"guidance {cfg}, thinking {THINKING_NAMES[thinking]}"
            label += " (headline)" if (cfg, thinking) == HEADLINE else ""
            rows.append([escape(label), *(shaded(report["arms"][arm].get(f"{PREFIX}{name}/exact")) for arm in arms), seen])
    header = ["", *(markup.dotted(arm, colors) for arm in arms), "share of the warm-up"]
    wrong = shown["wrong_plans"]
    text = (f"By intent {100 * shown['thinking_error']:.0f} % of the warm-up's reasoning prompts carry a wrong plan"
            + ("" if wrong is None else f" ({100 * wrong:.1f} % were counted)")
            + f", {100 * shown['systematic_share']:.0f} % of them systematic: a concept always takes the same wrong value. "
            "This is how the text policy gets room to choose. The picture shown with a thinking is the plan's, right or wrong.")
    parts = [markup.paragraph("Every checkpoint draws every prompt in every cell, from the same noise. The last column says "
                              "how much of the warm-up was drawn in the cell's context, so how well the model could know it."),
             markup.table(header, rows, caption="Exact accuracy, percent", kind="grid"), markup.paragraph(text)]
    names = [markup.dotted(arm, colors) for arm in arms]
    return parts + effects.contribution(report["controls"], names, arms, partial(interval_cell, gain=True))


def shaded(entry: Mapping[str, Any] | None) -> str:
    """A value whose cell is the darker the higher it is."""
    if entry is None:
        return '<td class="shade">–</td>'
    bounds = "" if entry["low"] is None else f"<small>{100 * entry['low']:.1f} to {100 * entry['high']:.1f}</small>"
    tint = f"rgba(63,111,181,{0.04 + 0.5 * entry['value']:.2f})"
    return f'<td class="shade" style="background:{tint}">{100 * entry["value"]:.1f}{bounds}</td>'


# ------------------------------------------------------------------------------------------------- curves and gallery

def curves(inputs: Inputs, config: Config, colors: Mapping[str, str]) -> list[str]:
    """Curves of every training: the RL runs together, base and warm-up each alone."""
    runs = [c for c in inputs.checkpoints if c.run not in ("base", "sft") and not inputs.is_point(c.run)]
    parts = []
    if runs and (image := curves_figure(runs, training_panels(config.train.updates_per_rollout), colors)):
        drawn = "running means" if len(runs) > 1 else "faint as logged, strong as a running mean"
        parts.append(markup.figure(image, "training curves of the RL runs", f"Training by reinforcement, {drawn}. "
                                   "docs/curves.md says what each looks like when healthy and when sick."))
    for checkpoint in inputs.checkpoints:
        if checkpoint.run in ("base", "sft") and (image := curves_figure([checkpoint], SUPERVISED_PANELS, colors)):
            title = {"base": "The base model, from scratch", "sft": "The warm-up on thinking"}[checkpoint.run]
            parts.append(markup.figure(image, f"training curves of {checkpoint.name}", f"{title}."))
    return parts or [markup.paragraph("No curves were logged.")]


Pair = tuple[Checkpoint, dict[str, Any], Checkpoint, dict[str, Any]]


def before_and_after(inputs: Inputs, limit: int) -> list[Pair]:
    """Samples of sft and of unigrpo's first seed for the same prompt and noise, headline cell, in the file's order."""
    arms = inputs.arms()
    if "sft" not in arms or "unigrpo" not in arms:
        return []
    before, after = arms["sft"][0], arms["unigrpo"][0]
    first, second = ({(s["prompt_id"], s["sample"]): s for s in c.samples if (s["cfg"], s["cell"]) == HEADLINE}
                     for c in (before, after))
    return [(before, first[key], after, second[key]) for key in first if key in second][:limit]


def gallery(inputs: Inputs, config: Config, colors: Mapping[str, str]) -> list[str]:
    """The same prompts and the same noise before and after training, with the thinking."""
    pairs = before_and_after(inputs, config.report.gallery)
    if not pairs:
        return [markup.paragraph("There are no samples of sft and unigrpo for the same prompts.")]
    cards = []
    for before, old, after, new in pairs:
        sides = side(before, old, colors) + side(after, new, colors)
        cards.append(f'<article class="card"><p class="prompt">{escape(old["prompt"])}</p>'
                     f'<div class="pair">{sides}</div></article>')
    old_right, new_right = sum(bool(old["exact"]) for _, old, _, _ in pairs), sum(bool(new["exact"]) for *_, new in pairs)
    return [markup.paragraph(f"The first {len(pairs)} evaluation prompts, not chosen: the same prompt and initial noise, "
                             f"thinking sampled, no guidance. {old_right} are right before and {new_right} after."),
            f'<div class="gallery">{"".join(cards)}</div>']


def side(checkpoint: Checkpoint, sample: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    """One picture with its verdict and the thinking that conditioned it."""
    png = (checkpoint.folder / "samples" / sample["image"]).read_bytes()
    mark = '<p class="mark right">✓ right</p>' if sample["exact"] else '<p class="mark wrong">✗ wrong</p>'
    thinking = f'<p class="thinking">{escape(sample["thinking"])}</p>' if sample["thinking"] else ""
    image = markup.picture(png, sample["prompt"])
    return f'<div><p class="name">{markup.dotted(checkpoint.run, colors)}</p>{image}{mark}{thinking}</div>'


# --------------------------------------------------------------------------------------------------------- the account

def leakage(inputs: Inputs) -> list[str]:
    """What curation found and removed."""
    return [markup.paragraph("Splits share no prompt, no canonical content and no specification, so an evaluation prompt is "
                             "not a paraphrase of a training prompt; curation fails where they do."),
            markup.json_tables(inputs.leakage)]


def prompts(inputs: Inputs) -> list[str]:
    """Statistics of curation, the splits side by side."""
    order = ("sft", "train", "validation", "eval")
    splits = {name: inputs.statistics[name] for name in sorted(inputs.statistics, key=lambda name: (
        order.index(name) if name in order else len(order), name)) if isinstance(inputs.statistics[name], Mapping)}
    groups: dict[str, dict[str, dict[str, Any]]] = {}            # heading -> row -> split -> value
    for split, found in splits.items():
        for key, value in found.items():
            for row, number in value.items() if isinstance(value, Mapping) else [(key, value)]:
                groups.setdefault(key if isinstance(value, Mapping) else "splits", {}).setdefault(row, {})[split] = number
    tables = [markup.table(["", *map(markup.spoken, splits)],
                           [[markup.spoken(row), *(markup.number(values.get(split, 0)) for split in splits)]
                            for row, values in rows.items()],
                           caption=heading.replace("_", " ").capitalize()) for heading, rows in groups.items()]
    return ['<div class="columns">', *tables, "</div>"]


def cost(report: Mapping[str, Any]) -> list[str]:
    """Counted work of every checkpoint's own training."""
    found = {name: entries for name, entries in report["cost"].items() if entries}
    columns = [key for key in COST_NAMES if any(key in entries for entries in found.values())]
    rows = [[escape(name), *(markup.amount(entries.get(key)) for key in columns)] for name, entries in found.items()]
    if report["report"] == "main" and len(found) > 1:
        rows.append(["together", *(markup.amount(sum(entries.get(key, 0) for entries in found.values())) for key in columns)])
    return [markup.paragraph("Counted, not timed: the same on every machine. Seconds, memory and hardware are in MLflow "
                             "(make ui). Each line is the stage's own training, without what it starts from."),
            markup.table(["", *(COST_NAMES[key] for key in columns)], rows)]


def how(report: Mapping[str, Any]) -> list[str]:
    """Settings of the measurement and digests of what it was made from."""
    facts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in report["measured"].items()}
    rows = [[markup.spoken(key), markup.number(value)] for key, value in facts.items()]
    files = [[f"<code>{escape(path)}</code>", f"<code>{digest}</code>"] for path, digest in sorted(report["inputs"].items())]
    return [markup.table([], rows, kind="plain"),
            f"<details><summary>sha256 of the {len(files)} inputs</summary>{markup.table([], files, kind='plain')}</details>"]
