"""A small procedural benchmark in M-BEIR's layout, drawn and written on the spot: nothing is downloaded."""

from lightning_mmembed.data.mini.build import generate_mini, generate_mini_text, shards_of

__all__ = ["generate_mini", "generate_mini_text", "shards_of"]
