"""Memory of training at MM-Embed's size, worked out: what a GPU holds of weights, gradients and optimizer, and a host.

    python -m benchmarks.memory            shapes only: no weights are made, and no GPU is needed

Weights are counted on torch's meta device, in a model of nvidia/MM-Embed's shapes: W weights at w bytes, of which T are
trained, at t bytes; R of them outside the layers of the language model, of which S are trained; and L in one layer.

- one GPU: (W - T) w + 4 T t, for a trained weight has a gradient and AdamW's two moments; under DDP another T t, for
  the buckets in which gradients are exchanged
- FSDP2 on n GPUs, between steps: that of one GPU divided by n
- FSDP2 within a step, in addition: R g + 2 L g + S (g + s), where weights are gathered at g bytes and gradients summed
  at s bytes: what is outside the layers stays gathered, with two layers at a time, and its gradients are there in full,
  in both types, before they are shared out
- host: (W - T) w + T t for each process, which loads the whole model before anything goes to a GPU

Activations come on top, and go by the positions of a pass; so do, on one GPU or under DDP, autocast's copies of float32
weights in bfloat16, the CUDA context and NCCL's buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import nn

from benchmarks.performance import LARGE, built
from lightning_mmembed.encoders.lora import LoRA, choose_trained
from lightning_mmembed.encoders.mllm import MLLMEncoder

GPUS = 8


@dataclass(frozen=True)
class Kind:
    """A way to train: bytes of a frozen weight, of a trained one, gathered, and summed."""

    name: str
    lora: bool
    frozen: int
    trained: int
    gathered: int
    summed: int


KINDS = (
    Kind("every weight, float32, bf16-mixed", False, 4, 4, 2, 4),
    Kind("every weight, bfloat16, bf16-true", False, 2, 2, 2, 2),
    Kind("LoRA, base in bfloat16, bf16-mixed", True, 2, 4, 2, 4),
)


def numel(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def outside(encoder: MLLMEncoder, trained: bool = False) -> int:
    """Weights that belong to no layer of the language model."""
    return numel(encoder, trained) - sum(numel(block, trained) for block in encoder.blocks())


def row(kind: Kind) -> str:
    """GB of a GPU and of a host with as many processes as GPUs."""
    encoder = built(LARGE, torch.device("meta"))
    if kind.lora:
        choose_trained(encoder.backbone, encoder.family, LoRA(), freeze_vision=True)
    trained = numel(encoder, trained=True)
    weights = (numel(encoder) - trained) * kind.frozen + trained * kind.trained
    one = weights + 3 * trained * kind.trained
    step = kind.gathered * (outside(encoder) + 2 * numel(encoder.blocks()[0]))
    step += (kind.gathered + kind.summed) * outside(encoder, trained=True)
    bytes_of = (one, one + trained * kind.trained, one / GPUS, one / GPUS + step, weights, GPUS * weights)
    return f"| {kind.name} | {trained / 1e6:,.0f} M | " + " | ".join(f"{n / 1e9:.1f}" for n in bytes_of) + " |"


def main() -> None:
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    encoder = built(LARGE, torch.device("meta"))
    backbone = encoder.backbone
    parts = {
        "vision tower": numel(backbone.vision_tower),
        "projector and image newline": numel(backbone.multi_modal_projector) + backbone.image_newline.numel(),
        "token embeddings and last norm": numel(backbone.language_model) - numel(backbone.language_model.layers),
        f"{len(encoder.blocks())} layers": numel(backbone.language_model.layers),
        "latent attention": numel(encoder.pooling),
        "all": numel(encoder),
        "outside the layers": outside(encoder),
    }
    print("| part | weights |\n|---|---|")
    for name, count in parts.items():
        print(f"| {name} | {count:,} |")
    heads = (
        "one GPU",
        "DDP",
        f"FSDP2 {GPUS}, between steps",
        "within a step",
        "host, one process",
        f"{GPUS} processes",
    )
    print(f"\n| trained, GB | trained weights | {' | '.join(heads)} |\n|" + "---|" * (2 + len(heads)))
    for kind in KINDS:
        print(row(kind))


if __name__ == "__main__":
    main()
