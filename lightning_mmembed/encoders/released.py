"""An encoder of MM-Embed's make: written in the layout of the release, and joined from the two parts it began as."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import LlavaNextModel

from lightning_mmembed.encoders import mm_embed
from lightning_mmembed.encoders.families import LlavaNext
from lightning_mmembed.encoders.loading import (
    check_dtype,
    check_weights,
    load_config,
    load_tokenizer,
    read_json,
    reading,
)
from lightning_mmembed.encoders.lora import plain_weights
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import new_directory

if TYPE_CHECKING:
    from lightning_mmembed.encoders.mllm import MLLMEncoder

#: Where the text embedder's configuration lies in a checkpoint whose text embedder is not NV-Embed-v1's size.
RETRIEVER_FOLDER = "retriever"

#: How the names of a LLaVA-NeXT's language model and its head begin, by version of transformers.
_LANGUAGE_MODEL = ("language_model.", "model.language_model.", "lm_head.")

#: What the release's text configurations say by the names that we keep them under.
_TEXT_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
_VISION_FIELDS = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
    "projection_dim",
)


@dataclass(frozen=True)
class Parts:
    """What an encoder is made of, read from its two checkpoints.

    Args:
        backbone: LLaVA-NeXT with the text embedder in the place of its language model.
        family: Prepares pictures.
        tokenizer: LLaVA-NeXT's.
        pooling_options: Sizes of the latent attention.
        pooling_weights: Its weights, by our names.
    """

    backbone: Any
    family: LlavaNext
    tokenizer: Any
    pooling_options: dict[str, int]
    pooling_weights: dict[str, Tensor]


def join_parts(llava_next: str, nv_embed: str, dtype: torch.dtype | str) -> Parts:
    """Put the text embedder NV-Embed-v1 in the place of a LLaVA-NeXT's language model, which is not read.

    Args:
        llava_next: Vision tower, projector, ``image_newline``, tokenizer and image settings; a directory or a hub id.
        nv_embed: Language model and latent attention.
        dtype: Type of the backbone's weights.

    Raises:
        UserInputError: If one of them is another kind of checkpoint, or their widths differ, or ``dtype`` is unknown.
    """
    check_dtype(dtype)
    with reading(nv_embed):
        retriever = read_json(nv_embed, "config.json") or {}
        if not {"text_config", "latent_attention_config"} <= retriever.keys():
            raise UserInputError(
                f"nv_embed={nv_embed!r} is no NV-Embed checkpoint: its config.json has no text_config with a "
                f"latent_attention_config; give {mm_embed.TEXT_EMBEDDER!r} or a directory of that make"
            )
        tensors = mm_embed.read_tensors(nv_embed, "embedding_model.")
        text = {f"language_model.{key}": value for key, value in tensors.items()}
        latent = mm_embed.read_tensors(nv_embed, mm_embed.LATENT_ATTENTION)
    with reading(llava_next):
        config: Any = load_config(llava_next)
        if config.model_type not in LlavaNext.model_types:
            raise UserInputError(
                f"llava_next={llava_next!r} has model_type={config.model_type!r}; give a LLaVA-NeXT, such as "
                "'llava-hf/llava-v1.6-mistral-7b-hf'"
            )
        settings = mm_embed.use_text_embedder(config, retriever)
        tensors = mm_embed.read_tensors(llava_next, "", skipped=_LANGUAGE_MODEL)
        rest = {key.removeprefix("model."): value for key, value in tensors.items()}
        loaded: Any = LlavaNextModel.from_pretrained(
            None, config=config, state_dict=rest | text, output_loading_info=True, dtype=dtype
        )
        backbone, info = loaded
        check_weights(f"{llava_next} with {nv_embed}", type(backbone).__name__, info)
        tokenizer = load_tokenizer(llava_next)
        family = LlavaNext(llava_next, config, tokenizer)
    return Parts(backbone, family, tokenizer, settings["pooling_options"], mm_embed.latent_attention(latent))


def write_released(encoder: MLLMEncoder, directory: str | Path) -> Path:
    """Write an encoder of MM-Embed's make in the layout of the release; see :meth:`MLLMEncoder.save_released`."""
    check_make(encoder)
    config = encoder.backbone.config
    settings = encoder.settings
    retriever = retriever_config(config.text_config, settings["pooling_options"])
    known = is_nv_embed_v1(retriever)
    with new_directory(directory) as building:
        save_torch_state_dict(_released_weights(encoder), building)
        encoder.processor.prompts.tokenizer.save_pretrained(building)
        encoder.family.image_processor.save_pretrained(building)
        if not known:
            (building / RETRIEVER_FOLDER).mkdir()
            _write_json(building / RETRIEVER_FOLDER / "config.json", retriever)
        _write_json(building / "config.json", _config(config, mm_embed.TEXT_EMBEDDER if known else RETRIEVER_FOLDER))
    return Path(directory)


def check_make(encoder: MLLMEncoder) -> None:
    """Make sure that the layout of the release can hold an encoder.

    Raises:
        UserInputError: If it is of another make.
    """
    settings, config = encoder.settings, encoder.backbone.config
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    width = text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    found = {
        "family": (type(encoder.family).__name__, LlavaNext.__name__),
        "language model": (text.model_type, "mistral"),
        "vision tower": (getattr(vision, "model_type", None), "clip_vision_model"),
        # What its configurations have no field for.
        "width of a head": (getattr(text, "head_dim", None) or width, width),
        "rotary positions": (rope.get("rope_type", "default"), "default"),
        "bias of the projector": (getattr(config, "multimodal_projector_bias", True), True),
        "pooling": (settings["pooling"], "latent-attention"),
        "prompts": (settings["prompts"], mm_embed.MMEmbedPrompts.name),
        "bidirectional": (settings["bidirectional"], True),
        "quantised weights": (bool(getattr(encoder.backbone, "is_quantized", False)), False),
    }
    for what, (own, released) in found.items():
        if own != released:
            raise UserInputError(
                f"the encoder has {what}={own!r}, the released MM-Embed {released!r}: its layout cannot hold it; save "
                "it with save_pretrained"
            )


def _released_weights(encoder: MLLMEncoder) -> dict[str, Tensor]:
    backbone = {_released_name(key): value for key, value in plain_weights(encoder.backbone, merge=True).items()}
    latent = {
        mm_embed.LATENT_ATTENTION + mm_embed.rename(key, mm_embed.POOLING_NAMES): value
        for key, value in encoder.pooling.state_dict().items()
    }
    return backbone | latent


def _released_name(key: str) -> str:
    """Newer versions of transformers have left out one level of the tower."""
    tower, level = "vision_tower.", "vision_tower.vision_model."
    return level + key.removeprefix(tower) if key.startswith(tower) and not key.startswith(level) else key


def _config(config: Any, retriever: str) -> dict[str, Any]:
    """``config.json`` as the release has it; ``text_config``, which the release's code does not use, is true here."""
    vision, dtype = config.vision_config, str(config.dtype).removeprefix("torch.")
    text = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **_text_config(config.text_config)}
    return {
        "add_eos_token": True,
        "architectures": [mm_embed.ARCHITECTURE],
        # The release's own code stays where it is; who asks for it by trust_remote_code gets it from there.
        "auto_map": {"AutoModel": "nvidia/MM-Embed--modeling_nvmmembed.NVMMEmbedModel"},
        "global_image_patch_only": True,
        "ignore_index": -100,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "image_token_index": config.image_token_id,
        "model_type": "llava_next",
        "padding_side": "right",
        "projector_hidden_act": config.projector_hidden_act,
        "retriever": retriever,
        "text_config": {**text, "torch_dtype": dtype},
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.42.4",
        "use_image_newline_parameter": True,
        "vision_config": {name: getattr(vision, name) for name in _VISION_FIELDS} | {"vocab_size": 32000},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


def retriever_config(text: Any, pooling: dict[str, int]) -> dict[str, Any]:
    """The text embedder's configuration as NV-Embed-v1 has it.

    Args:
        text: The language model's configuration.
        pooling: Sizes of the latent attention.
    """
    width = text.hidden_size
    return {
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "auto_map": {
            "AutoConfig": f"{mm_embed.TEXT_EMBEDDER}--configuration_nvembed.NVEmbedConfig",
            "AutoModel": f"{mm_embed.TEXT_EMBEDDER}--modeling_nvembed.NVEmbedModel",
        },
        "hidden_size": width,
        "is_mask_instruction": True,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": pooling.get("num_latents", 512),
            "num_cross_heads": pooling.get("num_heads", 8),
            "output_normalize": True,
            "hidden_dim": width,
            "latent_dim": width,
            "cross_dim_head": pooling.get("head_dim", width),
        },
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": {"architectures": ["MistralModel"], "model_type": "bidir_mistral", **_text_config(text)},
        "transformers_version": "4.42.4",
    }


def _text_config(text: Any) -> dict[str, Any]:
    rope = {"rope_theta": text.rope_parameters["rope_theta"]}
    return {name: getattr(text, name) for name in _TEXT_FIELDS} | rope | {"sliding_window": None}


def is_nv_embed_v1(retriever: dict[str, Any]) -> bool:
    """Whether a text embedder's configuration is that of NV-Embed-v1, which a checkpoint names by its hub id alone."""
    return all(
        retriever[part][name] == value
        for part, fields in mm_embed.NV_EMBED_V1.items()
        for name, value in fields.items()
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
