"""Pictures read from the split archive: the same shards as from a folder, and what is said of a broken archive."""

from __future__ import annotations

import gzip
import io
import itertools
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from worlds import write_pets

from lightning_mmembed.data import Shards, pictures, shard, shard_dataset
from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.errors import UserInputError

NAME = "mbeir_images.tar.gz"


def packed(source: Path, wrap: str = "gz") -> bytes:
    """The pictures of a source as an archive, with entries of folders and a file that no record mentions."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(source / "mbeir_images", "mbeir_images")  # folders first, each as an entry of its own
        info = tarfile.TarInfo("mbeir_images/pets_images/nobody.txt")
        info.size = 7
        tar.addfile(info, io.BytesIO(b"unasked"))
    tar_bytes = file.getvalue()
    if wrap == "tar":
        return tar_bytes
    if wrap == "members":  # as pigz and `cat a.gz b.gz` write it
        return b"".join(gzip.compress(tar_bytes[i : i + 7001], mtime=0) for i in range(0, len(tar_bytes), 7001))
    return gzip.compress(tar_bytes, mtime=0)


def write_parts(folder: Path, data: bytes, cuts: Sequence[float] = (0.37, 0.71)) -> list[Path]:
    """Cut an archive at shares of its length, which lie within files, and write the parts."""
    bounds = [0, *(int(cut * len(data)) | 1 for cut in cuts), len(data)]
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        parts.append(folder / f"{NAME}.part-{number:02d}")
        parts[-1].write_bytes(data[low:high])
    return parts


def assert_same_content(found: Shards, expected: Shards) -> None:
    assert found.candidate_ids.tolist() == expected.candidate_ids.tolist()
    assert found.manifest["counts"] == expected.manifest["counts"]
    for split in ("train", "val", "test"):
        mine, other = found.pool(split), expected.pool(split)
        assert list(mine.items) == list(other.items)
        assert mine.modalities.tolist() == other.modalities.tolist()
        assert {k: v.tolist() for k, v in mine.local.items()} == {k: v.tolist() for k, v in other.local.items()}
        for some, others in zip(found.query_sets(split), expected.query_sets(split), strict=True):
            assert (some.task, some.ids.tolist(), some.positives) == (
                others.task,
                others.ids.tolist(),
                others.positives,
            )
            assert list(some.queries) == list(others.queries)


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of finished shards by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def bare(tmp_path: Path, tiny_source: Path) -> Path:
    """The small dataset without its folder of pictures."""
    ignore = shutil.ignore_patterns("mbeir_images")
    return Path(shutil.copytree(tiny_source, tmp_path / "bare", ignore=ignore))


@pytest.fixture
def small_picture_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "PICTURES_PER_SHARD", 4)


@pytest.mark.parametrize("wrap", ["gz", "tar", "members"])
@pytest.mark.parametrize("cuts", [(), (0.37, 0.71), (0.0001, 0.9999)], ids=["whole", "parts", "uneven"])
def test_shards_from_an_archive_hold_what_those_from_a_folder_hold(
    bare: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path, wrap: str, cuts: tuple[float, ...]
) -> None:
    write_parts(tmp_path / "parts", packed(tiny_source, wrap), cuts)
    out = shard_dataset(bare, tmp_path / "shards", archive=str(tmp_path / "parts" / f"{NAME}*"))
    assert_same_content(Shards(out), Shards(tiny_shards))


@pytest.mark.usefixtures("small_picture_shards")
def test_a_picture_of_a_folder_is_stored_once_over_all_shards(tiny_source: Path, tmp_path: Path) -> None:
    names = []
    for path in shard_dataset(tiny_source, tmp_path / "shards").glob("images-*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    pets = (tiny_source / "mbeir_images").rglob("*.*g")
    assert sorted(names) == sorted(str(path.relative_to(tiny_source)) for path in pets)


@pytest.mark.usefixtures("small_picture_shards")
def test_a_picture_of_an_archive_is_stored_once_and_only_if_a_record_names_it(
    bare: Path, tiny_source: Path, tmp_path: Path
) -> None:
    data = packed(tiny_source, "tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # every file a second time: tar's way to update one
        twice = io.BytesIO(data)
        with tarfile.open(fileobj=twice, mode="a") as longer:
            for member in tar:
                longer.addfile(member, tar.extractfile(member))
    write_parts(tmp_path / "parts", twice.getvalue())
    out = shard_dataset(bare, tmp_path / "shards", archive=str(tmp_path / "parts" / "*"))
    names = []
    for path in sorted(out.glob("images-*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(list(out.glob("images-*.tar"))) == 5
    pets = (tiny_source / "mbeir_images").rglob("*.*g")
    assert sorted(names) == sorted(str(path.relative_to(tiny_source)) for path in pets)


def test_names_that_begin_with_a_dot_and_a_slash_are_the_names_without(
    bare: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    with tarfile.open(bare / NAME, "w:gz") as tar:
        tar.add(tiny_source / "mbeir_images", "./mbeir_images")
        assert not any(name.startswith("mbeir") for name in tar.getnames())
    assert_same_content(Shards(shard_dataset(bare, tmp_path / "shards")), Shards(tiny_shards))


def test_the_parts_in_the_source_are_read_where_the_folder_of_pictures_is_absent(
    bare: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    parts = write_parts(bare, packed(tiny_source))
    assert pictures.archive_parts(MBEIRLayout(bare), None) == parts
    assert_same_content(Shards(shard_dataset(bare, tmp_path / "shards")), Shards(tiny_shards))
    (bare / "mbeir_images").mkdir()
    assert pictures.archive_parts(MBEIRLayout(bare), None) == []


@pytest.mark.usefixtures("small_picture_shards")
@pytest.mark.parametrize("from_archive", [True, False], ids=["archive", "folder"])
def test_two_workers_write_the_same_bytes_as_none(
    bare: Path, tiny_source: Path, tmp_path: Path, from_archive: bool
) -> None:
    write_parts(bare, packed(tiny_source))
    source = bare if from_archive else tiny_source
    alone = shard_dataset(source, tmp_path / "alone", samples_per_shard=20)
    together = shard_dataset(source, tmp_path / "together", samples_per_shard=20, num_workers=2)
    assert tree(together) == tree(alone)
    assert len(tree(alone)) > 12


def test_parts_go_by_their_numbers_whatever_their_width(
    bare: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    parts = write_parts(bare, packed(tiny_source), [n / 103 for n in range(1, 103)])
    assert sorted(parts)[10:12] == [parts[10], parts[100]], "not the order of names"
    assert pictures.archive_parts(MBEIRLayout(bare), None) == parts
    assert pictures.archive_parts(MBEIRLayout(bare), f"{bare}/{NAME}.part-*") == parts
    assert_same_content(Shards(shard_dataset(bare, tmp_path / "shards")), Shards(tiny_shards))


@pytest.mark.parametrize(
    "suffixes", [["aa", "ab", "zz", "zzaa"], [f"{n:02x}" for n in range(18)]], ids=["letters", "hex"]
)
def test_parts_with_other_suffixes_go_by_their_names(bare: Path, suffixes: list[str]) -> None:
    parts = [bare / f"{NAME}.part-{suffix}" for suffix in suffixes]
    for part in reversed(parts):
        part.touch()
    assert pictures.archive_parts(MBEIRLayout(bare), None) == parts
    assert pictures.archive_parts(MBEIRLayout(bare), f"{bare}/*.part-*") == parts


def test_a_file_beside_the_parts_is_no_part(bare: Path, tiny_source: Path) -> None:
    parts = write_parts(bare, packed(tiny_source))
    for name in (".sha256", ".part-00.sha256", ".part-00.aria2", ".parts", ".part-"):
        (bare / f"{NAME}{name}").write_text("no part")
    assert pictures.archive_parts(MBEIRLayout(bare), None) == parts


@pytest.mark.parametrize("pattern", [None, f"{NAME}*"])
@pytest.mark.parametrize("missing", [0, 1])
def test_of_an_archive_and_its_parts_the_larger_is_read_once_and_named(
    bare: Path, tiny_source: Path, caplog: pytest.LogCaptureFixture, pattern: str | None, missing: int
) -> None:
    data = packed(tiny_source)
    parts = write_parts(bare, data)
    whole = bare / NAME
    whole.write_bytes(data[: len(data) - missing])  # it was being put together
    chosen = pictures.archive_parts(MBEIRLayout(bare), pattern and f"{bare}/{pattern}")
    assert chosen == (parts if missing else [whole])
    read, other = (parts[0], whole) if missing else (whole, parts[0])
    assert caplog.messages == [f"{read} is read and not {other}, which holds the same"]


def test_pictures_missing_from_a_folder_beside_the_archive_are_an_error_that_names_the_archive(
    bare: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    parts = write_parts(bare, packed(tiny_source))
    shutil.copytree(tiny_source / "mbeir_images", bare / "mbeir_images", ignore=shutil.ignore_patterns("5*"))
    said = rf"is missing; .*Pictures were read from {bare}/mbeir_images, not from {parts[0]}: if the folder is not all"
    with pytest.raises(UserInputError, match=said):
        shard_dataset(bare, tmp_path / "shards")
    shutil.rmtree(bare / "mbeir_images")
    assert_same_content(Shards(shard_dataset(bare, tmp_path / "shards")), Shards(tiny_shards))


def test_a_pattern_without_a_match_is_named(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"archive='.*/nowhere/\*' matches no file"):
        shard_dataset(bare, tmp_path / "shards", archive=f"{tmp_path}/nowhere/*")


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_part_is_named_before_anything_is_read(
    bare: Path, tiny_source: Path, tmp_path: Path, number: int
) -> None:
    parts = write_parts(bare, packed(tiny_source))
    parts[number].unlink()
    with pytest.raises(UserInputError, match=f"part-{number:02d} of the archive is missing; fetch it"):
        shard_dataset(bare, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / ".shards.building").exists()


def damage(parts: list[Path], kind: str) -> str:
    """Break an archive; returns what is said of it."""
    if kind == "last part missing":
        parts.pop().unlink()
    elif kind == "last part cut short":
        parts[-1].write_bytes(parts[-1].read_bytes()[:-9])
    elif kind == "middle part cut short":
        parts[1].write_bytes(parts[1].read_bytes()[:-5])
    elif kind == "empty last part":
        parts[-1].write_bytes(b"")
    else:
        data = bytearray(parts[1].read_bytes())
        data[len(data) // 2] ^= 0x40
        parts[1].write_bytes(data)
    sizes = ", ".join(rf"{part.name} \({part.stat().st_size:,} bytes\)" for part in parts)
    return rf"the archive ends or breaks after \d+ files .* a part is missing or cut short\. Here are {sizes}\."


@pytest.mark.usefixtures("small_picture_shards")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "kind",
    ["last part missing", "last part cut short", "middle part cut short", "empty last part", "damaged byte"],
)
def test_a_broken_archive_is_named_and_once_mended_gives_the_shards_of_one_that_never_broke(
    bare: Path, tiny_source: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    data = packed(tiny_source)
    write_parts(bare, data)
    whole = shard_dataset(bare, tmp_path / "whole")
    message = damage(write_parts(bare, data), kind)
    for _ in range(2):  # it goes on where it was, and comes to the same end
        with pytest.raises(UserInputError, match=message):
            shard_dataset(bare, tmp_path / "shards", num_workers=workers)
    assert not (tmp_path / "shards").exists()
    write_parts(bare, data)
    mended = tree(shard_dataset(bare, tmp_path / "shards", num_workers=workers))
    expected = tree(whole)
    for name in expected.keys() - {"manifest.json"}:  # which knows the times of the parts
        assert mended[name] == expected[name], name
    assert mended.keys() == expected.keys()
    assert Shards(tmp_path / "shards").fingerprint == Shards(whole).fingerprint


def test_a_flipped_bit_anywhere_in_a_packed_archive_is_an_error_of_the_archive_or_changes_no_file(
    tiny_source: Path, tmp_path: Path
) -> None:
    data = packed(tiny_source)
    whole, said = list(pictures.stream_archive(write_parts(tmp_path, data))), []
    for place in range(10, len(data), len(data) // 60):  # the ten bytes before are gzip's own, some of no meaning
        broken = bytearray(data)
        broken[place] ^= 0x40
        try:  # a code that gzip never uses is of no meaning
            assert list(pictures.stream_archive(write_parts(tmp_path, bytes(broken)))) == whole
        except UserInputError as error:
            said.append(str(error))
    assert len(said) > 50
    assert all("the archive ends or breaks after" in message for message in said)


@pytest.mark.usefixtures("small_picture_shards")
def test_finished_shards_are_not_written_again_when_an_archive_is_read_again(
    bare: Path, tiny_source: Path, tmp_path: Path
) -> None:
    parts = write_parts(bare, packed(tiny_source))
    damage(parts, "last part cut short")
    times = []
    for _ in range(2):
        with pytest.raises(UserInputError, match="ends or breaks"):
            shard_dataset(bare, tmp_path / "shards")
        shards = (tmp_path / ".shards.building").glob("images-*.tar")
        times.append({path.name: path.stat().st_mtime_ns for path in shards})
    assert times[0] == times[1]
    assert len(times[0]) > 1


@pytest.mark.usefixtures("small_picture_shards")
def test_an_archive_is_not_read_again_to_leave_more_out(
    bare: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny_source, tmp_path / "other"))
    (other / "mbeir_images" / "pets_images" / "50.jpg").unlink()
    write_parts(bare, packed(other))
    with pytest.raises(UserInputError, match="cannot be used"):
        shard_dataset(bare, tmp_path / "shards")
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".shards.building").glob("images-*.tar")}
    monkeypatch.setattr(shard, "stream_archive", lambda parts: pytest.fail("it was read again"))
    out = shard_dataset(bare, tmp_path / "shards", max_bad_fraction=0.1)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("images-*.tar")} == first


def test_a_shard_that_is_filled_from_an_archive_is_closed_when_it_is_large(
    bare: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "PICTURE_BYTES_PER_SHARD", 1000)
    write_parts(bare, packed(tiny_source))
    out = shard_dataset(bare, tmp_path / "shards")
    sizes = []
    for path in sorted(out.glob("images-*.tar")):
        with tarfile.open(path) as tar:
            sizes.append([member.size for member in tar])
    assert len(sizes) > 3
    assert all(sum(of_shard[:-1]) < 1000 for of_shard in sizes)
    assert all(sum(of_shard) >= 1000 for of_shard in sizes[:-1])


def test_an_archive_without_a_picture_that_a_record_names_is_too_bad_and_says_which(bare: Path, tmp_path: Path) -> None:
    other = write_pets(tmp_path / "other")
    (other / "mbeir_images" / "pets_images" / "50.jpg").unlink()
    write_parts(bare, packed(other))
    with pytest.raises(UserInputError, match=r"pets_images/50\.jpg is missing from the archive"):
        shard_dataset(bare, tmp_path / "shards")
    write_parts(bare, packed(write_pets(tmp_path / "other")))
    assert Shards(shard_dataset(bare, tmp_path / "shards")).manifest["bad_records"] == []
