"""The contracts notice what they are there for: each defect breaks the promise it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from family_worlds import WORLDS
from torch import Tensor, nn

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.encoders.contracts import Contract, check_contracts, gradient_reach
from lightning_mmembed.encoders.families import LlavaNext

Checkpoint = Callable[[str], Path]
UNREAD = WORLDS["llava_next"].unread


def broken(contracts: list[Contract]) -> set[str]:
    return {contract.name for contract in contracts if not contract.passed}


class MixesRows(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        states = super().states(backbone, ids, mask, pictures)
        return states + 0.01 * states.mean((0, 1))


class CountsColumns(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        states = super().states(backbone, ids, mask, pictures)
        columns = torch.arange(states.shape[1], dtype=states.dtype)[:, None] * torch.arange(states.shape[2])
        return states + 0.1 * columns.sin()


class RemembersPictures(LlavaNext):
    seen = 0.0

    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        states = super().states(backbone, ids, mask, pictures)
        if pictures:
            self.seen = float(pictures["pixel_values"].float().mean())
        return states + self.seen * torch.arange(states.shape[2]) / 1000


class BlindToPictures(LlavaNext):
    def image_features(self, model: Any, pixels: Tensor) -> Tensor:
        return torch.zeros_like(super().image_features(model, pixels))


class BeforeTheNorm(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []
        norm: nn.Module = backbone.get_submodule("language_model.norm")
        hook = norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        super().states(backbone, ids, mask, pictures)
        hook.remove()
        return seen[0]


class OtherAttention(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        text: Any = backbone.get_submodule("language_model").config
        text.is_causal = not text.is_causal
        try:
            return super().states(backbone, ids, mask, pictures)
        finally:
            text.is_causal = not text.is_causal


class Breaks(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        raise IndexError("no such position")


class NotANumber(LlavaNext):
    def states(self, backbone: nn.Module, ids: Tensor, mask: Tensor, pictures: Mapping[str, Tensor]) -> Tensor:
        return super().states(backbone, ids, mask, pictures) * torch.nan


def with_defect(encoder: MLLMEncoder, defect: type[LlavaNext]) -> MLLMEncoder:
    encoder.family.__class__ = defect
    return encoder


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(
    ("defect", "contracts"),
    [
        (MixesRows, {"batch invariance", "text-only rows", "state after the final norm"}),
        (CountsColumns, {"padding-side invariance", "state after the final norm"}),
        (RemembersPictures, {"batch invariance", "text-only rows", "state after the final norm"}),
        (BlindToPictures, {"pictures count"}),
        (BeforeTheNorm, {"state after the final norm"}),
        (OtherAttention, {"attention"}),
    ],
)
def test_a_defect_breaks_the_contracts_it_is_about_and_no_other(
    family_checkpoint: Checkpoint, defect: type[LlavaNext], contracts: set[str], bidirectional: bool
) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("llava_next"), bidirectional=bidirectional)
    assert broken(check_contracts(encoder)) == set()
    kind = "bidirectional attention" if bidirectional else "causal attention"
    expected = {kind if name == "attention" else name for name in contracts}
    found = broken(check_contracts(with_defect(encoder, defect)))
    # A row that is mixed with others has a part in padding and in later tokens too.
    assert found - {kind, "padding-side invariance"} == expected if defect is MixesRows else found == expected


@pytest.mark.parametrize("defect", [Breaks, NotANumber])
def test_an_error_or_a_nan_breaks_every_contract(family_checkpoint: Checkpoint, defect: type[LlavaNext]) -> None:
    encoder = with_defect(MLLMEncoder.from_pretrained(family_checkpoint("llava_next")), defect)
    contracts = check_contracts(encoder)
    assert len(broken(contracts)) == len(contracts) == 6
    if defect is Breaks:
        assert {contract.detail for contract in contracts} == {"IndexError: no such position"}


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_encoder_as_it_was(family_checkpoint: Checkpoint, training: bool) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("qwen2_vl")).train(training)
    before = encoder.encode_document(["a red pet"])
    buckets, padding_side = encoder.processor.length_buckets, encoder.processor.padding_side
    encoder.backbone.visual.train(not training)  # a part in another mode than the whole
    modes = {name: module.training for name, module in encoder.named_modules()}
    check_contracts(encoder)
    assert {name: module.training for name, module in encoder.named_modules()} == modes
    assert (encoder.processor.length_buckets, encoder.processor.padding_side) == (buckets, padding_side)
    assert not any(module._forward_hooks for module in encoder.backbone.language_model.modules())
    assert torch.equal(encoder.encode_document(["a red pet"]), before)


@pytest.mark.parametrize("defect", [None, Breaks])
def test_encoding_leaves_each_part_in_its_mode_also_after_an_error(
    family_checkpoint: Checkpoint, defect: type[LlavaNext] | None
) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("llava_next")).train()
    encoder.backbone.vision_tower.eval()
    modes = {name: module.training for name, module in encoder.named_modules()}
    assert set(modes.values()) == {True, False}
    if defect is None:
        encoder.encode_document(["a red pet"])
    else:
        with pytest.raises(IndexError, match="no such position"):
            with_defect(encoder, defect).encode_document(["a red pet"])
    assert {name: module.training for name, module in encoder.named_modules()} == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_half_types_are_given_their_own_tolerance(family_checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name), dtype=dtype)
    assert broken(check_contracts(encoder)) == set()


def test_float32_weights_beside_bfloat16_ones_are_given_the_tolerance_of_those(family_checkpoint: Checkpoint) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("llava_next"), dtype="bfloat16", lora={})
    assert next(encoder.backbone.parameters()).dtype == torch.float32
    assert broken(check_contracts(encoder)) == set()


def test_quantised_weights_count_for_no_tolerance(family_checkpoint: Checkpoint) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("qwen2_vl"))
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    encoder.backbone.register_parameter("packed", packed)
    assert next(encoder.backbone.parameters()) is packed
    assert broken(check_contracts(encoder)) == set()
    assert broken(check_contracts(with_noise(encoder, 1e-3))) != set()  # float32 is still held to its own


def with_noise(encoder: MLLMEncoder, scale: float) -> MLLMEncoder:
    """Another difference in each pass."""
    encoder.backbone.language_model.norm.register_forward_hook(
        lambda module, given, output: output + scale * torch.randn(output.shape)
    )
    return encoder


# --- gradient -------------------------------------------------------------------------------------------------------


def test_the_gradient_reaches_what_is_trainable_and_nothing_else(family_checkpoint: Checkpoint) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("llava_next"))
    assert gradient_reach(encoder, UNREAD).passed
    encoder.backbone.vision_tower.requires_grad_(False)
    assert gradient_reach(encoder).passed
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_weight_that_no_gradient_reaches_is_named(family_checkpoint: Checkpoint) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint("llava_next"))
    without = gradient_reach(encoder)
    assert not without.passed
    assert without.detail.startswith("18 weights, such as backbone.vision_tower.")
    too_much = gradient_reach(encoder, [*UNREAD, "image_newline"])
    assert too_much == Contract("gradient reach", False, "1 weights, such as backbone.image_newline")
