"""Contract 8: killed at any moment and started again, or out of space, work ends with the bytes of an undisturbed run.

The work is done in processes that a server forks which has imported everything, so that a start costs no imports.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from worlds import tiny_module, tiny_trainer, write_pets

from lightning_mmembed import MBEIRDataModule, MLLMEncoder, RetrievalEvaluation
from lightning_mmembed.data import Shards, shard, shard_dataset
from lightning_mmembed.data.catalog import Catalog
from lightning_mmembed.data.jobs import RecordJob, ShardJobs
from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import resumable
from lightning_mmembed.progress import progress_bar
from lightning_mmembed.retrieval import embed
from lightning_mmembed.retrieval.embed import VectorStore

#: From the folder in which it works to what a process does there.
Work = Callable[[Path], None]

KILLS = [pytest.param(4, id="4 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    package = ["lightning_mmembed", "lightning_mmembed.data", "lightning_mmembed.callbacks"]
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llava_next", "mistral")]
    context.set_forkserver_preload(["pytest", "lightning.pytorch", *package, *models])
    return context


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several copies of the small dataset in one source."""
    root = tmp_path_factory.mktemp("herd") / "source"
    rows: list[str] = []
    for number in range(6):
        write_pets(root, f"pets{number}", 70 + number)
        header, *lines = (root / "instructions" / "query_instructions.tsv").read_text().splitlines()
        rows += [*([] if rows else [header]), *lines]
    (root / "instructions" / "query_instructions.tsv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def archived(herd: Path) -> Path:
    """The same, with its pictures in an archive that is cut into parts."""
    root = Path(shutil.copytree(herd, herd.parent / "archived"))
    data = Path(shutil.make_archive(str(root / "all"), "gztar", root, "mbeir_images")).read_bytes()
    (root / "all.tar.gz").unlink()
    shutil.rmtree(root / "mbeir_images")
    for number in range(3):
        part = data[number * len(data) // 3 : (number + 1) * len(data) // 3]
        (root / f"mbeir_images.tar.gz.part-{number:02d}").write_bytes(part)
    return root


def convert(folder: Path, source: Path, num_workers: int = 0, samples: int = 100) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a run: it would start a server of its own
    shard.PICTURES_PER_SHARD = 10
    shard_dataset(source, folder / "shards", samples_per_shard=samples, num_workers=num_workers, show_progress=False)


def embed_pool(folder: Path, shards: Path, checkpoint: Path) -> None:
    embed.PART_SIZE = 3
    encoder = MLLMEncoder.from_pretrained(checkpoint, max_length=48)
    store = VectorStore(folder / "vectors", batch_size=2, show_progress=False)
    store.embed_pool(encoder, Shards(shards).pool("train"), "weights")


def evaluate(folder: Path, shards: Path, checkpoint: Path, split: str) -> None:
    embed.PART_SIZE = 5
    evaluation = RetrievalEvaluation(metrics=("hit@5", "modality@1"), batch_size=2)
    trainer = tiny_trainer(folder / "run", callbacks=[evaluation])
    run = trainer.validate if split == "val" else trainer.test
    run(tiny_module(checkpoint), MBEIRDataModule(shards), verbose=False)


def start(server: Any, work: Work, folder: Path) -> BaseProcess:
    process: BaseProcess = server.Process(target=work, args=(folder,))
    process.start()
    return process


def finish(server: Any, work: Work, folder: Path) -> float:
    """Do the work to its end; returns the seconds that it took."""
    begun = time.monotonic()
    process = start(server, work, folder)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begun


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but for locks, which stay."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


def number_of_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def assert_kills_leave_no_trace(server: Any, work: Work, tmp_path: Path, kills: int, tidy: bool = True) -> None:
    """Kill the work at random moments, go on each time, and compare every file.

    A moment is a number of files that lie there, and a random time after: the work's own progress, so that a slow
    start or a busy machine does not put all of them before its first file.
    """
    (tmp_path / "whole").mkdir()
    duration = finish(server, work, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    draw, cut_short, gone_on = random.Random(7), 0, 0
    for number in range(kills):
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        process = start(server, work, folder)
        awaited = number * len(expected) // kills
        while process.is_alive() and number_of_files(folder) < awaited:
            time.sleep(0.001)
        process.join(draw.random() * duration / len(expected))
        process.kill()
        process.join()
        cut_short += process.exitcode == -signal.SIGKILL
        gone_on += bool(files(folder))
        finish(server, work, folder)
        found = files(folder)
        if not tidy:  # half-written files under a temporary name may stay: nothing reads them
            found = {name: data for name, data in found.items() if not name.endswith(".tmp")}
        assert found.keys() == expected.keys(), f"kill {number} after {awaited} files"
        assert [name for name in expected if found[name] != expected[name]] == [], f"kill {number}"
        shutil.rmtree(folder)
    assert cut_short >= kills // 2
    assert gone_on >= kills // 2


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("kind", ["herd", "archived"])
def test_a_killed_conversion_ends_with_the_bytes_of_one_that_was_not(
    server: Any, herd: Path, archived: Path, tmp_path: Path, kind: str, kills: int
) -> None:
    work = partial(convert, source=herd if kind == "herd" else archived)
    assert_kills_leave_no_trace(server, work, tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["herd", "archived"])
def test_a_killed_conversion_with_workers_ends_with_the_bytes_of_one_that_was_not(
    server: Any, herd: Path, archived: Path, tmp_path: Path, kind: str
) -> None:
    work = partial(convert, source=herd if kind == "herd" else archived, num_workers=2)
    assert_kills_leave_no_trace(server, work, tmp_path, 20)


CHANGES = {
    "query": "query/test/mbeir_pets_test.jsonl",
    "pool": "cand_pool/local/mbeir_pets_task0_cand_pool.jsonl",
    "qrels": "qrels/val/mbeir_pets_val_qrels.txt",
    "instructions": "instructions/query_instructions.tsv",
}


@pytest.mark.parametrize("file", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("change", ["size", "time"])
def test_a_source_with_a_changed_file_is_another_source(tmp_path: Path, file: str, change: str) -> None:
    path = write_pets(tmp_path / "source") / file
    before, stat = made_of(tmp_path), path.stat()
    assert made_of(tmp_path) == before
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines + lines[-1:] * (change == "size")))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "time")))
    assert made_of(tmp_path) != before


def made_of(folder: Path, **settings: Any) -> str:
    """Of which source and settings the shards are, made anew where they are others."""
    out = shard_dataset(folder / "source", folder / "shards", show_progress=False, **settings)
    assert sorted(path.name for path in folder.iterdir()) == [".shards.lock", "shards", "source"]
    return str(Shards(out).manifest["made_of"])


def test_shards_with_other_settings_are_made_anew_and_the_old_ones_are_gone(tmp_path: Path) -> None:
    source = write_pets(tmp_path / "source")
    whole = made_of(tmp_path)
    assert made_of(tmp_path, samples_per_shard=7) != whole
    assert len(list((tmp_path / "shards").glob("candidates-*.tar"))) > 3
    (source / "mbeir_images/pets_images/50.jpg").unlink()  # pictures are not looked at to find what has changed
    made_of(tmp_path, max_bad_fraction=0.5)
    with pytest.raises(UserInputError, match=r"cannot be used .*max_bad_fraction=0\.10%"):
        made_of(tmp_path, samples_per_shard=9)
    with pytest.raises(UserInputError, match=r"cannot be used .*max_bad_fraction=0\.10%"):
        made_of(tmp_path)  # not those that were made with more allowed


def test_finished_shards_of_records_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pets(tmp_path / "source")
    made_of(tmp_path, samples_per_shard=20)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    shutil.rmtree(tmp_path / "shards")
    written: list[str] = []
    write = ShardJobs._write_records

    def stop_at_the_fifth(self: ShardJobs, job: RecordJob) -> int:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(job.name)
        return write(self, job)

    monkeypatch.setattr(ShardJobs, "_write_records", stop_at_the_fifth)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made_of(tmp_path, samples_per_shard=20)
    monkeypatch.setattr(ShardJobs, "_write_records", lambda self, job: [written.append(job.name), write(self, job)][1])
    made_of(tmp_path, samples_per_shard=20)
    assert len(set(written)) == len(written) > 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} == expected


def convert_on_a_full_disk(folder: Path, source: Path, largest: int, num_workers: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that grows past the limit: an error, not the end
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    with pytest.raises(UserInputError, match=r"no space is left for \S+/shards \(.* run the same command again"):
        convert(folder, source, num_workers, samples=1000)


@pytest.mark.parametrize(("kind", "workers"), [("herd", 0), ("archived", 0), ("herd", 2)])
def test_a_conversion_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    server: Any, herd: Path, archived: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    source = herd if kind == "herd" else archived
    work = partial(convert, source=source, samples=1000)  # the largest file is then one of records
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    finish(server, work, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    largest = max(len(data) for data in expected.values()) - 1
    for _ in range(2):  # it stays full
        fails = partial(convert_on_a_full_disk, source=source, largest=largest, num_workers=workers)
        finish(server, fails, tmp_path / "full")
        assert not (tmp_path / "full" / "shards").exists()
        assert list((tmp_path / "full" / ".shards.building").glob("images-*.tar"))
    finish(server, work, tmp_path / "full")
    assert files(tmp_path / "full") == expected


def fill_the_disk_while_records_are_read(folder: Path, source: Path, largest: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    with pytest.raises(UserInputError, match=r"no space is left for \S+/shards \(disk I/O error\)") as caught:
        convert(folder, source)
    assert "building" not in str(caught.value)


def test_a_disk_that_is_full_while_records_are_read_is_named_alike(server: Any, herd: Path, tmp_path: Path) -> None:
    work = partial(convert, source=herd)
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    finish(server, work, tmp_path / "whole")
    for largest in (5_000, 60_000, 150_000):
        finish(server, partial(fill_the_disk_while_records_are_read, source=herd, largest=largest), tmp_path / "full")
    finish(server, work, tmp_path / "full")
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_a_catalog_that_is_full_within_a_file_of_records_goes_on_with_that_file(herd: Path, tmp_path: Path) -> None:
    counts = []
    for pages in (30, 100_000):  # far less than a file of records needs, then enough
        catalog = Catalog(tmp_path / "catalog.sqlite", MBEIRLayout(herd))
        catalog.db.execute(f"PRAGMA max_page_count = {pages}")
        full = pytest.raises(UserInputError, match=r"left for out \(database or disk is full\)")
        with full if pages == 30 else contextlib.nullcontext(), resumable("out"):
            catalog.read(progress_bar(False))
        counts.append((catalog.count("candidates"), catalog.count("queries"), catalog.count("queries", "weight != 1")))
        catalog.close()
    assert counts[0][1] < counts[1][1]
    assert counts[1] == (6 * 72, 6 * 96, 0)


@pytest.mark.parametrize("kills", KILLS)
def test_killed_embedding_ends_with_the_bytes_of_one_that_was_not(
    server: Any, tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, kills: int
) -> None:
    work = partial(embed_pool, shards=tiny_shards, checkpoint=tiny_checkpoint)
    assert_kills_leave_no_trace(server, work, tmp_path, kills, tidy=False)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_killed_evaluation_ends_with_the_files_of_one_that_was_not(
    server: Any, tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, split: str
) -> None:
    work = partial(evaluate, shards=tiny_shards, checkpoint=tiny_checkpoint, split=split)
    assert_kills_leave_no_trace(server, work, tmp_path, 20, tidy=False)
