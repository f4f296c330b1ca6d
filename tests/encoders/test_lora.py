"""LoRA, freezing, gradient checkpointing, types of weights: what is trained, and that no vector changes unasked."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_worlds import WORLDS
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlavaNextModel

from lightning_mmembed import Item, MLLMEncoder, Query
from lightning_mmembed.encoders import loading
from lightning_mmembed.encoders.lora import LoRA, plain_weights
from lightning_mmembed.errors import UserInputError

ENTRIES: list[Query | Item] = [
    Item("a red ellipse"),
    Item(image=Image.new("RGB", (40, 24), "red")),
    Query(Item("green in place of red", Image.new("RGB", (40, 24), "blue")), "Change it"),
]


def loaded(checkpoint: Path, **arguments: Any) -> MLLMEncoder:
    torch.manual_seed(0)  # of LoRA's first matrices, and of a new pooling
    return MLLMEncoder.from_pretrained(checkpoint, **{"max_length": 48, "pooling": "latent-attention", **arguments})


def trained(encoder: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def disturb(encoder: MLLMEncoder, scale: float = 0.02) -> None:
    """Move everything that is trained away from where it starts, LoRA's zeros among it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(encoder).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(encoder: MLLMEncoder) -> dict[str, Tensor]:
    encoder.train()
    vectors = encoder(encoder.processor(ENTRIES))
    (vectors * torch.linspace(-1, 1, vectors.shape[1])).sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


# --- what is trained -------------------------------------------------------------------------------------------------


def test_lora_alone_changes_no_vector(tiny_checkpoint: Path) -> None:
    plain, adapted = loaded(tiny_checkpoint), loaded(tiny_checkpoint, lora=LoRA())
    adapted.pooling.load_state_dict(plain.pooling.state_dict())
    assert torch.equal(adapted.encode(ENTRIES), plain.encode(ENTRIES))


def test_lora_lies_on_every_linear_layer_of_the_language_model_with_the_rank_and_scale_of_the_paper(
    tiny_checkpoint: Path,
) -> None:
    plain, adapted = loaded(tiny_checkpoint), loaded(tiny_checkpoint, lora={})
    prefix = f"backbone.{adapted.family.language_model}."
    linear = {name: m for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name.startswith(prefix)}
    assert len(linear) == 2 * 7
    expected = {f"{name}.lora_A.default.weight": (8, m.in_features) for name, m in linear.items()}
    expected |= {f"{name}.lora_B.default.weight": (m.out_features, 8) for name, m in linear.items()}
    assert {name: tuple(p.shape) for name, p in trained(adapted).items() if ".lora_" in name} == expected
    assert {adapted.get_submodule(name).scaling["default"] for name in linear} == {64 / 8}


def test_the_gradient_reaches_what_is_trained_and_nothing_else(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={})
    disturb(encoder)
    found = gradients(encoder)
    assert found.keys() == trained(encoder).keys()
    assert [name for name, gradient in found.items() if not gradient.abs().sum()] == []
    family = encoder.family
    kinds = (".lora_", f"backbone.{family.projector}.", "backbone.image_newline", "pooling.")
    assert [name for name in found if not any(kind in name for kind in kinds)] == []
    assert all(any(kind in name for name in found) for kind in kinds)
    assert not any(name.startswith(f"backbone.{family.vision}.") for name in found)


def test_the_vision_tower_can_be_frozen_without_lora_and_trained_with_it(tiny_checkpoint: Path) -> None:
    every = loaded(tiny_checkpoint)
    assert trained(every).keys() == dict(every.named_parameters()).keys()
    tower = {name for name in trained(every) if name.startswith("backbone.vision_tower.")}
    frozen = loaded(tiny_checkpoint, freeze_vision=True)
    assert trained(frozen).keys() == trained(every).keys() - tower
    assert tower <= trained(loaded(tiny_checkpoint, lora={}, freeze_vision=False)).keys()


def test_lora_can_be_put_on_some_layers_only(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    found = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(encoder) if ".lora_" in name}
    assert found == {"q_proj", "v_proj"}


def test_a_single_name_is_one_layer_and_all_linear_is_the_default() -> None:
    assert LoRA(target_modules="q_proj") == LoRA(target_modules=["q_proj"])
    assert LoRA.of({"target_modules": "all-linear"}) == LoRA()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_the_vectors_are_those_of_peft_with_the_same_weights(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={"r": 4, "lora_alpha": 6}, pooling="mean")
    disturb(encoder)
    oracle = loaded(tiny_checkpoint, pooling="mean")
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    peft_model = get_peft_model(oracle.backbone.language_model, config)
    oracle.backbone.language_model = peft_model
    theirs = {name.replace("base_model.model.", ""): value for name, value in oracle.state_dict().items()}
    own = encoder.state_dict()
    assert theirs.keys() == own.keys()
    oracle.load_state_dict({name: own[name.replace("base_model.model.", "")] for name in oracle.state_dict()})
    oracle.eval()
    torch.testing.assert_close(encoder.encode(ENTRIES), oracle.encode(ENTRIES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*WORLDS, "aya_vision"])
def test_lora_is_trained_saved_and_merged_in_every_family(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    options: dict[str, Any] = {"pooling": "mean", "check_contracts": False}
    rounded = loaded(family_checkpoint(name), lora={}, dtype="bfloat16", gradient_checkpointing=True, **options)
    disturb(rounded)
    found = gradients(rounded)
    assert found.keys() == trained(rounded).keys()
    assert [part for part, gradient in found.items() if not gradient.abs().sum()] == []
    encoder = loaded(family_checkpoint(name), lora={}, **options)
    disturb(encoder)
    forms = encoder.save_adapter(tmp_path / "adapter"), encoder.save_pretrained(tmp_path / "merged", merge=True)
    for path in forms:
        again = MLLMEncoder.from_pretrained(path, check_contracts=False)
        torch.testing.assert_close(again.encode(ENTRIES), encoder.encode(ENTRIES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*WORLDS, "aya_vision"])
def test_a_vision_tower_is_trained_in_float32_beside_lora_and_bfloat16_in_every_family(
    family_checkpoint: Callable[[str], Path], name: str
) -> None:
    options: dict[str, Any] = {"pooling": "mean", "check_contracts": False, "lora": {}, "freeze_vision": False}
    exact, rounded = (loaded(family_checkpoint(name), dtype=dtype, **options) for dtype in ("float32", "bfloat16"))
    tower = f"backbone.{rounded.family.vision}."
    assert {p.dtype for part, p in trained(rounded).items() if part.startswith(tower)} == {torch.float32}
    expected, found = exact.encode(ENTRIES), rounded.encode(ENTRIES)
    assert float((expected * found).sum(-1).min()) > 0.995
    disturb(exact)
    disturb(rounded)
    assert {part for part, gradient in gradients(rounded).items() if gradient.abs().sum()} == {
        part for part, gradient in gradients(exact).items() if gradient.abs().sum()
    }
    assert any(part.startswith(tower) for part in gradients(rounded))


def test_merged_weights_are_the_base_and_the_scaled_product(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={"r": 4, "lora_alpha": 6})
    disturb(encoder)
    base = LlavaNextModel.from_pretrained(tiny_checkpoint).state_dict()
    own, merged = encoder.backbone.state_dict(), plain_weights(encoder.backbone, merge=True)
    assert merged.keys() == base.keys()
    assert plain_weights(encoder.backbone, merge=False).keys() == base.keys()
    name = "language_model.layers.1.mlp.up_proj"
    a, b = (own[f"{name}.lora_{matrix}.default.weight"] for matrix in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 6 / 4 * b @ a)
    assert not torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"])


# --- gradient checkpointing, attention, types of weights -------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {}, {"lora_dropout": 0.5}])
def test_gradient_checkpointing_changes_no_gradient_and_no_vector(tiny_checkpoint: Path, lora: Any) -> None:
    found = []
    for checkpointed in (False, True):
        encoder = loaded(tiny_checkpoint, lora=lora, gradient_checkpointing=checkpointed)
        disturb(encoder)
        torch.manual_seed(1)  # of the dropout
        found.append((gradients(encoder), encoder.encode(ENTRIES)))
    (expected, vectors), (checked, again) = found
    assert expected.keys() == checked.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(checked[name], gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(again, vectors)


def test_gradient_checkpointing_computes_every_layer_twice(tiny_checkpoint: Path) -> None:
    encoder, calls = loaded(tiny_checkpoint, lora={}, gradient_checkpointing=True), []
    encoder.processor.length_buckets = 1
    for layer in encoder.backbone.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    gradients(encoder)
    assert len(calls) == 2 * len(encoder.backbone.language_model.layers)


def test_eager_and_sdpa_attention_give_the_same_vectors(tiny_checkpoint: Path) -> None:
    eager, sdpa, chosen = (loaded(tiny_checkpoint, attn_implementation=name) for name in ("eager", "sdpa", None))
    assert eager.backbone.language_model.config._attn_implementation == "eager"
    assert chosen.backbone.language_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager.encode(ENTRIES), sdpa.encode(ENTRIES), rtol=0, atol=1e-6)
    assert torch.equal(chosen.encode(ENTRIES), sdpa.encode(ENTRIES))


@pytest.mark.parametrize("pooling", ["mean", "last", "latent-attention"])
@pytest.mark.parametrize("lora", [None, {}])
def test_weights_in_bfloat16_give_nearly_the_same_unit_vectors_in_float32(
    tiny_checkpoint: Path, pooling: str, lora: Any
) -> None:
    exact, rounded = (loaded(tiny_checkpoint, pooling=pooling, lora=lora, dtype=t) for t in ("float32", "bfloat16"))
    rounded.pooling.load_state_dict(exact.pooling.state_dict())
    expected, found = exact.encode(ENTRIES), rounded.encode(ENTRIES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(ENTRIES)), rtol=0, atol=1e-6)
    assert float((expected * found).sum(-1).min()) > 0.9995


def test_what_is_trained_beside_frozen_bfloat16_weights_is_kept_in_float32(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={}, dtype="bfloat16")
    assert {p.dtype for p in trained(encoder).values()} == {torch.float32}
    assert {p.dtype for p in encoder.parameters() if not p.requires_grad} == {torch.bfloat16}
    disturb(encoder)
    found = gradients(encoder)
    assert found.keys() == trained(encoder).keys()
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() for gradient in found.values())


def test_a_vision_tower_trained_in_float32_fits_a_bfloat16_model(tiny_checkpoint: Path) -> None:
    encoder = loaded(tiny_checkpoint, lora={}, dtype="bfloat16", freeze_vision=False)
    assert encoder.backbone.vision_tower.dtype == torch.float32
    assert any("vision_tower" in name for name in gradients(encoder))


# --- quantisation ----------------------------------------------------------------------------------------------------


def test_settings_of_quantisation_reach_transformers(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Reached(Exception):
        pass

    def from_pretrained(*_: Any, **options: Any) -> None:
        given.update(options)
        raise Reached

    monkeypatch.setattr(loading.AutoModel, "from_pretrained", from_pretrained)
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(Reached):
        loaded(tiny_checkpoint, quantization_config=config, lora={})
    assert given["quantization_config"].load_in_8bit is True
    assert given["quantization_config"].llm_int8_skip_modules == ["vision_tower", "multi_modal_projector"]
    assert config.llm_int8_skip_modules is None


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_quantisation_without_bitsandbytes_says_what_to_install(
    tiny_checkpoint: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

    version = metadata.version

    def without_bitsandbytes(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_bitsandbytes)
    for quantizer in (quantizer_bnb_4bit, quantizer_bnb_8bit):
        monkeypatch.setattr(quantizer, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserInputError, match=r"quantization_config.*bitsandbytes"):
        loaded(tiny_checkpoint, quantization_config=settings, lora={})


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_a_setting_that_lora_does_not_have_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserInputError, match=r"lora.rank is unknown; write some of \['r', 'lora_alpha'"):
        loaded(tiny_checkpoint, lora={"rank": 3})
    with pytest.raises(UserInputError, match=r"lora.r=0 is no rank; write 1 or more"):
        loaded(tiny_checkpoint, lora={"r": 0})
    with pytest.raises(UserInputError, match=r"lora=8 is no mapping; write settings such as \{r: 16\}, \{\} for"):
        loaded(tiny_checkpoint, lora=8)


@pytest.mark.parametrize("dropout", [1.5, 1.0, -0.1])
def test_a_dropout_that_is_no_share_is_named(dropout: float) -> None:
    with pytest.raises(UserInputError, match=rf"lora.lora_dropout={dropout} is no share; write 0 or more, and less"):
        LoRA(lora_dropout=dropout)


def test_layers_that_are_not_there_are_named_with_those_that_are(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserInputError, match=r"lora.target_modules=\['query'\] cannot be used: .*'q_proj'"):
        loaded(tiny_checkpoint, lora={"target_modules": ["query"]})


def test_lora_without_peft_says_what_to_install(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_peft(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(UserInputError, match=r"needs peft.*pip install 'lightning-mmembed\[peft\]'"):
        loaded(tiny_checkpoint, lora={})


def test_attention_that_is_not_installed_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(UserInputError, match=r"with attn_implementation: FlashAttention2 .* leave"):
        loaded(tiny_checkpoint, attn_implementation="flash_attention_2")


@pytest.mark.slow
def test_peft_is_not_imported_without_lora(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from lightning_mmembed import MLLMEncoder\n"
        f"MLLMEncoder.from_pretrained({str(tiny_checkpoint)!r}); print('peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
