"""Pieces of the page: escaped text, tables, pictures, style. Nothing here knows what is reported."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

ROW_LIMIT = 24      # rows of a generic table before the rest is only counted

STYLE = """
:root {
  --ink: #22252a; --soft: #626973; --line: #e3e6ea; --tint: #f6f7f9;
  --right: #1d7a4c; --wrong: #b3382c; --accent: #c8502d; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 Charter, "Bitstream Charter", Cambria, Georgia, serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0 .9rem; }
a { color: #2c5aa0; text-underline-offset: .15em; }
nav, table, .tag, .mark, .note, figcaption, dl, .kicker {
  font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
nav { font-size: .86rem; margin: 1.4rem 0 0; } nav a { display: inline-block; margin-right: 1.1rem; white-space: nowrap; }
.kicker { color: var(--soft); font-size: .86rem; margin: 0 0 .4rem; }
.headline { font-size: 1.22rem; line-height: 1.45; max-width: 50rem; border-left: 4px solid var(--accent);
            padding: .2rem 0 .2rem 1rem; margin: 1.3rem 0; }
.note { color: var(--soft); font-size: .86rem; line-height: 1.5; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .5rem; }
th, td { padding: .38rem 1.3rem .38rem 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 1.5px solid #9aa0a8; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tbody th { font-weight: 400; }
td small { display: block; color: var(--soft); font-size: .76rem; white-space: nowrap; }
td.gain { font-weight: 600; } td.wrong { color: var(--wrong); } td.gain small { font-weight: 400; }
td.shade { padding: .45rem .85rem; text-align: center; border: 3px solid #fff; }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.grid th { padding-right: 1rem; }
table.plain td, table.plain th { text-align: left; font-variant-numeric: normal; }
table.plain th { white-space: nowrap; }
table.plain td.number { text-align: right; font-variant-numeric: tabular-nums; }
.dot { display: inline-block; width: .62em; height: .62em; border-radius: 50%; margin-right: .4em; }
figure { margin: 1rem 0 1.4rem; } figure > img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .84rem; margin-top: .4rem; max-width: 50rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(27rem, 1fr)); gap: 1.1rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .8rem .9rem .9rem; break-inside: avoid; }
.card > .prompt { margin: 0 0 .6rem; font-weight: 600; line-height: 1.35; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; }
.pair img { width: 100%; max-width: 12rem; aspect-ratio: 1; image-rendering: pixelated; display: block;
            border: 1px solid var(--line); }
.pair .name { font: 600 .8rem system-ui, sans-serif; margin: 0 0 .3rem; }
.thinking { color: var(--soft); font-size: .84rem; line-height: 1.4; margin: .45rem 0 0; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; } .row > div { width: 6.6rem; }
.row img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; border: 1px solid var(--line); }
.row .name { font: 600 .7rem/1.25 system-ui, sans-serif; margin: 0 0 .3rem; min-height: 2.5em; overflow-wrap: anywhere; }
.card + .card { margin-top: 1rem; } .gallery .card + .card { margin-top: 0; }
.verdict { font: 600 .78rem system-ui, sans-serif; white-space: nowrap; border: 1px solid currentColor; border-radius: 4px;
           padding: .08rem .4rem; } .verdict.open { color: var(--soft); }
table.verdicts td, table.verdicts th { white-space: normal; } table.verdicts th { min-width: 11rem; }
.mark { font-size: .8rem; font-weight: 600; margin: .4rem 0 0; } .right { color: var(--right); } .wrong { color: var(--wrong); }
dl { font-size: .88rem; line-height: 1.45; max-width: 50rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--soft); }
details { margin: .7rem 0; } summary { cursor: pointer; font-family: system-ui, sans-serif; font-size: .9rem; }
code { font: .84em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
@media (max-width: 34rem) { .gallery { grid-template-columns: 1fr; } }
@media print { main { max-width: none; padding: 0; } nav { display: none; } }
"""


def document(title: str, body: str) -> str:
    """A whole page without scripts and without anything to fetch."""
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def section(anchor: str, title: str, *parts: str) -> str:
    """A titled part of the page."""
    return "\n".join([f'<section id="{anchor}">', f"<h2>{escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph of plain text."""
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def picture(png: bytes, alt: str) -> str:
    """An image inside the page."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(alt, quote=True)}">'


def figure(png: bytes, alt: str, caption: str) -> str:
    """A picture with its caption."""
    return f"<figure>{picture(png, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", kind: str = "") -> str:
    """A table of ready-made cells: `<td ...>...</td>`, or markup that is put into one. The first cell names the row."""
    def cell(content: str) -> str:
        return content if content.startswith("<td") else f"<td>{content}</td>"

    lines = ['<div class="scroll">', f'<table class="{kind}">' if kind else "<table>"]
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    if header:
        lines.append("<thead><tr>" + "".join(f'<th scope="col">{name}</th>' for name in header) + "</tr></thead>")
    lines.append("<tbody>")
    lines += [f'<tr><th scope="row">{row[0]}</th>' + "".join(cell(content) for content in row[1:]) + "</tr>" for row in rows]
    return "\n".join([*lines, "</tbody></table></div>"])


def number(value: Any) -> str:
    """A count or share for people; text is escaped."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e12):
        return f"{int(value):,}".replace(",", "\u00a0")
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def amount(value: float | None) -> str:
    """A count; powers of ten where it is long."""
    if value is None:
        return "–"
    if abs(value) < 1e9:
        return number(float(value))
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits} × 10<sup>{int(power)}</sup>"


def dotted(name: str, colors: Mapping[str, str]) -> str:
    """A name with its colour."""
    return f'<span class="dot" style="background:{colors.get(name, "#999")}"></span>{escape(name)}'


def spoken(name: str) -> str:
    """A key as words."""
    return escape(str(name).replace("_", " "))


def json_tables(value: Any, title: str = "") -> str:
    """Any JSON value as tables: scalars side by side, mappings of mappings as a matrix, deeper levels under headings."""
    heading = f"<h3>{spoken(title).capitalize()}</h3>" if title else ""
    if isinstance(value, Mapping) and value and all(_flat(item) for item in value.values()):
        columns = list(dict.fromkeys(key for item in value.values() for key in item))
        rows = [[spoken(name), *(_number_cell(item.get(key, "")) for key in columns)] for name, item in _some(value.items())]
        return heading + table(["", *map(spoken, columns)], rows) + _rest(value)
    if isinstance(value, Mapping):
        simple = {key: item for key, item in value.items() if not isinstance(item, Mapping | list) or item in ([], {})}
        rows = [[spoken(key), _number_cell("none" if item in ([], {}) else item)] for key, item in _some(simple.items())]
        parts = [table([], rows, kind="plain") + _rest(simple)] if simple else []
        parts += [json_tables(item, key) for key, item in value.items() if key not in simple]
        return heading + "".join(parts)
    if isinstance(value, list) and value and all(_flat(item) for item in value):
        columns = list(dict.fromkeys(key for item in value for key in item))
        rows = [[number(item.get(columns[0], "")), *(_number_cell(item.get(key, "")) for key in columns[1:])]
                for item in _some(value)]
        return heading + table([*map(spoken, columns)], rows, kind="plain") + _rest(value)
    if isinstance(value, list):
        more = f" and {len(value) - ROW_LIMIT} more" if len(value) > ROW_LIMIT else ""
        return heading + f'<p class="note">{", ".join(number(item) for item in _some(value))}{more}</p>'
    return heading + f"<p>{number(value)}</p>"


def _flat(value: Any) -> bool:
    """A mapping of scalars."""
    return isinstance(value, Mapping) and bool(value) and not any(isinstance(item, Mapping | list) for item in value.values())


def _number_cell(value: Any) -> str:
    """A cell, numbers to the right."""
    return f'<td class="number">{number(value)}</td>' if isinstance(value, int | float) else f"<td>{number(value)}</td>"


def _some(items: Any) -> list[Any]:
    """As many as are shown."""
    return list(items)[:ROW_LIMIT]


def _rest(items: Any) -> str:
    """How many are not."""
    return f'<p class="note">and {len(items) - ROW_LIMIT} more</p>' if len(items) > ROW_LIMIT else ""
