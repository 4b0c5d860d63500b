"""Noun phrases and parts of speech of prompts: parsed once, kept as data that holds no prompt.

A parse depends on the version of the parser and of its model, so a benchmark that rests on one must name both. The file has,
by the sha256 of each prompt, character positions only: with the prompt they give its words, without it nothing.

    {"format": "unigrpo/parses/1", "parser": {"spacy": "3.8.7", "model": "en_core_web_sm", "model_version": "3.8.0"},
     "parses": {"<sha256>": {"chunks": [[0, 13], ...], "tokens": [[0, 1, "DET"], ...]}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigrpo.evaluation.geneval_folder import write_atomically

FORMAT = "unigrpo/parses/1"
MODEL = "en_core_web_sm"


@dataclass(frozen=True)
class Parse:
    """Of one prompt: noun phrases, and (text, coarse part of speech) of every token."""

    noun_chunks: tuple[str, ...]
    tokens: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Parses:
    """A cache of parses. `parser` names what made them; `entries` are as in the file."""

    parser: dict[str, str]
    entries: Mapping[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The parser, its model and their versions, for the record of a score."""
        return " ".join(f"{key} {value}" for key, value in self.parser.items())

    def of(self, prompt: str) -> Parse:
        """A prompt's parse. Raises ValueError if the cache lacks it, or its positions do not lie in the prompt."""
        entry = self.entries.get(digest(prompt))
        if entry is None:
            raise ValueError(f"no parse of {prompt!r}; add it with `unigrpo parse-prompts`")
        spans = [*entry["chunks"], *(token[:2] for token in entry["tokens"])]
        if not all(0 <= start < stop <= len(prompt) for start, stop in spans):
            raise ValueError(f"the parse of {prompt!r} points outside it; make the cache again with `unigrpo parse-prompts`")
        return Parse(tuple(prompt[start:stop] for start, stop in entry["chunks"]),
                     tuple((prompt[start:stop], pos) for start, stop, pos in entry["tokens"]))

    def require(self, prompts: Iterable[str], path: Path | str) -> None:
        """Raises ValueError naming prompts that the cache lacks."""
        lacking = [prompt for prompt in prompts if digest(prompt) not in self.entries]
        if lacking:
            shown = "".join(f"\n- {prompt}" for prompt in lacking[:10])
            more = f"\n- and {len(lacking) - 10} more" if len(lacking) > 10 else ""
            raise ValueError(f"{path} lacks {len(lacking)} prompts; `unigrpo parse-prompts` adds them:{shown}{more}")


def digest(prompt: str) -> str:
    """The key of a prompt: sha256 of its text as the scorer reads it."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def load_parses(path: Path) -> Parses:
    """Read a cache. Raises ValueError if it is missing or of another form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format"]
        parses = Parses(dict(content["parser"]), content["parses"])
        for entry in parses.entries.values():
            [[int(start), int(stop)] for start, stop in entry["chunks"]]
            [[int(start), int(stop), str(pos)] for start, stop, pos in entry["tokens"]]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: `unigrpo parse-prompts FILE... --output {path}` makes it, once, where spaCy is "
                         "installed") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a cache of parses ({FORMAT}), and is not one: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT}, got {found!r}; make it again with `unigrpo parse-prompts`")
    return parses


def save_parses(path: Path, parses: Parses) -> None:
    """Write a cache: keys sorted, one prompt a line, the old file replaced in one step."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(dict(entry), sort_keys=True, separators=(',', ':'))}"
                       for key, entry in sorted(parses.entries.items()))
    text = f'{{"format": {json.dumps(FORMAT)}, "parser": {json.dumps(parses.parser)}, "parses": {{\n{lines}\n}}}}\n'
    write_atomically(path, text.encode())


def parse_prompts(prompts: Sequence[str], nlp: Callable[[str], Any], parser: Mapping[str, str],
                  known: Parses | None = None) -> Parses:
    """Parse what `known` lacks.

    Args:
        nlp: a spaCy pipeline: text -> Doc. parser: names of the pipeline and versions, kept in the file.
        known: parses made before, which must be of the same parser.
    Returns: the old and new parses.
    Raises: ValueError if `known` was made by another parser.
    """
    entries = dict(known.entries) if known is not None else {}
    if known is not None and known.parser != dict(parser):
        raise ValueError(f"the cache was made by {known.name}, and this is "
                         f"{Parses(dict(parser), {}).name}; one cache has one parser: give another --output")
    for prompt in prompts:
        if digest(prompt) not in entries:
            doc = nlp(prompt)
            entries[digest(prompt)] = {
                "chunks": [[chunk.start_char, chunk.end_char] for chunk in doc.noun_chunks],
                "tokens": [[token.idx, token.idx + len(token.text), token.pos_] for token in doc]}
    return Parses(dict(parser), entries)


def load_spacy(model: str = MODEL) -> tuple[Callable[[str], Any], dict[str, str]]:
    """A spaCy pipeline and its name and versions. Raises ValueError saying how to install what is missing."""
    how = f"pip install spacy && python -m spacy download {model}"
    try:
        import spacy
    except ImportError as error:
        raise ValueError(f"parsing prompts needs spaCy, which is not installed here: {how}. Scoring does not need it: a cache "
                         "made on another machine will do") from error
    try:
        nlp = spacy.load(model)
    except OSError as error:
        raise ValueError(f"spaCy's model {model} is not installed here: {how}") from error
    return nlp, {"spacy": str(spacy.__version__), "model": model, "model_version": str(nlp.meta["version"])}
