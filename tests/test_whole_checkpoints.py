"""Checkpoints on disk: never half of one, whatever cuts the writing short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from worlds import tiny_module

from lightning_mmembed.checkpoints import borrowed_weights, drop_frozen
from lightning_mmembed.cli import _last_checkpoint
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.sharded_checkpoints import WholeFileIO, finish_replacing, load_whole_optimizer_state


class Cut(Exception):
    """What cuts the writing short."""


class Bomb:
    """Cannot be written."""

    def __reduce__(self) -> Any:
        raise Cut


def test_a_checkpoint_that_is_cut_short_leaves_the_old_one_in_its_place(tmp_path: Path) -> None:
    path, writer = tmp_path / "last.ckpt", WholeFileIO()
    writer.save_checkpoint({"step": 1}, path)
    with pytest.raises(Cut):
        writer.save_checkpoint({"step": 2, "weights": torch.zeros(1000), "bomb": Bomb()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def put(path: Path, kind: str) -> None:
    """A checkpoint: one file, or a folder of shards."""
    if kind == "file":
        path.write_text(path.name)
    else:
        path.mkdir()
        (path / "shard").write_text(path.name)


def content(path: Path) -> str:
    return path.read_text() if path.is_file() else (path / "shard").read_text()


@pytest.mark.parametrize("new", ["file", "folder"])
@pytest.mark.parametrize("old", ["file", "folder", None])
def test_a_checkpoint_replaces_an_older_one_of_either_kind(tmp_path: Path, old: str | None, new: str) -> None:
    path = tmp_path / "last.ckpt"
    if old is not None:
        put(path, old)
    put(tmp_path / ".last.ckpt.new", new)
    finish_replacing(path, complete=True)
    assert content(path) == ".last.ckpt.new"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        pytest.param(("last.ckpt", ".last.ckpt.new"), "last.ckpt", id="while the new one is written"),
        pytest.param((".last.ckpt.old", ".last.ckpt.new"), ".last.ckpt.new", id="between the two renamings"),
        pytest.param((".last.ckpt.old", "last.ckpt"), "last.ckpt", id="before the old one is deleted"),
        pytest.param((".last.ckpt.new",), None, id="while the first one is written"),
        pytest.param((), None, id="before the first one"),
    ],
)
def test_a_folder_is_found_whole_wherever_its_replacing_was_killed(
    tmp_path: Path, there: tuple[str, ...], expected: str | None
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in there:
        put(checkpoints / name, "folder")
    with initialize_config_module("lightning_mmembed.conf", version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={tmp_path}", "ckpt_path=last"])
    found = _last_checkpoint(cfg)
    assert (None if found is None else content(found)) == expected
    assert not (checkpoints / ".last.ckpt.old").exists()


def test_borrowed_weights_are_given_back_whatever_happens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module, other = tiny_module(tiny_checkpoint), tiny_module(tiny_checkpoint)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.add_(1)
    weights = {f"encoder.{name}": value for name, value in other.encoder.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "other.ckpt")
    own = {name: value.clone() for name, value in module.encoder.state_dict().items()}
    identities = [id(parameter) for parameter in module.encoder.parameters()]
    seen = {}

    def fail(state: dict[str, torch.Tensor]) -> None:
        seen.update({name: value.clone() for name, value in state.items()})
        raise Cut

    with pytest.raises(Cut), borrowed_weights(module.encoder, tmp_path / "other.ckpt"):
        fail(module.encoder.state_dict())
    assert all(torch.equal(seen[name], value) for name, value in other.encoder.state_dict().items())
    assert all(torch.equal(module.encoder.state_dict()[name], value) for name, value in own.items())
    assert [id(parameter) for parameter in module.encoder.parameters()] == identities


def test_a_folder_of_shards_is_not_read_for_an_evaluation(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserInputError, match="is a folder of shards, from which only a fit can be resumed"),
        borrowed_weights(tiny_module(tiny_checkpoint).encoder, tmp_path),
    ):
        pass


def test_processes_that_hold_no_weights_of_the_file_know_the_frozen_ones_too(tiny_checkpoint: Path) -> None:
    """All of them must put together the sharded weights that are fingerprinted."""
    encoder = tiny_module(tiny_checkpoint, lora={"r": 2}).encoder
    first = {"state_dict": {f"encoder.{name}": value for name, value in encoder.state_dict().items()}}
    others: dict[str, Any] = {"state_dict": {}}
    for checkpoint in (first, others):
        drop_frozen(encoder, checkpoint)
    trained = {f"encoder.{name}" for name, value in encoder.named_parameters() if value.requires_grad}
    assert trained <= first["state_dict"].keys()
    assert others["state_dict"] == {}
    assert first["frozen_weights"] == others["frozen_weights"] != {}


def test_the_state_of_an_optimizer_goes_from_one_to_another() -> None:
    def adamw() -> torch.optim.Optimizer:
        torch.manual_seed(0)
        layer = nn.Linear(1, 1)  # its weights are as large as a count of steps, which is never sharded
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 1)).sum().backward()
        return optimizer

    one, other = adamw(), adamw()
    one.step()
    load_whole_optimizer_state(other, one.state_dict())
    for number, values in one.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(other.state_dict()["state"][number][name], value)
