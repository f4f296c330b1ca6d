"""Text-to-text data of the drawn world: passages on two things that were seen together, and questions on them.

A passage is in the plain register and a question in the asking one, as in :mod:`lightning_mmembed.data.mini.words`. A
question describes one of the two things in full and asks for an attribute of the other; each thing is in one passage,
so that one passage answers it, while its neighbours, which differ in one attribute, lie in the same corpus.
"""

from __future__ import annotations

import random
from typing import Any

from lightning_mmembed.data.mini.words import KIND_WORDS, other_phrase, plain_phrase
from lightning_mmembed.data.mini.world import Look, LookSource, make_name, seeded

#: Raised whenever the same seed starts to give other bytes.
TEXT_VERSION = 1
#: Passages that the questions of a split are on; each has one question of every kind.
PASSAGES = {"train": 500, "dev": 60, "test": 120}

_OPENINGS = (
    "On the way to {place} we met {first}, and beside it {second}.",
    "The diary of {place} tells of {first} that stood next to {second}.",
    "In {place} somebody left {first} together with {second}.",
    "{place} is known for {first}, seen every day near {second}.",
)
_CLOSINGS = (
    "Nobody could say why.",
    "The children drew it at once.",
    "It was gone by the next morning.",
    "A letter to the paper asked for more.",
)
_QUESTIONS = {
    "count": "How many {noun} kept company with {shown}?",
    "colour": "What hue had the {noun} beside {shown}?",
    "place": "Which ground or weather belonged to the {noun} near {shown}?",
}


def questions_and_passages(
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[tuple[str, str]]]]:
    """Lay out the set.

    Args:
        seed: Of the whole world; validation and test ask about looks that it holds out.

    Returns:
        The lines of ``corpus.jsonl``, those of ``queries.jsonl``, and by split (query id, passage id).
    """
    names: set[str] = set()
    passages: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    judged: dict[str, list[tuple[str, str]]] = {}
    for evaluation in (False, True):
        firsts, seconds = (LookSource(seed, domain, evaluation=evaluation) for domain in ("common", "news"))
        for split in ("dev", "test") if evaluation else ("train",):
            rng, judged[split] = seeded(seed, "texts", split), []
            pairs = list(zip(firsts.take(PASSAGES[split]), seconds.take(PASSAGES[split]), strict=True))
            for first, second in pairs:
                passage = {"_id": f"passage-{len(passages)}", "title": "", "text": _passage(first, second, names, rng)}
                passages.append(passage)
                for kind in _QUESTIONS:
                    question = {"_id": f"question-{len(questions)}", "text": _question(kind, first, second, rng)}
                    questions.append(question)
                    judged[split].append((question["_id"], passage["_id"]))
    return passages, questions, judged


def _passage(first: Look, second: Look, names: set[str], rng: random.Random) -> str:
    place = make_name(rng, names)
    names.add(place)
    told = rng.choice(_OPENINGS).format(place=place, first=plain_phrase(first), second=plain_phrase(second))
    return f"{told} {rng.choice(_CLOSINGS)}"


def _question(kind: str, first: Look, second: Look, rng: random.Random) -> str:
    asked, shown = (first, second) if rng.random() < 0.5 else (second, first)
    noun = KIND_WORDS[asked.kind][2 + (asked.count > 1 or kind == "count")]
    return _QUESTIONS[kind].format(noun=noun, shown=other_phrase(shown, rng))
