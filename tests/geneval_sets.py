"""Small image sets in GenEval's layout, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scorer_models import picture

from unigrpo.evaluation.geneval_folder import write_metadata, write_sample


def clause(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **more}


RECORDS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [clause("cup")], "prompt": "one cup on a table"},
    {"tag": "two_object", "include": [clause("fork"), clause("cup")], "prompt": "fork and cup"},
    {"tag": "counting", "include": [clause("kite", 2)], "exclude": [clause("kite", 3)], "prompt": "a pair of kites"},
    {"tag": "colors", "include": [clause("suitcase", color="red")], "prompt": "red luggage"},
    {"tag": "colors", "include": [clause("cup", color="white")], "prompt": "white cup"},
    {"tag": "colors", "include": [clause("fork", color="black")], "prompt": "black fork"},
    {"tag": "position", "include": [clause("cup"), clause("fork", position=["above", 0])], "prompt": "fork over a cup"},
    {"tag": "color_attr", "include": [clause("cup", color="pink"), clause("skateboard", color="blue")],
     "prompt": "pink cup, blue skateboard"},
]


def write_set(folder: Path, records: list[dict[str, Any]] | None = None, *, samples: int = 4, size: int = 48) -> Path:
    """A folder of pictures, one seed each, with the file of its prompts at `<folder>.jsonl`."""
    records = RECORDS if records is None else records
    for index, record in enumerate(records):
        write_metadata(folder, index, record)
        for number in range(samples):
            write_sample(folder, index, number, picture(index * samples + number, size, size))
    folder.with_suffix(".jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
