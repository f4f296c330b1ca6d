"""Plain files become candidates with ids; what cannot be used is named; nothing stale is taken for the files."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lightning_mmembed.data.folder import ITEMS_FILE, FileItems, checked_source, known_items, read_source
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item, Modality


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(path)
    return path


def ids(items: FileItems) -> list[str]:
    return [row.id for row in items.rows]


# --- what a source may be -------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_at_any_depth_by_path_in_order_and_nothing_hidden(tmp_path: Path) -> None:
    names = ["b.png", "a.JPG", "trip/one two.jpeg", "trip/day 2/x.webp", "z.bmp", "c.gif", "d.tiff"]
    for name in [*names, ".hidden.png", ".thumbs/a.png", "trip/._a.jpg"]:
        path = tmp_path / name
        draw(path.with_suffix(".png"), "blue").rename(path)
    (tmp_path / "notes.txt").write_text("no picture")
    items = read_source(tmp_path)
    assert ids(items) == sorted(names)
    assert all(row.modality is Modality.IMAGE for row in items.rows)
    first = items[1]
    assert (first.did, first.item) == ("b.png", Item(None, (tmp_path / "b.png").read_bytes()))


def test_a_text_file_gives_a_text_a_line_by_its_number_and_passes_over_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes('\ufeffa red bus\r\n\n  \nété\u2028here\n{"txt": 1}'.encode())
    items = read_source(path)
    assert [(row.id, row.txt) for row in items.rows] == [
        ("1", "a red bus"),
        ("4", "été\u2028here"),
        ("5", '{"txt": 1}'),
    ]
    assert items[0].item == Item("a red bus")


def test_json_lines_name_texts_and_pictures_beside_the_file(tmp_path: Path) -> None:
    red = draw(tmp_path / "in" / "red.png")
    records = [
        {"txt": "a"},
        {"img_path": "in/red.png"},
        {"txt": "b", "img_path": "in/red.png"},
        {"txt": "", "img_path": "in/red.png"},
    ]
    path = tmp_path / "both.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    items = read_source(path)
    assert ids(items) == ["1", "2", "3", "4"]
    assert [candidate.item for candidate in items] == [
        Item("a"),
        Item(None, red.read_bytes()),
        Item("b", red.read_bytes()),
        Item(None, red.read_bytes()),
    ]
    assert [row.modality for row in items.rows] == [candidate.item.modality for candidate in items]
    modalities, sizes = items.likeness
    assert modalities.tolist() == [
        Modality.TEXT.code,
        Modality.IMAGE.code,
        Modality.IMAGE_TEXT.code,
        Modality.IMAGE.code,
    ]
    assert sizes.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff\xfe\n", r"a\.txt:2: .*codec can't decode.*; write texts in UTF-8"),
        ("a.jsonl", b'{"txt": "a"}\n{"txt": ', r"a\.jsonl:2: Expecting value"),
        ("a.jsonl", b'{"text": "a"}', r"a\.jsonl:1: .* has neither a text nor the path of a picture"),
        ("a.jsonl", b'{"txt": 7}', r"a\.jsonl:1: "),
        ("a.jsonl", b'["a"]', r"a\.jsonl:1: "),
        ("a.jsonl", b'{"txt": "a"}\n{"txt": "a\\ud800"}', r"a\.jsonl:2: .*\\ud800.* not allowed; write texts in UTF-8"),
        ("a.txt", b"\n \n", r"a\.txt' holds no item"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserInputError, match=message):
        read_source(tmp_path / name)


def test_a_source_that_is_absent_or_without_pictures_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"absent' does not exist; give a folder of pictures"):
        read_source(tmp_path / "absent")
    with pytest.raises(UserInputError, match=r"holds no item; a folder needs pictures \(\.bmp, \.gif"):
        read_source(tmp_path)


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_files_and_not_with_their_place(tmp_path: Path) -> None:
    path = draw(tmp_path / "here" / "a.png")
    first = read_source(tmp_path / "here").fingerprint()
    assert read_source(tmp_path / "here").fingerprint() == first
    (tmp_path / "here").rename(tmp_path / "there")
    assert read_source(tmp_path / "there").fingerprint() == first
    seen = {first}
    path = tmp_path / "there" / "a.png"
    changes = (
        lambda: os.utime(path, (1, 1)),
        lambda: draw(path.parent / "b.png"),
        lambda: path.rename(path.parent / "c.png"),
    )
    for change in changes:
        change()
        seen.add(read_source(tmp_path / "there").fingerprint())
    assert len(seen) == 4
    texts = tmp_path / "a.txt"
    for content in ("one", "two"):
        texts.write_text(content)
        seen.add(read_source(texts).fingerprint())
    assert len(seen) == 6


# --- what is kept ---------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> None:
    """100 pictures, of which one is cut short and one is a text."""
    for n in range(100):
        draw(folder / f"{n:03d}.png")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:50])
    (folder / "008.png").write_text("no picture")


def test_pictures_that_cannot_be_used_are_logged_and_left_out_up_to_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path / "photos")
    with pytest.raises(
        UserInputError,
        match=r"2 of the 100 items .* such as 007\.png: its picture cannot be decoded.*max_bad_fraction=0\.01",
    ):
        checked_source(tmp_path / "photos", tmp_path / "out", max_bad_fraction=0.01)
    assert not (tmp_path / "out" / ITEMS_FILE).exists()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        items = checked_source(tmp_path / "photos", tmp_path / "out", max_bad_fraction=0.02)
    assert len(items) == 98
    assert [message.partition(" is left out")[0] for message in caplog.messages] == ["007.png", "008.png"]
    assert ids(known_items(tmp_path / "out")) == ids(items)


def test_a_picture_that_a_line_names_and_nobody_has_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"txt": "a"}\n{"img_path": "absent.png"}')
    with pytest.raises(UserInputError, match="such as 2: its picture is missing"):
        checked_source(path, tmp_path / "out")


@pytest.mark.parametrize("share", ["x", None, -0.1, 1.5, float("nan")])
def test_what_is_no_share_is_refused_before_a_picture_is_read(tmp_path: Path, share: Any) -> None:
    with pytest.raises(UserInputError, match=r"max_bad_fraction=.* is no share; write a number from 0 to 1"):
        checked_source(tmp_path / "absent", tmp_path / "out", share)


def test_pictures_are_checked_once_and_again_when_one_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mmembed.data import folder

    checked: list[bytes | None] = []
    monkeypatch.setattr(folder, "picture_problem", checked.append)
    draw(tmp_path / "photos" / "a.png")
    for times in (1, 1):
        items = checked_source(tmp_path / "photos", tmp_path / "out")
        assert (ids(items), len(checked)) == (["a.png"], times)
    draw(tmp_path / "photos" / "b.png", "blue")
    assert ids(checked_source(tmp_path / "photos", tmp_path / "out")) == ["a.png", "b.png"]
    assert len(checked) == 3
    assert (
        checked_source(tmp_path / "photos", tmp_path / "out").fingerprint()
        == read_source(tmp_path / "photos").fingerprint()
    )


def test_a_folder_without_a_list_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"items\.json is missing; make it with mmembed-embed"):
        known_items(tmp_path)
