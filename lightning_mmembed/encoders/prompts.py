r"""The prompts of MM-Embed, as its released code writes them (``encode`` of ``modeling_nvmmembed.py``), as tokens.

==========================  ==========================================================
query with an instruction   ``Instruct: {instruction}\nQuery: <image>\n{text}``
query without               ``Query: <image>\n{text}``
candidate                   ``<image>\n{text}``
==========================  ==========================================================

``<image>\n`` is left out of an item without a picture. The tokens of ``Instruct: {instruction}\n`` are attended to,
but left out of the pool; those of ``Query: `` are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Query

Entry = Query | Candidate | Item


@dataclass(frozen=True)
class Prompt:
    """A prompt cut at its picture.

    Args:
        before: Text before the picture, or the whole prompt when there is none.
        after: Text after the picture; empty when there is none.
        pool_from: Character of ``before`` from which on the tokens are pooled.
    """

    before: str
    after: str
    pool_from: int


def render(entry: Entry) -> Prompt:
    r"""Write the prompt of a query or a candidate; a bare item is a candidate.

    Example:
        >>> render(Query(Item("a red bus"), instruction="Find a picture."))
        Prompt(before='Instruct: Find a picture.\nQuery: a red bus', after='', pool_from=26)
    """
    item = item_of(entry)
    head, pool_from = "", 0
    if isinstance(entry, Query):
        if entry.instruction is not None:
            head = f"Instruct: {entry.instruction}\n"
        pool_from = len(head)
        head += "Query: "
    text = item.text or ""
    if item.image is None:
        return Prompt(head + text, "", pool_from)
    return Prompt(head, "\n" + text, pool_from)


def item_of(entry: Entry) -> Item:
    """The item of a query or a candidate, or the item itself."""
    return entry if isinstance(entry, Item) else entry.item


@dataclass(frozen=True)
class Tokens:
    """The token ids of a prompt, without those of its picture.

    Args:
        ids: With BOS and EOS.
        image_at: Where the picture's own ids are put in; ``None`` without a picture.
        pool_from: Position from which on the tokens are pooled, the picture's own counted.
        truncated: Whether the end of the text was cut.
    """

    ids: list[int]
    image_at: int | None
    pool_from: int
    truncated: bool


class PromptTokenizer:
    """Writes prompts and tokenises them. Texts that spell out a special token are taken as plain text.

    Args:
        tokenizer: A fast tokenizer of transformers with an EOS token; BOS is used where there is one.
        max_length: Longest text in tokens, BOS, EOS and one for the picture included; the end of a longer one is cut,
            the instruction never.

    Attributes:
        name: What the settings of a saved encoder call this way to write prompts.
        bos: What every prompt begins with.
        eos: What every prompt ends with.
        pad: What prompts are padded with.
        positions: The most tokens that the model can read, ``None`` for more than anybody needs.
        passage_length: Longest text of a candidate without a picture, where it is not ``max_length``: MM-Embed's third
            stage reads 512 tokens of a text document and 128 of all else.

    Raises:
        UserInputError: If nothing of a text fits into ``max_length``, or it is more than ``positions``.
    """

    name = "plain"
    positions: int | None = None
    passage_length: int | None = None

    def __init__(self, tokenizer: Any, max_length: int = 128) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        self.eos = [int(tokenizer.eos_token_id)]
        self.pad = self.eos[0]

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        if value < 3:
            raise UserInputError(f"max_length={value} leaves no room between BOS and EOS; give at least 3")
        if self.positions is not None and value > self.positions:
            raise UserInputError(f"max_length={value} is more than the {self.positions} positions of a text; lower it")
        self._max_length = value

    def limit(self, entry: Entry) -> int:
        """Longest text of an entry in tokens."""
        is_passage = not isinstance(entry, Query) and item_of(entry).image is None
        return self.passage_length if is_passage and self.passage_length is not None else self.max_length

    def __call__(self, entries: Sequence[Entry]) -> list[Tokens]:
        """Tokenise the prompts of some entries.

        Raises:
            UserInputError: If an instruction leaves no room for its query.
        """
        prompts = [render(entry) for entry in entries]
        before, starts = self._ids_before_image(prompts)
        after = iter(self._plain_ids([prompt.after for prompt in prompts if prompt.after]))
        return [
            self._tokens(ids, next(after) if prompt.after else None, start, self.limit(entry))
            for entry, prompt, ids, start in zip(entries, prompts, before, starts, strict=True)
        ]

    def _tokens(self, before: list[int], after: list[int] | None, start: int, limit: int) -> Tokens:
        room = limit - len(self.bos) - len(self.eos)
        if start >= room or (after is not None and len(before) >= room):
            raise self.no_room(start)
        kept = before[:room] if after is None else before + after[: room - len(before) - 1]
        return Tokens(
            self.bos + kept + self.eos,
            image_at=None if after is None else len(self.bos) + len(before),
            pool_from=len(self.bos) + start if start else 0,
            truncated=len(kept) < len(before) + len(after or []),
        )

    def no_room(self, instruction_length: int) -> UserInputError:
        """The error of an instruction or a picture that leaves no room for its query."""
        return UserInputError(
            f"max_length={self.max_length} leaves no room for the query after an instruction of {instruction_length} "
            "tokens; raise max_length or shorten the instruction"
        )

    def _ids_before_image(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[int]]:
        if not prompts:
            return [], []
        encoded = self.tokenizer([p.before for p in prompts], add_special_tokens=False, split_special_tokens=True)
        starts = [encoded.char_to_token(i, p.pool_from) or 0 if p.pool_from else 0 for i, p in enumerate(prompts)]
        return encoded["input_ids"], starts

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
