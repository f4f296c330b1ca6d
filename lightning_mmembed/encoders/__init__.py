"""Encoders: prompts, processor, pooling, the MLLM encoder."""

from lightning_mmembed.encoders.mllm import MLLMEncoder as MLLMEncoder
