"""The text-to-text set of the drawn world: each question has one right passage, and what is held out stays so."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path

import pytest

from lightning_mmembed.data import Shards
from lightning_mmembed.data.mini import generate_mini_text, shards_of
from lightning_mmembed.data.mini.texts import PASSAGES
from lightning_mmembed.data.mini.words import KIND_WORDS, PLACE_WORDS, SYNONYMS
from lightning_mmembed.errors import UserInputError

NUMBERS = {"one": "single", "two": "pair of", "three": "trio of"}
NOUNS = {word: kind for kind, words in KIND_WORDS.items() for word in words}
PLAIN = re.compile(r"(one|two|three) (small|large) (\w+) (\w+) (\w+) (" + "|".join(PLACE_WORDS.values()) + ")")


def looks(text: str) -> list[tuple[str, ...]]:
    """Number, size, colour, pattern, kind and place of each thing that a passage tells of."""
    places = {words: place for place, words in PLACE_WORDS.items()}
    return [(*m[:4], NOUNS[m[4]], places[m[5]]) for m in PLAIN.findall(text)]


def fits(question: str, shown: tuple[str, ...], asked: tuple[str, ...]) -> bool:
    """Whether a question describes the one thing in other words and asks about the other."""
    number, size, colour, pattern, kind, place = shown
    described = all(any(word in question for word in SYNONYMS[value]) for value in (size, colour, pattern, place))
    nouns = [word for word in re.findall(r"\w+", question) if word in NOUNS]
    return (
        described
        and NUMBERS[number] in question
        and [NOUNS[noun] for noun in nouns] in ([asked[4], kind], [asked[4], asked[4], kind])
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_mini_text(tmp_path_factory.mktemp("text") / "mini_text")


def lines(path: Path) -> dict[str, str]:
    return {record["_id"]: record["text"] for record in map(json.loads, path.read_text().splitlines())}


def judged(source: Path, split: str) -> list[tuple[str, str]]:
    rows = (source / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]
    return [(row.split("\t")[0], row.split("\t")[1]) for row in rows]


def test_the_passage_that_is_labelled_answers_the_question_and_no_other_does(source: Path) -> None:
    passages, questions = lines(source / "corpus.jsonl"), lines(source / "queries.jsonl")
    told = {name: looks(text) for name, text in passages.items()}
    assert {len(found) for found in told.values()} == {2}
    for split in ("dev", "test"):
        for question, passage in judged(source, split):
            right = [n for n, pair in told.items() if any(fits(questions[question], *p) for p in permutations(pair))]
            assert right == [passage], questions[question]


def test_every_passage_has_three_questions_and_no_two_questions_are_the_same(source: Path) -> None:
    questions = lines(source / "queries.jsonl")
    assert len(set(questions.values())) == len(questions) == 3 * sum(PASSAGES.values())
    for split, number in PASSAGES.items():
        asked: dict[str, int] = defaultdict(int)
        for _, passage in judged(source, split):
            asked[passage] += 1
        assert list(asked.values()) == [3] * number


def test_nothing_that_validation_and_test_show_is_in_a_training_passage(source: Path) -> None:
    passages = lines(source / "corpus.jsonl")
    by_split = {s: {look for _, p in judged(source, s) for look in looks(passages[p])} for s in PASSAGES}
    assert all(len(found) == 2 * PASSAGES[split] for split, found in by_split.items())
    assert not by_split["train"] & (by_split["dev"] | by_split["test"])
    assert not by_split["dev"] & by_split["test"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(source: Path, tmp_path: Path) -> None:
    def digest(root: Path) -> dict[str, str]:
        files = [path for path in root.rglob("*") if path.is_file() and path.name != "generated.json"]
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digest(generate_mini_text(tmp_path / "again")) == digest(source)
    assert digest(generate_mini_text(tmp_path / "other", seed=1)) != digest(source)


def test_a_folder_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "generated.json").write_text('{"generator": "lightning_mmembed.data.mini", "version": 1}')
    with pytest.raises(UserInputError, match="holds something that the built-in benchmark did not write"):
        generate_mini_text(tmp_path / "mini")


def test_its_shards_are_made_once(source: Path, tmp_path: Path) -> None:
    first = shards_of(source, tmp_path / "shards")
    written = (first / "manifest.json").stat().st_mtime_ns
    assert (shards_of(source, first) / "manifest.json").stat().st_mtime_ns == written
    shards = Shards(first)
    assert [len(shards.query_rows(split)) for split in ("train", "val", "test")] == [1500, 180, 360]
    assert len(shards.pool("test")) == sum(PASSAGES.values())
