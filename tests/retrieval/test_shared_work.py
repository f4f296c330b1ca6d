"""Any number of processes, with whole weights each or with shared ones, embed, rank and mine as one process does."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worlds import in_processes
from PIL import Image
from worlds import Entries

from lightning_mmembed import Candidate, Item, MLLMEncoder, Query
from lightning_mmembed.distributed import ALONE, Processes
from lightning_mmembed.items import Modality, Task, encode_id
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval import embed
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.evaluate import evaluate_retrieval
from lightning_mmembed.retrieval.mine import mine_negatives
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import SearchSettings

pytest.importorskip("faiss")
pytestmark = pytest.mark.slow  # starts many processes

#: How many candidates, and how many queries of each of two tasks.
SIZES = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (7, 1, 7), (7, 64, 0), (64, 0, 7), (64, 64, 1)]

#: Number of processes, and whether they share the weights out, too.
GROUPS = [(2, False), (3, False), (4, False), (2, True), (3, True)]

#: Entries of a part.
PART = 5


def item(number: int) -> Item:
    """Texts of many lengths, every third one twice, and now and then a picture."""
    number -= number % 3 == 1
    text = " ".join(("a pet", "is", "red")[: 1 + number % 3] * (1 + number % 4))
    if number % 4:
        return Item(text)
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 24), (number, 90, 200)).save(file, "PNG")
    return Item(text, file.getvalue())


def world(candidates: int, queries: tuple[int, int]) -> tuple[Pool, list[QuerySet]]:
    items = Entries([Candidate(item(number), f"7:{number}") for number in range(candidates)])
    ids = torch.tensor([encode_id(candidate.did) for candidate in items], dtype=torch.long)
    codes = torch.arange(candidates, dtype=torch.int8) % len(Modality)
    sizes = torch.tensor([len(candidate.item.text or "") for candidate in items], dtype=torch.long)
    pool = Pool("tiny", ids, codes, {"pets_task0": torch.arange(candidates) % 2 == 0}, items, str(candidates), sizes)
    sets = []
    for task, count in zip((Task.parse("pets_task0"), Task.parse("pets_task1")), queries, strict=True):
        asked = Entries([Query(item(n + 5), "Find it.", f"7:{n}") for n in range(count)])  # type: ignore[arg-type]
        positives = [[encode_id(f"7:{(3 * n) % (candidates + 1)}")] for n in range(count)]
        numbers = torch.tensor([encode_id(query.qid) for query in asked], dtype=torch.long)  # type: ignore[attr-defined]
        sets.append(QuerySet(task, numbers, positives, asked, f"{task.name} {count}"))  # type: ignore[arg-type]
    return pool, sets


def outcome(encoder: MLLMEncoder, folder: Path, processes: Processes, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """What a process has computed, and what it has found, like all others."""
    pool, sets = world(sizes[0], sizes[1:])
    store = VectorStore(folder, batch_size=3, dtype="float32", processes=processes, show_progress=False)
    made_by = encoder_fingerprint(encoder)
    result = evaluate_retrieval(encoder, pool, sets, store, made_by, ("hit@5", "recall@10", "mrr@10"))
    rough = evaluate_retrieval(
        encoder, pool, sets, store, made_by, ("hit@5",), SearchSettings("ivf", nlist=2, nprobe=1)
    )
    columns, audit = mine_negatives(encoder, pool, sets, store, made_by, MiningRule(k=8, k_prime=4))
    found = [
        [task, where, ranking.rows.tolist(), ranking.scores.tolist()]
        for some in (result, rough)
        for task, outcome in some.tasks.items()
        for where, ranking in outcome.rankings.items()
    ]
    mined = {name: values.tolist() for name, values in columns.items()}
    figures = [result.metrics, rough.metrics, rough.search_info]
    same = {"made_by": made_by, "figures": figures, "found": found, "mined": mined, "audit": audit}
    read = [entries.read for entries in (pool.items, *(some.queries for some in sets))]  # type: ignore[attr-defined]
    return {"same": json.dumps(same), "read": read}  # as text, in which a mean of nothing equals another


def files(folder: Path) -> dict[str, str]:
    """What lies in a folder of vectors."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def work(processes: Processes, folder: Path, checkpoint: Path, sharded: bool) -> None:
    """What each process of a group does."""
    embed.PART_SIZE, encoder = PART, MLLMEncoder.from_pretrained(checkpoint, max_length=48)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh

        from lightning_mmembed.encoders.sharding import shard

        shard(encoder, init_device_mesh("cpu", (processes.size,)), "32-true")
    for sizes in SIZES:
        found = outcome(encoder, folder / str(sizes), processes, sizes)
        (folder / f"{sizes} {processes.rank}.json").write_text(json.dumps(found))
    # Of what one process has lost, the others have all of their shares already.
    processes.barrier()
    if processes.rank == 0:
        lost(folder / str(SIZES[-1])).unlink()
    processes.barrier()
    found = outcome(encoder, folder / str(SIZES[-1]), processes, SIZES[-1])
    (folder / f"again {processes.rank}.json").write_text(json.dumps(found))


def lost(folder: Path) -> Path:
    """A part of a pool."""
    return next(path for path in sorted(folder.rglob("part-00002.npy")))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Any]:
    """What one process finds and writes."""
    folder, encoder = tmp_path_factory.mktemp("alone"), MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(embed, "PART_SIZE", PART)
        return {
            sizes: (outcome(encoder, folder / str(sizes), ALONE, sizes), files(folder / str(sizes))) for sizes in SIZES
        }


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]}-{'sharded' if group[1] else 'whole'}")
def group(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of processes of a group, and what they have found and written."""
    size, sharded = request.param
    folder = tmp_path_factory.mktemp("shared")
    in_processes(size, work, folder, tiny_checkpoint, sharded)
    return size, folder


@pytest.mark.parametrize("sizes", SIZES)
def test_processes_find_and_write_what_one_process_does_and_encode_nothing_twice(
    expected: dict[tuple[int, int, int], Any], group: tuple[int, Path], sizes: tuple[int, int, int]
) -> None:
    (alone, written), (size, folder) = expected[sizes], group
    found = [json.loads((folder / f"{sizes} {rank}.json").read_text()) for rank in range(size)]
    for one in found:
        assert one["same"] == alone["same"]
    for number, read in enumerate(alone["read"]):
        assert sorted(row for one in found for row in one["read"][number]) == sorted(read)
    assert files(folder / str(sizes)) == written


def test_a_part_that_was_lost_is_computed_again_by_one_process_alone(
    expected: dict[tuple[int, int, int], Any], group: tuple[int, Path]
) -> None:
    (alone, written), (size, folder) = expected[SIZES[-1]], group
    found = [json.loads((folder / f"again {rank}.json").read_text()) for rank in range(size)]
    assert sorted(len(one["read"][0]) for one in found) == [*[0] * (size - 1), PART]
    assert all(one["same"] == alone["same"] for one in found)
    assert files(folder / str(SIZES[-1])) == written


def test_large_shares_differ_by_a_part_at_most(group: tuple[int, Path]) -> None:
    size, folder = group
    found = [json.loads((folder / f"{SIZES[-1]} {rank}.json").read_text()) for rank in range(size)]
    rows = [sum(map(len, one["read"])) for one in found]
    assert max(rows) - min(rows) <= PART
