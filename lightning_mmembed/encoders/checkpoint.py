"""A checkpoint as an encoder is loaded from it: what it says of itself, what the caller wants, and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from lightning_mmembed.encoders import mm_embed
from lightning_mmembed.encoders.adapters import ADAPTER_FILE, find_base, identity, load_adapter
from lightning_mmembed.encoders.families import FAMILIES, Family, Generic, family_of
from lightning_mmembed.encoders.loading import (
    POOLING_FILE,
    SETTINGS_FILE,
    find_file,
    load_config,
    load_model,
    load_tokenizer,
    quantization,
    read_json,
)
from lightning_mmembed.encoders.lora import LoRA
from lightning_mmembed.encoders.processor import ItemProcessor
from lightning_mmembed.encoders.prompts import PromptTokenizer
from lightning_mmembed.errors import UserInputError

#: The ways to write prompts, by their names in the settings.
PROMPTS: dict[str, type[PromptTokenizer]] = {p.name: p for p in (PromptTokenizer, mm_embed.MMEmbedPrompts)}

#: How an encoder is built where neither the caller nor the checkpoint says otherwise.
DEFAULTS: dict[str, Any] = {
    "pooling": "mean",
    "pooling_options": {},
    "bidirectional": True,
    "max_length": 128,
    "passage_length": None,
    "padding_side": "right",
    "truncate_dim": None,
    "prompts": "plain",
    "freeze_vision": None,
}


@dataclass(frozen=True)
class Checkpoint:
    """Where an encoder's weights and settings are read from.

    Args:
        path: A directory or a hub id.
        base: The checkpoint of the backbone: itself, unless ``path`` holds an adapter alone.
        config: The backbone's configuration.
        own: The settings that lie in ``path``.
        saved: The settings that it was saved with, the release's among them.
        settings: Those, and what the caller asks for.
    """

    path: str
    base: str
    config: Any
    own: dict[str, Any]
    saved: dict[str, Any]
    settings: dict[str, Any]

    @classmethod
    def read(cls, path: str, given: Mapping[str, Any]) -> Checkpoint:
        """Read the settings and the configuration.

        Args:
            path: A directory or a hub id.
            given: What the caller asks for; ``None`` leaves a setting as it was saved.
        """
        own = read_json(path, SETTINGS_FILE) or {}
        base = find_base(path, own)
        config = load_config(base)
        saved = (mm_embed.settings(base, config) if mm_embed.is_released(config) else {}) | own
        settings = DEFAULTS | saved | {key: value for key, value in given.items() if value is not None}
        return cls(path, base, config, own, saved, settings)

    @property
    def identity(self) -> dict[str, str | None]:
        """What an adapter that is trained from here calls its base."""
        known: dict[str, str | None] = self.own.get("base") or {}
        # A directory may be named as seen from this adapter, and the next one lies elsewhere.
        return known if known.get("revision") else identity(self.base)

    def processor(self, length_buckets: int) -> ItemProcessor:
        """The processor of items.

        Raises:
            UserInputError: If the checkpoint is no multimodal LLM.
        """
        tokenizer = load_tokenizer(self.base)
        family = self._family()(self.base, self.config, tokenizer)
        prompts = PROMPTS[self.settings["prompts"]](tokenizer, self.settings["max_length"])
        prompts.passage_length = self.settings["passage_length"]
        return ItemProcessor(prompts, family, length_buckets, self.settings["padding_side"])

    def _family(self) -> type[Family]:
        family = family_of(self.config)
        if family is None:
            known = sorted(name for family in FAMILIES for name in family.model_types)
            raise UserInputError(
                f"checkpoint {self.base!r} has model_type={self.config.model_type!r}; supported are {known}, and other "
                "models of transformers that read pictures and texts and pass the contracts"
            )
        return family

    def backbone(self, family: Family, quantization_config: Any, **options: Any) -> Any:
        """The model without its language-model head; see :func:`load_model`."""
        ignored = (mm_embed.LATENT_ATTENTION,) if mm_embed.is_released(self.config) else ()
        options["quantization_config"] = quantization(quantization_config, (family.vision, family.projector))
        backbone = load_model(self.base, self.config, ignored, **options)
        if isinstance(family, Generic):
            family.find_parts(backbone)
        return backbone

    @property
    def _has_pooling(self) -> bool:
        return bool(self.settings["pooling"] == self.saved.get("pooling"))

    def load_pooling(self, pooling: nn.Module) -> None:
        """Load the weights of the pooling, if it is the one that was saved and lies beside the backbone's."""
        if not self._has_pooling or find_file(self.path, ADAPTER_FILE) is not None:
            return
        if mm_embed.is_released(self.config):
            pooling.load_state_dict(mm_embed.pooling_weights(self.path))
        else:
            file = find_file(self.path, POOLING_FILE)
            pooling.load_state_dict({} if file is None else load_file(file))

    def lora(self, given: LoRA | Mapping[str, Any] | None) -> LoRA | None:
        """The settings of LoRA, as they were saved or as they are given.

        Raises:
            UserInputError: If they are not the same.
        """
        there, asked = LoRA.of(self.saved.get("lora")), LoRA.of(given)
        if there and asked and there.to_dict() != asked.to_dict():
            raise UserInputError(
                f"lora={asked} is not what {self.path!r} was trained with: {there}; leave lora out, or save that "
                "encoder with merge=True and start from there"
            )
        return there or asked

    def load_adapter(self, encoder: nn.Module) -> None:
        """Load what was trained, if it was saved apart."""
        file: Path | None = find_file(self.path, ADAPTER_FILE)
        if file is not None:
            load_adapter(encoder, file, ignored=() if self._has_pooling else ("pooling.",))
