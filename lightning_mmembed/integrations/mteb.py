"""Encoders in mteb: its text, image and image-text tasks run on any of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from torch import Tensor

from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item, Query
from lightning_mmembed.retrieval.embed import encoder_fingerprint

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput
    from torch.utils.data import DataLoader

_MEBIBYTE = 2**20


class MTEBEncoder(AbsEncoder):
    """An encoder as a model of mteb: ``mteb.evaluate(MTEBEncoder(encoder, "me/mine"), tasks)``.

    Queries get the instruction of the task, documents none. Where a task does not tell queries from documents, as in
    classification, all are encoded as documents.

    Args:
        encoder: The encoder.
        name: ``"organization/model"``, under which mteb keeps the results.
        revision: Which of the model's versions this is; by default the fingerprint of weights and settings, so that
            mteb never takes the stored results of other weights for these.
        instructions: By the name of a task, the instruction in place of the task's own; ``""`` for none.
        **known: More fields of mteb's ``ModelMeta``, such as ``license`` or ``training_datasets``.

    Raises:
        UserInputError: If ``name`` has no organization.
    """

    def __init__(
        self,
        encoder: Encoder,
        name: str,
        revision: str | None = None,
        instructions: Mapping[str, str] | None = None,
        **known: Any,
    ) -> None:
        if "/" not in name:
            raise UserInputError(f"name={name!r} has no organization; write 'organization/model', as mteb asks for")
        self.model = encoder
        self.instructions = dict(instructions or {})
        self.mteb_model_meta = _meta(encoder, name, revision or encoder_fingerprint(encoder), known)

    def instruction(self, task_metadata: TaskMetadata) -> str | None:
        """The instruction of a task's queries: the one given here, else the task's own, else none."""
        prompt: Any = task_metadata.prompt
        own = prompt.get(PromptType.query.value) if isinstance(prompt, dict) else prompt
        return self.instructions.get(task_metadata.name, own) or None

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Encode what a task gives.

        Args:
            inputs: Batches with ``"text"``, ``"image"`` or both.
            task_metadata: The task, which may have an instruction.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Whether these are queries or documents.
            **kwargs: mteb's options; the batches are as large as ``inputs`` makes them.

        Returns:
            ``(N, D)`` unit vectors in float32.

        Raises:
            UserInputError: If the inputs have neither texts nor pictures.
        """
        instruction = self.instruction(task_metadata)
        vectors = [torch.zeros(0, self.model.embedding_dim)]
        for batch in inputs:
            items: list[Item] = _items(batch, task_metadata.name)
            entries: list[Entry] = list(items)
            if prompt_type == PromptType.query:
                entries = [Query(item, instruction) for item in items]
            vectors.append(self.model.encode(entries))
        return torch.cat(vectors)


def _items(batch: Mapping[str, Any], task: str) -> list[Item]:
    columns = {name: batch[name] for name in ("text", "image") if name in batch}
    if not columns:
        raise UserInputError(f"task {task!r} has inputs with {sorted(batch)}; only 'text' and 'image' can be encoded")
    return [Item(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _meta(encoder: Encoder, name: str, revision: str, known: Mapping[str, Any]) -> ModelMeta:
    parameters = list(encoder.parameters())
    fields: dict[str, Any] = {
        "loader": None,
        "name": name,
        "revision": revision,
        "n_parameters": sum(parameter.numel() for parameter in parameters),
        "memory_usage_mb": sum(p.numel() * p.element_size() for p in parameters) / _MEBIBYTE,
        "max_tokens": encoder.processor.prompts.max_length,
        "embed_dim": encoder.embedding_dim,
        "similarity_fn_name": ScoringFunction.COSINE,
        "framework": ["PyTorch", "Transformers"],
        "modalities": ["text", "image"],
        "use_instructions": True,
    }
    unknown = dict.fromkeys(
        (
            "languages",
            "license",
            "open_weights",
            "public_training_code",
            "public_training_data",
            "release_date",
            "training_datasets",
        )
    )
    return ModelMeta(**{**unknown, **fields, **known})
