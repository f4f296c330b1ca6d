"""Any other multimodal LLM of transformers, as its own processor and its own ``forward`` treat it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, PretrainedConfig

from lightning_mmembed.encoders.families.base import Family, Picture, prepared, special_id
from lightning_mmembed.errors import UserInputError

#: Names under which models ask which tokens are a picture's.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
#: What processors return for each token; the model is given that of a whole batch.
PER_TOKEN = ("input_ids", "attention_mask", *TOKEN_TYPES)


class Generic(Family):
    """A family without an adapter: whether its vectors can be trusted is for the contracts to say.

    Attributes:
        image_processor: Transformers' processor of texts and pictures, which knows how many tokens a picture takes.

    Raises:
        UserInputError: If transformers has no processor for the checkpoint, or one that cannot be made.
    """

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        try:
            self.image_processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                path, backend="pil", trust_remote_code=False
            )
            self.image_token = str(self.image_processor.image_token)
            self.image_token_id = special_id(path, tokenizer, int(self.image_processor.image_token_id))
        except (ImportError, AttributeError, TypeError, OSError, ValueError) as error:
            raise UserInputError(
                f"checkpoint {path!r} has model_type={config.model_type!r}, a family without an adapter, and its "
                f"pictures cannot be prepared by transformers' own processor: {error}"
            ) from error

    def find_parts(self, backbone: nn.Module) -> None:
        """Find the vision tower, the language model, what is between them, and what the model asks for.

        Raises:
            UserInputError: If the backbone has no tower or no language model of its own.
        """
        model: Any = backbone
        text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
        self.language_model, self.vision = (_configured_by(model, config) for config in (text, vision))
        towers = (f"{self.language_model}.", f"{self.vision}.")
        between = (name for name, _ in model.named_parameters() if not name.startswith(towers))
        self.projector = next(between, "").partition(".")[0]
        self.token_types = [name for name in TOKEN_TYPES if name in inspect.signature(model.forward).parameters]

    def picture(self, image: Image.Image) -> Picture:
        """See :meth:`Family.picture`."""
        inputs = prepared(self.image_processor, image, text=self.image_token, add_special_tokens=False)
        ids = inputs["input_ids"][0].tolist()
        if self.image_token_id not in ids:
            raise UserInputError(
                f"{type(self.image_processor).__name__} writes no image token (id {self.image_token_id}) for a picture"
            )
        return Picture(ids, {name: value for name, value in inputs.items() if name not in PER_TOKEN})

    def arguments(self, ids: Tensor, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Family.arguments`."""
        is_image = (ids == self.image_token_id).long()
        return {**pictures, **dict.fromkeys(self.token_types, is_image)}


def _configured_by(model: nn.Module, config: Any) -> str:
    for name, module in model.named_modules():
        if name and config is not None and getattr(module, "config", None) is config:
            return str(name)
    raise UserInputError(
        f"{type(model).__name__} has no adapter, and no part of its own for texts or none for pictures; take a model "
        "of a vision tower and a language model"
    )
