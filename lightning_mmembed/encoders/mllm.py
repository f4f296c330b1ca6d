"""The encoder: a multimodal LLM that turns items into unit vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_mmembed.encoders import contracts, mm_embed
from lightning_mmembed.encoders.adapters import ADAPTER_FILE, write_adapter
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.card import push
from lightning_mmembed.encoders.checkpoint import Checkpoint
from lightning_mmembed.encoders.families import Family, Generic
from lightning_mmembed.encoders.loading import POOLING_FILE, SETTINGS_FILE, reading
from lightning_mmembed.encoders.lora import LoRA, checkpoint_gradients, choose_trained, plain_weights
from lightning_mmembed.encoders.pooling import build_pooling
from lightning_mmembed.encoders.processor import Bucket, ItemProcessor
from lightning_mmembed.encoders.released import join_parts, write_released
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import new_directory


class MLLMEncoder(Encoder):
    """A multimodal LLM as a bi-encoder: prompt, one pass without the LM head, pool, normalise.

    Args:
        backbone: The model without its language-model head.
        processor: Turns items into the backbone's inputs.
        pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``.
        pooling_options: Further arguments of the pooling, such as ``num_latents``.
        bidirectional: Let every token attend to every other, as MM-Embed does; otherwise attention stays causal.
        truncate_dim: Use the first numbers of a vector alone, so many; by default all.

    Raises:
        UserInputError: If a vector has no ``truncate_dim`` numbers, or the pooling is unknown.
    """

    def __init__(
        self,
        backbone: Any,
        processor: ItemProcessor,
        pooling: str = "mean",
        pooling_options: dict[str, Any] | None = None,
        bidirectional: bool = True,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()
        text_config = backbone.config.get_text_config()
        # transformers builds every attention mask from this one switch (masking_utils); where it needs none, as without
        # padding, its older versions go by the switch of each attention layer.
        text_config.is_causal = not bidirectional
        for module in backbone.get_submodule(processor.family.language_model).modules():
            if hasattr(module, "is_causal"):
                module.is_causal = not bidirectional
        self.backbone = backbone
        self.processor = processor
        self.pooling = build_pooling(pooling, text_config.hidden_size, **(pooling_options or {}))
        self.truncate_dim, self.embedding_dim = truncate_dim, int(text_config.hidden_size)
        if truncate_dim is not None:
            if not 1 <= truncate_dim <= self.embedding_dim:
                raise UserInputError(
                    f"truncate_dim={truncate_dim} does not lie between 1 and {self.embedding_dim}, the width of the "
                    "vectors; give one that does, or null"
                )
            self.embedding_dim = truncate_dim
        self._pooled = {"pooling": pooling, "pooling_options": pooling_options or {}}
        self.lora: LoRA | None = None
        self.freeze_vision: bool | None = None
        self.base: dict[str, str | None] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """How the encoder was built, as saved along with its weights."""
        return {
            **self._pooled,
            "bidirectional": not self.backbone.config.get_text_config().is_causal,
            "max_length": self.processor.prompts.max_length,
            "passage_length": self.processor.prompts.passage_length,
            "padding_side": self.processor.padding_side,
            "truncate_dim": self.truncate_dim,
            "prompts": self.processor.prompts.name,
            "lora": None if self.lora is None else self.lora.to_dict(),
            "freeze_vision": self.freeze_vision,
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
        passage_length: int | None = None,
        padding_side: str | None = None,
        truncate_dim: int | None = None,
        length_buckets: int = 4,
        dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        lora: LoRA | Mapping[str, Any] | None = None,
        freeze_vision: bool | None = None,
        gradient_checkpointing: bool = False,
        check_contracts: bool | None = None,
    ) -> MLLMEncoder:
        """Load a multimodal LLM, the released MM-Embed, or an encoder saved by :meth:`save_pretrained`.

        Only safetensors are read and no code of the checkpoint is run.

        Args:
            pretrained_model_name_or_path: A local directory or a hub id, such as ``"nvidia/MM-Embed"``.
            pooling: ``"mean"``, ``"last"`` or ``"latent-attention"``; by default the one saved, else ``"mean"``.
            bidirectional: By default what was saved, else True.
            max_length: Longest text in tokens; by default what was saved, else 128 (the paper's training length).
            passage_length: Longest text of a candidate without a picture, 512 in MM-Embed's third stage; by default
                what was saved, else ``max_length``.
            padding_side: ``"right"`` or ``"left"``; by default what was saved, else right. No vector depends on it.
            truncate_dim: Use the first numbers of a vector alone, so many, for all that is done with it: what
                :class:`~lightning_mmembed.loss_modules.MatryoshkaLoss` trains vectors for; by default what was saved,
                else all.
            length_buckets: Number of buckets that a batch is cut into, by length, to save padding.
            dtype: Type of the weights. With LoRA those that are trained are kept in float32. Mean and normalisation are
                computed in float32 in any case.
            attn_implementation: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` ...; by default transformers' choice.
            quantization_config: Arguments of transformers' ``BitsAndBytesConfig``, or a configuration of quantisation;
                vision tower and projector are not quantised.
            lora: Settings of :class:`~lightning_mmembed.encoders.lora.LoRA`, ``{}`` for the paper's: the language
                model is frozen and LoRA put on it. By default what was saved, else every weight is trained.
            freeze_vision: Freeze the vision tower; by default what was saved, else only with LoRA, as in the paper.
            gradient_checkpointing: Save memory in training: compute activations again in the backward pass.
            check_contracts: Check what an encoder promises (:mod:`~lightning_mmembed.encoders.contracts`), by default
                only for a family without an adapter.

        Raises:
            UserInputError: If there is no checkpoint, one of another architecture, one that lacks weights, or one
                whose encoder breaks a contract; if an option needs a package that is not installed; if the base of an
                adapter is not there, or is another one.
        """
        path = str(pretrained_model_name_or_path)
        given = {
            "pooling": pooling,
            "bidirectional": bidirectional,
            "max_length": max_length,
            "passage_length": passage_length,
            "padding_side": padding_side,
            "truncate_dim": truncate_dim,
            "freeze_vision": freeze_vision,
        }
        with reading(path):
            checkpoint = Checkpoint.read(path, given)
            processor, settings = checkpoint.processor(length_buckets), checkpoint.settings
            backbone = checkpoint.backbone(
                processor.family, quantization_config, dtype=dtype, attn_implementation=attn_implementation
            )
            built = {name: settings[name] for name in ("pooling", "pooling_options", "bidirectional", "truncate_dim")}
            encoder = cls(backbone, processor, **built)
            encoder.base = checkpoint.identity
            checkpoint.load_pooling(encoder.pooling)
            encoder._choose_trained(checkpoint.lora(lora), settings["freeze_vision"], gradient_checkpointing)
            checkpoint.load_adapter(encoder)
        if isinstance(encoder.family, Generic) if check_contracts is None else check_contracts:
            contracts.require(encoder, path)
        return encoder

    def _choose_trained(
        self, lora: LoRA | None, freeze_vision: bool | None = None, gradient_checkpointing: bool = False
    ) -> None:
        self.lora, self.freeze_vision = lora, freeze_vision
        self.pooling.to(self.backbone.dtype if lora is None else torch.float32)
        choose_trained(self.backbone, self.family, lora, lora is not None if freeze_vision is None else freeze_vision)
        if gradient_checkpointing:
            checkpoint_gradients(self.backbone)

    @classmethod
    def from_parts(
        cls,
        llava_next: str | Path,
        nv_embed: str | Path,
        *,
        max_length: int = 128,
        passage_length: int | None = None,
        truncate_dim: int | None = None,
        length_buckets: int = 4,
        dtype: torch.dtype | str = torch.float32,
        **training: Any,
    ) -> MLLMEncoder:
        """Put NV-Embed-v1 in the place of a LLaVA-NeXT's language model, as MM-Embed's training begins.

        Args:
            llava_next: A directory or a hub id, such as ``"llava-hf/llava-v1.6-mistral-7b-hf"``: gives vision tower,
                projector, ``image_newline``, tokenizer and image settings.
            nv_embed: The same, such as ``"nvidia/NV-Embed-v1"``: gives language model and latent attention.
            max_length: Longest text in tokens; 128 is the paper's in training.
            passage_length: Longest text of a candidate without a picture; by default ``max_length``.
            truncate_dim: Use the first numbers of a vector alone, so many; by default all.
            length_buckets: As the rest, see :meth:`from_pretrained`.
            dtype: Type of the weights.
            **training: ``lora``, ``freeze_vision``, ``gradient_checkpointing``.

        Raises:
            UserInputError: If one of the two is absent, broken or another kind of checkpoint, or they do not fit.
        """
        parts = join_parts(str(llava_next), str(nv_embed), dtype)
        prompts = mm_embed.MMEmbedPrompts(parts.tokenizer, max_length)
        prompts.passage_length = passage_length
        processor = ItemProcessor(prompts, parts.family, length_buckets)
        options = parts.pooling_options
        encoder = cls(parts.backbone, processor, "latent-attention", options, truncate_dim=truncate_dim)
        with reading(str(nv_embed)):
            encoder.pooling.load_state_dict(parts.pooling_weights)
        encoder._choose_trained(LoRA.of(training.pop("lora", None)), **training)
        return encoder

    def save_pretrained(self, directory: str | Path, merge: bool = False) -> Path:
        """Write weights, tokenizer, image settings and pooling, to be read by :meth:`from_pretrained`.

        Args:
            directory: A new or an empty one.
            merge: Add LoRA's matrices to the weights that they lie beside; otherwise they are kept apart, to be
                trained further.

        Raises:
            UserInputError: If the directory is in use, or the weights are quantised.
        """
        if getattr(self.backbone, "is_quantized", False):
            raise UserInputError("the encoder's weights are quantised; save what was trained, with save_adapter")
        with new_directory(directory) as building:
            self.backbone.save_pretrained(building, state_dict=plain_weights(self.backbone, merge))
            self.processor.prompts.tokenizer.save_pretrained(building)
            self.family.image_processor.save_pretrained(building)
            pooling = self.pooling.state_dict()
            if pooling:
                save_file(pooling, building / POOLING_FILE)
            if self.lora is not None and not merge:
                write_adapter(self, building / ADAPTER_FILE)
            settings = self.settings | ({"lora": None} if merge else {})
            (building / SETTINGS_FILE).write_text(json.dumps(settings, indent=1))
        return Path(directory)

    def save_adapter(self, directory: str | Path) -> Path:
        """Write what is trained, and the name of the base that it belongs to; read by :meth:`from_pretrained`.

        Args:
            directory: A new or an empty one.

        Raises:
            UserInputError: If the directory is in use, or the encoder was not loaded from one checkpoint.
        """
        if self.base is None:
            raise UserInputError("the encoder was not loaded from one checkpoint; save all of it, with save_pretrained")
        with new_directory(directory) as building:
            write_adapter(self, building / ADAPTER_FILE)
            (building / SETTINGS_FILE).write_text(json.dumps({**self.settings, "base": self.base}, indent=1))
        return Path(directory)

    def save_released(self, directory: str | Path) -> Path:
        """Write the encoder to a new directory in the layout of the released MM-Embed, with LoRA merged.

        The layout has no room for ``max_length``: give it to :meth:`from_pretrained` where it is not 512.

        Raises:
            UserInputError: If the encoder is of another make than MM-Embed, or the directory is in use.
        """
        return write_released(self, directory)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **card: Any) -> str:
        """Upload the encoder with its model card; gives the address of the commit.

        Args:
            repo_id: ``"name"`` or ``"organization/name"``; made if it is not there.
            private: Make it so that nobody else sees it.
            token: Of the hub; by default the one that ``hf auth login`` keeps.
            **card: Arguments of :func:`~lightning_mmembed.encoders.card.model_card`, such as ``license``.

        Raises:
            UserInputError: If the hub cannot be reached or refuses, or the card cannot be written.
        """
        return push(self, repo_id, private, token, card)

    def blocks(self) -> list[nn.Module]:
        """See :meth:`Encoder.blocks`: the layers of the language model."""
        return list(getattr(self.backbone.get_submodule(self.family.language_model), "layers", ()))

    def occasional_parameters(self) -> list[nn.Parameter]:
        """See :meth:`Encoder.occasional_parameters`: all but the language model's and the pooling's."""
        parts = (self.backbone.get_submodule(self.family.language_model), self.pooling)
        always = {id(parameter) for part in parts for parameter in part.parameters()}
        return [parameter for parameter in super().occasional_parameters() if id(parameter) not in always]

    def encode_bucket(self, bucket: Bucket) -> Tensor:
        """See :meth:`Encoder.encode_bucket`."""
        states = self.family.states(self.backbone, bucket.input_ids, bucket.attention_mask, bucket.pictures)
        pooled: Tensor = self.pooling(states, bucket.pool_mask)
        return pooled
