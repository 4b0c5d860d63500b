"""A gallery as one page: every picture with its prompt and its thinking, in one file, which MLflow's pages show."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

LISTINGS = ("gallery.json", "samples.json")  # of the stages train and evaluate
SHOWN = 96      # pictures on a page, the last of the listing
WIDTH = 256     # pixels of a picture on the page; larger ones are scaled down
PLAIN = ("image", "prompt", "thinking", "prompt_id")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ margin: 1rem; background: #fff; color: #22252a; font: 14px/1.4 system-ui, "Segoe UI", Arial, sans-serif; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }}
figure {{ margin: 0; padding: .7rem; border: 1px solid #e3e6ea; border-radius: 6px; }}
img {{ display: block; width: 128px; image-rendering: {rendering}; border: 1px solid #e3e6ea; margin-bottom: .5rem; }}
.prompt {{ font-weight: 600; }} .thinking {{ color: #4a5058; margin: .3rem 0; }} .facts {{ color: #626973; font-size: 12px; }}
</style>
<p>{heading}</p>
<main>
{figures}
</main></html>
"""


def gallery_page(folder: Path) -> str | None:
    """The page of a folder with a gallery.json (train) or samples.json (evaluate).

    Args:
        folder: pictures and a listing: a list of {"image", "prompt", "thinking", and whatever else is known of it}.
    Returns: HTML with the pictures inside; None where the folder holds no listing, or an empty one.
    """
    listing = next((folder / name for name in LISTINGS if (folder / name).is_file()), None)
    entries = json.loads(listing.read_text(encoding="utf-8")) if listing is not None else []
    if not entries:
        return None
    shown = entries[-SHOWN:][::-1]  # of a training the latest first
    pictures = [picture(folder / str(entry.get("image", ""))) for entry in shown]
    small = all(width <= WIDTH for _, width in pictures)
    heading = f"{len(shown)} of {len(entries)} pictures, the latest first" if len(entries) > len(shown) else \
        f"{len(entries)} pictures, the latest first"
    return PAGE.format(title=escape(folder.name), heading=heading, rendering="pixelated" if small else "auto",
                       figures="\n".join(figure(entry, data) for entry, (data, _) in zip(shown, pictures, strict=True)))


def figure(entry: Mapping[str, Any], data: str) -> str:
    """One picture with its prompt, its thinking, and the other facts of its entry."""
    facts = " · ".join(f"{key} {value}" for key, value in entry.items() if key not in PLAIN)
    image = f'<img src="{data}" alt="{escape(str(entry.get("prompt", "")))}">' if data else ""
    return (f'<figure>{image}<div class="prompt">{escape(str(entry.get("prompt", "")))}</div>'
            f'<div class="thinking">{escape(str(entry.get("thinking", ""))) or "no thinking"}</div>'
            f'<div class="facts">{escape(facts)}</div></figure>')


def picture(path: Path) -> tuple[str, int]:
    """(the picture as a data URI, its width in pixels), scaled down to WIDTH where it is wider; ("", 0) where there is none."""
    if not path.is_file():
        return "", 0
    from PIL import Image

    with Image.open(path) as image:
        width = image.width
        if width <= WIDTH:
            data, kind = path.read_bytes(), path.suffix.removeprefix(".").replace("jpg", "jpeg")
        else:
            image.thumbnail((WIDTH, WIDTH * image.height // image.width))
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").save(buffer, format="JPEG", quality=85)
            data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width
