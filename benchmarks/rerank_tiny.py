"""Trains a tiny generative LLaVA-NeXT on true / false pairs, and reranks the test queries of its retriever with it.

    python train.py                                                             the retriever, on the built-in benchmark
    python -m benchmarks.rerank_tiny logs/train/runs/<date> --minutes 20        the reranker, and what it does

A proof that the path from a ranking to a better one is right, and no claim on large models. The reranker begins with
the weights of the retriever's backbone, under two new layers, which compare, a new language-model head, and a token
each for the two answers. It is trained on the composed tasks (a picture and a text asked with) of the training split: a
labelled positive of a query against two of what the retriever ranks in the top 10 of the training pool beside it, and
the positive of another query of the task, through the prompts that it is asked with later, with the cross-entropy of
the two answers as the next token. What it does to the top 10 of the test queries is then told by

    mmembed-rerank run=logs/train/runs/<date> rerank.pretrained_model_name_or_path=data/rerank_tiny/reranker \\
        rerank.dtype=float32
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, AutoTokenizer, LlavaNextForConditionalGeneration

from lightning_mmembed import Candidate, Item, Modality, Query, ZeroShotReranker
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.data import Shards
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.processor import decode_image
from lightning_mmembed.items import TASK_MODALITIES, Task, decode_id
from lightning_mmembed.retrieval.embed import VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.evaluate import evaluate_retrieval

LABELS = (" True", " False")
QUERIES, NEGATIVES, HARD, MORE_LAYERS = 8, 3, 2, 2
PEAK, WARMUP = 1e-3, 50


def retriever(run: Path) -> tuple[Encoder, Shards, DictConfig]:
    """What a run trained, and on what."""
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    encoder: Encoder = hydra.utils.instantiate(cfg.model.encoder, _convert_="all")
    load_encoder_weights(encoder, run / "checkpoints" / "best.ckpt")
    return encoder.eval(), Shards(cfg.data.shards), cfg


def answering(encoder: Any, tiny: Path, out: Path) -> Path:
    """Write the retriever's backbone as a model that answers, with a token for each label."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(list(LABELS))
    config = AutoConfig.from_pretrained(tiny)
    config.text_config.num_hidden_layers += MORE_LAYERS
    model = LlavaNextForConditionalGeneration(config)
    missing = model.model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not missing.unexpected_keys
    for layer in model.model.language_model.layers[-MORE_LAYERS:]:
        # A token then attends to its like from the beginning: the layers below have put like things close together.
        layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(tiny / "processor_config.json", out)
    return out


class Lists:
    """Composed training queries, each with its positives and with what the retriever ranks beside them."""

    def __init__(self, encoder: Encoder, shards: Shards, out: Path, size: int) -> None:
        pool = shards.pool("train")
        sets = [
            queries
            for queries in shards.query_sets("train")
            if TASK_MODALITIES[queries.task.task_id][0] is Modality.IMAGE_TEXT
        ]
        store = VectorStore(out / "vectors", num_workers=0, dtype="float32")
        found = evaluate_retrieval(encoder, pool, sets, store, encoder_fingerprint(encoder), ["hit@1"])
        self.entries: list[tuple[Query, list[int], list[int]]] = []
        self.of_task: dict[Task | None, list[int]] = {}
        self._shards, self._size, self._known = shards, size, dict[int, Candidate]()
        for queries in sets:
            ranked = pool.ids[found.tasks[queries.task.name].rankings["union"].rows[:, :10]].tolist()
            for query, positives, dids in zip(queries.queries, queries.positives, ranked, strict=True):
                item = Item(query.item.text, self._small(query.item))
                wrong = [did for did in dids if did not in positives]
                self.of_task.setdefault(query.task, []).append(len(self.entries))
                self.entries.append((Query(item, query.instruction, query.qid, query.task), list(positives), wrong))

    def _small(self, item: Item) -> Any:
        """Decoded and resized once."""
        return None if item.image is None else decode_image(item.image).resize((self._size, self._size), resample=3)

    def candidate(self, did: int) -> Candidate:
        if did not in self._known:
            item = self._shards.candidate(did).item
            self._known[did] = Candidate(Item(item.text, self._small(item)), decode_id(did))
        return self._known[did]


def train(reranker: ZeroShotReranker, lists: Lists, minutes: float, seed: int) -> None:
    """Minimise the cross-entropy of the two answers as the next token, for so many minutes of CPU time."""
    model, rng = reranker.model.train(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.01)
    begin, step, means, order = time.process_time(), 0, [0.0, 0.0], np.empty(0, dtype=int)
    while (done := (time.process_time() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done)) / 2
        if len(order) < QUERIES:
            order = rng.permutation(len(lists.entries))
        batch, order = order[:QUERIES], order[QUERIES:]
        rows, positions, answers = [], [], []
        for number in batch:
            query, positives, wrong = lists.entries[int(number)]
            drawn = [int(rng.choice(positives)), *rng.choice(wrong, HARD, replace=False).tolist()]
            while len(drawn) < 1 + NEGATIVES:  # the positive of another query of the task
                other = int(rng.choice(lists.entries[int(rng.choice(lists.of_task[query.task]))][1]))
                drawn += [other] if other not in positives else []
            wording = reranker.processor.writer.prompts.of(query.task)
            pairs = reranker.processor(query, [lists.candidate(did) for did in drawn], wording)
            rows += pairs.rows
            positions += [reranker._positions(row) for row in pairs.rows]
            answers += [0] + [1] * NEGATIVES
        states = reranker._states(rows, positions, 0, None)[:, -1]
        target = torch.tensor(answers)
        logits = model.lm_head(states)[:, reranker.label_ids]
        losses = F.cross_entropy(logits, target, reduction="none")
        weights = torch.where(target == 0, float(NEGATIVES), 1.0)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        margin = logits[:, 0] - logits[:, 1]
        right = (margin.view(-1, 1 + NEGATIVES).argmax(1) == 0).float().mean()
        means = [0.98 * mean + 0.02 * float(new.detach()) for mean, new in zip(means, (loss, right), strict=True)]
        step += 1
        if step % 100 == 0:
            shown = [mean / (1 - 0.98**step) for mean in means]
            print(
                f"{done:.0%} of the time, step {step}: loss {shown[0]:.3f}, positive first {shown[1]:.1%}", flush=True
            )
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of python train.py")
    parser.add_argument("--minutes", type=float, default=20.0, help="of CPU time for training")
    parser.add_argument("--out", type=Path, default=Path("data/rerank_tiny"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(options.seed)
    encoder, shards, cfg = retriever(options.run)
    path = answering(encoder, Path(cfg.model.encoder.path), options.out / "reranker")
    prompts = OmegaConf.load(Path(__file__).parents[1] / "conf" / "rerank" / "llava_next.yaml").prompts
    reranker = ZeroShotReranker.from_pretrained(path, prompts=dict(prompts))
    lists = Lists(encoder, shards, options.out, cfg.model.encoder.architecture.image_size)
    train(reranker, lists, options.minutes, options.seed)
    reranker.model.save_pretrained(path)
    print(f"reranker: {path}")


if __name__ == "__main__":
    main()
