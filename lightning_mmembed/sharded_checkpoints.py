"""Whole checkpoints of sharded weights: the same file whatever strategy wrote it, and never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lightning_mmembed.files import replacing


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside the place where it belongs, then renames it.

    Lightning writes it to the system's temporary folder and moves it: where that is another disk, a copy, which a kill
    cuts short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See :class:`TorchCheckpointIO`."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


class WholeCheckpoints(ModelParallelStrategy):
    """A strategy that shards weights, and whose checkpoints in one file are those that DDP writes and reads.

    Lightning numbers the optimizer's states by all weights of the model, and DDP by those that are trained. Weights
    that a checkpoint leaves out are put in by the module (``on_load_checkpoint``), as with any other strategy. A folder
    of shards is read by Lightning; it is written beside its place and renamed.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the Trainer restores the optimizer: from one file; a folder is read at once."""
        return self._reads_file

    _reads_file = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights by name: shards of all, or those that are trained, whole, in the first process."""
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        module = self.lightning_module
        assert module is not None
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        weights: dict[str, Any] = {}
        for name, value in module.state_dict().items():
            if name not in frozen:
                self._keep(weights, name, value)
        return weights

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as the optimizer itself gives it: shards of it, or whole in the first process."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        state = (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        states: dict[Any, dict[str, Any]] = {}
        for number, values in state["state"].items():
            states[number] = {}
            for name, value in values.items():
                self._keep(states[number], name, value)
        return {**state, "state": states}

    def _keep(self, kept: dict[Any, Any], name: Any, value: Any) -> None:
        """Put a tensor together, with all other processes, and keep it in the first."""
        value = whole(value)
        if self.is_global_zero:
            kept[name] = value.cpu() if isinstance(value, Tensor) else value

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a file or a folder whole; what stood there before stays until then."""
        path = Path(self.broadcast(str(filepath)))
        new = path.with_name(f".{path.name}.new")
        if self.is_global_zero:
            _remove(new)
        self.barrier()
        super().save_checkpoint(checkpoint, new, storage_options)
        self.barrier()
        if self.is_global_zero:
            finish_replacing(path, complete=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, of which the Trainer takes what it needs, or a folder at once."""
        path = Path(self.broadcast(str(checkpoint_path)))
        self._reads_file = path.is_file()
        if not self._reads_file:
            return super().load_checkpoint(path, weights_only)
        read: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return read

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put the weights of a file into the shards."""
        if self._reads_file:
            assert self.lightning_module is not None
            load_whole_weights(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put the optimizer's states of a file into the shards."""
        if self._reads_file:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                load_whole_optimizer_state(optimizer, state)


def whole(value: Any) -> Any:
    """A tensor put together of its shards, with all processes that hold one; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor, which is all of it where it is not sharded."""
    part: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all of them have, where ``like`` is sharded; else the tensor."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights that are whole, or already this module's own, into a module that may be sharded.

    Args:
        module: The module.
        weights: All of its weights by name.

    Raises:
        RuntimeError: If names or shapes differ.
    """
    own = module.state_dict()
    module.load_state_dict({name: placed_like(value, own.get(name, value)) for name, value in weights.items()})


def load_whole_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load what an optimizer over whole weights gave into one over weights that may be sharded.

    Args:
        optimizer: Over the same weights in the same order.
        state: Its ``state_dict()``.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {
            name: placed_like(value, parameters[number]) if _is_like(value, parameters[number]) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def finish_replacing(path: Path, complete: bool = False) -> None:
    """Put what was written beside a checkpoint in its place, as far as a kill has left that to do.

    A folder cannot be renamed over another one. The old one is therefore moved away first: where it is not in its
    place, the new one is known to be whole.

    Args:
        path: The checkpoint.
        complete: That the new one is whole.
    """
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if complete and (path.is_dir() or (new.is_dir() and path.exists())):
        _remove(old)
        path.rename(old)
    if complete or (old.exists() and not path.exists()):
        os.replace(new, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
