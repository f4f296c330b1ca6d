"""From items to tokens and pixels: prompts, the pooled tokens, truncation, pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lightning_mmembed import Candidate, MLLMEncoder, Query
from lightning_mmembed.encoders.processor import ItemProcessor, decode_image
from lightning_mmembed.encoders.prompts import render
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item

RED = Image.new("RGB", (40, 24), "red")
INSTRUCTION = "Find the picture of this pet."
POSITIONS = 5  # (32 / 16) ** 2 patches and image_newline


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ItemProcessor:
    return MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=64, length_buckets=1).processor


def bucket_of(processor: ItemProcessor, entry: Query | Candidate | Item):  # type: ignore[no-untyped-def]
    return processor([entry]).buckets[0]


def decoded(processor: ItemProcessor, entry: Query | Candidate | Item) -> tuple[str, str]:
    """The text of the tokens that are not pooled, and of those that are."""
    bucket = bucket_of(processor, entry)
    pooled = bucket.pool_mask[0].bool()
    ids = bucket.input_ids[0]
    return processor.prompts.tokenizer.decode(ids[~pooled]), processor.prompts.tokenizer.decode(ids[pooled])


IMAGES = "<image>" * POSITIONS


@pytest.mark.parametrize(
    ("entry", "not_pooled", "pooled"),
    [
        (Item("a pet"), "", "<s>a pet</s>"),
        (Item(image=RED), "", f"<s>{IMAGES}\n</s>"),
        (Item("a pet", RED), "", f"<s>{IMAGES}\na pet</s>"),
        (Candidate(Item("a pet", RED), "77:1"), "", f"<s>{IMAGES}\na pet</s>"),
        (Query(Item("a pet")), "", "<s>Query: a pet</s>"),
        (Query(Item(image=RED)), "", f"<s>Query: {IMAGES}\n</s>"),
        (Query(Item("a pet", RED)), "", f"<s>Query: {IMAGES}\na pet</s>"),
        (Query(Item("a pet"), INSTRUCTION), f"<s>Instruct: {INSTRUCTION}\n", "Query: a pet</s>"),
        (Query(Item(image=RED), INSTRUCTION), f"<s>Instruct: {INSTRUCTION}\n", f"Query: {IMAGES}\n</s>"),
        (Query(Item("a pet", RED), INSTRUCTION), f"<s>Instruct: {INSTRUCTION}\n", f"Query: {IMAGES}\na pet</s>"),
        (Query(Item("a pet"), ""), "<s>Instruct: \n", "Query: a pet</s>"),
    ],
)
def test_the_prompt_is_the_released_one_and_all_but_the_instruction_is_pooled(
    processor: ItemProcessor, entry: Query | Candidate | Item, not_pooled: str, pooled: str
) -> None:
    assert decoded(processor, entry) == (not_pooled, pooled)
    assert bool(bucket_of(processor, entry).attention_mask.all()), "the instruction is attended to"


@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image and text"])
@pytest.mark.parametrize(
    ("instruction", "form"),
    [
        ("Find it.", "Instruct: Find it.\nQuery: {image}{text}"),
        (None, "Query: {image}{text}"),
        ("candidate", "{image}{text}"),
    ],
)
def test_prompts_equal_the_released_format_strings(instruction: str | None, form: str, has_image: bool) -> None:
    item = Item("a pet", RED if has_image else None)
    prompt = render(item if instruction == "candidate" else Query(item, instruction))
    written = prompt.before + ("<image>" if has_image else "") + prompt.after
    assert written == form.format(image="<image>\n" if has_image else "", text="a pet")


def test_padding_is_neither_attended_to_nor_pooled(processor: ItemProcessor) -> None:
    inputs = processor([Item("a pet"), Query(Item("a longer one than that", RED), INSTRUCTION)])
    bucket = inputs.buckets[0]
    row = inputs.order.tolist().index(0)
    length = int(bucket.attention_mask[row].sum())
    assert length < bucket.input_ids.shape[1]
    assert bucket.attention_mask[row].tolist() == [1] * length + [0] * (bucket.input_ids.shape[1] - length)
    assert bucket.pool_mask[row].tolist() == bucket.attention_mask[row].tolist()


def test_only_pictures_take_pixels_in_the_order_of_their_rows(processor: ItemProcessor) -> None:
    colours = ("red", "blue", "gold")
    entries = [
        Item("a pet"),
        *(Item("a " * n, Image.new("RGB", (32, 32), c)) for n, c in zip((9, 1, 5), colours, strict=True)),
    ]
    inputs = processor(entries)
    rows = [int(position) for position in inputs.order if position]
    pixels = inputs.buckets[0].pictures["pixel_values"]
    assert pixels is not None
    assert pixels.shape == (3, 3, 32, 32)
    assert [Image.new("RGB", (1, 1), colours[row - 1]).getpixel((0, 0)) for row in rows] == [
        tuple(p[:, 0, 0].tolist()) for p in pixels
    ]
    assert bucket_of(processor, Item("a pet")).pictures == {}


# --- truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["without", "with instruction"])
@pytest.mark.parametrize("image", [None, RED], ids=["text", "image and text"])
def test_truncation_cuts_the_end_of_the_text_and_keeps_all_else(
    processor: ItemProcessor, image: Image.Image | None, instruction: str | None
) -> None:
    text = " ".join(f"word{n}" for n in range(200))
    bucket = bucket_of(processor, Query(Item(text, image), instruction))
    ids = bucket.input_ids[0]
    # The picture counts as one token, as it does in the released code before it is expanded.
    assert len(ids) == processor.prompts.max_length + (POSITIONS - 1 if image else 0)
    whole = processor.prompts.tokenizer.decode(ids)
    head = f"<s>Instruct: {instruction}\nQuery: " if instruction else "<s>Query: "
    assert whole.startswith(head + (f"{IMAGES}\n" if image else "") + "word0 word1")
    assert whole.endswith("</s>")
    kept = whole.removesuffix("</s>").partition("word0")[2]
    assert text.partition("word0")[2].startswith(kept)
    assert len(kept) > 10
    pooled = processor.prompts.tokenizer.decode(ids[bucket.pool_mask[0].bool()])
    assert pooled.startswith("Query: " if instruction else "<s>Query: ")


def test_a_text_that_just_fits_is_not_cut(processor: ItemProcessor) -> None:
    room = processor.prompts.max_length - 2
    text = "!" * room
    assert len(processor.prompts.tokenizer(text, add_special_tokens=False)["input_ids"]) == room
    assert processor.prompts.tokenizer.decode(bucket_of(processor, Item(text)).input_ids[0]) == f"<s>{text}</s>"


@pytest.mark.parametrize("item", [Item("a pet"), Item(image=RED), Item("a pet", RED)])
def test_an_instruction_that_leaves_no_room_is_named(processor: ItemProcessor, item: Item) -> None:
    instruction = " ".join(f"word{n}" for n in range(100))
    with pytest.raises(
        UserInputError, match=r"max_length=64 leaves no room .* instruction of \d+ tokens; raise max_length"
    ):
        processor([Query(item, instruction)])


def test_every_length_of_instruction_is_either_refused_or_leaves_a_pooled_query_token(processor: ItemProcessor) -> None:
    for item in (Item("zebra"), Item("zebra", RED)):
        refused = 0
        for n in range(40, 70):
            try:
                bucket = bucket_of(processor, Query(item, "!" * n))
            except UserInputError:
                refused += 1
                continue
            assert not refused, "once an instruction is too long, every longer one is"
            assert bucket.input_ids[0, -1] == processor.prompts.tokenizer.eos_token_id
            assert int(bucket.pool_mask.sum()) >= 2
            assert int((bucket.input_ids == processor.family.image_token_id).sum()) == (POSITIONS if item.image else 0)
        assert refused


# --- texts that look like special tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("literal", ["<image>", "</s>", "<s>", "<pad>"])
def test_a_special_token_in_a_text_is_plain_text(processor: ItemProcessor, literal: str) -> None:
    special = processor.prompts.tokenizer.convert_tokens_to_ids(literal)
    text = f"a {literal} pet"
    plain = [processor.prompts.tokenizer.bos_token_id, processor.prompts.tokenizer.eos_token_id]
    for entry in (Item(text), Query(Item(text), text), Item(text, RED), Query(Item(text, RED), text)):
        ids = bucket_of(processor, entry).input_ids[0].tolist()
        has_image = (entry if isinstance(entry, Item) else entry.item).image is not None
        expected = POSITIONS * has_image if literal == "<image>" else plain.count(special)
        assert ids.count(special) == expected
        assert literal in processor.prompts.tokenizer.decode(ids[1:-1])


def test_a_literal_image_token_encodes_without_a_picture(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    assert torch.isfinite(encoder.encode_document(["<image> of a pet</s>"])).all()


# --- pictures -------------------------------------------------------------------------------------------------------


def striped(mode: str = "RGB") -> Image.Image:
    """A wide picture whose edges differ from its middle, so that a crop would show."""
    image = Image.new(mode, (90, 30), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 14, 29), fill="red")
    draw.rectangle((75, 0, 89, 29), fill="blue")
    draw.ellipse((35, 5, 55, 25), fill="green")
    return image


def squashed(rgb: Image.Image) -> np.ndarray:
    return np.asarray(rgb.resize((32, 32), resample=Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def test_a_picture_is_squashed_to_a_square_without_cropping(processor: ItemProcessor) -> None:
    pixels = bucket_of(processor, Item(image=striped())).pictures["pixel_values"][0].numpy()
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, squashed(striped()))
    assert pixels[:, 16, 0].tolist() == [255, 0, 0]
    assert pixels[:, 16, -1].tolist() == [0, 0, 255]


def test_a_picture_given_as_bytes_gives_the_pixels_of_the_decoded_one(processor: ItemProcessor) -> None:
    buffer = io.BytesIO()
    striped().save(buffer, "PNG")
    pixels = bucket_of(processor, Item(image=buffer.getvalue())).pictures["pixel_values"][0].numpy()
    np.testing.assert_array_equal(pixels, squashed(striped()))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_alpha_is_dropped_not_blended(processor: ItemProcessor, as_bytes: bool) -> None:
    clear = Image.new("RGBA", (20, 40), (200, 30, 40, 0))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG")
    pixels = bucket_of(processor, Item(image=buffer.getvalue() if as_bytes else clear)).pictures["pixel_values"][0]
    assert pixels[:, 5, 5].tolist() == [200, 30, 40]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_every_colour_mode_becomes_rgb(processor: ItemProcessor, mode: str) -> None:
    image = Image.new("RGB", (20, 20), "white").convert(mode)
    assert bucket_of(processor, Item(image=image)).pictures["pixel_values"].shape == (1, 3, 32, 32)


def test_the_language_model_sees_normalised_pixels(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint)
    seen: list[torch.Tensor] = []
    hook = encoder.backbone.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder.encode_document([striped()])
    hook.remove()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (squashed(striped()) / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(seen[0][0].numpy(), expected, atol=1e-5)


def test_broken_picture_bytes_are_named() -> None:
    buffer = io.BytesIO()
    striped().save(buffer, "PNG")
    for data in (b"", b"no picture", buffer.getvalue()[:100]):
        with pytest.raises(UserInputError, match=rf"a picture of {len(data)} bytes cannot be decoded"):
            decode_image(data)


def test_a_text_document_may_be_longer_than_all_else(processor: ItemProcessor) -> None:
    longer = processor.limited(16)
    settings = longer.settings()
    longer.prompts.passage_length = 40
    text = "a red pet " * 50
    lengths = [
        int(bucket_of(longer, entry).attention_mask.sum()) - (POSITIONS - 1 if entry.item.image else 0)
        for entry in (Candidate(Item(text), "77:1"), Candidate(Item(text, RED), "77:2"), Query(Item(text)))
    ]
    assert lengths == [40, 16, 16]
    assert longer.settings() != settings, "vectors of another limit are others"
    assert longer.limited(16).settings() == settings
