"""Encoders: prompts, processor, families, pooling, the MLLM encoder."""

from lightning_mmembed.encoders.mllm import MLLMEncoder as MLLMEncoder
