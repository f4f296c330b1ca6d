"""The manifest of finished shards: what they hold, what was left out, and of which source they are."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from lightning_mmembed.data.layout import SPLITS, MBEIRLayout
from lightning_mmembed.data.pictures import extracted_picture, picture_problem
from lightning_mmembed.data.places import Place
from lightning_mmembed.data.records import Layout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import fingerprint, read_json
from lightning_mmembed.items import encode_id

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
INDEX_FILE, MANIFEST_FILE, INSTRUCTIONS_FILE = "index.parquet", "manifest.json", "instructions.tsv"
#: The negatives that a text-to-text source gives for its training queries.
NEGATIVES_FILE = "negatives.parquet"


def read_manifest(place: Place) -> dict[str, Any]:
    """Read the manifest of finished shards.

    Raises:
        UserInputError: If there is none, or one that cannot be read or is of another version.
    """
    content, again = place.read(MANIFEST_FILE), f"make the shards with mmembed-shard source=... out={place.location}"
    if content is None:
        raise UserInputError(f"{place.location}/{MANIFEST_FILE} is missing; {again}")
    try:
        manifest: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise UserInputError(f"{place.location}/{MANIFEST_FILE} is no JSON ({error}); {again}") from error
    if manifest["version"] != FORMAT_VERSION:
        raise UserInputError(
            f"{place.location} holds shards of version {manifest['version']}, not {FORMAT_VERSION}; {again}"
        )
    return manifest


def left_out(manifest: dict[str, Any], split: str | None = None) -> list[int]:
    """Encoded ids of the records that were read and then left out: for a broken picture, or as nothing answers them.

    A line that could not be read is known by its file and number instead.

    Args:
        manifest: Of the shards.
        split: Queries of this split; by default candidates.

    Example:
        >>> bad = [{"record": "9:1"}, {"record": "test 9:2"}, {"record": "pool.jsonl:7"}]
        >>> left_out({"bad_records": bad}), left_out({"bad_records": bad}, "test")
        ([90000000001], [90000000002])
    """
    pattern = re.compile(rf"{f'{split} ' if split else ''}(\d+:\d+)")
    found = (pattern.fullmatch(bad["record"]) for bad in manifest["bad_records"])
    return [encode_id(match[1]) for match in found if match]


def named(bad_records: list[dict[str, str]], shown: int = 3) -> str:
    """Say how many records were left out, and which are the first, and why.

    Example:
        >>> named([{"record": "9:1", "reason": "picture 1.jpg is missing"}])
        '1 record left out (9:1: picture 1.jpg is missing)'
    """
    first = [f"{bad['record']}: {bad['reason']}" for bad in bad_records[:shown]]
    more = [f"and more: see bad_records in {MANIFEST_FILE}"] if len(bad_records) > shown else []
    why = f" ({'; '.join(first + more)})" if first else ""
    return f"{len(bad_records):,} record{'' if len(bad_records) == 1 else 's'} left out{why}"


def summary(manifest: dict[str, Any]) -> str:
    """What shards hold and what they lack, in a line.

    Example:
        >>> counts = {"candidates": 5000, "queries": {"a_task0/train": 9, "a_task1/train": 1, "a_task0/test": 3}}
        >>> summary({"counts": counts, "bad_records": []})
        '5,000 candidates; queries: 10 train, 0 val, 3 test; 0 records left out'
        >>> summary({"counts": counts, "bad_records": [], "noted": {"queries without judgements": 2}})
        '5,000 candidates; queries: 10 train, 0 val, 3 test; 0 records left out; 2 queries without judgements'
    """
    counts = manifest["counts"]
    queries = {
        split: sum(count for name, count in counts["queries"].items() if name.endswith(f"/{split}")) for split in SPLITS
    }
    asked = ", ".join(f"{count:,} {split}" for split, count in queries.items())
    parts = [f"{counts['candidates']:,} candidates", f"queries: {asked}", named(manifest["bad_records"])]
    return "; ".join([*parts, *(f"{number:,} {what}" for what, number in manifest.get("noted", {}).items())])


def source_fingerprint(layout: Layout, parts: list[Path], *settings: Any) -> str:
    """Fingerprint of names, sizes and times of a source's files other than extracted pictures, and of the settings."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in [*layout.files(), *parts]]
    return fingerprint(FORMAT_VERSION, str(layout.source.resolve()), stats, (*settings, *layout.settings))


def finished_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of shards of any version; None where there are none."""
    manifest: dict[str, Any] | None = read_json(directory / MANIFEST_FILE)
    return manifest


def hold_the_records_of(directory: str | Path, source: str | Path) -> bool:
    """Whether finished shards were made of the records of a source as they are now.

    They may have been made from an archive of pictures that lies elsewhere or is gone, in larger or smaller files, and
    with more or less that may be left out.

    Args:
        directory: Folder of the shards.
        source: Folder in M-BEIR's layout.

    Raises:
        UserInputError: If the source is no such folder or incomplete.
    """
    layout, manifest = MBEIRLayout(source), finished_manifest(Path(directory))
    if manifest is None or manifest.get("records") != source_fingerprint(layout, []):
        return False
    return not has_mended_pictures(manifest, layout)


def has_mended_pictures(manifest: dict[str, Any], layout: Layout) -> bool:
    """Whether a picture of the source's folder that records were left out for can be used now.

    Other pictures are not looked at, nor an archive, of which nothing less than all can be read.
    """
    for name in [] if manifest["archive"] else manifest["broken_pictures"]:
        if picture_problem(extracted_picture(layout.source, name)) is None:
            log.info("picture %s can be used now: the shards that left its records out are made again", name)
            return True
    return False
