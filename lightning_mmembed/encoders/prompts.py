r"""The prompts of MM-Embed, as its released code writes them (``encode`` of ``modeling_nvmmembed.py``).

==========================  ==========================================================
query with an instruction   ``Instruct: {instruction}\nQuery: <image>\n{text}``
query without               ``Query: <image>\n{text}``
candidate                   ``<image>\n{text}``
==========================  ==========================================================

``<image>\n`` is left out of an item without a picture. The tokens of ``Instruct: {instruction}\n`` are attended to,
but left out of the pool; those of ``Query: `` are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_mmembed.items import Candidate, Item, Query


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


def render(entry: Query | Candidate | Item) -> Prompt:
    r"""Write the prompt of a query or a candidate; a bare item is a candidate.

    Example:
        >>> render(Query(Item("a red bus"), instruction="Find a picture."))
        Prompt(before='Instruct: Find a picture.\nQuery: a red bus', after='', pool_from=26)
    """
    item = entry if isinstance(entry, Item) else entry.item
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
