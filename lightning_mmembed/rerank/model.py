"""The model of the reranker: loaded with its language-model head, run without it, with keys and values used again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache, PretrainedConfig

from lightning_mmembed.encoders.families import FAMILIES, Family, Generic, LlavaNext, family_of
from lightning_mmembed.encoders.families.idefics import Idefics3
from lightning_mmembed.encoders.families.internvl import InternVL
from lightning_mmembed.encoders.families.qwen import QwenVL
from lightning_mmembed.encoders.loading import load_model
from lightning_mmembed.errors import UserInputError

#: Families whose attention is causal throughout, so that what comes first does not depend on what follows.
CAUSAL: tuple[type[Family], ...] = (LlavaNext, QwenVL, Idefics3, InternVL)


def read_family(path: str, config: PretrainedConfig, tokenizer: Any) -> Family:
    """What is particular to a checkpoint's family.

    Raises:
        UserInputError: If the checkpoint is no multimodal LLM, or one that cannot read two pictures.
    """
    family = family_of(config)
    # PaliGemma takes its pictures before the text only, and has learned to answer no question of this kind.
    if family is None or config.model_type == "paligemma":
        known = sorted({name for each in FAMILIES for name in each.model_types} - {"paligemma"})
        raise UserInputError(
            f"checkpoint {path!r} has model_type={config.model_type!r}, which cannot rerank; supported are {known}, "
            "and other models of transformers that read pictures and texts in any order"
        )
    return family(path, config, tokenizer)


def context(config: PretrainedConfig, max_length: int | None) -> int:
    """The most positions of a prompt: those that the model can read, or fewer.

    Raises:
        UserInputError: If ``max_length`` is more than that, or below 1.
    """
    text: Any = config.get_text_config()
    readable = int(text.max_position_embeddings)
    if max_length is not None and not 1 <= max_length <= readable:
        raise UserInputError(f"max_length={max_length} is out of range; the model reads 1 to {readable} positions")
    return readable if max_length is None else max_length


def load_generator(path: str, config: PretrainedConfig, family: Family, **options: Any) -> Any:
    """Load a model with its language-model head.

    Args:
        path: A directory or a hub id.
        config: The configuration.
        family: Told where the model's parts are, where it has no adapter.
        **options: Further arguments of ``from_pretrained``.

    Raises:
        UserInputError: If the checkpoint lacks weights, or holds some that the model has no use for, or an option
            needs a package that is not installed, or ``dtype`` is no type of weights.
    """
    model = load_model(path, config, auto=AutoModelForImageTextToText, **options)
    if isinstance(family, Generic):
        family.find_parts(model.model)
    return model


def shares_prefix(model: Any, family: Family, length: int) -> bool:
    """Whether keys and values of what prompts of so many positions share can be used again.

    They cannot where a picture attends to itself in both directions in a way that a cache does not know (Gemma 3), nor
    in a family that nobody has looked at; nor beyond the window of an attention that slides, whose place would shift
    with the padding between what is shared and what is not.
    """
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ("full_attention",))
    if not isinstance(family, CAUSAL) or not layers <= {"full_attention", "sliding_attention"}:
        return False
    slides = getattr(text, "use_sliding_window", True) or "sliding_attention" in layers
    window = getattr(text, "sliding_window", None) if slides else None
    return window is None or length <= int(window)


def copies(cache: DynamicCache, count: int) -> DynamicCache:
    """The cache of one prompt for several rows: views, which the first update of each layer copies."""
    several = DynamicCache()
    for layer in cache.layers:
        row: Any = copy.copy(layer)
        row.keys, row.values = (part.expand(count, -1, -1, -1) for part in (row.keys, row.values))
        several.layers.append(row)
    return several


def states_of(
    model: Any,
    family: Family,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    pictures: Mapping[str, Tensor],
    cache: DynamicCache | None,
) -> Tensor:
    """Run a model without its head.

    Args:
        model: The model.
        family: Knows what it is given for pictures.
        ids: ``(B, L)`` token ids.
        mask: ``(B, P + L)`` 1 on tokens, 0 on padding, those in the cache counted.
        positions: ``(R, B, L)`` positions; ``R`` is 1, or 3 in a Qwen-VL.
        pictures: Inputs of the pictures, in the order of their rows; empty without any.
        cache: Keys and values of ``P`` positions, to which those of the ``L`` are added.

    Returns:
        ``(B, L, D)`` states after the final norm.
    """
    given: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": positions if len(positions) > 1 else positions[0],
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    backbone = model.model
    if not isinstance(family, LlavaNext):
        found: Tensor = backbone(input_ids=ids, **family.arguments(ids, pictures), **given).last_hidden_state
        return found
    # The model's own forward expects the tiles that are left out.
    is_image = ids == family.image_token_id
    embeddings = backbone.get_input_embeddings()(ids.masked_fill(is_image, 0))
    if pictures:
        pixels = family.normalised(pictures["pixel_values"]).to(embeddings.dtype)
        features = family.image_features(backbone, pixels).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), features)
    states: Tensor = backbone.language_model(inputs_embeds=embeddings, **given).last_hidden_state
    return states
