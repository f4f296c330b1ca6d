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

from lightning_mmembed.errors import UserInputError


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

    Raises:
        UserInputError: If the tokenizer has no special token of the id that the configuration gives pictures.
    """

    model_types: tuple[str, ...] = ()
    vision = "vision_tower"
    projector = "multi_modal_projector"
    language_model = "language_model"

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        self.image_processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, backend="pil", trust_remote_code=False
        )
        self.image_token_id = special_id(path, tokenizer, int(config.image_token_id))

    def settings(self) -> dict[str, Any]:
        """What a vector depends on besides the weights, for its fingerprint."""
        return {"family": type(self).__name__, "pictures": self.image_processor.to_dict()}

    def picture(self, image: Image.Image) -> Picture:
        """Prepare an RGB picture on the CPU.

        Raises:
            UserInputError: If the family cannot take a picture of that shape.
        """
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
        self.size, self.resample = side(vision.image_size), int(self.image_processor.resample)
        self.patches = (self.size // side(vision.patch_size)) ** 2
        self.mean, self.std = list(self.image_processor.image_mean), list(self.image_processor.image_std)
        self.token_ids = self.placeholder(path, config, tokenizer)

    def placeholder(self, path: str, config: Any, tokenizer: Any) -> list[int]:
        """The ids that stand for any picture: by default one for each patch."""
        return [self.image_token_id] * self.patches

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


def side(size: int | Sequence[int]) -> int:
    """The side of a square that a configuration gives as one number or as two."""
    return int(size if isinstance(size, int) else size[0])


def special_id(path: str, tokenizer: Any, token: str | int) -> int:
    """The id of a special token that is given by its text or by its id.

    Raises:
        UserInputError: If the tokenizer has no such token.
    """
    for number, known in tokenizer.added_tokens_decoder.items():
        if token in (number, str(known)):
            return int(number)
    raise UserInputError(
        f"checkpoint {path!r}: its tokenizer has no special token {token!r}, which stands for a picture in its "
        "config.json; give the checkpoint the tokenizer that its model was trained with"
    )


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that a family writes beside its pictures."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prepared(image_processor: Any, image: Image.Image, **options: Any) -> dict[str, Tensor]:
    """What transformers' own image processor makes of one picture.

    Raises:
        UserInputError: If it refuses the picture.
    """
    try:
        return dict(image_processor(images=image, return_tensors="pt", **options))
    except ValueError as error:
        width, height = image.size
        raise UserInputError(
            f"a picture of {width} x {height} pixels is refused by {type(image_processor).__name__}: {error}"
        ) from error
