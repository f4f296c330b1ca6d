"""Encoding a mixed pool: ours against sentence-transformers' own ``encode``, on the same weights and items.

    python -m benchmarks.encoding            600 items, a third texts, a third pictures, a third both

The checkpoint is a Gemma 3 with random weights: for that family transformers' own processor makes of a picture what
ours does, and a chat template can write our prompt, so that both compute the same vectors, which is asserted. On its
side stand its own modules: ``Transformer`` with the multimodal processor, ``Pooling`` and ``Normalize``, its batches
of 32 and its own sorting by length. On ours ``encode_document`` with its defaults. Both use float32, as many threads as
``OMP_NUM_THREADS`` says, PIL to resize pictures, and pictures that are in memory. Rounds alternate, so that a machine
whose speed drifts slows both; the figures are medians, of the rates and of the ratios within a round, by the clock and
by CPU time, which other work on the machine disturbs less. Memory is measured in processes of their own, from start to
end, libraries included. Linux only.

sentence-transformers sorts by characters, and for it a picture is as long as it has pixels. So there are two pools:
one with pictures of 256 pixels on the short side and many aspect ratios, as M-BEIR has them, and one with pictures of a
single size, among which it sorts by the text alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.encoders.family_worlds import TEXTS, World, build, siglip, square, text_config

METHODS = ("ours", "sentence-transformers")
POOLS = ("many sizes", "one size")
ROUNDS, SEED, SIDE, PATCH, POSITIONS = 5, 0, 128, 16, 64
LONGEST = 80

Encode = Callable[[list[Any]], torch.Tensor]

WORLD = World(
    lambda ids: {
        "model_type": "gemma3",
        "image_token_index": ids["image_token"],
        "boi_token_index": ids["boi_token"],
        "eoi_token_index": ids["eoi_token"],
        "mm_tokens_per_image": POSITIONS,
        "text_config": text_config(
            "gemma3_text",
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=64,
        ),
        "vision_config": siglip(
            hidden_size=128, intermediate_size=512, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
        ),
    },
    {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    square("Gemma3ImageProcessor", size={"height": SIDE, "width": SIDE}, resample=2),
    {"processor_class": "Gemma3Processor", "image_seq_length": POSITIONS},
)

#: Our prompt for a candidate, in the words of transformers.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<start_of_image>\n' }}{% endif %}{% endfor %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}{{ eos_token }}"
)


def checkpoint(folder: Path) -> None:
    """Write the weights, our prompt as a chat template among them."""
    build(folder, WORLD)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def items(count: int, sizes: str) -> list[Any]:
    """Texts, pictures and pairs of both, shuffled; texts of 3 to 80 words, short ones more often."""
    rng = np.random.default_rng(SEED)
    words = " ".join(TEXTS).split()
    drawn: list[Any] = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(np.log(15), 0.8), 3, LONGEST))
        text = " ".join(rng.choice(words, length))
        width = round(256 * rng.uniform(1, 1.8)) if sizes == "many sizes" else 341
        size = (width, 256) if rng.random() < 0.7 or sizes == "one size" else (256, width)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        drawn.append((text, picture, (picture, text))[number % 3])
    return [drawn[i] for i in rng.permutation(count)]


def loaded(method: str, folder: Path) -> tuple[torch.nn.Module, Encode]:
    """The language model of a method, and what encodes a pool."""
    if method == "ours":
        from lightning_mmembed import MLLMEncoder

        encoder = MLLMEncoder.from_pretrained(folder, bidirectional=False)
        return encoder.backbone.language_model, encoder.encode_document
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    first = Transformer(str(folder), max_seq_length=512, processor_kwargs={"backend": "pil"})
    modules = [first, Pooling(first.get_embedding_dimension(), "mean"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")

    def encode(pool: list[Any]) -> torch.Tensor:
        named = [dict(zip(("image", "text"), i, strict=True)) if isinstance(i, tuple) else i for i in pool]
        return model.encode(named, convert_to_tensor=True, show_progress_bar=False)

    return first.model.language_model, encode


def positions(model: torch.nn.Module, encode: Encode, pool: list[Any]) -> int:
    """Positions that the language model computes for a pool, padding counted."""
    counted = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: counted.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    encode(pool)
    hook.remove()
    return sum(counted)


def resident(field: str) -> float:
    """Memory of this process in MiB: now (``VmRSS``), or at most since the last reset (``VmHWM``)."""
    # Not ru_maxrss: a child begins with that of its parent.
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**10


def peak(method: str, folder: Path, pool: list[Any]) -> dict[str, float]:
    """Peak memory of this process, and how far it rose in encoding."""
    encode = loaded(method, folder)[1]
    loading, before = resident("VmHWM"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    encode(pool)
    return {"peak": max(loading, resident("VmHWM")), "encoding": resident("VmHWM") - before}


def memory(method: str, folder: Path, count: int, sizes: str) -> dict[str, float]:
    """Peak memory of a method, in MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.encoding", "--items", str(count), "--measure", method, sizes]
    found: dict[str, float] = json.loads(subprocess.check_output([*command, str(folder)]).splitlines()[-1])
    return found


def compare(folder: Path, count: int, sizes: str) -> None:
    """Print the figures of one pool."""
    pool = items(count, sizes)
    parts = {method: loaded(method, folder) for method in METHODS}
    vectors = [encode(pool) for _, encode in parts.values()]  # warms up, too
    off = float((vectors[0] - vectors[1]).abs().max())
    if not off < 1e-5:
        sys.exit(f"the vectors differ by {off:.1e}")
    model, encode = parts["ours"]
    tokens = positions(model, partial(encode, batch_size=1), pool)  # nothing to pad
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for number in range(ROUNDS):
        for method, (_, encode) in parts.items():
            clock, cpu = time.perf_counter(), time.process_time()
            encode(pool)
            times[method].append((time.perf_counter() - clock, time.process_time() - cpu))
        print(f"round {number}: " + ", ".join(f"{m} {t[-1][0]:.2f} s" for m, t in times.items()), file=sys.stderr)
    print(f"{count} items, pictures of {sizes}: vectors differ by {off:.1e} at most, {tokens} tokens")
    for method, (model, encode) in parts.items():
        padded = positions(model, encode, pool)
        found = memory(method, folder, count, sizes)
        print(
            f"  {method}: {count / statistics.median(clock for clock, _ in times[method]):.1f} items/s, {padded} "
            f"positions ({100 * (padded / tokens - 1):.1f} % padding), peak {found['peak']:.0f} MiB, "
            f"{found['encoding']:.0f} of them for encoding"
        )
    for which, name in enumerate(("the clock", "CPU time")):
        ratios = [theirs[which] / ours[which] for ours, theirs in zip(*times.values(), strict=True)]
        summary = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  ours / sentence-transformers by {name}: {summary}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=600)
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "SIZES", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.measure:
        method, sizes, folder = options.measure
        print(json.dumps(peak(method, Path(folder), items(options.items, sizes))))
        return
    with tempfile.TemporaryDirectory() as name:
        checkpoint(Path(name))
        for sizes in POOLS:
            compare(Path(name), options.items, sizes)


if __name__ == "__main__":
    main()
