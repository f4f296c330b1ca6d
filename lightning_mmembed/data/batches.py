"""Training batches: which queries, with which instruction, positive and negatives, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_mmembed.data.instructions import draw
from lightning_mmembed.data.negatives import MinedNegatives, Share, draw_negatives
from lightning_mmembed.data.sampling import resample, spread
from lightning_mmembed.data.shards import Shards
from lightning_mmembed.data.soft_labels import SoftLabels
from lightning_mmembed.encoders.processor import EncoderInputs
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Candidate, Query
from lightning_mmembed.retrieval.pool import padded_ids

BATCH_MIXES = ("mixed", "one-task")


@dataclass(frozen=True)
class TrainingBatch:
    """One flat list of items, queries first, and what relates them.

    Args:
        inputs: The encoder's inputs for ``Q`` queries followed by ``C`` candidates.
        query_ids: ``(Q,)`` encoded qids.
        candidate_ids: ``(C,)`` encoded dids: every query's positive, then the negatives.
        positive_index: ``(Q,)`` column of each query's positive among the candidates.
        positives: ``(Q, P)`` encoded ids of all labelled positives, padded with -1.
        teacher_scores: ``(Q, L)`` scores of the candidates that are :attr:`listed`, NaN where there is none; ``None``
            without a teacher.
    """

    inputs: EncoderInputs
    query_ids: Tensor
    candidate_ids: Tensor
    positive_index: Tensor
    positives: Tensor
    teacher_scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def listed(self) -> Tensor:
        """``(Q, L)`` columns of each query's own candidates: its positive and the negatives drawn for it."""
        drawn = torch.arange(len(self), len(self.candidate_ids), device=self.candidate_ids.device)
        return torch.cat([self.positive_index[:, None], drawn.reshape(len(self), -1)], 1)

    def to(self, device: torch.device | str, **_: Any) -> TrainingBatch:
        """Copy to a device what is computed with; the ids of the queries are only ever told."""
        return TrainingBatch(
            self.inputs.to(device),
            self.query_ids,
            self.candidate_ids.to(device),
            self.positive_index.to(device),
            self.positives.to(device),
            None if self.teacher_scores is None else self.teacher_scores.to(device),
        )


def plan_epoch(
    tasks: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    batch_mix: str = "mixed",
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Cut the queries of an epoch into batches, a pure function of its arguments.

    Args:
        tasks: ``(N,)`` task of each query.
        batch_size: Queries in a batch, over all processes.
        seed: Seed of the run.
        epoch: The epoch.
        batch_mix: ``"mixed"`` draws a batch from all tasks, ``"one-task"`` from one task at a time. Queries that fill
            no whole batch (of their task) sit this epoch out; a task with fewer than a batch sits all of them out.
        positions: ``(M,)`` positions in ``tasks`` of the queries that take part, with repeats, ascending
            (:func:`lightning_mmembed.data.sampling.resample`); by default each once. A batch holds a query twice only
            where it is about as large as the part of the epoch that its copies are spread over.

    Returns:
        ``(B, batch_size)`` positions in ``tasks``.

    Raises:
        ValueError: If ``batch_mix`` is unknown.

    Example:
        >>> plan_epoch(np.array(["a", "b", "a", "b"]), 2, seed=0, epoch=0, batch_mix="one-task").shape
        (2, 2)
    """
    if batch_mix not in BATCH_MIXES:
        raise ValueError(f"batch_mix={batch_mix!r} is unknown; write one of {BATCH_MIXES}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(tasks)) if positions is None else spread(positions, rng)
    groups = [order] if batch_mix == "mixed" else [order[tasks[order] == task] for task in np.unique(tasks)]
    batches = [g[: len(g) // batch_size * batch_size].reshape(-1, batch_size) for g in groups]
    planned = np.concatenate(batches) if batches else np.zeros((0, batch_size), dtype=int)
    return planned if batch_mix == "mixed" else planned[rng.permutation(len(planned))]


class EpochPlan(DistributedSampler[Any]):
    """Yields (epoch, positions) of one process's batches.

    A :class:`DistributedSampler`, so that a Trainer neither replaces nor splits it again and tells it the epoch.

    Args:
        tasks: ``(N,)`` task of each query.
        batch_size: Queries in a batch, per process.
        seed: Seed of the run.
        batch_mix: See :func:`plan_epoch`.
        num_replicas: Number of processes.
        rank: This process.
        fixed: Plan every epoch as epoch 0, for validation.
        resampled: ``(N,)`` groups and ``(G,)`` targets of :func:`lightning_mmembed.data.sampling.resample`, such that a
            task has as many queries in every epoch; by default each query comes once.
    """

    def __init__(
        self,
        tasks: np.ndarray,
        batch_size: int,
        seed: int = 0,
        batch_mix: str = "mixed",
        num_replicas: int = 1,
        rank: int = 0,
        fixed: bool = False,
        resampled: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        names, codes = np.unique(tasks, return_inverse=True)  # numbers compare much faster than names
        super().__init__(codes, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.tasks, self.batch_size, self.batch_mix = codes, batch_size, batch_mix
        self.fixed, self.resampled = fixed, resampled
        planned = self._plan(0)
        self.batches = len(planned)  # of any epoch
        taking_part = codes if self.resampled is None else codes[self._positions(0)]
        #: With batches of one task: queries in an epoch, by name, of the tasks that fill none.
        self.left_out: dict[str, int] = {}
        if batch_mix == "one-task":
            for code in np.setdiff1d(taking_part, codes[planned]):
                self.left_out[str(names[code])] = int((taking_part == code).sum())

    def _positions(self, epoch: int) -> np.ndarray | None:
        return None if self.resampled is None else resample(*self.resampled, self.seed, epoch)

    def _plan(self, epoch: int) -> np.ndarray:
        size = self.batch_size * self.num_replicas
        return plan_epoch(self.tasks, size, self.seed, epoch, self.batch_mix, self._positions(epoch))

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        epoch = 0 if self.fixed else self.epoch
        return iter([(epoch, batch[mine]) for batch in self._plan(epoch)])

    def __len__(self) -> int:
        return self.batches


class TrainingBatches(Dataset[TrainingBatch]):
    """Reads and prepares the batch at (epoch, positions of its queries).

    Args:
        shards: The dataset.
        rows: ``(N,)`` index rows of the queries.
        pool: ``(M,)`` ids of the pool that positives and negatives come from.
        processor: The encoder's, from a list of items to its inputs.
        seed: Seed of instructions, positives and negatives.
        negatives_per_query: Number of hard negatives, 0 for none.
        mined: Where they come from; without it they are drawn from the pool at random.
        wrong_modality_share: Share of the wrong modality among them, see :func:`draw_negatives`.
        draw_instructions: Draw one of the prompts; otherwise the first is used.
        instructions: False leaves them all out.
        teacher: Scores of pairs to distil from.
    """

    def __init__(
        self,
        shards: Shards,
        rows: np.ndarray,
        pool: np.ndarray,
        processor: Callable[[Sequence[Query | Candidate]], EncoderInputs],
        seed: int = 0,
        negatives_per_query: int = 0,
        mined: MinedNegatives | None = None,
        wrong_modality_share: Share = 0.5,
        draw_instructions: bool = True,
        instructions: bool = True,
        teacher: SoftLabels | None = None,
    ) -> None:
        self.shards, self.rows, self.pool, self.processor = shards, rows, pool, processor
        self.seed, self.negatives_per_query, self.mined = seed, negatives_per_query, mined
        self.wrong_modality_share, self.draw_instructions = wrong_modality_share, draw_instructions
        self.instructions = instructions
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, np.ndarray]) -> TrainingBatch:
        epoch, positions = key
        rows = self.rows[positions]
        ids = self.shards.query_ids(rows)
        positives = self.shards.positives(rows)
        chosen, negatives = [], []
        for qid, labelled in zip(ids, positives, strict=True):
            present = [did for did in labelled if _contains(self.pool, did)]
            chosen.append(present[draw(len(present), self.seed, epoch, "positive", qid)])
            number = self.negatives_per_query
            share = self.wrong_modality_share
            negatives += draw_negatives(self.mined, self.pool, int(qid), labelled, number, self.seed, epoch, share)
        candidate_ids = chosen + negatives
        drawn = partial(self.shards.instructions.draw, seed=self.seed, epoch=epoch)
        instruct = drawn if self.draw_instructions else None
        candidate_rows = [self.shards.candidate_row(did) for did in candidate_ids]
        self.shards.expect([*rows, *candidate_rows])
        queries = [self.shards.query_at(int(row), instruct) for row in rows]
        if not self.instructions:
            queries = [replace(query, instruction=None) for query in queries]
        candidates = [self.shards.candidate_at(row) for row in candidate_rows]
        return TrainingBatch(
            self._prepare([*queries, *candidates], [*rows, *candidate_rows]),
            torch.from_numpy(ids),
            torch.tensor(candidate_ids),
            torch.arange(len(queries)),
            padded_ids(positives),
            None if self.teacher is None else self._taught(ids, np.array(chosen), np.array(negatives, dtype=np.int64)),
        )

    def _taught(self, qids: np.ndarray, chosen: np.ndarray, negatives: np.ndarray) -> Tensor:
        """The teacher's scores of each query's positive and negatives, in the order of ``TrainingBatch.listed``."""
        assert self.teacher is not None
        listed = np.concatenate([chosen[:, None], negatives.reshape(len(chosen), -1)], 1)
        return torch.from_numpy(self.teacher.of(np.repeat(qids, listed.shape[1]), listed.reshape(-1))).view(
            listed.shape
        )

    def _prepare(self, entries: Sequence[Query | Candidate], rows: Sequence[int]) -> EncoderInputs:
        """The encoder's inputs; an entry that it refuses, such as a broken picture, is named with its place."""
        try:
            return self.processor(entries)
        except UserInputError:
            for entry, row in zip(entries, rows, strict=True):
                with self.shards.naming(int(row)):
                    self.processor([entry])
            raise


def _contains(ids: np.ndarray, did: int) -> bool:
    place = int(np.searchsorted(ids, did))
    return place < len(ids) and ids[place] == did
