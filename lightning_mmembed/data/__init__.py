"""Data: M-BEIR's layout, shards, batches, the datamodule."""

from lightning_mmembed.data.datamodule import MBEIRDataModule as MBEIRDataModule
from lightning_mmembed.data.shard import shard_dataset as shard_dataset
from lightning_mmembed.data.shards import Shards as Shards
from lightning_mmembed.data.union import ShardTexts as ShardTexts
from lightning_mmembed.data.union import UnionShards as UnionShards
from lightning_mmembed.data.union import open_shards as open_shards
