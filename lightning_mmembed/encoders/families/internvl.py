"""InternVL in transformers' own format."""

from __future__ import annotations

from typing import Any

from lightning_mmembed.encoders.families.base import SquareView, special_id


class InternVL(SquareView):
    """InternVL, the thumbnail only: no tiles."""

    model_types = ("internvl",)

    def placeholder(self, path: str, config: Any, tokenizer: Any) -> list[int]:
        """Between its two marks; pixel shuffle leaves a share of the patches."""
        start, end = (special_id(path, tokenizer, token) for token in ("<img>", "</img>"))
        return [start, *[self.image_token_id] * int(self.patches * config.downsample_ratio**2), end]
