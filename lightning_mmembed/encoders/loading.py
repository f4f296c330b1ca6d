"""Reads checkpoints: safetensors only, no code of theirs run, every weight accounted for."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from lightning_mmembed.errors import UserInputError

SETTINGS_FILE = "mmembed.json"
POOLING_FILE = "pooling.safetensors"

#: Weights that a checkpoint may hold beyond the backbone's: the head, and buffers of older versions of transformers.
IGNORED = ("lm_head.", "position_ids", "rotary_emb.inv_freq")


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Name the checkpoint in what transformers raises on an absent, foreign or broken one."""
    try:
        yield
    except UserInputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserInputError(
            f"checkpoint {path!r} cannot be read: {error}. Give a directory with config.json and *.safetensors, or a "
            "hub id"
        ) from error


def load_config(path: str) -> PretrainedConfig:
    """The configuration of a checkpoint."""
    # False, not the default: transformers would ask whether to run the code of a checkpoint, and run it on a yes.
    config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_backbone(path: str, config: PretrainedConfig, ignored: tuple[str, ...] = (), **options: Any) -> Any:
    """Load a model without its language-model head.

    Args:
        path: A directory or a hub id.
        config: The configuration.
        ignored: Parts of names of weights that the checkpoint holds for somebody else.
        **options: Further arguments of ``from_pretrained``.

    Raises:
        UserInputError: If the checkpoint lacks weights, or holds some that the model has no use for, or an option
            needs a package that is not installed.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # the check below takes the place of its report on the weights
    try:
        backbone, info = AutoModel.from_pretrained(
            path, config=config, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (ImportError, RuntimeError) as error:
        given = [name for name, value in options.items() if value is not None and name != "dtype"]
        if not given:
            raise
        raise UserInputError(
            f"checkpoint {path!r} cannot be loaded with {' and '.join(given)}: {error} Install what it names, or leave "
            f"{' and '.join(given)} out"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_weights(path, type(backbone).__name__, info, ignored)
    return backbone


def quantization(value: Any, kept: tuple[str, ...]) -> Any:
    """Settings of quantisation for transformers.

    Args:
        value: A mapping with the arguments of ``BitsAndBytesConfig``, a configuration of transformers, or ``None``.
        kept: Parts of the model that bitsandbytes leaves as they are, unless the settings name others.

    Raises:
        UserInputError: If bitsandbytes is not installed, or a setting is wrong.
    """
    if isinstance(value, Mapping):
        try:
            value = BitsAndBytesConfig(**value)  # type: ignore[no-untyped-call]
        except (ImportError, TypeError, ValueError) as error:
            raise UserInputError(
                f"quantization_config={dict(value)} cannot be used: {error}; it takes the arguments of transformers' "
                "BitsAndBytesConfig and needs pip install bitsandbytes"
            ) from error
    if isinstance(value, BitsAndBytesConfig) and value.llm_int8_skip_modules is None:
        value = copy.copy(value)
        value.llm_int8_skip_modules = list(kept)
    return value


def check_weights(path: str, model: str, info: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
    """Make sure that a checkpoint and a model have the same weights.

    Args:
        path: The checkpoint.
        model: Name of the model's class.
        info: What transformers says of the loading.
        ignored: Parts of names of weights that the checkpoint holds for somebody else.

    Raises:
        UserInputError: If the checkpoint lacks weights, or holds some that the model has no use for.
    """
    unexpected = [key for key in info["unexpected_keys"] if not any(part in key for part in IGNORED + ignored)]
    for found, what in ((info["missing_keys"], "lacks"), (unexpected, "has no place for")):
        if found:
            raise UserInputError(
                f"checkpoint {path!r} does not fit its config.json: {model} {what} {len(found)} "
                f"weights, such as {sorted(found)[0]}; download it again, or mend config.json"
            )


def read_json(path: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint, or ``None`` if there is none."""
    file = find_file(path, name)
    return None if file is None else json.loads(file.read_text())


def find_file(path: str, name: str) -> Path | None:
    """Where a file of a checkpoint lies on this machine, downloaded if need be; ``None`` if there is none."""
    found = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)
