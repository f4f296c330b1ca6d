"""How many processes work on a conversion, and how much they are given ahead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_mmembed.data.jobs import run_jobs, usable_cores


class Echo:
    """Returns the job."""

    def __getitem__(self, job: int) -> int:
        return job


@pytest.mark.parametrize("workers", [0, 2])
def test_few_jobs_are_drawn_ahead_for_each_brings_its_pictures_with_it(workers: int) -> None:
    drawn = []

    def jobs() -> Iterator[Any]:
        for number in range(12):
            drawn.append(number)
            yield number

    ahead = []
    for done, outcome in enumerate(run_jobs(Echo(), jobs(), workers)):  # type: ignore[arg-type]
        assert outcome == done
        ahead.append(len(drawn) - done - 1)
    assert max(ahead) == workers
    assert len(drawn) == 12


def test_a_conversion_uses_the_cores_it_may_use_and_no_more_than_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, used in ((3, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert usable_cores() == used
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, used in ((None, 1), (2, 2), (9, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda n=count: n)
        assert usable_cores() == used
