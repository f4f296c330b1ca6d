"""Tiny checkpoints with random weights, one per family: model, tokenizer and image settings, as they are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from lightning_mmembed.items import Item, Query

TEXTS = (
    "a red ellipse",
    "which pet is green? Find the picture of this pet.",
    "a very long story about a red ellipse and a blue rectangle that goes on for quite a while",
    "Instruct: Change it\nQuery: green in place of gray",
)
SIZE, PATCH, WIDTH = 32, 8, 32
HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}


@dataclass(frozen=True)
class World:
    """How a tiny checkpoint of a family is made.

    Args:
        config: The configuration, as in config.json, given the ids of the special tokens.
        special: The special tokens by the names that transformers' processor knows them by; ``image_token`` first.
        pictures: preprocessor_config.json.
        processor: processor_config.json, where the family is run through transformers' own processor.
        unread: Parts of names of weights that the model does not read.
    """

    config: Callable[[dict[str, int]], dict[str, Any]]
    special: dict[str, str]
    pictures: dict[str, Any]
    processor: dict[str, Any] | None = None
    unread: tuple[str, ...] = ()


def text_config(model_type: str, **changed: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        # 0.02, the default, is meant for wide models.
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        **changed,
    }


def siglip(**changed: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
        "vision_use_head": False,
        **changed,
    }


def square(kind: str, **changed: Any) -> dict[str, Any]:
    return {"image_processor_type": kind, "size": {"height": SIZE, "width": SIZE}, "resample": 3, **HALF, **changed}


def llava(
    model_type: str, text: str, vision: dict[str, Any], layer: int, strategy: str
) -> Callable[[dict[str, int]], dict[str, Any]]:
    features = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    return lambda ids: {
        "model_type": model_type,
        "image_token_index": ids["image_token"],
        "image_grid_pinpoints": [[SIZE, SIZE], [SIZE, 2 * SIZE]],
        **features,
        "text_config": text_config(text, sliding_window=None),
        "vision_config": vision,
    }


def qwen(model_type: str, vision: dict[str, Any], **text: Any) -> World:
    sizes = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
    mrope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    return World(
        lambda ids: {
            "model_type": model_type,
            "image_token_id": ids["image_token"],
            "video_token_id": ids["video_token"],
            "vision_start_token_id": ids["vision_bos_token"],
            "vision_end_token_id": ids["vision_eos_token"],
            "text_config": text_config(f"{model_type}_text", rope_scaling=mrope, rope_parameters=mrope, **text),
            "vision_config": {**sizes, **vision},
        },
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 2 * (2 * PATCH) ** 2,
            "max_pixels": 6 * (2 * PATCH) ** 2,
            **HALF,
        },
    )


def idefics(model_type: str, kind: str) -> World:
    vision = {k: v for k, v in siglip(model_type=f"{model_type}_vision").items() if k != "vision_use_head"}
    return World(
        lambda ids: {
            "model_type": model_type,
            "image_token_id": ids["image_token"],
            "scale_factor": 2,
            "text_config": text_config("llama"),
            "vision_config": vision,
        },
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        {
            "image_processor_type": f"{kind}ImageProcessor",
            "size": {"longest_edge": 2 * SIZE},
            "max_image_size": {"longest_edge": SIZE},
            "do_image_splitting": True,
            **HALF,
        },
    )


CLIP = siglip(model_type="clip_vision_model", projection_dim=WIDTH)
del CLIP["vision_use_head"]
ANYRES = {"crop_size": {"height": SIZE, "width": SIZE}, "image_grid_pinpoints": [[SIZE, SIZE], [SIZE, 2 * SIZE]]}

WORLDS: dict[str, World] = {
    "llava_next": World(
        llava("llava_next", "mistral", CLIP, -2, "default"),
        {"image_token": "<image>"},
        square("LlavaNextImageProcessor", **{**ANYRES, "size": {"shortest_edge": SIZE}}),
        unread=(".encoder.layers.1.", "post_layernorm"),
    ),
    "llava_onevision": World(
        llava("llava_onevision", "qwen2", siglip(), -1, "full"),
        {"image_token": "<image>", "video_token": "<video>"},
        square("LlavaOnevisionImageProcessor", image_grid_pinpoints=ANYRES["image_grid_pinpoints"]),
        unread=("post_layernorm",),
    ),
    "qwen2_vl": qwen("qwen2_vl", {"embed_dim": 32, "hidden_size": WIDTH}),
    "qwen2_5_vl": qwen(
        "qwen2_5_vl",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": WIDTH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": qwen(
        "qwen3_vl",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
    "idefics3": idefics("idefics3", "Idefics3"),
    "smolvlm": idefics("smolvlm", "SmolVLM"),
    "paligemma": World(
        lambda ids: {
            "model_type": "paligemma",
            "image_token_index": ids["image_token"],
            "projection_dim": WIDTH,
            "hidden_size": WIDTH,
            "text_config": text_config("gemma"),
            "vision_config": siglip(projection_dim=WIDTH),
        },
        {"image_token": "<image>"},
        square("SiglipImageProcessor", image_seq_length=(SIZE // PATCH) ** 2),
    ),
    "gemma3": World(
        lambda ids: {
            "model_type": "gemma3",
            "image_token_index": ids["image_token"],
            "boi_token_index": ids["boi_token"],
            "eoi_token_index": ids["eoi_token"],
            "mm_tokens_per_image": 4,
            "text_config": text_config(
                "gemma3_text", sliding_window=8, layer_types=["sliding_attention", "full_attention"]
            ),
            "vision_config": siglip(),
        },
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        square("Gemma3ImageProcessor", resample=2),
    ),
    "internvl": World(
        lambda ids: {
            "model_type": "internvl",
            "image_token_id": ids["context_image_token"],
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "text_config": text_config("qwen2"),
            "vision_config": siglip(model_type="internvl_vision", image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH]),
        },
        {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        square("GotOcr2ImageProcessor", crop_to_patches=True),
    ),
}

#: A family that transformers knows and this package has no adapter for.
UNKNOWN = World(
    lambda ids: {
        "model_type": "aya_vision",
        "image_token_index": ids["img_patch_token"],
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
        "text_config": text_config("cohere2", sliding_window=8),
        "vision_config": siglip(),
    },
    {
        "img_patch_token": "<|IMG_PATCH|>",
        "image_token": "<image>",
        "start_of_img_token": "<|START_OF_IMG|>",
        "end_of_img_token": "<|END_OF_IMG|>",
    },
    square("GotOcr2ImageProcessor", crop_to_patches=True, min_patches=1, max_patches=4),
    {"processor_class": "AyaVisionProcessor", "patch_size": PATCH, "img_size": SIZE, "downsample_factor": 2},
    unread=("post_layernorm",),
)


@lru_cache
def trained(special: Sequence[str]) -> str:
    """A byte-level tokenizer of a few texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tokenizer_of(special: dict[str, str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(tuple(special.values()))),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special,
    )


def build(directory: Path, world: World, seed: int = 0) -> Path:
    """Write a checkpoint."""
    tokenizer = tokenizer_of(world.special)
    ids = {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in world.special.items()}
    content = world.config(ids)
    ends = {name: int(getattr(tokenizer, name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    content["text_config"] = {**content["text_config"], "vocab_size": len(tokenizer), **ends}
    config = AutoConfig.for_model(**content)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # a projector that starts at zero would hide the pictures
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(world.pictures))
    if world.processor is not None:
        (directory / "processor_config.json").write_text(json.dumps(world.processor))
    return directory


def drawn(size: tuple[int, int] = (90, 50), colour: str = "green") -> Image.Image:
    """A picture whose edges differ from its middle, so that a crop would show."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 14, size[1]), fill="red")
    draw.rectangle((size[0] - 15, 0, size[0], size[1]), fill="blue")
    draw.ellipse((20, 5, 40, 25), fill=colour)
    return image


ENTRIES: list[Query | Item] = [
    Item("a red ellipse"),
    Item(image=drawn()),
    Item("a very long story about a red ellipse and a blue rectangle", drawn((30, 80), "gold")),
    Query(Item("green in place of gray", drawn((40, 40))), "Change it"),
    Query(Item("which pet is green?")),
]
