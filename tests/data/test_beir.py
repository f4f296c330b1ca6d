"""BEIR folders as shards: ids, texts, judgements, splits, and what is left out."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from text_worlds import birds, write_beir
from worlds import read_lines, write_pets

from lightning_mmembed.cli_shard import shard
from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.beir import BEIRLayout
from lightning_mmembed.data.jobs import RecordJob, ShardJobs
from lightning_mmembed.data.sources import open_layout
from lightning_mmembed.data.verify import verify_shards
from lightning_mmembed.errors import UserInputError

#: Real text sets, where they lie beside the project.
REAL = Path(__file__).parents[3] / "shared" / "data" / "text.tar.gz"

DOCUMENTS = [
    {"_id": "a", "title": "Swans", "text": "they are white"},
    {"_id": "b", "text": "Crows are black."},
    {"_id": "c d", "title": "", "text": "Robins are red"},
    {"_id": "7", "title": "Gulls", "text": ""},
]
QUERIES = [{"_id": f"q{n}", "text": f"what is {n}?"} for n in range(4)]


def shards_of(source: Path, out: Path, **settings: Any) -> Shards:
    return Shards(shard_dataset(BEIRLayout(source, **settings), out, show_progress=False, max_bad_fraction=0.9))


def asked(shards: Shards, split: str) -> dict[str, list[str]]:
    """The source's ids of the positives of each query of a split, by the source's id of the query."""
    queries, documents = shards.source_ids(split), shards.source_ids()
    found = {}
    for query_set in shards.query_sets(split):
        for query in query_set.queries:
            found[queries[query.qid]] = sorted(documents[did] for did in query.positives)
    return found


def relevant(source: Path, split: str) -> dict[str, list[str]]:
    """The same, read out of the source's own files."""
    rows = [line.split("\t") for line in (source / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]]
    found: dict[str, list[str]] = {}
    for query, document, score in rows:
        if int(score) > 0:
            found.setdefault(query, []).append(document)
    return {query: sorted(documents) for query, documents in found.items()}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_ids_and_judgements_of_the_source_come_back_out_of_the_shards(tmp_path: Path, end: str) -> None:
    source = birds(tmp_path / "birds", end=end)
    shards = shards_of(source, tmp_path / "shards")
    names = shards.source_ids()
    texts = {names[candidate.did]: candidate.item.text for candidate in shards.pool("test").items}
    assert texts == {d["_id"]: f"{d['title']} {d['text']}" for d in read_lines(source / "corpus.jsonl")}
    questions = {query["_id"]: query["text"] for query in read_lines(source / "queries.jsonl")}
    for split, file in (("train", "train"), ("val", "dev"), ("test", "test")):
        assert asked(shards, split) == relevant(source, file)
        (queries,) = shards.query_sets(split)
        assert queries.task.name == "birds_task1"
        for query in queries.queries:
            assert query.item.text == questions[shards.source_ids(split)[query.qid]]
    assert verify_shards(tmp_path / "shards", show_progress=False).findings == []


def test_title_and_text_are_joined_with_a_space_and_are_otherwise_as_they_were(tmp_path: Path) -> None:
    source = write_beir(tmp_path / "s", DOCUMENTS, QUERIES, {"test": [("q0", "a", 1)]})
    texts = [candidate.item.text for candidate in shards_of(source, tmp_path / "shards").pool("test").items]
    assert texts == ["Swans they are white", "Crows are black.", "Robins are red", "Gulls"]


def test_a_record_in_a_shard_says_what_the_source_calls_it(tmp_path: Path) -> None:
    source = write_beir(tmp_path / "s", DOCUMENTS, QUERIES, {"test": [("q0", "a", 2), ("q0", "c d", 1)]})
    out = shards_of(source, tmp_path / "shards").directory
    contents = []
    for path in sorted(Path(out).glob("*.tar")):
        with tarfile.open(path) as tar:
            contents += [json.loads(tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert [content["source_id"] for content in contents] == ["a", "b", "c d", "7", "q0"]
    assert contents[-1]["grades"] == [2, 1]


def test_every_judgement_of_an_unknown_id_is_named_with_its_line(tmp_path: Path) -> None:
    lines = [("q0", "a", 1), ("q0", "zebra", 1), ("nobody", "a", 1), ("q1", "b", 1), ("q1", "b", 0)]
    source = write_beir(tmp_path / "s", DOCUMENTS, QUERIES, {"test": lines})
    with open(source / "qrels/test.tsv", "a") as file:
        file.write("q1 b 1\n")
    shards = shards_of(source, tmp_path / "shards")
    assert asked(shards, "test") == {"q0": ["a"], "q1": ["b"]}
    found = {bad["record"].removeprefix(f"{source}/qrels/"): bad["reason"] for bad in shards.manifest["bad_records"]}
    assert found.keys() == {"test.tsv:3", "test.tsv:4", "test.tsv:6", "test.tsv:7"}
    assert found["test.tsv:3"] == "'zebra' is not in corpus.jsonl"
    assert found["test.tsv:4"] == "'nobody' is not in queries.jsonl"
    assert "another score" in found["test.tsv:6"]
    assert "between tabs" in found["test.tsv:7"]
    with pytest.raises(UserInputError, match=r"4 of 10 records .* cannot be used .*test\.tsv:3: 'zebra'"):
        shard_dataset(BEIRLayout(source), tmp_path / "strict", show_progress=False)


def test_bad_lines_of_corpus_and_queries_are_named_and_the_rest_keeps_its_numbers(tmp_path: Path) -> None:
    documents = [*DOCUMENTS[:2], {"_id": "a", "text": "again"}, {"_id": "x"}, {"text": "no id"}, DOCUMENTS[2]]
    queries = [{"_id": "q0", "text": " "}, QUERIES[1], {"_id": "q1", "text": "again"}]
    source = write_beir(tmp_path / "s", documents, queries, {"test": [("q1", "c d", 1), ("q1", "x", 1)]})
    with open(source / "corpus.jsonl", "ab") as file:
        file.write(b'{"_id": "\xff"}\nno json\n[]\n')
    shards = shards_of(source, tmp_path / "shards")
    found = {bad["record"].removeprefix(f"{source}/"): bad["reason"] for bad in shards.manifest["bad_records"]}
    bad = {"corpus.jsonl:3", "corpus.jsonl:5", "corpus.jsonl:7", "corpus.jsonl:8", "corpus.jsonl:9"}
    assert found.keys() == bad | {"queries.jsonl:1", "queries.jsonl:3"}
    assert found["corpus.jsonl:3"] == "_id='a' stands in line 1, too"
    assert found["queries.jsonl:1"] == "query 'q0' has no text"
    numbers = {did.partition(":")[2]: name for did, name in shards.source_ids().items()}
    assert numbers == {"1": "a", "2": "b", "4": "x", "6": "c d"}, "lines of the file"
    assert shards.manifest["noted"] == {"documents without text": 1}


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    source = birds(tmp_path / "birds")
    plain_shards = shards_of(source, tmp_path / "plain")
    for path in [*source.glob("*.jsonl"), *source.glob("qrels/*.tsv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = shards_of(source, tmp_path / "marked")
    assert marked.fingerprint == plain_shards.fingerprint
    assert marked.manifest["bad_records"] == []


def test_a_file_of_judgements_may_lack_the_header(tmp_path: Path) -> None:
    source = birds(tmp_path / "birds")
    expected = shards_of(source, tmp_path / "with").fingerprint
    for path in source.glob("qrels/*.tsv"):
        path.write_text(path.read_text().partition("\n")[2])
    assert shards_of(source, tmp_path / "without").fingerprint == expected


def test_what_no_judgement_asks_for_is_left_aside_and_counted(tmp_path: Path) -> None:
    judged = {"train": [("q0", "a", 1), ("q1", "a", 0)], "test": [("q2", "b", 0)]}
    source = write_beir(tmp_path / "s", DOCUMENTS, QUERIES, judged)
    shards = shards_of(source, tmp_path / "shards")
    assert asked(shards, "train") == {"q0": ["a"]}
    assert asked(shards, "test") == {"q2": []}, "it counts, as a query that nothing can answer"
    expected = {"queries without judgements": 1, "training queries without a relevant document": 1}
    assert shards.manifest["noted"] == expected
    assert len(shards.manifest["queries_without_reachable_positive"]) == 1
    assert shards.manifest["bad_records"] == []


def test_a_document_that_is_the_query_itself_is_ignored_and_one_that_only_shares_its_id_is_not(tmp_path: Path) -> None:
    documents = [
        {"_id": "1", "title": "Zoos", "text": "Zoos  help."},
        {"_id": "2", "text": "Zoos harm."},
        {"_id": "3", "text": "Zoos cost."},
        {"_id": "4", "title": "Zoos", "text": "pay"},
    ]
    queries = [
        {"_id": "1", "text": "zoos help."},
        {"_id": "2", "text": "Another text"},
        {"_id": "3", "text": "Zoos cost."},
        {"_id": "4", "text": "Zoos pay"},
    ]
    judged = [("1", "2", 1), ("2", "1", 1), ("3", "3", 1), ("4", "1", 1)]
    shards = shards_of(write_beir(tmp_path / "s", documents, queries, {"test": judged}), tmp_path / "shards")
    (found,) = shards.query_sets("test")
    names = shards.source_ids()
    assert found.ignored is not None
    pool = shards.pool("test")
    ignored = [[names[pool.items[row].did] for row in pool.rows_of([codes])[0].tolist()] for codes in found.ignored]
    assert ignored == [["1"], [], [], ["4"]], "a labelled document stays"


def test_held_out_queries_go_by_their_text_and_the_seed_alone(tmp_path: Path) -> None:
    source = birds(tmp_path / "birds", 400, ("train",))
    shards = shards_of(source, tmp_path / "a", val_fraction=0.2, test_fraction=0.3)
    splits = {split: asked(shards, split) for split in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == 400
    assert {name: round(len(found) / 400, 1) for name, found in splits.items()} == {
        "train": 0.5,
        "val": 0.2,
        "test": 0.3,
    }
    documents, queries = read_lines(source / "corpus.jsonl"), read_lines(source / "queries.jsonl")
    rows = [line.split("\t") for line in (source / "qrels/train.tsv").read_text().splitlines()[1:]]
    judged = [(row[0], row[1], int(row[2])) for row in rows]
    twins = [{"_id": f"twin {n}", "text": f"  {queries[n]['text'].upper()}"} for n in range(20)]
    judged += [(twin["_id"], documents[0]["_id"], 1) for twin in twins]
    other = write_beir(tmp_path / "birds2", documents, [*twins, *queries[::-1][:300]], {"train": judged})
    again = shards_of(other, tmp_path / "b", val_fraction=0.2, test_fraction=0.3)
    for split, found in splits.items():
        kept = {query["_id"] for query in queries[::-1][:300]} & found.keys()
        kept |= {twin["_id"] for n, twin in enumerate(twins) if queries[n]["_id"] in found}
        assert asked(again, split).keys() == kept
    seeded = shards_of(source, tmp_path / "c", val_fraction=0.2, test_fraction=0.3, split_seed=1)
    assert asked(seeded, "test").keys() != splits["test"].keys()


def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = birds(tmp_path / "birds", 60)
    with open(source / "qrels/train.tsv", "a") as file:
        file.write("question 0\tnothing\t1\n")
    (source / "queries.jsonl").write_text((source / "queries.jsonl").read_text() + '{"_id": "more", "text": "idle"}\n')

    def convert() -> dict[str, bytes]:
        shard_dataset(
            BEIRLayout(source), tmp_path / "out", samples_per_shard=7, max_bad_fraction=0.1, show_progress=False
        )
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    expected = convert()
    assert json.loads(expected["manifest.json"])["noted"] == {"queries without judgements": 1}
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()
    write, written = ShardJobs._write_records, []

    def stop_at_the_fourth(self: ShardJobs, job: RecordJob) -> int:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job.name)
        return write(self, job)

    monkeypatch.setattr(ShardJobs, "_write_records", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        convert()
    monkeypatch.setattr(ShardJobs, "_write_records", write)
    assert convert() == expected


def test_other_settings_make_other_shards_and_the_same_ones_none(tmp_path: Path) -> None:
    source, out = birds(tmp_path / "birds"), tmp_path / "shards"
    first = shards_of(source, out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    shards_of(source, out)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    other = shards_of(source, out, instruction=["Find the bird.", "Which bird is it?"])
    assert other.fingerprint != first.fingerprint
    assert other.prompt_count("train") == 2
    assert first.prompt_count("train") == 3, "a dataset without prompts of its own"


def test_an_id_of_a_dataset_is_the_users_or_goes_by_the_name(tmp_path: Path) -> None:
    source = birds(tmp_path / "scifact")
    assert BEIRLayout(source).dataset_id == BEIRLayout(source).dataset_id == 520344
    assert BEIRLayout(source, dataset="birds").dataset_id not in (520344, *range(10))
    dids = shards_of(source, tmp_path / "shards", dataset_id=10).source_ids()
    assert set(dids) == {f"10:{n}" for n in range(1, 31)}
    assert BEIRLayout(source).instructions == ("Find the text of a paper that supports or refutes this claim.",)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"dataset_id": 9}, "dataset_id=9 cannot be used: M-BEIR has 0 to 9", id="id of M-BEIR"),
        pytest.param({"dataset_id": True}, "dataset_id=True cannot be used", id="no number"),
        pytest.param({"dataset_id": 10**9}, "dataset_id=1000000000 cannot be used", id="too large"),
        pytest.param({"dataset": "mscoco"}, "dataset='mscoco' is the name of a dataset of M-BEIR", id="name of M-BEIR"),
        pytest.param({"dataset": "My Set"}, "dataset='My Set' cannot name a task", id="name"),
        pytest.param({"dataset": "a_task1"}, "dataset='a_task1' cannot name a task", id="name of a task"),
        pytest.param({"instruction": "a\tb"}, r"instruction='a\\tb' is empty or has a tab", id="instruction"),
        pytest.param({"val_fraction": 1.0}, r"val_fraction=1\.0 cannot be used", id="all"),
        pytest.param({"val_fraction": 0.5, "test_fraction": 0.5}, r"val_fraction=0\.5 cannot be used", id="together"),
        pytest.param(
            {"test_fraction": 0.5}, r"test_fraction=0\.5: .* holds dev\.tsv, test\.tsv, train\.tsv", id="there"
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserInputError, match=told):
        BEIRLayout(birds(tmp_path / "birds"), **settings)


@pytest.mark.parametrize("part", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, part: str) -> None:
    source = birds(tmp_path / "birds")
    (source / part).unlink()
    with pytest.raises(UserInputError, match=rf"birds/{part} is missing"):
        BEIRLayout(source)


def test_judgements_that_would_not_be_read_are_named(tmp_path: Path) -> None:
    source = birds(tmp_path / "birds")
    (source / "qrels/val.tsv").write_text("")
    with pytest.raises(UserInputError, match=r"qrels/val\.tsv would not be read"):
        BEIRLayout(source)
    (source / "qrels/val.tsv").rename(source / "qrels/extra.tsv")
    with pytest.raises(UserInputError, match=r"qrels/extra\.tsv would not be read"):
        BEIRLayout(source)


def test_the_layout_is_found_out_by_what_is_there(tmp_path: Path) -> None:
    assert type(open_layout(birds(tmp_path / "birds"))).__name__ == "BEIRLayout"
    assert type(open_layout(write_pets(tmp_path / "pets"))).__name__ == "MBEIRLayout"
    (tmp_path / "pairs.jsonl").write_text("")
    assert type(open_layout(tmp_path / "pairs.jsonl")).__name__ == "TripletLayout"
    with pytest.raises(UserInputError, match=r"source='\S+qrels' is neither a folder with query/"):
        open_layout(tmp_path / "birds" / "qrels")
    with pytest.raises(UserInputError, match="layout='tsv' is unknown; write one of mbeir, beir, triplets"):
        open_layout(tmp_path / "birds", "tsv")
    with pytest.raises(UserInputError, match="dataset, val_fraction: only of beir and triplets"):
        open_layout(tmp_path / "pets", dataset="cats", val_fraction=0.1, instruction=None)


def test_a_pool_is_there_for_the_splits_that_have_queries_and_no_other(tmp_path: Path) -> None:
    shards = shards_of(birds(tmp_path / "birds", splits=("test",)), tmp_path / "shards")
    assert list(shards.manifest["counts"]["pools"]) == ["birds_task1/test"]
    with pytest.raises(UserInputError, match="has no pool 'train'"):
        shards.pool("train")


def test_the_command_tells_layout_id_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = birds(tmp_path / "birds", splits=("train",)), tmp_path / "shards"
    overrides = [f"source={source}", f"out={out}", "val_fraction=0.2", 'instruction=["Find it.","Which one?"]']
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        shard(compose("shard", [*overrides, "dataset=robins", "dataset_id=12", "num_workers=0"]))
    counts = json.loads((out / "manifest.json").read_text())["counts"]["queries"]
    expected = f"30 candidates; queries: {counts['robins_task1/train']} train, {counts['robins_task1/val']} val, 0 test"
    assert expected in capsys.readouterr().out
    assert Shards(out).prompt_count("train") == 2
    assert set(Shards(out).source_ids()) == {f"12:{n}" for n in range(1, 31)}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="the real text sets do not lie beside the project")
@pytest.mark.parametrize(("name", "documents", "queries"), [("scifact", 5183, 809), ("limit-small", 46, 1000)])
def test_real_folders_are_read_whole(tmp_path: Path, name: str, documents: int, queries: int) -> None:
    with tarfile.open(REAL) as tar:
        tar.extractall(tmp_path, filter="data")
    source = tmp_path / "text" / name
    shards = shards_of(source, tmp_path / "shards")
    assert len(shards.source_ids()) == documents
    found = {split: asked(shards, split) for split in ("train", "test")}
    for split, judged in found.items():
        assert judged == (relevant(source, split) if (source / "qrels" / f"{split}.tsv").exists() else {})
    assert sum(map(len, found.values())) == queries
    assert shards.manifest["bad_records"] == []
