"""Checkpoints: saved, loaded, read by plain transformers, built small, trained, and refused when they are foreign."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from worlds import ARCHITECTURE

from lightning_mmembed import MLLMEncoder, Query
from lightning_mmembed.encoders.checkpoint import PROMPTS
from lightning_mmembed.encoders.loading import SETTINGS, reading
from lightning_mmembed.encoders.tiny import BUILD_FILE, build_tiny_llava_next, tiny_encoder
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item

TEXTS = ["a red ellipse", "Instruct: Find the picture of this pet.\nQuery: which pet is green?"]
ENTRIES: list[Query | Item] = [
    Item("a red ellipse"),
    Item(image=Image.new("RGB", (40, 24), "red")),
    Query(Item("green in place of red", Image.new("RGB", (40, 24), "blue")), "Change it"),
]


class Corpus:
    def __init__(self, texts: list[str]) -> None:
        self.texts, self.fingerprint = texts, repr(texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)


def weights(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


@pytest.mark.parametrize("pooling", ["mean", "last", "latent-attention"])
def test_a_saved_encoder_gives_the_same_vectors_when_loaded(
    tiny_checkpoint: Path, tmp_path: Path, pooling: str
) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, pooling=pooling, bidirectional=False, max_length=17)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    encoder.save_pretrained(tmp_path)
    loaded = MLLMEncoder.from_pretrained(tmp_path)
    assert loaded.settings == encoder.settings
    assert (loaded.settings["pooling"], loaded.settings["bidirectional"]) == (pooling, False)
    assert loaded.processor.prompts.max_length == 17
    assert torch.equal(loaded.encode(ENTRIES), encoder.encode(ENTRIES))


def test_what_is_asked_for_wins_over_what_was_saved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    MLLMEncoder.from_pretrained(tiny_checkpoint, pooling="last", max_length=17).save_pretrained(tmp_path)
    loaded = MLLMEncoder.from_pretrained(tmp_path, pooling="mean", bidirectional=False, max_length=9)
    assert (loaded.settings["pooling"], loaded.settings["bidirectional"]) == ("mean", False)
    assert loaded.processor.prompts.max_length == 9


def test_the_tiny_checkpoint_is_read_by_plain_transformers(tiny_checkpoint: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    own, theirs = weights(encoder.backbone), weights(model.model)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert tokenizer("a red pet")["input_ids"] == encoder.processor.prompts.tokenizer("a red pet")["input_ids"]
    batch = processor(images=Image.new("RGB", (32, 32), "red"), text="<image>\na pet", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(logits).all()


def test_the_same_seed_gives_the_same_weights_and_another_one_gives_others(tmp_path: Path) -> None:
    made = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(len(made))  # whatever the state of the process
        build_tiny_llava_next(tmp_path / name, TEXTS, **{**ARCHITECTURE, "seed": seed})
        made[name] = weights(MLLMEncoder.from_pretrained(tmp_path / name))
    assert all(torch.equal(made["one"][key], made["two"][key]) for key in made["one"])
    assert not all(torch.equal(made["one"][key], made["other"][key]) for key in made["one"])


def test_building_a_checkpoint_leaves_the_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build_tiny_llava_next(tmp_path, TEXTS, **ARCHITECTURE)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_tiny_checkpoint_is_reused_until_its_corpus_or_architecture_changes(tmp_path: Path) -> None:
    path = tmp_path / "tiny"

    def made(corpus: Corpus, **changed: Any) -> int:
        tiny_encoder(path, corpus, {**ARCHITECTURE, **changed})
        return os.stat(path / BUILD_FILE).st_ino

    first = made(Corpus(TEXTS))
    assert made(Corpus(TEXTS)) == first
    assert MLLMEncoder.from_pretrained(path).embedding_dim == 32
    tiny_encoder(path, Corpus(TEXTS), {**ARCHITECTURE, "hidden_size": 16})
    assert MLLMEncoder.from_pretrained(path).embedding_dim == 16
    before = json.loads((path / BUILD_FILE).read_text())
    tiny_encoder(path, Corpus([*TEXTS, "zebra zebra zebra"]), {**ARCHITECTURE, "hidden_size": 16})
    assert json.loads((path / BUILD_FILE).read_text()) != before
    assert "zebra" in MLLMEncoder.from_pretrained(path).processor.prompts.tokenizer.get_vocab()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_the_gradient_reaches_every_part_of_the_encoder(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, pooling="latent-attention").train()
    vectors = encoder(encoder.processor(ENTRIES))
    (vectors * torch.linspace(-1, 1, vectors.shape[1])).sum().backward()
    without = sorted(name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum())
    # The norm after CLIP's pooled output is the one part of the tower that LLaVA does not read.
    assert without == [name for name in without if "post_layernorm" in name]
    parts = {name for name, p in encoder.named_parameters() if p.grad is not None}
    for part in ("vision_tower", "multi_modal_projector", "image_newline", "language_model", "pooling.latents"):
        assert any(part in name for name in parts), part


def test_a_gradient_step_changes_the_vectors(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint).train()
    before = encoder.encode(ENTRIES)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    encoder(encoder.processor(ENTRIES))[:, 0].sum().backward()
    optimizer.step()
    after = encoder.encode(ENTRIES)
    assert (after[:, 0] < before[:, 0]).all()


@pytest.mark.parametrize("tokens_per_batch", [None, 100])
def test_nothing_has_no_vectors_of_the_encoder_s_width(tiny_checkpoint: Path, tokens_per_batch: int | None) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    vectors = encoder(encoder.processor([], tokens_per_batch))
    assert (vectors.shape, vectors.dtype) == ((0, encoder.embedding_dim), torch.float32)


# --- wrong input ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"checkpoint '.*absent' cannot be read"):
        MLLMEncoder.from_pretrained(tmp_path / "absent")


def test_a_checkpoint_of_another_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserInputError, match="model_type='bert'; supported are"):
        MLLMEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown; write 'latent-attention', 'mean' or 'last'"),
        ({"padding_side": "top"}, r"padding_side='top' is unknown; write one of \('right', 'left'\)"),
        ({"dtype": "float23"}, "dtype='float23' is no type of weights; write 'float32'"),
        ({"dtype": "nn"}, "dtype='nn' is no type of weights"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 is no type of weights"),
    ],
)
def test_an_unknown_value_is_named_and_the_checkpoint_not_blamed(
    tiny_checkpoint: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserInputError, match=f"^{message}"):
        MLLMEncoder.from_pretrained(tiny_checkpoint, **given)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float16])
def test_a_type_is_given_by_itself_or_by_its_name(tiny_checkpoint: Path, dtype: Any) -> None:
    wanted = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert MLLMEncoder.from_pretrained(tiny_checkpoint, dtype=dtype).backbone.dtype == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompts": "x"}, r"has prompts='x', which is not one of \('plain', 'mm-embed'\)"),
        ({"max_length": "x"}, "has max_length='x', which is not of type int"),
        ({"bidirectional": "no"}, "has bidirectional='no', which is not of type bool"),
        ({"pooling_options": [1]}, r"has pooling_options=\[1\], which is not of type dict"),
        ([1], "holds a list, not an object"),
    ],
)
def test_settings_that_cannot_be_used_are_named_with_their_file(
    tiny_checkpoint: Path, tmp_path: Path, content: Any, message: str
) -> None:
    directory = MLLMEncoder.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "saved")
    (directory / "mmembed.json").write_text(json.dumps(content))
    with pytest.raises(UserInputError, match=rf"^'.*saved/mmembed\.json' {message}"):
        MLLMEncoder.from_pretrained(directory)


def test_all_ways_to_write_prompts_may_stand_in_the_settings() -> None:
    assert SETTINGS["prompts"] == tuple(PROMPTS)


def test_a_missing_package_is_what_the_message_is_about() -> None:
    message = r"^checkpoint 'mine' cannot be read: No module named 'sentencepieces'$"
    with pytest.raises(UserInputError, match=message), reading("mine"):
        importlib.import_module("sentencepieces")


def test_something_that_is_no_item_is_named(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    with pytest.raises(UserInputError, match="item=7 is a int; give a str, a PIL image or"):
        encoder.encode_document([7])  # type: ignore[list-item]
