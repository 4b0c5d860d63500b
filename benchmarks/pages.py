"""Tables of measurements into the pages of docs/benchmarks/, between marks, so that measuring again replaces them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def put(page: Path, name: str, lines: Sequence[str]) -> None:
    """Write lines between `<!-- name -->` and `<!-- /name -->`; a page without the marks gets both, and the lines, at its end.

    Raises: ValueError if a page has one of the marks only, or has them twice.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    block = "\n".join([first, "", *lines]).rstrip("\n") + f"\n\n{last}"
    counts = content.count(first), content.count(last)
    if counts == (0, 0):
        content = (content.rstrip("\n") + "\n\n" if content else "") + block + "\n"
    elif counts == (1, 1) and content.index(first) < content.index(last):
        content = content[:content.index(first)] + block + content[content.index(last) + len(last):]
    else:
        raise ValueError(f"{page} must have the marks {first} and {last} once each, in this order, got {counts}")
    page.write_text(content, encoding="utf-8")
