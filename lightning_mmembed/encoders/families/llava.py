"""LLaVA-NeXT and LLaVA-OneVision, the global view only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmembed.encoders.families.base import SquareView


class LlavaNext(SquareView):
    """LLaVA-NeXT as MM-Embed runs it: the global view only, then ``image_newline``.

    The model's own ``forward`` expects the AnyRes tiles that MM-Embed drops, so tower, projector and language model
    are called here. The id of the image token may lie outside the embedding table.
    """

    model_types = ("llava_next",)

    def placeholder(self, path: str, config: Any, tokenizer: Any) -> list[int]:
        """One position a patch, and one for ``image_newline`` after them."""
        class_token = config.vision_config.model_type == "clip_vision_model"
        dropped = config.vision_feature_select_strategy == "default"
        return [self.image_token_id] * (self.patches + class_token - dropped + 1)

    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Family.states`."""
        model: Any = backbone
        is_image = ids == self.image_token_id
        embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        if pictures:
            pixels = self.normalised(pictures["pixel_values"]).to(embeddings.dtype)
            features = self.image_features(model, pixels).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), features)
        states: Tensor = model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return states

    def image_features(self, model: Any, pixels: Tensor) -> Tensor:
        """``(I, P, D)`` embeddings of ``(I, 3, S, S)`` normalised pictures."""
        layer = model.config.vision_feature_layer
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        picked = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
        if model.config.vision_feature_select_strategy == "default":
            picked = picked[:, 1:]
        features = model.multi_modal_projector(picked)
        return torch.cat([features, model.image_newline.to(features).expand(len(features), 1, -1)], 1)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision with its global view only, which it builds as LLaVA-NeXT does."""

    model_types = ("llava_onevision",)
