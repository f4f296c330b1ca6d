"""Evidence: what each stage of the paper does, run by run, over starts, kinds of batches and seeds.

    python -m benchmarks.evidence                                      the built-in benchmark: main table, three seeds
    python -m benchmarks.evidence --dataset emoji --emoji /data/emoji --texts /data/scifact
    python -m benchmarks.evidence --table versions                     or ablations; runs of other tables are used again
    python -m benchmarks.evidence --only pretrained-mixed --seeds 0 1 --jobs 2
    python -m benchmarks.evidence --report                             the tables of what is finished, without a run

Every run is one command that a user has, printed before it starts: a stage of experiment=mm_embed/mini/all, evaluated
twice, on the multimodal tasks and on the text-to-text set. Runs that are finished are left as they are, those that were
killed go on. A chain, the unit of --jobs, is the runs of one seed in one regime: a start (random weights with every
weight trained, or the stage pretrain's with LoRA) and a kind of batches (mixed tasks or one task each). Tables and
figures go into docs/results.md and docs/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence_report import Measured, check_page, report
from lightning_mmembed.stages import Stage, evaluation, run_stages

ROOT = Path("logs/evidence")
#: Batches of 128 queries of all tasks, or of one task; or steps of eight batches of 16, each of one task.
BATCHES = {
    "mixed": ("data.batch_mix=mixed",),
    "one-task": ("data.batch_mix=one-task",),
    "accumulated": (
        "data.batch_mix=one-task",
        "data.batch_size=16",
        "trainer.accumulate_grad_batches=8",
        "model.encoder.length_buckets=2",
    ),
}
REGIMES = ("pretrained-mixed", "pretrained-one-task", "pretrained-accumulated", "random-mixed", "random-one-task")
#: What the start is trained with where its weights are random.
FROM_RANDOM = ("model.encoder.lora=null",)


@dataclass(frozen=True)
class Row:
    """A row of a table: a run, or another look at one.

    Args:
        name: In the table.
        experiment: Of experiment/mm_embed/{dataset}; None evaluates the start, or another row's checkpoint.
        overrides: Beside the experiment's; {random} and the like are the folders of other rows.
        key: Its folder.
        against: Keys of the rows that it is compared with; the one above it if there are none.
    """

    name: str
    key: str
    experiment: str | None
    overrides: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


MINED = "callbacks.mining.ckpt_path={random}/checkpoints/best.ckpt"
RANDOM = Row("random", "random", "random")
OTHERS = ("random", "random-as-long", "random-long", "hard-top-k", "hard-c1", "hard-c2")
HARD = Row("hard (paper)", "hard", "hard", (MINED,), OTHERS)
MAIN = (
    Row("start", "start", None),
    RANDOM,
    Row("random, as long as hard", "random-as-long", "random", ("trainer.max_epochs={as_long}",)),
    Row("random, twice as long", "random-long", "random", ("trainer.max_epochs={twice}",)),
    Row("hard (plain top-k)", "hard-top-k", "hard", (MINED, "mining=top_k")),
    Row("hard (C1 only)", "hard-c1", "hard", (MINED, "mining.rule=wrong_modality")),
    Row("hard (C2 only)", "hard-c2", "hard", (MINED, "mining.rule=wrong_content")),
    HARD,
    Row("continual", "continual", "continual", ("weights={hard}/checkpoints/best.ckpt",)),
    Row("joint", "joint", "joint", (MINED,)),
)
#: The same with three times the epochs, and the random stage for as long as the hard one takes.
MINED_LONG = "callbacks.mining.ckpt_path={long-random}/checkpoints/best.ckpt"
LONG_HARD = ("trainer.max_epochs=6", MINED_LONG)
LONG = (
    Row("random, 6 epochs", "long-random", "random", ("trainer.max_epochs=6",)),
    Row("random, 9 epochs", "long-random-as-long", "random", ("trainer.max_epochs=9",)),
    Row("hard (plain top-k), 6 epochs", "long-top-k", "hard", (*LONG_HARD, "mining=top_k")),
    Row("hard (C1 only), 6 epochs", "long-c1", "hard", (*LONG_HARD, "mining.rule=wrong_modality")),
    Row(
        "hard (paper), 6 epochs",
        "long-hard",
        "hard",
        LONG_HARD,
        ("long-random", "long-random-as-long", "long-top-k", "long-c1"),
    ),
)
VERSIONS = (
    RANDOM,
    HARD,
    Row("hard, mined again", "hard-2", "hard", ("callbacks.mining.ckpt_path={hard}/checkpoints/best.ckpt",)),
    Row("hard, mined a third time", "hard-3", "hard", ("callbacks.mining.ckpt_path={hard-2}/checkpoints/best.ckpt",)),
)


def ablation(name: str, key: str, *overrides: str) -> tuple[Row, Row]:
    """The random and the hard stage with another setting, each beside the same stage without it."""
    mined = f"callbacks.mining.ckpt_path={{{key}-random}}/checkpoints/best.ckpt"
    return (
        Row(f"random, {name}", f"{key}-random", "random", overrides, ("random",)),
        Row(f"hard, {name}", f"{key}-hard", "hard", (mined, *overrides), ("hard",)),
    )


def beside_hard(name: str, key: str, *overrides: str) -> Row:
    """The hard stage with another setting, on the random stage's negatives."""
    return Row(f"hard, {name}", key, "hard", (MINED, *overrides), ("hard",))


ABLATIONS = (
    RANDOM,
    HARD,
    *ablation("trained without instructions", "no-instructions", "data.instructions=false"),
    *ablation("causal attention", "causal", "model.encoder.bidirectional=false"),
    *ablation("last token", "last", "model.encoder.pooling=last"),
    *ablation("latent attention", "latent", "model.encoder.pooling=latent-attention"),
    beside_hard("k' = 25", "k-prime-25", "mining.k_prime=25"),
    beside_hard("top 20, k' = 15", "top-20", "mining.k=20", "mining.k_prime=15"),
    beside_hard("top 100, k' = 95", "top-100", "mining.k=100", "mining.k_prime=95"),
)
HARD_BEST = "{hard}/checkpoints/best.ckpt"
MERGED = f"ckpt_path=[{{random}}/checkpoints/best.ckpt,{HARD_BEST}]"
FIRST_32 = "model.encoder.truncate_dim=32"
BEYOND = (
    RANDOM,
    HARD,
    Row("random and hard, merged", "merged", None, (MERGED,), ("random", "hard")),
    beside_hard("symmetric loss", "symmetric", "loss=symmetric"),
    beside_hard("hardness-weighted loss", "hardness", "loss=hardness"),
    beside_hard("learned temperature", "learned", "loss=learned_temperature"),
    beside_hard("two negatives", "two", "data.negatives_per_query=2"),
    beside_hard("curriculum", "curriculum", "mining=curriculum"),
    beside_hard("relative margin", "relative-margin", "mining=relative_margin"),
    beside_hard("Matryoshka", "matryoshka", "loss=matryoshka"),
    Row("hard, first 32 of 128", "hard-32", None, (f"ckpt_path={HARD_BEST}", FIRST_32), ("hard",)),
    Row(
        "hard, Matryoshka, first 32 of 128",
        "matryoshka-32",
        None,
        ("ckpt_path={matryoshka}/checkpoints/best.ckpt", FIRST_32),
        ("hard-32",),
    ),
)
TABLES = {"main": MAIN, "long": LONG, "versions": VERSIONS, "ablations": ABLATIONS, "beyond": BEYOND}
#: Where each table is made, if nothing is said.
TABLE_REGIMES = dict.fromkeys(TABLES, ("pretrained-mixed",)) | {
    "main": REGIMES,
    "long": ("pretrained-mixed", "pretrained-accumulated"),
}
#: By dataset: what is asked of a checkpoint, by name.
EVALUATIONS = {
    "mini": {"multimodal": ("data=mini",), "text": ("data=mini_text",)},
    "emoji": {
        "multimodal": ("data.shards=[${paths.data_dir}/shards/emoji]",),
        "text": ("data.shards=[${paths.data_dir}/shards/emoji_texts]",),
    },
}
#: Epochs of the random stage: in as much training time as the hard one takes, which encodes half as many items again in
#: a step (of one epoch there is no such number), and in twice its own.
EPOCHS = {"mini": {"as_long": 3, "twice": 4}, "emoji": {"twice": 2}}


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
        own = list(row.overrides)
        for name, epochs in EPOCHS[dataset].items():
            own = [override.replace(f"{{{name}}}", str(epochs)) for override in own]
        overrides = (f"experiment=mm_embed/{dataset}/{row.experiment or 'random'}", *own, *common)
        stage = Stage(row.key, place / regime / row.key, overrides + (() if row.experiment else ("train=false",)))
        if row.experiment:
            stages.append(stage)
        stages += [evaluation(stage, name, more) for name, more in EVALUATIONS[dataset].items()]
    return stages


def measured(dataset: str, seeds: list[int], regime: str, rows: tuple[Row, ...]) -> list[Measured]:
    """The evaluations of the rows that are finished with every seed."""
    found = []
    for row in rows:
        places = [folder(dataset, seed) / regime / row.key for seed in seeds]
        if all((place / name / "metrics.json").is_file() for place in places for name in EVALUATIONS[dataset]):
            found.append(Measured(row.name, row.key, tuple(places), row.against))
    return found


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
    parser.add_argument("--table", choices=list(TABLES), default="main")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=REGIMES, help="regimes; by default those of the table")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=2, help="chains at a time, a core each")
    parser.add_argument("--emoji", help="folder of emoji and flags in M-BEIR's layout")
    parser.add_argument("--texts", help="text-to-text data beside it")
    parser.add_argument("--report", action="store_true", help="write the tables of what is finished, and run nothing")
    parser.add_argument("--chain", nargs=2, metavar=("SEED", "REGIME"), help="run this chain alone, in this process")
    args = parser.parse_args()
    if args.dataset == "emoji" and not args.report and not (args.emoji and args.texts):
        parser.error("--dataset emoji needs --emoji and --texts")
    if args.dataset == "emoji" and args.table != "main":
        parser.error("--dataset emoji has the main table alone")
    return args


def main() -> None:
    args = arguments()
    rows = TABLES[args.table]
    if "as_long" not in EPOCHS[args.dataset]:
        rows = tuple(row for row in rows if row.key != "random-as-long")
    given = (f"emoji={args.emoji}", f"texts={args.texts}") if args.dataset == "emoji" else ()
    given = (*given, "callbacks.report=null")
    if args.chain:
        seed, regime = int(args.chain[0]), args.chain[1]
        stages = start_stages(args.dataset, seed, given)
        run_stages(stages if regime == "start" else chain(args.dataset, seed, regime, rows, given))
        return
    known = TABLE_REGIMES[args.table]
    regimes = args.only or known
    check_page(args.dataset, args.table)
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "benchmarks.evidence", *sys.argv[1:], "--chain"]
        # The starts first: the chains of a seed share them. The first seed's makes the data that all share.
        failed = []
        for some in (args.seeds[:1], args.seeds[1:]):
            failed += run_chains({f"{args.dataset} start {s}": [*command, str(s), "start"] for s in some}, args.jobs)
        chains = {f"{args.dataset} {args.table} {r} {s}": [*command, str(s), r] for s in args.seeds for r in regimes}
        failed += run_chains({} if failed else chains, args.jobs)
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; see {ROOT}/*.log; the same command goes on")
    report(args.dataset, args.table, {r: measured(args.dataset, args.seeds, r, rows) for r in known}, len(args.seeds))


if __name__ == "__main__":
    main()
