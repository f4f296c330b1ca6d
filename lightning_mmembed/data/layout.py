"""Reads M-BEIR's published on-disk layout, for the ten datasets of the benchmark and for any other in the same layout.

::

    query/{train,val,test}/mbeir_{dataset}[_task{n}]_{split}.jsonl
    cand_pool/local/mbeir_{dataset}_task{n}[_{split}]_cand_pool.jsonl
    cand_pool/global/mbeir_{name}_train_cand_pool.jsonl
    qrels/{train,val,test}/mbeir_{dataset}[_task{n}]_{split}_qrels.txt
    instructions/query_instructions.tsv
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, Task, encode_id

SPLITS = ("train", "val", "test")

#: The pool that training negatives are drawn from and mined in.
TRAIN_POOL = "train"


def format_text(text: str | None) -> str:
    """Clean a text as M-BEIR does (``format_string`` of ``src/data/preprocessing/utils.py`` in UniIR).

    Example:
        >>> format_text(' "a red bus" ')
        'A red bus.'
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


@dataclass(frozen=True)
class CandidateRecord:
    """A line of a candidate pool; ``image`` is a path relative to the source, or None."""

    did: str
    text: str
    image: str | None
    modality: Modality


@dataclass(frozen=True)
class QueryRecord:
    """A line of a query file; ``image`` is a path relative to the source, or None."""

    qid: str
    text: str
    image: str | None
    modality: Modality
    task: Task
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class BadRecord:
    """A line that cannot be used, and why."""

    where: str
    reason: str


class MBEIRLayout:
    """A source tree in M-BEIR's layout.

    Args:
        source: The folder that holds ``query/``, ``cand_pool/`` and ``instructions/``.

    Raises:
        UserInputError: If the folder, or a part of it that every dataset needs, is missing.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        if not self.source.is_dir():
            raise UserInputError(f"source={str(source)!r} is no folder; give the one that holds query/ and cand_pool/")
        for part in ("query", "cand_pool/local", "instructions/query_instructions.tsv"):
            if not (self.source / part).exists():
                raise UserInputError(f"{self.source / part} is missing; M-BEIR's layout needs it")

    def query_files(self, split: str) -> list[Path]:
        """The query files of a split, by name."""
        return sorted((self.source / "query" / split).glob(f"mbeir_*_{split}.jsonl"))

    def pool_files(self) -> Iterator[tuple[str, Path]]:
        """Pairs of (pool name, file): ``train``, and ``{task}/{split}`` for every task and evaluation split.

        A pool file that names no split serves val and test alike.
        """
        for path in sorted((self.source / "cand_pool" / "global").glob("mbeir_*_train_cand_pool.jsonl")):
            yield TRAIN_POOL, path
        for path in sorted((self.source / "cand_pool" / "local").glob("mbeir_*_cand_pool.jsonl")):
            match = re.fullmatch(r"mbeir_(.+_task\d+)(?:_(val|test))?_cand_pool\.jsonl", path.name)
            if match is None:
                raise UserInputError(f"{path} is no pool name; write mbeir_<dataset>_task<n>[_<split>]_cand_pool.jsonl")
            for split in [match[2]] if match[2] else ["val", "test"]:
                yield f"{match[1]}/{split}", path

    def candidates(self, path: Path) -> Iterator[CandidateRecord | BadRecord]:
        """Read a pool file; a line that cannot be used comes out as a :class:`BadRecord`."""
        return _records(path, _candidate)

    def queries(self, path: Path) -> Iterator[QueryRecord | BadRecord]:
        """Read a query file, likewise."""
        match = re.fullmatch(r"mbeir_(.+?)(?:_task\d+)?_(?:train|val|test)\.jsonl", path.name)
        dataset = match[1] if match else path.stem
        return _records(path, lambda record: _query(record, dataset))

    def qrels(self, split: str) -> dict[str, dict[str, tuple[str, ...]]]:
        """Positives of each qid by task name, from the qrels files of four or five columns; empty without files.

        Raises:
            UserInputError: If a line has fewer than four columns or a relevance that is no number.
        """
        judged: dict[str, dict[str, list[str]]] = {}
        for path in sorted((self.source / "qrels" / split).glob(f"mbeir_*_{split}_qrels.txt")):
            name = path.name.removeprefix("mbeir_").removesuffix(f"_{split}_qrels.txt")
            for number, line in enumerate(path.read_text().split("\n"), 1):
                columns = line.split()
                if not columns:
                    continue
                if len(columns) < 4 or not columns[3].lstrip("-").isdigit():
                    raise UserInputError(f"{path}:{number}: {line!r} is no qrels line; write 'qid 0 did 1 [task id]'")
                task = name if "_task" in name or len(columns) < 5 else f"{name}_task{columns[4]}"
                if int(columns[3]) > 0:
                    judged.setdefault(task, {}).setdefault(columns[0], []).append(columns[2])
        return {task: {qid: tuple(dids) for qid, dids in rows.items()} for task, rows in judged.items()}

    @property
    def instructions_file(self) -> Path:
        """The file of the prompts."""
        return self.source / "instructions" / "query_instructions.tsv"


def read_instructions(path: Path) -> dict[tuple[int, Modality, Modality], tuple[str, ...]]:
    """Read an instruction file.

    Returns:
        Prompts by (dataset id, query modality, wanted modality).

    Raises:
        UserInputError: If the file is empty, a line is malformed or a row has no prompt.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    prompts = {}
    for number, row in enumerate(rows, 2):
        texts = tuple(format_text(text) for text in row[4:] if text.strip())
        if len(row) < 5 or not row[3].strip().isdigit() or not texts:
            raise UserInputError(
                f"{path}:{number}: {len(row)} columns and {len(texts)} prompts; write query_modality, cand_modality, "
                "dataset_name, dataset_id (a number) and at least one prompt, separated by tabs"
            )
        prompts[int(row[3]), Modality.parse(row[0].strip()), Modality.parse(row[1].strip())] = texts
    if not prompts:
        raise UserInputError(f"{path} holds no instruction; add a header line and one line per kind of query")
    return prompts


def _records(path: Path, build: Any) -> Iterator[Any]:
    # Bytes: lines end at \n alone, not at U+2028 or U+0085, and one that is not UTF-8 is one bad record.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield build(json.loads(line))
            except json.JSONDecodeError as error:
                yield BadRecord(f"{path}:{number}", f"not JSON ({error.msg})")
            except UnicodeDecodeError as error:
                yield BadRecord(f"{path}:{number}", f"not UTF-8 ({error.reason})")
            except (UserInputError, KeyError, TypeError) as error:
                reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
                yield BadRecord(f"{path}:{number}", reason)


def _candidate(record: dict[str, Any]) -> CandidateRecord:
    encode_id(record["did"])
    modality, image = Modality.parse(record["modality"]), _text(record, "img_path")
    _check_image(modality, image, "img_path")
    return CandidateRecord(record["did"], format_text(_text(record, "txt")), image, modality)


def _query(record: dict[str, Any], dataset: str) -> QueryRecord:
    encode_id(record["qid"])
    modality, image = Modality.parse(record["query_modality"]), _text(record, "query_img_path")
    _check_image(modality, image, "query_img_path")
    positives = tuple(record.get("pos_cand_list") or ())
    for did in positives:
        encode_id(did)
    return QueryRecord(
        record["qid"],
        format_text(_text(record, "query_txt")),
        image,
        modality,
        Task(dataset, record["task_id"]),
        positives,
        tuple(record.get("neg_cand_list") or ()),
    )


def _text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserInputError(f"{key}={value!r} is no text; write a string or null")
    return value


def _check_image(modality: Modality, image: str | None, key: str) -> None:
    if (modality is not Modality.TEXT) != bool(image):
        raise UserInputError(f"modality={modality.value!r} does not fit {key}={image!r}")
