"""Contract 11 at the command line: wrong input ends a command with one message that names it, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import ARCHITECTURE, tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule

pytestmark = pytest.mark.slow  # each command takes seconds to import torch, transformers and Lightning

MAIN = "import sys; from lightning_mmembed import cli, cli_shard; {**vars(cli), **vars(cli_shard)}[sys.argv.pop(1)]()"


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def world(
    tiny_source: Path, tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with ``source`` and ``shards``, a good, a malicious and a broken checkpoint."""
    directory = tmp_path_factory.mktemp("commands")
    trainer = tiny_trainer(directory, max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards, batch_size=8))
    trainer.save_checkpoint(directory / "good.ckpt")
    torch.save({"state_dict": {}, "extra": Malicious(directory / "trace")}, directory / "evil.ckpt")
    (directory / "broken.ckpt").write_bytes(b"no checkpoint")
    (directory / "source").symlink_to(tiny_source)
    (directory / "shards").symlink_to(tiny_shards)
    return directory


PETS = ["data=mbeir", "dataset=pets", "data.source=null", "data.shards={world}/shards", "paths.root_dir={world}"]
SMALL = [*PETS, *(f"model.encoder.architecture.{name}={value}" for name, value in ARCHITECTURE.items())]


@pytest.mark.parametrize(
    ("command", "overrides", "named"),
    [
        pytest.param("train_main", ["trainer.epochs=3"], ["trainer.epochs", "not in struct"], id="unknown option"),
        pytest.param("train_main", ["data=nothing"], ["data/nothing", "mbeir", "mini"], id="unknown choice of a group"),
        pytest.param("train_main", [*PETS, "data.source=/absent"], ["source='/absent' is no folder"], id="no source"),
        pytest.param("train_main", ["data=mbeir", "data.source=null"], ["dataset", "data.shards"], id="no dataset"),
        pytest.param(
            "train_main", [*PETS, "data.batch_mix=striped"], ["batch_mix='striped'", "one-task"], id="batch mix"
        ),
        pytest.param(
            "train_main", [*SMALL, "model.encoder.pooling=max"], ["pooling='max'", "latent-attention"], id="pooling"
        ),
        pytest.param(
            "train_main", [*SMALL, "ckpt_path=absent.ckpt"], ["ckpt_path='absent.ckpt' is no file"], id="resume nothing"
        ),
        pytest.param(
            "train_main",
            [*SMALL, "ckpt_path={world}/evil.ckpt"],
            ["evil.ckpt' is no checkpoint"],
            id="resume a malicious file",
        ),
        pytest.param(
            "train_main",
            [*SMALL, "ckpt_path={world}/broken.ckpt"],
            ["broken.ckpt' is no checkpoint"],
            id="resume a broken file",
        ),
        pytest.param(
            "evaluate_main",
            [*PETS, "ckpt_path={world}/good.ckpt"],
            ["good.ckpt'", "another architecture"],
            id="architecture",
        ),
        pytest.param(
            "evaluate_main", [*SMALL, "ckpt_path=absent.ckpt"], ["ckpt_path='absent.ckpt' is no file"], id="absent"
        ),
        pytest.param(
            "evaluate_main", [*SMALL, "split=train"], ["split='train' is unknown", "'val'"], id="unknown split"
        ),
        pytest.param(
            "evaluate_main",
            [*SMALL, "callbacks.evaluation.metrics=[recal@5]"],
            ["metric='recal@5'", "hit@5"],
            id="metric",
        ),
        pytest.param(
            "shard_main", ["source={world}/source"], ["Missing mandatory value: out"], id="shards without out"
        ),
        pytest.param(
            "shard_main",
            ["source={world}", "out={world}/new"],
            ["is neither a folder with query/ and cand_pool/"],
            id="shards of another folder",
        ),
    ],
)
def test_wrong_input_ends_with_one_message_that_names_it(
    world: Path, tmp_path: Path, command: str, overrides: list[str], named: list[str]
) -> None:
    arguments = [override.format(world=world) for override in overrides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", MAIN, command, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    message = process.stderr
    by_hydra = "HYDRA_FULL_ERROR" in message  # what Hydra finds while it composes, before the command runs
    assert by_hydra == overrides[0].startswith(("trainer.epochs", "data=nothing"))
    assert process.returncode == (1 if by_hydra else 2)
    assert by_hydra or message.startswith("error: ")
    assert "Traceback" not in message + process.stdout
    assert len(message) < 1000
    for part in named:
        assert part in message
    assert not (world / "trace").exists()
