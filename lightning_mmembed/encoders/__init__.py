"""Encoders: prompts, processor, families, pooling, LoRA, the MLLM encoder and the dual encoder."""

from lightning_mmembed.encoders.dual import DualEncoder as DualEncoder
from lightning_mmembed.encoders.mllm import MLLMEncoder as MLLMEncoder
