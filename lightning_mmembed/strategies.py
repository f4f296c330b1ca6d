"""FSDP2 for any number of processes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_mmembed.sharded_checkpoints import WholeCheckpoints


class FSDP2Strategy(WholeCheckpoints):
    """Shards weights, gradients and optimizer states over all processes.

    Lightning's own strategy shards over the nodes by default, and so not at all on one of them.

    Args:
        save_distributed_checkpoint: Write a checkpoint as a folder to which each process adds its shard; otherwise as
            one file, put together by the first process, which every strategy reads.
        **settings: Further arguments of ``ModelParallelStrategy``, such as ``timeout``.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **settings: Any) -> None:
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
