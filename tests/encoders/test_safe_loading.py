"""Contract 10: loading data or weights executes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mmembed import Candidate, Item, MLLMEncoder
from lightning_mmembed.checkpoints import load_encoder_weights
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.retrieval.embed import PART_SIZE, VectorStore, encoder_fingerprint
from lightning_mmembed.retrieval.vectors import Vectors


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(tiny_checkpoint)


def checkpoint_of(encoder: MLLMEncoder, **more: Any) -> dict[str, Any]:
    return {"state_dict": {f"encoder.{name}": value for name, value in encoder.state_dict().items()}, **more}


def test_the_malicious_object_does_act_when_it_is_unpickled(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "trace"), tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "where", ["beside the weights", "instead of a weight", "as the whole file", "in the old format"]
)
def test_a_checkpoint_with_a_malicious_pickle_is_refused_and_not_executed(
    encoder: MLLMEncoder, tmp_path: Path, where: str
) -> None:
    evil = Malicious(tmp_path / "trace")
    content: Any = checkpoint_of(encoder)
    if where == "as the whole file":
        content = evil
    elif where == "instead of a weight":
        content["state_dict"][next(iter(content["state_dict"]))] = evil
    else:
        content["hyper_parameters"] = evil
    path = tmp_path / "evil.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=where != "in the old format")
    with pytest.raises(UserInputError, match=r"ckpt_path='.*evil.ckpt' is no checkpoint of this package"):
        load_encoder_weights(encoder, path)
    assert not (tmp_path / "trace").exists()


def test_a_good_checkpoint_is_loaded(encoder: MLLMEncoder, tmp_path: Path) -> None:
    content = checkpoint_of(encoder, epoch=3)
    content["state_dict"] = {name: value + 1 for name, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "good.ckpt")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    load_encoder_weights(encoder, tmp_path / "good.ckpt")
    assert all(torch.equal(value, before[name] + 1) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_refused(encoder: MLLMEncoder, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(UserInputError, match="is no checkpoint of this package"):
        load_encoder_weights(encoder, tmp_path / "broken.ckpt")


def test_a_checkpoint_without_weights_of_an_encoder_is_refused(encoder: MLLMEncoder, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.ckpt")
    with pytest.raises(UserInputError, match="is no checkpoint of this package: 'state_dict'"):
        load_encoder_weights(encoder, tmp_path / "other.ckpt")


def test_a_checkpoint_of_another_architecture_is_refused_and_loads_nothing(
    encoder: MLLMEncoder, tmp_path: Path
) -> None:
    content = checkpoint_of(encoder)
    content["state_dict"] = {name: torch.full_like(value, 7) for name, value in content["state_dict"].items()}
    name = "encoder.backbone.language_model.norm.weight"
    content["state_dict"][name] = torch.ones(64)
    torch.save(content, tmp_path / "wide.ckpt")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(
        UserInputError, match=rf"another architecture: 1 of \d+ weights differ, such as {name}"
    ) as caught:
        load_encoder_weights(encoder, tmp_path / "wide.ckpt")
    assert "checkpoint (64,), model (32,)" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_a_directory_with_pickled_weights_only_is_refused(
    encoder: MLLMEncoder, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(
        {**encoder.backbone.state_dict(), "evil": Malicious(tmp_path / "trace")}, directory / "pytorch_model.bin"
    )
    with pytest.raises(UserInputError, match=r"pickled'.* cannot be read.*safetensors"):
        MLLMEncoder.from_pretrained(directory)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("model_type", ["llava_next", "a_model_of_my_own"])
def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_asked_about(
    tiny_checkpoint: Path, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is asked "run the custom code? [y/N]" and says yes has not asked for it by name."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    directory = tmp_path / "remote"
    shutil.copytree(tiny_checkpoint, directory)
    trace = tmp_path / "trace"
    (directory / "evil.py").write_text(
        f"import os\nos.mkdir({str(trace)!r})\n"
        "from transformers import LlavaNextConfig, LlavaNextModel\n"
        "class Config(LlavaNextConfig): pass\nclass Model(LlavaNextModel): pass\n"
    )
    names = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoTokenizer",
        "AutoImageProcessor",
        "AutoProcessor",
    )
    classes = {name: f"evil.{'Config' if name == 'AutoConfig' else 'Model'}" for name in names}
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((directory / file).read_text())
        if file == "config.json":
            content["model_type"] = model_type
        content["auto_map"] = (
            classes if file != "tokenizer_config.json" else {**classes, "AutoTokenizer": ["evil.Model"] * 2}
        )
        (directory / file).write_text(json.dumps(content))
    if model_type == "llava_next":
        assert MLLMEncoder.from_pretrained(directory).encode_document(["a pet"]).shape == (1, 32)
    else:
        with pytest.raises(UserInputError, match=r"remote' cannot be read"):
            MLLMEncoder.from_pretrained(directory)
    assert questions == []
    assert not trace.exists()


def test_stored_vectors_that_hold_a_pickle_are_computed_again_and_not_executed(
    encoder: MLLMEncoder, tmp_path: Path
) -> None:
    store = VectorStore(tmp_path / "vectors", dtype="float32", show_progress=False)
    made_by = encoder_fingerprint(encoder)
    entries = [Candidate(Item("a pet"), "77:1")]
    vectors = store.embed(encoder, entries, "content", made_by, "").read(0, 1)
    (part,) = (tmp_path / "vectors").glob("*/part-00000.npy")
    np.save(part, np.array([Malicious(tmp_path / "trace")], dtype=object), allow_pickle=True)
    assert len(entries) < PART_SIZE
    with pytest.raises(UserInputError, match=r"part-00000.npy holds no vectors"):
        Vectors([part], 32)
    assert torch.equal(store.embed(encoder, entries, "content", made_by, "").read(0, 1), vectors)
    assert not (tmp_path / "trace").exists()
