"""What benchmarks.evidence runs: the rows of its tables, and the regimes that they are run in."""

from __future__ import annotations

from dataclasses import dataclass

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
    Row("random, as long as hard", "random-as-long", "random", ("{as-long}",)),
    Row("random, twice as long", "random-long", "random", ("{twice}",)),
    Row("hard (plain top-k)", "hard-top-k", "hard", (MINED, "mining=top_k")),
    Row("hard (C1 only)", "hard-c1", "hard", (MINED, "mining.rule=wrong_modality")),
    Row("hard (C2 only)", "hard-c2", "hard", (MINED, "mining.rule=wrong_content")),
    HARD,
    Row("continual", "continual", "continual", ("weights={hard}/checkpoints/best.ckpt",)),
    Row("joint", "joint", "joint", (MINED,)),
)
#: The same with longer stages, and the random stage for as long as the hard one takes.
MINED_LONG = "callbacks.mining.ckpt_path={long-random}/checkpoints/best.ckpt"
LONG_HARD = ("{long}", MINED_LONG)
LONG = (
    Row("random", "long-random", "random", ("{long}",)),
    Row("random, as long as hard", "long-random-as-long", "random", ("{long-as-long}",)),
    Row("hard (plain top-k)", "long-top-k", "hard", (*LONG_HARD, "mining=top_k")),
    Row("hard (C1 only)", "long-c1", "hard", (*LONG_HARD, "mining.rule=wrong_modality")),
    Row(
        "hard (paper)",
        "long-hard",
        "hard",
        LONG_HARD,
        ("long-random", "long-random-as-long", "long-top-k", "long-c1"),
    ),
    Row(
        "hard (C1 share from 1 to 0.5)",
        "long-curriculum",
        "hard",
        (*LONG_HARD, "mining=curriculum"),
        ("long-random-as-long", "long-top-k", "long-hard"),
    ),
    Row("continual", "long-continual", "continual", ("weights={long-hard}/checkpoints/best.ckpt",), ("long-hard",)),
    Row("joint", "long-joint", "joint", ("{long-joint}", MINED_LONG)),
)
#: Mined from a training pool that holds positives which are not labelled; trained and measured as ever.
UNLABELLED_DATA = "data/unlabelled"
UNLABELLED_HARD = (*LONG_HARD, f"paths.data_dir={UNLABELLED_DATA}")
UNLABELLED = (
    *(row for row in LONG if row.key in ("long-random", "long-random-as-long", "long-top-k", "long-hard")),
    Row(
        "hard (plain top-k), unlabelled positives",
        "unlabelled-top-k",
        "hard",
        (*UNLABELLED_HARD, "mining=top_k"),
        ("long-random-as-long", "long-top-k"),
    ),
    Row(
        "hard (paper), unlabelled positives",
        "unlabelled-hard",
        "hard",
        UNLABELLED_HARD,
        ("long-random-as-long", "long-hard", "unlabelled-top-k"),
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
TABLES = {
    "main": MAIN,
    "long": LONG,
    "unlabelled": UNLABELLED,
    "versions": VERSIONS,
    "ablations": ABLATIONS,
    "beyond": BEYOND,
}
#: Where each table is made, if nothing is said.
TABLE_REGIMES = dict.fromkeys(TABLES, ("pretrained-mixed",)) | {
    "main": REGIMES,
    "long": ("pretrained-mixed", "pretrained-accumulated"),
    "unlabelled": ("pretrained-accumulated",),
}
#: By dataset: what is asked of a checkpoint, by name.
EVALUATIONS = {
    "mini": {"multimodal": ("data=mini",), "text": ("data=mini_text",)},
    "emoji": {
        "multimodal": ("data.shards=[${paths.data_dir}/shards/emoji]",),
        "text": ("data.shards=[${paths.data_dir}/shards/emoji_texts]",),
    },
}
#: How long the stages of the main table are: of emoji, whose epochs are eight times as long, a quarter of one.
LENGTHS = {"mini": (), "emoji": ("++trainer.limit_train_batches=0.25",)}
#: By dataset and the name of a length: the random stage in as much training time as the hard one takes, which encodes
#: half as many items again in a step, and in twice its own; then the same with longer stages, and joint for as many
#: steps as hard and continual take together.
LONGER = {
    "mini": {
        "as-long": ("trainer.max_epochs=3",),
        "twice": ("trainer.max_epochs=4",),
        "long": ("trainer.max_epochs=6",),
        "long-as-long": ("trainer.max_epochs=9",),
        "long-joint": ("trainer.max_epochs=8",),
    },
    "emoji": {
        "as-long": ("++trainer.limit_train_batches=0.375",),
        "twice": ("trainer.limit_train_batches=0.5",),
        "long": ("trainer.limit_train_batches=1.0",),
        "long-as-long": ("trainer.limit_train_batches=0.75", "trainer.max_epochs=2"),
        "long-joint": ("trainer.limit_train_batches=0.625",),
    },
}
