"""The built-in benchmark with candidates that answer training queries and are labelled for none.

Large pools hold many: other pictures of the garment, the same news twice. Here every labelled positive of a training
query comes into the training pool again, so many times, under other ids. Queries, labels and all other pools stay as
they are, so that figures on validation and test queries compare with those of the benchmark itself.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.files import write_atomically

COPIES = 10


def generate_unlabelled(out: str | Path, copies: int = COPIES, seed: int = 0) -> Path:
    """Write the benchmark with unlabelled copies of the positives to ``out``, or return at once if it stands there.

    Args:
        out: Root of the tree, in M-BEIR's layout.
        copies: Of each candidate that is a positive of a training query.
        seed: Of the world.
    """
    root = generate_mini(out, seed)
    (path,) = (root / "cand_pool" / "global").glob("*_train_cand_pool.jsonl")
    pool = [json.loads(line) for line in path.read_text().splitlines()]
    # A did is the number of the dataset and one within it; those of the copies come after all others.
    labelled = {did for queries in (root / "query" / "train").glob("*.jsonl") for did in positives(queries)}
    own = [candidate for candidate in pool if "copy_of" not in candidate]
    numbers = itertools.count(1 + max(int(candidate["did"].partition(":")[2]) for candidate in own))
    added = [
        {**candidate, "did": f"{candidate['did'].partition(':')[0]}:{next(numbers)}", "copy_of": candidate["did"]}
        for candidate in own
        if candidate["did"] in labelled
        for _ in range(copies)
    ]
    if pool != own + added:
        write_atomically(path, "".join(json.dumps(candidate) + "\n" for candidate in own + added))
    return root


def positives(queries: Path) -> set[str]:
    """The ids that a file of queries labels."""
    return {did for line in queries.read_text().splitlines() for did in json.loads(line)["pos_cand_list"]}
