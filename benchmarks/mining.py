"""Mining: against encoding once and searching exactly, and against sentence-transformers on the text tasks.

    python -m benchmarks.mining                                     the built-in benchmark and its tiny encoder
    python -m benchmarks.mining --shards S --checkpoint C           other shards, another encoder

The first comparison is over all training queries and the whole training pool. ``bare`` reads and encodes each item once
with ``encode`` and searches them exactly, and keeps nothing; ``mining`` is what ``mmembed-mine`` does after it has
loaded the encoder: vectors to disk, search, the paper's rule, audit, Parquet file.

The second is over the queries that are texts and want texts, and the texts of the pool. ``ours`` is the whole of mining
again, with the rule ``top_k``; ``sentence-transformers`` is its ``mine_hard_negatives`` with the same encoder, through
``lightning_mmembed.integrations.sentence_transformers``, both with the 10 best negatives of
the first 50. Its texts are in memory before the clock starts, ours are read from the shards. Both must choose the same
negatives, but for candidates of equal text, which it takes for one.

Every measurement runs in a process of its own; rounds alternate, so that a machine whose speed drifts slows all alike.
Figures are medians over the rounds, of times and of ratios within a round. Memory is the peak of the process, libraries
included. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from benchmarks.encoding import resident
from lightning_mmembed import MBEIRDataModule, MLLMEncoder
from lightning_mmembed.data import Shards, ShardTexts
from lightning_mmembed.data.mini import generate_mini
from lightning_mmembed.data.negatives import read_columns, write_negatives
from lightning_mmembed.encoders.tiny import tiny_encoder
from lightning_mmembed.items import TASK_MODALITIES, Modality
from lightning_mmembed.mining_rule import MiningRule
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.mine import mine_negatives, mining_facts
from lightning_mmembed.retrieval.pool import Pool, QuerySet
from lightning_mmembed.retrieval.search import search_pool

PAIRS = (("bare", "mining"), ("sentence-transformers", "ours"))
DEPTH, NEGATIVES = 50, 10


class Picked(Sequence[Any]):
    """Some of the items of a pool."""

    def __init__(self, items: Sequence[Any], rows: Sequence[int]) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        return self._items[self._rows[place]]


def mixed(shards: Shards) -> tuple[Pool, list[QuerySet]]:
    return shards.pool("train"), shards.query_sets("train")


def texts(shards: Shards) -> tuple[Pool, list[QuerySet]]:
    """The tasks from text to text, and the texts of the pool."""
    pool, sets = mixed(shards)
    inside = pool.modalities == Modality.TEXT.code
    items = Picked(pool.items, inside.nonzero().squeeze(1).tolist())
    sizes = None if pool.sizes is None else pool.sizes[inside]
    known = {"ids": pool.ids[inside], "modalities": pool.modalities[inside], "sizes": sizes}
    wanted = [some for some in sets if TASK_MODALITIES[some.task.task_id] == (Modality.TEXT, Modality.TEXT)]
    if not wanted:
        sys.exit(f"{shards.directory} has no training queries from text to text")
    return dataclasses.replace(pool, items=items, fingerprint="texts", local={}, **known), wanted


def bare(encoder: MLLMEncoder, pool: Pool, sets: list[QuerySet]) -> None:
    vectors = encoder.encode(pool.items)
    search_pool([(encoder.encode(some.queries), (None,)) for some in sets], vectors, DEPTH)


def mining(encoder: MLLMEncoder, pool: Pool, sets: list[QuerySet], rule: MiningRule, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as vectors:
        store, made_by = VectorStore(vectors, show_progress=False), encoder_fingerprint(encoder)
        columns, audit = mine_negatives(encoder, pool, sets, store, made_by, rule)
        write_negatives(out, columns, mining_facts(store, pool, sets, made_by, rule), audit)


def theirs(encoder: MLLMEncoder, pool: Pool, sets: list[QuerySet]) -> Any:
    """What calls sentence-transformers, all texts read."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from lightning_mmembed.integrations.sentence_transformers import EncoderModule

    corpus = [candidate.item.text for candidate in pool.items]
    tasks = []
    for some in sets:
        queries = list(some.queries)
        pairs = [
            (query.item.text, corpus[row])
            for query, rows in zip(queries, pool.rows_of(some.positives).tolist(), strict=True)
            for row in rows
            if row >= 0
        ]
        asked = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]})
        tasks.append((asked, queries[0].instruction))
    model = SentenceTransformer(modules=[EncoderModule(encoder)], similarity_fn_name="cosine")

    def run() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for asked, instruction in tasks:
            settings = {"range_max": DEPTH, "num_negatives": NEGATIVES, "output_format": "n-tuple", "verbose": False}
            rows = mine_hard_negatives(asked, model, corpus=corpus, query_prompt=instruction, **settings)
            for row in rows:
                found[row["anchor"]] = [row[f"negative_{n + 1}"] for n in range(NEGATIVES)]
        return found

    return run


def measure(method: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one method in this process."""
    encoder, shards = loaded(folder, options), Shards(options.shards)
    pool, sets = mixed(shards) if method in PAIRS[0] else texts(shards)
    encoder.encode(pool.items[: min(64, len(pool.items))] if method in PAIRS[0] else [pool.items[0]])  # warms up
    out = folder / f"{method}.parquet"
    rule = MiningRule() if method == "mining" else MiningRule("top_k", k=DEPTH, num_negatives=NEGATIVES)
    run = theirs(encoder, pool, sets) if method == "sentence-transformers" else None
    loading, before = resident("VmHWM"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    clock, cpu = time.perf_counter(), time.process_time()
    if method == "bare":
        bare(encoder, pool, sets)
    elif run is None:
        mining(encoder, pool, sets, rule, out)
    else:
        (folder / "theirs.json").write_text(json.dumps(run()))
    found = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    found |= {"peak": max(loading, resident("VmHWM")), "rise": resident("VmHWM") - before}
    return found | {"queries": sum(map(len, sets)), "candidates": len(pool.items)}


def loaded(folder: Path, options: argparse.Namespace) -> MLLMEncoder:
    if options.checkpoint:
        encoder = MLLMEncoder.from_pretrained(options.checkpoint)
    else:
        encoder = tiny_encoder(folder / "tiny", ShardTexts(options.shards), {}, max_length=64, length_buckets=8)
    return encoder.to(options.device).eval()


def agreement(folder: Path, shards: Shards) -> float:
    """Share of the negatives that sentence-transformers chose that ours are, too, by their text."""
    pool, sets = texts(shards)
    written = {int(did): pool.items[row].item.text for row, did in enumerate(pool.ids.tolist())}
    columns, found = read_columns(folder / "ours.parquet"), json.loads((folder / "theirs.json").read_text())
    shared = []
    for some in sets:
        for qid, query in zip(some.ids.tolist(), some.queries, strict=True):
            if query.item.text in found:
                own = {written[int(did)] for did in columns["did"][columns["qid"] == qid]}
                shared.append(len(own & set(found[query.item.text])) / len(set(found[query.item.text])))
    return float(np.mean(shared))


def compare(folder: Path, options: argparse.Namespace) -> None:
    given = [f"--shards={options.shards}", f"--device={options.device}"]
    given += [f"--checkpoint={options.checkpoint}"] if options.checkpoint else []
    for pair in PAIRS:
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in pair}
        for number in range(options.rounds):
            for method in pair:
                command = [sys.executable, "-m", "benchmarks.mining", "--measure", method, str(folder), *given]
                runs[method].append(
                    json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL).splitlines()[-1])
                )
            seconds = ", ".join(f"{method} {some[-1]['seconds']:.1f} s" for method, some in runs.items())
            print(f"round {number}: {seconds}", file=sys.stderr)
        first = runs[pair[0]][0]
        print(f"{first['queries']:,} queries, {first['candidates']:,} candidates")
        for method, some in runs.items():
            middle = {key: statistics.median(run[key] for run in some) for key in some[0]}
            print(
                f"  {method}: {middle['seconds']:.1f} s, CPU {middle['cpu']:.1f} s, peak {middle['peak']:.0f} MiB, "
                f"{middle['rise']:.0f} of them for the work"
            )
        for key, name in (("seconds", "the clock"), ("cpu", "CPU time")):
            ratios = [one[key] / other[key] for one, other in zip(*runs.values(), strict=True)]
            if pair is PAIRS[0]:
                ratios = [1 / ratio for ratio in ratios]
            summary = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"  {'mining / bare' if pair is PAIRS[0] else 'times faster'} by {name}: {summary}", flush=True)
    print(f"  {100 * agreement(folder, Shards(options.shards)):.2f} % of its negatives are ours, too")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="folder of shards; by default those of the built-in benchmark, made anew")
    parser.add_argument("--checkpoint", help="an encoder; by default the tiny one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.measure:
        method, folder = options.measure
        print(json.dumps(measure(method, Path(folder), options)))
        return
    with tempfile.TemporaryDirectory() as name:
        if options.shards is None:
            options.shards = f"{name}/shards"
            MBEIRDataModule(options.shards, generate_mini(f"{name}/mini")).prepare_data()
        compare(Path(name), options)


if __name__ == "__main__":
    main()
