"""Shards: what they hold, when they are made again, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from worlds import read_lines, write_lines, write_pets

from lightning_mmembed.data import MBEIRDataModule, Shards, ShardTexts, shard_dataset
from lightning_mmembed.data.layout import format_text
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import building_directory, file_sha256, replacing
from lightning_mmembed.items import Modality, decode_id, encode_id


def sources(root: Path) -> tuple[dict[str, dict], dict[tuple[str, str], dict]]:
    """The candidates by did and the queries by (split, qid), as the source holds them."""
    candidates = {c["did"]: c for path in root.glob("cand_pool/*/*.jsonl") for c in read_lines(path)}
    queries = {(path.parent.name, q["qid"]): q for path in root.glob("query/*/*.jsonl") for q in read_lines(path)}
    return candidates, queries


def test_the_bytes_at_the_offsets_of_the_index_are_those_of_the_source(tiny_source: Path, tiny_shards: Path) -> None:
    candidates, queries = sources(tiny_source)
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    rows = pq.read_table(tiny_shards / "index.parquet").to_pylist()
    assert len(rows) == len(candidates) + len(queries)
    for row in rows:
        data, pictures = (
            (tiny_shards / manifest["shards"][row[shard]]["file"]).read_bytes() for shard in ("shard", "image_shard")
        )
        name = decode_id(row["id"])
        source = queries[row["split"], name] if row["split"] else candidates[name]
        record = json.loads(data[row["offset"] : row["offset"] + row["size"]])
        prefix = "query_" if row["split"] else ""
        assert record["qid" if row["split"] else "did"] == name
        assert record[f"{prefix}txt"] == format_text(source[f"{prefix}txt"])
        image = source[f"{prefix}img_path"]
        picture = pictures[row["image_offset"] : row["image_offset"] + row["image_size"]]
        assert picture == ((tiny_source / image).read_bytes() if image else b"")
        assert list(Modality)[row["modality"]].value == source[f"{prefix}modality"]


def test_each_shard_is_a_plain_tar_with_the_checksum_of_the_manifest(tiny_shards: Path) -> None:
    manifest = json.loads((tiny_shards / "manifest.json").read_text())
    names = []
    for shard in manifest["shards"]:
        assert file_sha256(tiny_shards / shard["file"]) == shard["sha256"]
        with tarfile.open(tiny_shards / shard["file"]) as tar:
            names += [(shard["file"], member.name) for member in tar]
    assert len(set(names)) == len(names)
    assert {Path(name).suffix for _, name in names} == {".json", ".jpg", ".png"}
    assert not list(tiny_shards.parent.glob(".*.tmp"))


def test_a_small_shard_size_changes_the_files_and_nothing_that_is_read(
    tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    small, large = Shards(shard_dataset(tiny_source, tmp_path / "small", samples_per_shard=7)), Shards(tiny_shards)
    assert len(small.manifest["shards"]) > len(large.manifest["shards"])
    for name in ("train", "val", "test"):
        assert list(small.pool(name).items) == list(large.pool(name).items)
        assert [list(s.queries) for s in small.query_sets(name)] == [list(s.queries) for s in large.query_sets(name)]


def test_records_are_joined_by_did_and_qid(tiny_source: Path, tiny_shards: Path) -> None:
    candidates, queries = sources(tiny_source)
    shards = Shards(tiny_shards)
    for did, source in candidates.items():
        candidate = shards.candidate(encode_id(did))
        assert candidate.did == did
        assert candidate.item.modality.value == source["modality"]
    for split in ("train", "val", "test"):
        read = {q.qid: q for s in shards.query_sets(split) for q in s.queries}
        assert read.keys() == {qid for where, qid in queries if where == split}
        for qid, query in read.items():
            source = queries[split, qid]
            assert query.positives == tuple(source["pos_cand_list"])
            assert query.task is not None
            assert query.task.name == f"pets_task{source['task_id']}"
            assert query.instruction
    with pytest.raises(UserInputError, match="did='77:9' is in no pool of"):
        shards.candidate(encode_id("77:9"))


def test_the_pools_are_those_of_the_source(tiny_source: Path, tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    (train,) = tiny_source.glob("cand_pool/global/*")
    assert [decode_id(i) for i in shards.pool("train").ids.tolist()] == sorted(
        (c["did"] for c in read_lines(train)), key=encode_id
    )
    for split in ("val", "test"):
        pool, union = shards.pool(split), set()
        for task in (0, 1, 3, 7):
            middle = f"task3_{split}" if task == 3 else f"task{task}"
            wanted = {
                c["did"]
                for c in read_lines(tiny_source / "cand_pool" / "local" / f"mbeir_pets_{middle}_cand_pool.jsonl")
            }
            assert {decode_id(i) for i in pool.ids[pool.local[f"pets_task{task}"]].tolist()} == wanted
            union |= wanted
        assert {decode_id(i) for i in pool.ids.tolist()} == union
    with pytest.raises(UserInputError, match="has no pool 'absent'"):
        shards.pool("absent")


def test_shards_are_pickled_as_their_folder_and_read_the_same(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    first = shards.candidate_at(0)
    data = pickle.dumps(shards)
    assert len(data) < 500
    assert pickle.loads(data).candidate_at(0) == first


def test_a_tokenizer_learns_from_training_texts_only(tiny_shards: Path) -> None:
    texts = "\n".join(ShardTexts(tiny_shards))
    assert "A red ellipse." in texts
    assert "Instruct: Find the picture of this pet.\nQuery: A pet that is red and ellipse." in texts
    assert "triangle" not in texts, "the shape of the evaluation side"


@pytest.mark.parametrize(("name", "dataset_id"), [("zoo", 0), ("my_own_set", 123), ("task_force", 922337202)])
def test_any_dataset_name_and_id_works(tmp_path: Path, name: str, dataset_id: int) -> None:
    shards = Shards(shard_dataset(write_pets(tmp_path / "source", name, dataset_id), tmp_path / "shards"))
    for split in ("train", "val", "test"):
        sets = shards.query_sets(split)
        assert sorted(s.task.name for s in sets) == [f"{name}_task{n}" for n in (0, 1, 3, 7)]
        assert all(q.instruction and q.qid.startswith(f"{dataset_id}:") for s in sets for q in s.queries)
    assert len(shards.pool("train")) == 48


def test_without_a_training_pool_all_local_pools_together_are_one(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source", global_train_pool=False)
    shards = Shards(shard_dataset(source, tmp_path / "shards"))
    dids = {c["did"] for path in source.glob("cand_pool/local/*") for c in read_lines(path)}
    assert {decode_id(i) for i in shards.pool("train").ids.tolist()} == dids
    assert len(shards.query_rows("train")) == 24


# --- made once, made again, refused ---------------------------------------------------------------------------------


def test_shards_of_the_same_source_are_reused(tiny_source: Path, tmp_path: Path) -> None:
    out = shard_dataset(tiny_source, tmp_path / "shards")
    before = {path.name: path.stat().st_ino for path in out.iterdir()}
    assert shard_dataset(tiny_source, out) == out
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == before


def test_shards_are_made_again_when_the_source_changed(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    old = Shards(shard_dataset(source, tmp_path / "shards"))
    (pool,) = source.glob("cand_pool/global/*")
    write_lines(pool, [*read_lines(pool), {"did": "77:9", "modality": "text", "txt": "new", "img_path": None}])
    new = Shards(shard_dataset(source, tmp_path / "shards"))
    assert new.fingerprint != old.fingerprint
    assert new.candidate(encode_id("77:9")).item.text == "New."
    assert new.pool("test").fingerprint != old.pool("test").fingerprint


def test_shards_are_made_again_when_a_picture_that_they_left_out_is_there_at_last(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    pictures = source / "mbeir_images/pets_images"
    mended = {name: (pictures / name).read_bytes() for name in ("1.png", "50.jpg")}
    (pictures / "1.png").unlink()
    (pictures / "50.jpg").write_bytes(b"broken")

    def remade() -> bool:
        before = (tmp_path / "shards/manifest.json").stat().st_ino
        shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.5)
        MBEIRDataModule(tmp_path / "shards", source).prepare_data()
        return (tmp_path / "shards/manifest.json").stat().st_ino != before

    shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.5)
    left_out = [bad["record"] for bad in Shards(tmp_path / "shards").manifest["bad_records"]]
    assert {"77:1001", "train 77:301", "77:1050"} <= set(left_out)
    assert not remade()
    (pictures / "1.png").write_bytes(mended["50.jpg"][:100])
    assert not remade(), "it is there, but as broken as the other"
    for name in mended:
        (pictures / name).write_bytes(mended[name])
        assert remade()
    assert Shards(tmp_path / "shards").manifest["bad_records"] == []
    (pictures / "1.png").unlink()
    assert not remade(), "a picture that is in the shards is not looked at"


def test_a_datamodule_takes_the_shards_of_its_source_whatever_made_them(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    archive = shutil.make_archive(str(tmp_path / "elsewhere"), "gztar", source, "mbeir_images")
    (source / "mbeir_images").rename(tmp_path / "away")
    line = '{"did": "no id"}'
    (pool,) = source.glob("cand_pool/global/*")
    pool.write_text(f"{pool.read_text()}{line}\n")
    settings: dict[str, Any] = {"max_bad_fraction": 0.5, "samples_per_shard": 7}
    out = shard_dataset(source, tmp_path / "shards", archive=archive, **settings)
    before = (out / "manifest.json").stat().st_ino
    Path(archive).unlink()
    datamodule = MBEIRDataModule(out, source)
    datamodule.prepare_data()
    assert (out / "manifest.json").stat().st_ino == before
    assert len(datamodule.shards.query_rows("train")) == 48
    (tmp_path / "away").rename(source / "mbeir_images")
    pool.write_text(pool.read_text().replace(line, '{"did": "77:9", "modality": "text", "txt": "new"}'))
    MBEIRDataModule(out, source).prepare_data()
    assert Shards(out).candidate(encode_id("77:9")).item.text == "New.", "another source"


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserInputError, match="holds other files; give a new or empty folder"):
        shard_dataset(tiny_source, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_without_a_manifest_is_no_dataset(tiny_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserInputError, match=r"manifest.json is missing; make the shards with mmembed-shard"):
        Shards(folder)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_shard_is_named(tiny_shards: Path, tmp_path: Path, kept: int) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    shard = folder / "candidates-00000.tar"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(
        UserInputError, match=r"candidates-00000.tar ends before byte \d+; it is truncated: make the shards"
    ):
        list(Shards(folder).pool("train").items)


# --- contract 9: temporary names, nothing half written --------------------------------------------------------------


def test_a_conversion_that_fails_leaves_no_shards_and_reads_mended_pictures_again(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    picture = next(source.glob("mbeir_images/pets_images/*.png"))
    picture.write_bytes(b"")
    with pytest.raises(UserInputError, match="cannot be used"):
        shard_dataset(source, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    Image.new("RGB", (8, 8)).save(picture)
    assert Shards(shard_dataset(source, tmp_path / "shards")).manifest["bad_records"] == []


def test_an_exception_inside_building_directory_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    with building_directory(path) as directory:
        (directory / "manifest.json").write_text("old")

    def fail() -> None:
        with building_directory(path) as directory:
            (directory / "manifest.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (path / "manifest.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    with building_directory(path) as directory:
        (directory / "other.json").write_text("new")
    assert [p.name for p in path.iterdir()] == ["other.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_an_exception_inside_replacing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_mmembed.files import building_directory, replacing
path, point = Path(sys.argv[1]), sys.argv[2]
real, calls = os.unlink, []
def unlink(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
if point == "replacing the old":
    os.unlink = unlink
with building_directory(path) as directory:
    for name in "abc":
        (directory / name).write_text("new")
        if point == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("point", ["writing", "replacing the old"])
def test_a_kill_leaves_the_old_directory_or_the_new_one_never_a_part(tmp_path: Path, point: str) -> None:
    path = tmp_path / "thing"
    with building_directory(path) as directory:
        for name in "abc":
            (directory / name).write_text("old")
    process = subprocess.run([sys.executable, "-c", KILLED, str(path), point], cwd=tmp_path, check=False)
    assert process.returncode == -9
    found = {p.name: p.read_text() for p in path.iterdir()}
    assert found in ({}, dict.fromkeys("abc", "old"), dict.fromkeys("abc", "new"))


def test_pictures_of_the_shards_can_be_decoded(tiny_shards: Path) -> None:
    for candidate in Shards(tiny_shards).pool("test").items:
        if candidate.item.image is not None:
            assert Image.open(io.BytesIO(candidate.item.image)).size == (48, 36)


def test_the_task_of_a_row_takes_two_bytes(tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    names, places = shards._tasks
    assert (places.shape, places.itemsize) == ((len(shards._index),), 2)
    assert set(names) == {"", "pets_task0", "pets_task1", "pets_task3", "pets_task7"}
    rows = shards.query_rows("train")
    assert [str(name) for name in shards.task_names(rows)] == [shards.query_at(int(row)).task.name for row in rows]
