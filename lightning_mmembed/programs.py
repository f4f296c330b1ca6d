"""Runs the console scripts as processes that end when this one does."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from lightning_mmembed.errors import TRY_AGAIN, UserInputError

#: What asks a run to end: what a scheduler sends, or callbacks.preemption.signals name.
_ASKING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def run_program(program: str, arguments: Sequence[str]) -> int:
    """Run one of the console scripts, and give its exit status; it ends when this process does.

    SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are handed on to it. Ctrl-C, which a terminal sends to both, is waited for:
    it saves and ends by itself; a second one ends it at once.

    Args:
        program: ``"train"`` or ``"evaluate"``.
        arguments: Its overrides.

    Returns:
        Its status, as a shell gives it; never 0 where a signal has asked it to end.

    Raises:
        UserInputError: If the script is not installed.
    """
    command = [sys.executable, str(_script(f"mmembed-{program}")), *arguments]
    child = subprocess.Popen(command, preexec_fn=_end_with_parent)
    asked = threading.Event()

    def hand_on(number: int, frame: object) -> None:
        asked.set()
        child.send_signal(number)

    numbers = [getattr(signal, name) for name in _ASKING if hasattr(signal, name)]
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        try:
            status = child.wait()
        except KeyboardInterrupt:
            asked.set()
            status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        child.kill()
        child.wait()
    if asked.is_set() and status == 0:
        return TRY_AGAIN  # it was at its end, or took no notice: nothing is begun after it
    return status if status >= 0 else 128 - status


def _script(name: str) -> Path:
    """A console script of the package, where its installer put it: it need not be beside the interpreter."""
    files = (file for one in distributions(name="lightning-mmembed") for file in one.files or ())
    for place in (Path(str(file.locate())) for file in files if file.name == name):
        if place.is_file():
            return place
    raise UserInputError(
        f"{name}, with which stages are run, is not installed; install the package with pip, a checkout with "
        "pip install -e ."
    )


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
