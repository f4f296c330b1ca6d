"""Models without an adapter: run as transformers runs them, and refused where they break a contract."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_worlds import ENTRIES, SIZE, World, build, drawn, siglip, square, text_config

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.encoders.contracts import check_contracts
from lightning_mmembed.encoders.families import Generic
from lightning_mmembed.errors import UserInputError

Checkpoint = Callable[[str], Path]


def llava_with(text: dict[str, Any]) -> World:
    """LLaVA-1.5, which has no adapter, over a language model."""
    return World(
        lambda ids: {
            "model_type": "llava",
            "image_token_index": ids["image_token"],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": text,
            "vision_config": siglip(),
        },
        {"image_token": "<image>"},
        square("SiglipImageProcessor"),
        {"processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "full"},
    )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_family_without_an_adapter_is_run_through_transformers_own_processor(
    family_checkpoint: Checkpoint, bidirectional: bool
) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("aya_vision"), bidirectional=bidirectional)
    family = encoder.family
    assert (family.vision, family.projector, family.language_model) == (
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    )
    assert [contract for contract in check_contracts(encoder) if not contract.passed] == []
    wide, square_one = (family.picture(drawn(size)) for size in ((96, 32), (32, 32)))
    assert (len(wide.inputs["pixel_values"]), len(square_one.inputs["pixel_values"])) == (4, 1), "AnyRes tiles"
    assert wide.token_ids.count(family.image_token_id) == 4 * square_one.token_ids.count(family.image_token_id)


def test_a_family_that_breaks_a_contract_is_refused_with_the_reason(tmp_path: Path) -> None:
    """GPT-2 learns its positions, and is given none that leave the padding out."""
    text = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}
    path = build(tmp_path, llava_with(text))
    with pytest.raises(
        UserInputError, match=r"model_type='llava'.*promises: padding-side invariance \(difference"
    ) as e:
        MLLMEncoder.from_pretrained(path)
    assert "batch invariance" not in str(e.value)
    assert MLLMEncoder.from_pretrained(path, check_contracts=False).encode(ENTRIES).shape == (5, 32)


def test_a_model_that_cannot_be_run_is_refused_with_its_error(tmp_path: Path) -> None:
    path = build(tmp_path, llava_with(text_config("mamba", state_size=4)))
    with pytest.raises(UserInputError, match=r"batch invariance.* attention \(AttributeError: .*past_key_values"):
        MLLMEncoder.from_pretrained(path)


def test_a_picture_without_a_placeholder_is_named(tmp_path: Path) -> None:
    world = llava_with(text_config("llama"))
    path = build(tmp_path, replace(world, processor={**(world.processor or {}), "patch_size": 2 * SIZE}))
    with pytest.raises(UserInputError, match=r"LlavaProcessor writes no image token \(id \d+\) for a picture"):
        MLLMEncoder.from_pretrained(path)


def test_a_model_without_a_vision_tower_is_named(family_checkpoint: Checkpoint) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("aya_vision"))
    assert isinstance(encoder.family, Generic)
    with pytest.raises(UserInputError, match="Cohere2Model has no adapter, and no part of its own for"):
        encoder.family.find_parts(encoder.backbone.language_model)


def test_a_family_whose_processor_cannot_be_made_is_named(family_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = shutil.copytree(family_checkpoint("aya_vision"), tmp_path / "bare")
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").unlink()
    with pytest.raises(UserInputError, match=r"model_type='aya_vision', a family without an adapter, and its pictures"):
        MLLMEncoder.from_pretrained(path)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "gemma3"])
def test_contracts_of_a_known_family_are_checked_when_asked_for(family_checkpoint: Checkpoint, name: str) -> None:
    assert MLLMEncoder.from_pretrained(family_checkpoint(name), check_contracts=True).embedding_dim == 32
