"""The made-up world: looks (attribute combinations), which of them are held out, and named entities."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass, fields, replace

#: Domain of each dataset, in M-BEIR's grouping.
DOMAIN_OF: dict[str, str] = {
    "visualnews": "news",
    "fashion200k": "fashion",
    "webqa": "wiki",
    "edis": "news",
    "nights": "common",
    "oven": "wiki",
    "infoseek": "wiki",
    "fashioniq": "fashion",
    "cirr": "common",
    "mscoco": "common",
}

#: M-BEIR's dataset ids are the positions in this order.
DATASET_IDS: dict[str, int] = {name: number for number, name in enumerate(DOMAIN_OF)}

KINDS: dict[str, tuple[str, ...]] = {
    "news": ("bus", "ship", "rocket", "bridge", "plane", "balloon"),
    "fashion": ("dress", "shirt", "hat", "boot", "bag", "tie"),
    "wiki": ("tower", "castle", "mill", "fish", "bird", "tree"),
    "common": ("star", "heart", "cup", "ball", "house", "flower"),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
COUNTS = (1, 2, 3)
PLACES = ("grass", "sand", "snow", "sky", "night")
TOPICS = ("age", "height", "founder", "land", "material", "festival")

#: Share of the combinations, in percent, that training never sees.
HELD_OUT_PERCENT = 30


@dataclass(frozen=True, order=True)
class Look:
    """What a picture shows: one value of each of the six attributes."""

    kind: str
    colour: str
    pattern: str
    size: str
    count: int
    place: str

    def changed(self, other: Look) -> tuple[str, ...]:
        """Names of the attributes in which ``other`` differs."""
        return tuple(name for name in LOOK_FIELDS if getattr(self, name) != getattr(other, name))


LOOK_FIELDS: tuple[str, ...] = tuple(field.name for field in fields(Look))


@dataclass(frozen=True)
class Entity:
    """A named thing of the wiki domain, with the topics on which facts are known."""

    name: str
    look: Look
    topics: tuple[str, ...]


def seeded(seed: int, *names: str) -> random.Random:
    """A generator of its own for every purpose, so that one more draw in one place moves nothing elsewhere."""
    digest = hashlib.sha256("|".join((str(seed), *names)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def values_of(domain: str, attribute: str) -> tuple[str | int, ...]:
    """Every value that ``attribute`` takes in ``domain``."""
    table: dict[str, tuple[str | int, ...]] = {
        "kind": KINDS[domain],
        "colour": COLOURS,
        "pattern": PATTERNS,
        "size": SIZES,
        "count": COUNTS,
        "place": PLACES,
    }
    return table[attribute]


def held_out(seed: int, domain: str, look: Look) -> bool:
    """Whether ``look`` is kept for validation and test."""
    text = "|".join(("held-out", str(seed), domain, *map(str, astuple(look))))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def all_looks(domain: str) -> Iterator[Look]:
    """Every combination of ``domain``, in a fixed order."""
    for kind in KINDS[domain]:
        for colour, pattern, size, count, place in itertools.product(COLOURS, PATTERNS, SIZES, COUNTS, PLACES):
            yield Look(kind, colour, pattern, size, count, place)


def neighbours(domain: str, look: Look) -> list[Look]:
    """The combinations that differ from ``look`` in exactly one attribute."""
    return [
        replace(look, **{attribute: value})  # type: ignore[arg-type]
        for attribute in LOOK_FIELDS
        for value in values_of(domain, attribute)
        if value != getattr(look, attribute)
    ]


class LookSource:
    """Hands out combinations of one domain and one side of the split, none of them twice.

    Args:
        seed: Seed of the whole benchmark.
        domain: One of the keys of :data:`KINDS`.
        evaluation: Whether to hand out the held-out combinations or the others.
    """

    def __init__(self, seed: int, domain: str, *, evaluation: bool) -> None:
        self.domain = domain
        self._rng = seeded(seed, "looks", domain, str(evaluation))
        looks = [look for look in all_looks(domain) if held_out(seed, domain, look) == evaluation]
        self._rng.shuffle(looks)
        # A dict keeps the shuffled order and forgets a combination cheaply.
        self._free: dict[Look, None] = dict.fromkeys(looks)

    def take(self, number: int) -> list[Look]:
        """Return ``number`` combinations in groups of up to four that differ from the first in one attribute.

        The groups put hard distractors, one attribute away, into every pool.
        """
        taken: list[Look] = []
        while len(taken) < number:
            first = next(iter(self._free))
            close = [look for look in neighbours(self.domain, first) if look in self._free]
            group = [first, *self._rng.sample(close, min(3, len(close)))][: number - len(taken)]
            for look in group:
                del self._free[look]
            taken += group
        return taken


_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "tr", "st")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("", "", "l", "n", "r")


def make_name(rng: random.Random, used: Collection[str]) -> str:
    """A pronounceable three-syllable name that is not in ``used``."""
    while True:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(2)]
        name = ("".join(syllables) + rng.choice(_ONSETS[:14]) + rng.choice(_VOWELS)).capitalize()
        if name not in used:
            return name
