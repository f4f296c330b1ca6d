"""Encoders exported for sentence-transformers, loaded by that library and compared with themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers import SentenceTransformer

from lightning_mmembed import Item, MLLMEncoder, Query
from lightning_mmembed.encoders.base import Encoder
from lightning_mmembed.encoders.dual import DualEncoder
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.integrations.sentence_transformers import EncoderModule, export

RELEASED = Path(__file__).parent.parent / "golden" / "mm_embed_tiny" / "checkpoint"
TOLERANCE = 1e-5
INSTRUCTION = "Find the picture of this pet."


def picture(colour: str, size: tuple[int, int] = (48, 36)) -> Image.Image:
    return Image.blend(Image.linear_gradient("L").convert("RGB").resize(size), Image.new("RGB", size, colour), 0.5)


RED, BLUE = picture("red"), picture("blue", (20, 50))
TEXTS = ["which pet is green?", "a red ellipse", "", "a long story of a pet that goes on and on " * 6]
#: What sentence-transformers is given, and what that is here.
MIXED: list[tuple[Any, Item]] = [
    ("which pet is green?", Item("which pet is green?")),
    (RED, Item(image=RED)),
    ({"text": "gold in place of blue", "image": BLUE}, Item("gold in place of blue", BLUE)),
    ({"image": BLUE}, Item(image=BLUE)),
    ({"text": "a red ellipse"}, Item("a red ellipse")),
    ({"image": RED, "text": ""}, Item("", RED)),
]
GIVEN, ITEMS = [given for given, _ in MIXED], [item for _, item in MIXED]


def plain(checkpoint: Path, **options: Any) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(checkpoint, **options)


def clip(checkpoint: Path, directory: Path) -> DualEncoder:
    """Two small towers, with the tokenizer of the tiny checkpoint."""
    words = AutoTokenizer.from_pretrained(checkpoint)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, **special, "vocab_size": len(words), "max_position_embeddings": 40}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    words.save_pretrained(directory)
    return DualEncoder.from_pretrained(directory)


MAKES: dict[str, Callable[[Path, Path], Any]] = {
    "released MM-Embed": lambda checkpoint, path: plain(RELEASED),
    "two-sided, mean": lambda checkpoint, path: plain(checkpoint, max_length=40),
    "causal, last token": lambda checkpoint, path: plain(checkpoint, pooling="last", bidirectional=False),
    "CLIP": clip,
}


@pytest.fixture(scope="module", params=MAKES)
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Encoder, SentenceTransformer]:
    """An encoder, and what sentence-transformers loads of its export."""
    root = tmp_path_factory.mktemp("export")
    encoder = MAKES[request.param](tiny_checkpoint, root / "source")
    directory = export(encoder, root / "exported")
    return encoder, SentenceTransformer(str(directory), trust_remote_code=True, device="cpu")


def assert_same(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(theirs), np.asarray(ours), rtol=0, atol=TOLERANCE)


def test_texts_have_the_same_vectors(pair: tuple[Encoder, SentenceTransformer]) -> None:
    encoder, model = pair
    assert_same(encoder.encode_document(TEXTS), model.encode_document(TEXTS))
    assert_same(encoder.encode_document(TEXTS), model.encode(TEXTS))
    assert_same(encoder.encode_query(TEXTS), model.encode_query(TEXTS))


def test_pictures_and_pictures_with_texts_have_the_same_vectors_in_one_batch(
    pair: tuple[Encoder, SentenceTransformer],
) -> None:
    encoder, model = pair
    assert_same(encoder.encode(ITEMS), model.encode_document(GIVEN))
    assert_same(encoder.encode(ITEMS), model.encode(GIVEN, batch_size=2))
    assert_same(encoder.encode_query(ITEMS), model.encode_query(GIVEN))


def test_a_prompt_is_the_instruction_of_queries(pair: tuple[Encoder, SentenceTransformer]) -> None:
    encoder, model = pair
    expected = encoder.encode_query(ITEMS, instruction=INSTRUCTION)
    assert np.abs(expected.numpy() - encoder.encode_query(ITEMS).numpy()).max() > 10 * TOLERANCE
    assert_same(expected, model.encode_query(GIVEN, prompt=INSTRUCTION))
    assert_same(expected, model.encode(GIVEN, prompt=INSTRUCTION))
    model.prompts["query"] = INSTRUCTION
    try:
        assert_same(expected, model.encode_query(GIVEN))
    finally:
        model.prompts["query"] = ""


def test_a_single_input_gives_a_single_vector(pair: tuple[Encoder, SentenceTransformer]) -> None:
    encoder, model = pair
    given, item = MIXED[2]
    assert_same(encoder.encode([item])[0], model.encode_document(given))
    assert model.get_embedding_dimension() == encoder.embedding_dim == len(model.encode_document(given))


def test_what_sentence_transformers_saves_again_is_the_same(
    pair: tuple[Encoder, SentenceTransformer], tmp_path: Path
) -> None:
    encoder, model = pair
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    assert_same(encoder.encode(ITEMS), again.encode_document(GIVEN))
    assert again.max_seq_length == encoder.processor.prompts.max_length


def test_the_path_of_a_picture_stands_for_the_picture(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = plain(tiny_checkpoint)
    model = SentenceTransformer(modules=[EncoderModule(encoder)], device="cpu")
    RED.save(tmp_path / "red.png")
    path = str(tmp_path / "red.png")
    expected = encoder.encode([Item(image=RED), Item("red", RED)])
    assert_same(expected, model.encode_document([path, {"text": "red", "image": path}]))
    assert_same(encoder.encode_document([path]), model.encode_document([{"text": path}]))


def test_similarities_are_cosines(pair: tuple[Encoder, SentenceTransformer]) -> None:
    encoder, model = pair
    queries, documents = encoder.encode_query(TEXTS), encoder.encode(ITEMS)
    assert_same(queries @ documents.T, model.similarity(model.encode_query(TEXTS), model.encode_document(GIVEN)))


def test_the_export_is_read_by_this_package_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = plain(tiny_checkpoint, pooling="latent-attention")
    directory = export(encoder, tmp_path / "exported")
    assert torch.equal(MLLMEncoder.from_pretrained(directory).encode(ITEMS), encoder.encode(ITEMS))
    (module,) = json.loads((directory / "modules.json").read_text())
    assert module["type"] == "lightning_mmembed.integrations.sentence_transformers.EncoderModule"


def test_options_reach_the_encoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = export(plain(tiny_checkpoint), tmp_path / "exported")
    model = SentenceTransformer(
        str(directory), trust_remote_code=True, device="cpu", model_kwargs={"max_length": 9, "dtype": "bfloat16"}
    )
    assert model.dtype == torch.bfloat16
    assert model.max_seq_length == 9
    model = model.float()
    model.max_seq_length = 30
    rounded = MLLMEncoder.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16, max_length=30).float()
    assert_same(rounded.encode_document(TEXTS), model.encode_document(TEXTS))


def test_the_encoder_may_be_trained_there(tiny_checkpoint: Path) -> None:
    model = SentenceTransformer(modules=[EncoderModule(plain(tiny_checkpoint))], device="cpu").train()
    vectors = model(model.preprocess(GIVEN, prompt=INSTRUCTION))["sentence_embedding"]
    vectors[:, 0].sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.slow
def test_the_export_is_loaded_in_a_fresh_process_without_a_network(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = plain(tiny_checkpoint)
    directory = export(encoder, tmp_path / "exported")
    RED.save(tmp_path / "red.png")
    code = (
        "import sys, numpy; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "numpy.save(sys.argv[2], model.encode_query(['a red ellipse', sys.argv[3]], prompt='Find it.'))\n"
    )
    arguments = [str(directory), str(tmp_path / "vectors.npy"), str(tmp_path / "red.png")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    expected = encoder.encode_query([Item("a red ellipse"), Item(image=RED)], instruction="Find it.")
    assert_same(expected, np.load(tmp_path / "vectors.npy"))


# --- wrong input ----------------------------------------------------------------------------------------------------


def test_without_leave_to_import_this_package_nothing_is_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    directory = export(plain(tiny_checkpoint), tmp_path / "exported")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(directory), device="cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"audio": [0.0]}, r"has keys \['audio'\]; give 'text', 'image' or both"),
        ({"role": "user", "content": "a red bus"}, r"has keys \['content', 'role'\]"),
        ({"image": None}, r"input=\{'image': None\} has neither a text nor a picture"),
        ({"text": None, "image": None}, "has neither a text nor a picture; give 'text', 'image' or both"),
        (7, "item=7 is a int"),
    ],
)
def test_an_input_that_is_no_item_is_named(tiny_checkpoint: Path, given: Any, message: str) -> None:
    module = EncoderModule(plain(tiny_checkpoint))
    with pytest.raises(UserInputError, match=message):
        module.preprocess([given])


def test_documents_get_no_instruction(tiny_checkpoint: Path) -> None:
    model = SentenceTransformer(modules=[EncoderModule(plain(tiny_checkpoint))], device="cpu")
    with pytest.raises(UserInputError, match="is given to documents, which get no instruction"):
        model.encode_document(["a red bus"], prompt=INSTRUCTION)


def test_what_stands_in_a_directory_is_not_written_over(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="is in use"):
        export(plain(tiny_checkpoint), tmp_path)


def test_a_query_keeps_its_instruction_whatever_the_batch_size(tiny_checkpoint: Path) -> None:
    encoder = plain(tiny_checkpoint)
    model = SentenceTransformer(modules=[EncoderModule(encoder)], device="cpu")
    expected = encoder.encode([Query(item, INSTRUCTION) for item in ITEMS])
    for batch_size in (1, 4):
        assert_same(expected, model.encode_query(GIVEN, prompt=INSTRUCTION, batch_size=batch_size))
