"""Plain files of one's own as candidates: a folder of pictures, a file of texts, or JSON lines that name both."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.data.pictures import picture_problem
from lightning_mmembed.encoders.base import read_picture
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256, fingerprint, locked, read_json, write_atomically
from lightning_mmembed.items import Candidate, Item, Modality
from lightning_mmembed.progress import progress_bar

log = logging.getLogger(__name__)

#: What a picture file in a folder is known by; other files are passed over.
PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

ITEMS_FILE = "items.json"
INDEX_FILE = "index.json"

#: What an index says.
_INDEX_KEYS: dict[str, Any] = dict.fromkeys(("vectors", "items", "encoder"), str) | dict.fromkeys(("seed", "dim"), int)
_INDEX_KEYS |= {"model": dict | None, "ckpt_path": str | None}


@dataclass(frozen=True)
class FileItem:
    """One item of a source.

    Args:
        id: The picture's path in the folder, or the number of the line, from 1.
        txt: Its text.
        img_path: Its picture, below the root of the source.
    """

    id: str
    txt: str | None = None
    img_path: str | None = None

    @property
    def modality(self) -> Modality:
        """What the item is made of."""
        if self.img_path is None:
            return Modality.TEXT
        return Modality.IMAGE_TEXT if self.txt else Modality.IMAGE


class FileItems(Sequence[Candidate]):
    """The items of a source as candidates, whose pictures are read when they are asked for.

    Args:
        root: The folder that pictures lie below.
        rows: The items.

    """

    def __init__(self, root: Path, rows: Sequence[FileItem]) -> None:
        self.root, self.rows = root, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        row = self.rows[position]
        path = self.picture(row)
        return Candidate(Item(row.txt, None if path is None else read_picture(path)), row.id)

    def picture(self, row: FileItem) -> Path | None:
        """Where the picture of an item lies."""
        return None if row.img_path is None else self.root / row.img_path

    def fingerprint(self) -> str:
        """Changes whenever an id, a text, or the size or time of change of a picture file does."""
        return fingerprint([[*asdict(row).values(), *self._state(row)] for row in self.rows])

    @property
    def likeness(self) -> tuple[Tensor, ...]:
        """What candidates of one batch should have in common: modality, then size of the text."""
        sizes = [len((row.txt or "").encode()) for row in self.rows]
        return torch.tensor([row.modality.code for row in self.rows]), torch.tensor(sizes)

    def _state(self, row: FileItem) -> tuple[int, ...]:
        path = self.picture(row)
        if path is None or not path.is_file():
            return ()
        state = path.stat()
        return state.st_size, state.st_mtime_ns


def read_source(source: str | Path) -> FileItems:
    """List the items of a source.

    Args:
        source: A folder, whose pictures are found at any depth, hidden files and folders left out; a ``.jsonl`` file
            with ``{"txt": ..., "img_path": ...}`` in each line, one of them null or absent where there is none, the
            path from the file's own folder; or any other file, a text in each line. Empty lines are passed over.

    Raises:
        UserInputError: If it does not exist, holds no item, or has a malformed line; it names file and line.
    """
    path = Path(source)
    if path.is_dir():
        items = FileItems(path, [FileItem(name, img_path=name) for name in sorted(_pictures(path))])
    elif path.is_file():
        items = FileItems(path.parent, list(_lines(path)))
    else:
        raise UserInputError(f"source={str(source)!r} does not exist; give a folder of pictures or a file of texts")
    if not items:
        raise UserInputError(
            f"source={str(source)!r} holds no item; a folder needs pictures ({', '.join(sorted(PICTURE_SUFFIXES))}), a "
            "file a text in each line"
        )
    return items


def _pictures(folder: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in PICTURE_SUFFIXES:
                yield (Path(directory) / name).relative_to(folder).as_posix()


def _lines(path: Path) -> Iterator[FileItem]:
    # Bytes: lines end at \n alone, and a line that is not UTF-8 can be named.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().strip()
            if text:
                yield _row(str(number), json.loads(text)) if path.suffix == ".jsonl" else FileItem(str(number), text)
        except (ValueError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise UserInputError(
                f'{path}:{number}: {error}; write texts in UTF-8, and in a .jsonl {{"txt": ..., "img_path": ...}}'
            ) from error


def _row(number: str, record: Any) -> FileItem:
    values = [record.get(key) for key in ("txt", "img_path")] if isinstance(record, dict) else [None]
    if not any(values) or not all(isinstance(value, str | None) for value in values):
        raise TypeError(f"{record!r} has neither a text nor the path of a picture")
    (values[0] or "").encode()  # JSON can name half of a surrogate pair, which no tokenizer takes
    return FileItem(number, values[0] or None, values[1] or None)


def checked_source(source: str | Path, out: Path, max_bad_fraction: float = 0.001) -> FileItems:
    """List a source without the items whose picture is missing or broken, and keep the list in a folder.

    A list that is there of the same files is taken as it is, so no picture is checked twice.

    Args:
        source: See :func:`read_source`.
        out: Where ``items.json`` is kept.
        max_bad_fraction: Share of the items that may be left out; each is logged.

    Raises:
        UserInputError: If more cannot be used, the share is none, or the source is malformed.
    """
    if not isinstance(max_bad_fraction, int | float) or not 0 <= max_bad_fraction <= 1:
        raise UserInputError(f"max_bad_fraction={max_bad_fraction!r} is no share; write a number from 0 to 1")
    items = read_source(source)
    with locked(out / ITEMS_FILE):  # of several processes one checks
        made_of = {"fingerprint": items.fingerprint(), "root": str(items.root.resolve())}
        known = read_json(out / ITEMS_FILE)
        if known is None or not made_of.items() <= known.items():
            left_out = _problems(items)
            for name, problem in left_out.items():
                log.warning("%s is left out: its picture %s", name, problem)
            if len(left_out) > max_bad_fraction * len(items):
                name = next(iter(left_out))
                raise UserInputError(
                    f"{len(left_out):,} of the {len(items):,} items of source={str(source)!r} cannot be used, such as "
                    f"{name}: its picture {left_out[name]}; mend or remove them, or raise "
                    f"max_bad_fraction={max_bad_fraction}"
                )
            rows = [asdict(row) for row in items.rows if row.id not in left_out]
            write_atomically(out / ITEMS_FILE, json.dumps(made_of | {"items": rows, "left_out": left_out}))
    return known_items(out)


def known_items(out: Path) -> FileItems:
    """The items that a folder keeps a list of.

    Raises:
        UserInputError: If it keeps none.
    """
    known = read_json(out / ITEMS_FILE)
    if known is None:
        raise UserInputError(f"{out / ITEMS_FILE} is missing; make it with mmembed-embed source=... out={out}")
    return FileItems(Path(known["root"]), [FileItem(**row) for row in known["items"]])


def write_index(out: Path, made: dict[str, Any]) -> None:
    """Write what the vectors of a folder are: last, so that those which an index names are whole.

    It names the list of items too, which a later run replaces first.
    """
    made = made | {"items": file_sha256(out / ITEMS_FILE)}
    write_atomically(out / INDEX_FILE, json.dumps(made, indent=1))


def read_index(index: str) -> dict[str, Any]:
    """What an index says, where it is of the items that lie beside it.

    Raises:
        UserInputError: If there is no index, a broken one, or one of other items.
    """
    path, items = Path(index) / INDEX_FILE, Path(index) / ITEMS_FILE
    if not path.is_file():
        raise UserInputError(
            f"index={index!r} holds no {INDEX_FILE}: make it with mmembed-embed source=... out={index}, which goes on "
            "where it was stopped"
        )
    try:
        made: Any = json.loads(path.read_bytes())
    except ValueError:
        made = None
    facts = made if isinstance(made, dict) else {}
    broken = [key for key, kind in _INDEX_KEYS.items() if key not in facts or not isinstance(facts[key], kind)]
    if broken:
        raise UserInputError(f"{path} is no index: it has no usable {', '.join(broken)}; embed the source again")
    if not items.is_file() or file_sha256(items) != facts["items"]:
        raise UserInputError(
            f"index={index!r} was made of other items than {ITEMS_FILE} lists now, as when a later embedding did not "
            "finish; embed the source again"
        )
    return facts


def _problems(items: FileItems) -> dict[str, str]:
    """Why pictures cannot be used, by id."""

    def problem(path: Path) -> str | None:
        return picture_problem(path.read_bytes() if path.is_file() else None)

    paths = {row.id: path for row in items.rows if (path := items.picture(row)) is not None}
    with progress_bar() as progress, ThreadPoolExecutor() as pool:
        checked = pool.map(problem, paths.values())
        found = zip(paths, progress.track(checked, total=len(paths), description="checking pictures"), strict=True)
        return {name: reason for name, reason in found if reason is not None}
