"""Encoding and LoRA training at MM-Embed's size: tokens per second, and the share of what the device can multiply.

    python -m benchmarks.performance            random weights made on the device; no checkpoint and no data are needed

On a GPU the model has the shapes of nvidia/MM-Embed, in bfloat16: CLIP ViT-L/14 at 336 pixels (577 positions a
picture), Mistral 7B with NV-Embed-v1's two-sided attention, latent attention of 512 latents. Without one, the same
code runs a tiny model in float32 on the CPU, which says that it works and nothing about the large one.

Encoding is ``encode_document`` from text and PIL picture to vector, so preparation on the CPU counts. Training is a
step on queries, as many positives and as many hard negatives, a third of them texts, a third pictures, a third both:
LoRA of rank 8 on the language model, projector and pooling trained whole, tower frozen, AdamW; inputs are prepared
beforehand, as the workers of a DataLoader do. Tokens are those of the prompt and one for each position of a picture,
without padding.

The largest batch of a LoRA step with gradient checkpointing is looked for last, once by itself and once with GradCache:
queries are doubled until a step does not fit, or the next one may take longer than 2 minutes (on the CPU 4 s).

The ceiling is the best rate of products of two square matrices of the same type, measured in the same run. The
operations are counted by formula, 2 for a multiplication and its addition, and only those of matrix products:

- language model, a layer, for L positions: 2 L D (2 A + 2 K + 3 F) + 4 L^2 A, where D is the width, A and K the widths
  of all heads of queries and of keys, F that of the feed-forward
- tower, a layer that is used, for P positions: 2 P D (4 D + 2 F) + 4 P^2 D; patches and projector, once
- latent attention, for a position: 2 D (2 H) + 4 N H + 2 D (12 D), for N latents and heads of width H together

A training step counts the language model twice (forward, and backward to its inputs: its frozen weights get no
gradient), projector and pooling three times, the tower once. LoRA's own products (below 1 %), norms, softmax, the
latents' keys and values, what gradient checkpointing and GradCache compute again, and padding are not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPVisionConfig, LlavaNextConfig, LlavaNextModel, MistralConfig
from transformers import logging as transformers_logging

from lightning_mmembed.encoders.families import LlavaNext
from lightning_mmembed.encoders.lora import LoRA, checkpoint_gradients, choose_trained
from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.encoders.mm_embed import NV_EMBED_V1
from lightning_mmembed.encoders.processor import EncoderInputs, ItemProcessor
from lightning_mmembed.encoders.prompts import PromptTokenizer
from lightning_mmembed.encoders.tiny import build_tiny_llava_next
from lightning_mmembed.gradcache import GradCache
from lightning_mmembed.items import Item
from lightning_mmembed.losses import contrastive_loss

ROUNDS, TOKENS, KINDS = 3, 128, ("text", "image", "mixed")
WORD = "word"


@dataclass(frozen=True)
class Size:
    """What is measured on a device: shapes of the model, batch sizes, and the side of the ceiling's matrices."""

    vision: dict[str, int]
    text: dict[str, Any]
    latent_attention: dict[str, int]
    dtype: torch.dtype
    encoded: tuple[int, ...]
    trained: tuple[int, ...]
    side: int
    budget: int  # positions of a pass of GradCache
    longest: float  # seconds that a step may take in the search for the largest batch


_NV_EMBED = NV_EMBED_V1["latent_attention_config"]
LARGE = Size(
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 336, "patch_size": 14},
    NV_EMBED_V1["text_config"],
    {
        "num_latents": _NV_EMBED["num_latents_value"],
        "num_heads": _NV_EMBED["num_cross_heads"],
        "head_dim": _NV_EMBED["cross_dim_head"],
    },
    torch.bfloat16,
    (8, 32, 128),
    (4, 16),
    8192,
    16384,
    120,
)
TINY = Size(
    {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"image_size": 112, "patch_size": 14},
    {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    {"num_latents": 32, "num_heads": 2, "head_dim": 256},
    torch.float32,
    (4, 16),
    (2, 4),
    1024,
    1024,
    4,
)


def built(size: Size, device: torch.device) -> MLLMEncoder:
    """An encoder with random weights; tokenizer and image settings are those of a tiny checkpoint."""
    sides = {name: size.vision[name] for name in ("image_size", "patch_size")}
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_llava_next(folder, [f"{WORD} " * TOKENS], **sides)
        tokenizer, tiny = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**size.vision).to_dict(),
            text_config=MistralConfig(**size.text, sliding_window=None).to_dict(),
            image_token_index=tiny.image_token_id,
            image_grid_pinpoints=tiny.image_grid_pinpoints,
        )
        processor = ItemProcessor(PromptTokenizer(tokenizer, TOKENS), LlavaNext(folder, config, tokenizer))
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with device:
            return MLLMEncoder(LlavaNextModel(config), processor, "latent-attention", size.latent_attention).eval()
    finally:
        torch.set_default_dtype(default)


def items(kind: str, count: int, side: int) -> list[Item]:
    """Texts of 128 tokens, pictures larger than the tower's, or a third each of texts, pictures and both."""
    text, picture = " ".join([WORD] * (TOKENS - 2)), Image.new("RGB", (side + 64, side))
    kinds = {"text": [Item(text)], "image": [Item(image=picture)]}
    kinds["mixed"] = [*kinds["text"], *kinds["image"], Item(" ".join([WORD] * 30), picture)]
    return [kinds[kind][number % len(kinds[kind])] for number in range(count)]


def operations(encoder: MLLMEncoder, prepared: Any) -> dict[str, float]:
    """Operations of a forward pass by part, and the tokens; the formulas stand at the top."""
    text, vision = encoder.backbone.config.text_config, encoder.backbone.config.vision_config
    lengths = torch.cat([bucket.attention_mask.sum(1) for bucket in prepared.buckets]).double()
    pictures = sum(len(bucket.pictures.get("pixel_values", ())) for bucket in prepared.buckets)
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    width, layers = text.hidden_size, text.num_hidden_layers
    linear = 2 * width * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    language = layers * (linear * lengths + 4 * queries * lengths**2).sum()
    patches, tower = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    used = vision.num_hidden_layers + 1 + encoder.backbone.config.vision_feature_layer
    layer = 2 * (patches + 1) * tower * (4 * tower + 2 * vision.intermediate_size) + 4 * (patches + 1) ** 2 * tower
    seen = pictures * (used * layer + 2 * patches * 3 * vision.patch_size**2 * tower)
    projected = pictures * 2 * patches * (tower * width + width**2)
    pooling: Any = encoder.pooling
    heads, latents = pooling.to_q.out_features, len(pooling.latents)
    pooled = lengths.sum() * (4 * width * heads + 4 * latents * heads + 24 * width**2)
    tokens = float(lengths.sum())
    return {"language": float(language), "tower": float(seen), "whole": float(projected + pooled), "tokens": tokens}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median time of some rounds after one that warms up."""
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def ceiling(size: Size, device: torch.device) -> float:
    """Operations per second of the product of two square matrices, the best of three sizes."""
    rates = []
    for side in (size.side // 2, size.side, 2 * size.side):
        left, right = (torch.randn(side, side, dtype=size.dtype, device=device) for _ in range(2))
        rates.append(2 * side**3 / seconds(lambda a=left, b=right: a @ b, device))
    return max(rates)


def row(what: str, count: int, counted: float, tokens: float, peak: float, device: torch.device, work: Any) -> None:
    """Measure and print a row of the table; a batch that does not fit says so."""
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = seconds(work, device)
    except torch.OutOfMemoryError:
        print(f"| {what} | {count} | out of memory | | | | |", flush=True)
        return
    memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "not measured"
    figures = (
        f"{taken:.2f} | {count / taken:.1f} | {tokens / taken:.0f} | {100 * counted / taken / peak:.1f} % | {memory}"
    )
    print(f"| {what} | {count} | {figures} |", flush=True)


def encode(encoder: MLLMEncoder, size: Size, device: torch.device, peak: float) -> None:
    for kind in KINDS:
        for batch in size.encoded:
            pool = items(kind, 3 * batch, size.vision["image_size"])
            counted = operations(encoder, encoder.processor(pool))
            tokens = counted.pop("tokens")
            row(
                f"encoding, {kind}, at most {batch} in a pass",
                len(pool),
                sum(counted.values()),
                tokens,
                peak,
                device,
                lambda p=pool, b=batch: encoder.encode_document(p, batch_size=b, tokens_per_batch=2**31),
            )


def train(encoder: MLLMEncoder, size: Size, device: torch.device, peak: float) -> None:
    choose_trained(encoder.backbone, encoder.family, LoRA(), freeze_vision=True)
    encoder.pooling.float()  # what is trained is kept in float32, as from_pretrained(lora=...) does
    encoder.to(device).train()
    step = stepper(encoder, size, device)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_gradients(encoder.backbone)
        for queries in size.trained:
            inputs = encoder.processor(items("mixed", 3 * queries, size.vision["image_size"]))
            what = f"LoRA step, {queries} queries" + (", gradient checkpointing" if checkpointing else "")
            row(what, 3 * queries, *worth(encoder, inputs), peak, device, partial(step, inputs))
    for budget in (None, size.budget):
        queries, inputs = largest(encoder, size, device, step, budget)
        what = f"LoRA step, gradient checkpointing, {'GradCache, ' if budget else ''}most queries: {queries}"
        row(what, 3 * queries, *worth(encoder, inputs), peak, device, partial(step, inputs, cached=bool(budget)))


def worth(encoder: MLLMEncoder, inputs: EncoderInputs) -> tuple[float, float]:
    """Operations of a training step that count, and its tokens."""
    counted = operations(encoder, inputs)
    return 2 * counted["language"] + counted["tower"] + 3 * counted["whole"], counted["tokens"]


def stepper(encoder: MLLMEncoder, size: Size, device: torch.device) -> Callable[..., None]:
    """What trains on some items, of which the first third are queries, with GradCache or without."""
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-4)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=size.dtype is torch.bfloat16)

    def step(inputs: EncoderInputs, cached: bool = False) -> None:
        inputs, queries = inputs.to(device), len(inputs) // 3
        optimizer.zero_grad()
        with autocast():
            cache = GradCache(encoder, inputs.passes(), 0) if cached else None
            rows = None if cache is None else cache.vectors
            vectors = encoder(inputs) if rows is None else torch.zeros_like(rows).index_copy(0, inputs.order, rows)
            loss = contrastive_loss(vectors[:queries], vectors[queries:], torch.arange(queries, device=device))
        loss.backward()
        if cache is not None:
            with autocast():
                cache.backward(encoder, encoder)
        optimizer.step()

    return step


def largest(
    encoder: MLLMEncoder, size: Size, device: torch.device, step: Callable[..., None], budget: int | None
) -> tuple[int, EncoderInputs]:
    """The most queries whose step fits and does not take too long, found by doubling; and their items."""
    queries, found, taken = size.trained[-1], None, 0.0
    while taken < size.longest / 2:
        inputs = encoder.processor(items("mixed", 3 * queries, size.vision["image_size"]), budget)
        start = time.perf_counter()
        try:
            step(inputs, cached=budget is not None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            break
        taken, found, queries = time.perf_counter() - start, (queries, inputs), 2 * queries
    if found is None:
        raise SystemExit(f"a LoRA step on {queries} queries with gradient checkpointing does not fit")
    return found


def main() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = LARGE if device.type == "cuda" else TINY
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    torch.manual_seed(0)
    peak = ceiling(size, device)
    encoder = built(size, device)
    weights = sum(p.numel() for p in encoder.parameters())
    print(f"{name}, {size.dtype}, {weights / 1e6:.0f}M weights, ceiling {peak / 1e12:.3f} TFLOPS\n")
    print("| what | items | seconds | items/s | tokens/s | share of the ceiling | peak memory |\n|" + "---|" * 7)
    encode(encoder, size, device, peak)
    train(encoder, size, device, peak)
    if device.type == "cpu":
        print("\nNot measured, for want of a GPU: the shapes of MM-Embed, bfloat16, memory of the device.")


if __name__ == "__main__":
    main()
