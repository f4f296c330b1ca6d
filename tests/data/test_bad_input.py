"""Contract 11: bad input names itself; a bad record is counted, named and left out up to a limit, then an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import read_lines, write_lines, write_pets

from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.data.layout import MBEIRLayout, read_instructions
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import encode_id

POOL = "cand_pool/global/mbeir_pets_train_cand_pool.jsonl"
QUERIES = "query/train/mbeir_pets_train.jsonl"


def set_keys(**changed: Any) -> Callable[[dict[str, Any]], str]:
    return lambda record: json.dumps({**record, **changed})


def without(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: json.dumps({name: value for name, value in record.items() if name != key})


#: What is done to the line of a candidate (did 77:2002, a text) and of a query, and what must be said of it.
CANDIDATES = {
    "not JSON": (lambda record: '{"did": "77:20', "not JSON"),
    "not UTF-8": (lambda record: json.dumps(record)[:-1] + ', "x": "\udcff"}', "not UTF-8"),
    "no object": (lambda record: "null", "NoneType"),
    "unknown modality": (set_keys(modality="video"), "modality='video' is unknown"),
    "malformed did": (set_keys(did="2002"), "id='2002' is malformed; write '<dataset id>:<number>'"),
    "did out of range": (set_keys(did="999999999:1"), "id='999999999:1' is malformed"),
    "missing did": (without("did"), "key 'did' is missing"),
    "missing modality": (without("modality"), "key 'modality' is missing"),
    "image modality without picture": (set_keys(modality="image"), "modality='image' does not fit img_path=None"),
    "text modality with picture": (set_keys(img_path="mbeir_images/pets_images/1.png"), "modality='text' does not fit"),
    "text that is no text": (set_keys(txt=5), "txt=5"),
    "picture path that is no text": (set_keys(img_path=[5], modality="image"), r"img_path=\[5\]"),
    "absent picture": (set_keys(img_path="no.png", modality="image"), "picture no.png is missing"),
    "truncated picture": (set_keys(img_path="cut.png", modality="image"), "picture cut.png cannot be decoded"),
    "no picture at all": (set_keys(img_path="text.png", modality="image"), "picture text.png cannot be decoded"),
}
#: A record that was read, but whose picture cannot be used, is named by its id; others by file and line.
BROKEN_PICTURES = ("absent picture", "truncated picture", "no picture at all")
TRAIN_QUERIES = {
    "not JSON": (lambda record: "{]", "not JSON"),
    "unknown modality": (set_keys(query_modality="audio"), "modality='audio' is unknown"),
    "malformed qid": (set_keys(qid="a:b"), "id='a:b' is malformed"),
    "malformed positive": (set_keys(pos_cand_list=["7702"]), "id='7702' is malformed"),
    "unknown task": (set_keys(task_id=9), "task_id=9 of dataset 'pets' is unknown; use 0 to 8"),
    "missing task": (without("task_id"), "key 'task_id' is missing"),
    "no positive in the pool": (
        set_keys(pos_cand_list=["77:1050"]),
        r"no positive of 77:1050 is in the training",
    ),
    "no positive at all": (set_keys(pos_cand_list=[]), "no positive of none is in the training pool"),
    "absent picture": (set_keys(query_modality="image", query_img_path="no.png"), "picture no.png is missing"),
}


def broken_world(root: Path, file: str, number: int, change: Callable[[dict[str, Any]], str]) -> Path:
    """The small dataset with one line changed."""
    source = write_pets(root)
    picture = (source / "mbeir_images/pets_images/1.png").read_bytes()
    (source / "cut.png").write_bytes(picture[: len(picture) // 2])
    (source / "text.png").write_text("no picture")
    records: list[Any] = list(read_lines(source / file))
    records[number] = change(records[number])
    lines = "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records)
    (source / file).write_bytes(lines.encode("utf-8", "surrogateescape"))
    return source


@pytest.mark.parametrize("kind", CANDIDATES)
def test_a_bad_candidate_is_counted_named_and_left_out_or_an_error(tmp_path: Path, kind: str) -> None:
    change, reason = CANDIDATES[kind]
    # 77:2002 is one of the two positives of its query, so that nothing else has to be left out.
    source = broken_world(tmp_path / "source", POOL, 9, change)
    assert read_lines(write_pets(tmp_path / "good") / POOL)[9]["did"] == "77:2002"
    _assert_left_out(source, tmp_path, reason, "77:2002" if kind in BROKEN_PICTURES else None, 10)
    shards = Shards(tmp_path / "shards")
    assert encode_id("77:2002") not in shards.candidate_ids
    assert len(shards.pool("train")) == 47
    assert len(shards.query_rows("train")) == 48


@pytest.mark.parametrize("kind", TRAIN_QUERIES)
def test_a_bad_training_query_is_counted_named_and_left_out_or_an_error(tmp_path: Path, kind: str) -> None:
    change, reason = TRAIN_QUERIES[kind]
    source = broken_world(tmp_path / "source", QUERIES, 4, change)
    named = "77:1" if "picture" in kind or "no positive" in kind else None
    _assert_left_out(source, tmp_path, reason, named, 5)
    shards = Shards(tmp_path / "shards")
    assert len(shards.query_rows("train")) == 47
    assert encode_id("77:1") not in shards.query_ids(shards.query_rows("train"))


def _assert_left_out(source: Path, tmp_path: Path, reason: str, name: str | None, line: int) -> None:
    with pytest.raises(
        UserInputError, match=rf"1 of \d+ records of .* cannot be used \(.*%, max_bad_fraction=0.10%\): .*{reason}"
    ) as e:
        shard_dataset(source, tmp_path / "shards")
    where = name if name is not None else f"jsonl:{line}:"
    assert where in str(e.value), "the record names itself"
    assert "Mend them, or raise max_bad_fraction" in str(e.value)
    assert not (tmp_path / "shards").exists()
    shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.02)
    (bad,) = Shards(tmp_path / "shards").manifest["bad_records"]
    assert where.removesuffix(":") in bad["record"]


def test_more_bad_records_than_the_limit_are_an_error_naming_the_first(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    records: list[Any] = list(read_lines(source / POOL))
    write_lines(source / POOL, [*records, *("{" for _ in range(20))])
    with pytest.raises(UserInputError) as caught:
        shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.05)
    message = str(caught.value)
    assert "20 of 188 records" in message
    assert [f"jsonl:{49 + n}:" in message for n in range(6)] == [True] * 5 + [False]


def test_a_candidate_that_stands_elsewhere_with_other_content_is_named(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    (first, *_) = records = read_lines(source / POOL)
    write_lines(source / POOL, [*records, {**first, "txt": "Something else"}])
    with pytest.raises(UserInputError, match=f"{first['did']}: stands elsewhere with other content"):
        shard_dataset(source, tmp_path / "shards")


def test_blank_lines_are_no_records_and_a_line_separator_in_a_text_is_part_of_it(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    line = '{"did": "77:9", "modality": "text", "txt": "one\u2028two\u0085three", "img_path": null}'
    (source / POOL).write_text((source / POOL).read_text() + f"\n\n{line}\n\n", encoding="utf-8")
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    assert shards.manifest["bad_records"] == []
    assert shards.candidate(encode_id("77:9")).item.text == "One\u2028two\u0085three."


def test_an_evaluation_query_that_nothing_answers_counts_and_is_listed(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    assert shards.manifest["queries_without_reachable_positive"] == ["val 77:355"]
    assert len(shards.query_rows("val")) == 24


# --- whole files ----------------------------------------------------------------------------------------------------


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"source='.*absent' is no folder; give the one that holds query/"):
        MBEIRLayout(tmp_path / "absent")


@pytest.mark.parametrize("part", ["query", "cand_pool/local", "instructions/query_instructions.tsv"])
def test_a_missing_part_of_the_source_is_named(tmp_path: Path, part: str) -> None:
    source = write_pets(tmp_path / "source")
    (source / part).rename(tmp_path / "away")
    with pytest.raises(UserInputError, match=rf"{part} is missing; M-BEIR's layout needs it"):
        MBEIRLayout(source)


@pytest.mark.parametrize("content", ["", "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"])
def test_an_empty_instruction_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "query_instructions.tsv"
    path.write_text(content)
    with pytest.raises(UserInputError, match=r"query_instructions\.tsv holds no instruction; add a header line"):
        read_instructions(path.open("rb"))


@pytest.mark.parametrize("line", ["text\timage\tpets", "text\timage\tpets\t77\t\t ", "text\timage\tpets\tx\tFind it."])
def test_a_malformed_instruction_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "query_instructions.tsv"
    path.write_text(f"header\n{line}\n")
    with pytest.raises(
        UserInputError, match=r"query_instructions.tsv:2: \d columns and \d prompts; write query_modality"
    ):
        read_instructions(path.open("rb"))


def test_a_query_without_a_line_in_the_instruction_file_is_named(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    path = source / "instructions" / "query_instructions.tsv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("image,text")))
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    (task7,) = (s for s in shards.query_sets("test") if s.task.task_id == 7)
    with pytest.raises(
        UserInputError, match=r"query 77:750 of pets_task7: the instruction file has no line with"
    ) as caught:
        list(task7.queries)
    assert "dataset_id=77, query_modality='image,text', cand_modality='image'; add one" in str(caught.value)


@pytest.mark.parametrize("line", ["77:1 0 77:2", "77:1 0 77:2 yes 0"])
def test_a_malformed_qrels_line_is_named(tmp_path: Path, line: str) -> None:
    source = write_pets(tmp_path / "source")
    (source / "qrels/test/mbeir_pets_test_qrels.txt").write_text(f"77:50 0 77:1050 1 0\n{line}\n")
    with pytest.raises(UserInputError, match=r"test_qrels.txt:2: .* is no qrels line; write 'qid 0 did 1"):
        shard_dataset(source, tmp_path / "shards")


def test_a_pool_file_of_another_name_is_named(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    write_lines(source / "cand_pool/local/mbeir_pets_cand_pool.jsonl", [])
    with pytest.raises(
        UserInputError, match=r"mbeir_pets_cand_pool\.jsonl is no pool name; write mbeir_<dataset>_task<n>"
    ):
        shard_dataset(source, tmp_path / "shards")
