"""A batch whose vectors or loss are not finite: named by its ids, and kept in a file that shows it again."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.distributed import Processes
from lightning_mmembed.encoders.processor import Bucket, EncoderInputs
from lightning_mmembed.errors import RunStoppedError, UserInputError
from lightning_mmembed.files import replacing
from lightning_mmembed.items import decode_id
from lightning_mmembed.sharded_checkpoints import local

_VERSIONED = ("lightning-mmembed", "torch", "lightning", "transformers")


class NonFiniteError(RunStoppedError):
    """A vector or a loss is NaN or infinite, in one of the processes."""


@dataclass(frozen=True)
class Moment:
    """Where in a run a batch is trained, and with what.

    Args:
        step: Optimizer steps before it.
        epoch: The epoch.
        dropout_seed: What the random numbers of its passes are drawn with; None if that is not known.
        precision: The Trainer's, such as ``"bf16-mixed"``.
        directory: Of the run.
        checkpoint: The one written last, to go on from; None if there is none.
    """

    step: int
    epoch: int
    dropout_seed: int | None
    precision: str
    directory: Path
    checkpoint: str | None = None

    @property
    def name(self) -> str:
        """What the files of this step begin with."""
        return f"nonfinite-step-{self.step}"


def finite_rows(vectors: Tensor) -> Tensor:
    """``(N,)`` whether every number of a row of ``(N, D)`` vectors is finite.

    Example:
        >>> finite_rows(torch.tensor([[0.6, 0.8], [float("nan"), 0.0], [float("inf"), 0.0]])).tolist()
        [True, False, False]
    """
    return torch.isfinite(vectors).all(dim=1)


def refuse_nonfinite(
    processes: Processes,
    finite: Sequence[bool] | Tensor,
    batch: TrainingBatch,
    vectors: Tensor,
    loss: Tensor | None,
    moment: Moment,
    weights: Iterable[Tensor] = (),
    save: Callable[[Path], object] | None = None,
) -> None:
    """Stop every process if the vectors or the loss of one are not finite; to be called by all with the same flags.

    Each process that is concerned writes ``nonfinite-step-{step}-rank-{rank}.pt`` for :func:`read_reproducer`; then the
    weights, with which no optimizer step on the batch was made, are saved as ``nonfinite-step-{step}.ckpt``.

    Args:
        processes: The processes of the run.
        finite: ``(W,)`` of each process, whether its vectors, and its loss where there is one, are finite.
        batch: This process's ``Q`` queries and ``C`` candidates.
        vectors: ``(Q + C, D)`` their vectors, queries first.
        loss: This process's loss, a scalar; None where the vectors are looked at before there is one.
        moment: Where in the run this is.
        weights: Of the model: where one is not finite itself, an earlier step is to blame, and the error says so.
        save: Writes the weights to a path; called by all processes.

    Raises:
        NonFiniteError: In every process, with the ids of all processes whose vectors are not finite; where it is the
            loss alone, with those of the whole batch.
    """
    concerned = [rank for rank, whole in enumerate(finite) if not whole]
    if not concerned:
        return
    wrong = ~finite_rows(vectors.detach()).cpu()
    wrong = wrong if wrong.any() else torch.ones_like(wrong)  # without one, it is the loss alone
    if processes.rank in concerned:
        write_reproducer(moment, processes.rank, batch, wrong, loss)
    # Waits for the others, so every file is whole whichever process ends first.
    ids = _ids_of_all(processes, batch, wrong & (processes.rank in concerned))
    broken = processes.any(not all(torch.isfinite(local(weight)).all() for weight in weights))
    if save is not None:
        save(moment.directory / f"{moment.name}.ckpt")
    raise NonFiniteError(_message(moment, ids, loss is None, broken, save is not None))


def _message(moment: Moment, ids: str, of_vectors: bool, broken: bool, saved: bool) -> str:
    what = "vectors are not finite, and so no loss can be" if of_vectors else "the loss is not finite"
    if broken:
        what += "; neither are the weights: an earlier step broke them, not this batch"
    kept = f"The batch is kept in {moment.directory}/{moment.name}-rank-*.pt"
    if saved:
        kept += f", the weights, not yet stepped on it, in {moment.name}.ckpt"
    again = "start again" if moment.checkpoint is None else f"go on from ckpt_path={moment.checkpoint}"
    return (
        f"step {moment.step}, epoch {moment.epoch}: {what}\n{ids}\n{kept}; docs/reliability.md shows how to run it "
        f"again. If it is the items, leave them out; if not, {again} with a lower learning rate or in float32"
    )


def _ids_of_all(processes: Processes, batch: TrainingBatch, wrong: Tensor) -> str:
    """The ids of the wrong items of every process, a line for each."""
    device = batch.query_ids.device
    ids = torch.cat([batch.query_ids, batch.candidate_ids.to(device)])
    kinds = (torch.arange(len(ids)) >= len(batch.query_ids)).long()  # 0 for a query
    rows = torch.stack([torch.full_like(kinds, processes.rank), kinds, ids.cpu()], dim=1)[wrong]
    lines: dict[int, tuple[list[str], list[str]]] = {}
    for rank, kind, code in processes.gather(rows).tolist():
        lines.setdefault(rank, ([], []))[kind].append(decode_id(code))
    return "\n".join(
        f"process {rank}: queries {' '.join(queries) or 'none'}; candidates {' '.join(candidates) or 'none'}"
        for rank, (queries, candidates) in sorted(lines.items())
    )


def write_reproducer(moment: Moment, rank: int, batch: TrainingBatch, wrong: Tensor, loss: Tensor | None) -> Path:
    """Write a batch and what is known of its pass, as plain tensors, numbers and texts.

    Args:
        moment: Where in the run this is.
        rank: This process.
        batch: ``Q`` queries and ``C`` candidates.
        wrong: ``(Q + C,)`` which of them are not finite.
        loss: A scalar, or None if there was none yet.

    Returns:
        The file.
    """
    codes = [*batch.query_ids.tolist(), *batch.candidate_ids.tolist()]
    facts = {name: value for name, value in asdict(moment).items() if name != "directory"}
    facts |= {"rank": rank, "loss": None if loss is None else float(loss)}
    facts["ids"] = [decode_id(code) for code in codes]
    facts["not_finite"] = [facts["ids"][place] for place in wrong.nonzero().flatten().tolist()]
    facts["versions"] = {name: version(name) for name in _VERSIONED} | {"python": platform.python_version()}
    path = moment.directory / f"{moment.name}-rank-{rank}.pt"
    with replacing(path) as temporary:
        torch.save({"batch": asdict(batch.to("cpu")), "facts": facts}, temporary)
    return path


def read_reproducer(path: str | Path) -> tuple[TrainingBatch, dict[str, Any]]:
    """Read what :func:`refuse_nonfinite` kept; nothing in the file is executed.

    Args:
        path: A file ``nonfinite-step-{step}-rank-{rank}.pt``.

    Returns:
        The batch, on the CPU; and the facts: step, epoch, rank, loss, dropout_seed, precision, versions, the ids of all
        items in the order of their vectors, and those that were not finite.

    Raises:
        UserInputError: If it is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        batch, facts = content["batch"], content["facts"]
        inputs = batch["inputs"]
        inputs = EncoderInputs(**{**inputs, "buckets": [Bucket(**bucket) for bucket in inputs["buckets"]]})
        return TrainingBatch(**{**batch, "inputs": inputs}), facts
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... on foreign files
        raise UserInputError(
            f"path={str(path)!r} holds no batch of this package: {error}; give a nonfinite-step-*-rank-*.pt"
        ) from error
