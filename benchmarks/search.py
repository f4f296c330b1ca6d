"""Exact search over vectors on disk, against a bare loop and against FAISS.

    python -m benchmarks.search                                      2,000 queries x 1,000,000 x 512, k = 50
    python -m benchmarks.search --rows 100000 --queries 500          a smaller one

The vectors are random, float16, in parts on disk, and in the page cache when they are searched. Every measurement runs
in a process of its own, so that its peak memory (libraries included) is its own; rounds alternate, so that a machine
whose speed drifts slows all alike; the ratios of the medians are the figures. Times run from opening the files to the
final lists; for what needs the whole matrix in float32, the time from when that is in memory is given, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from lightning_mmembed.retrieval.embed import PART_SIZE
from lightning_mmembed.retrieval.search import SearchSettings, exact_search
from lightning_mmembed.retrieval.vectors import Vectors

METHODS = ("torch", "faiss", "torch in memory", "bare loop", "IndexFlatIP", "faiss.knn")
OURS = METHODS[:3]


def generate(folder: Path, rows: int, queries: int, dim: int) -> None:
    """Random unit vectors, a part at a time."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("pool", rows), ("queries", queries)):
        for number, start in enumerate(range(0, count, PART_SIZE)):
            part = torch.randn(min(PART_SIZE, count - start), dim, generator=generator)
            np.save(folder / f"{name}-{number:05d}.npy", torch.nn.functional.normalize(part, dim=1).half().numpy())


def opened(folder: Path, name: str, dim: int) -> Vectors:
    return Vectors(sorted(folder.glob(f"{name}-*.npy")), dim)


def bare_loop(queries: torch.Tensor, pool: Vectors, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read, to float32, multiply, topk of each block, topk of all; in the same blocks and without new memory."""
    settings = SearchSettings()
    queries = queries.float()
    block = torch.empty(settings.pool_block, queries.shape[1])
    scores = torch.empty(settings.query_block * settings.pool_block)
    tops: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in queries.split(settings.query_block)]
    for start in range(0, len(pool), settings.pool_block):
        part = pool.read(start, start + settings.pool_block)
        vectors = block[: len(part)].copy_(part)
        for some, found in zip(queries.split(settings.query_block), tops, strict=True):
            out = scores[: len(some) * len(vectors)].view(len(some), len(vectors))
            values, columns = torch.mm(some, vectors.T, out=out).topk(min(k, len(vectors)), dim=1)
            found.append((values, columns + start))
    final = []
    for found in tops:
        values, order = torch.cat([v for v, _ in found], 1).topk(k, dim=1)
        final.append((values, torch.cat([r for _, r in found], 1).gather(1, order)))
    return torch.cat([v for v, _ in final]), torch.cat([r for _, r in final])


def search_in_memory(
    method: str, queries: torch.Tensor, pool: Vectors, k: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Search the whole matrix in float32, and the seconds from when it is in memory."""
    import faiss

    matrix = torch.empty(pool.shape)
    pool.copy_to(matrix, 0)
    start = time.perf_counter()
    if method == "torch in memory":
        ranking = exact_search(queries, matrix, k)[0]
        return ranking.scores, ranking.rows, time.perf_counter() - start
    if method == "faiss.knn":
        scores, rows = faiss.knn(queries.float().numpy(), matrix.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    else:
        index = faiss.IndexFlatIP(pool.dim)
        index.add(matrix.numpy())
        start = time.perf_counter()
        scores, rows = index.search(queries.float().numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(rows), time.perf_counter() - start


def measure(method: str, folder: Path, dim: int, k: int) -> dict[str, float]:
    """Run one method in this process; its lists are left in the folder."""
    warm_up = torch.randn(512, 64)
    exact_search(warm_up, warm_up, 2, settings=SearchSettings("faiss" if method == "faiss" else "torch"))
    start = time.perf_counter()
    pool, queries = opened(folder, "pool", dim), opened(folder, "queries", dim)
    loaded = queries.read(0, len(queries))
    extra = {}
    if method in OURS[:2]:
        ranking = exact_search(loaded, pool, k, settings=SearchSettings(method))[0]
        scores, rows = ranking.scores, ranking.rows
    elif method == "bare loop":
        scores, rows = bare_loop(loaded, pool, k)
    else:
        scores, rows, extra["in memory"] = search_in_memory(method, loaded, pool, k)
    seconds = time.perf_counter() - start
    np.savez(folder / f"{method}.npz", scores=scores.numpy(), rows=rows.numpy())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak GiB": peak, **extra}


def compare(folder: Path) -> None:
    """All methods find the same, to the bit or but for what float32 rounds differently; else the benchmark fails."""
    with np.load(folder / "torch.npz") as file:
        scores, rows = file["scores"], file["rows"]
    for method in METHODS[1:]:
        with np.load(folder / f"{method}.npz") as file:
            same = float((file["rows"] == rows).mean())
            off = float(np.abs(file["scores"] - scores).max())
        print(f"torch and {method}: {100 * same:.4f} % of the places hold the same id, scores differ by {off:.1e}")
        if off > 1e-5 or same < 0.999 or (method in OURS and (same < 1 or off > 0)):
            sys.exit(f"{method} does not agree with torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("queries", 2000), ("dim", 512), ("k", 50), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        method, folder = options.measure
        print(json.dumps(measure(method, Path(folder), options.dim, options.k)))
        return
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name), options.rows, options.queries, options.dim)
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for number in range(options.rounds):
            for method in METHODS:
                command = [sys.executable, "-m", "benchmarks.search", "--measure", method, name]
                command += ["--dim", str(options.dim), "--k", str(options.k)]
                found[method].append(json.loads(subprocess.check_output(command)))
                print(f"round {number}: {method} {found[method][-1]['seconds']:.2f} s", file=sys.stderr)
        compare(Path(name))
    medians = {m: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for m, runs in found.items()}
    for method, row in medians.items():
        ratio = medians["torch"]["seconds"] / row["seconds"]
        memory = f"; {row['in memory']:.2f} s from memory" if "in memory" in row else ""
        print(f"{method}: {row['seconds']:.2f} s, peak {row['peak GiB']:.2f} GiB, torch / it {ratio:.3f}{memory}")


if __name__ == "__main__":
    main()
