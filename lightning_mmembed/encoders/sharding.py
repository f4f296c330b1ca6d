"""Shards the weights of an encoder over processes with FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_mmembed.encoders.base import Encoder


def is_sharded(encoder: Encoder) -> bool:
    """Whether a pass of the encoder is a meeting of all processes, which gather its weights for it."""
    return isinstance(encoder, FSDPModule)


def shard(encoder: Encoder, mesh: Any, precision: str) -> None:
    """Shard an encoder in place: each layer of the language model by itself, all the rest together.

    The rest stays whole from the beginning of a pass to the end of its backward pass. The vision tower belongs to it,
    so that a process whose items have no pictures does not have to gather it.

    Args:
        encoder: The encoder, with its weights.
        mesh: The device mesh of the processes that share them, of one dimension.
        precision: The Trainer's. With ``"bf16-mixed"`` weights are kept and gradients summed in the type that they
            have, and gathered and used in bfloat16.
    """
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16-mixed" else MixedPrecisionPolicy()
    for block in encoder.blocks():
        fully_shard(block, mesh=mesh, mp_policy=mixed)
        block.register_forward_pre_hook(_require_gradient, with_kwargs=True, prepend=True)
    scalars = {weight for weight in encoder.parameters() if weight.ndim == 0 and not weight.requires_grad}
    ignored: Any = {"ignored_params": scalars} if scalars else {}  # FSDP2 takes none; older ones lack the argument
    fully_shard(encoder, mesh=mesh, mp_policy=mixed, **ignored)


def _require_gradient(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have the gradient of a layer's input computed, though nothing may be trained that it depends on.

    FSDP sends the gradients of a layer on its way back to the input, and where none goes there at the very end. With
    frozen embeddings one does if the items have pictures: processes that have some and those that have none would meet
    in different layers, and wait for each other.
    """
    if torch.is_grad_enabled():
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()
