"""Comparison of runs over the same queries: differences, their intervals and their p-values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Difference:
    """How far a run lies from the first run of a comparison.

    Args:
        value: Its share minus that of the first run.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        p: Two-sided p-value.
        p_holm: The p-value adjusted over the tasks; None for an average.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float | None


@dataclass(frozen=True)
class ComparedRun:
    """One row of a comparison over one pool.

    Args:
        name: Name of the run, or of the published system.
        pool: ``"union"`` or ``"local"``.
        values: Headline share by task name, and ``"average"``, ``"single_modal"``, ``"multi_modal"`` where known.
        intervals: 95 % intervals by the same keys.
        differences: Against the first run, by the same keys.
        source: Where a published figure comes from and its protocol; empty for a run of one's own.
    """

    name: str
    pool: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    differences: Mapping[str, Difference] = field(default_factory=dict)
    source: str = ""
