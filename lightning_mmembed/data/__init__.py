"""Data: M-BEIR's layout, shards, batches, the datamodule."""

from lightning_mmembed.data.datamodule import MBEIRDataModule as MBEIRDataModule
from lightning_mmembed.data.shard import shard_dataset as shard_dataset
from lightning_mmembed.data.shards import Shards as Shards
from lightning_mmembed.data.shards import ShardTexts as ShardTexts
