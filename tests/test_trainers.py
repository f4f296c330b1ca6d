"""Every trainer's configuration: the devices and the strategy that it makes, and the job that SLURM is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig, OmegaConf

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.module import EXACT_STRATEGIES
from lightning_mmembed.strategies import FSDP2Strategy

TRAINERS = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "trainer").glob("*.yaml"))

#: What each says beside what it takes over: processes of a machine, strategy, precision.
EXPECTED = {
    "cpu": (1, "auto", "32-true"),
    "gpu": (1, "auto", "bf16-mixed"),
    "ddp": (-1, "ddp", "bf16-mixed"),
    "ddp_sim": (2, "ddp", "32-true"),
    "fsdp2": (-1, "FSDP2Strategy", "bf16-mixed"),
    "fsdp2_sim": (2, "FSDP2Strategy", "32-true"),
    "slurm": (8, "ddp", "bf16-mixed"),
}


def composed(directory: Path, *overrides: str) -> DictConfig:
    paths = [f"paths.root_dir={directory}", f"paths.output_dir={directory}/run"]
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        return compose("train", [*paths, *overrides], return_hydra_config=True)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_names_its_devices_strategy_and_precision_and_only_slurm_a_launcher(
    name: str, tmp_path: Path
) -> None:
    config = composed(tmp_path, f"trainer={name}")
    trainer, launcher = config.trainer, config.hydra.launcher["_target_"].rpartition(".")[2]
    assert launcher == ("SlurmLauncher" if name == "slurm" else "BasicLauncher")
    strategy = trainer.get("strategy", "auto")
    called = strategy["_target_"].rpartition(".")[2] if isinstance(strategy, DictConfig) else strategy
    assert (trainer.devices, called, trainer.get("precision", "32-true")) == EXPECTED[name]
    assert trainer.accelerator == ("cpu" if name.endswith(("cpu", "sim")) else "gpu")


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_builds_one_with_which_gradcache_is_exact(name: str, tmp_path: Path) -> None:
    here = ["++trainer.accelerator=cpu", "++trainer.precision=32-true"]  # there may be no GPU
    if name in ("ddp", "fsdp2"):
        here.append("trainer.devices=2")
    trainer = hydra.utils.instantiate(composed(tmp_path, f"trainer={name}", *here).trainer, logger=False)
    assert isinstance(trainer, Trainer)
    wanted: Any = {"auto": SingleDeviceStrategy, "ddp": DDPStrategy, "FSDP2Strategy": FSDP2Strategy}[EXPECTED[name][1]]
    assert type(trainer.strategy) is wanted
    assert isinstance(trainer.strategy, EXACT_STRATEGIES)
    assert trainer.world_size == {"cpu": 1, "gpu": 1, "slurm": 8}.get(name, 2)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "slurm"])
def test_the_trainers_of_gpus_take_a_number_of_nodes(name: str, tmp_path: Path) -> None:
    given = ["trainer.num_nodes=2", "trainer.devices=4", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    trainer = hydra.utils.instantiate(composed(tmp_path, f"trainer={name}", *given).trainer, logger=False)
    assert (trainer.num_nodes, trainer.world_size) == (2, 8)


@pytest.mark.parametrize(
    "overrides", [["trainer=slurm"], *([f"trainer={name}", "hydra/launcher=slurm"] for name in ("fsdp2", "gpu"))]
)
def test_a_job_has_as_many_nodes_gpus_and_processes_as_the_trainer(overrides: list[str], tmp_path: Path) -> None:
    config = composed(tmp_path, *overrides, "trainer.num_nodes=3", "trainer.devices=4", "hydra.launcher.partition=long")
    launcher = config.hydra.launcher
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (3, 4, 4)
    assert (launcher.name, launcher.partition) == ("train", "long")
    OmegaConf.to_container(config.trainer, resolve=True)


def test_a_torch_that_is_too_old_for_fsdp2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu128")
    with pytest.raises(UserInputError, match=r"FSDP2 needs torch 2.9 or newer; this is 2.8.1"):
        FSDP2Strategy()
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    FSDP2Strategy()
