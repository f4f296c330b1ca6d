"""What differs between families of multimodal LLMs: how a picture becomes inputs, and how the model is run on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, PretrainedConfig


@dataclass(frozen=True)
class Picture:
    """What one picture becomes.

    Args:
        token_ids: The ids that stand for it in a prompt.
        inputs: The model's own inputs for it, by argument name; those of several pictures are concatenated.
    """

    token_ids: list[int]
    inputs: dict[str, Tensor]


class Family:
    """One family: subclasses say only what differs.

    Args:
        path: The checkpoint, a directory or a hub id.
        config: Its configuration.
        tokenizer: Its tokenizer.

    Attributes:
        model_types: The ``model_type`` of the configurations of this family.
        vision: Name of the vision tower in the backbone.
        projector: Name of what maps its output into the language model.
        language_model: Name of the language model in the backbone; its output is after the final norm.
        image_processor: Transformers' own, saved along with the encoder.
        image_token_id: The id whose embeddings are replaced by the picture's.
    """

    model_types: tuple[str, ...] = ()
    vision = "vision_tower"
    projector = "multi_modal_projector"
    language_model = "language_model"

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        self.image_processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, backend="pil", trust_remote_code=False
        )
        self.image_token_id = int(config.image_token_id)

    def settings(self) -> dict[str, Any]:
        """What a vector depends on besides the weights, for its fingerprint."""
        return {"family": type(self).__name__, "pictures": self.image_processor.to_dict()}

    def picture(self, image: Image.Image) -> Picture:
        """Prepare an RGB picture on the CPU."""
        raise NotImplementedError

    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        """Run the backbone without its language-model head.

        Args:
            backbone: The model.
            ids: ``(B, L)`` token ids.
            mask: ``(B, L)`` 1 on tokens, 0 on padding.
            pictures: Inputs of the pictures, in the order of their rows; empty without any.

        Returns:
            ``(B, L, D)`` states after the final norm.
        """
        states: Tensor = backbone(
            input_ids=ids, attention_mask=mask, use_cache=False, **self.arguments(ids, pictures)
        ).last_hidden_state
        return states

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model's ``forward`` is given besides token ids and mask."""
        return dict(pictures)


class SquareView(Family):
    """A picture is one square view, resized with PIL's antialiased filter; aspect ratio not kept, nothing cropped.

    It stays in bytes until it is on the device, a quarter of what floats would take to get there.
    """

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        super().__init__(path, config, tokenizer)
        vision: Any = config.vision_config
        self.size, self.resample = int(vision.image_size), int(self.image_processor.resample)
        self.mean, self.std = list(self.image_processor.image_mean), list(self.image_processor.image_std)
        self.token_ids = self.placeholder(config, tokenizer)

    def placeholder(self, config: PretrainedConfig, tokenizer: Any) -> list[int]:
        """The ids that stand for any picture."""
        raise NotImplementedError

    def picture(self, image: Image.Image) -> Picture:
        """See :meth:`Family.picture`; the pixels are ``(1, 3, S, S)`` uint8."""
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), resample=Image.Resampling(self.resample))
        return Picture(self.token_ids, {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]})

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`; pixels are normalised here."""
        return {"pixel_values": self.normalised(pictures["pixel_values"])} if pictures else {}

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255 to those that the tower was trained on, in float32."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


class LlavaNext(SquareView):
    """LLaVA-NeXT as MM-Embed runs it: the global view only, then ``image_newline``.

    The model's own ``forward`` expects the AnyRes tiles that MM-Embed drops, so tower, projector and language model
    are called here. The id of the image token may lie outside the embedding table.
    """

    model_types = ("llava_next",)

    def placeholder(self, config: PretrainedConfig, tokenizer: Any) -> list[int]:
        """One position a patch, and one for ``image_newline`` after them."""
        vision: Any = config.vision_config
        class_token = config.vision_feature_select_strategy == "full"
        return [self.image_token_id] * int((vision.image_size // vision.patch_size) ** 2 + class_token + 1)

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


FAMILIES: Sequence[type[Family]] = (LlavaNext,)


def family_of(config: PretrainedConfig) -> type[Family] | None:
    """The family that a configuration belongs to, or ``None`` for an unknown one."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), None)
