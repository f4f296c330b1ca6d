"""What is particular to LLaVA-NeXT: its image token, its number of image positions, how pictures become embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextModel


def image_positions(config: LlavaNextConfig) -> int:
    """Positions of one picture: the patches of its global view and one ``image_newline`` after them."""
    vision: Any = config.vision_config
    class_token = config.vision_feature_select_strategy == "full"
    return int((vision.image_size // vision.patch_size) ** 2 + class_token + 1)


def image_embeddings(model: LlavaNextModel, pixels: Tensor) -> Tensor:
    """Embeddings of pictures as MM-Embed feeds them: the global view only, then ``image_newline``.

    The model's own ``get_image_features`` expects the AnyRes tiles that MM-Embed drops, so the tower and the projector
    are called here.

    Args:
        model: The backbone.
        pixels: ``(I, 3, S, S)`` normalised pictures.

    Returns:
        ``(I, P, D)`` with ``P`` from :func:`image_positions`.
    """
    layer = model.config.vision_feature_layer
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    picked = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], -1)
    if model.config.vision_feature_select_strategy == "default":
        picked = picked[:, 1:]
    features = model.multi_modal_projector(picked)
    return torch.cat([features, model.image_newline.to(features).expand(len(features), 1, -1)], 1)
