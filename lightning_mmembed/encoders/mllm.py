"""The encoder: a multimodal LLM that turns items into unit vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mmembed.encoders import mm_embed
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.families import FAMILIES, Family, family_of
from lightning_mmembed.encoders.loading import (
    POOLING_FILE,
    SETTINGS_FILE,
    find_file,
    load_backbone,
    load_config,
    load_tokenizer,
    read_json,
    reading,
)
from lightning_mmembed.encoders.pooling import build_pooling
from lightning_mmembed.encoders.processor import Bucket, EncoderInputs, ItemProcessor
from lightning_mmembed.encoders.prompts import PromptTokenizer
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import write_atomically

#: The ways to write prompts, by their names in the settings.
PROMPTS: dict[str, type[PromptTokenizer]] = {p.name: p for p in (PromptTokenizer, mm_embed.MMEmbedPrompts)}

#: How an encoder is built where neither the caller nor the checkpoint says otherwise.
DEFAULTS: dict[str, Any] = {
    "pooling": "mean",
    "pooling_options": {},
    "bidirectional": True,
    "max_length": 128,
    "padding_side": "right",
    "prompts": "plain",
}


class MLLMEncoder(Encoder):
    """A multimodal LLM as a bi-encoder: prompt, one pass without the LM head, pool, normalise.

    Args:
        backbone: The model without its language-model head.
        processor: Turns items into the backbone's inputs.
        pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``.
        pooling_options: Further arguments of the pooling, such as ``num_latents``.
        bidirectional: Let every token attend to every other, as MM-Embed does; otherwise attention stays causal.
    """

    def __init__(
        self,
        backbone: Any,
        processor: ItemProcessor,
        pooling: str = "mean",
        pooling_options: dict[str, Any] | None = None,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        text_config = backbone.config.get_text_config()
        # transformers builds every attention mask from this one switch, padded or not (masking_utils).
        text_config.is_causal = not bidirectional
        self.backbone = backbone
        self.processor = processor
        self.pooling = build_pooling(pooling, text_config.hidden_size, **(pooling_options or {}))
        self.embedding_dim = int(text_config.hidden_size)
        self._pooled = {"pooling": pooling, "pooling_options": pooling_options or {}}

    @property
    def settings(self) -> dict[str, Any]:
        """How the encoder was built, as saved along with its weights."""
        return {
            **self._pooled,
            "bidirectional": not self.backbone.config.get_text_config().is_causal,
            "max_length": self.processor.prompts.max_length,
            "padding_side": self.processor.padding_side,
            "prompts": self.processor.prompts.name,
        }

    @property
    def family(self) -> Family:
        """What is particular to the backbone."""
        return self.processor.family

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        pooling: str | None = None,
        bidirectional: bool | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        length_buckets: int = 4,
        dtype: torch.dtype | str = torch.float32,
    ) -> MLLMEncoder:
        """Load a multimodal LLM, the released MM-Embed, or an encoder saved by :meth:`save_pretrained`.

        Only safetensors are read and no code of the checkpoint is run.

        Args:
            pretrained_model_name_or_path: A local directory or a hub id, such as ``"nvidia/MM-Embed"``.
            pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``; by default the one saved, else ``"mean"``.
            bidirectional: By default what was saved, else True.
            max_length: Longest text in tokens; by default what was saved, else 128 (the paper's training length).
            padding_side: ``"right"`` or ``"left"``; by default what was saved, else right. No vector depends on it.
            length_buckets: Number of buckets that a batch is cut into, by length, to save padding.
            dtype: Type of the weights.

        Raises:
            UserInputError: If there is no checkpoint, one of another architecture, or one that lacks weights.
        """
        path = str(pretrained_model_name_or_path)
        given = {
            "pooling": pooling,
            "bidirectional": bidirectional,
            "max_length": max_length,
            "padding_side": padding_side,
        }
        with reading(path):
            config = load_config(path)
            released = mm_embed.is_released(config)
            saved = mm_embed.settings(path, config) if released else read_json(path, SETTINGS_FILE) or {}
            settings = DEFAULTS | saved | {key: value for key, value in given.items() if value is not None}
            tokenizer = load_tokenizer(path)
            family = _family(path, config)(path, config, tokenizer)
            ignored = (mm_embed.LATENT_ATTENTION,) if released else ()
            backbone = load_backbone(path, config, ignored, dtype=dtype)
            prompts = PROMPTS[settings["prompts"]](tokenizer, settings["max_length"])
            processor = ItemProcessor(prompts, family, length_buckets, settings["padding_side"])
            encoder = cls(
                backbone, processor, settings["pooling"], settings["pooling_options"], settings["bidirectional"]
            )
            if settings["pooling"] == saved.get("pooling"):
                weights = mm_embed.pooling_weights(path) if released else _pooling_weights(path)
                encoder.pooling.load_state_dict(weights)
        return encoder

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write weights, tokenizer, image settings and pooling, to be read by :meth:`from_pretrained`."""
        directory = Path(directory)
        self.backbone.save_pretrained(directory)
        self.processor.prompts.tokenizer.save_pretrained(directory)
        self.family.image_processor.save_pretrained(directory)
        pooling = self.pooling.state_dict()
        if pooling:
            save_file(pooling, directory / POOLING_FILE)
        return write_atomically(directory / SETTINGS_FILE, json.dumps(self.settings, indent=1))

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Encode prepared items.

        Args:
            inputs: What :attr:`processor` made of ``N`` items.

        Returns:
            ``(N, D)`` unit vectors in float32, in the order of the items.
        """
        rows = torch.cat([self._encode_bucket(bucket) for bucket in inputs.buckets])
        vectors = torch.zeros_like(rows).index_copy(0, inputs.order, rows)
        return F.normalize(vectors, dim=-1)

    def _encode_bucket(self, bucket: Bucket) -> Tensor:
        states = self.family.states(self.backbone, bucket.input_ids, bucket.attention_mask, bucket.pictures)
        pooled: Tensor = self.pooling(states, bucket.pool_mask)
        return pooled


def _family(path: str, config: Any) -> type[Family]:
    family = family_of(config)
    if family is None:
        known = sorted(name for family in FAMILIES for name in family.model_types)
        raise UserInputError(f"checkpoint {path!r} has model_type={config.model_type!r}; supported are {known}")
    return family


def _pooling_weights(path: str) -> dict[str, Tensor]:
    file = find_file(path, POOLING_FILE)
    return {} if file is None else load_file(file)
