"""Evidence: what each stage of the paper does, run by run, over starts, kinds of batches and seeds.

    python -m benchmarks.evidence                                  every table of the built-in benchmark, three seeds
    python -m benchmarks.evidence --dataset emoji --emoji /data/emoji --texts /data/scifact
    python -m benchmarks.evidence --table main --only pretrained-mixed --seeds 0 1 --jobs 1
    python -m benchmarks.evidence --report                         the tables of what is finished, without a run

Every run is one command that a user has, printed before it starts: a stage of experiment=mm_embed/mini/all, evaluated
twice, on the multimodal tasks and on the text-to-text set. Runs that are finished are left as they are, those that were
killed go on. A chain, the unit of --jobs, is the runs of one seed in one regime: a start (random weights with every
weight trained, or the stage pretrain's with LoRA) and a kind of batches. Tables and figures go into docs/results.md and
docs/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.evidence_report import Measured, check_page, report
from benchmarks.evidence_rows import (
    BATCHES,
    EVALUATIONS,
    FROM_RANDOM,
    LENGTHS,
    LONGER,
    REGIMES,
    TABLE_REGIMES,
    TABLES,
    UNLABELLED_DATA,
    Row,
)
from benchmarks.unlabelled import generate_unlabelled
from lightning_mmembed.stages import Stage, evaluation, run_stages

ROOT = Path("logs/evidence")


def folder(dataset: str, seed: int) -> Path:
    """Where the runs of a seed lie."""
    return ROOT / dataset / f"seed-{seed}"


def start_stages(dataset: str, seed: int, given: tuple[str, ...]) -> list[Stage]:
    """Both starts of a seed: the pretrained encoder, and the same one before a step."""
    common = (f"experiment=mm_embed/{dataset}/pretrain", f"seed={seed}", *given)
    place = folder(dataset, seed)
    return [
        Stage("pretrained", place / "pretrained", common),
        Stage("random-weights", place / "random-weights", (*common, "train=false")),
    ]


def chain(dataset: str, seed: int, regime: str, rows: tuple[Row, ...], given: tuple[str, ...]) -> list[Stage]:
    """The runs of a seed in a regime, each followed by its evaluations; those of the start come first."""
    start, _, batches = regime.partition("-")
    place = folder(dataset, seed)
    common = [f"seed={seed}", *BATCHES[batches], *given]
    weights = "pretrained" if start == "pretrained" else "random-weights"
    common += [f"model.encoder.pretrained_model_name_or_path={{{weights}}}/encoder"]
    common += FROM_RANDOM if start == "random" else ()
    stages = start_stages(dataset, seed, given)
    for row in rows:
        own = [one for some in row.overrides for one in LONGER[dataset].get(some.strip("{}"), (some,))]
        overrides = (f"experiment=mm_embed/{dataset}/{row.experiment or 'random'}", *LENGTHS[dataset], *own, *common)
        stage = Stage(row.key, place / regime / row.key, overrides + (() if row.experiment else ("train=false",)))
        if row.experiment:
            stages.append(stage)
        stages += [evaluation(stage, name, more) for name, more in EVALUATIONS[dataset].items()]
    return stages


def rows_of(tables: list[str], regime: str) -> tuple[Row, ...]:
    """The rows of some tables in a regime, each once."""
    rows = {row.key: row for table in tables if regime in TABLE_REGIMES[table] for row in TABLES[table]}
    return tuple(rows.values())


def measured(dataset: str, seeds: list[int], regime: str, rows: tuple[Row, ...]) -> list[Measured]:
    """Rows that are finished: all with the seeds that have all, or those that every seed has that was begun."""
    places = {seed: folder(dataset, seed) / regime for seed in seeds}
    finished = {
        seed: [
            row for row in rows if all((place / row.key / n / "metrics.json").is_file() for n in EVALUATIONS[dataset])
        ]
        for seed, place in places.items()
    }
    chosen = [seed for seed in seeds if len(finished[seed]) == len(rows)] or [seed for seed in seeds if finished[seed]]
    common = [row for row in rows if chosen and all(row in finished[seed] for seed in chosen)]
    return [Measured(row.name, row.key, tuple(places[s] / row.key for s in chosen), row.against) for row in common]


def run_chains(commands: dict[str, list[str]], jobs: int) -> list[str]:
    """Run processes, so many at a time, and say how long the rest will take; gives the names of those that failed."""
    waiting, running, failed = list(commands), {}, []
    begun = time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ROOT.mkdir(parents=True, exist_ok=True)
            with open(ROOT / f"{name.replace(' ', '-')}.log", "a") as log:
                running[name] = subprocess.Popen(commands[name], stdout=log, stderr=subprocess.STDOUT)
            print(f"{name}: begun; its output is in {log.name}", flush=True)
        time.sleep(1)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode != 0:
                failed.append(name)
            done = len(commands) - len(waiting) - len(running)
            spent = time.monotonic() - begun
            left = spent / done * (len(commands) - done) / 60
            said = "FAILED" if name in failed else "done"
            print(
                f"{name}: {said}; {done} of {len(commands)} after {spent / 60:.0f} min, about {left:.0f} min to go",
                flush=True,
            )
    return failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(EVALUATIONS), default="mini")
    parser.add_argument("--table", choices=list(TABLES), nargs="+", help="by default all that the dataset has")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=REGIMES, help="regimes; by default all of the tables'")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=2, help="chains at a time, a core each")
    parser.add_argument("--emoji", help="folder of emoji and flags in M-BEIR's layout")
    parser.add_argument("--texts", help="text-to-text data beside it")
    parser.add_argument("--report", action="store_true", help="write the tables of what is finished, and run nothing")
    parser.add_argument("--chain", nargs=2, metavar=("SEED", "REGIME"), help="run this chain alone, in this process")
    args = parser.parse_args()
    if args.dataset == "emoji" and not args.report and not (args.emoji and args.texts):
        parser.error("--dataset emoji needs --emoji and --texts")
    known = ["main", "long"] if args.dataset == "emoji" else list(TABLES)
    args.table = args.table or known
    if not set(args.table) <= set(known):
        parser.error(f"--dataset {args.dataset} has the tables {', '.join(known)} alone")
    return args


def main() -> None:
    args = arguments()
    given = (f"emoji={args.emoji}", f"texts={args.texts}") if args.dataset == "emoji" else ()
    given = (*given, "callbacks.report=null")
    if args.chain:
        seed, regime = int(args.chain[0]), args.chain[1]
        if regime == "start":
            run_stages(start_stages(args.dataset, seed, given))
        else:
            rows = rows_of(args.table, regime)
            run_stages(chain(args.dataset, seed, regime, rows, given))
        return
    regimes = [regime for regime in args.only or REGIMES if rows_of(args.table, regime)]
    for table in args.table:
        check_page(args.dataset, table)
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "benchmarks.evidence", *sys.argv[1:], "--chain"]
        if "unlabelled" in args.table:
            generate_unlabelled(f"{UNLABELLED_DATA}/{args.dataset}")
        # The starts first: the chains of a seed share them. The first seed's makes the data that all share.
        failed = []
        for some in (args.seeds[:1], args.seeds[1:]):
            failed += run_chains({f"{args.dataset} start {s}": [*command, str(s), "start"] for s in some}, args.jobs)
        chains = {f"{args.dataset} {r} {s}": [*command, str(s), r] for s in args.seeds for r in regimes}
        failed += run_chains({} if failed else chains, args.jobs)
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; see {ROOT}/*.log; the same command goes on")
    for table in args.table:
        found = {
            regime: measured(args.dataset, args.seeds, regime, rows_of([table], regime))
            for regime in TABLE_REGIMES[table]
        }
        report(args.dataset, table, found)


if __name__ == "__main__":
    main()
