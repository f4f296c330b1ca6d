"""What long work shows of itself: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

#: Seconds between the lines in a log.
LOG_EVERY = 30.0


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")


class _Lines(Progress):
    """In place of the bar, where standard error is no terminal: a line every :data:`LOG_EVERY` seconds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(disable=True, speed_estimate_period=10 * LOG_EVERY, **settings)
        self._printed = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        now = time.monotonic()
        if now - self._printed >= LOG_EVERY:
            self._printed = now
            print(_line(self._tasks[task_id]), file=sys.stderr, flush=True)


def _line(task: Task) -> str:
    """``label: N of M, rate, ETA``, as far as they are known."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    rate = f", {task.speed:,.0f}/s" if task.speed else ""
    left = "" if task.time_remaining is None else f", ETA {timedelta(seconds=round(task.time_remaining))}"
    return f"{task.description}: {task.completed:,.0f}{total}{rate}{left}"


def progress_bar(show: bool = True) -> Progress:
    """Count, rate and ETA on standard error: a bar that goes away when it is done, in a log a line now and then.

    Args:
        show: Whether to show it at all.
    """
    console = Console(stderr=True)
    if show and not console.is_terminal:  # a bar would leave blank lines in a log
        return _Lines()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not show,
    )
