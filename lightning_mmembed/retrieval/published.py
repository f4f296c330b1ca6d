"""Published M-BEIR figures, to stand beside one's own.

Every system was scored by its authors or by those who repeated the work, each with a protocol of their own: the
pool, the prompts and the checkpoint differ. Figures over the union pool and over the local pools must not be mixed.
"""

from __future__ import annotations

from lightning_mmembed.items import MBEIR_TASKS, TASK_MODALITIES, Modality, Task
from lightning_mmembed.retrieval.compare import ComparedRun

# One line per system: its name | hit@5 of the 16 tasks in canonical order, in percent (hit@10 for both tasks of
# Fashion200K and for FashionIQ) | the printed averages of all tasks, of those with queries of one modality, and of
# those with queries of an image and a text.
_TABLES: tuple[tuple[str, str, str], ...] = (
    (
        "union",
        "UniIR paper, table 2; union pool, prompts drawn at random; multi-task: trained without instructions; "
        "384: pictures of 384 pixels",
        """
        BLIP2 zero-shot        |  0.0  0.0  0.0 35.2  0.0  0.0  0.0  0.0  0.0 24.0  0.0  0.0  3.9  6.2 13.8 11.4 |  5.9
        multi-task CLIP_SF     | 12.7 27.3  5.9 82.3 41.1 68.2 12.1 84.6  1.2 31.0 36.8 18.3 22.8 32.0 58.7 42.3 | 36.1
        multi-task CLIP_FF     |  8.8 24.6  5.9 67.9 38.3 62.5  8.2 80.8  1.3 30.8 31.6 15.4 19.7 32.7 50.1 31.5 | 31.9
        multi-task BLIP_SF     |  5.0 22.9  5.7 74.4 33.6 73.2  4.8 74.9  2.6 32.9 33.2 11.9 26.1 36.7 51.0 23.0 | 32.0
        multi-task BLIP_FF     |  8.3 27.7  9.0 76.1 36.0 74.7  4.9 76.9  3.6 31.3 37.7 17.8 28.1 45.1 51.6 25.4 | 34.6
        multi-task BLIP_FF 384 | 10.5 35.2 13.1 76.9 38.5 75.2  6.0 81.4  4.0 32.5 39.2 17.1 29.0 47.4 53.1 25.2 | 36.5
        UniIR CLIP_SF          | 42.6 77.9 17.8 84.7 59.4 78.8 42.8 92.3 17.9 32.0 39.2 24.0 24.3 43.9 60.2 44.6 | 48.9
        UniIR CLIP_FF          | 28.8 74.7 15.5 78.4 50.0 75.3 28.6 89.0 13.7 31.9 34.7 17.5 20.5 40.9 55.8 36.8 | 43.3
        UniIR BLIP_SF          | 20.9 71.6 24.3 78.9 47.2 76.8 19.4 88.2 24.3 33.4 35.2 16.7 26.2 43.0 51.8 25.4 | 42.7
        UniIR BLIP_FF          | 23.0 75.6 25.4 79.5 50.3 79.7 21.1 88.8 27.6 33.0 38.7 19.7 28.5 51.4 57.8 27.7 | 45.5
        UniIR BLIP_FF 384      | 26.5 75.7 26.7 79.2 51.4 79.4 22.9 90.1 28.4 33.7 40.7 19.2 29.8 51.1 59.5 31.1 | 46.6
        """,
    ),
    (
        "union",
        "reproduction by Pyserini with the released UniIR checkpoints; union pool, first prompt",
        """
        CLIP_SF rerun | 42.54 71.73 17.86 83.42 52.51 77.62 38.67 91.60 18.06 31.70 39.60 22.22 24.25 43.84 60.19 44.35|
        BLIP_FF rerun | 22.65 66.95 26.00 77.96 49.68 77.18 20.95 89.72 27.27 31.89 39.49 19.99 29.02 48.27 56.03 26.23|
        """,
    ),
    (
        "union",
        "MM-Embed paper; union pool; its task values as the V-Retrver paper quotes them in table 2",
        """
        MM-Embed | 41.0 71.3 17.1 95.9 68.8 85.0 41.3 90.1 18.4 32.4 42.1 42.3 25.7 50.0 64.1 57.7 | 52.7 56.1 47.0
        """,
    ),
    (
        "union",
        "MM-Embed paper, averages only; union pool",
        """
        E5-V                | | 11.5 14.6  6.3
        MagicLens           | |  5.8  8.1  2.0
        CLIP_SF of MM-Embed | | 48.3 53.5 39.5
        M^hard (NV-Embed)   | | 52.3 56.4 45.5
        """,
    ),
    (
        "union",
        "U-MARVEL paper, averages only; union pool; LamRA reranks what LamRA-Ret retrieves",
        """
        LamRA-Ret | | 54.9
        U-MARVEL  | | 60.7
        LamRA     | | 61.4
        """,
    ),
    (
        "local",
        "LamRA paper, table 2, which quotes UniIR; local pools",
        """
        CLIP-L zero-shot | 43.3 61.1  6.6 36.2 43.3 45.1 41.3 79.0  7.7 26.1 24.2 20.5  7.0 13.2 38.8 26.4 | 32.5
        SigLIP zero-shot | 30.1 75.7 36.5 39.8 27.0 43.5 30.8 88.2 34.2 28.9 29.7 25.1 14.4 22.7 41.7 27.4 | 37.2
        BLIP zero-shot   | 16.4 74.4 15.9 44.9 26.8 20.3 17.2 83.2 19.9 27.4 16.1 10.2  2.3 10.6 27.4 16.6 | 26.8
        BLIP2 zero-shot  | 16.7 63.8 14.0 38.6 26.9 24.5 15.0 80.0 14.2 25.4 12.2  5.5  4.4 11.8 27.3 15.8 | 24.8
        UniIR BLIP_FF    | 23.4 79.7 26.1 80.0 50.9 79.8 22.8 89.9 28.9 33.0 41.0 22.4 29.2 52.2 55.8 33.0 | 46.8
        UniIR CLIP_SF    | 42.6 81.1 18.0 84.7 59.4 78.7 43.1 92.3 18.3 32.0 45.5 27.9 24.4 44.6 67.6 48.9 | 50.6
        """,
    ),
    (
        "local",
        "reproduction by Pyserini with the released UniIR checkpoints; local pools, first prompt",
        """
        CLIP_SF rerun | 42.84 80.84 18.03 83.87 53.19 78.53 42.61 92.02 18.10 31.75 46.00 27.23 24.55 45.32 68.88 49.06|
        BLIP_FF rerun | 23.05 79.55 26.12 78.66 50.51 78.45 22.90 90.86 28.49 31.89 42.61 23.54 29.44 50.34 56.25 30.57|
        """,
    ),
    (
        "local",
        "U-MARVEL paper, averages only; local pools; LamRA reranks what LamRA-Ret retrieves",
        """
        LamRA-Ret | | 56.6
        U-MARVEL  | | 63.2
        LamRA     | | 63.7
        """,
    ),
)

_MULTI_MODAL = [name for name in MBEIR_TASKS if TASK_MODALITIES[Task.parse(name).task_id][0] is Modality.IMAGE_TEXT]
_GROUPS = {
    "average": list(MBEIR_TASKS),
    "single_modal": [name for name in MBEIR_TASKS if name not in _MULTI_MODAL],
    "multi_modal": _MULTI_MODAL,
}


def _read(pool: str, source: str, table: str) -> list[ComparedRun]:
    """The systems of one table; an average that is not printed is that of the 16 values, where they are known."""
    runs = []
    for line in table.strip().splitlines():
        name, *cells = line.split("|")
        per_task, printed = ([float(figure) / 100 for figure in cell.split()] for cell in cells)
        values = dict(zip(MBEIR_TASKS, per_task, strict=True)) if per_task else {}
        means = {group: sum(values[t] for t in tasks) / len(tasks) for group, tasks in _GROUPS.items() if per_task}
        averages = dict(zip(_GROUPS, printed, strict=False))
        runs.append(ComparedRun(name.strip(), pool, {**values, **means, **averages}, source=source))
    return runs


#: The published systems: shares from 0 to 1 by task name, ``"average"``, ``"single_modal"`` and ``"multi_modal"``.
PUBLISHED: tuple[ComparedRun, ...] = tuple(run for table in _TABLES for run in _read(*table))
