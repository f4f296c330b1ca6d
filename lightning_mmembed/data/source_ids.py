"""Gives results back in the ids of a source that has its own, such as a folder in BEIR's layout."""

from __future__ import annotations

from pathlib import Path

from lightning_mmembed.data.shards import Shards
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import write_atomically


def write_run_in_source_ids(run: str | Path, shards: Shards, split: str, out: str | Path) -> Path:
    """Write a TREC run again with the ids of the source, to be scored with the source's own judgements.

    Args:
        run: A run that an evaluation wrote.
        shards: What was evaluated.
        split: The split.
        out: The file to write, with tabs between its columns: an id may hold spaces.

    Returns:
        ``out``.

    Raises:
        UserInputError: If a line names what the shards do not hold under another id.
    """
    queries, candidates = shards.source_ids(split), shards.source_ids()
    lines = []
    for number, line in enumerate(Path(run).read_text().splitlines(), 1):
        qid, _, did, *rest = line.split()
        if qid not in queries or did not in candidates:
            raise UserInputError(f"{run}:{number}: {qid} or {did} has no other id in {shards.directory}, {split} split")
        lines.append("\t".join([queries[qid], "Q0", candidates[did], *rest]) + "\n")
    return write_atomically(out, "".join(lines))
