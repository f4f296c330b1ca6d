"""From items to the tensors that an encoder reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_mmembed.encoders.families import Family, Picture
from lightning_mmembed.encoders.prompts import Entry, PromptTokenizer, Tokens, item_of
from lightning_mmembed.errors import UserInputError

PADDING_SIDES = ("right", "left")


@dataclass(frozen=True)
class Bucket:
    """Items of similar length, padded to the longest of them.

    Args:
        input_ids: ``(B, L)`` token ids, the picture's own ids among them.
        attention_mask: ``(B, L)`` 1 on tokens, 0 on padding.
        pool_mask: ``(B, L)`` 1 on the tokens that are pooled: all but the instruction and the padding.
        pictures: The family's inputs for the pictures, in the order of their rows; empty when no item has one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor
    pictures: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Bucket:
        """Copy to a device."""
        return Bucket(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.pool_mask.to(device),
            {name: value.to(device, non_blocking=True) for name, value in self.pictures.items()},
        )


@dataclass(frozen=True)
class EncoderInputs:
    """A list of items, cut by length into buckets.

    Args:
        buckets: The buckets, shortest items first.
        order: ``(N,)`` position in the list of items of each row of the concatenated buckets.
        truncated: Number of items whose text was cut to the longest allowed.
    """

    buckets: list[Bucket]
    order: Tensor
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.order)

    def to(self, device: torch.device | str) -> EncoderInputs:
        """Copy to a device."""
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets], order=self.order.to(device))


class ItemProcessor:
    """Writes prompts, tokenises them and prepares pictures.

    Args:
        prompts: Tokenises prompts.
        family: Prepares pictures.
        length_buckets: Number of buckets that a list of items is cut into.
        padding_side: ``"right"`` or ``"left"``; no vector depends on it.

    Raises:
        ValueError: If ``padding_side`` is neither.
    """

    def __init__(
        self, prompts: PromptTokenizer, family: Family, length_buckets: int = 4, padding_side: str = "right"
    ) -> None:
        if padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side={padding_side!r} is unknown; write one of {PADDING_SIDES}")
        self.prompts, self.family = prompts, family
        self.length_buckets, self.padding_side = length_buckets, padding_side

    def settings(self) -> dict[str, Any]:
        """What a vector depends on besides the weights, for its fingerprint."""
        tokenizer = self.prompts.tokenizer.backend_tokenizer.to_str()
        prompts = [type(self.prompts).__name__, self.prompts.max_length, tokenizer]
        return {"prompts": prompts, **self.family.settings()}

    def __call__(self, entries: Sequence[Entry]) -> EncoderInputs:
        """Prepare a list of queries and candidates for the encoder.

        Raises:
            UserInputError: If a picture cannot be decoded, or an instruction leaves no room for its query.
        """
        tokens = self.prompts(entries)
        pictures = [self._picture(entry) for entry in entries]
        rows = [_Row.of(*pair) for pair in zip(tokens, pictures, strict=True)]
        order = np.argsort([len(row.ids) for row in rows], kind="stable")
        parts = np.array_split(order, max(1, min(self.length_buckets, len(order))))
        buckets = [self._bucket([rows[i] for i in part]) for part in parts]
        return EncoderInputs(buckets, torch.from_numpy(order), sum(t.truncated for t in tokens))

    def _picture(self, entry: Entry) -> Picture | None:
        image = item_of(entry).image
        if image is None:
            return None
        return self.family.picture(decode_image(image) if isinstance(image, bytes) else image.convert("RGB"))

    def _bucket(self, rows: list[_Row]) -> Bucket:
        longest = max((len(row.ids) for row in rows), default=0)
        input_ids = torch.full((len(rows), longest), self.prompts.eos[0])
        attention_mask = torch.zeros_like(input_ids)
        pool_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            start = longest - len(row.ids) if self.padding_side == "left" else 0
            end = start + len(row.ids)
            input_ids[i, start:end] = torch.tensor(row.ids)
            attention_mask[i, start:end] = 1
            pool_mask[i, start + row.pool_from : end] = 1
        pictures = [row.picture for row in rows if row.picture is not None]
        names = pictures[0].inputs if pictures else ()
        return Bucket(
            input_ids,
            attention_mask,
            pool_mask,
            {name: torch.cat([picture.inputs[name] for picture in pictures]) for name in names},
        )


@dataclass(frozen=True)
class _Row:
    """One item's ids with those of its picture among them."""

    ids: list[int]
    pool_from: int
    picture: Picture | None

    @classmethod
    def of(cls, tokens: Tokens, picture: Picture | None) -> _Row:
        ids = tokens.ids
        if picture is not None:
            ids = ids[: tokens.image_at] + picture.token_ids + ids[tokens.image_at :]
        # Where a passage is cut before what MM-Embed's rule would pool of it, all that is left is pooled.
        return cls(ids, tokens.pool_from if tokens.pool_from < len(ids) else 0, picture)


def decode_image(data: bytes) -> Image.Image:
    """Decode the bytes of a picture file to RGB; alpha is dropped, not blended, as the references do.

    Raises:
        UserInputError: If the bytes are no picture, or a truncated one.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... on broken files
        raise UserInputError(f"a picture of {len(data)} bytes cannot be decoded: {error}") from error
