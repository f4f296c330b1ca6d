"""How large M-BEIR is, so that a download that stopped early is seen before hours are spent on it.

Test queries and pools are those that the index and dataset cards of Pyserini and MTEB state for each task, with sums
that equal M-BEIR's published totals; training sizes are those of UniIR's data generator and its maintainers. A task's
pool is that of its test split: only MSCOCO has another one for val.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_mmembed.data.layout import MBEIRLayout
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.progress import progress_bar

#: Task -> (test queries, candidates in the local pool of the test split), in canonical order.
TEST_SIZES: dict[str, tuple[int, int]] = {
    "visualnews_task0": (19_995, 542_246),
    "mscoco_task0": (24_809, 5_000),
    "fashion200k_task0": (1_719, 201_824),
    "webqa_task1": (2_455, 544_457),
    "edis_task2": (3_241, 1_047_067),
    "webqa_task2": (2_511, 403_196),
    "visualnews_task3": (20_000, 537_568),
    "mscoco_task3": (5_000, 24_809),
    "fashion200k_task3": (4_889, 61_707),
    "nights_task4": (2_120, 40_038),
    "oven_task6": (50_004, 676_667),
    "infoseek_task6": (11_323, 611_651),
    "fashioniq_task7": (6_003, 74_381),
    "cirr_task7": (4_170, 21_551),
    "oven_task8": (14_741, 335_135),
    "infoseek_task8": (17_593, 481_782),
}

#: Candidates in the union of the local test pools; no candidate is in two.
UNION_TEST_POOL = 5_609_079

#: Training queries, and lines of the file in which those of small datasets stand repeatedly.
TRAIN_QUERIES, UPSAMPLED_LINES = 1_150_203, 1_332_790

_TRAIN_FILES = "query/train/mbeir_*_train.jsonl"


def published_sizes() -> dict[str, int]:
    """Records of the benchmark, by what they are.

    Example:
        >>> published_sizes()["queries mscoco_task0/test"], published_sizes()["pool mscoco_task0/test"]
        (24809, 5000)
    """
    sizes = {f"queries {task}/test": queries for task, (queries, _) in TEST_SIZES.items()}
    sizes |= {f"pool {task}/test": pool for task, (_, pool) in TEST_SIZES.items()}
    return sizes | {"pool test": UNION_TEST_POOL, "queries train": TRAIN_QUERIES, "training lines": UPSAMPLED_LINES}


def published_lines() -> dict[str, int]:
    """Lines of the benchmark's files that shards are made of, by path in the source; training files are one sum."""
    lines = {f"query/test/mbeir_{task}_test.jsonl": queries for task, (queries, _) in TEST_SIZES.items()}
    for task, (_, pool) in TEST_SIZES.items():
        split = "_test" if task.startswith("mscoco") else ""
        lines[f"cand_pool/local/mbeir_{task}{split}_cand_pool.jsonl"] = pool
    return lines | {_TRAIN_FILES: TRAIN_QUERIES, "query/union_train/mbeir_union_up_train.jsonl": UPSAMPLED_LINES}


def count_source_lines(layout: MBEIRLayout, show_progress: bool = True) -> dict[str, int]:
    """Count the lines of a source's files for training and test.

    Args:
        layout: The source.
        show_progress: Show a progress bar, in bytes.

    Returns:
        Lines by path in the source.
    """
    pools = {path for name, path in layout.pool_files() if name.endswith("/test")}
    files = sorted({*pools, *layout.query_files("train"), *layout.query_files("test"), *layout.upsampled_files()})
    lines = {}
    with progress_bar(show_progress) as progress:
        bar = progress.add_task("counting lines", total=sum(path.stat().st_size for path in files))
        for path in files:
            count, last = 0, b"\n"
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    count, last = count + block.count(b"\n"), block[-1:]
                    progress.advance(bar, len(block))
            lines[path.relative_to(layout.source).as_posix()] = count + (last != b"\n")
    return lines


def check_source_counts(lines: Mapping[str, int]) -> None:
    """Refuse a source that has not M-BEIR's published counts.

    Args:
        lines: Lines by path in the source, as :func:`count_source_lines` counts them.

    Raises:
        UserInputError: If a file has another number of lines; it names each.
    """
    training = sum(count for name, count in lines.items() if name.startswith("query/train/"))
    found = {**lines, _TRAIN_FILES: training}
    wrong = [
        f"{name} has {found.get(name, 0):,} of {published:,} lines"
        for name, published in published_lines().items()
        if found.get(name, 0) != published
    ]
    if wrong:
        raise UserInputError(
            "the source has not M-BEIR's published counts:\n  " + "\n  ".join(wrong) + "\nFetch these files again, or "
            "set published_counts=false for another dataset"
        )
