"""What long work says of itself where there is no terminal."""

from __future__ import annotations

import pytest

from lightning_mmembed import progress
from lightning_mmembed.progress import progress_bar


def test_in_a_log_long_work_says_how_far_it_is_and_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY", 10.0)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress_bar() as bar:
        bar.get_time = lambda: clock[0]
        for label, total, step in (("writing pictures", 5000, 100), ("reading records", None, 2)):
            task = bar.add_task(label, total=total)
            for _ in range(16):
                clock[0] += 1.25
                bar.advance(task, step)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "writing pictures: 800 of 5,000, 80/s, ETA 0:00:53",
        "writing pictures: 1,600 of 5,000, 80/s, ETA 0:00:43",
        "reading records: 16, 2/s",
        "reading records: 32, 2/s",
    ]


def test_short_work_and_work_that_is_to_be_quiet_say_nothing_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for show in (True, False):
        with progress_bar(show) as bar:
            bar.advance(bar.add_task("reading records", total=None))
        monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    assert capsys.readouterr().err == ""
