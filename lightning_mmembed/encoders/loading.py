"""Reads checkpoints: safetensors only, no code of theirs run, every weight accounted for."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from lightning_mmembed.errors import UserInputError

SETTINGS_FILE = "mmembed.json"
POOLING_FILE = "pooling.safetensors"

#: Weights that a checkpoint may hold beyond the backbone's: the head, and buffers of older versions of transformers.
IGNORED = ("lm_head.", "position_ids", "rotary_emb.inv_freq")

#: What :data:`SETTINGS_FILE` may hold: a type, or one of some values. What an argument sets too is checked at its use.
SETTINGS: dict[str, type | tuple[str, ...]] = {
    "bidirectional": bool,
    "max_length": int,
    "pooling_options": dict,
    "prompts": ("plain", "mm-embed"),
}


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Name the checkpoint in what transformers raises on an absent, foreign or broken one."""
    try:
        yield
    except UserInputError:
        raise
    except ImportError as error:  # of a tokenizer, such as one that needs sentencepiece
        raise UserInputError(f"checkpoint {path!r} cannot be read: {error}") from error
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


def load_model(
    path: str, config: PretrainedConfig, ignored: tuple[str, ...] = (), auto: Any = AutoModel, **options: Any
) -> Any:
    """Load a model.

    Args:
        path: A directory or a hub id.
        config: The configuration.
        ignored: Parts of names of weights that the checkpoint holds for somebody else.
        auto: The class of transformers that finds the model's own; by default it has no language-model head.
        **options: Further arguments of ``from_pretrained``.

    Raises:
        UserInputError: If the checkpoint lacks weights, or holds some that the model has no use for, or an option
            needs a package that is not installed, or ``dtype`` is no type of weights.
    """
    check_dtype(options.get("dtype", "auto"))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # the check below takes the place of its report on the weights
    try:
        model, info = auto.from_pretrained(
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
    check_weights(path, type(model).__name__, info, ignored)
    return model


def check_dtype(dtype: Any) -> None:
    """Make sure that weights can be of a type.

    Args:
        dtype: A type of torch or its name; ``"auto"`` is the checkpoint's own.

    Raises:
        UserInputError: If it is neither, or no type of floating-point numbers.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserInputError(
            f"dtype={dtype!r} is no type of weights; write 'float32', 'bfloat16' or 'float16', or 'auto' for the "
            "checkpoint's own"
        )


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
    """A JSON file of a checkpoint, or ``None`` if there is none.

    Raises:
        UserInputError: If it holds something else than an object, or a setting that cannot be used.
    """
    file = find_file(path, name)
    if file is None:
        return None
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise UserInputError(f"{str(file)!r} holds a {type(content).__name__}, not an object; download it again")
    if name == SETTINGS_FILE:
        _check_settings(file, content)
    return content


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    for key, allowed in SETTINGS.items():
        if key not in settings:
            continue
        value = settings[key]
        fits = value in allowed if isinstance(allowed, tuple) else type(value) is allowed
        if not fits:
            wanted = f"one of {allowed}" if isinstance(allowed, tuple) else f"of type {allowed.__name__}"
            raise UserInputError(
                f"{str(file)!r} has {key}={value!r}, which is not {wanted}; mend it, or save the encoder again"
            )


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
