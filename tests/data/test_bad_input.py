"""Contract 11: bad input names itself; a bad record is counted, named and left out up to a limit, then an error."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import read_lines, write_lines, write_pets

from lightning_mmembed.data import MBEIRDataModule, Shards, shard_dataset
from lightning_mmembed.data.layout import MBEIRLayout, read_instructions
from lightning_mmembed.data.manifest import left_out
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, decode_id, encode_id

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
    "half a character": (set_keys(txt="a pet \ud83d"), "txt='a pet .*' holds half a character"),
    "half a character in a path": (
        set_keys(img_path="\udc00.png", modality="image"),
        "img_path='.*' holds half a char",
    ),
    "did of a million digits": (set_keys(did="77:" + "1" * 10**6), "limit"),
    "picture path that is no text": (set_keys(img_path=[5], modality="image"), r"img_path=\[5\]"),
    "absent picture": (set_keys(img_path="no.png", modality="image"), "picture no.png is missing"),
    "truncated picture": (set_keys(img_path="cut.png", modality="image"), "picture cut.png cannot be decoded"),
    "picture path too long": (set_keys(img_path="n" * 300, modality="image"), "picture n+ is missing"),
    "no picture at all": (set_keys(img_path="text.png", modality="image"), "picture text.png cannot be decoded"),
}
#: A record that was read, but whose picture cannot be used, is named by its id; others by file and line.
BROKEN_PICTURES = ("absent picture", "truncated picture", "picture path too long", "no picture at all")
TRAIN_QUERIES = {
    "not JSON": (lambda record: "{]", "not JSON"),
    "unknown modality": (set_keys(query_modality="audio"), "modality='audio' is unknown"),
    "malformed qid": (set_keys(qid="a:b"), "id='a:b' is malformed"),
    "malformed positive": (set_keys(pos_cand_list=["7702"]), "id='7702' is malformed"),
    "unknown task": (set_keys(task_id=9), "task_id=9 of dataset 'pets' is unknown; use 0 to 8"),
    "task that is a fraction": (set_keys(task_id=3.0), "task_id=3.0 of dataset 'pets' is no integer"),
    "task that is a truth": (set_keys(task_id=True), "task_id=True of dataset 'pets' is no integer"),
    "number for a qid": (set_keys(qid=1), "id=1 is malformed"),
    "half a character": (set_keys(query_txt="\ud83d"), "query_txt='.*' holds half a character"),
    "missing task": (without("task_id"), "key 'task_id' is missing"),
    "no positive in the pool": (
        set_keys(pos_cand_list=["77:1050"]),
        r"no positive of 77:1050 is in the training",
    ),
    "no positive at all": (set_keys(pos_cand_list=[]), "no positive of none is in the training pool"),
    "absent picture": (
        set_keys(query_modality="image", query_img_path="no.png", task_id=3),
        "picture no.png is missing",
    ),
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


def test_too_many_bad_lines_are_an_error_before_any_picture_is_read(tmp_path: Path) -> None:
    source = broken_world(tmp_path / "source", POOL, 9, lambda record: "{]")
    with pytest.raises(UserInputError, match="cannot be used"):
        shard_dataset(source, tmp_path / "shards")
    assert not list((tmp_path / ".shards.building").glob("*.tar"))


OTHER_PICTURE = "mbeir_images/pets_images/1.png"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (POOL, {"txt": "Something else"}),
        (POOL, {"img_path": OTHER_PICTURE}),
        (POOL, {"modality": "image,text"}),
        (QUERIES, {"query_txt": "something else"}),
        (QUERIES, {"query_img_path": OTHER_PICTURE}),
        (QUERIES, {"pos_cand_list": ["77:2001"]}),
    ],
)
def test_a_record_that_stands_elsewhere_with_other_content_is_named(
    tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    source = write_pets(tmp_path / "source")
    records = read_lines(source / file)
    first = records[0 if file == POOL else 2]  # one with a picture
    write_lines(source / file, [*records, first])  # once more with the same content
    assert Shards(shard_dataset(source, tmp_path / "shards")).manifest["bad_records"] == []
    write_lines(source / file, [*records, {**first, **change}])
    name = first["did" if file == POOL else "qid"]
    with pytest.raises(UserInputError, match=f"{name}: stands elsewhere with other content"):
        shard_dataset(source, tmp_path / "shards")
    shards = Shards(shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.02))
    assert len(shards.pool("train")) == len(shards.query_rows("train")) == 48


def test_as_many_bad_records_as_are_allowed_are_left_out_and_one_more_is_an_error(tmp_path: Path) -> None:
    source = broken_world(tmp_path / "source", POOL, 9, lambda record: "{]")
    with pytest.raises(UserInputError, match=r"1 of 168 records"):
        shard_dataset(source, tmp_path / "shards", max_bad_fraction=1 / 169)
    assert len(Shards(shard_dataset(source, tmp_path / "shards", max_bad_fraction=1 / 168)).candidate_ids) == 71


def test_a_broken_picture_counts_for_every_candidate_and_query_that_shows_it_and_says_which(tmp_path: Path) -> None:
    source = broken_world(tmp_path / "source", POOL, 9, set_keys())
    shown = {"did": "77:5000", "modality": "image", "txt": None, "img_path": "cut.png"}
    asks = {"qid": "77:5000", "query_modality": "image", "query_txt": None, "query_img_path": "cut.png", "task_id": 3}
    for file, positive in ((QUERIES, "77:2000"), ("query/val/mbeir_pets_val.jsonl", "77:2050")):
        write_lines(source / file, [*read_lines(source / file), {**asks, "pos_cand_list": [positive]}])
    write_lines(source / POOL, [*read_lines(source / POOL), shown])
    manifest = Shards(shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.05)).manifest
    assert [bad["record"] for bad in manifest["bad_records"]] == ["77:5000", "train 77:5000", "val 77:5000"]
    assert all(bad["reason"].startswith("picture cut.png cannot be decoded") for bad in manifest["bad_records"])
    found = [left_out(manifest), left_out(manifest, "train"), left_out(manifest, "val"), left_out(manifest, "test")]
    assert found == [[encode_id("77:5000")]] * 3 + [[]]


def test_blank_lines_are_no_records_and_a_line_separator_in_a_text_is_part_of_it(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    line = '{"did": "77:9", "modality": "text", "txt": "one\u2028two\u0085three", "img_path": null}'
    (source / POOL).write_text((source / POOL).read_text() + f"\n\n{line}\n\n", encoding="utf-8")
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    assert shards.manifest["bad_records"] == []
    assert shards.candidate(encode_id("77:9")).item.text == "One\u2028two\u0085three."


def test_a_byte_order_mark_at_the_start_of_a_file_is_no_part_of_its_first_record(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    for file in (POOL, QUERIES, "instructions/query_instructions.tsv"):
        (source / file).write_bytes(b"\xef\xbb\xbf" + (source / file).read_bytes())
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    assert shards.manifest["bad_records"] == []
    assert len(shards.pool("train")) == len(shards.query_rows("train")) == 48
    assert all(query.instruction for queries in shards.query_sets("test") for query in queries.queries)


@pytest.mark.parametrize("path", ["/etc/1.png", "mbeir_images/../../1.png", ".."])
def test_a_picture_out_of_the_source_is_not_read(tmp_path: Path, path: str) -> None:
    source = broken_world(tmp_path / "source", POOL, 9, set_keys(img_path=path, modality="image"))
    with pytest.raises(UserInputError, match=r"jsonl:10: img_path='.*' leads out of the source; write a path below it"):
        shard_dataset(source, tmp_path / "shards")


def test_a_picture_with_a_long_name_is_stored_under_it(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    name = f"mbeir_images/{'deep/' * 30}{'n' * 200}.png"  # of the old tar formats, none holds it
    (source / name).parent.mkdir(parents=True)
    shutil.copy(source / "mbeir_images/pets_images/1.png", source / name)
    shown = {"did": "77:9", "modality": "image", "txt": None, "img_path": name}
    write_lines(source / POOL, [*read_lines(source / POOL), shown])
    out = shard_dataset(source, tmp_path / "shards")
    assert Shards(out).candidate(encode_id("77:9")).item.image == (source / name).read_bytes()
    with tarfile.open(out / "images-00000.tar") as tar:
        assert name in tar.getnames()


# --- what says how often, and what is right -------------------------------------------------------------------------


def test_a_query_of_the_up_sampled_file_alone_is_a_training_query_like_the_others(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    instructions = source / "instructions/query_instructions.tsv"
    instructions.write_text(instructions.read_text().replace("\tpets\t", "\tPETS\t"))  # as M-BEIR has MSCOCO
    own = read_lines(source / QUERIES)
    alone = {**own[0], "qid": "77:9000"}
    write_lines(source / "query/union_train/mbeir_union_up_train.jsonl", [alone, *own, *own[:5], alone, alone])
    shards = Shards(shard_dataset(source, tmp_path / "shards", samples_per_shard=10))
    rows = shards.query_rows("train")
    weights = dict(zip(shards.query_ids(rows).tolist(), shards.query_weights(rows).tolist(), strict=True))
    assert weights == {encode_id(q["qid"]): 1 + (q in own[:5]) for q in own} | {encode_id("77:9000"): 3}
    assert {task.name for task in shards.tasks("train")} == {f"pets_task{n}" for n in (0, 1, 3, 7)}
    assert len(rows) == 49
    assert [len(shards.query_rows(split)) for split in ("val", "test")] == [24, 24]
    names = []
    for path in Path(shards.directory).glob("queries-train-*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(set(names)) == len(names) == 49


@pytest.mark.parametrize(
    ("qid", "reason"),
    [
        (5, "id=5 is malformed"),
        ("5", "id='5' is malformed"),
        ("78:5", r"qid='78:5': the instruction file has no line with dataset_id=78; add one"),
    ],
)
def test_a_bad_id_in_a_file_of_several_datasets_is_a_bad_record_that_says_what_is_wrong(
    tmp_path: Path, qid: Any, reason: str
) -> None:
    source = write_pets(tmp_path / "source")
    own = read_lines(source / QUERIES)
    write_lines(source / "query/union_train/mbeir_union_up_train.jsonl", [*own, {**own[0], "qid": qid}])
    with pytest.raises(UserInputError, match=rf"mbeir_union_up_train\.jsonl:49: {reason}"):
        shard_dataset(source, tmp_path / "shards")
    assert len(Shards(shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.01)).query_rows("train")) == 48


@pytest.mark.parametrize("columns", [4, 5])
@pytest.mark.parametrize("name", ["pets", "pets_task3"])
def test_qrels_say_what_is_right_with_four_columns_or_five_for_a_dataset_or_a_task(
    tmp_path: Path, name: str, columns: int
) -> None:
    source = write_pets(tmp_path / "source")
    (source / "qrels/test/mbeir_pets_test_qrels.txt").unlink()
    judged = ["77:350 0 77:2055 1 3", "77:350 0 77:2051 0 3", "77:351 0 77:2051 0 3", "77:350 0 77:3055 2 3"]
    lines = "".join(" ".join(line.split()[:columns]) + "\n" for line in judged)
    (source / f"qrels/test/mbeir_{name}_test_qrels.txt").write_text(lines)
    tasks = MBEIRLayout(source).qrels("test").keys()
    assert tasks == ({"pets"} if (name, columns) == ("pets", 4) else {"pets_task3"})
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    (task3,) = (queries for queries in shards.query_sets("test") if queries.task.task_id == 3)
    found = {decode_id(qid): set(dids) for qid, dids in zip(task3.ids.tolist(), task3.positives, strict=True)}
    assert found["77:350"] == {encode_id("77:2055"), encode_id("77:3055")}
    (written,) = (q for q in read_lines(source / "query/test/mbeir_pets_test.jsonl") if q["qid"] == "77:351")
    assert found["77:351"] == set(map(encode_id, written["pos_cand_list"])), "no line of the qrels says what is right"


def test_labelled_negatives_are_kept_and_a_null_list_is_an_empty_one(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    first, second, *rest = read_lines(source / QUERIES)
    first["neg_cand_list"], second["neg_cand_list"] = ["77:2003", "77:1002"], None
    write_lines(source / QUERIES, [first, second, *rest, {**first, "qid": "77:9000", "pos_cand_list": None}])
    out = shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.01)
    (bad,) = Shards(out).manifest["bad_records"]
    assert bad == {"record": "train 77:9000", "reason": "no positive of none is in the training pool"}
    with tarfile.open(out / "queries-train-00000.tar") as tar:
        records = [json.load(file) for member in tar if (file := tar.extractfile(member))]
    assert [record["neg_cand_list"] for record in records] == [["77:2003", "77:1002"]] + [[]] * 47
    for key in ("pos_cand_list", "task_id"):
        assert {record["qid"]: record[key] for record in records} == {q["qid"]: q[key] for q in (first, second, *rest)}


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


def without_lines(path: Path, *starts: str) -> None:
    """Remove lines of an instruction file."""
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(starts)))


def test_queries_without_a_line_in_the_instruction_file_are_named_before_any_picture_is_read(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    without_lines(source / "instructions/query_instructions.tsv", "image,text", "image\ttext")
    shutil.rmtree(source / "mbeir_images")
    with pytest.raises(UserInputError, match=r"query_instructions\.tsv lacks lines:\n  query 77:") as caught:
        shard_dataset(source, tmp_path / "shards")
    for qid, task, modality, wanted in (("77:300", 3, "image", "text"), ("77:700", 7, "image,text", "image")):
        line = f"no line with dataset_id=77, query_modality='{modality}', cand_modality='{wanted}'; add one"
        assert f"query {qid} of pets_task{task}: the instruction file has {line}" in str(caught.value)
    assert not list((tmp_path / ".shards.building").glob("*.tar"))


@pytest.mark.parametrize("content", ["header only", b"\xff\xfe\x00"])
def test_a_bad_instruction_file_is_an_error_before_any_record_is_read(tmp_path: Path, content: str | bytes) -> None:
    source = write_pets(tmp_path / "source")
    path = source / "instructions" / "query_instructions.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (source / POOL).write_text("{\n" * 1000)
    with pytest.raises(UserInputError, match=r"query_instructions\.tsv (holds no instruction|is not UTF-8)"):
        shard_dataset(source, tmp_path / "shards")
    assert not (tmp_path / ".shards.building").exists()


def test_a_query_of_shards_whose_instruction_file_lacks_its_line_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    without_lines(folder / "instructions.tsv", "image,text")
    with pytest.raises(
        UserInputError, match=r"query 77:\d+ of pets_task7: the instruction file has no line with .*; add"
    ):
        Shards(folder).query_sets("test")


@pytest.mark.parametrize("line", ["77-50 0 77:1050 1 0", "77:50 0 1050 1 0", "77:50 0 77:\ud83d 1 0"])
def test_a_malformed_id_of_a_qrels_line_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    source = write_pets(tmp_path / "source")
    path = source / "qrels/test/mbeir_pets_test_qrels.txt"
    path.write_bytes(f"77:50 0 77:1050 1 0\n{line}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(UserInputError, match=r"test_qrels\.txt:2: id='.*' is malformed; write '<dataset id>:<number>'"):
        shard_dataset(source, tmp_path / "shards")


@pytest.mark.parametrize("line", ["77:1 0 77:2", "77:1 0 77:2 yes 0"])
def test_a_malformed_qrels_line_is_named(tmp_path: Path, line: str) -> None:
    source = write_pets(tmp_path / "source")
    (source / "qrels/test/mbeir_pets_test_qrels.txt").write_text(f"77:50 0 77:1050 1 0\n{line}\n")
    with pytest.raises(UserInputError, match=r"test_qrels.txt:2: .* is no qrels line; write 'qid 0 did 1"):
        shard_dataset(source, tmp_path / "shards")


@pytest.mark.parametrize("file", [POOL, QUERIES])
def test_a_file_that_was_cut_short_is_named_and_one_without_a_last_line_end_is_whole(tmp_path: Path, file: str) -> None:
    source = write_pets(tmp_path / "source")
    data = (source / file).read_bytes()
    (source / file).write_bytes(data[:-20])
    with pytest.raises(UserInputError, match=rf"{file} ends in the middle of line 48: the file was cut short; fetch"):
        shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.5)
    (source / file).write_bytes(data[:-1])
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    assert len(shards.pool("train")) == len(shards.query_rows("train")) == 48


def test_a_quotation_mark_in_an_instruction_is_a_character_like_others(tmp_path: Path) -> None:
    path = tmp_path / "query_instructions.tsv"
    path.write_text('header\ntext\timage\tpets\t77\t"Find" this pet\t"Where is it?\nimage\ttext\tpets\t77\tSay it.\n')
    prompts = read_instructions(path.open("rb"))
    assert prompts[77, Modality.TEXT, Modality.IMAGE] == ('Find" this pet.', "Where is it?")
    assert prompts[77, Modality.IMAGE, Modality.TEXT] == ("Say it.",)


def test_queries_without_a_local_pool_are_named_with_the_file_that_they_need(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    (source / "cand_pool/local/mbeir_pets_task3_val_cand_pool.jsonl").unlink()
    with pytest.raises(
        UserInputError, match=r"no local pool for pets_task3/val: cand_pool/local/mbeir_pets_task3_cand_pool.jsonl is"
    ):
        shard_dataset(source, tmp_path / "shards")


def test_pools_without_a_candidate_are_named(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    for path in source.glob("cand_pool/*/*.jsonl"):
        path.write_text("\n")
    with pytest.raises(UserInputError, match="source holds no candidate that can be used"):
        shard_dataset(source, tmp_path / "shards")


def test_a_pool_file_of_another_name_is_named(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    write_lines(source / "cand_pool/local/mbeir_pets_cand_pool.jsonl", [])
    with pytest.raises(
        UserInputError, match=r"mbeir_pets_cand_pool\.jsonl is no pool name; write mbeir_<dataset>_task<n>"
    ):
        shard_dataset(source, tmp_path / "shards")


@pytest.mark.parametrize(("split", "name"), [("train", "mbeir_pets_test.jsonl"), ("val", "pets_val.jsonl")])
def test_a_query_file_of_another_name_is_named(tmp_path: Path, split: str, name: str) -> None:
    source = write_pets(tmp_path / "source")
    write_lines(source / "query" / split / f".{name}", ["hidden"])
    write_lines(source / "query/union_val/mbeir_union_val.jsonl", ["not read"])
    shard_dataset(source, tmp_path / "shards")
    write_lines(source / "query" / split / name, [])
    said = rf"query/{split}/{name} is no name of a query file; write mbeir_<dataset>\[_task<n>\]_{split}\.jsonl"
    with pytest.raises(UserInputError, match=said):
        shard_dataset(source, tmp_path / "shards")


def test_a_url_to_write_to_is_refused_and_no_folder_is_made_of_it(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserInputError, match="'memory://shards' is a URL: write to a folder, copy it there, then read"):
        shard_dataset(tiny_source, "memory://shards")
    with pytest.raises(UserInputError, match=r"data\.shards='memory://shards' is a URL, .*data\.source=null"):
        MBEIRDataModule("memory://shards", tiny_source)
    assert list(tmp_path.iterdir()) == []
