"""From items to the tensors that an encoder reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_mmembed.encoders.prompts import Prompt, render
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Query


@dataclass(frozen=True)
class Bucket:
    """Items of similar length, padded to the longest of them.

    Args:
        input_ids: ``(B, L)`` token ids, one id per image position, padded on the right.
        attention_mask: ``(B, L)`` 1 on tokens, 0 on padding.
        pool_mask: ``(B, L)`` 1 on the tokens that are pooled: all but the instruction and the padding.
        pixel_values: ``(I, 3, S, S)`` uint8 pictures in the order of their rows, ``None`` when no item has one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_mask: Tensor
    pixel_values: Tensor | None

    def to(self, device: torch.device | str) -> Bucket:
        """Copy to a device."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True)
        return Bucket(self.input_ids.to(device), self.attention_mask.to(device), self.pool_mask.to(device), pixels)


@dataclass(frozen=True)
class EncoderInputs:
    """A list of items, cut by length into buckets.

    Args:
        buckets: The buckets, shortest items first.
        order: ``(N,)`` position in the list of items of each row of the concatenated buckets.
    """

    buckets: list[Bucket]
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def to(self, device: torch.device | str) -> EncoderInputs:
        """Copy to a device."""
        return EncoderInputs([b.to(device) for b in self.buckets], self.order.to(device))


class ItemProcessor:
    """Writes prompts, tokenises them and decodes pictures.

    A picture becomes the release's global view: the whole picture resized to a square with PIL's antialiased filter,
    aspect ratio not kept, nothing cropped. Texts that spell out a special token are taken as plain text.

    Args:
        tokenizer: A fast tokenizer of transformers with an EOS token; BOS is used where there is one.
        image_token: The token of an image position.
        image_tokens: Number of positions of a picture.
        image_size: Side of the resized picture in pixels.
        resample: Filter, as PIL numbers them (3 is bicubic).
        max_length: Longest text in tokens, BOS, EOS and one for the picture included; the end of a longer one is cut.
        length_buckets: Number of buckets that a list of items is cut into.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_token: str,
        image_tokens: int,
        image_size: int,
        resample: int = 3,
        max_length: int = 128,
        length_buckets: int = 4,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.image_tokens = image_tokens
        self.image_size = image_size
        self.resample = resample
        self.max_length = max_length
        self.length_buckets = length_buckets
        self._bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self._eos = [int(tokenizer.eos_token_id)]
        self._pad = int(self._eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(self, entries: Sequence[Query | Candidate | Item]) -> EncoderInputs:
        """Prepare a list of queries and candidates for the encoder.

        Raises:
            UserInputError: If a picture cannot be decoded, or an instruction leaves no room for its query.
        """
        items = [e if isinstance(e, Item) else e.item for e in entries]
        tokens, pool_from = self._tokenize(entries, items)
        order = np.argsort([len(t) for t in tokens], kind="stable")
        parts = np.array_split(order, max(1, min(self.length_buckets, len(order))))
        return EncoderInputs([self._bucket(part, items, tokens, pool_from) for part in parts], torch.from_numpy(order))

    def _tokenize(
        self, entries: Sequence[Query | Candidate | Item], items: Sequence[Item]
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids of each item and the position from which on they are pooled."""
        prompts = [render(entry) for entry in entries]
        before, starts = self._ids_before_image(prompts)
        after = self._plain_ids([p.after for p in prompts if p.after])
        tokens, pool_from, pictures = [], [], iter(after)
        for ids, start, item in zip(before, starts, items, strict=True):
            room = self.max_length - len(self._bos) - len(self._eos)
            if item.image is not None:
                tail = next(pictures)[: max(0, room - len(ids) - 1)]
                image = [self.image_token_id] * self.image_tokens
            else:
                ids, tail, image = ids[:room], [], []
            if start >= room or len(ids) + bool(image) > room:
                raise UserInputError(
                    f"max_length={self.max_length} leaves no room for the query after an instruction of {start} "
                    "tokens; raise max_length or shorten the instruction"
                )
            tokens.append(self._bos + ids + image + tail + self._eos)
            pool_from.append(len(self._bos) + start if start else 0)
        return tokens, pool_from

    def _ids_before_image(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[int]]:
        encoded = self.tokenizer([p.before for p in prompts], add_special_tokens=False, split_special_tokens=True)
        starts = [encoded.char_to_token(i, p.pool_from) or 0 if p.pool_from else 0 for i, p in enumerate(prompts)]
        return encoded["input_ids"], starts

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _bucket(self, rows: np.ndarray, items: Sequence[Item], tokens: list[list[int]], pool_from: list[int]) -> Bucket:
        longest = max((len(tokens[row]) for row in rows), default=0)
        input_ids = torch.full((len(rows), longest), self._pad)
        attention_mask = torch.zeros_like(input_ids)
        pool_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            length = len(tokens[row])
            input_ids[i, :length] = torch.tensor(tokens[row])
            attention_mask[i, :length] = 1
            pool_mask[i, pool_from[row] : length] = 1
        pictures = [self._pixels(image) for row in rows if (image := items[row].image) is not None]
        return Bucket(input_ids, attention_mask, pool_mask, torch.stack(pictures) if pictures else None)

    def _pixels(self, image: Image.Image | bytes) -> Tensor:
        rgb = decode_image(image) if isinstance(image, bytes) else image.convert("RGB")
        if rgb.size != (self.image_size, self.image_size):
            rgb = rgb.resize((self.image_size, self.image_size), resample=Image.Resampling(self.resample))
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def decode_image(data: bytes) -> Image.Image:
    """Decode the bytes of a picture file to RGB; alpha is dropped, not blended, as the references do.

    Raises:
        UserInputError: If the bytes are no picture, or a truncated one.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error ... on broken files
        raise UserInputError(f"a picture of {len(data)} bytes cannot be decoded: {error}") from error
