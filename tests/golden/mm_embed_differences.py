"""Prints the table of docs/encoders.md: how far our vectors are from those of the released MM-Embed's own code.

python tests/golden/mm_embed_differences.py
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from typing import Any

import torch
from test_mm_embed_vectors import CASES, GOLDEN, GOOD, encoder_for, entries_of, expected
from torch import Tensor

from lightning_mmembed import MLLMEncoder


def kind(case: dict[str, Any]) -> str:
    if case["checkpoint"] == "checkpoint_336":
        return "577 positions a picture, all kinds"
    if "batch" in case["tags"]:
        return "batches of mixed kinds"
    modality = next((tag for tag in case["tags"] if tag in ("text", "image", "image,text")), "text")
    return f"{'query' if case['is_query'] else 'candidate'}, {modality}"


def main() -> None:
    logging.disable()
    encoders = {name: MLLMEncoder.from_pretrained(GOLDEN / name) for name in ("checkpoint", "checkpoint_336")}
    calls: dict[str, int] = defaultdict(int)
    differences: dict[str, list[Tensor]] = defaultdict(list)
    pooled: dict[tuple[str, int], list[tuple[Any, Tensor, str]]] = defaultdict(list)
    for name in GOOD:
        case, entries = CASES[name], entries_of(CASES[name])
        encoder, wanted = encoder_for(encoders, case), expected(name)
        alone = torch.cat([encoder.encode([entry]) for entry in entries])
        calls[kind(case)] += 1
        differences[kind(case)] += [
            torch.stack([(v - w).abs().max() for v in pair])
            for *pair, w in zip(alone, encoder.encode(entries), wanted, strict=True)
        ]
        pooled[case["checkpoint"], case["max_length"]] += [
            (entry, w, kind(case)) for entry, w in zip(entries, wanted, strict=True)
        ]
    mixed: dict[str, float] = defaultdict(float)
    for (checkpoint, max_length), rows in pooled.items():
        random.Random(0).shuffle(rows)
        vectors = encoders[checkpoint].encode([entry for entry, *_ in rows], max_length=max_length)
        for (_, wanted, which), vector in zip(rows, vectors, strict=True):
            mixed[which] = max(mixed[which], float((vector - wanted).abs().max()))
    print("| | calls | items | one by one | as called | all in one mixed batch |\n|---|---|---|---|---|---|")
    for which, found in differences.items():
        alone, called = torch.stack(found).max(0).values.tolist()
        print(f"| {which} | {calls[which]} | {len(found)} | {alone:.1e} | {called:.1e} | {mixed[which]:.1e} |")


if __name__ == "__main__":
    main()
