"""Which instruction a query gets."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Modality, Task, dataset_number, encode_id


class Instructions:
    """The prompts of M-BEIR's instruction file, keyed by dataset, query modality and wanted modality.

    Args:
        prompts: Prompts by (dataset id, query modality, wanted modality).
    """

    def __init__(self, prompts: Mapping[tuple[int, Modality, Modality], tuple[str, ...]]) -> None:
        self._prompts = dict(prompts)

    def of_datasets(self, ids: Collection[int]) -> dict[tuple[int, Modality, Modality], tuple[str, ...]]:
        """The prompts of some datasets alone."""
        return {key: texts for key, texts in self._prompts.items() if key[0] in ids}

    def choices(self, qid: str, query_modality: Modality, task: Task) -> tuple[str, ...]:
        """Every prompt that a query may get.

        Raises:
            UserInputError: If the file has no line for such queries.
        """
        key = (dataset_number(encode_id(qid)), query_modality, task.target_modality)
        if key not in self._prompts:
            raise UserInputError(
                f"query {qid} of {task.name}: the instruction file has no line with dataset_id={key[0]}, "
                f"query_modality={key[1].value!r}, cand_modality={key[2].value!r}; add one"
            )
        return self._prompts[key]

    def fixed(self, qid: str, query_modality: Modality, task: Task, index: int = 0) -> str:
        """The prompt at a fixed place, from 0, for evaluation.

        Raises:
            UserInputError: If there are fewer prompts, or none.
        """
        choices = self.choices(qid, query_modality, task)
        if not 0 <= index < len(choices):
            places = f"{len(choices)} prompts; write a place from 0 to {len(choices) - 1}"
            raise UserInputError(f"instruction={index}: {task.name} has {places}")
        return choices[index]

    def draw(self, qid: str, query_modality: Modality, task: Task, seed: int, epoch: int) -> str:
        """A prompt that is a pure function of (seed, epoch, qid), for training."""
        choices = self.choices(qid, query_modality, task)
        return choices[draw(len(choices), seed, epoch, "instruction", qid)]


def draw(n: int, *key: object) -> int:
    """A number from 0 to ``n - 1`` that depends on the key alone.

    Example:
        >>> draw(4, 0, 1, "20:7") == draw(4, 0, 1, "20:7")
        True
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % n
