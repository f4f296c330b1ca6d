"""Reads the encoder's weights out of a Lightning checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_mmembed.errors import UserInputError

PREFIX = "encoder."


def load_encoder_weights(encoder: nn.Module, ckpt_path: str | Path) -> None:
    """Load the weights that a :class:`RetrievalModule` was saved with; see :func:`read_encoder_weights`."""
    encoder.load_state_dict(read_encoder_weights(encoder, ckpt_path))


def read_encoder_weights(encoder: nn.Module, ckpt_path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights that a :class:`RetrievalModule` was saved with; nothing in the file is executed.

    Args:
        encoder: The encoder that they must fit.
        ckpt_path: A ``.ckpt`` file of the Trainer.

    Returns:
        The weights by their names in the encoder.

    Raises:
        UserInputError: If there is no such file, or it was trained with another architecture.
    """
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is no file; give a .ckpt that training wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError ... on foreign files
        raise UserInputError(f"ckpt_path={str(ckpt_path)!r} is no checkpoint of this package: {error}") from error
    check_architecture(encoder, state, path)
    return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}


def check_architecture(encoder: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Compare names and shapes of the weights with those of the encoder.

    Raises:
        UserInputError: If they differ.
    """
    own = {PREFIX + name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items() if name.startswith(PREFIX)}
    if own == theirs:
        return
    differ = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    name = differ[0]
    raise UserInputError(
        f"ckpt_path={str(path)!r} was trained with another architecture: {len(differ)} of {len(own)} weights differ, "
        f"such as {name} (checkpoint {theirs.get(name)}, model {own.get(name)}); choose the model and the dataset "
        "that it was trained with"
    )
