"""Reads M-BEIR's published on-disk layout, for the ten datasets of the benchmark and for any other in the same layout.

::

    query/{train,val,test}/mbeir_{dataset}[_task{n}]_{split}.jsonl
    query/union_train/mbeir_{name}_train.jsonl            the training queries up-sampled: lines stand there repeatedly
    cand_pool/local/mbeir_{dataset}_task{n}[_{split}]_cand_pool.jsonl
    cand_pool/global/mbeir_{name}_train_cand_pool.jsonl
    qrels/{train,val,test}/mbeir_{dataset}[_task{n}]_{split}_qrels.txt
    instructions/query_instructions.tsv
    mbeir_images/...                                      or, not extracted, mbeir_images.tar.gz.part-00, -01, ...
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lightning_mmembed.data.records import BadRecord, CandidateRecord, QueryRecord, read_records
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, Task, dataset_number, encode_id

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


class MBEIRLayout:
    """A source tree in M-BEIR's layout.

    Args:
        source: The folder that holds ``query/``, ``cand_pool/`` and ``instructions/``.

    Raises:
        UserInputError: If the folder, or a part of it that every dataset needs, is missing.
    """

    gives_negatives = False  # those of some datasets are spans and distractors of another task
    settings: tuple[Any, ...] = ()

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        if not self.source.is_dir():
            raise UserInputError(f"source={str(source)!r} is no folder; give the one that holds query/ and cand_pool/")
        for part in ("query", "cand_pool/local", "instructions/query_instructions.tsv"):
            if not (self.source / part).exists():
                raise UserInputError(f"{self.source / part} is missing; M-BEIR's layout needs it")

    def files(self) -> list[Path]:
        """Every file but the pictures."""
        folders = ("query", "cand_pool", "qrels", "instructions")
        return sorted(p for folder in folders for p in (self.source / folder).rglob("*") if p.is_file())

    def open_prompts(self) -> IO[bytes]:
        """Open the instruction file."""
        return open(self.instructions_file, "rb")

    def query_files(self, split: str) -> list[Path]:
        """The query files of a split, by name.

        Raises:
            UserInputError: If a file of queries there has another name: it would not be read.
        """
        paths = sorted((self.source / "query" / split).glob("[!.]*.jsonl"))
        for path in paths:
            if not re.fullmatch(rf"mbeir_.+_{split}\.jsonl", path.name):
                expected = f"mbeir_<dataset>[_task<n>]_{split}.jsonl"
                raise UserInputError(f"{path} is no name of a query file; write {expected}, or move it away")
        return paths

    def upsampled_files(self) -> list[Path]:
        """Files of training queries in which a query stands as often as it is to be trained on."""
        return sorted((self.source / "query" / "union_train").glob("mbeir_*_train.jsonl"))

    def pool_files(self) -> Iterator[tuple[str, Path]]:
        """Pairs of (pool name, file): ``train``, and ``{task}/{split}`` for every task and evaluation split.

        A pool file that names no split serves val and test alike. A dataset of one's own need not have a training
        pool: all its candidates are one.
        """
        local = list(self._local_pool_files())
        train = sorted((self.source / "cand_pool" / "global").glob("mbeir_*_train_cand_pool.jsonl"))
        for path in train or dict.fromkeys(path for _, path in local):
            yield TRAIN_POOL, path
        yield from local

    def _local_pool_files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted((self.source / "cand_pool" / "local").glob("mbeir_*_cand_pool.jsonl")):
            match = re.fullmatch(r"mbeir_(.+_task\d+)(?:_(val|test))?_cand_pool\.jsonl", path.name)
            if match is None:
                raise UserInputError(f"{path} is no pool name; write mbeir_<dataset>_task<n>[_<split>]_cand_pool.jsonl")
            for split in [match[2]] if match[2] else ["val", "test"]:
                yield f"{match[1]}/{split}", path

    def candidates(self, path: Path) -> Iterator[CandidateRecord | BadRecord]:
        """Read a pool file; a line that cannot be used comes out as a :class:`BadRecord`."""
        return read_records(path, lambda _, record: _candidate(record))

    def queries(self, path: Path) -> Iterator[QueryRecord | BadRecord]:
        """Read a query file, likewise."""
        if path.parent.name in SPLITS:
            dataset = dataset_of(path)
            return read_records(path, lambda _, record: _query(record, dataset))
        names = self.dataset_names()  # a file of several datasets
        return read_records(path, lambda _, record: _query(record, _dataset_of_qid(record["qid"], names)))

    def dataset_names(self) -> dict[int, str]:
        """Names of the datasets by id, in lower case, as the instruction file has them."""
        with open(self.instructions_file, encoding="utf-8") as file:
            rows = [line.split("\t") for line in file][1:]
        return {int(row[3]): row[2].strip().lower() for row in rows if len(row) > 3 and row[3].strip().isdigit()}

    def qrels(self, split: str, dataset: str = "*") -> dict[str, dict[str, tuple[str, ...]]]:
        """Positives of each qid by task name, from the qrels files of four or five columns; empty without files.

        Args:
            split: The split.
            dataset: Read the files of this dataset only.

        Raises:
            UserInputError: If a line has fewer than four columns, a malformed id or a relevance that is no number.
        """
        judged: dict[str, dict[str, list[str]]] = {}
        folder = self.source / "qrels" / split
        names = (f"mbeir_{dataset}_{split}_qrels.txt", f"mbeir_{dataset}_task[0-9]*_{split}_qrels.txt")
        for path in sorted({path for name in names for path in folder.glob(name)}):
            name = path.name.removeprefix("mbeir_").removesuffix(f"_{split}_qrels.txt")
            for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
                columns = line.split()
                if not columns:
                    continue
                if len(columns) < 4 or not columns[3].lstrip("-").isdigit():
                    raise UserInputError(f"{path}:{number}: {line!r} is no qrels line; write 'qid 0 did 1 [task id]'")
                try:
                    for identifier in (columns[0], columns[2]):
                        encode_id(identifier)
                except UserInputError as error:
                    raise UserInputError(f"{path}:{number}: {error}") from None
                task = name if "_task" in name or len(columns) < 5 else f"{name}_task{columns[4]}"
                if int(columns[3]) > 0:
                    judged.setdefault(task, {}).setdefault(columns[0], []).append(columns[2])
        return {task: {qid: tuple(dids) for qid, dids in rows.items()} for task, rows in judged.items()}

    @property
    def instructions_file(self) -> Path:
        """The file of the prompts."""
        return self.source / "instructions" / "query_instructions.tsv"


def read_instructions(file: IO[bytes]) -> dict[tuple[int, Modality, Modality], tuple[str, ...]]:
    """Read an instruction file.

    Args:
        file: The file, open to read.

    Returns:
        Prompts by (dataset id, query modality, wanted modality).

    Raises:
        UserInputError: If the file is empty, a line is malformed or a row has no prompt.
    """
    path = getattr(file, "name", "the instruction file")
    try:
        with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            rows = list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    except UnicodeDecodeError as error:
        raise UserInputError(f"{path} is not UTF-8 ({error}); write it in UTF-8") from error
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


def dataset_of(path: Path) -> str:
    """The dataset that a query file names.

    Example:
        >>> dataset_of(Path("mbeir_mscoco_task0_val.jsonl"))
        'mscoco'
    """
    match = re.fullmatch(r"mbeir_(.+?)(?:_task\d+)?_(?:train|val|test)\.jsonl", path.name)
    return match[1] if match else path.stem


def _candidate(record: dict[str, Any]) -> CandidateRecord:
    encode_id(record["did"])
    modality, image = Modality.parse(record["modality"]), _text(record, "img_path")
    _check_image(modality, image, "img_path")
    return CandidateRecord(record["did"], format_text(_text(record, "txt")), image, modality)


def _query(record: dict[str, Any], dataset: str) -> QueryRecord:
    encode_id(record["qid"])
    if type(record["task_id"]) is not int:  # true and 3.0 would pass for 1 and 3
        raise UserInputError(f"task_id={record['task_id']!r} of dataset {dataset!r} is no integer; use 0 to 8")
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


def _dataset_of_qid(qid: Any, names: dict[int, str]) -> str:
    number = dataset_number(encode_id(qid))
    if number not in names:
        raise UserInputError(f"qid={qid!r}: the instruction file has no line with dataset_id={number}; add one")
    return names[number]


def _text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserInputError(f"{key}={value!r} is no text; write a string or null")
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise UserInputError(f"{key}={value!r} holds half a character (a lone surrogate); write all of it") from None
    return value


def _check_image(modality: Modality, image: str | None, key: str) -> None:
    if (modality is not Modality.TEXT) != bool(image):
        raise UserInputError(f"modality={modality.value!r} does not fit {key}={image!r}")
    if image and (image.startswith("/") or ".." in image.split("/")):
        raise UserInputError(f"{key}={image!r} leads out of the source; write a path below it")
