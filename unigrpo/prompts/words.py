"""Words in one spelling: singulars, numbers, synonyms. For comparing prompts, not for reading: "horses" becomes "hors".

What counts is that forms of one word meet and that different words of image prompts do not.
"""

from __future__ import annotations

from functools import lru_cache

NUMBERS: dict[str, int] = {word: number for number, word in enumerate(
    ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
     "nineteen twenty").split())} | {"couple": 2, "pair": 2, "duo": 2, "trio": 3, "quartet": 4, "quintet": 5, "dozen": 12,
                                     "single": 1, "lone": 1, "solitary": 1}
PAIRWISE = frozenset("scissor ski pant trouser jean short glass eyeglass sunglass binocular plier tong tweezer".split())

COLORS = frozenset("red orange yellow green blue purple pink brown black white grey gold silver beige cyan turquoise teal "
                   "maroon navy tan cream lime magenta olive".split())
MATERIALS = frozenset("wooden metallic leather rubber plastic fabric glass fluffy paper ceramic stone velvet".split())
SHAPES = frozenset("round circular square rectangular triangular spherical cubic cylindrical conical oval pyramidal pentagonal "
                   "hexagonal octagonal diamond teardrop oblong".split())
SIZES = frozenset("big small tall short long thick thin".split())
TEXTURES = frozenset("soft hard smooth rough striped shiny sharp fresh sweet".split())
ATTRIBUTES = COLORS | MATERIALS | SHAPES | SIZES | TEXTURES

SPELLINGS: dict[str, str] = {  # other spellings and close synonyms of single words, singular
    "gray": "grey", "violet": "purple", "scarlet": "red", "crimson": "red", "golden": "gold", "silvery": "silver",
    "colour": "color", "coloured": "color", "colored": "color", "colouring": "color", "coloring": "color",
    "colourful": "colorful", "aeroplane": "airplane", "plane": "airplane", "aircraft": "airplane", "motorbike": "motorcycle",
    "bike": "bicycle", "doughnut": "donut", "television": "tv", "telly": "tv", "couch": "sofa", "settee": "sofa",
    "automobile": "car", "fridge": "refrigerator", "racquet": "racket", "dryer": "drier", "cellphone": "phone",
    "smartphone": "phone", "telephone": "phone", "mobilephone": "phone", "human": "person", "purse": "handbag",
    "necktie": "tie", "rucksack": "backpack", "knapsack": "backpack", "jewellery": "jewelry", "centre": "center",
    "fibre": "fiber", "pyjama": "pajama", "tyre": "tire", "wood": "wooden", "metal": "metallic", "tiny": "small",
    "little": "small", "large": "big", "huge": "big", "burger": "hamburger"}
NOUNS: dict[str, str] = {  # nouns of several words, singular, without spaces
    "cellphone": "phone", "mobilephone": "phone", "mobile": "phone", "remotecontrol": "tvremote", "remote": "tvremote",
    "tvremotecontrol": "tvremote", "tvset": "tv", "pcmouse": "computermouse", "keyboard": "computerkeyboard",
    "pckeyboard": "computerkeyboard", "laptopcomputer": "laptop", "notebookcomputer": "laptop", "microwaveoven": "microwave",
    "teddy": "teddybear", "hydrant": "firehydrant", "trafficsignal": "trafficlight", "stoplight": "trafficlight",
    "houseplant": "pottedplant", "pottedflower": "pottedplant", "blowdrier": "hairdrier", "hairblower": "hairdrier",
    "baseballmitt": "baseballglove", "sportsball": "sportball", "hairdryer": "hairdrier", "motorcar": "car", "snowski": "ski"}

IRREGULAR: dict[str, str] = {  # plural (or a word that only looks like one) -> singular
    "men": "man", "women": "woman", "children": "child", "kids": "kid", "people": "person", "persons": "person",
    "mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth", "oxen": "ox", "cacti": "cactus", "octopi": "octopus",
    "fungi": "fungus", "dice": "die", "lice": "louse", "fishes": "fish", "sheeps": "sheep", "deers": "deer",
    "broccolis": "broccoli", "knives": "knife", "wolves": "wolf", "leaves": "leaf", "shelves": "shelf",
    "bookshelves": "bookshelf", "loaves": "loaf", "wives": "wife", "scarves": "scarf", "halves": "half", "calves": "calf",
    "thieves": "thief", "elves": "elf", "hooves": "hoof", "gloves": "glove", "shoes": "shoe", "toes": "toe", "canoes": "canoe",
    "hoes": "hoe", "pies": "pie", "ties": "tie", "neckties": "necktie", "movies": "movie", "cookies": "cookie",
    "brownies": "brownie", "zombies": "zombie", "smoothies": "smoothie", "selfies": "selfie", "hoodies": "hoodie",
    "genies": "genie", "skis": "ski", "skises": "ski", "skies": "sky", "menus": "menu", "emus": "emu", "gnus": "gnu",
    "news": "news", "series": "series", "species": "species", "has": "has", "was": "was", "does": "does", "this": "this",
    "its": "its", "his": "his", "as": "as", "is": "is", "axes": "axe", "yes": "yes", "us": "us", "always": "always",
    "lens": "lens", "lenses": "lens", "gas": "gas", "gases": "gas", "taxis": "taxi", "bikinis": "bikini", "kiwis": "kiwi",
    "zucchinis": "zucchini", "tuxedos": "tuxedo", "buses": "bus", "busses": "bus", "cows": "cow", "ones": "one"}


@lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """The form in which a word, its plural and a plural made by rule of thumb ("benchs", "scissorses") meet.

    Plurals in "es" cannot be told from plurals in "s" of words in "e" (buses, vases), so such an "e" goes in the singular too.
    """
    before = ""
    while word != before:
        before = word
        if word in IRREGULAR:
            word = IRREGULAR[word]
        elif len(word) > 4 and word.endswith("ies"):
            word = word[:-3] + "y"
        elif len(word) > 4 and word.endswith(("ses", "zes", "xes", "ches", "shes", "oes")):
            word = word[:-2]
        elif len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
            word = word[:-1]
        elif len(word) > 3 and word.endswith(("se", "ze", "xe", "che", "she")):
            word = word[:-1]
    return word


def number_of(word: str) -> int | None:
    """The number that a word or its singular names ("two", "2", "pairs"), None for other words and digits beyond any count."""
    if word.isdecimal():
        return int(word) if len(word) < 9 else None
    return NUMBERS.get(singular(word))


_SYNONYMS = {singular(word): singular(common) for word, common in SPELLINGS.items()}


@lru_cache(maxsize=1 << 16)
def normal(word: str) -> str:
    """One word in one spelling: digits for a number word, else a singular, the commonest of its synonyms."""
    if word in NUMBERS or word.isdecimal():
        number = number_of(word)
        return word if number is None else str(number)
    root = singular(word)
    return _SYNONYMS.get(root, root)


def noun(words: tuple[str, ...]) -> str:
    """A noun of one or several normal words: without spaces ("hot dog" is "hotdog"), the commonest of its synonyms."""
    joined = "".join(words)
    return NOUNS.get(joined, joined)
