"""Batches by hand, a step of a real Trainer over them, and the gradients by plain torch on one process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from worlds import tiny_trainer

from lightning_mmembed import Candidate, Item, MLLMEncoder, Query, RetrievalModule
from lightning_mmembed.data.batches import TrainingBatch
from lightning_mmembed.items import encode_id

WORDS = ["red", "green", "blue", "gold", "purple", "gray", "ellipse", "rectangle", "triangle", "pet", "answer", "shape"]
TEMPERATURE = 0.05

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """What one process gets of a step: queries, and candidates of which the first ones are their positives."""

    queries: list[Query]
    candidates: list[Candidate]


def drawn_item(number: int, kind: str) -> Item:
    """An item of its own for every number; ``kind`` is a modality in M-BEIR's spelling."""
    text = " ".join(WORDS[(number * 7 + 5 * n) % len(WORDS)] for n in range(1 + number % 6))
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Item(text if "text" in kind else None, Image.fromarray(pixels) if "image" in kind else None)


def parts(sizes: Sequence[int], negatives: bool) -> list[Part]:
    """The queries of each process; those of the first one have to do with texts alone.

    The second query of the second process has the positive of the first process's second query, and the first query of
    all has a second positive, that of the second process's first query. A mined negative of the last process is a
    positive of the very first query.

    Args:
        sizes: Queries of each process.
        negatives: Mine two negatives for each query.
    """
    found: list[Part] = []
    first = 0
    for rank, size in enumerate(sizes):
        kinds = ("text", "image", "image,text") if rank else ("text",)
        queries, candidates = [], []
        for number in range(first, first + size):
            positive = 1 if rank == 1 and number == first + 1 else number
            labelled = [f"7:{positive}"] + ([f"7:{size}"] if number == 0 and len(sizes) > 1 else [])
            item = drawn_item(number + 50, kinds[number % len(kinds)])
            queries.append(Query(item, "Find what belongs to it", f"7:{number}", positives=tuple(labelled)))
            kind = "text" if positive != number else kinds[(number + 1) % len(kinds)]
            candidates.append(Candidate(drawn_item(positive, kind), f"7:{positive}"))
        if negatives:
            numbers = range(100 + 2 * first, 100 + 2 * (first + size))
            candidates += [Candidate(drawn_item(n, kinds[n % len(kinds)]), f"7:{n}") for n in numbers]
            if 0 < rank == len(sizes) - 1:
                candidates[-1] = found[0].candidates[0]
        found.append(Part(queries, candidates))
        first += size
    return found


def build_encoder(
    checkpoint: Path, lora: bool = False, checkpointing: bool = False, dropout: float = 0.0, **arguments: Any
) -> MLLMEncoder:
    """The tiny encoder in training; the second matrices of LoRA are not zero, or the first ones had no gradient."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_dropout": dropout} if lora else None
    encoder = MLLMEncoder.from_pretrained(
        checkpoint, max_length=48, lora=settings, gradient_checkpointing=checkpointing, **arguments
    )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return encoder.train()


def batch_of(encoder: Any, part: Part, tokens: int | None = None) -> TrainingBatch:
    """The batch of a process, cut into passes of so many tokens."""
    most = max(len(query.positives) for query in part.queries)
    labelled = [[encode_id(did) for did in query.positives] for query in part.queries]
    return TrainingBatch(
        encoder.processor([*part.queries, *part.candidates], tokens_per_batch=tokens),
        torch.tensor([encode_id(query.qid) for query in part.queries]),
        torch.tensor([encode_id(candidate.did) for candidate in part.candidates]),
        torch.arange(len(part.queries)),
        torch.tensor([row + [-1] * (most - len(row)) for row in labelled]),
    )


class GradientKeeper(Callback):
    """Keeps the gradients of the last step before the optimizer uses them, and the seed of its dropout."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}
        self.seed = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seed = pl_module._seed(batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients = gradients_of(pl_module.encoder)


def gradients_of(encoder: nn.Module, absent: bool = False) -> Gradients:
    """The whole gradient of every trained weight.

    Args:
        encoder: The encoder.
        absent: A weight without a gradient counts as one whose gradient is zero; otherwise it is an error.
    """
    found = {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = torch.zeros_like(parameter) if absent and parameter.grad is None else parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().clone()
    return found


def fit(directory: Path, module: RetrievalModule, batches: Sequence[TrainingBatch], **arguments: Any) -> GradientKeeper:
    """Train a module on some batches; gives what was there in the last step."""
    keeper = GradientKeeper()
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        **arguments,
        "callbacks": [keeper, *arguments.get("callbacks", [])],
    }
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    tiny_trainer(directory, **settings).fit(module, loader, loader)  # it warns where there is nothing to validate
    return keeper


def with_sgd(encoder: Any, tokens: int | None = None, **arguments: Any) -> RetrievalModule:
    """A module whose optimizer changes the weights by a tenth of the gradient."""
    arguments = {"optimizer": partial(torch.optim.SGD, lr=0.1), **arguments}
    return RetrievalModule(encoder, mini_batch_num_tokens=tokens, **arguments)


# --- the oracle ------------------------------------------------------------------------------------------------------


def oracle_loss(world: Sequence[Part], queries: Tensor, candidates: Tensor) -> Tensor:
    """Mean over all queries of the cross entropy over all candidates, by the definition.

    Args:
        world: The parts of all processes.
        queries: The vectors of all queries, process by process.
        candidates: The same of all candidates.
    """
    known = [candidate.did for part in world for candidate in part.candidates]
    losses: list[Tensor] = []
    first = 0
    for part in world:
        for number, query in enumerate(part.queries):
            own = first + number
            kept = [n for n, did in enumerate(known) if n == own or did not in query.positives]
            scores = (candidates @ queries[len(losses)]) / TEMPERATURE
            losses.append(torch.logsumexp(scores[kept], 0) - scores[own])
        first += len(part.candidates)
    return torch.stack(losses).mean()


def oracle_gradients(encoder: Any, world: Sequence[Part]) -> Gradients:
    """The gradients of all weights where one process encodes everything at once, in one pass."""
    queries = [query for part in world for query in part.queries]
    candidates = [candidate for part in world for candidate in part.candidates]
    inputs = encoder.processor([*queries, *candidates], tokens_per_batch=10**6)
    assert len(inputs.buckets) == 1
    vectors = encoder(inputs)
    oracle_loss(world, vectors[: len(queries)], vectors[len(queries) :]).backward()
    return gradients_of(encoder, absent=True)


def oracle_gradients_with_dropout(
    encoder: Any, world: Sequence[Part], tokens: int | None, seeds: Sequence[int]
) -> Gradients:
    """The same where dropout is drawn as the processes draw it: the graphs of all passes are held at once.

    Args:
        encoder: The encoder.
        world: The parts of all processes.
        tokens: Positions of a pass; with None all of a process is one.
        seeds: Of each process; a pass draws from this plus its number.
    """
    queries, candidates = [], []
    with torch.random.fork_rng(devices=[]):
        for part, seed in zip(world, seeds, strict=True):
            inputs = batch_of(encoder, part, tokens).inputs
            rows = []
            for number, one in enumerate([inputs] if tokens is None else inputs.passes()):
                torch.manual_seed((seed + number) % 2**64)
                rows.append(encoder(one))
            vectors = torch.cat(rows)
            if tokens is not None:
                vectors = vectors[inputs.order.argsort()]
            queries.append(vectors[: len(part.queries)])
            candidates.append(vectors[len(part.queries) :])
    oracle_loss(world, torch.cat(queries), torch.cat(candidates)).backward()
    return gradients_of(encoder, absent=True)


def error(found: Gradients, expected: Gradients) -> tuple[float, float]:
    """Relative error of the gradient as a whole, and the largest one of a weight.

    Some weights have no gradient but what rounding leaves, such as the biases of keys, which no softmax sees. A
    gradient below a thousandth of the whole is therefore taken for as large as that; those of nearly all other weights
    are larger.
    """
    assert found.keys() == expected.keys()
    whole = norm(expected.values())
    errors = {name: float((found[name].double() - expected[name].double()).norm()) for name in expected}
    single = max(value / max(float(expected[name].norm()), 1e-3 * whole) for name, value in errors.items())
    return sum(value**2 for value in errors.values()) ** 0.5 / whole, single


def norm(gradients: Iterable[Tensor]) -> float:
    return float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5
