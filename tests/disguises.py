"""Ways to say a GenEval record in other words: each maps an official record to texts that ask for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]
REAL_PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "scissors": "scissors", "skis": "skis",
                "computer mouse": "computer mice", "broccoli": "broccoli"}
NUMBERS = ("zero", "one", "two", "three", "four")
SIDES = {"left of": "left", "right of": "right"}
OTHER_SIDE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SYNONYMS = {"tv": "television", "couch": "sofa", "cell phone": "mobile phone", "airplane": "aeroplane", "bicycle": "bike",
            "motorcycle": "motorbike", "refrigerator": "fridge", "donut": "doughnut", "hair drier": "hair dryer",
            "handbag": "purse", "traffic light": "traffic signal", "teddy bear": "teddy", "tv remote": "remote control",
            "tennis racket": "tennis racquet", "potted plant": "houseplant", "baseball glove": "baseball mitt"}
LOOKALIKES = str.maketrans("aeopcyxi", "аеорсухі")


def a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def many(name: str) -> str:
    return REAL_PLURALS.get(name, name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s"))


def things(record: Fields) -> list[tuple[int, str, str]]:
    """(count, colour or "", class) in the prompt's order."""
    found = [(c["count"], c.get("color", ""), c["class"]) for c in record["include"]]
    return found[::-1] if record["tag"] == "position" else found


def one(record: Fields, name: Callable[[str], str] = str, color: Callable[[str, str], str] = "{0} {1}".format) -> list[str]:
    """The noun phrases, with other names or other places of the colour."""
    return [f"{NUMBERS[n]} {many(name(c))}" if n > 1 else a(color(k, name(c)) if k else name(c)) for n, k, c in things(record)]


def relation(record: Fields) -> str:
    return next((c["position"][0] for c in record["include"] if "position" in c), "")


def said(record: Fields, parts: list[str], joint: str = " and ") -> str:
    """A photo of the noun phrases."""
    return "a photo of " + (f" {relation(record)} ".join(parts) if relation(record) else joint.join(parts))


def text(change: Callable[[str], str]) -> Callable[[Fields], list[str]]:
    return lambda record: [change(record["prompt"])]


def listed(*joints: str) -> Callable[[Fields], list[str]]:
    return lambda record: [] if len(record["include"]) == 1 or relation(record) else [
        said(record, one(record), joint) for joint in joints]


def swapped(record: Fields) -> list[str]:
    return [] if len(record["include"]) == 1 or relation(record) else [said(record, one(record)[::-1])]


def related(*patterns: str) -> Callable[[Fields], list[str]]:
    """Patterns of {a} (subject), {b} (target), {rel} and {side}; a pattern with a side is for left and right only."""
    def tell(record: Fields) -> list[str]:
        rel = relation(record)
        if not rel:
            return []
        first, second = one(record)
        side = SIDES.get(rel, "")
        return [p.format(a=first, b=second, rel=rel, side=side, other=OTHER_SIDE[rel], up={"above": "on top of",
                                                                                           "below": "underneath"}
                         .get(rel, rel)) for p in patterns if side or "{side" not in p]
    return tell


def colored(*patterns: str) -> Callable[[Fields], list[str]]:
    """Patterns of {0} (colour) and {1} (class)."""
    return lambda record: [said(record, one(record, color=p.format)) for p in patterns] if things(record)[0][1] else []


def counted(*patterns: str) -> Callable[[Fields], list[str]]:
    """Patterns of {n}, {word} and {things} for counting."""
    return lambda record: [p.format(n=n, word=NUMBERS[n], things=many(c)) for p in patterns for n, _, c in things(record)] if (
        record["tag"] == "counting") else []


def pairs(record: Fields) -> list[str]:
    (count, _, name), *rest = things(record)
    return [f"a pair of {many(name)}", f"a couple of {many(name)}"] if count == 2 and not rest and name not in (
        "scissors", "skis") else []


DISGUISES: dict[str, Callable[[Fields], list[str]]] = {
    "upper case": text(str.upper),
    "title case": text(str.title),
    "no articles": text(lambda t: " ".join(w for w in t.split() if w not in ("a", "an"))),
    "other articles": text(lambda t: t.replace(" an ", " the ").replace(" a ", " the ").replace("a photo", "one photo")),
    "number one": lambda r: [said(r, [p.replace("an ", "one ", 1) if p.startswith("an ") else p.replace("a ", "1 ", 1)
                                      if p.startswith("a ") else p for p in one(r)])],
    "plural for one": lambda r: [said(r, [f"{k} {many(c)}".strip() for _, k,
                                          c in things(r)])] if r["tag"] != "counting" else [],
    "right plurals": lambda r: [said(r, one(r))] if r["tag"] == "counting" else [],
    "digits": counted("a photo of {n} {things}", "{n} {things}"),
    "number behind": counted("{things} x{n}", "a photo of {things}, {word}", "{n}x {things}"),
    "pairs": pairs,
    "repeated things": lambda r: [" and ".join([a(c)] * n) for n, _, c in things(r)] if r["tag"] == "counting" else [],
    "exactly": counted("exactly {word} {things}", "a group of {word} {things}", "a total of {n} {things}"),
    "punctuation": text(lambda t: f'  "{t}!" '),
    "sentences": lambda r: [". ".join(p.capitalize() for p in one(r)) + "."] if not relation(r) else [],
    "commas and signs": listed(", ", " & ", " + ", "; ", " / ", ", and "),
    "other connectives": listed(" with ", " together with ", " as well as ", " along with ", " plus "),
    "both": lambda r: [said(r, [f"both {one(r)[0]}", one(r)[1]])] if len(r["include"]) == 2 and not relation(r) else [],
    "swapped clauses": swapped,
    "mirrored relation": related("a photo of {b} {other} {a}", "{b} to the {other}{side:.0} {a}"),
    "wordy relation": related("{a} to the {side} of {b}", "{a} on the {side} side of {b}", "{a} is {rel} {b}", "{a}, {up} {b}",
                              "{a} that is placed {up} {b}", "{a} located directly {up} {b}"),
    "relation first": related("To the {side} of {b} is {a}.", "On the {side} side of {b}, {a}", "{up} {b} there is {a}"),
    "relation by pronoun": related("{b} with {a} to its {side}", "{b} has {a} on its {side}", "{b} and, {up} it, {a}"),
    "no opener": text(lambda t: t.removeprefix("a photo of ")),
    "other opener": lambda r: [r["prompt"].replace("a photo of", opener) for opener in (
        "an image showing", "A picture of", "photo:", "A high-quality photo of", "a realistic photograph depicting", "this is",
        "an illustration that contains", "In this image there is", "the scene features")],
    "orders": lambda r: [r["prompt"].replace("a photo of", opener) for opener in (
        "Please draw me a picture of", "generate an image of", "Show", "Can you create", "I want to see",
        "I'd like a photo of")],
    "there is": lambda r: [f"There is {t}" for t in [said(r, one(r)).removeprefix("a photo of ")]] + [
        f"there are {said(r, one(r)).removeprefix('a photo of ')}"],
    "praise": text(lambda t: f"{t}, 4k, highly detailed, best quality, trending on artstation"),
    "pretty": lambda r: [said(r, [p.replace(" ", " beautiful ", 1) for p in one(r)])],
    "closing words": lambda r: [r["prompt"] + end for end in (" in this image", " in the picture", " in the frame.")],
    "coloured": colored("{0}-coloured {1}", "{0} colored {1}", "{1} coloured {0}"),
    "colour behind": colored("{1} that is {0}", "{1} which is {0}", "{1} in {0}", "{1} ({0})", "{1} of {0} color"),
    "synonyms": lambda r: [said(r, one(r, lambda c: SYNONYMS.get(c, c)))] if any(c in SYNONYMS for _, _,
                                                                                 c in things(r)) else [],
    "joined words": lambda r: [said(r, one(r, lambda c, to=to: c.replace(" ", to))) for to in ("", "-", "_")] if any(
        " " in c for _, _, c in things(r)) else [],
    "white space": text(lambda t: "\n" + t.replace(" ", " \u00a0 ") + "\t"),
    "wide letters": text(lambda t: "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in t)),
    "accents": text(lambda t: "".join(c + "\u0301" if c in "aeou" else c for c in t)),
    "invisible characters": text(lambda t: "".join(c + "\u200b\u00ad" if c.isalpha() else c for c in t)),
    "letters of other alphabets": text(lambda t: t.translate(LOOKALIKES)),
    "mark-up": text(lambda t: t.replace("a photo of ", "a photo of&nbsp;<b>") + "</b>"),
    "weights": text(lambda t: f"({t}:1.3), <lora:style:0.7> --ar 16:9"),
}
