"""A tiny checkpoint of every family, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from family_worlds import UNKNOWN, WORLDS, build


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the checkpoint of a family lies, by its ``model_type``; read-only."""
    root, worlds = tmp_path_factory.mktemp("families"), {**WORLDS, "aya_vision": UNKNOWN}

    def checkpoint(name: str) -> Path:
        return root / name if (root / name).is_dir() else build(root / name, worlds[name])

    return checkpoint
