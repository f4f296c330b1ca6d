"""Trains a tiny generative LLaVA-NeXT on true / false pairs, and reranks the test queries of its retriever with it.

    python train.py                                                             the retriever, on the built-in benchmark
    python train.py model.encoder.bidirectional=false model.encoder.pooling=last      what the reranker begins with
    python -m benchmarks.rerank_tiny logs/train/runs/<first> logs/train/runs/<second> --minutes 30
    mmembed-rerank run=logs/train/runs/<first> rerank=tiny tasks=[oven_task6,infoseek_task6,fashioniq_task7,\\
        cirr_task7,oven_task8,infoseek_task8]

A proof that the path from a ranking to a better one is right, and no claim on large models. What is reranked is the
first run. The reranker begins with the weights of the second, which reads as a generative model does: causally. Two new
layers, which compare, and a token for each of the two answers are put on it. A step takes 8 queries of a task, each
with 8 candidates: a labelled positive, and the positives of the other queries or, of composed queries (a picture and a
text asked with), what the first run ranks in the top 10 beside it. Composed queries are asked anew each time, with a
new picture and in new words. Minimised is the cross-entropy of the softmax over the margins logit(True) - logit(False)
of a list, and a little of the binary one of each pair.

The vision tower is frozen. For the first part of the time the language model's old layers are, too. Printed is the
share of lists whose positive comes first, by kind of task: 12.5 % is chance.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlavaNextForConditionalGeneration

from benchmarks.rerank_lists import CANDIDATES, Batch, Lists, NewQueries, Piece, Pieces, kind_of
from lightning_mmembed import ZeroShotReranker
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data import Shards
from lightning_mmembed.encoders.base import Encoder

LABELS, MORE_LAYERS = ("True", "False"), 2
#: A chat template that writes a message as it is: the prompts say all.
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{% endfor %}"
)
#: Share of the time in which the old layers are frozen and all negatives are random, and learning rates.
FIRST_PART, WARMUP, FIRST_RATE, NEW_RATE, OLD_RATE = 0.15, 50, 1e-3, 5e-4, 3e-4
#: After it: how often a composed task is drawn, and the most negatives from the top 10 of the retriever.
COMPOSED_SHARE, HARD = 0.7, 7
BINARY_WEIGHT = 0.2


def retriever(run: Path) -> tuple[Encoder, DictConfig]:
    """What a run trained."""
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    encoder: Encoder = hydra.utils.instantiate(cfg.model.encoder, _convert_="all")
    load_encoder_weights(encoder, run / "checkpoints" / "best.ckpt")
    return encoder.eval(), cfg


def answering(encoder: Any, tiny: Path, out: Path) -> Path:
    """Write a retriever's backbone as a model that answers, with a token for each label."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(list(LABELS))
    tokenizer.chat_template = TEMPLATE
    config = AutoConfig.from_pretrained(tiny)
    config.text_config.num_hidden_layers += MORE_LAYERS
    model = LlavaNextForConditionalGeneration(config)
    missing = model.model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not missing.unexpected_keys
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in model.model.language_model.layers[-MORE_LAYERS:]:
            comparing(layer, model.model.language_model.norm.weight)
        model.lm_head.weight[-len(LABELS) :] = 0
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(tiny / "processor_config.json", out)
    return out


def comparing(layer: Any, norm: Tensor) -> None:
    """Let a new layer change nothing at first, and attend from a vector to those that are like it.

    Keys are made as queries are, of the numbers that rotary positions turn least. The scale gives two equal vectors an
    advantage of some 8 over two orthogonal ones in the softmax.
    """
    attention, head = layer.self_attn, layer.self_attn.head_dim
    layer.input_layernorm.weight.copy_(norm)  # the retriever's vectors are states after its last norm
    torch.nn.init.normal_(attention.q_proj.weight, std=0.15)
    slow = torch.arange(attention.q_proj.out_features) % (head // 2) >= head // 4
    attention.k_proj.weight.copy_(attention.q_proj.weight * slow.unsqueeze(1))
    attention.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


def packed(model: Any, image_token: int, query: Piece, candidates: list[Piece]) -> tuple[Tensor, ...]:
    """A query and its candidates in one row, in which no candidate sees another one: the prefix is computed once.

    Returns:
        ``(L, D)`` embeddings, ``(L,)`` positions, ``(L, L)`` who sees whom, and the ``(1 + C,)`` ends of the pieces.
    """
    pieces = [query, *candidates]
    lengths = torch.tensor([len(piece.ids) for piece in pieces])
    ids = torch.cat([piece.ids for piece in pieces])
    is_image = ids == image_token
    embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
    features = torch.cat([piece.features for piece in pieces])
    embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), features)
    own = torch.arange(len(pieces)).repeat_interleave(lengths)
    starts = lengths.cumsum(0) - lengths
    at = torch.arange(len(ids))
    positions = torch.where(own == 0, at, at - starts[own] + lengths[0])
    sees = (at[:, None] >= at) & ((own[:, None] == own) | (own == 0))
    ends = lengths.cumsum(0) - 1
    ends[0] -= 1  # the last that candidates share is their own first token
    return embeddings, positions, sees, ends


def read(reranker: ZeroShotReranker, pieces: Pieces, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(B, L, D)`` states of the packed rows of a batch, and the ``(B, 1 + C)`` ends of queries and candidates."""
    model, image_token = reranker.model, reranker.processor.family.image_token_id
    rows = []
    for query, dids in zip(batch.queries, batch.lists, strict=True):
        candidates = [pieces.candidate(query, did) for did in dids]
        rows.append(packed(model, image_token, pieces.query(query, dids[0]), candidates))
    longest = max(len(row[0]) for row in rows)
    embeddings = torch.stack([F.pad(row[0], (0, 0, 0, longest - len(row[0]))) for row in rows])
    positions = torch.stack([F.pad(row[1], (0, longest - len(row[1]))) for row in rows])
    sees = torch.stack([F.pad(row[2], (0, longest - len(row[2]), 0, longest - len(row[2]))) for row in rows])
    sees |= torch.eye(longest, dtype=torch.bool)  # padding sees itself: a softmax over nothing is not a number
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)
    states = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return states, torch.stack([row[3] for row in rows])


def margins(reranker: ZeroShotReranker, pieces: Pieces, batch: Batch) -> Tensor:
    """``(B, C)`` logit(True) - logit(False) of each candidate."""
    states, ends = read(reranker, pieces, batch)
    asked = states[torch.arange(len(ends))[:, None], ends[:, 1:]]
    logits = asked @ reranker.model.lm_head.weight[reranker.label_ids].T
    difference: Tensor = logits[..., 0] - logits[..., 1]
    return difference


@torch.no_grad()
def check(reranker: ZeroShotReranker, causal: Encoder, pieces: Pieces, shards: Shards, batch: Batch) -> None:
    """Packed rows give what the reranker answers, and in the states at the ends are the causal retriever's vectors."""
    labels, head = reranker.label_ids, reranker.model.lm_head.weight
    head[labels[0]] = torch.linspace(-1, 1, head.shape[1])
    for query, dids, margin in zip(batch.queries, batch.lists, margins(reranker, pieces, batch), strict=True):
        asked = reranker.score(query, [shards.candidate(did) for did in dids])
        torch.testing.assert_close(margin.sigmoid(), asked, atol=1e-4, rtol=1e-4)
    head[labels[0]] = 0
    states, ends = read(reranker, pieces, batch)
    vectors = F.normalize(states[torch.arange(len(ends))[:, None], ends], dim=-1)
    torch.testing.assert_close(vectors[:, 0], causal.encode(batch.queries), atol=1e-4, rtol=1e-4)
    alone = torch.stack([causal.encode([shards.candidate(did) for did in dids]) for dids in batch.lists])
    told = {"alone": alone, "in prompts": vectors[:, 1:]}
    first = {name: first_share((vectors[:, :1] * of).sum(-1), batch) for name, of in told.items()}
    print(
        f"{batch.task.name}: cosines put the positive first in {first} of {len(ends)} lists; like the vectors alone "
        f"{float((alone * vectors[:, 1:]).sum(-1).mean()):.2f}"
    )


def first_share(scores: Tensor, batch: Batch) -> float:
    """The share of the lists whose positive comes first."""
    return float((scores.masked_fill(~batch.counts, -torch.inf).argmax(1) == 0).float().mean())


def loss_of(scores: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy over the margins of each list, and a little of that of each pair."""
    listwise = -scores.masked_fill(~batch.counts, -torch.inf).log_softmax(1)[:, 0].mean()
    wanted = torch.zeros_like(scores)
    wanted[:, 0] = 1
    binary = F.binary_cross_entropy_with_logits(scores, wanted, weight=batch.counts.float())
    return listwise + BINARY_WEIGHT * binary


class Progress:
    """The share of lists with the positive first since it was last told, by kind of task and of negatives."""

    def __init__(self) -> None:
        self._begin, self._shares = time.process_time(), defaultdict[str, list[float]](list)

    @property
    def minutes(self) -> float:
        """CPU time so far."""
        return (time.process_time() - self._begin) / 60

    def add(self, kind: str, share: float) -> None:
        """Count a batch."""
        self._shares[kind].append(share)

    def tell(self, step: int) -> None:
        """Print what was counted, and forget it."""
        told = ", ".join(f"{kind} {np.mean(shares):.1%}" for kind, shares in sorted(self._shares.items()))
        print(f"{self.minutes:.1f} min, step {step}: positive first: {told}", flush=True)
        self._shares.clear()


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """New layers and the head in the first group, the old part of the language model in the second one."""
    language_model = model.model.language_model
    new = [*language_model.layers[-MORE_LAYERS:].parameters(), *model.lm_head.parameters()]
    old = [*language_model.embed_tokens.parameters(), *language_model.layers[:-MORE_LAYERS].parameters()]
    old += language_model.norm.parameters()
    model.requires_grad_(False)
    for parameter in new:
        parameter.requires_grad_(True)
    return torch.optim.AdamW([{"params": new, "lr": 0.0}, {"params": old, "lr": 0.0}], weight_decay=0.01)


def set_rates(optimizer: torch.optim.Optimizer, step: int, done: float) -> float:
    """Rates of a step; gives how far the second part is, from 0 to 1, or less than 0 before it."""
    new, old = optimizer.param_groups
    second = (done - FIRST_PART) / (1 - FIRST_PART)
    if second < 0:
        new["lr"] = FIRST_RATE * min(1.0, (step + 1) / WARMUP)
    else:
        for parameter in old["params"]:
            parameter.requires_grad_(True)
        decay = (1 + math.cos(math.pi * min(second, 1.0))) / 2
        new["lr"], old["lr"] = NEW_RATE * decay, OLD_RATE * decay
    return second


def train(reranker: ZeroShotReranker, pieces: Pieces, lists: Lists, held: Lists, minutes: float, seed: int) -> None:
    """Minimise the loss for so many minutes of CPU time."""
    rng, progress, step = np.random.default_rng(seed), Progress(), 0
    optimizer = optimizer_of(reranker.model)
    composed = [task for task in lists.tasks if kind_of(task) == "composed"]
    while (done := progress.minutes / minutes) < 1:
        second = set_rates(optimizer, step, done)
        among = composed if second >= 0 and rng.random() < COMPOSED_SHARE else lists.tasks
        task = among[rng.integers(len(among))]
        batch = lists.draw(rng, task, round(HARD * max(second, 0.0)))
        scores = margins(reranker, pieces, batch)
        loss = loss_of(scores, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        progress.add(kind_of(task), first_share(scores, batch))
        step += 1
        if step % 200 == 0:
            validate(reranker, pieces, held, rng, progress)
            progress.tell(step)


@torch.no_grad()
def validate(reranker: ZeroShotReranker, pieces: Pieces, held: Lists, rng: np.random.Generator, told: Progress) -> None:
    """Read some validation queries of each task, those of composed tasks also among the retriever's top 10."""
    for task in held.tasks:
        kind = kind_of(task)
        for name, hard in (("", 0), (" in the top 10", CANDIDATES - 1))[: 2 if kind == "composed" else 1]:
            batch = held.draw(rng, task, hard)
            told.add(f"val {kind}{name}", first_share(margins(reranker, pieces, batch), batch))


@torch.no_grad()
def retriever_share(encoder: Encoder, shards: Shards, held: Lists, seed: int) -> float:
    """The share of the lists of :func:`validate` from the top 10 whose positive the retriever itself puts first."""
    rng, shares = np.random.default_rng(seed), []
    for task in [task for task in held.tasks if kind_of(task) == "composed"] * 4:
        batch = held.draw(rng, task, CANDIDATES - 1)
        of = torch.stack([encoder.encode([shards.candidate(did) for did in dids]) for dids in batch.lists])
        shares.append(first_share((encoder.encode(batch.queries).unsqueeze(1) * of).sum(-1), batch))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of the retriever that is reranked")
    parser.add_argument("causal", type=Path, help="run directory of the causal one that the reranker begins with")
    parser.add_argument("--minutes", type=float, default=30.0, help="of CPU time for training")
    parser.add_argument("--out", type=Path, default=Path("data/rerank_tiny"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(options.seed)
    (encoder, cfg), (causal, _) = retriever(options.run), retriever(options.causal)
    path = answering(causal, Path(cfg.model.encoder.path), options.out / "reranker")
    prompts = OmegaConf.load(Path(__file__).parents[1] / "conf" / "rerank" / "tiny.yaml").prompts
    reranker = ZeroShotReranker.from_pretrained(path, prompts=dict(prompts))
    shards = Shards(cfg.data.shards)
    pieces = Pieces(reranker, shards)
    lists = Lists(encoder, shards, "train", options.out, NewQueries(Path(cfg.data.source.out)))
    held = Lists(encoder, shards, "val", options.out)
    for task in lists.tasks:
        check(reranker, causal, pieces, shards, lists.draw(np.random.default_rng(options.seed), task, 0))
    print(
        f"the retriever itself: val composed in the top 10 {retriever_share(encoder, shards, held, options.seed):.1%}"
    )
    train(reranker, pieces, lists, held, options.minutes, options.seed)
    reranker.model.save_pretrained(path)
    print(f"reranker: {path}")


if __name__ == "__main__":
    main()
