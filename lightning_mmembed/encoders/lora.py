"""LoRA on the language model through peft, and the choice of the weights that are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmembed.encoders.families import Family
from lightning_mmembed.encoders.families.idefics import Idefics3
from lightning_mmembed.errors import UserInputError

_ADAPTER = "default"
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True)
class LoRA:
    """Low-rank matrices that are trained beside frozen linear layers of the language model.

    Rank and alpha are those of MM-Embed (Lin et al., ICLR 2025), which puts them on the language model, trains the
    projector whole and freezes the vision tower. Which layers they were put on, their dropout, and whether the latent
    attention was trained is not known: here they are on every linear layer, and the pooling is trained whole.

    Args:
        r: Rank.
        lora_alpha: The product of the two matrices is scaled by ``lora_alpha / r``.
        lora_dropout: Share of a layer's inputs that the matrices do not see in a training step.
        target_modules: Ends of the names of the layers, such as ``["q_proj", "v_proj"]``; by default all linear ones,
            which ``"all-linear"`` means too. A single name need not be in a list.

    Raises:
        UserInputError: If the rank is not positive, or the dropout is no share.

    Example:
        >>> LoRA(r=16)
        LoRA(r=16, lora_alpha=64, lora_dropout=0.0, target_modules=None)
    """

    r: int = 8
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserInputError(f"lora.r={self.r} is no rank; write 1 or more, or lora=null to train every weight")
        if not 0 <= self.lora_dropout < 1:
            raise UserInputError(f"lora.lora_dropout={self.lora_dropout} is no share; write 0 or more, and less than 1")
        if isinstance(self.target_modules, str):
            names = None if self.target_modules == "all-linear" else [self.target_modules]
            object.__setattr__(self, "target_modules", names)

    @classmethod
    def of(cls, value: LoRA | Mapping[str, Any] | None) -> LoRA | None:
        """Settings from a mapping, such as a node of a configuration or of a saved encoder.

        Raises:
            UserInputError: If it is no mapping, or has a key that is no setting.
        """
        if value is None or isinstance(value, LoRA):
            return value
        if not isinstance(value, Mapping):
            raise UserInputError(
                f"lora={value!r} is no mapping; write settings such as {{r: 16}}, {{}} for the paper's, or null"
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(value.keys() - set(known))
        if unknown:
            raise UserInputError(f"lora.{unknown[0]} is unknown; write some of {known}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        target_modules = None if self.target_modules is None else list(self.target_modules)
        return {**asdict(self), "target_modules": target_modules}


def choose_trained(backbone: Any, family: Family, lora: LoRA | None, freeze_vision: bool) -> None:
    """Freeze the vision tower, the language model or both, and put LoRA on the language model.

    What is neither (the projector, ``image_newline``) is trained whole, even where it lies within the tower. With LoRA
    all that is trained is kept in float32: in bfloat16 most of a step is lost in rounding.

    Args:
        backbone: The model without its language-model head.
        family: Says where its parts are.
        lora: Settings of LoRA; without them the language model is trained whole.
        freeze_vision: Freeze the vision tower.

    Raises:
        UserInputError: If peft is not installed, or the model has no layer of the names that are given.
    """
    if freeze_vision:
        backbone.get_submodule(family.vision).requires_grad_(False)
        if family.projector:  # it may lie within the tower
            backbone.get_submodule(family.projector).requires_grad_(True)
    if lora is None:
        return
    language_model = backbone.get_submodule(family.language_model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft looks for them in the model that it is given
        setattr(language_model, flag, getattr(backbone, flag, False))
    _inject(language_model, lora)  # freezes the rest of it
    _keep_in_float32(backbone, family)


def _keep_in_float32(backbone: Any, family: Family) -> None:
    embeddings = backbone.get_input_embeddings()
    if embeddings.weight.dtype == torch.float32:
        return
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # The matrices of LoRA do so themselves.
    for name in filter(None, (family.vision, family.projector)):
        backbone.get_submodule(name).register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    if family.projector:
        backbone.get_submodule(family.projector).register_forward_hook(partial(_cast_output, embeddings))
    if isinstance(family, Idefics3):
        # SmolVLM puts pictures into the embeddings in the type of the model's first weight, which is the tower's.
        embeddings.register_forward_hook(partial(_cast_output, backbone.get_submodule(family.vision)))
        backbone.get_submodule(family.language_model).register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _inject(language_model: nn.Module, lora: LoRA) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserInputError(
            f"lora={lora} needs peft, which is not installed; pip install 'lightning-mmembed[peft]', or set lora=null"
        ) from error
    targets = "all-linear" if lora.target_modules is None else list(lora.target_modules)
    config = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules=targets)
    try:
        inject_adapter_in_model(config, language_model, _ADAPTER)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in language_model.named_modules() if isinstance(m, nn.Linear)})
        raise UserInputError(f"lora.target_modules={targets} cannot be used: {error}; there are {names}") from error


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    own = next(parameter.dtype for parameter in module.parameters())
    return tuple(_cast(value, own) for value in args), {name: _cast(value, own) for name, value in kwargs.items()}


def _cast_output(other: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(next(parameter.dtype for parameter in other.parameters()))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def checkpoint_gradients(backbone: Any) -> None:
    """Keep no activations within a layer: they are computed again in the backward pass."""
    # transformers has renamed it; the old name warns in the versions that have the new one.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    # The other kind does not go with DDP's search for unused parameters, which batches without pictures need.
    enable({"use_reentrant": False})


def plain_name(name: str) -> str:
    """The name that a weight has without LoRA beside it."""
    return name.replace(_BASE_LAYER, ".")


def plain_weights(backbone: nn.Module, merge: bool) -> dict[str, Tensor]:
    """The weights of a model by the names that they have without LoRA.

    Args:
        backbone: The model, with LoRA or without.
        merge: Add the product of LoRA's matrices to the weights that they lie beside; the model is left as it is.
    """
    weights = {plain_name(name): value for name, value in backbone.state_dict().items() if not _is_lora(name)}
    if merge:
        for name, module in backbone.named_modules():
            if hasattr(module, "get_delta_weight"):
                base = weights[f"{name}.weight"]
                weights[f"{name}.weight"] = (base.float() + module.get_delta_weight(_ADAPTER).float()).to(base.dtype)
    return weights


def _is_lora(name: str) -> bool:
    return ".lora_" in name
