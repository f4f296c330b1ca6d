"""CLIP and SigLIP as score-fusion baselines: the masked sum of a text's and a picture's vector.

UniIR's CLIP-SF (Wei et al., ECCV 2024; ``clip_sf.py``): neither vector is normalised before the sum. Texts are written
as UniIR's ``format_string`` writes them, the instruction in front of the query's own text; an instruction on a picture
is its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig

from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.families import Family, Picture
from lightning_mmembed.encoders.loading import (
    SETTINGS_FILE,
    load_config,
    load_model,
    load_tokenizer,
    read_json,
    reading,
)
from lightning_mmembed.encoders.processor import Bucket, ItemProcessor
from lightning_mmembed.encoders.prompts import Entry, PromptTokenizer, Tokens, item_of
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import new_directory
from lightning_mmembed.items import Query

MODEL_TYPES = ("clip", "siglip")

#: Stands for the patches of a picture behind the tokens of its text; no tokenizer has it.
_PATCH = -1


class DualEncoder(Encoder):
    """Two towers as one encoder of texts, pictures, and both.

    Args:
        backbone: A CLIP or SigLIP model.
        processor: Turns items into its inputs.
    """

    def __init__(self, backbone: Any, processor: ItemProcessor) -> None:
        super().__init__()
        self.backbone, self.processor = backbone, processor
        self.prompts = cast(FusionPrompts, processor.prompts)
        for name in ("logit_scale", "logit_bias"):  # of the loss that the towers come from; no vector depends on them
            if hasattr(backbone, name):
                getattr(backbone, name).requires_grad_(False)
        config = backbone.config
        self.embedding_dim = int(getattr(config, "projection_dim", None) or config.text_config.projection_size)

    @property
    def settings(self) -> dict[str, Any]:
        """How the encoder was built."""
        return {"fusion": "sum", "max_length": self.processor.prompts.max_length}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        max_length: int | None = None,
        length_buckets: int = 4,
        dtype: torch.dtype | str = torch.float32,
    ) -> DualEncoder:
        """Load a CLIP or SigLIP checkpoint, or what :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: A local directory or a hub id.
            max_length: Longest text in tokens; by default and at most what the text tower has positions for.
            length_buckets: Number of buckets that a batch is cut into, by length, to save padding.
            dtype: Type of the weights.

        Raises:
            UserInputError: If there is no such checkpoint, or ``max_length`` is more than the tower can read.
        """
        path = str(pretrained_model_name_or_path)
        with reading(path):
            config: Any = load_config(path)
            if config.model_type not in MODEL_TYPES:
                raise UserInputError(
                    f"checkpoint {path!r} has model_type={config.model_type!r}; a DualEncoder takes one of "
                    f"{MODEL_TYPES}, MLLMEncoder the multimodal LLMs"
                )
            tokenizer = load_tokenizer(path)
            positions = int(config.text_config.max_position_embeddings)
            saved = (read_json(path, SETTINGS_FILE) or {}).get("max_length", positions)
            prompts = FusionPrompts(tokenizer, saved if max_length is None else max_length, positions)
            prompts.pad_to = positions if config.model_type == "siglip" else 0
            processor = ItemProcessor(prompts, WholePictures(path, config, tokenizer), length_buckets)
            return cls(load_model(path, config, dtype=dtype), processor)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write weights, tokenizer and image settings, as transformers reads them too.

        Args:
            directory: A new or an empty one.

        Raises:
            UserInputError: If the directory is in use.
        """
        with new_directory(directory) as building:
            self.backbone.save_pretrained(building)
            self.processor.prompts.tokenizer.save_pretrained(building)
            self.processor.family.image_processor.save_pretrained(building)
            (building / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=1))
        return Path(directory)

    def encode_bucket(self, bucket: Bucket) -> Tensor:
        """See :meth:`Encoder.encode_bucket`."""
        has_picture = (bucket.input_ids == _PATCH).any(1)
        read = bucket.attention_mask * (bucket.input_ids != _PATCH)
        has_text, longest = read.any(1), int(read.sum(1).max())
        vectors = torch.zeros(len(read), self.embedding_dim, device=read.device)
        if longest:
            ids = bucket.input_ids.masked_fill(bucket.input_ids == _PATCH, self.prompts.pad)
            texts = self._texts(ids[has_text, :longest], read[has_text, :longest])
            vectors = vectors.index_add(0, has_text.nonzero().flatten(), texts)
        if bucket.pictures:
            pixels = bucket.pictures["pixel_values"].to(self.backbone.dtype)
            pictures = self.backbone.get_image_features(pixel_values=pixels).pooler_output.float()
            vectors = vectors.index_add(0, has_picture.nonzero().flatten(), pictures)
        return vectors

    def _texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        # SigLIP attends to its padding, and so does a text of any length here: it is always padded to the full length.
        mask_of = {} if self.prompts.pad_to else {"attention_mask": mask}
        texts: Tensor = self.backbone.get_text_features(input_ids=ids, **mask_of).pooler_output.float()
        return texts


class FusionPrompts(PromptTokenizer):
    """Writes an item's text with its instruction in front of it, as UniIR does, and nothing for an item without any.

    Args:
        tokenizer: The checkpoint's; what it puts around a text by itself is put around every text.
        max_length: Longest text in tokens.
        positions: What the text tower has positions for.

    Attributes:
        pad_to: Length that every text is padded to, as SigLIP was trained; 0 for none.

    Raises:
        UserInputError: If nothing of a text fits into ``max_length``, or it is more than ``positions``.
    """

    name = "fusion"
    pad_to = 0

    def __init__(self, tokenizer: Any, max_length: int, positions: int) -> None:
        self.positions = positions
        super().__init__(tokenizer, max_length)
        alone, within = self._plain_ids(["a"])[0], list(tokenizer(["a"])["input_ids"][0])
        start = next(n for n in range(len(within)) if within[n : n + len(alone)] == alone)
        self.bos, self.eos = within[:start], within[start + len(alone) :]
        if tokenizer.pad_token_id is not None:
            self.pad = int(tokenizer.pad_token_id)

    def __call__(self, entries: Sequence[Entry]) -> list[Tokens]:
        """See :meth:`PromptTokenizer.__call__`."""
        return [self._write(entry) for entry in entries]

    def _write(self, entry: Entry) -> Tokens:
        item = item_of(entry)
        instruction = (entry.instruction or "") if isinstance(entry, Query) else ""
        text = format_string(f"{format_string(instruction)} {item.text or ''}" if instruction else item.text or "")
        if not text and item.image is not None:
            return Tokens([], 0, 0, False)
        room = self.max_length - len(self.bos) - len(self.eos)
        whole = self._plain_ids([text])[0]
        if instruction and (length := len(self._plain_ids([format_string(instruction)])[0])) >= room:
            raise self.no_room(length)
        ids = self.bos + whole[:room] + self.eos
        ids += [self.pad] * (self.pad_to - len(ids))
        return Tokens(ids, None if item.image is None else len(ids), 0, len(whole) > room)


class WholePictures(Family):
    """Pictures as the checkpoint's own image processor prepares them; they stand behind the text, outside of it."""

    model_types = MODEL_TYPES
    vision, projector, language_model = "vision_model", "visual_projection", "text_model"

    def __init__(self, path: str, config: PretrainedConfig, tokenizer: Any) -> None:
        # Not the parent's: there is no token of a picture.
        self.image_processor: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, backend="pil", trust_remote_code=False
        )
        self.image_token_id = _PATCH
        vision: Any = config.vision_config
        self.patches = (int(vision.image_size) // int(vision.patch_size)) ** 2

    def picture(self, image: Image.Image) -> Picture:
        """See :meth:`Family.picture`; the pixels are ``(1, 3, S, S)`` float32."""
        pixels = self.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return Picture([_PATCH] * self.patches, {"pixel_values": pixels})


def format_string(text: str) -> str:
    """UniIR's spelling of any text: no quotes around it, a capital first, a full stop last.

    Example:
        >>> format_string('"a red bus"')
        'A red bus.'
    """
    text = text.replace("\r", "").strip().strip('"')
    if not text:
        return text
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else ".")
