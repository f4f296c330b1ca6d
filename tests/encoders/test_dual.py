"""CLIP and SigLIP as one encoder: the masked sum of what transformers' own towers give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from lightning_mmembed import Query
from lightning_mmembed.encoders.dual import DualEncoder, format_string
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item
from lightning_mmembed.retrieval.embed import encoder_fingerprint

TEXTS = ["A red ellipse.", "Find the picture of this pet. Which pet is green?", "a story that goes on and on"]
POSITIONS, SIZE = 40, 32
TOLERANCE = 1e-5


def gradient(colour: str) -> Image.Image:
    return Image.blend(Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (256, 256), colour), 0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # EOS has the largest id, as in CLIP, whose tower pools at the largest one.
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    own.train_from_iterator(TEXTS, trainer)
    own.add_special_tokens(["<s>", "<pad>", "</s>"])
    ids = {name: own.token_to_id(name) for name in ("<s>", "</s>")}
    own.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    words = tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(words),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {**tower, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    if request.param == "clip":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(directory)
        pictures: Any = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    else:
        text["projection_size"] = 32
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(directory)
        pictures = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    pictures.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def oracle(checkpoint: Path, text: str | None, image: Image.Image | None) -> Tensor:
    """The masked sum, by transformers alone."""
    model, total = AutoModel.from_pretrained(checkpoint).eval(), torch.zeros(1)
    with torch.no_grad():
        if text is not None:
            words = AutoTokenizer.from_pretrained(checkpoint)
            padding = {"padding": "max_length", "max_length": POSITIONS} if model.config.model_type == "siglip" else {}
            given = words([text], return_tensors="pt", **padding)
            if padding:
                given.pop("attention_mask")
            given.pop("token_type_ids", None)
            total = total + model.get_text_features(**given).pooler_output
        if image is not None:
            pixels = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")(images=image, return_tensors="pt")
            total = total + model.get_image_features(**pixels).pooler_output
    return F.normalize(total, dim=-1)[0]


RED, WIDE = gradient("red"), gradient("blue").resize((90, 40))
CASES: list[tuple[Entry, str | None, Image.Image | None]] = [
    (Item("a red ellipse"), "A red ellipse.", None),
    (Item(image=RED), None, RED),
    (Item("gold", WIDE), "Gold.", WIDE),
    (Item('"is it gold?"', WIDE), "Is it gold?", WIDE),
    (Query(Item("which pet is green?")), "Which pet is green?", None),
    (Query(Item("which pet is green"), "Find the pet"), "Find the pet. which pet is green.", None),
    (Query(Item(image=RED), "Find its caption."), "Find its caption.", RED),
    (Query(Item(image=WIDE)), None, WIDE),
    (Query(Item("now blue", WIDE), "Change it."), "Change it. now blue.", WIDE),
    (Item(), "", None),
]


def test_each_item_is_the_masked_sum_of_what_transformers_gives(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    vectors = encoder.encode([entry for entry, _, _ in CASES])
    wanted = torch.stack([oracle(checkpoint, text, image) for _, text, image in CASES])
    assert float(torch.pdist(wanted).min()) > 100 * TOLERANCE
    torch.testing.assert_close(vectors, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tokens_per_batch", [1, 70, 10_000])
def test_a_vector_does_not_depend_on_its_batch_mates(checkpoint: Path, tokens_per_batch: int) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    alone = torch.cat([encoder.encode([entry]) for entry, _, _ in CASES])
    together = encoder.encode([entry for entry, _, _ in CASES], tokens_per_batch=tokens_per_batch)
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


def test_a_lower_limit_leaves_the_vector_of_a_short_text_alone(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    shorter = DualEncoder.from_pretrained(checkpoint, max_length=30)
    wanted = encoder.encode([Item("a bus")])
    torch.testing.assert_close(shorter.encode([Item("a bus")]), wanted, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(encoder.encode([Item("a bus")], max_length=30), wanted, rtol=0, atol=TOLERANCE)


def test_the_sum_is_of_vectors_that_were_not_normalised(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    text, image, both = encoder.encode([Item("Gold."), Item(image=RED), Item("Gold.", RED)])
    assert float((F.normalize(text + image, dim=0) - both).abs().max()) > 1e-3


def test_the_gradient_reaches_both_towers(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint).train()
    vectors = encoder(encoder.processor([entry for entry, _, _ in CASES]))
    (vectors * torch.linspace(-1, 1, vectors.shape[1])).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # The temperature and bias of CLIP's and SigLIP's own losses, and biases of keys, which no softmax sees.
    assert [n for n in without if "logit" not in n and not n.endswith(("k_proj.bias", "in_proj_bias"))] == []


def test_a_saved_encoder_gives_the_same_vectors_of_long_texts_too(checkpoint: Path, tmp_path: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint, max_length=25)
    encoder.save_pretrained(tmp_path / "saved")
    entries: list[Entry] = [*(entry for entry, _, _ in CASES), Item("word " * 30)]
    loaded = DualEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(entries), encoder.encode(entries))
    with pytest.raises(UserInputError, match="saved"):
        encoder.save_pretrained(tmp_path / "saved")


def test_a_fingerprint_changes_with_a_weight_of_no_dimension_too(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    before = encoder_fingerprint(encoder)
    assert encoder_fingerprint(DualEncoder.from_pretrained(checkpoint)) == before
    with torch.no_grad():
        encoder.backbone.logit_scale.add_(1)
    assert encoder_fingerprint(encoder) != before


def test_a_tokenizer_in_pure_python_has_a_fingerprint_too(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    prints = set()
    for extra_ids in (0, 10, 20):
        encoder.processor.prompts.tokenizer = ByT5Tokenizer(extra_ids=extra_ids)  # type: ignore[no-untyped-call]
        prints.add(encoder_fingerprint(encoder))
    assert len(prints) == 3


def test_a_text_is_put_between_what_the_tokenizer_itself_puts_around_it(checkpoint: Path, tmp_path: Path) -> None:
    """SigLIP 2 has a BOS and writes none."""
    shutil.copytree(checkpoint, tmp_path / "other")
    words: Any = AutoTokenizer.from_pretrained(checkpoint)
    end = (words.eos_token, words.eos_token_id)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    words.save_pretrained(tmp_path / "other")
    encoder = DualEncoder.from_pretrained(tmp_path / "other")
    (vector,) = encoder.encode([Item("a red ellipse")])
    torch.testing.assert_close(vector, oracle(tmp_path / "other", "A red ellipse.", None), rtol=0, atol=TOLERANCE)
    assert AutoTokenizer.from_pretrained(tmp_path / "other")("a")["input_ids"][0] != words.bos_token_id


def test_a_long_text_is_cut_and_counted_and_an_instruction_that_leaves_no_room_is_named(checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint, max_length=20)
    assert encoder.processor([Item("word " * 50), Item("a")]).truncated == 1
    with pytest.raises(UserInputError, match="max_length=20 leaves no room"):
        encoder.encode([Query(Item("a"), "many words " * 20)])


def test_more_tokens_than_positions_and_other_checkpoints_are_refused(checkpoint: Path, tiny_checkpoint: Path) -> None:
    encoder = DualEncoder.from_pretrained(checkpoint)
    with pytest.raises(UserInputError, match="max_length=41 is more than the 40 positions"):
        DualEncoder.from_pretrained(checkpoint, max_length=POSITIONS + 1)
    with pytest.raises(UserInputError, match="max_length=1000 is more than the 40 positions"):
        encoder.encode([Item("a")], max_length=1000)
    for nothing in (2, 0, -5):
        with pytest.raises(UserInputError, match=f"max_length={nothing} leaves no room"):
            DualEncoder.from_pretrained(checkpoint, max_length=nothing)
    with pytest.raises(UserInputError, match="model_type='llava_next'; a DualEncoder takes"):
        DualEncoder.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize(
    ("text", "written"),
    [("a bus", "A bus."), ("A bus?", "A bus?"), ('"a bus"', "A bus."), ("", ""), (" a\r bus! ", "A bus!")],
)
def test_texts_are_written_as_uniir_writes_them(text: str, written: str) -> None:
    assert format_string(text) == written
