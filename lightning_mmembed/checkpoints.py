"""The encoder in a Lightning checkpoint: frozen weights are known by their fingerprints; how it was built is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mmembed.encoders.adapters import check_base, fingerprints, frozen_names, shapes, without_frozen
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.sharded_checkpoints import load_whole_weights, local

PREFIX = "encoder."
#: Key of the fingerprints of the frozen weights in a checkpoint.
FROZEN = "frozen_weights"
#: Key of the settings that the encoder was built with.
SETTINGS = "encoder_settings"
#: Those of them without which the weights mean something else; the others may change from run to run.
BUILT_WITH = ("lora", "pooling", "pooling_options", "bidirectional", "prompts")
#: Fingerprints of frozen weights, which never change; of sharded ones each has to be put together.
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def write_settings(encoder: Encoder, checkpoint: dict[str, Any]) -> None:
    """Put down in a checkpoint how its encoder was built, in plain types that ``weights_only=True`` reads."""
    checkpoint[SETTINGS] = json.loads(json.dumps(encoder.settings))


def check_settings(encoder: Encoder, checkpoint: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Refuse weights whose encoder was built in another way, be they of the same names and shapes.

    Args:
        encoder: The encoder.
        checkpoint: As it was saved after :func:`write_settings`; one without settings is taken as it is.
        source: Where it is from, for the message.

    Raises:
        UserInputError: If a setting of :data:`BUILT_WITH` is another one here.
    """
    theirs, own = checkpoint.get(SETTINGS, {}), json.loads(json.dumps(encoder.settings))
    differ = [name for name in BUILT_WITH if name in theirs and theirs[name] != own.get(name)]
    if differ:
        then, now = (", ".join(f"{name}={of.get(name)!r}" for name in differ) for of in (theirs, own))
        raise UserInputError(f"{source} was trained with {then}, and the model has {now}; build it as it was trained")


def drop_frozen(encoder: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Replace the frozen weights of the encoder in a checkpoint by their fingerprints; all processes must call this.

    Where each process adds its shard of all weights to a folder, all of them stay: what reads it back misses none.
    """
    state = checkpoint["state_dict"]
    if any(isinstance(value, DTensor) for value in state.values()):
        return
    frozen = frozen_names(encoder)
    if frozen:
        checkpoint["state_dict"] = without_frozen(state, {PREFIX + name for name in frozen})
        checkpoint[FROZEN] = _fingerprints_of_frozen(encoder, frozen)


def _fingerprints_of_frozen(encoder: nn.Module, frozen: set[str]) -> dict[str, str]:
    if _KNOWN.get(encoder, {}).keys() != frozen:
        _KNOWN[encoder] = fingerprints(encoder, frozen)
    return _KNOWN[encoder]


def restore_frozen(encoder: nn.Module, checkpoint: dict[str, Any], source: str = "the checkpoint") -> None:
    """Put the encoder's own weights in the place of those that a checkpoint has left out.

    Args:
        encoder: The encoder.
        checkpoint: As it was saved after :func:`drop_frozen`, or with every weight.
        source: Where it is from, for the message.

    Raises:
        UserInputError: If it was trained with another architecture, or left out the weights of another base.
    """
    state, frozen = checkpoint["state_dict"], checkpoint.get(FROZEN, {})
    check_architecture(encoder, state, frozen, source)
    check_base(encoder, frozen, source)
    parameters = dict(encoder.named_parameters())
    checkpoint["state_dict"] = state | {PREFIX + name: parameters[name].data for name in frozen}


def load_encoder_weights(encoder: Encoder, ckpt_path: str | Path | Sequence[str | Path]) -> None:
    """Load the weights that a :class:`RetrievalModule` was saved with, or the mean of several runs' from one start.

    Such a mean is a uniform soup of Wortsman et al. (ICML 2022), here also of the two factors of LoRA.

    Args:
        encoder: The encoder that they must fit.
        ckpt_path: A checkpoint or several; see :func:`read_encoder_weights`.

    Raises:
        UserInputError: If there is none, or one cannot be used.
    """
    paths = [ckpt_path] if isinstance(ckpt_path, str | Path) else list(ckpt_path)
    if not paths:
        raise UserInputError("ckpt_path=[] names no checkpoint; give at least one, or null")
    weights, frozen = read_encoder_weights(encoder, paths[0]), frozen_names(encoder)
    for number, path in enumerate(paths[1:], 2):
        for name, value in read_encoder_weights(encoder, path).items():
            if name not in frozen and value.is_floating_point():
                weights[name] = weights[name] + (value - weights[name]) / number
    load_whole_weights(encoder, weights)
    _KNOWN.pop(encoder, None)


@contextlib.contextmanager
def borrowed_weights(encoder: Encoder, ckpt_path: str | Path) -> Iterator[None]:
    """Put the weights of a checkpoint into an encoder for a while, and its own ones back.

    Args:
        encoder: The encoder, whole or sharded; it must not be trained meanwhile.
        ckpt_path: See :func:`read_encoder_weights`.
    """
    borrowed, frozen = read_encoder_weights(encoder, ckpt_path), frozen_names(encoder)
    # Each process keeps its part, on the CPU: beside a large model there is no room for a second one. Frozen weights
    # are the same in both.
    shards = {name: local(value.detach()) for name, value in encoder.state_dict().items() if name not in frozen}
    own = {name: value.cpu().clone() for name, value in shards.items()}
    try:
        load_whole_weights(encoder, borrowed)
        yield
    finally:
        for name, value in own.items():
            shards[name].copy_(value)


def read_encoder_weights(encoder: Encoder, ckpt_path: str | Path) -> dict[str, Tensor]:
    """Read the weights that a :class:`RetrievalModule` was saved with; nothing in the file is executed.

    Args:
        encoder: The encoder that they must fit.
        ckpt_path: A ``.ckpt`` file of the Trainer.

    Returns:
        The weights by their names in the encoder; those that were frozen in training are the encoder's own.

    Raises:
        UserInputError: If there is no such file, or it was trained with another architecture, on another base or with
            other settings.
    """
    path = Path(ckpt_path)
    if path.is_dir():
        raise UserInputError(
            f"ckpt_path={str(ckpt_path)!r} is a folder of shards, from which only a fit can be resumed; train with "
            "trainer.strategy.save_distributed_checkpoint=false to have one file"
        )
    if not path.is_file():
        raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is no file; give a .ckpt that training wrote")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state: dict[str, Tensor] = checkpoint["state_dict"]
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... on foreign files
        raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is no checkpoint of this package: {error}") from error
    source = f"ckpt_path={str(path)!r}"
    restore_frozen(encoder, checkpoint, source)
    check_settings(encoder, checkpoint, source)
    state = checkpoint["state_dict"]
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def check_architecture(encoder: nn.Module, state: dict[str, Tensor], frozen: dict[str, str], source: str) -> None:
    """Compare names and shapes of the weights with those of the encoder.

    Args:
        encoder: The encoder.
        state: Weights by name, with the prefix of the encoder.
        frozen: Names of those that were left out, without the prefix.
        source: Where they are from, for the message.

    Raises:
        UserInputError: If they differ.
    """
    own = {PREFIX + name: shape for name, shape in shapes(encoder).items()}
    theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith(PREFIX)}
    theirs |= {name: own.get(name, ()) for name in (PREFIX + name for name in frozen)}
    if own == theirs:
        return
    differ = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    name = differ[0]
    raise UserInputError(
        f"{source} was trained with another architecture: {len(differ)} of {len(own)} weights differ, "
        f"such as {name} (checkpoint {theirs.get(name)}, model {own.get(name)}); choose the model and the dataset "
        "that it was trained with"
    )
