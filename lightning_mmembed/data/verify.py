"""Checks finished shards: every byte against the manifest, every row of the index against what it points at."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from lightning_mmembed.data.instructions import Instructions
from lightning_mmembed.data.layout import read_instructions
from lightning_mmembed.data.manifest import INDEX_FILE, INSTRUCTIONS_FILE, MANIFEST_FILE, named, read_manifest
from lightning_mmembed.data.places import Place
from lightning_mmembed.data.published_counts import published_sizes
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint
from lightning_mmembed.items import Modality, Task, dataset_number, decode_id
from lightning_mmembed.progress import progress_bar


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be; ``of_source`` where the source was short and the shards are as it was."""

    what: str
    expected: str
    found: str
    of_source: bool = False

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Count:
    """Records of a kind: in the index, in the manifest and in M-BEIR as published; None where nothing is stated."""

    what: str
    counted: int
    manifest: int | None
    published: int | None

    @property
    def is_sound(self) -> bool:
        """Whether all that is stated is what was counted."""
        return {self.manifest, self.published} <= {self.counted, None}


@dataclass(frozen=True)
class Verification:
    """What was counted, what is wrong and what was left out; without a finding the shards are sound."""

    source: str
    counts: list[Count]
    findings: list[Finding]
    left_out: list[dict[str, str]]

    def report(self, directory: str | Path) -> str:
        """The findings, and what to do about them."""
        again = f"mmembed-shard source={self.source} out={directory}"
        if not all(finding.of_source for finding in self.findings):
            head, advice = "are not sound", f"Remove {directory}, then make them again with {again}"
        else:
            head = "are as they were written, but have not M-BEIR's published counts"
            advice = (
                f"{named(self.left_out)}. If no more than that is missing, verify with published=false; if more is, "
                f"{again} published_counts=true says where the source is short"
            )
        findings = "\n  ".join(str(finding) for finding in self.findings)
        return f"the shards in {directory} {head}:\n  {findings}\n{advice}"


def verify_shards(directory: str | Path, published: bool | None = None, show_progress: bool = True) -> Verification:
    """Check shards against their manifest, and M-BEIR's against its published counts.

    Every file is read once. Memory holds one shard and the columns of the index that say where records lie.

    Args:
        directory: The shards: a folder, or a URL that fsspec reads.
        published: Compare with M-BEIR's published counts; None: if the shards hold its 16 tasks and at least half of
            its records.
        show_progress: Show a progress bar with rate and ETA, in bytes.

    Returns:
        Counts and findings.

    Raises:
        UserInputError: If there is no manifest, or one that cannot be read.
    """
    place = Place(directory)
    manifest = read_manifest(place)
    findings: list[Finding] = []
    counts: list[Count] = []
    index = place.read(INDEX_FILE)
    columns: dict[str, np.ndarray] = {}
    kinds: list[tuple[int, int, str]] = []
    try:
        with pq.ParquetFile(io.BytesIO(index or b"")) as table:
            columns = _columns(table)
            counts = _counts(table, manifest["counts"], published)
            kinds = _query_kinds(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        findings.append(Finding(INDEX_FILE, "a Parquet file", "none" if index is None else str(error)))
    findings += _check_small_files(place, manifest, index, kinds)
    findings += _check_places(columns, len(manifest["shards"])) if columns else []
    with progress_bar(show_progress) as progress:
        findings += _check_shards(place, manifest["shards"], columns, progress)
    findings += _check_counts(counts)
    return Verification(manifest["source"], counts, findings, manifest["bad_records"])


def counts_table(counts: list[Count]) -> Table:
    """The counts, to print."""
    table = Table("", *("manifest", "counted", "published", "sound"))
    for column in table.columns[1:4]:
        column.justify = "right"
    for count in counts:
        numbers = (count.manifest, count.counted, count.published)
        shown = ("" if number is None else f"{number:,}" for number in numbers)
        table.add_row(count.what, *shown, "yes" if count.is_sound else "no")
    return table


def _columns(index: Any) -> dict[str, np.ndarray]:
    """Where each row's record and picture lie, by column."""
    names = ("id", "shard", "offset", "size", "image_shard", "image_offset", "image_size")
    table = index.read(columns=[*names, "split"])
    columns = {name: table[name].to_numpy() for name in names}
    return columns | {"is_query": pc.not_equal(table["split"], "").to_numpy()}


def _counts(index: Any, stated: dict[str, dict[str, int]], published: bool | None) -> list[Count]:
    """Count pools and queries in the index, a batch of rows at a time."""
    pools = list(stated["pools"])
    in_test = [number for number, name in enumerate(pools) if name.endswith("/test")]
    members, queries = np.zeros(len(pools), dtype=np.int64), Counter[str]()
    union, lines = 0, 0
    for batch in index.iter_batches(columns=["split", "task", "pools", "weight"]):
        numbers, rows = batch["pools"].flatten().to_numpy(), pc.list_parent_indices(batch["pools"]).to_numpy()
        members += np.bincount(numbers[(numbers >= 0) & (numbers < len(pools))], minlength=len(pools))
        union += len(np.unique(rows[np.isin(numbers, in_test)]))
        splits = batch["split"].to_pylist()
        queries.update(
            f"{task}/{split}" for task, split in zip(batch["task"].to_pylist(), splits, strict=True) if split
        )
        lines += int(batch["weight"].to_numpy()[pc.equal(batch["split"], "train").to_numpy(False)].sum())
    found = {f"pool {name}": int(count) for name, count in zip(pools, members, strict=True)}
    found |= {f"queries {name}": count for name, count in queries.items()}
    training = sum(count for name, count in queries.items() if name.endswith("/train"))
    found |= {"pool test": union, "queries train": training, "training lines": lines}
    in_manifest = {f"pool {name}": count for name, count in stated["pools"].items()}
    in_manifest |= {f"queries {name}": count for name, count in stated["queries"].items()}
    sizes = published_sizes()
    is_full = sizes.keys() <= found.keys() and 2 * sum(found[what] for what in sizes) >= sum(sizes.values())
    if not (is_full if published is None else published):
        sizes = {}
    names = dict.fromkeys([*in_manifest, *found, *sizes])
    return [Count(name, found.get(name, 0), in_manifest.get(name), sizes.get(name)) for name in names]


def _query_kinds(index: Any) -> list[tuple[int, int, str]]:
    """What the prompts of queries go by: an id, the modality's code and the task of each kind."""
    kinds: dict[tuple[int, int, str], int] = {}
    for batch in index.iter_batches(columns=["id", "modality", "task"]):
        rows = pa.Table.from_batches([batch]).filter(pc.not_equal(batch["task"], ""))
        rows = rows.append_column("dataset", pa.array(dataset_number(rows["id"].to_numpy())))
        firsts = rows.group_by(["dataset", "modality", "task"]).aggregate([("id", "min")])
        for row in firsts.to_pylist():
            kinds.setdefault((row["dataset"], row["modality"], row["task"]), row["id_min"])
    return [(code, modality, task) for (_, modality, task), code in kinds.items()]


def _check_counts(counts: list[Count]) -> list[Finding]:
    findings = []
    for count in counts:
        if count.manifest not in (None, count.counted):
            stated = f"{count.manifest:,} as in {MANIFEST_FILE}"
            findings.append(Finding(count.what, stated, f"{count.counted:,} in {INDEX_FILE}"))
        if count.published not in (None, count.counted):
            findings.append(Finding(count.what, f"{count.published:,} as published", f"{count.counted:,}", True))
    return findings


def _check_small_files(
    place: Place, manifest: dict[str, Any], index: bytes | None, kinds: list[tuple[int, int, str]]
) -> list[Finding]:
    """Check what the fingerprint is of, and that the instructions can be read and serve every query."""
    instructions = place.read(INSTRUCTIONS_FILE)
    findings = []
    try:
        prompts = Instructions(read_instructions(io.BytesIO(instructions or b"")))
        for code, modality, task in kinds:
            prompts.choices(decode_id(code), list(Modality)[modality], Task.parse(task))
    except UserInputError as error:
        found = "none" if instructions is None else str(error)
        findings.append(Finding(INSTRUCTIONS_FILE, "prompts for every query", found))
    sums = [hashlib.sha256(content or b"").hexdigest() for content in (index, instructions)]
    content = fingerprint(manifest["shards"], sums)
    if content != manifest["fingerprint"]:
        what = f"fingerprint of {INDEX_FILE}, {INSTRUCTIONS_FILE} and the checksums in {MANIFEST_FILE}"
        findings.append(Finding(what, manifest["fingerprint"], content))
    return findings


def _check_places(columns: dict[str, np.ndarray], num_shards: int) -> list[Finding]:
    """Find rows that point at no shard."""
    shard, image_shard = columns["shard"], columns["image_shard"]
    lost = (shard < 0) | (shard >= num_shards) | (image_shard >= num_shards)
    lost |= (image_shard < 0) != (columns["image_size"] <= 0)
    if not lost.any():
        return []
    first = decode_id(int(columns["id"][lost.argmax()]))
    found = f"{int(lost.sum()):,} rows that name another; the first is that of {first}"
    return [Finding(INDEX_FILE, f"shards 0 to {num_shards - 1}", found)]


def _check_shards(
    place: Place, shards: list[dict[str, Any]], columns: dict[str, np.ndarray], progress: Progress
) -> list[Finding]:
    findings = []
    bar = progress.add_task("checking shards", total=sum(shard["size"] for shard in shards))
    for number, shard in enumerate(shards):
        name, data = shard["file"], place.read(shard["file"])
        progress.advance(bar, shard["size"])
        if data is None:
            findings.append(Finding(name, f"{shard['size']:,} bytes", "no such file"))
            continue
        if len(data) != shard["size"]:
            findings.append(Finding(name, f"{shard['size']:,} bytes", f"{len(data):,}"))
        elif (checksum := hashlib.sha256(data).hexdigest()) != shard["sha256"]:
            findings.append(Finding(name, f"SHA-256 {shard['sha256']}", checksum))
        findings += _check_rows(name, number, data, columns) if columns else []
    return findings


def _check_rows(name: str, number: int, data: bytes, columns: dict[str, np.ndarray]) -> list[Finding]:
    """Check what the rows of a shard point at: one finding for all bad ones, for a bad index has millions."""
    rows = np.flatnonzero((columns["shard"] == number) | (columns["image_shard"] == number))
    problems = []
    for row in rows:
        values = {column: int(content[row]) for column, content in columns.items()}
        problem = None
        if values["shard"] == number:
            problem = _record_problem(data, values)
        if values["image_shard"] == number:
            problem = problem or _picture_problem(data, values)
        if problem:
            problems.append(f"{decode_id(values['id'])} {problem}")
    if not problems:
        return []
    found = f"{len(problems):,} that are not; the first: {problems[0]}"
    return [Finding(name, f"{len(rows):,} records and pictures of {INDEX_FILE} to be there", found)]


def _record_problem(data: bytes, row: dict[str, int]) -> str | None:
    content = data[row["offset"] : row["offset"] + row["size"]]
    if row["offset"] < 0 or len(content) != row["size"]:
        return "lies past the end"
    try:
        record = json.loads(content)
    except ValueError:
        return "is no JSON"
    key, picture = ("qid", "query_img_path") if row["is_query"] else ("did", "img_path")
    if not isinstance(record, dict) or record.get(key) != decode_id(row["id"]):
        return "is another record"
    return None if bool(record.get(picture)) == (row["image_size"] > 0) else "has a picture in one place only"


def _picture_problem(data: bytes, row: dict[str, int]) -> str | None:
    content = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
    if row["image_offset"] < 0 or len(content) != row["image_size"]:
        return "has a picture that lies past the end"
    try:
        with Image.open(io.BytesIO(content)):  # reads the head only
            return None
    except Exception:  # PIL raises many kinds of errors on broken files
        return "has a picture that does not start like one"
