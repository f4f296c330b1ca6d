"""Sharding: how fast a dataset in M-BEIR's layout becomes shards, and how much memory that takes.

    python -m benchmarks.sharding --candidates 1000000               a million texts of 60 words
    python -m benchmarks.sharding --candidates 0 --pictures 100000   small pictures

The source is written to a temporary folder (TMPDIR says on which disk), every candidate once, in one pool. Each
conversion runs in a process of its own, with nothing kept from the one before it; its time runs from the call to the
finished manifest. The peak memory is that of the process, libraries included, and with workers also the sum of it and
all its workers, sampled as they run: pages that they share count in each. The goal is a peak under 2 GiB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightning_mmembed.data import shard_dataset

GOAL_GIB, WORKERS, DRAWN, WORDS, SEED = 2.0, (0, 2), 500, 60, 0
TASKS = {"text": 1, "image": 0}


def draw() -> list[bytes]:
    """JPEGs of soft shapes, 64 pixels on the short side."""
    rng = np.random.default_rng(SEED)
    drawn = []
    for _ in range(DRAWN):
        encoded = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((86, 64), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=80)
        drawn.append(encoded.getvalue())
    return drawn


def records(root: Path, texts: int, pictures: int) -> Iterator[dict[str, Any]]:
    """The candidates, whose pictures are written as they come."""
    rng = np.random.default_rng(SEED)
    vocabulary = np.array(["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 11, 20_000)])
    for number in range(1, texts + 1):
        text = " ".join(vocabulary[rng.integers(0, len(vocabulary), WORDS)])
        yield {"did": f"50:{number}", "txt": text, "modality": "text"}
    drawn = draw() if pictures else []
    for number in range(texts + 1, texts + pictures + 1):
        path = f"mbeir_images/made_images/{number // 1000:04d}/{number}.jpg"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(drawn[number % DRAWN])
        yield {"did": f"50:{number}", "txt": None, "img_path": path, "modality": "image"}


def write_source(root: Path, texts: int, pictures: int) -> None:
    """The candidates, one query, and the prompts."""
    for folder in ("cand_pool/local", "query/test", "instructions", "mbeir_images"):
        (root / folder).mkdir(parents=True)
    wanted = "text" if texts else "image"
    task = f"made_task{TASKS[wanted]}"
    with open(root / f"cand_pool/local/mbeir_{task}_cand_pool.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(root, texts, pictures))
    query = {"qid": "50:1", "query_txt": "Any", "query_modality": "text", "pos_cand_list": ["50:1"]}
    (root / f"query/test/mbeir_{task}_test.jsonl").write_text(json.dumps(query | {"task_id": TASKS[wanted]}) + "\n")
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    (root / "instructions/query_instructions.tsv").write_text(f"{header}\ntext\t{wanted}\tmade\t50\tFind it.\n")


def status(process: str, field: str) -> int:
    """A figure in KiB from a process's status; 0 if it has ended."""
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


class PeakOfAll(threading.Thread):
    """Samples the resident memory of this process and its workers until it is stopped; ``kib`` is the most seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.kib, self.stopped = 0, threading.Event()

    def run(self) -> None:
        """Sample."""
        own = Path("/proc/self/task")
        while not self.stopped.wait(0.1):
            children = [pid for thread in own.iterdir() for pid in (thread / "children").read_text().split()]
            self.kib = max(self.kib, sum(status(pid, "VmRSS") for pid in ["self", *children]))


def convert(root: Path, out: Path, workers: int) -> dict[str, float]:
    """Convert in this process: seconds, and its peak memory and that of all in GiB."""
    sampler = PeakOfAll()
    sampler.start()
    start = time.perf_counter()
    shard_dataset(root, out, num_workers=workers, show_progress=False)
    seconds = time.perf_counter() - start
    sampler.stopped.set()
    sampler.join()
    return {"seconds": seconds, "own": status("self", "VmHWM") / 2**20, "all": sampler.kib / 2**20}


def main() -> None:
    """Write the source, convert it with each number of workers, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1_000_000, help="text candidates")
    parser.add_argument("--pictures", type=int, default=0, help="candidates that are pictures")
    parser.add_argument("--convert", nargs=3, metavar=("ROOT", "OUT", "WORKERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        root, out, workers = options.convert
        print(json.dumps(convert(Path(root), Path(out), int(workers))))
        return
    total = options.candidates + options.pictures
    with tempfile.TemporaryDirectory() as folder:
        write_source(Path(folder, "source"), options.candidates, options.pictures)
        print(f"{options.candidates:,} texts, {options.pictures:,} pictures, {os.cpu_count()} cores", flush=True)
        worst = 0.0
        for workers in WORKERS:
            places = [f"{folder}/source", f"{folder}/shards-{workers}", str(workers)]
            command = [sys.executable, "-m", "benchmarks.sharding", "--convert", *places]
            found = json.loads(subprocess.check_output(command))
            rate, worst = total / found["seconds"], max(worst, found["own"], found["all"])
            memory = f"peak {found['own']:.2f} GiB, with its workers {found['all']:.2f} GiB"
            print(f"{workers} workers: {found['seconds']:.0f} s, {rate:.0f} candidates/s, {memory}", flush=True)
    if worst >= GOAL_GIB:
        sys.exit(f"peak {worst:.2f} GiB is over the goal of {GOAL_GIB} GiB")


if __name__ == "__main__":
    main()
