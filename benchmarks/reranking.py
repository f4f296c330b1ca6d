"""Reranking ten candidates of a query: prefix computed once and batched, against one full prompt at a time.

    python -m benchmarks.reranking            8 queries, a picture and a text each, 10 candidates each

The checkpoint is a Qwen2.5-VL with random weights, of width 256 and 4 layers. Both sides load it, write the same
prompts and compute the same scores, which is asserted. The plain side is what a user writes with transformers alone: it
makes a prompt of a query and a candidate, prepares its pictures and runs the whole model, for one pair after the other,
with the language-model head at the last position only. Both use float32, as many threads as ``OMP_NUM_THREADS`` says,
PIL to resize pictures, and pictures that are in memory. Rounds alternate, so that a machine whose speed drifts slows
both; the figures are medians, of the rates and of the ratios within a round, by the clock and by CPU time, which other
work on the machine disturbs less. Memory is measured in processes of their own, from start to end, libraries included.
Linux only.

There are three sets of candidates: texts, pictures, and a third of each kind. A picture of a candidate is computed on
both sides alike, so the gain is the larger the more of a prompt is the query's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from benchmarks.encoding import resident
from lightning_mmembed import Candidate, Item, Query
from tests.encoders.family_worlds import TEXTS, qwen
from tests.rerank.rerank_worlds import build_answering

METHODS = ("ours", "plain")
KINDS = ("texts", "pictures", "a third of each")
ROUNDS, SEED, CANDIDATES, WIDTH, PATCH = 5, 0, 10, 256, 14
PROMPTS = {
    "task6": "Question: {query}\nAnswer: {candidate}\nDoes the answer correctly answer the question, True or False"
}
IMAGE = "<|image_pad|>"

#: Scores of the candidates of a query.
Score = Callable[[Query, list[Candidate]], torch.Tensor]


MROPE = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
TINY = qwen(
    "qwen2_5_vl",
    {
        "depth": 4,
        "num_heads": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "window_size": 8 * PATCH,
        "fullatt_block_indexes": [3],
    },
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
#: Pictures at their own size, as published: some 110 positions each.
WORLD = replace(TINY, pictures={**TINY.pictures, "patch_size": PATCH, "max_pixels": 1280 * (2 * PATCH) ** 2})


def work(count: int, kind: str) -> list[tuple[Query, list[Candidate]]]:
    """Queries of a picture and a text, with candidates of 3 to 60 words."""
    rng = np.random.default_rng(SEED)
    words = " ".join(TEXTS).split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, int(rng.integers(low, high + 1))))

    def picture() -> Image.Image:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        return coarse.resize((round(256 * rng.uniform(1, 1.6)), 256), Image.Resampling.BICUBIC)

    def candidate(number: int) -> Item:
        shape = {"texts": 0, "pictures": 1}.get(kind, number % 3)
        return Item(text(3, 60) if shape != 1 else None, picture() if shape else None)

    return [
        (Query(Item(text(5, 20), picture())), [Candidate(candidate(n)) for n in range(CANDIDATES)])
        for _ in range(count)
    ]


def loaded(method: str, folder: Path) -> Score:
    """What scores the candidates of a query."""
    if method == "ours":
        from lightning_mmembed import ZeroShotReranker

        reranker = ZeroShotReranker.from_pretrained(folder, prompts=PROMPTS)
        return lambda query, candidates: reranker.score(query, candidates, "oven_task6")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pictures: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    labels = [tokenizer.convert_tokens_to_ids(word) for word in ("True", "False")]

    @torch.inference_mode()
    def one(query: Query, candidate: Candidate) -> torch.Tensor:
        content: list[dict[str, str]] = [{"type": "text", "text": "Question: "}]
        for item, after in (
            (query.item, "\nAnswer: "),
            (candidate.item, "\nDoes the answer correctly answer the question, True or False"),
        ):
            content += [{"type": "image"}] if item.image is not None else []
            text = "\n" + item.text if item.image is not None and item.text else item.text or ""
            content.append({"type": "text", "text": text + after})
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [item.image for item in (query.item, candidate.item) if item.image is not None]
        inputs = dict(pictures(images=images, return_tensors="pt"))
        pieces = prompt.split(IMAGE)
        counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        prompt = pieces[0] + "".join(IMAGE * length + piece for length, piece in zip(counts, pieces[1:], strict=True))
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        is_image = (ids == tokenizer.convert_tokens_to_ids(IMAGE)).int()
        mask = torch.ones_like(ids)
        output = model(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=is_image, use_cache=False, logits_to_keep=1, **inputs
        )
        return output.logits[0, -1, labels].float().softmax(-1)[0]

    return lambda query, candidates: torch.stack([one(query, candidate) for candidate in candidates])


def peak(method: str, folder: Path, kind: str, count: int) -> dict[str, float]:
    """Peak memory of this process, and how far it rose in scoring."""
    score = loaded(method, folder)
    pairs = work(count, kind)
    loading, before = resident("VmHWM"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for query, candidates in pairs:
        score(query, candidates)
    return {"peak": max(loading, resident("VmHWM")), "scoring": resident("VmHWM") - before}


def memory(method: str, folder: Path, kind: str, count: int) -> dict[str, float]:
    """Peak memory of a method, in MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reranking", "--queries", str(count), "--measure", method, kind]
    found: dict[str, float] = json.loads(subprocess.check_output([*command, str(folder)]).splitlines()[-1])
    return found


def compare(folder: Path, count: int, kind: str) -> None:
    """Print the figures of one set of candidates."""
    pairs = work(count, kind)
    scorers = {method: loaded(method, folder) for method in METHODS}
    scores = [torch.stack([score(*pair) for pair in pairs]) for score in scorers.values()]  # warms up, too
    off = float((scores[0] - scores[1]).abs().max())
    if not off < 1e-4:
        sys.exit(f"the scores differ by {off:.1e}")
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for number in range(ROUNDS):
        for method, score in scorers.items():
            clock, cpu = time.perf_counter(), time.process_time()
            for pair in pairs:
                score(*pair)
            times[method].append((time.perf_counter() - clock, time.process_time() - cpu))
        print(f"round {number}: " + ", ".join(f"{m} {t[-1][0]:.2f} s" for m, t in times.items()), file=sys.stderr)
    spread = float(scores[1].std())
    print(f"{count} queries of picture and text, 10 candidates each, {kind}: scores differ by {off:.1e} at most")
    print(f"  (their standard deviation is {spread:.2f})")
    for method in METHODS:
        found = memory(method, folder, kind, count)
        rate = count * CANDIDATES / statistics.median(clock for clock, _ in times[method])
        print(
            f"  {method}: {rate:.1f} pairs/s, peak {found['peak']:.0f} MiB, {found['scoring']:.0f} of them for scoring"
        )
    for which, name in enumerate(("the clock", "CPU time")):
        ratios = [theirs[which] / ours[which] for ours, theirs in zip(*times.values(), strict=True)]
        summary = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  ours / plain by {name}: {summary}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.measure:
        method, kind, folder = options.measure
        print(json.dumps(peak(method, Path(folder), kind, options.queries)))
        return
    with tempfile.TemporaryDirectory() as name:
        build_answering(Path(name), "qwen2_5_vl", world=WORLD, std=0.04, rope_scaling=MROPE, rope_parameters=MROPE)
        for kind in KINDS:
            compare(Path(name), options.queries, kind)


if __name__ == "__main__":
    main()
