"""Verification: sound shards have no finding, and every kind of damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import read_lines, write_lines, write_pets

from lightning_mmembed.data import shard_dataset
from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.data.published_counts import (
    TEST_SIZES,
    UNION_TEST_POOL,
    check_source_counts,
    count_source_lines,
    published_lines,
    published_sizes,
)
from lightning_mmembed.data.verify import Verification, verify_shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256, fingerprint
from lightning_mmembed.items import MBEIR_TASKS

GOLDEN = Path(__file__).parents[1] / "golden" / "mbeir_tiny"


@pytest.fixture
def damaged(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def verified(directory: Path | str, published: bool | None = None) -> Verification:
    return verify_shards(directory, published, show_progress=False)


def rewrite_index(directory: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    table = pq.read_table(directory / "index.parquet")
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), directory / "index.parquet")


def rewrite_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def restamp(directory: Path) -> None:
    """Write the checksums of what is there, so that only what is in the files can be found wrong."""

    def change(manifest: dict[str, Any]) -> None:
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            shard |= {"sha256": file_sha256(path), "size": path.stat().st_size}
        others = [file_sha256(directory / name) for name in ("index.parquet", "instructions.tsv")]
        manifest["fingerprint"] = fingerprint(manifest["shards"], others)

    rewrite_manifest(directory, change)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- sound shards ---------------------------------------------------------------------------------------------------


def test_sound_shards_have_no_finding_and_counts_as_the_source(tiny_source: Path, tiny_shards: Path) -> None:
    verification = verified(tiny_shards)
    assert verification.findings == []
    assert all(count.is_sound and count.published is None for count in verification.counts)
    counted = {count.what: count.counted for count in verification.counts}
    for task in (0, 1, 7):
        pool = read_lines(tiny_source / "cand_pool" / "local" / f"mbeir_pets_task{task}_cand_pool.jsonl")
        assert counted[f"pool pets_task{task}/test"] == counted[f"pool pets_task{task}/val"] == len(pool)
    local = {c["did"] for p in tiny_source.glob("cand_pool/local/*") if "_val_" not in p.name for c in read_lines(p)}
    assert counted["pool test"] == len(local)
    train = read_lines(tiny_source / "query" / "train" / "mbeir_pets_train.jsonl")
    assert counted["queries train"] == counted["training lines"] == len(train)


def test_shards_at_a_url_are_verified_alike(tiny_shards: Path, damaged: Path) -> None:
    assert verified(f"file://{tiny_shards}") == verified(tiny_shards)
    (damaged / "candidates-00000.tar").unlink()
    assert verified(f"file://{damaged}") == verified(damaged)


def test_records_that_were_left_out_are_no_damage(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    next(source.glob("mbeir_images/pets_images/*.png")).unlink()
    out = shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.5, show_progress=False)
    assert json.loads((out / "manifest.json").read_text())["bad_records"]
    assert verified(out).findings == []


def test_a_folder_without_a_manifest_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"manifest.json is missing; make the shards with mmembed-shard"):
        verified(tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["images", "candidates", "queries-train", "queries-val", "queries-test"])
@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_flipped_byte_anywhere_in_any_shard_is_found(damaged: Path, kind: str, part: float) -> None:
    shard = damaged / f"{kind}-00000.tar"
    flip(shard, int(part * (shard.stat().st_size - 1)))
    first = verified(damaged).findings[0]
    assert first.what == shard.name
    assert first.expected.startswith("SHA-256")


@pytest.mark.parametrize("kept", [0, 700, 5000])
def test_a_truncated_shard_is_found_with_the_records_that_it_lost(damaged: Path, kept: int) -> None:
    shard = damaged / "candidates-00000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:kept])
    by_size, by_rows = verified(damaged).findings
    assert (by_size.what, by_size.expected, by_size.found) == (shard.name, f"{size:,} bytes", f"{kept:,}")
    assert by_rows.what == shard.name
    assert "lies past the end" in by_rows.found


def test_a_missing_shard_is_found(damaged: Path) -> None:
    (damaged / "images-00000.tar").unlink()
    (finding,) = verified(damaged).findings
    assert (finding.what, finding.found) == ("images-00000.tar", "no such file")


@pytest.mark.parametrize("name", ["pool", "queries"])
def test_an_edited_count_of_the_manifest_is_found(damaged: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["counts"]["pools" if name == "pool" else name]["pets_task0/test"] += 1

    rewrite_manifest(damaged, change)
    verification = verified(damaged)
    (finding,) = verification.findings
    assert finding.what == f"{name} pets_task0/test"
    assert [count.what for count in verification.counts if not count.is_sound] == [finding.what]


def test_an_edited_fingerprint_or_checksum_of_the_manifest_is_found(damaged: Path) -> None:
    rewrite_manifest(damaged, lambda manifest: manifest["shards"][0].update(sha256="0" * 64))
    by_fingerprint, by_shard = verified(damaged).findings
    assert "fingerprint of" in by_fingerprint.what
    assert by_shard.what == json.loads((damaged / "manifest.json").read_text())["shards"][0]["file"]


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("offset", 513, "no JSON"),
        ("offset", -5, "lies past the end"),
        ("size", 10**6, "lies past the end"),
        ("image_offset", 5, "does not start like one"),
        ("image_size", 10**8, "has a picture that lies past the end"),
        ("shard", 99, "rows that name another"),
        ("image_shard", 99, "rows that name another"),
        ("image_shard", -1, "rows that name another"),
        ("id", 77 * 10**10 + 999, "is another record"),
    ],
)
def test_an_edited_row_of_the_index_is_found_even_with_its_checksum_made_to_fit(
    damaged: Path, column: str, value: int, named: str
) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["image_size"]).update({column: value})

    rewrite_index(damaged, change)
    assert any("index.parquet" in finding.what for finding in verified(damaged).findings)
    restamp(damaged)
    assert named in " ".join(finding.found for finding in verified(damaged).findings)


@pytest.mark.parametrize("column", ["shard", "image_shard"])
def test_a_row_that_names_the_shard_after_the_last_is_found(damaged: Path, column: str) -> None:
    number = len(json.loads((damaged / "manifest.json").read_text())["shards"])
    rewrite_index(damaged, lambda rows: next(row for row in rows if row["image_size"]).update({column: number}))
    restamp(damaged)
    assert "1 rows that name another" in " ".join(finding.found for finding in verified(damaged).findings)


def test_a_row_that_lost_its_picture_is_found(damaged: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["image_size"]).update(image_size=0, image_shard=-1)

    rewrite_index(damaged, change)
    restamp(damaged)
    (finding,) = verified(damaged).findings
    assert "has a picture in one place only" in finding.found


def test_a_row_that_is_gone_is_found_in_the_counts(damaged: Path) -> None:
    rewrite_index(damaged, lambda rows: rows.pop())
    restamp(damaged)
    (finding,) = verified(damaged).findings
    assert finding.what.startswith("queries pets_task")


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no more"])
def test_an_index_that_cannot_be_read_is_found(damaged: Path, content: bytes | None) -> None:
    (damaged / "index.parquet").unlink()
    if content is not None:
        (damaged / "index.parquet").write_bytes(content)
    assert verified(damaged).findings[0].what == "index.parquet"


def test_swapped_instructions_are_found(damaged: Path) -> None:
    shutil.copyfile(GOLDEN / "instructions" / "query_instructions.tsv", damaged / "instructions.tsv")
    prompts, content = verified(damaged).findings
    assert "instructions.tsv" in content.what
    assert "the instruction file has no line with dataset_id=77" in prompts.found
    (damaged / "instructions.tsv").unlink()
    assert ("instructions.tsv", "none") in {(f.what, f.found) for f in verified(damaged).findings}


# --- published counts -----------------------------------------------------------------------------------------------


def test_the_published_sizes_are_those_of_the_16_tasks_and_fit_the_published_totals() -> None:
    assert tuple(TEST_SIZES) == MBEIR_TASKS
    assert sum(queries for queries, _ in TEST_SIZES.values()) == 190_573
    assert sum(pool for _, pool in TEST_SIZES.values()) == UNION_TEST_POOL


def test_the_miniature_is_not_taken_for_the_benchmark_unless_it_is_said_to_be(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("golden") / "shards"
    shard_dataset(GOLDEN, out, max_bad_fraction=0.05, show_progress=False)
    assert verified(out).findings == []
    findings = verified(out, published=True).findings
    assert {finding.what for finding in findings} == published_sizes().keys()
    assert all(finding.of_source for finding in findings)
    for record in json.loads((out / "manifest.json").read_text())["bad_records"][:3]:
        assert record["record"] in verified(out, published=True).report(out)
    assert verified(out, published=False).findings == []


def test_shards_of_the_size_of_the_benchmark_are_compared_with_it_unasked(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {count.what: count.counted for count in verified(tiny_shards).counts}
    sizes = {what: counts[what] for what in ("pool test", "queries train", "queries pets_task0/test")}
    for factor, compared in ((1, True), (2, True), (3, False)):
        published = {what: factor * size for what, size in sizes.items()}
        monkeypatch.setattr("lightning_mmembed.data.verify.published_sizes", lambda sizes=published: dict(sizes))
        assert {f.what for f in verified(tiny_shards).findings} == (sizes.keys() if factor == 2 else set())
        assert any(count.published for count in verified(tiny_shards).counts) is compared


def test_a_record_that_was_left_out_is_named_and_the_shards_are_not_to_be_removed_unless_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pets(tmp_path / "source")
    whole = verified(shard_dataset(source, tmp_path / "whole", show_progress=False))
    sizes = {count.what: count.counted for count in whole.counts}
    monkeypatch.setattr("lightning_mmembed.data.verify.published_sizes", lambda: sizes)
    (pool,) = source.glob("cand_pool/global/*")
    write_lines(
        pool, [{**record, "modality": "x"} if record["did"] == "77:2002" else record for record in read_lines(pool)]
    )
    out = shard_dataset(source, tmp_path / "shards", max_bad_fraction=0.01, show_progress=False)
    verification = verified(out)
    assert {finding.what for finding in verification.findings} == {"pool train"}
    report = verification.report(out)
    assert (
        "have not M-BEIR's published counts:\n  pool train: expected 48 as published, found 47\n1 record left" in report
    )
    assert "cand_pool.jsonl:10: modality='x' is unknown" in report
    assert "verify with published=false" in report
    assert "Remove" not in report
    assert "not sound" not in report
    flip(out / "candidates-00000.tar", 600)
    assert "are not sound" in verified(out).report(out)
    assert f"Remove {out}, then make them again" in verified(out).report(out)


def test_queries_that_no_prompt_serves_are_found_even_with_the_checksum_made_to_fit(damaged: Path) -> None:
    path = damaged / "instructions.tsv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("image,text")))
    restamp(damaged)
    (finding,) = verified(damaged).findings
    assert finding.what == "instructions.tsv"
    assert "of pets_task7: the instruction file has no line with dataset_id=77" in finding.found


def test_the_lines_of_a_source_are_counted_as_they_are_read(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    (train,) = source.glob("query/train/*.jsonl")
    train.write_text(train.read_text().removesuffix("\n"))
    write_lines(source / "query" / "union_train" / "mbeir_union_up_train.jsonl", ["{}"] * 7)
    lines = count_source_lines(MBEIRLayout(source), show_progress=False)
    assert not any("_val" in name for name in lines)
    assert lines.pop("query/union_train/mbeir_union_up_train.jsonl") == 7
    assert lines == {name: len(read_lines(source / name)) for name in lines}
    assert len(lines) == 6


def test_a_source_with_other_counts_is_refused_naming_every_file() -> None:
    lines = count_source_lines(MBEIRLayout(GOLDEN), show_progress=False)
    with pytest.raises(UserInputError) as error:
        check_source_counts(lines)
    for name in published_lines():
        assert name in str(error.value)
    assert "mbeir_mscoco_task0_test_cand_pool.jsonl has 30 of 5,000 lines" in str(error.value)
    assert "query/train/mbeir_*_train.jsonl has 194 of 1,150,203 lines" in str(error.value)
    # The published counts themselves pass, with the training queries in any number of files; one short file is named.
    full = dict(published_lines())
    training = full.pop("query/train/mbeir_*_train.jsonl")
    full |= {"query/train/mbeir_a_train.jsonl": 9, "query/train/mbeir_b_train.jsonl": training - 9}
    check_source_counts(full)
    with pytest.raises(UserInputError, match=r"counts:\n  query/test/mbeir_cirr_task7_test.jsonl has 4,169 of 4,170"):
        check_source_counts({**full, "query/test/mbeir_cirr_task7_test.jsonl": 4169})


# --- the command ----------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from lightning_mmembed.cli_shard import shard_main; shard_main()", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_makes_shards_finds_them_sound_and_names_damage_with_status_2(
    tiny_source: Path, tmp_path: Path
) -> None:
    made = command(tmp_path, f"source={tiny_source}", "out=shards", "samples_per_shard=7")
    assert made.returncode == 0, made.stderr
    assert len(list((tmp_path / "shards").glob("candidates-*.tar"))) > 2
    sound = command(tmp_path, "verify", "out=shards")
    assert sound.returncode == 0, sound.stderr
    assert "queries pets_task0/test" in sound.stdout
    assert "the shards in shards are sound" in sound.stdout
    for name in ("candidates-00001.tar", "queries-test-00000.tar"):
        flip(tmp_path / "shards" / name, 600)
    broken = command(tmp_path, "verify", "out=shards")
    assert broken.returncode == 2
    assert broken.stderr.startswith("error: the shards in shards are not sound")
    for part in ("candidates-00001.tar", "queries-test-00000.tar", f"mmembed-shard source={tiny_source}"):
        assert part in broken.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["shards"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify"], "Missing mandatory value: out"),
        (["verify", "out=absent"], "absent/manifest.json is missing"),
        (["verify", "out=absent", "published=maybe"], "published='maybe' is unknown"),
        ([f"source={GOLDEN}", "out=new", "published_counts=true"], "query/test/mbeir_cirr_task7_test.jsonl has 16 of"),
        ([f"source={GOLDEN}", "out=new", "archive=none.tar"], "archive='none.tar' matches no file"),
    ],
)
def test_wrong_input_to_the_command_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    process = command(tmp_path, *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert named in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "new").exists()
