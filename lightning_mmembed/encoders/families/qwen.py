"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_mmembed.encoders.families.base import Family, Picture, prepared, special_id


class QwenVL(Family):
    """Pictures at their own size and aspect ratio, within the pixels that the image processor allows."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    vision = "visual"
    projector = "visual.merger"

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        super().__init__(path, config, tokenizer)
        ids: Any = config
        self.start, self.end = (
            special_id(path, tokenizer, int(i)) for i in (ids.vision_start_token_id, ids.vision_end_token_id)
        )

    def picture(self, image: Image.Image) -> Picture:
        """See :meth:`Family.picture`; the pixels are ``(patches, values of a patch)`` float32."""
        inputs = prepared(self.image_processor, image)
        length = int(inputs["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        return Picture([self.start, *[self.image_token_id] * length, self.end], inputs)

    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Family.states`."""
        model: Any = backbone
        model.rope_deltas = None  # kept for generation; a later pass over texts would be shifted by it
        return super().states(backbone, ids, mask, pictures)

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`; the positions of a picture are laid out in two dimensions."""
        return {**pictures, "mm_token_type_ids": (ids == self.image_token_id).int()} if pictures else {}
