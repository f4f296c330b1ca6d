"""Every family of multimodal LLMs: contracts, pictures as transformers prepares them, checkpoints, training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_table import results, table, written
from family_worlds import ENTRIES, SIZE, WORLDS, drawn
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from lightning_mmembed import Item, MLLMEncoder, RetrievalModule
from lightning_mmembed.encoders.contracts import Contract
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Query
from lightning_mmembed.retrieval.embed import encoder_fingerprint

Checkpoint = Callable[[str], Path]
FAMILIES = list(WORLDS)


@pytest.fixture(scope="module")
def outcomes(family_checkpoint: Checkpoint) -> Callable[[str], list[Contract]]:
    """What the contracts say of a family, asked once."""
    return lru_cache(lambda name: results(family_checkpoint(name), name))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_every_contract_with_either_attention_and_pooling(
    outcomes: Callable[[str], list[Contract]], name: str
) -> None:
    assert len(outcomes(name)) == 2 * 2 * 7
    assert [contract for contract in outcomes(name) if not contract.passed] == []


def test_the_table_in_the_documentation_is_what_the_families_do(outcomes: Callable[[str], list[Contract]]) -> None:
    assert written() == table(outcomes), "run `python tests/encoders/family_table.py` to write it anew"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_does_not_depend_on_batch_mates_order_or_buckets(family_checkpoint: Checkpoint, name: str) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name))
    alone = torch.cat([encoder.encode([entry]) for entry in ENTRIES])
    assert float(torch.pdist(alone).min()) > 1e-3, "the items must differ for the comparison to mean something"
    torch.testing.assert_close(encoder.encode(ENTRIES), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(ENTRIES[::-1]).flip(0), alone, atol=1e-5, rtol=0)


# --- pictures as transformers prepares them -------------------------------------------------------------------------

#: What makes transformers' image processor give the one view that an adapter takes.
ONE_VIEW: dict[str, dict[str, Any]] = {
    "idefics3": {"do_image_splitting": False},
    "smolvlm": {"do_image_splitting": False},
    "gemma3": {"do_pan_and_scan": False},
    "internvl": {"crop_to_patches": False},
}


@pytest.mark.parametrize("size", [(90, 50), (50, 90), (SIZE, SIZE), (20, 17)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_sees_the_pixels_of_transformers_own_image_processor(
    family_checkpoint: Checkpoint, name: str, size: tuple[int, int]
) -> None:
    path = family_checkpoint(name)
    encoder = MLLMEncoder.from_pretrained(path)
    seen: list[torch.Tensor] = []
    tower = encoder.backbone.get_submodule(encoder.family.vision)
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    encoder.encode_document([drawn(size)])
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    theirs = processor(images=drawn(size), return_tensors="pt", **ONE_VIEW.get(name, {}))["pixel_values"]
    if name.startswith("llava"):
        theirs = theirs[:, 0]  # the global view is the first of the AnyRes tiles
    torch.testing.assert_close(seen[0], theirs.view(seen[0].shape), atol=1e-5, rtol=0)


#: Transformers' processor of texts and pictures, its arguments, and what stands for a picture in a text.
PROCESSORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2_vl": ("Qwen2VLProcessor", {}, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", {}, "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": ("Qwen3VLProcessor", {}, "<|vision_start|><|image_pad|><|vision_end|>"),
    "idefics3": ("Idefics3Processor", {"image_seq_len": 4}, "<image>"),
    "smolvlm": ("Idefics3Processor", {"image_seq_len": 4}, "<image>"),
    "gemma3": ("Gemma3Processor", {"image_seq_length": 4}, "<start_of_image>"),
    "internvl": ("InternVLProcessor", {"image_seq_length": 4}, "<IMG_CONTEXT>"),
}


def prepared_by_transformers(name: str, path: Path, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    kind, arguments, _ = PROCESSORS[name]

    class WithoutVideos(getattr(transformers, kind)):  # type: ignore[misc]
        """Made without its processor of videos, which would need torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    pictures = AutoImageProcessor.from_pretrained(path, backend="pil")
    processor = WithoutVideos(pictures, AutoTokenizer.from_pretrained(path), **arguments)
    return dict(
        processor(text=text, images=images, return_tensors="pt", add_special_tokens=False, **ONE_VIEW.get(name, {}))
    )


@pytest.mark.parametrize("size", [(90, 50), (20, 60)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_picture_is_written_as_transformers_own_processor_writes_it(
    family_checkpoint: Checkpoint, name: str, size: tuple[int, int]
) -> None:
    path = family_checkpoint(name)
    theirs = prepared_by_transformers(name, path, PROCESSORS[name][2], [drawn(size)])
    assert MLLMEncoder.from_pretrained(path).family.picture(drawn(size)).token_ids == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_states_of_a_causal_encoder_are_those_of_plain_transformers(
    family_checkpoint: Checkpoint, name: str
) -> None:
    path = family_checkpoint(name)
    text = f"Find it. {PROCESSORS[name][2]} is green? {PROCESSORS[name][2]}"
    images = [drawn(), drawn((30, 60), "gold")]
    theirs = prepared_by_transformers(name, path, text, images)
    encoder = MLLMEncoder.from_pretrained(path, bidirectional=False).eval()
    own = [encoder.family.picture(image).inputs for image in images]
    pictures = {key: torch.cat([inputs[key] for inputs in own]) for key in own[0]}
    with torch.no_grad():
        expected = AutoModel.from_pretrained(path).eval()(**theirs, use_cache=False).last_hidden_state
        states = encoder.family.states(encoder.backbone, theirs["input_ids"], theirs["attention_mask"], pictures)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_llava_onevision_sees_a_square_picture_as_transformers_sees_one_of_several(
    family_checkpoint: Checkpoint,
) -> None:
    path = family_checkpoint("llava_onevision")
    images = [drawn((60, 60)), drawn((45, 45), "gold")]
    encoder = MLLMEncoder.from_pretrained(path, bidirectional=False).eval()
    own = [encoder.family.picture(image) for image in images]
    ids = torch.tensor([[5, *own[0].token_ids, 6, *own[1].token_ids, 7]])
    theirs = AutoImageProcessor.from_pretrained(path, backend="pil")(images=[images], return_tensors="pt")
    pixels = {"pixel_values": torch.cat([picture.inputs["pixel_values"] for picture in own])}
    with torch.no_grad():
        model = AutoModel.from_pretrained(path).eval()
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **theirs).last_hidden_state
        states = encoder.family.states(encoder.backbone, ids, torch.ones_like(ids), pixels)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_a_picture_of_a_causal_gemma_sees_itself_in_both_directions(family_checkpoint: Checkpoint, name: str) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name), bidirectional=False)
    masks: list[Any] = []
    encoder.backbone.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    inputs = encoder.processor([Query(Item("green", drawn()))])
    encoder.encode_inputs(inputs)
    mask = masks[0]["full_attention"] if isinstance(masks[0], dict) else masks[0]
    is_image = inputs.buckets[0].input_ids[0] == encoder.family.image_token_id
    places = torch.arange(len(is_image))
    expected = (places[:, None] >= places) | (is_image[:, None] & is_image)
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_keeps_the_shape_of_a_picture_within_the_pixels_allowed(family_checkpoint: Checkpoint, name: str) -> None:
    family = MLLMEncoder.from_pretrained(family_checkpoint(name)).family
    grids = {
        size: family.picture(drawn(size)).inputs["image_grid_thw"][0].tolist()
        for size in ((64, 16), (16, 64), (2000, 2000), (16, 16))
    }
    assert grids == {(64, 16): [1, 2, 8], (16, 64): [1, 8, 2], (2000, 2000): [1, 4, 4], (16, 16): [1, 4, 4]}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_a_picture_too_long_for_qwen_is_named(family_checkpoint: Checkpoint, name: str) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name))
    with pytest.raises(UserInputError, match=r"2010 x 10 pixels is refused by Qwen2VLImageProcessor.*: .*ratio"):
        encoder.encode_document([Image.new("RGB", (2010, 10))])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_special_token_in_a_text_is_plain_text_in_every_family(family_checkpoint: Checkpoint, name: str) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name))
    for literal in WORLDS[name].special.values():
        entries = [Item(f"a {literal} pet"), Item(f"a {literal} pet", drawn()), Query(Item("a pet"), literal)]
        special = int(encoder.processor.prompts.tokenizer.convert_tokens_to_ids(literal))
        ids = [encoder.processor([entry]).buckets[0].input_ids[0].tolist() for entry in entries]
        assert [row.count(special) for row in ids] == [0, encoder.family.picture(drawn()).token_ids.count(special), 0]
        assert torch.isfinite(encoder.encode(entries)).all()


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "aya_vision"])
def test_a_saved_encoder_of_any_family_gives_the_same_vectors(
    family_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    encoder = MLLMEncoder.from_pretrained(family_checkpoint(name), pooling="last", bidirectional=False, max_length=40)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    encoder.save_pretrained(tmp_path)
    loaded = MLLMEncoder.from_pretrained(tmp_path)
    assert loaded.settings == encoder.settings
    assert encoder_fingerprint(loaded) == encoder_fingerprint(encoder)
    assert torch.equal(loaded.encode(ENTRIES), encoder.encode(ENTRIES))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_without_the_special_tokens_of_the_model_is_named(
    family_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    path = shutil.copytree(family_checkpoint(name), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ordinary = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_without_added(tokenizer.backend_tokenizer), eos_token="</s>", pad_token="<pad>"
    )
    ordinary.save_pretrained(path)
    with pytest.raises(UserInputError, match=r"other': its tokenizer has no special token \S+, which stands for"):
        MLLMEncoder.from_pretrained(path)


def _without_added(tokenizer: Any) -> Any:
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in ("</s>", "<pad>")]
    return type(tokenizer).from_str(json.dumps(content))


# --- training -------------------------------------------------------------------------------------------------------


QUERIES: list[Query] = [Query(Item(text), "Find it.") for text in ("a red pet", "which is blue?", "the gold one")]
ANSWERS = {
    "texts": [Item("a red ellipse"), Item("a blue rectangle"), Item("gold")],
    "pictures": [Item(image=drawn(colour=colour)) for colour in ("red", "blue", "gold")],
    "both kinds": [Item("a red ellipse"), Item(image=drawn(colour="blue")), Item("gold", drawn((30, 80), "gold"))],
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_steps_of_every_family_make_the_loss_fall(family_checkpoint: Checkpoint, name: str, kind: str) -> None:
    module = RetrievalModule(MLLMEncoder.from_pretrained(family_checkpoint(name)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    inputs = module.encoder.processor([*QUERIES, *ANSWERS[kind]])
    losses = []
    for _ in range(6):
        queries, candidates = module(inputs).split(3)
        loss = module.loss(queries, candidates, torch.arange(3), torch.zeros(3, 3, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
