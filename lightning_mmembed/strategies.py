"""FSDP2 for any number of processes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.sharded_checkpoints import WholeCheckpoints

#: The first release that is known to take LoRA in float32 on a base in bfloat16.
OLDEST_TORCH = (2, 9)


class FSDP2Strategy(WholeCheckpoints):
    """Shards weights, gradients and optimizer states over all processes.

    Lightning's own strategy shards over the nodes by default, and so not at all on one of them.

    Args:
        save_distributed_checkpoint: Write a checkpoint as a folder to which each process adds its shard; otherwise as
            one file, put together by the first process, which every strategy reads.
        **settings: Further arguments of ``ModelParallelStrategy``, such as ``timeout``.

    Raises:
        UserInputError: If torch is too old.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **settings: Any) -> None:
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            raise UserInputError(
                f"FSDP2 needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer; this is {torch.__version__}, which "
                "may refuse frozen weights in bfloat16 beside trained ones in float32; upgrade torch, or use ddp"
            )
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **settings)

    def setup(self, trainer: Trainer) -> None:
        """Set up, and evaluate without inference mode: weights gathered in it could never be trained again."""
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def setup_environment(self) -> None:
        """Join the other processes; only now is it known how many they are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
