"""Out to the layout of the released MM-Embed and back, and joined from the two checkpoints that it began as."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_worlds import CLIP, WORLDS, World, build, llava, siglip
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

from lightning_mmembed import Item, MLLMEncoder, Query
from lightning_mmembed.encoders import mm_embed, released
from lightning_mmembed.encoders.prompts import Entry
from lightning_mmembed.errors import UserInputError

GOLDEN = Path(__file__).parent.parent / "golden" / "mm_embed_tiny"
CHECKPOINT = GOLDEN / "checkpoint"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]
    if case["expect"] == "ok" and case["checkpoint"] == "checkpoint" and "left-pad-quirk" not in case["tags"]
]

# PIL says this of a palette with transparent colours; the reference drops the transparency, and so do we.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")


def entries_of(case: dict[str, Any]) -> list[Entry]:
    items = [
        Item(given.get("txt"), (GOLDEN / given["img"]).read_bytes() if "img" in given else None)
        for given in case["inputs"]
    ]
    return [Query(item, case["instruction"]) if case["is_query"] else item for item in items]


def vectors_of_all_calls(encoder: MLLMEncoder) -> dict[str, Tensor]:
    return {case["id"]: encoder.encode(entries_of(case), max_length=case["max_length"]) for case in CASES}


@pytest.fixture(scope="module")
def encoder() -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(CHECKPOINT)


# --- the layout -----------------------------------------------------------------------------------------------------


def test_the_released_layout_comes_out_as_it_went_in(encoder: MLLMEncoder, tmp_path: Path) -> None:
    directory = encoder.save_released(tmp_path / "released")
    theirs, ours = load_file(CHECKPOINT / "model.safetensors"), load_file(directory / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reloaded = MLLMEncoder.from_pretrained(directory)
    assert reloaded.settings == encoder.settings
    again = vectors_of_all_calls(reloaded)
    assert all(torch.equal(again[name], vector) for name, vector in vectors_of_all_calls(encoder).items())


#: Where a file says more than the release, or something else on purpose: the two fields that name other files.
OURS = {"_name_or_path", "auto_map", "retriever"}


@pytest.mark.parametrize("name", ["config.json", "retriever/config.json"])
def test_the_configuration_has_every_field_of_the_release(encoder: MLLMEncoder, tmp_path: Path, name: str) -> None:
    directory = encoder.save_released(tmp_path / "released")
    theirs, ours = (json.loads((root / name).read_text()) for root in (CHECKPOINT, directory))
    assert theirs.keys() - ours.keys() <= {"_name_or_path", "torch_dtype"}
    for field in theirs.keys() & ours.keys() - OURS:
        if isinstance(theirs[field], dict):
            # The release's text_config is that of another model and not used; ours is the one in use.
            unlike = {"rope_theta", "vocab_size"} if name == "config.json" else {"sliding_window"}
            both = theirs[field].keys() & ours[field].keys() - unlike
            assert {key: ours[field][key] for key in both} == {key: theirs[field][key] for key in both}
        else:
            assert ours[field] == theirs[field], field
    assert ours["architectures"] == theirs["architectures"]


def test_a_trained_encoder_keeps_its_vectors_in_the_released_layout(tmp_path: Path) -> None:
    trained = MLLMEncoder.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    reloaded = MLLMEncoder.from_pretrained(trained.save_released(tmp_path / "released"))
    entries = [entry for case in CASES[:12] for entry in entries_of(case)]
    assert torch.equal(reloaded.encode(entries), trained.encode(entries))


def test_lora_is_merged_into_the_released_layout(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        adapted = MLLMEncoder.from_pretrained(CHECKPOINT, lora={"r": 4})
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, and so the whole of LoRA
                parameter.add_(0.02)
    directory = adapted.save_released(tmp_path / "released")
    assert load_file(directory / "model.safetensors").keys() == load_file(CHECKPOINT / "model.safetensors").keys()
    reloaded = MLLMEncoder.from_pretrained(directory)
    entries = [entry for case in CASES[:12] for entry in entries_of(case)]
    vectors = adapted.encode(entries)
    assert (vectors - MLLMEncoder.from_pretrained(CHECKPOINT).encode(entries)).abs().max() > 1e-3
    torch.testing.assert_close(reloaded.encode(entries), vectors, rtol=0, atol=1e-5)
    assert any("lora_" in name for name, _ in adapted.named_parameters()), "the encoder itself is left as it was"


def test_a_text_embedder_of_the_release_is_named_and_not_copied() -> None:
    fields = mm_embed.NV_EMBED_V1["text_config"]
    pooling = {"num_latents": 512, "num_heads": 8, "head_dim": 4096}
    assert released.is_nv_embed_v1(released.retriever_config(MistralConfig(**fields), pooling))
    other = released.retriever_config(MistralConfig(**fields | {"num_hidden_layers": 16}), pooling)
    assert not released.is_nv_embed_v1(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pooling='mean', the released MM-Embed 'latent-attention'"),
        ({"pooling": "latent-attention"}, "prompts='plain', the released MM-Embed 'mm-embed'"),
    ],
)
def test_an_encoder_of_another_make_is_not_passed_off_as_the_release(
    tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    other = MLLMEncoder.from_pretrained(tiny_checkpoint, **options)
    with pytest.raises(UserInputError, match=message):
        other.save_released(tmp_path / "released")
    assert not (tmp_path / "released").exists()


def llava_next_world(text: dict[str, Any], **changed: Any) -> World:
    """A LLaVA-NeXT with Mistral like MM-Embed's, but for what is given."""

    def config(ids: dict[str, int]) -> dict[str, Any]:
        whole = llava("llava_next", "mistral", CLIP, -2, "default")(ids) | changed
        return whole | {"text_config": whole["text_config"] | text}

    return World(config, WORLDS["llava_next"].special, WORLDS["llava_next"].pictures)


@pytest.mark.parametrize(
    ("text", "changed", "message"),
    [
        ({}, {"vision_config": siglip()}, "vision tower='siglip_vision_model', the released MM-Embed 'clip_vision"),
        ({"head_dim": 8}, {}, "width of a head=8, the released MM-Embed 16"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            {},
            "rotary positions='linear', the released MM-Embed 'default'",
        ),
        ({}, {"multimodal_projector_bias": False}, "bias of the projector=False, the released MM-Embed True"),
    ],
)
def test_an_encoder_that_the_layout_has_no_fields_for_is_refused(
    tmp_path: Path, text: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    checkpoint = build(tmp_path / "checkpoint", llava_next_world(text, **changed))
    (checkpoint / "mmembed.json").write_text(json.dumps({"prompts": "mm-embed"}))
    other = MLLMEncoder.from_pretrained(checkpoint, pooling="latent-attention")
    with pytest.raises(UserInputError, match=message):
        other.save_released(tmp_path / "released")
    assert not (tmp_path / "released").exists()


def test_an_encoder_like_those_with_all_the_fields_comes_back_from_the_layout(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "checkpoint", llava_next_world({}))
    (checkpoint / "mmembed.json").write_text(json.dumps({"prompts": "mm-embed"}))
    other = MLLMEncoder.from_pretrained(checkpoint, pooling="latent-attention")
    again = MLLMEncoder.from_pretrained(other.save_released(tmp_path / "released"))
    assert torch.equal(again.encode_document(["a red bus"]), other.encode_document(["a red bus"]))


@pytest.mark.parametrize("named", [{}, {"retriever": None}])
def test_a_release_that_names_no_text_embedder_is_refused(tmp_path: Path, named: dict[str, Any]) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    config = json.loads((CHECKPOINT / "config.json").read_text())
    del config["retriever"]
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(UserInputError, match=r"its config\.json names no text embedder: retriever=None; write 'nvidia"):
        MLLMEncoder.from_pretrained(tmp_path / "checkpoint")


def test_a_one_sided_encoder_is_not_passed_off_as_the_release(tmp_path: Path) -> None:
    other = MLLMEncoder.from_pretrained(CHECKPOINT, bidirectional=False)
    with pytest.raises(UserInputError, match="bidirectional=False, the released MM-Embed True"):
        other.save_released(tmp_path / "released")


def test_what_stands_in_a_directory_is_not_written_over(encoder: MLLMEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="is in use; give a new or an empty one"):
        encoder.save_released(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- from its parts -------------------------------------------------------------------------------------------------


def write_nv_embed(directory: Path, tensors: dict[str, Tensor]) -> Path:
    """The text embedder of the tiny release in the layout of NV-Embed-v1."""
    directory.mkdir()
    text = {"embedding_model." + k.removeprefix("language_model."): v for k, v in tensors.items() if "language_" in k}
    latent = {k: v for k, v in tensors.items() if k.startswith("latent_attention_model.")}
    save_file(text | latent, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(CHECKPOINT / "retriever" / "config.json", directory)
    return directory


def llava_next_of(tensors: dict[str, Tensor]) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with the tiny release's tower and projector, and a causal language model of its own."""
    fields = json.loads((CHECKPOINT / "config.json").read_text())
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**fields["vision_config"]),
        text_config=MistralConfig(**fields["text_config"]),
        image_grid_pinpoints=fields["image_grid_pinpoints"],
        image_token_index=fields["image_token_index"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlavaNextForConditionalGeneration(config)
    state = model.state_dict()
    for key, value in tensors.items():
        if key.startswith(("vision_tower.", "multi_modal_projector.", "image_newline")):
            names = (f"model.{key}", f"model.{key.replace('.vision_model', '')}")  # by version of transformers
            state[next(name for name in names if name in state)].copy_(value)
    return model


def write_llava_next(directory: Path, tensors: dict[str, Tensor], newer_names: bool) -> Path:
    model = llava_next_of(tensors)
    model.save_pretrained(directory)
    if newer_names:
        save_file(dict(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json"):
        shutil.copy(CHECKPOINT / name, directory)
    return directory


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.mark.parametrize("newer_names", [False, True])
def test_the_two_parts_of_the_release_give_the_vectors_of_the_release(
    tensors: dict[str, Tensor], tmp_path: Path, newer_names: bool
) -> None:
    llava_next = write_llava_next(tmp_path / "llava", tensors, newer_names)
    written = load_file(llava_next / "model.safetensors")
    assert any(name.endswith("lm_head.weight") for name in written)
    embedder = next(value for name, value in written.items() if "language_model" in name and "embed_tokens" in name)
    assert embedder.shape != tensors["language_model.embed_tokens.weight"].shape
    joined = MLLMEncoder.from_parts(llava_next, write_nv_embed(tmp_path / "nv", tensors))
    assert joined.processor.prompts.max_length == 128
    for case in CASES:
        vectors = joined.encode(entries_of(case), max_length=case["max_length"])
        torch.testing.assert_close(vectors, EXPECTED[case["id"]], rtol=0, atol=5e-6)
    ours = load_file(joined.save_released(tmp_path / "released") / "model.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)


def test_training_begins_at_the_parts_with_lora_and_a_frozen_tower(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    joined = MLLMEncoder.from_parts(
        write_llava_next(tmp_path / "llava", tensors, False), write_nv_embed(tmp_path / "nv", tensors), lora={}
    )
    trained = {name for name, parameter in joined.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert all("lora_" in name for name in trained if "language_model" in name)
    assert any("multi_modal_projector" in name for name in trained)
    case = CASES[0]
    torch.testing.assert_close(joined.encode(entries_of(case)), EXPECTED[case["id"]], rtol=0, atol=5e-6)


def test_the_parts_give_vectors_cut_to_their_first_numbers(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    llava_next, nv_embed = (
        write_llava_next(tmp_path / "llava", tensors, False),
        write_nv_embed(tmp_path / "nv", tensors),
    )
    joined = MLLMEncoder.from_parts(llava_next, nv_embed, truncate_dim=4)
    assert joined.settings["truncate_dim"] == joined.embedding_dim == 4
    case = CASES[0]
    expected = torch.nn.functional.normalize(EXPECTED[case["id"]][:, :4], dim=1)
    torch.testing.assert_close(joined.encode(entries_of(case)), expected, rtol=0, atol=5e-5)


def test_parts_in_several_files_are_read_whole(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    nv_embed = write_nv_embed(tmp_path / "nv", tensors)
    whole = load_file(nv_embed / "model.safetensors")
    (nv_embed / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, nv_embed / file, metadata={"format": "pt"})
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (nv_embed / "model.safetensors.index.json").write_text(json.dumps(index))
    joined = MLLMEncoder.from_parts(write_llava_next(tmp_path / "llava", tensors, False), nv_embed)
    case = CASES[0]
    torch.testing.assert_close(joined.encode(entries_of(case)), EXPECTED[case["id"]], rtol=0, atol=5e-6)


@pytest.mark.parametrize("newer_names", [False, True])
def test_the_language_model_that_is_replaced_is_not_read(
    tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer_names: bool
) -> None:
    llava_next = write_llava_next(tmp_path / "llava", tensors, newer_names)
    read: list[str] = []

    class Spy:
        def __init__(self, file: Path, framework: str) -> None:
            self.file, self.weights = file, safe_open(file, framework=framework)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *error: object) -> None:
            self.weights.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.weights.keys())

        def get_tensor(self, name: str) -> Tensor:
            if self.file.is_relative_to(llava_next):
                read.append(name)
            value: Tensor = self.weights.get_tensor(name)
            return value

    monkeypatch.setattr(mm_embed, "safe_open", Spy)
    MLLMEncoder.from_parts(llava_next, write_nv_embed(tmp_path / "nv", tensors))
    there = load_file(llava_next / "model.safetensors")
    assert {name for name in there if "language_model" not in name and "lm_head" not in name} == set(read)
    assert len(set(read)) == len(read) < len(there)


def test_a_file_with_nothing_but_the_language_model_is_not_needed(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    llava_next = write_llava_next(tmp_path / "llava", tensors, False)
    whole = load_file(llava_next / "model.safetensors")
    (llava_next / "model.safetensors").unlink()
    files = {key: f"{'language' if 'language_model' in key or 'lm_head' in key else 'rest'}" for key in whole}
    rest = {key: value for key, value in whole.items() if files[key] == "rest"}
    save_file(rest, llava_next / "rest.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {key: f"{file}.safetensors" for key, file in files.items()}}
    (llava_next / "model.safetensors.index.json").write_text(json.dumps(index))
    joined = MLLMEncoder.from_parts(llava_next, write_nv_embed(tmp_path / "nv", tensors))
    case = CASES[0]
    torch.testing.assert_close(joined.encode(entries_of(case)), EXPECTED[case["id"]], rtol=0, atol=5e-6)


def test_parts_of_an_unknown_type_are_refused_before_any_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"^dtype='float23' is no type of weights"):
        MLLMEncoder.from_parts(tmp_path / "llava", tmp_path / "nv", dtype="float23")


def test_parts_that_are_not_what_they_should_be_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    llava_next = write_llava_next(tmp_path / "llava", tensors, False)
    nv_embed = write_nv_embed(tmp_path / "nv", tensors)
    with pytest.raises(UserInputError, match=r"nv_embed='.*llava' is no NV-Embed checkpoint"):
        MLLMEncoder.from_parts(llava_next, llava_next)
    with pytest.raises(UserInputError, match=r"checkpoint '.*absent' cannot be read"):
        MLLMEncoder.from_parts(tmp_path / "absent", nv_embed)
    (nv_embed / "model.safetensors").unlink()
    with pytest.raises(UserInputError, match=r"checkpoint '.*nv' has no model\.safetensors"):
        MLLMEncoder.from_parts(llava_next, nv_embed)


def test_parts_that_lack_a_weight_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    llava_next = write_llava_next(tmp_path / "llava", tensors, False)
    short = {k: v for k, v in tensors.items() if k != "language_model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(UserInputError, match=r"llava with .*nv' .* lacks 1 weights, such as language_model\.layers\.1"):
        MLLMEncoder.from_parts(llava_next, write_nv_embed(tmp_path / "nv", short))


def test_another_model_is_no_llava_next(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserInputError, match=r"llava_next='.*other' has model_type='bert'; give a LLaVA-NeXT"):
        MLLMEncoder.from_parts(other, write_nv_embed(tmp_path / "nv", tensors))


def test_a_joined_encoder_is_saved_and_loaded_like_any_other(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    joined = MLLMEncoder.from_parts(
        write_llava_next(tmp_path / "llava", tensors, False), write_nv_embed(tmp_path / "nv", tensors), max_length=40
    )
    joined.save_pretrained(tmp_path / "saved")
    loaded = MLLMEncoder.from_pretrained(tmp_path / "saved")
    entries: list[Entry] = [Item(image=Image.new("RGB", (9, 5), "red")), Query(Item("a red bus " * 40), "Find it")]
    assert loaded.settings == joined.settings
    assert torch.equal(loaded.encode(entries), joined.encode(entries))
