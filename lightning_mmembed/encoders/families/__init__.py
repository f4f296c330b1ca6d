"""The families of multimodal LLMs, one adapter each."""

from collections.abc import Sequence

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig

from lightning_mmembed.encoders.families.base import Family as Family
from lightning_mmembed.encoders.families.base import Picture as Picture
from lightning_mmembed.encoders.families.base import SquareView as SquareView
from lightning_mmembed.encoders.families.gemma import Gemma3, PaliGemma
from lightning_mmembed.encoders.families.generic import Generic as Generic
from lightning_mmembed.encoders.families.idefics import Idefics3
from lightning_mmembed.encoders.families.internvl import InternVL
from lightning_mmembed.encoders.families.llava import LlavaNext as LlavaNext
from lightning_mmembed.encoders.families.llava import LlavaOnevision
from lightning_mmembed.encoders.families.qwen import QwenVL

FAMILIES: Sequence[type[Family]] = (LlavaNext, LlavaOnevision, QwenVL, Idefics3, PaliGemma, Gemma3, InternVL)


def family_of(config: PretrainedConfig) -> type[Family] | None:
    """The family that a configuration belongs to: ``Generic`` without an adapter, ``None`` for no multimodal LLM."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    return Generic if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None
