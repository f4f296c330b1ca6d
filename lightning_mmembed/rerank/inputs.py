"""From a query and its candidates to token ids and pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lightning_mmembed.encoders.families import Family, Picture
from lightning_mmembed.encoders.processor import check_text, decode_image
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Item, Query
from lightning_mmembed.rerank.prompts import Frame, PromptWriter

log = logging.getLogger(__name__)

#: What a pass costs besides its positions, in positions.
_PASS = 128


@dataclass(frozen=True)
class Row:
    """A prompt, or a part of one.

    Args:
        ids: Token ids, those of the pictures among them.
        pictures: In the order of their ids.
    """

    ids: list[int]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Pairs:
    """The prompts of one query.

    Args:
        names: Query and candidate of each prompt, for messages.
        rows: One prompt for each candidate.
        shared: How many positions all of them begin with; the query's picture is among them, no candidate's.
        shared_pictures: How many pictures are among those.
        shortened: How many candidates had their text cut.
    """

    names: list[str]
    rows: list[Row]
    shared: int
    shared_pictures: int
    shortened: int


class PairProcessor:
    """Writes and tokenises prompts and prepares pictures, each picture once.

    A picture is one view, as for the encoders (:mod:`~lightning_mmembed.encoders.families`): two pictures of a
    LLaVA-NeXT in all their tiles alone would take up to 5,776 positions.

    Args:
        tokenizer: A fast tokenizer of transformers.
        family: Prepares pictures.
        writer: Writes prompts.
        max_length: The most positions of a prompt, those of its pictures counted. Of a longer one the end of the
            candidate's text is cut, never the query.
    """

    def __init__(self, tokenizer: Any, family: Family, writer: PromptWriter, max_length: int) -> None:
        self.tokenizer, self.family, self.writer, self.max_length = tokenizer, family, writer, max_length
        self.pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        self._image_token = str(tokenizer.convert_ids_to_tokens(family.image_token_id))
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        written = tokenizer.bos_token is not None and writer.frame.head.startswith(tokenizer.bos_token)
        self._bos = [int(tokenizer.bos_token_id)] if begins and not written else []

    def __call__(self, query: Query, candidates: Sequence[Candidate], wording: str) -> Pairs:
        """Prepare the prompts of a query.

        Args:
            query: The query.
            candidates: At least one.
            wording: Of the query's task.

        Raises:
            UserInputError: If an item is empty, a picture cannot be decoded, a text holds half of a surrogate pair, or
                a prompt is too long even without the candidate's text.
        """
        of_query = self._pictures(query.item, query.instruction, query.qid or "query")
        common, _ = self.writer(query, candidates[0].item, wording)
        start = self._ids([common], [of_query])[0]
        names = [candidate.did or f"candidates[{n}]" for n, candidate in enumerate(candidates)]
        pictures = [
            (*of_query, *self._pictures(candidate.item, None, name))
            for candidate, name in zip(candidates, names, strict=True)
        ]
        texts = ["".join(self.writer(query, candidate.item, wording)) for candidate in candidates]
        rows, shortened = self._ids(texts, pictures), 0
        for n, ids in enumerate(rows):
            if len(ids) > self.max_length:
                rows[n] = self._shortened(query, candidates[n].item, wording, ids, pictures[n], names[n])
                shortened += 1
        # What is tokenised before a candidate may end in other tokens than it does with the candidate after it.
        shared = min(min(_common(start, ids), len(ids) - 1) for ids in rows)
        made = [Row(*row) for row in zip(rows, pictures, strict=True)]
        return Pairs([_pair_name(query, name) for name in names], made, shared, len(of_query), shortened)

    def _pictures(self, item: Item, instruction: str | None, name: str) -> tuple[Picture, ...]:
        with _naming(name):
            check_text(item.text)
            check_text(instruction)
            if item.image is None:
                if not item.text:
                    raise UserInputError("has neither a text nor a picture; mend the dataset or leave it out")
                return ()
            return (self.family.picture(decode_image(item.image)),)

    def _ids(self, texts: list[str], pictures: list[tuple[Picture, ...]]) -> list[list[int]]:
        texts = [text.replace(self.writer.frame.mark, self._image_token) for text in texts]
        rows = []
        for ids, own in zip(self.tokenizer(texts, add_special_tokens=False)["input_ids"], pictures, strict=True):
            waiting, row = iter(own), list(self._bos)
            for number in ids:
                row += next(waiting).token_ids if number == self.family.image_token_id else [number]
            rows.append(row)
        return rows

    def _shortened(
        self, query: Query, candidate: Item, wording: str, ids: list[int], pictures: tuple[Picture, ...], name: str
    ) -> list[int]:
        """Cut tokens off the end of a candidate's text until its prompt fits."""
        text, needed = candidate.text or "", len(ids)
        while len(ids) > self.max_length:
            if not text:
                raise UserInputError(
                    f"{_pair_name(query, name)}: the prompt takes {len(ids)} positions without any "
                    f"text of the candidate, of max_length={self.max_length}; raise max_length up to the model's "
                    "context, or shorten the query, its instruction or the prompt"
                )
            ends = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            kept = len(ends) - (len(ids) - self.max_length)
            # At least a character less, where a token begins at the text's end.
            text = text[: min(ends[kept - 1][1], len(text) - 1)] if kept > 0 else ""
            written = "".join(self.writer(query, Item(text, candidate.image), wording))
            ids = self._ids([written], [pictures])[0]
        log.debug("candidate %s was cut from %d to %d positions", name, needed, len(ids))
        return ids


def label_ids(tokenizer: Any, frame: Frame, labels: Sequence[str]) -> list[int]:
    """The token of each label where an answer begins in a frame: with a space before it, or without.

    Args:
        tokenizer: The tokenizer.
        frame: Says what the chat template writes before an answer.
        labels: ``("True", "False")``, as in the paper, or other two words.

    Raises:
        UserInputError: If there are not two labels, one is more than one token, or both are the same.
    """
    if len(labels) != 2:
        raise UserInputError(f"labels={tuple(labels)} are not two; give the word for a match and the one for none")
    # The frame around a word, since a tokenizer may treat the beginning of a text in its own way.
    asked = f"{frame.head}a{frame.tail}"
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    found: list[int] = []
    for label in labels:
        ids = tokenizer(asked + frame.space + label, add_special_tokens=False)["input_ids"]
        if ids[:-1] != before:
            tokens = tokenizer.convert_ids_to_tokens(ids[len(before) :])
            raise UserInputError(
                f"label {label!r} is no single token of tokenizer {name!r} after {asked[-12:]!r}, but {tokens}; give "
                "labels that are, such as labels=('Yes', 'No')"
            )
        found.append(int(ids[-1]))
    if len(set(found)) < len(found):
        raise UserInputError(
            f"labels {tuple(labels)} are one and the same token {found[0]} of tokenizer {name!r}; give two that differ"
        )
    return found


def cheapest_passes(lengths: Sequence[int], tokens: int, rows: int) -> list[range]:
    """Cut ascending lengths into runs that cost least when each is padded to its longest.

    Ten candidates are few, and texts among them much shorter than pictures, so each way to cut is looked at.

    Args:
        lengths: Ascending.
        tokens: The most positions in a run, padding counted; a length beyond it makes a run of its own.
        rows: The most lengths in a run.

    Example:
        >>> cheapest_passes([20, 30, 400, 410], 2048, 8), cheapest_passes([20, 30, 60, 70], 2048, 8)
        ([range(0, 2), range(2, 4)], [range(0, 4)])
    """
    best, starts = [0.0], [0]
    for stop in range(1, len(lengths) + 1):
        longest = int(lengths[stop - 1])
        fitting = max(stop - min(rows, max(1, tokens // longest)), 0)
        costs = {start: best[start] + _PASS + (stop - start) * longest for start in range(fitting, stop)}
        starts.append(min(costs, key=lambda start: costs[start]))
        best.append(costs[starts[-1]])
    runs, stop = [], len(lengths)
    while stop:
        runs.append(range(starts[stop], stop))
        stop = starts[stop]
    return runs[::-1]


def _pair_name(query: Query, candidate: str) -> str:
    return f"query {query.qid!r} with candidate {candidate!r}"


def _common(first: list[int], second: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name an entry in what is wrong with it."""
    try:
        yield
    except ValueError as error:  # of a family too, such as one that refuses a very long and thin picture
        raise UserInputError(f"{name}: {error}") from error
