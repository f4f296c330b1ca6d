"""A LLaVA-NeXT small enough to train from random weights on a laptop, as a real checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lightning_mmembed.encoders.mllm import MLLMEncoder
from lightning_mmembed.files import building_directory, fingerprint, locked

IMAGE_TOKEN = "<image>"
BUILD_FILE = "tiny.json"


class Corpus(Protocol):
    """Texts to train a tokenizer on, with a fingerprint of what they are."""

    fingerprint: str

    def __iter__(self) -> Iterator[str]:
        """The texts."""


def tiny_encoder(path: str | Path, corpus: Corpus, architecture: dict[str, Any], **encoder: Any) -> MLLMEncoder:
    """Load the tiny checkpoint at ``path``, made first if it is absent or was made of something else.

    Args:
        path: Directory of the checkpoint.
        corpus: Texts that the tokenizer is trained on.
        architecture: Arguments of :func:`build_tiny_llava_next`.
        **encoder: Arguments of :meth:`MLLMEncoder.from_pretrained`.
    """
    path = Path(path)
    made_of = {"fingerprint": fingerprint(corpus.fingerprint, architecture)}
    with locked(path):
        build_file = path / BUILD_FILE
        if not build_file.is_file() or json.loads(build_file.read_text()) != made_of:
            with building_directory(path) as directory:
                build_tiny_llava_next(directory, corpus, **architecture)
                (directory / BUILD_FILE).write_text(json.dumps(made_of))
        # Still locked: a run with another seed may be waiting to replace it.
        return MLLMEncoder.from_pretrained(path, **encoder)


def build_tiny_llava_next(
    directory: str | Path,
    texts: Iterable[str],
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    intermediate_size: int = 384,
    vision_hidden_size: int = 128,
    vision_layers: int = 2,
    image_size: int = 64,
    patch_size: int = 16,
    vocab_size: int = 4096,
    seed: int = 0,
) -> Path:
    """Write a random-weight LLaVA-NeXT (CLIP tower, projector, Mistral) with its tokenizer and processor.

    Args:
        directory: Where to write; read by ``from_pretrained`` of this package and of transformers alike.
        texts: What the byte-level BPE tokenizer is trained on.
        hidden_size: Width of the language model, and so of the vectors.
        num_layers: Layers of the language model.
        num_heads: Attention heads of both towers.
        intermediate_size: Width of the language model's feed-forward.
        vision_hidden_size: Width of the vision tower.
        vision_layers: Layers of the vision tower.
        image_size: Side of the square that every picture is resized to, in pixels.
        patch_size: Side of a patch; a picture takes ``(image_size / patch_size)**2 + 1`` positions.
        vocab_size: Largest number of tokens.
        seed: Seed of the weights.

    Returns:
        ``directory``.
    """
    directory = Path(directory)
    tokenizer = _train_tokenizer(texts, vocab_size)
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=num_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden_size,
    )
    text = _tiny_mistral(tokenizer, hidden_size, num_layers, num_heads, intermediate_size)
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        image_grid_pinpoints=[[image_size, image_size]],
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,  # a second-last layer, as in large towers, would leave the last one untrained
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config)
    model.save_pretrained(directory)
    _tiny_processor(tokenizer, image_size, patch_size).save_pretrained(directory)
    return directory


def _tiny_mistral(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int
) -> MistralConfig:
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        sliding_window=None,
        # 0.02, the default, is meant for wide models: the deviation goes with one over the root of the width.
        initializer_range=hidden_size**-0.5 / 2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def _tiny_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaNextProcessor:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_grid_pinpoints=[[image_size, image_size]],
    )
    return LlavaNextProcessor(  # type: ignore[no-untyped-call]
        pictures,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
