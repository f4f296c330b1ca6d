"""A small procedural benchmark in M-BEIR's layout, drawn and written on the spot: nothing is downloaded."""

from lightning_mmembed.data.mini.build import generate_mini

__all__ = ["generate_mini"]
