"""Idefics3 and SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from lightning_mmembed.encoders.families.base import Family, Picture, plain_ids, prepared, side, special_id


class Idefics3(Family):
    """Idefics3 and SmolVLM with pictures that are not split: one square view, resized twice as they were trained."""

    model_types = ("idefics3", "smolvlm")
    vision = "vision_model"
    projector = "connector"
    language_model = "text_model"

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        super().__init__(path, config, tokenizer)
        settings: Any = config
        edge = int(self.image_processor.max_image_size["longest_edge"])
        length = (edge // side(settings.vision_config.patch_size)) ** 2 // settings.scale_factor**2
        mark = special_id(path, tokenizer, "<fake_token_around_image>")
        tag = plain_ids(tokenizer, "<global-img>")
        self.token_ids = [mark, *tag, *[self.image_token_id] * length, mark]

    def picture(self, image: Image.Image) -> Picture:
        """See :meth:`Family.picture`; the pixels are ``(1, 3, S, S)`` float32."""
        pixels = prepared(self.image_processor, image, do_image_splitting=False)["pixel_values"]
        return Picture(self.token_ids, {"pixel_values": pixels[0]})

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`; all pictures are given as those of one row, whichever row they are of."""
        return {"pixel_values": pictures["pixel_values"][None]} if pictures else {}
