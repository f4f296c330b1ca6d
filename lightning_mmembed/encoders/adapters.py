"""What of an encoder is trained and what is frozen: the first is saved, the second only known by fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils.hub import extract_commit_hash

from lightning_mmembed.encoders.loading import find_file
from lightning_mmembed.encoders.lora import plain_name
from lightning_mmembed.errors import UserInputError

ADAPTER_FILE = "adapter.safetensors"

#: A fingerprint is made of at least so many values of a weight, or of all, evenly spread.
_SAMPLED = 4096
_FROZEN = "frozen"


def frozen_names(encoder: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}


def without_frozen(weights: Mapping[str, Tensor], frozen: set[str]) -> dict[str, Tensor]:
    """Leave out frozen parameters, and what quantisation keeps beside each of them below its name."""
    return {name: value for name, value in weights.items() if not _with_parents(name) & frozen}


def _with_parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


def shapes(encoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights by name, without what quantisation keeps beside them."""
    weights = {*(name for name, _ in encoder.named_parameters()), *(name for name, _ in encoder.named_buffers())}
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items() if name in weights}


def fingerprints(encoder: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Fingerprints of some parameters: of shape and of a few thousand values each, rounded to bfloat16.

    They are the same for weights loaded in float32 and in bfloat16. A quantised weight has an empty one, which
    fits any: an adapter that was trained on a quantised base may be used on the base itself.
    """
    parameters = dict(encoder.named_parameters())
    return {name: _fingerprint(parameters[name].detach()) for name in sorted(names)}


def _fingerprint(weight: Tensor) -> str:
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()  # with all processes that hold a shard
    if not weight.is_floating_point():
        return ""
    values = weight.flatten()[:: max(1, weight.numel() // _SAMPLED)]
    content = values.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + content).hexdigest()[:16]


def check_base(encoder: nn.Module, frozen: Mapping[str, str], source: str) -> None:
    """Refuse weights that were trained on another base than the encoder's.

    Args:
        encoder: The encoder.
        frozen: The :func:`fingerprints` of the parameters that were frozen in training.
        source: Where the trained weights are from, for the message.

    Raises:
        UserInputError: If a frozen parameter is another one here.
    """
    own = fingerprints(encoder, frozen)
    differ = [name for name, theirs in frozen.items() if theirs and own[name] and theirs != own[name]]
    if differ:
        raise UserInputError(
            f"{source} was trained on another base: {len(differ)} of {len(frozen)} weights that were frozen then are "
            f"others here, such as {plain_name(sorted(differ)[0])}; load the checkpoint that training started from"
        )


def write_adapter(encoder: nn.Module, path: Path) -> None:
    """Write all weights but the frozen ones, and the fingerprints of those, as one safetensors file."""
    frozen = frozen_names(encoder)
    weights = {name: value.contiguous() for name, value in without_frozen(encoder.state_dict(), frozen).items()}
    save_file(weights, path, {"format": "pt", _FROZEN: json.dumps(fingerprints(encoder, frozen))})


def load_adapter(encoder: nn.Module, path: Path, ignored: tuple[str, ...] = ()) -> None:
    """Read what :func:`write_adapter` wrote into an encoder with the same LoRA.

    Args:
        encoder: The encoder.
        path: The file.
        ignored: Beginnings of the names of weights that are left as they are.

    Raises:
        UserInputError: If the file does not fit the encoder, or was trained on another base.
    """
    try:
        with safe_open(path, framework="pt") as file:
            frozen = json.loads(file.metadata()[_FROZEN])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserInputError(f"adapter {str(path)!r} cannot be read: {error}; save it again") from error
    own, theirs = shapes(encoder), {name: tuple(value.shape) for name, value in weights.items()}
    differ = [n for n in own.keys() | theirs.keys() | frozen.keys() if n not in frozen and own.get(n) != theirs.get(n)]
    wrong = sorted(name for name in differ if not name.startswith(ignored))
    if wrong:
        raise UserInputError(
            f"adapter {str(path)!r} does not fit its base: {len(wrong)} weights differ, such as {wrong[0]}; "
            "its mmembed.json names the base and the settings of LoRA that it was trained with"
        )
    check_base(encoder, frozen, f"adapter {str(path)!r}")
    kept = {name: value for name, value in weights.items() if not name.startswith(ignored)}
    encoder.load_state_dict(kept, strict=False)  # the frozen ones are not there


def identity(path: str) -> dict[str, str | None]:
    """What a saved adapter calls its base: an absolute directory, or a hub id and its revision."""
    if Path(path).is_dir():
        return {"path": str(Path(path).resolve()), "revision": None}
    return {"path": path, "revision": extract_commit_hash(str(find_file(path, "config.json")), None)}


def find_base(path: str, settings: Mapping[str, Any]) -> str:
    """Where the base of a checkpoint lies: itself, unless its settings name another.

    Args:
        path: The checkpoint.
        settings: What it was saved with.

    Raises:
        UserInputError: If the base is not there.
    """
    base = settings.get("base")
    if base is None:
        return path
    if base["revision"] is not None:
        files = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return snapshot_download(base["path"], revision=base["revision"], allow_patterns=files)
    place = Path(path) / base["path"]  # an absolute one stays as it is
    if place.is_dir():
        return str(place)
    # Anything else would be a hub id, which transformers seeks in the working directory first.
    if Path(base["path"]).is_absolute() or base["path"].startswith(".") or Path(base["path"]).is_dir():
        raise UserInputError(
            f"adapter {path!r} was trained on {str(place)!r}, which is not there; put that checkpoint there, or "
            f"write where it is, as seen from the adapter, as base.path in {path}/mmembed.json"
        )
    return str(base["path"])
