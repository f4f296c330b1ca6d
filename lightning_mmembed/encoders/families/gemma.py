"""PaliGemma and Gemma 3: one square view, which attends to itself in both directions in a causal model too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_mmembed.encoders.families.base import SquareView, plain_ids, special_id


class PaliGemma(SquareView):
    """PaliGemma and PaliGemma 2, trained with a two-sided prompt, of which a causal encoder keeps the picture."""

    model_types = ("paligemma",)

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`; type 0 is the two-sided part."""
        return {**super().arguments(ids, pictures), "token_type_ids": (ids != self.image_token_id).long()}


class Gemma3(SquareView):
    """Gemma 3, without pan and scan."""

    model_types = ("gemma3",)

    def placeholder(self, path: str, config: Any, tokenizer: Any) -> list[int]:
        """Between its two marks, on a paragraph of its own."""
        start, end = (special_id(path, tokenizer, int(i)) for i in (config.boi_token_index, config.eoi_token_index))
        newlines = plain_ids(tokenizer, "\n\n")
        return [*newlines, start, *[self.image_token_id] * int(config.mm_tokens_per_image), end, *newlines]

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`; type 1 is the picture."""
        return {**super().arguments(ids, pictures), "token_type_ids": (ids == self.image_token_id).long()}
