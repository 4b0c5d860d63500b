"""What a report says beside accuracy: what the thinking contributes, what training did to understanding, and the sentinel.

    controls[run][control(/category)]         differences between cells of one checkpoint, in exact accuracy
    understanding["a-b"][measure(/category)]  the loss on a right plan in words, and greedy plans that are right
    sentinel[checkpoint]                      alarms of the run, and its evaluation against the warm-up's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from unigrpo.evaluation.outcomes import significant
from unigrpo.evaluation.sentinel import GUARDS, WORDS, compare_standing, kind
from unigrpo.report import markup

ALARM = "sentinel/alarm/"


def sentinel_of(training: Mapping[str, float], before: Mapping[str, float] | None,
                after: Mapping[str, float]) -> dict[str, Any]:
    """What the sentinel has to say of one trained checkpoint.

    Args:
        training: of its run. before, after: metrics of the warm-up's evaluation (None: there is none) and of its own.
    """
    alarms = {name.removeprefix(ALARM): int(step) for name, step in sorted(training.items()) if name.startswith(ALARM)}
    compared = {} if before is None else {
        guard: {name: value if isinstance(value, bool) else significant(value) for name, value in found.items()}
        for guard, found in compare_standing(before, after).items()}
    return {"probes": int(training.get("sentinel/probes", 0)), "alarms": alarms, "evaluation": compared}


# --------------------------------------------------------------------------------------------------------------- page

def contribution(controls: Mapping[str, Mapping[str, Any]], header: Sequence[str], arms: Sequence[str],
                 cells: Callable[[Mapping[str, Any] | None], str]) -> list[str]:
    """Tables of what the thinking contributes: over all prompts, and by category where one asks for it."""
    names = list(dict.fromkeys(name for entries in controls.values() for name in entries))
    if not names:
        return []

    def table(wanted: Sequence[str], caption: str) -> str:
        rows = [[escape(name.replace(" - ", " − ").replace("/", ", ").replace("_", " ")),
                 *(cells(controls.get(arm, {}).get(name)) for arm in arms)] for name in wanted]
        return markup.table(["points of exact accuracy", *header], rows, caption=caption)

    whole, parts = [name for name in names if "/" not in name], [name for name in names if "/" in name]
    found = [table(whole, "What the thinking contributes, guidance off, paired")]
    if parts:
        found.append(f"<details><summary>by category</summary>{table(parts, 'The same by category')}</details>")
    return found


def understanding(report: Mapping[str, Any]) -> list[str]:
    """Whether training cost understanding: two measures that must both go wrong."""
    rows = []
    for pair, found in report["understanding"].items():
        for name in ("text_loss", "plan_accuracy"):
            entry = found[name]
            scale, digits, unit = (1.0, 3, "nats a token") if name == "text_loss" else (100.0, 1, "points")
            bounds = "" if entry["low"] is None else \
                f"<small>{scale * entry['low']:+.{digits}f} to {scale * entry['high']:+.{digits}f}</small>"
            rows.append([f"{escape(pair.replace('-', ' − '))}: {name.replace('_', ' ')}, {unit}",
                         f'<td class="gain">{scale * entry["value"]:+.{digits}f}{bounds}</td>'.replace("-", "−")])
    text = ("On the evaluation prompts: the loss on one right plan in words, the same for every checkpoint, and the share of "
            "greedy plans that are right. A policy that settles on one phrasing loses likelihood for the others and "
            "understands no less, so understanding is lost only where the loss rises and the accuracy falls.")
    return [markup.paragraph(text), markup.table(["", "change"], rows)] if rows else [markup.paragraph("Nothing was trained.")]


def sentinel(report: Mapping[str, Any]) -> list[str]:
    """Alarms of every run, and what nobody rewards at its evaluation against the warm-up's."""
    parts = [markup.paragraph("At every probe the sentinel looks at what nobody rewards; an alarm rises where the reward goes "
                              "up while one of these goes wrong. The table compares evaluations; docs/sentinel.md says how.")]
    roster = report.get("roster", {})
    found = {name: entry for name, entry in report["sentinel"].items()
             if entry["alarms"] or not roster.get(name.partition("/")[0], {}).get("point")}
    for name, entry in found.items():
        alarms = "; ".join(f"{guard.replace('_', ' ')} at step {step}" for guard, step in entry["alarms"].items())
        parts.append(markup.paragraph(f"{name}: {entry['probes']} probes, " + (f"ALARM: {alarms}." if alarms else "no alarm.")))
    guards = [guard for guard in GUARDS if any(guard in entry["evaluation"] for entry in found.values())]
    if len(found) > len(guards):
        rows = [[escape(name), *(_change(entry["evaluation"].get(guard)) for guard in guards)] for name, entry in found.items()]
        header = ["change since the warm-up (allowed)", *(escape(WORDS.get(kind(guard), guard)) for guard in guards)]
        parts.append(markup.table(header, rows))
    elif guards:
        rows = [[escape(WORDS.get(kind(guard), guard)), *(_change(entry["evaluation"].get(guard)) for entry in found.values())]
                for guard in guards]
        parts.append(markup.table(["change since the warm-up (allowed)", *map(escape, found)], rows))
    return parts


def _change(entry: Mapping[str, Any] | None) -> str:
    """A change beside what is allowed; one past it stands out."""
    if entry is None:
        return "<td>–</td>"
    text = f"{entry['after'] - entry['before']:+.3g}<small>{entry['allowed']:.3g}</small>".replace("-", "−")
    return f'<td class="gain wrong">{text}</td>' if entry["past"] else f"<td>{text}</td>"
