"""What ``metrics.json`` holds: metrics, headline figures with intervals, kinds of error, and the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mmembed.items import dataset_number, task_order
from lightning_mmembed.retrieval.results import (
    POOLS,
    Labels,
    RetrievalResult,
    TaskResult,
    average_prompts,
    headline_depth,
    task_groups,
)
from lightning_mmembed.retrieval.significance import bootstrap_interval

#: The domains of M-BEIR and the ids of their datasets (UniIR, src/data/preprocessing/utils.py).
DOMAINS: dict[str, tuple[int, ...]] = {"news": (0, 3), "fashion": (1, 7), "wiki": (2, 5, 6), "common": (4, 8, 9)}

#: Why a first result is wrong, the first that holds (UniIR's types 1 to 3).
ERRORS = ("wrong_modality", "wrong_domain", "other")


def summarise(results: Sequence[RetrievalResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put together the content of ``metrics.json``.

    Args:
        results: The outcome with each prompt.
        facts: What the protocol says beside what the outcome knows, such as the split and the instructions.

    Returns:
        By pool, ``"union"`` and ``"local"``: the metrics (:attr:`RetrievalResult.metrics`), ``"headline"`` and
        ``"errors"``. Beside the pools: ``"unreachable"``, ``"protocol"`` and, where there are several, ``"prompts"``.
        All metrics are shares from 0 to 1.
    """
    result = average_prompts(results)
    content = result.metrics
    for pool, metrics in content.items():
        metrics["headline"] = _headline(result, pool, list(metrics["tasks"]))
        metrics["errors"] = _errors(results, pool, list(metrics["tasks"]))
    if len(results) > 1:
        content["prompts"] = {pool: _prompts(results, pool) for pool in POOLS if pool in content}
    found = {name: unreachable(result.tasks[name], result) for name in sorted(result.tasks, key=task_order)}
    content["unreachable"] = {name: counts for name, counts in found.items() if counts}
    content["protocol"] = {
        **facts,
        "ties": "lower id first",
        "queries": sum(len(outcome.queries) for outcome in result.tasks.values()),
        "candidates": len(result.pool),
        **{f"search_{name}": value for name, value in result.search_info.items()},
        "version": version("lightning-mmembed"),
    }
    return content


def _headline(result: RetrievalResult, pool: str, tasks: Sequence[str]) -> dict[str, Any]:
    """The figures that published tables give, with 95 % intervals over the queries."""
    values = {name: result.tasks[name].headline(pool).numpy() for name in tasks}

    def figure(names: Sequence[str]) -> dict[str, float]:
        low, high = bootstrap_interval({name: values[name] for name in names})
        return {"value": float(np.mean([values[name].mean() for name in names])), "low": low, "high": high}

    rows = {name: {"metric": f"hit@{headline_depth(name)}", **figure([name])} for name in tasks}
    return {"tasks": rows, **{group: figure(names) for group, names in task_groups(tasks).items()}}


def _errors(results: Sequence[RetrievalResult], pool: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Kinds of wrong first results by task and over all queries, with every prompt counted."""
    rows = {}
    for name in tasks:
        counts = [error_counts(result.tasks[name], result, pool) for result in results]
        rows[name] = {kind: sum(c[kind] for c in counts) for kind in (*ERRORS, "misses")}
    total = {kind: sum(row[kind] for row in rows.values()) for kind in (*ERRORS, "misses")}
    return {"tasks": {name: _with_shares(row) for name, row in rows.items()}, "all": _with_shares(total)}


def _with_shares(row: Mapping[str, int]) -> dict[str, Any]:
    return {**row, "shares": {kind: row[kind] / row["misses"] if row["misses"] else 0.0 for kind in ERRORS}}


def error_counts(outcome: TaskResult, result: RetrievalResult, pool: str) -> dict[str, int]:
    """Count the kinds of wrong first results of a task, as UniIR's ``mbeir_analyst.py`` does.

    Args:
        outcome: The task.
        result: The evaluation that it belongs to.
        pool: ``"union"`` or ``"local"``.

    Returns:
        ``misses``: queries whose first result is no labelled positive. Of these ``wrong_modality``: it has another
        modality than wanted; ``wrong_domain``: the wanted one, but it is of another domain than the query; ``other``.
        A dataset that is not M-BEIR's is a domain of its own.
    """
    first = outcome.rankings[pool].rows[:, 0]
    missed = (first >= 0) & (outcome.first_hits[pool][:, 0] != 1)
    rows = first[missed]
    modality = result.pool.modalities[rows] != outcome.queries.task.target_modality.code
    domain = (_domains(result.pool.ids[rows]) != _domains(outcome.queries.ids[missed])) & ~modality
    counts = (int(modality.sum()), int(domain.sum()), int((~modality & ~domain).sum()))
    return {**dict(zip(ERRORS, counts, strict=True)), "misses": len(rows)}


def _domains(ids: Tensor) -> Tensor:
    """A number for the domain of each id: that of its first dataset."""
    datasets = dataset_number(ids)
    domains = datasets.clone()
    for members in DOMAINS.values():
        domains[torch.isin(datasets, torch.tensor(members))] = members[0]
    return domains


def unreachable(outcome: TaskResult, result: RetrievalResult) -> dict[str, int]:
    """Count the labelled positives of a task that its local pool does not hold; nothing if it has no local pool.

    Returns:
        ``positives``: how many, of ``all_positives`` labelled ones. Of these ``other_dataset``: in the union pool,
        with another dataset's id; ``no_pool``: not in the union pool either; the rest is in the local pool of
        another task. ``queries``: how many queries have one; ``queries_without_reachable``: how many have no other.
    """
    if outcome.queries.task.name not in result.pool.local:
        return {}
    labels = Labels(outcome.queries, result.pool)
    outside, anywhere = labels.labelled & ~labels.inside("local"), labels.inside("union")
    foreign = dataset_number(labels.ids) != dataset_number(outcome.queries.ids)[:, None]
    return {
        "queries": int(outside.any(1).sum()),
        "positives": int(outside.sum()),
        "other_dataset": int((outside & anywhere & foreign).sum()),
        "no_pool": int((outside & ~anywhere).sum()),
        "queries_without_reachable": int((~labels.inside("local").any(1)).sum()),
        "all_positives": int(labels.labelled.sum()),
    }


def _prompts(results: Sequence[RetrievalResult], pool: str) -> dict[str, Any]:
    """How far the figures depend on the prompt: averages of each, and the spread of the headline figures."""
    by_prompt = [result.metrics[pool] for result in results]
    tasks = list(by_prompt[0]["tasks"])
    groups = task_groups(tasks)
    headlines = [{name: float(result.tasks[name].headline(pool).mean()) for name in tasks} for result in results]
    averages = {
        group: _spread([float(np.mean([row[name] for name in names])) for row in headlines])
        for group, names in groups.items()
    }
    return {
        "averages": [{group: row[group] for group in groups} for row in by_prompt],
        "headline": {"tasks": {name: _spread([row[name] for row in headlines]) for name in tasks}, **averages},
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """The value of each prompt; the standard deviation is that of a sample."""
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"values": list(values), "mean": mean, "std": std, "min": min(values), "max": max(values)}
