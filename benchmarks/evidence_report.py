"""The tables and figures of benchmarks.evidence, written into docs/."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from lightning_mmembed.items import Modality, Task
from lightning_mmembed.retrieval.results import task_groups
from lightning_mmembed.retrieval.significance import paired_bootstrap

matplotlib.use("svg")
from matplotlib import pyplot as plt

DOCS = Path("docs")
PAGE = DOCS / "results.md"
TITLES = {
    "pretrained-mixed": "Pretrained start with LoRA, batches of mixed tasks",
    "pretrained-one-task": "Pretrained start with LoRA, batches of one task",
    "pretrained-accumulated": "Pretrained start with LoRA, steps of eight batches of 16, each of one task",
    "random-mixed": "Random start, every weight trained, batches of mixed tasks",
    "random-one-task": "Random start, every weight trained, batches of one task",
}
#: The tables with figures, and whose modality matrices are drawn.
MATRICES = {"main": ("start", "random", "hard"), "long": ("long-random", "long-random-as-long", "long-hard")}


@dataclass(frozen=True)
class Measured:
    """A row of a table that is finished.

    Args:
        name: In the table.
        key: Its folder.
        places: Its run directory for each seed; the evaluations lie in ``multimodal`` and ``text`` below it.
        against: Keys of the rows that it is compared with; the one above it if there are none.
    """

    name: str
    key: str
    places: tuple[Path, ...]
    against: tuple[str, ...] = ()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads((place / "multimodal" / "metrics.json").read_text()) for place in self.places]

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        return [json.loads((place / "text" / "metrics.json").read_text()) for place in self.places]

    def union(self, group: str, metric: str) -> list[float]:
        """In % for each seed."""
        return [100 * one["union"][group][metric] for one in self.metrics]

    def modality(self, wanted: Modality | None) -> list[float]:
        """modality@1 of the tasks that want a modality, in % for each seed."""
        found = []
        for one in self.metrics:
            tasks = one["union"]["tasks"]
            names = [name for name in tasks if wanted in (None, Task.parse(name).target_modality)]
            found.append(100 * float(np.mean([tasks[name]["modality@1"] for name in names])))
        return found

    def per_query(self, evaluation: str, metric: str) -> dict[str, np.ndarray]:
        """By task ``(S, Q)`` values over the union pool, a row for each seed, ordered by the queries' ids."""
        by_task: dict[str, list[np.ndarray]] = {}
        for place in self.places:
            table = pq.read_table(place / evaluation / "queries.parquet", columns=["pool", "task", "qid", metric])
            columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
            for task in np.unique(columns["task"]):
                rows = (columns["pool"] == "union") & (columns["task"] == task)
                order = np.argsort(columns["qid"][rows])
                by_task.setdefault(str(task), []).append(columns[metric][rows][order].astype(float))
        return {task: np.stack(values) for task, values in by_task.items()}


def with_interval(values: Sequence[float]) -> str:
    """Mean and half the width of the 95 % interval over the seeds, by Student's t."""
    if len(values) < 2:
        return f"{np.mean(values):.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.1f} ±{half:.1f}"


COLUMNS: dict[str, Callable[[Measured], list[float]]] = {
    "union hit@5": lambda row: row.union("average", "hit@5"),
    "single-modal": lambda row: row.union("single_modal", "hit@5"),
    "multi-modal": lambda row: row.union("multi_modal", "hit@5"),
    "modality@1": lambda row: row.modality(None),
    "text": lambda row: row.modality(Modality.TEXT),
    "image": lambda row: row.modality(Modality.IMAGE),
    "image,text": lambda row: row.modality(Modality.IMAGE_TEXT),
    "local hit@5": lambda row: [100 * one["local"]["average"]["hit@5"] for one in row.metrics],
    "text ndcg@10": lambda row: [100 * one["union"]["average"]["ndcg@10"] for one in row.texts],
}
#: What is tested: its name in the table, the evaluation, the metric.
TESTED = (
    ("union hit@5", "multimodal", "hit@5"),
    ("modality@1", "multimodal", "modality@1"),
    ("text ndcg@10", "text", "ndcg@10"),
)


def table(rows: Sequence[Measured]) -> str:
    """The figures of some rows."""
    lines = ["| run | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {row.name} | " + " | ".join(with_interval(of(row)) for of in COLUMNS.values()) + " |" for row in rows]
    return "\n".join(lines)


def tests(rows: Sequence[Measured]) -> str:
    """Each row against those that it is to be compared with."""
    lines = ["| difference | " + " | ".join(name for name, _, _ in TESTED) + " |", "|---" * (len(TESTED) + 1) + "|"]
    pairs = []
    for place, row in enumerate(rows):
        others = [other for other in rows if other.key in row.against] or list(rows[max(0, place - 1) : place])
        pairs += [(row, other) for other in others]
    for row, other in pairs:
        cells = []
        for _, evaluation, metric in TESTED:
            own, theirs = (one.per_query(evaluation, metric) for one in (row, other))
            differences = {task: 100 * (own[task] - theirs[task]) for task in own}
            means = {task: of_seeds.mean(0) for task, of_seeds in differences.items()}
            found = paired_bootstrap(means, task_groups(list(means)))["average"]
            by_seed = np.mean([of_seeds.mean(1) for of_seeds in differences.values()], axis=0)
            seeds = ", ".join(f"{one:+.1f}" for one in by_seed)
            cells.append(f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]; {seeds}")
        lines.append(f"| {row.name}, minus {other.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrix(row: Measured, modalities: Mapping[str, str]) -> np.ndarray:
    """``(3, 3)`` share of the queries by wanted modality (rows) and that of the first result, over all seeds."""
    names = [m.value for m in Modality]
    counts = np.zeros((3, 3))
    for place in row.places:
        for path in sorted((place / "multimodal" / "runs" / "union").glob("*.run")):
            wanted = names.index(Task.parse(path.stem).target_modality.value)
            for line in path.read_text().splitlines():
                _, _, did, rank, *_ = line.split()
                if rank == "1":
                    counts[wanted, names.index(modalities[did])] += 1
    shares: np.ndarray = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return shares


def pool_modalities(dataset: str) -> dict[str, str]:
    """The modality of each candidate of the test pool."""
    from lightning_mmembed.data import Shards
    from lightning_mmembed.items import decode_id

    pool, names = Shards(f"data/shards/{dataset}").pool("test"), [m.value for m in Modality]
    return {decode_id(i): names[m] for i, m in zip(pool.ids.tolist(), pool.modalities.tolist(), strict=True)}


def draw_bars(regimes: Mapping[str, Sequence[Measured]], column: str, path: Path) -> None:
    """A column by run, a panel for each regime, with the seeds as dots; a run that a regime lacks leaves a gap."""
    names = list(dict.fromkeys(row.name for rows in sorted(regimes.values(), key=len, reverse=True) for row in rows))
    size = (1.5 + 3.1 * len(regimes), 0.6 + 0.3 * len(names))
    figure, panels = plt.subplots(1, len(regimes), figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, (regime, rows) in zip(panels[0], regimes.items(), strict=True):
        for row in rows:
            place, values = names.index(row.name), COLUMNS[column](row)
            panel.barh(place, np.mean(values), color="#d98a3d" if "(paper)" in row.name else "#7a9cc6")
            panel.plot(values, [place] * len(values), "o", color="#222222", markersize=3)
        panel.set_title(regime.replace("-", " start, ", 1), fontsize=9)
        panel.set_xlabel(f"{column} (%)", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    save(figure, path)


def draw_matrices(regimes: Mapping[str, Sequence[Measured]], modalities: Mapping[str, str], path: Path) -> None:
    """Wanted against got: a line of panels for each regime, one for each of its rows."""
    names, widest = [m.value for m in Modality], max(map(len, regimes.values()))
    size = (2.6 * widest, 2.6 * len(regimes))
    figure, panels = plt.subplots(len(regimes), widest, figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (regime, rows) in zip(panels, regimes.items(), strict=True):
        for panel, row in zip(line, rows, strict=False):
            shares = matrix(row, modalities)
            panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (i, j), share in np.ndenumerate(shares):
                ink = "white" if share > 0.5 else "black"
                panel.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=9)
            panel.set_xticks(range(3), names, fontsize=8)
            panel.set_yticks(range(3), names, fontsize=8)
            panel.set_title(f"{regime.replace('-', ' start, ', 1)}\n{row.name}", fontsize=8)
        for panel in line[len(rows) :]:
            panel.set_axis_off()
        line[0].set_ylabel("wanted", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("first result", fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    # Without a date and random ids, equal figures are equal files.
    matplotlib.rcParams["svg.hashsalt"] = "evidence"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def check_page(dataset: str, name: str) -> None:
    """End the program if the page has no place for a table: before the hours that it takes, not after."""
    marks = [f"<!-- evidence: {dataset} {name} -->", f"<!-- end of evidence: {dataset} {name} -->"]
    if not all(mark in PAGE.read_text() for mark in marks):
        raise SystemExit(f"{PAGE} has no lines {marks}; put them where the tables belong")


def report(dataset: str, name: str, regimes: Mapping[str, Sequence[Measured]]) -> None:
    """Write the tables of what is finished into the page, between its marks, and for some tables figures."""
    regimes = {regime: rows for regime, rows in regimes.items() if rows}
    if not regimes:
        print(f"{name}: no row is finished")
        return
    parts = [
        "In %; means, with the 95 % interval over the seeds where there are several. Differences: paired over the test "
        "queries (means over the seeds) with the 95 % bootstrap interval, which knows nothing of the seeds; then that "
        "of each seed."
    ]
    for regime, rows in regimes.items():
        seeds = len(rows[0].places)
        title = f"{TITLES[regime]}: {seeds} seeds" if seeds > 1 else f"{TITLES[regime]}: one seed"
        parts += [f"**{title}**", table(rows)] + ([tests(rows)] if len(rows) > 1 else [])
    if name in MATRICES:
        stem = f"evidence-{dataset}-{name}"
        draw_bars(regimes, "modality@1", DOCS / f"{stem}-modality.svg")
        draw_bars(regimes, "union hit@5", DOCS / f"{stem}-hit.svg")
        parts += [f"![modality@1 by run]({stem}-modality.svg)", f"![union hit@5 by run]({stem}-hit.svg)"]
        shown = {regime: [row for row in rows if row.key in MATRICES[name]] for regime, rows in regimes.items()}
        draw_matrices(shown, pool_modalities(dataset), DOCS / f"{stem}-matrix.svg")
        parts += [f"![wanted and first modality]({stem}-matrix.svg)"]
    put(PAGE, f"{dataset} {name}", "\n\n".join(parts))
    print(f"{name}: written into {PAGE}")


def put(page: Path, mark: str, content: str) -> None:
    """Put text between the marks of a page."""
    begin, end = f"<!-- evidence: {mark} -->", f"<!-- end of evidence: {mark} -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{rest.partition(end)[2]}")
