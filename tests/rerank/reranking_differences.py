"""Prints the table of docs/reranking.md: how far scores are from those of full prompts, one at a time, without a cache.

python -m tests.rerank.reranking_differences
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from lightning_mmembed import ZeroShotReranker
from tests.rerank.rerank_worlds import CANDIDATES, FAMILIES, PROMPTS, QUERIES, Reference, build_answering


def main() -> None:
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    print("| `model_type` | pairs | largest difference | standard deviation of the scores |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name in FAMILIES:
            path = build_answering(Path(directory) / name, name)
            reranker, reference = ZeroShotReranker.from_pretrained(path, prompts=PROMPTS), Reference(path, name)
            scores = torch.cat([reranker.score(query, CANDIDATES) for query in QUERIES.values()])
            plain = torch.tensor([reference.score(query, one) for query in QUERIES.values() for one in CANDIDATES])
            largest = float((scores - plain).abs().max())
            print(f"| `{name}` | {len(scores)} | {largest:.1e} | {float(plain.std()):.2f} |")


if __name__ == "__main__":
    main()
