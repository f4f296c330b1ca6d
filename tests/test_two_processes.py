"""Two CPU processes train, mine and evaluate through the command line as one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import ARCHITECTURE

from lightning_mmembed.data import Shards
from lightning_mmembed.data.negatives import MinedNegatives

pytestmark = pytest.mark.slow  # starts two processes, and a third to compare with


def run(command: str, directory: Path, *overrides: str) -> None:
    # The console script, not `python -c`: the second process is started with the same command line.
    script = str(Path(sys.executable).parent / command)
    process = subprocess.run(
        [script, f"paths.output_dir={directory}", f"hydra.run.dir={directory}", *overrides],
        cwd=directory.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def overrides(shards: Path, root: Path) -> list[str]:
    return [
        *("data=mbeir", "dataset=pets", "data.source=null", f"data.shards={shards}"),
        *(f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items()),
        *(f"paths.root_dir={root}", "data.batch_size=4"),
    ]


def test_two_processes_write_the_vectors_that_one_writes_and_an_evaluation_takes_them(
    tiny_shards: Path, tmp_path: Path
) -> None:
    pets, files = overrides(tiny_shards, tmp_path), {}
    for devices in (1, 2):
        # Each process has a time of its own; the first one's counts.
        place = tmp_path / f"vectors{devices}" / "${now:%H%M%S%f}"
        processes = ("fabric.accelerator=cpu", f"fabric.devices={devices}")
        run("mmembed-embed", tmp_path / "embed", *pets, f"vectors.directory={place}", *processes)
        (where,) = place.parent.iterdir()
        files[devices] = {str(path.relative_to(where)): path.read_bytes() for path in where.rglob("*.*")}
    assert files[1] == files[2]
    assert sum(name.endswith(".npy") for name in files[1]) == 5, "the pool and the queries of four tasks"
    (taken,) = (tmp_path / "vectors2").iterdir()
    before = {path: path.stat().st_mtime_ns for path in taken.rglob("*")}
    run("mmembed-evaluate", tmp_path / "run", *pets, f"callbacks.evaluation.vectors_dir={taken}")
    assert {path: path.stat().st_mtime_ns for path in taken.rglob("*")} == before


def test_two_processes_mine_every_query_and_report_what_one_process_reports(tiny_shards: Path, tmp_path: Path) -> None:
    pets = overrides(tiny_shards, tmp_path)
    mining = ["callbacks.mining.after_epochs=[1]", "mining.k=12", "mining.k_prime=6"]
    two, one = tmp_path / "two", tmp_path / "one"
    run("mmembed-train", two, *pets, "trainer=ddp_sim", "trainer.max_epochs=2", *mining)
    run("mmembed-evaluate", one, *pets, f"ckpt_path={two}/checkpoints/best.ckpt")
    assert json.loads((two / "metrics.json").read_text()) == json.loads((one / "metrics.json").read_text())
    mined = MinedNegatives(two / "negatives-1.parquet")
    counted = sum(task["queries"] for task in mined.audit.values())
    assert counted == len(Shards(tiny_shards).query_rows("train"))
