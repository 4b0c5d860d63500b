"""The canonical form of a prompt: what it asks for, freed from how it says so.

    text --plain--> words and commas --filler, relations, connectives--> clauses --noun phrases--> sorted clauses

"a photo of a red dog and two cats left of a bench" becomes "1 red dog; LEFT(2 cat, 1 bench)". No grammar stands behind it that
could fail: any text has a form, free sentences are merely normalised less. Texts with one form ask for the same thing; the
reverse holds for the disguises listed in docs/prompts.md. A rule that changes moves the shipped digests: raise VERSION then.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from unigrpo.prompts.words import ATTRIBUTES, COLORS, PAIRWISE, SIZES, TEXTURES, normal, noun, number_of, singular

VERSION = 1
REORDERED_FROM = 7  # chunks (a word with its modifiers) from which texts are also compared without any word order


def _any(words: Iterable[str]) -> str:
    """A pattern for one of the words, longest first."""
    return "(?:" + "|".join(sorted(words, key=lambda word: (-len(word), word))) + ")"


LOOKALIKES = str.maketrans("аевзікмнорстухјѕһԁԛԝ" "αεικνορτυχη" "ıłøđɡɑ", "aeb3ikmhopctyxjshdqw" "aeikvoptuxn" "ilodga")
PLAIN = tuple((re.compile(pattern), to) for pattern, to in (
    (r"<[^<>]*>", " "),                             # adapters and mark-up of prompt tools
    (r"(?<!\S)--[a-z]+(?: [\d:.]+)?", " "),         # their options
    (r":\s*\d+(?:\.\d+)?(?=\s*[)\]])", " "),        # their weights
    (r"['’`´](?:s\b)?", ""),
    (r"\b(\d+)\s*[x×]\s+(?=[^\W\d])", r"\1 "),      # 2x dogs
    (r"\b[x×]\s*(\d+)\b", r" , \1"),                # dogs x2
    (r"\s*[&+/]\s*", " and "),
    (r"(?<=\d)[.:,](?=\d)", "_"),                   # 3.5 and 11:44 stay one word
    (r"\bgr[ae]y(?:ish)?\b", "grey"), (r"\bviolet\b", "purple"), (r"\b(?:scarlet|crimson)\b", "red"),
    (r"\bgolden\b", "gold"), (r"\bsilvery\b", "silver"), (r"\bcolour", "color"),
    (rf"\(\s*({_any(COLORS)})\s*\)", r" THAT \1 "),                                    # a cat (orange)
    (r"[.,;:!?|()\[\]{}\n\r•–—]|\s-+\s", " , "),
))
WORD = re.compile(r"[^\W_]+(?:_\d+)*|,")

PRAISES = frozenset(
    "photorealistic photographic realistic realism hyperrealistic ultrarealistic hyper high highly higher best quality "
    "resolution res hd uhd hdr fhd 2k 4k 8k 16k detailed detail ultra very super extremely beautiful stunning gorgeous "
    "professional professionally stock clear sharp focus crisp masterpiece cinematic studio lighting artstation trending on "
    "raw dslr award winning awardwinning intricate vivid lifelike amazing nice good great perfect digital photography "
    "photograph photo hires highres unreal engine octane render bokeh color real lovely pretty cute".split())
MEDIUM = _any("photo photograph picture image pic snapshot shot illustration drawing painting rendering render scene view "
              "depiction sketch artwork portrait closeup photography visualization composition".split()) + "s?"
ONE = r"(?:an?|the|some|this|that|these|those|another|one)"
SHOWING = (r"(?:(?:clearly |only |just )?(?:of|with|has|having|(?:show|depict|contain|featur|display|includ|portray|captur|"
           r"illustrat)(?:e?s|ing))|(?:that|which) (?:shows|depicts|contains|has|features|displays|includes)|"
           r"(?:(?:in|on) which|where)(?: there (?:is|are)| (?:we|you) see)?)")
FILLER = tuple(re.compile(pattern) for pattern in (
    r"^(?:, )+|(?: ,)+$",
    r"^(?:please|kindly|hey|hello|hi|okay|ok|now|prompt|task|caption) ",
    r"^(?:can|could|would|will) you ",
    r"^(?:i|we|id) (?:(?:want|need|like|would like)(?: you)?(?: to(?: see| have)?)?) ",
    r"^(?:let us|lets|help me|try to|heres?|here is|here are|this is|these are) ",
    r"^(?:generate|create|draw|render|show|make|paint|produce|design|imagine|depict|illustrate|visuali[sz]e|give|display|"
    r"synthesi[sz]e|sketch|photograph|compose)(?: me| us)? ",
    r"^(?:we|you|one) (?:can )?sees? ",
    r"^(?:there|it)(?: is| are| was| were| should be| must be)? ",
    rf"^(?:{ONE} )?(?:(?:{_any(PRAISES)}|simple|plain|single|full|colored|close up|wide angle|old|vintage) )*"
    rf"{MEDIUM}(?: ,|(?: is)? {SHOWING}(?: only| just| exactly)?) ",
    rf"^(?:in|on) (?:{ONE} )?{MEDIUM} (?:, )?(?:(?:(?:there|it) (?:is|are)|(?:we|you) (?:can )?see) )?",
    rf" (?:, )?(?:in|within|inside|on) (?:the|this|an?|one)(?: same| single)? (?:{MEDIUM}|frame|background)$",
    r" (?:(?:is|are|can be|both|all) )*(?:visible|shown|present|seen|depicted|displayed)$",
))

BEFORE = (r"(?:(?:(?:that|which|who) )?(?:is|are|was|were|being|sits?|sitting|sat|stands?|standing|stood|located|placed|put|"
          r"positioned|situated|lies|lying|lay|resting|rests|rested|found|appears|appearing|shown|seen|set|directly|just|"
          r"immediately|exactly|right(?= (?:above|below|under|underneath|beneath|next|beside|behind|in front|on top)\b)) )*")
RELATIONS = tuple((name, re.compile(rf"\b{BEFORE}(?:{pattern})(?! (?:and|,)|$)\b")) for name, pattern in (
    ("FRONT", r"in (?:the )?front of|ahead of"),
    ("BEHIND", r"behind|(?:in|at|on) (?:the )?(?:back|rear) of|(?:hidden|obscured|concealed) (?:by|behind|from)"),
    ("LEFT", r"(?:(?:on|to|at|towards?|in) )?(?:the )?left(?: hand)?(?: side)? (?:of|from)|left to"),
    ("RIGHT", r"(?:(?:on|to|at|towards?|in) )?(?:the )?right(?: hand)?(?: side)? (?:of|from)|right to"),
    ("ABOVE", r"(?:on |at )?(?:the )?top of|atop(?: of)?|above|over|on (?:the )?upper side of|higher than"),
    ("BELOW", r"below|beneath|underneath|under|(?:on |at )?(?:the )?bottom of|on (?:the )?(?:under|lower )side of|lower than"),
    ("NEAR", r"next to|beside|near(?: to| by)?|nearby|(?:on|by|at|along) (?:the )?side of|close to|adjacent to|"
             r"alongside(?: of)?|(?:in|within) the vicinity of"),
))
MIRRORED = {"RIGHT": "LEFT", "BELOW": "ABOVE", "FRONT": "BEHIND"}
MARKERS = frozenset(name for name, _ in RELATIONS)
MARKER = _any(MARKERS)

COLOR = _any(COLORS)
JOINED = _any((COLORS | TEXTURES | SIZES) - {"orange"})  # adjectives that are no nouns: "black and white" goes before one noun
REWRITES = tuple((re.compile(pattern), to) for pattern, to in (
    (rf"\b(?:with|of|in|having) (?:an? )?({COLOR}) color\b", r"THAT \1"),
    (rf"\borange colored (?=(?!orange){COLOR}(?: ,| and\b| {MARKER}\b|$))", "orange THAT "),  # the fruit
    (rf"\b({COLOR}) (?:in )?color(?:ed)?\b", r"\1"),
    (rf"\bcolored (?:in )?({COLOR})\b", r"THAT \1"),
    (r"\b(?:whose|the|its) color is\b", "THAT"),
    (rf"\b(?:(?:that|which|who) )?(?:is|are|was|were|painted|looks?|in)(?: all| fully| entirely)? "
     rf"(?={COLOR}(?: ,| and\b| {MARKER}\b|$))", "THAT "),
    (rf"\b({JOINED}) (?:, and|and|,) (?=(?:{JOINED}) (?!and\b|,|{MARKER}\b))", r"\1 "),
    (r"\b(?:on|to|at) (?:its|his|her|their) (?:left|right)(?: hand)?(?: side)?\b|"
     r"\b(?:on|to|at) the (?:left|right)(?: hand)?(?: side)?(?= ,| and\b| is\b| are\b| there\b|$)",
     lambda match: "RIGHT it" if "right" in match[0] else "LEFT it"),
    (rf"\b({MARKER}) (?:it|them|him|her)\b", r"\1 it"),
    (r"\b(?:together with|along with|as well as|accompanied by|in addition to|and also|combined with|plus|with|including|"
     r"and)\b", ","),
    (r"\b(?:both|each|also)\b", ""), (r"(?:, ?)+", ", "), (r"^, |, ?$", ""), (r" {2,}", " "),
    (rf", ({MARKER}) (?!it\b)", r"\1 "),                                              # a dog, left of a cat
))
FRONTED = re.compile(rf"^({MARKER}) (.+?) (?:(?:, )?(?:there )?(?:is|are|sits?|stands?|lies?)|,) ([^,]+)$")
IT = re.compile(rf"\b({MARKER}) it\b(?: ,)?(?:(?: there)? (?:is|are)\b)?")

ARTICLES = frozenset("a an the some another this that these those".split())
STOP = ARTICLES | frozenset(
    "its his her their is are was were be been being has have it of there which who that exactly only just about total group "
    "set THAT beautiful nice lovely pretty cute realistic photorealistic real stunning gorgeous detailed".split())


class Forms(NamedTuple):
    """A text in the forms in which it is compared; None where it has none."""

    exact: str
    canonical: str | None
    reordered: str | None


def plain(text: str) -> str:
    """Lower-case words of one alphabet in one spelling of the colours, and "," for what separates them."""
    text = html.unescape(text).casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
        text = "".join(c for c in text if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) != "Cf")  # accents, formats
        text = text.translate(LOOKALIKES)
    for pattern, to in PLAIN:
        text = pattern.sub(to, text)
    return " ".join(WORD.findall(text))


def without_filler(text: str) -> str:
    """The plain text without what only says that a picture, a good one, is wanted."""
    before = None
    while before != text:
        before = text
        for pattern in FILLER:
            text = pattern.sub("", text, count=1).strip()
    parts = [part.strip() for part in text.split(",")]
    return " , ".join(part for part in parts if part and not PRAISES.issuperset(part.split())) or text


def connected(text: str) -> str:
    """Relations as markers (LEFT, ...), connectives as commas, colours after the noun behind THAT."""
    for name, pattern in RELATIONS:
        text = pattern.sub(name, text)
    for pattern, to in REWRITES:
        text = pattern.sub(to, text)
    return text.strip()


def phrase(words: Sequence[str]) -> tuple[int, str]:
    """A noun phrase as (how many, attributes in order and noun); no number counts as one, whatever the noun's number."""
    front, _, behind = " ".join(words).partition(" THAT ")
    count, rest = None, [word for word in front.split() if word not in STOP]
    while len(rest) > 1 and (value := number_of(rest[0])) is not None:
        number = 1 if singular(rest[0]) == "pair" and singular(rest[-1]) in PAIRWISE else value
        count, rest = number if count is None else count * number, rest[1:]
    words = [normal(word) for word in [*(word for word in behind.split() if word not in STOP), *rest]]
    ordered: list[str] = []
    start = 0
    for end in range(len(words)):
        if words[end] not in ATTRIBUTES or end == len(words) - 1:  # the last word is a noun: an orange, a wine glass
            ordered += [*sorted(words[start:end]), words[end]]
            start = end + 1
    attributes = 0
    while attributes < len(ordered) - 1 and ordered[attributes] in ATTRIBUTES:
        attributes += 1
    return 1 if count is None else count, " ".join([*ordered[:attributes], noun(tuple(ordered[attributes:]))]).strip()


def _segments(text: str) -> list[list[str]]:
    """The words of each clause; a colour or a number on its own belongs to the clause before."""
    segments: list[list[str]] = []
    for part in text.split(","):
        words = part.split()
        bare = [word for word in words if word != "THAT"]
        if segments and bare and all(word in COLORS and word != "orange" for word in bare):
            segments[-1] = [*segments[-1], "THAT", *bare]
        elif segments and len(bare) == 1 and number_of(bare[0]) is not None:
            segments[-1] = [*bare, *segments[-1]]
        elif words:
            segments.append(words)
    return segments


def _join(things: Mapping[str, int], relations: Iterable[str]) -> str:
    """The form of a bag of things and a list of relations."""
    return "; ".join([*sorted(f"{count} {name}" for name, count in things.items()), *sorted(relations)])


def relate(name: str, subject: str, target: str) -> str:
    """A relation told from one side: right of becomes left of, below becomes above, near has no sides."""
    if name in MIRRORED:
        name, subject, target = MIRRORED[name], target, subject
    elif name == "NEAR":
        subject, target = sorted((subject, target))
    return f"{name}({subject}, {target})"


def _resolved(text: str) -> str:
    """With "it" replaced by what it stands for: a bench with a dog to its left, a bench and above it a dog."""
    if IT.search(text) is None:
        return text
    clauses: list[str] = []
    for clause in re.split(r" ?, | (?:has|have|having) ", IT.sub(r"\1 it ;", text)):
        subject, found, rest = clause.partition(" it ;")
        words = subject.split()
        if found and clauses and (words[:-1] or rest):
            clauses[-1] = " ".join([*(words[:-1] or [rest.strip()]), words[-1], clauses[-1]])
        else:
            clauses.append(clause.replace(" it ;", " it"))
    return " , ".join(clauses)


def _specification(text: str) -> str | None:
    """The form of a connected text."""
    text = _resolved(FRONTED.sub(r"\3 \1 \2", text))
    things: Counter[str] = Counter()
    relations: list[str] = []
    for words in _segments(text):
        chain: list[tuple[str, list[str]]] = [("", [])]  # (marker before, words)
        for word in words:
            if word in MARKERS:
                chain.append((word, []))
            else:
                chain[-1][1].append(word)
        found = [phrase(part) for _, part in chain]
        if len(found) == 1:
            if found[0][1]:
                things[found[0][1]] += found[0][0]
            continue
        named = [f"{count} {name}" for count, name in found]
        relations += [relate(chain[i][0], named[i - 1], named[i]) for i in range(1, len(named))]
    return _join(things, relations) or None


def _reordered(text: str) -> str | None:
    """The chunks of a connected text, sorted: a number or an attribute stays with the word that follows it."""
    chunks, held = [], ""
    for word in (normal(word) for word in text.replace(",", " ").split() if word not in STOP):
        held = f"{held} {word}".strip()
        if not (word in ATTRIBUTES or word.isdecimal()):
            chunks.append(held)
            held = ""
    chunks += [held] if held else []
    return "; ".join(sorted(chunks)) if len(chunks) >= REORDERED_FROM else None


def forms(text: str) -> Forms:
    """All forms of a prompt's text.

    Args:
        text: as a user would write it, in any case, spelling, plural and order.
    Returns: exact: without space around it. canonical: its specification; None if no word is left. reordered: of texts with at
        least REORDERED_FROM chunks, free of word order, because sentences are turned round in more ways than rules can name.
    """
    text = text.strip()
    linked = connected(without_filler(plain(text)))
    return Forms(text, _specification(linked), _reordered(linked))


def include_form(include: Sequence[Mapping[str, Any]]) -> str | None:
    """The canonical form of GenEval's include clauses: what a prompt is judged by, whatever its words.

    Returns: the form that a plain wording of the clauses has; None if a clause says more than class, count, color, position.
    """
    if not include or any(clause.keys() - {"class", "count", "color", "position", "inferred"} for clause in include):
        return None
    named = [phrase(f"{clause['count']} {clause.get('color') or ''} {plain(clause['class'])}".split()) for clause in include]
    related = {index for i, clause in enumerate(include) if "position" in clause for index in (i, clause["position"][1])}
    things: Counter[str] = Counter()
    for index, (count, name) in enumerate(named):
        if index not in related:
            things[name] += count
    relations = [relate(connected(f"x {clause['position'][0]} y").split()[1], f"{count} {name}",
                        " ".join(map(str, named[clause["position"][1]])))
                 for clause, (count, name) in zip(include, named, strict=True) if "position" in clause]
    return _join(things, relations)
