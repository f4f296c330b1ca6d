"""The 16 tasks, one function per domain and side.

Within a domain a combination stands at most once per modality in all pools of a side, save for duplicates that
are all labelled. That makes the labelled positives the only right answers of the wanted modality, while the same
content in the other modalities stays in the pool as a temptation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_mmembed.data.mini import words
from lightning_mmembed.data.mini.records import Collector, Entry, Side, closest
from lightning_mmembed.data.mini.world import TOPICS, Entity, Look, LookSource, make_name, seeded
from lightning_mmembed.items import MBEIR_TASKS, Task

#: Training queries: wording alone is cheap, composed queries are hard.
_TRAIN_QUERIES = {task: 400 for task in MBEIR_TASKS} | {
    "visualnews_task0": 500,
    "mscoco_task0": 500,
    "fashion200k_task0": 500,
    "webqa_task1": 500,
    "edis_task2": 500,
    "webqa_task2": 500,
    "fashioniq_task7": 600,
    "cirr_task7": 600,
}
QUERY_COUNTS: dict[str, dict[str, int]] = {
    "train": _TRAIN_QUERIES,
    "val": dict.fromkeys(MBEIR_TASKS, 40),
    "test": dict.fromkeys(MBEIR_TASKS, 60),
}
TRAIN = Side("train", ("train",), 430)
EVAL = Side("eval", ("val", "test"), 220)
#: MSCOCO has separate pools for validation and test, as published.
COCO_VAL = Side("val", ("val",), 120)
COCO_TEST = Side("test", ("test",), 220)

_TOPICS_PER_ENTITY = 3


def collect(seed: int) -> Collector:
    """Lay out the whole benchmark; nothing is drawn or written yet."""
    collector = Collector(seed, QUERY_COUNTS)
    names: set[str] = set()
    for side in (TRAIN, EVAL):
        sources = {d: LookSource(seed, d, evaluation=side is EVAL) for d in ("news", "fashion", "wiki", "common")}
        _news(collector, side, sources["news"])
        _fashion(collector, side, sources["fashion"])
        _wiki(collector, side, sources["wiki"], names)
        _common(collector, side, sources["common"])
    return collector


def _news(collector: Collector, side: Side, source: LookSource) -> None:
    """Photo, caption and card of every look: three pools that mirror each other."""
    rng = seeded(collector.seed, "news", side.name)
    looks = source.take(side.pool)
    photos = {look: collector.pictured(side, "visualnews_task0", look) for look in looks}
    lines: dict[Look, Entry] = {}
    cards: dict[Look, Entry] = {}
    for look in looks:
        text = words.caption("news", look, rng, plain=True)
        lines[look] = collector.candidate(side, "visualnews_task3", look, text=text)
        cards[look] = collector.pictured(side, "edis_task2", look, text=words.headline(look, rng))
    for split, look in collector.targets(side, "visualnews_task0", looks):
        text = words.caption("news", look, rng, plain=False)
        collector.query(split, "visualnews_task0", [photos[look]], text=text)
    for split, look in collector.targets(side, "visualnews_task3", looks):
        collector.query(split, "visualnews_task3", [lines[look]], shown=look)
    for split, look in collector.targets(side, "edis_task2", looks):
        text = words.caption("news", look, rng, plain=False)
        near = closest(list(cards.values()), [cards[look]], 2)
        collector.query(split, "edis_task2", [cards[look]], text=text, negatives=near)


def _composed(collector: Collector, side: Side, task: str, looks: Sequence[Look], rng: random.Random) -> list[Look]:
    """Pool and queries of a picture-plus-change task; returns the wanted looks, last split first."""
    entries = {look: collector.pictured(side, task, look) for look in looks}
    starts = {look: [other for other in looks if 1 <= len(other.changed(look)) <= 2] for look in looks}
    wanted = []
    for split, look in collector.targets(side, task, [look for look in looks if starts[look]]):
        before = rng.choice(starts[look])
        note = words.change_note(before, look, rng)
        collector.query(split, task, [entries[look]], text=note, shown=before, negatives=[entries[before].did])
        wanted.append(look)
    return wanted


def _fashion(collector: Collector, side: Side, source: LookSource) -> None:
    """Garments with one to three photos, garments to change, and shop texts of both."""
    rng = seeded(collector.seed, "fashion", side.name)
    stock = source.take(side.pool * 4 // 7)
    photos = {
        look: [collector.pictured(side, "fashion200k_task0", look) for _ in range(rng.choice((1, 1, 2, 3)))]
        for look in stock
    }
    wanted = []
    for split, look in collector.targets(side, "fashion200k_task0", stock):
        text = words.caption("fashion", look, rng, plain=False)
        collector.query(split, "fashion200k_task0", photos[look], text=text)
        wanted.append(look)
    range_ = source.take(side.pool)
    changed = _composed(collector, side, "fashioniq_task7", range_, rng)
    first = QUERY_COUNTS[side.splits[-1]]
    twins = wanted[: first["fashion200k_task0"]] + changed[: first["fashioniq_task7"]]
    described = list(dict.fromkeys([*twins, *wanted, *changed, *stock, *range_]))
    if side is TRAIN:
        rng.shuffle(described)
    texts = {
        look: collector.candidate(side, "fashion200k_task3", look, text=words.caption("fashion", look, rng, plain=True))
        for look in described[: side.pool]
    }
    for split, look in collector.targets(side, "fashion200k_task3", list(texts)):
        collector.query(split, "fashion200k_task3", [texts[look]], shown=look)


def _common(collector: Collector, side: Side, source: LookSource) -> None:
    """Similar pictures, changed pictures and captioned pictures, and captions for all three."""
    rng = seeded(collector.seed, "common", side.name)
    scenes = source.take(side.pool)
    entries = {look: collector.pictured(side, "nights_task4", look) for look in scenes}
    wanted = []
    for split, look in collector.targets(side, "nights_task4", scenes):
        near = closest(list(entries.values()), [entries[look]], 1)
        collector.query(split, "nights_task4", [entries[look]], shown=look, negatives=near)
        wanted.append(look)
    changed = _composed(collector, side, "cirr_task7", source.take(side.pool), rng)
    first = QUERY_COUNTS[side.splits[-1]]
    twins = wanted[: first["nights_task4"]] + changed[: first["cirr_task7"]]
    if side is TRAIN:
        _coco(collector, TRAIN, source, twins, rng)
    else:
        _coco(collector, COCO_VAL, source, [], rng)
        _coco(collector, COCO_TEST, source, twins, rng)


def _coco(collector: Collector, side: Side, source: LookSource, twins: list[Look], rng: random.Random) -> None:
    """Captioned pictures; the captions, three or one a picture, also cover ``twins``."""
    looks = source.take(side.pool)
    photos = {look: collector.pictured(side, "mscoco_task0", look) for look in looks}
    wanted = []
    for split, look in collector.targets(side, "mscoco_task0", looks):
        text = words.caption("common", look, rng, plain=False)
        collector.query(split, "mscoco_task0", [photos[look]], text=text)
        wanted.append(look)
    described = list(dict.fromkeys([*twins, *wanted]))
    rng.shuffle(described)
    asked = 200 if side is TRAIN else QUERY_COUNTS[side.splits[0]]["mscoco_task3"]
    texts: dict[Look, list[Entry]] = {}
    for position, look in enumerate(described[: max(180, side.pool)]):
        for text in words.captions("common", look, rng, 3 if position < asked else 1):
            entry = collector.candidate(side, "mscoco_task3", look, text=text)
            texts.setdefault(look, []).append(entry)
    for split, look in collector.targets(side, "mscoco_task3", described[:asked]):
        collector.query(split, "mscoco_task3", texts[look], shown=look)


def _entities(looks: Sequence[Look], names: set[str], rng: random.Random) -> list[Entity]:
    """Give every look a new name and the topics on which facts are known."""
    entities = []
    for look in looks:
        name = make_name(rng, names)
        names.add(name)
        entities.append(Entity(name, look, tuple(rng.sample(TOPICS, _TOPICS_PER_ENTITY))))
    return entities


def _wiki(collector: Collector, side: Side, source: LookSource, names: set[str]) -> None:
    """Every entity has its passages in one text pool and its cards in one pool of cards.

    Entities that have passages are the ones asked for in the pools of cards too, so that a twin always exists.
    """
    rng = seeded(collector.seed, "wiki", side.name)
    numbers = (side.pool // 3, side.pool // 3, side.pool, side.pool // 3, side.pool // 3)
    asked, sought, named, extra_8, extra_2 = (_entities(source.take(number), names, rng) for number in numbers)
    facts = _fact_task(collector, side, "webqa_task1", asked, rng)
    _fact_task(collector, side, "infoseek_task6", sought, rng)
    _name_task(collector, side, "oven_task6", named, [], rng)
    half, last, middle = side.pool // 6, side.pool // 4, side.pool // 2
    _fact_task(collector, side, "infoseek_task8", asked[:half] + sought[:half], rng)
    _name_task(collector, side, "oven_task8", named[:middle] + asked[half:last] + sought[half:last], extra_8, rng)
    _view_task(collector, side, named[middle:] + asked[last:] + sought[last:], extra_2, facts, rng)


def _fact_task(
    collector: Collector, side: Side, task: str, entities: Sequence[Entity], rng: random.Random
) -> list[Entry]:
    """Passages, or cards for task 8, with one fact each, and questions on them; returns the pool."""
    dataset = Task.parse(task).dataset
    facts: dict[tuple[str, str], Entry] = {}
    looks = {entity.name: entity.look for entity in entities}
    for entity in entities:
        image = collector.picture(dataset, f"{side.name}_pool", entity.look) if task.endswith("8") else None
        for topic in entity.topics:
            text = words.fact_passage(entity, topic)
            facts[entity.name, topic] = collector.candidate(
                side, task, entity.look, text=text, image=image, entity=entity.name, topic=topic
            )
    pool, pictured = list(facts.values()), dataset != "webqa"
    for split, (name, topic) in collector.targets(side, task, list(facts)):
        text = words.topic_question(topic, looks[name], rng, pictured=pictured)
        positive, shown = facts[name, topic], looks[name] if pictured else None
        collector.query(split, task, [positive], text=text, shown=shown, negatives=closest(pool, [positive], 1))
    return pool


def _name_task(
    collector: Collector,
    side: Side,
    task: str,
    entities: Sequence[Entity],
    extra: Sequence[Entity],
    rng: random.Random,
) -> None:
    """Passages, or cards for task 8, that say what a thing is called; ``extra`` is never asked for."""
    entries: dict[str, Entry] = {}
    for entity in [*entities, *extra]:
        image = collector.picture("oven", f"{side.name}_pool", entity.look) if task.endswith("8") else None
        text = words.name_passage(entity, rng)
        entries[entity.name] = collector.candidate(
            side, task, entity.look, text=text, image=image, entity=entity.name, topic="name"
        )
    for split, entity in collector.targets(side, task, entities):
        text = words.name_question(rng)
        collector.query(split, task, [entries[entity.name]], text=text, shown=entity.look)


def _view_task(
    collector: Collector,
    side: Side,
    entities: Sequence[Entity],
    extra: Sequence[Entity],
    facts: Sequence[Entry],
    rng: random.Random,
) -> None:
    """Captioned pictures, and descriptions of them; negatives are cards and passages, as published."""
    cards: dict[str, Entry] = {}
    for entity in [*entities, *extra]:
        text = words.card_caption(entity, rng)
        cards[entity.name] = collector.pictured(
            side, "webqa_task2", entity.look, text=text, entity=entity.name, topic="view"
        )
    pool = list(cards.values())
    for split, entity in collector.targets(side, "webqa_task2", entities):
        positive = cards[entity.name]
        near = closest(pool, [positive], 1) + closest(facts, [positive], 1)
        text = words.view_question(entity.look, rng)
        collector.query(split, "webqa_task2", [positive], text=text, negatives=near)
