"""The texts of the made-up world: captions, headlines, questions, fact passages and change notes.

Two registers keep text-to-text search from being plain word matching: what a pool holds is written in the
plain register ("large red striped"), what a person asks in the other one ("big crimson ... with stripes").
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_mmembed.data.mini.world import Entity, Look, seeded

#: Singular and plural of each kind, then those of its synonym.
KIND_WORDS: dict[str, tuple[str, str, str, str]] = {
    "bus": ("bus", "buses", "coach", "coaches"),
    "ship": ("ship", "ships", "vessel", "vessels"),
    "rocket": ("rocket", "rockets", "spacecraft", "spacecraft"),
    "bridge": ("bridge", "bridges", "viaduct", "viaducts"),
    "plane": ("plane", "planes", "aircraft", "aircraft"),
    "balloon": ("balloon", "balloons", "aerostat", "aerostats"),
    "dress": ("dress", "dresses", "gown", "gowns"),
    "shirt": ("shirt", "shirts", "top", "tops"),
    "hat": ("hat", "hats", "bonnet", "bonnets"),
    "boot": ("boot", "boots", "shoe", "shoes"),
    "bag": ("bag", "bags", "purse", "purses"),
    "tie": ("tie", "ties", "cravat", "cravats"),
    "tower": ("tower", "towers", "spire", "spires"),
    "castle": ("castle", "castles", "fortress", "fortresses"),
    "mill": ("mill", "mills", "windmill", "windmills"),
    "fish": ("fish", "fish", "swimmer", "swimmers"),
    "bird": ("bird", "birds", "fowl", "fowls"),
    "tree": ("tree", "trees", "conifer", "conifers"),
    "star": ("star", "stars", "starlet", "starlets"),
    "heart": ("heart", "hearts", "valentine", "valentines"),
    "cup": ("cup", "cups", "mug", "mugs"),
    "ball": ("ball", "balls", "sphere", "spheres"),
    "house": ("house", "houses", "cottage", "cottages"),
    "flower": ("flower", "flowers", "blossom", "blossoms"),
}

#: Synonyms of the other attribute values; a value's plain word is the value itself unless listed below.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine", "apricot"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "jade"),
    "blue": ("azure", "cobalt"),
    "purple": ("violet", "lilac"),
    "pink": ("rosy", "salmon"),
    "brown": ("chestnut", "chocolate"),
    "plain": ("without markings", "of one tone"),
    "striped": ("with stripes", "with bands"),
    "dotted": ("with dots", "with spots"),
    "checked": ("with squares", "like a chessboard"),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "grass": ("in a meadow", "on a lawn"),
    "sand": ("on a beach", "in a desert"),
    "snow": ("in deep winter", "on frosty ground"),
    "sky": ("up among clouds", "high in daylight"),
    "night": ("after dark", "by moonlight"),
}
PLACE_WORDS: dict[str, str] = {
    "grass": "on the grass",
    "sand": "on the sand",
    "snow": "in the snow",
    "sky": "in the sky",
    "night": "at night",
}
_NUMBERS = {1: "one", 2: "two", 3: "three"}
_GROUPS = {1: "single", 2: "pair of", 3: "trio of"}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _noun(look: Look) -> str:
    return KIND_WORDS[look.kind][0 if look.count == 1 else 1]


def plain_phrase(look: Look, *, definite: bool = False) -> str:
    """The plain register: ``two large red striped towers in the snow``."""
    number = "the" if definite and look.count == 1 else _NUMBERS[look.count]
    head = f"the {number}" if definite and look.count > 1 else number
    return f"{head} {look.size} {look.colour} {look.pattern} {_noun(look)} {PLACE_WORDS[look.place]}"


def other_phrase(look: Look, rng: random.Random, *, definite: bool = False) -> str:
    """The asking register: ``a pair of big crimson spires with stripes in deep winter``."""
    size, colour = rng.choice(SYNONYMS[look.size]), rng.choice(SYNONYMS[look.colour])
    pattern, place = rng.choice(SYNONYMS[look.pattern]), rng.choice(SYNONYMS[look.place])
    noun = KIND_WORDS[look.kind][rng.choice((0, 2)) + (look.count > 1)]
    words = f"{_GROUPS[look.count]} {size} {colour} {noun} {pattern} {place}"
    return f"{'the' if definite else 'a'} {words}"


def _partial(look: Look, rng: random.Random) -> str:
    """The plain register with one or two attributes left for the picture to tell."""
    left_out = rng.sample(("size", "colour", "pattern", "place"), rng.choice((1, 2)))
    shown = [str(getattr(look, name)) for name in ("size", "colour", "pattern") if name not in left_out]
    place = [] if "place" in left_out else [PLACE_WORDS[look.place]]
    return " ".join([_NUMBERS[look.count], *shown, _noun(look), *place])


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


_CAPTIONS: dict[str, tuple[str, ...]] = {
    "news": (
        "Reporters came to look at {}",
        "{} drew a crowd today",
        "Our photographer caught {}",
        "Seen this week: {}",
    ),
    "fashion": ("{}, new in the shop", "From our spring line: {}", "{}, soft and easy to wear", "On offer: {}"),
    "common": ("There is {}", "A photo of {}", "{} in the middle of the view", "Somebody left {}"),
}
_HEADLINES = ("Breaking: {}", "{} surprises the town", "Morning report: {}", "{} makes the front page")
_CARD_CAPTIONS = ("{name}: {what}", "{name} as travellers know it, {what}", "View of {name}, {what}")


def caption(domain: str, look: Look, rng: random.Random, *, plain: bool) -> str:
    """A caption in the domain's style that tells all six attributes."""
    phrase = plain_phrase(look) if plain else other_phrase(look, rng)
    return _sentence(rng.choice(_CAPTIONS[domain]).format(phrase))


def captions(domain: str, look: Look, rng: random.Random, number: int) -> list[str]:
    """``number`` different plain captions of one look."""
    chosen = rng.sample(_CAPTIONS[domain], number)
    return [_sentence(template.format(plain_phrase(look))) for template in chosen]


def headline(look: Look, rng: random.Random) -> str:
    """The headline of a news card; the picture beside it tells the rest."""
    return _sentence(rng.choice(_HEADLINES).format(_partial(look, rng)))


def card_caption(entity: Entity, rng: random.Random) -> str:
    """The caption of an encyclopaedia card; the picture beside it tells the rest."""
    return _sentence(rng.choice(_CARD_CAPTIONS).format(name=entity.name, what=_partial(entity.look, rng)))


_ALIVE = ("fish", "bird", "tree")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_TENS = ("ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_GUILDS = ("Orm", "Ludo", "Hesk", "Ister", "Quell", "Wend", "Yaro", "Aldis")
_LANDS = ("Ostra", "Umber", "Jorvia", "Eskol", "Wesmar", "Hallin", "Irune", "Yeth")
_STUFFS = ("granite", "oak", "clay", "copper", "marble", "brick", "slate", "glass")
_FOODS = ("honey", "moss", "berries", "seeds", "shells", "dew", "reeds", "nuts")
_FAIRS = ("lantern", "harvest", "river", "drum", "apple", "mask", "candle", "kite")


def _fact(entity: Entity, topic: str) -> str:
    """The one sentence on ``topic``; its value depends on the name alone."""
    rng = seeded(0, "fact", entity.name, topic)
    alive = entity.look.kind in _ALIVE
    sentences = {
        "age": f"It dates back to the {rng.choice(_ORDINALS)} age",
        "height": f"It measures {rng.choice(_TENS)} feet from bottom to top",
        "founder": f"It was {'raised' if alive else 'built'} by the guild of {rng.choice(_GUILDS)}",
        "land": f"It belongs to the land named {rng.choice(_LANDS)}",
        "material": f"It lives on {rng.choice(_FOODS)}" if alive else f"It is made of {rng.choice(_STUFFS)}",
        "festival": f"People honour it at the {rng.choice(_FAIRS)} fair",
    }
    return sentences[topic] + "."


def fact_passage(entity: Entity, topic: str) -> str:
    """A passage with one fact.

    For instance ``Varnelo is the large red striped tower in the snow. It was built by the guild of Orm.``
    """
    verb = "is" if entity.look.count == 1 else "means"
    return f"{entity.name} {verb} {plain_phrase(entity.look, definite=True)}. {_fact(entity, topic)}"


_RENOWN = ("Many guides tell of it", "It is known far and wide", "Every child has heard that word")


def name_passage(entity: Entity, rng: random.Random) -> str:
    """A passage that says what the thing is called and nothing more about it."""
    return f"The name {entity.name} stands for {plain_phrase(entity.look, definite=True)}. {rng.choice(_RENOWN)}."


_QUESTIONS: dict[str, tuple[str, ...]] = {
    "age": ("How old would you say {} may be?", "Since when has there been {}?"),
    "height": ("How tall can we call {}?", "What size does a ruler give for {}?"),
    "founder": ("Who put up or brought forth {}?", "Whom do we thank for {}?"),
    "land": ("Which country owns {}?", "Under whose crown or realm comes {}?"),
    "material": ("What substance or diet keeps {} going?", "Which stuff does {} need or eat?"),
    "festival": ("Which feast celebrates {}?", "When do villagers dance for {}?"),
}
_SHOWN = ("this", "what you see here", "our pictured thing")
_NAME_QUESTIONS = ("What do folk call {}?", "How would you title {}?", "Can you identify {}?")
_VIEW_QUESTIONS = ("Where might I see {}?", "Can you show me {}?", "How does {} appear to visitors?")


def topic_question(topic: str, look: Look, rng: random.Random, *, pictured: bool) -> str:
    """A question on ``topic`` about what a picture shows, or about what the question itself describes."""
    about = rng.choice(_SHOWN) if pictured else other_phrase(look, rng, definite=True)
    return rng.choice(_QUESTIONS[topic]).format(about)


def name_question(rng: random.Random) -> str:
    """A question for the name of what a picture shows."""
    return rng.choice(_NAME_QUESTIONS).format(rng.choice(_SHOWN))


def view_question(look: Look, rng: random.Random) -> str:
    """A question, by description, that a picture answers."""
    return rng.choice(_VIEW_QUESTIONS).format(other_phrase(look, rng, definite=True))


def change_note(before: Look, after: Look, rng: random.Random) -> str:
    """``the same but in azure and with dots``: the changed attributes and nothing else."""
    kind = KIND_WORDS[after.kind][rng.choice((0, 2))]
    wording = {
        "kind": f"as {_article(kind)} {kind}",
        "colour": f"in {rng.choice((after.colour, *SYNONYMS[after.colour]))}",
        "pattern": rng.choice((f"in {after.pattern} style", *SYNONYMS[after.pattern])),
        "size": rng.choice((after.size, *SYNONYMS[after.size])),
        "count": f"now {_NUMBERS[after.count]} of them" if after.count > 1 else "now only one",
        "place": rng.choice((PLACE_WORDS[after.place], *SYNONYMS[after.place])),
    }
    changes: Sequence[str] = [wording[name] for name in before.changed(after)]
    opening = rng.choice(("The same but", "Like this, but", "Keep it, only"))
    return _sentence(f"{opening} {' and '.join(changes)}")
