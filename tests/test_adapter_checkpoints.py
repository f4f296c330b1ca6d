"""Checkpoints that hold only what was trained: saved, merged, reloaded, resumed, and refused on another base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import composed, tiny_paths
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import ARCHITECTURE, tiny_module, tiny_trainer

from lightning_mmembed import Item, MBEIRDataModule, MLLMEncoder, RetrievalModule
from lightning_mmembed.checkpoints import FROZEN, SETTINGS, load_encoder_weights
from lightning_mmembed.cli import evaluate, train
from lightning_mmembed.encoders.adapters import ADAPTER_FILE
from lightning_mmembed.encoders.tiny import build_tiny_llava_next
from lightning_mmembed.errors import UserInputError

TEXTS = ["a red ellipse", "the answer is gold, triangle"]


def adapted(checkpoint: Path, seed: int = 0, **arguments: Any) -> MLLMEncoder:
    """An encoder with LoRA in which everything that is trained has been moved from where it starts."""
    torch.manual_seed(seed)
    arguments = {"max_length": 48, "pooling": "latent-attention", "lora": {}, **arguments}
    encoder = MLLMEncoder.from_pretrained(checkpoint, **arguments)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return encoder


def module_with_lora(checkpoint: Path, **arguments: Any) -> RetrievalModule:
    torch.manual_seed(3)
    return tiny_module(checkpoint, lora={}, **arguments)


def fit(module: RetrievalModule, shards: Path, directory: Path, ckpt_path: Path | None = None, **steps: int) -> None:
    trainer = tiny_trainer(directory, limit_val_batches=0, **steps)
    trainer.fit(module, MBEIRDataModule(shards, batch_size=8, seed=2), ckpt_path=ckpt_path)
    trainer.save_checkpoint(directory / "last.ckpt")


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def base_of_another_size(tmp_path: Path) -> Path:
    return build_tiny_llava_next(tmp_path / "other", TEXTS * 40, **{**ARCHITECTURE, "vocab_size": 300, "seed": 5})


def another_base(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint in which one frozen weight is another one."""
    path = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(path / "model.safetensors")
    (key,) = (key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight"))
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


# --- saved encoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "latent-attention"])
@pytest.mark.parametrize("form", ["adapter", "full", "merged"])
def test_every_saved_form_gives_the_same_vectors(
    tiny_checkpoint: Path, tmp_path: Path, form: str, pooling: str
) -> None:
    encoder = adapted(tiny_checkpoint, pooling=pooling)
    expected = encoder.encode_document(TEXTS)
    path = save(encoder, tmp_path / "saved", form)
    torch.testing.assert_close(encoder.encode_document(TEXTS), expected, rtol=0, atol=0)  # saving changes nothing
    loaded = MLLMEncoder.from_pretrained(path)
    found = loaded.encode_document(TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if form == "merged" else 0)
    assert float((found * expected).sum(-1).min()) >= 0.999999
    assert (loaded.lora is None) == (form == "merged")
    if form != "merged":
        assert loaded.settings == encoder.settings
        own = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert own == {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def save(encoder: MLLMEncoder, path: Path, form: str) -> Path:
    return encoder.save_adapter(path) if form == "adapter" else encoder.save_pretrained(path, merge=form == "merged")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "full", "merged"])
def test_a_fresh_process_gives_the_same_vectors(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    encoder = adapted(tiny_checkpoint)
    path = save(encoder, tmp_path / "saved", form)
    found = in_a_fresh_process(path, tmp_path)
    expected = encoder.encode_document(TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((found * expected).sum(-1).min()) >= 0.999999


def in_a_fresh_process(path: Path | str, tmp_path: Path, **environment: str) -> Tensor:
    code = (
        "import sys, numpy as np; from lightning_mmembed import MLLMEncoder\n"
        f"np.save(sys.argv[2], MLLMEncoder.from_pretrained(sys.argv[1]).encode_document({TEXTS!r}).numpy())"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "vectors.npy")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return torch.from_numpy(np.load(tmp_path / "vectors.npy"))


def test_an_adapter_holds_what_is_trained_and_the_name_of_its_base(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = adapted(tiny_checkpoint)
    path = encoder.save_adapter(tmp_path / "saved")
    assert sorted(file.name for file in path.iterdir()) == [ADAPTER_FILE, "mmembed.json"]
    held = load_file(path / ADAPTER_FILE)
    assert held.keys() == {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    settings = json.loads((path / "mmembed.json").read_text())
    assert settings["base"] == {"path": str(tiny_checkpoint), "revision": None}
    assert settings["lora"] == {"r": 8, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": None}


@pytest.mark.slow
def test_an_adapter_finds_its_base_by_hub_id_and_revision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two revisions lie in the cache of the hub; ``main`` is not the one that the adapter was trained on."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_checkpoint, cached / "snapshots" / ("a" * 40))
    shutil.copytree(another_base(tiny_checkpoint, tmp_path), cached / "snapshots" / ("b" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b" * 40)
    encoder = adapted(tiny_checkpoint)
    path = encoder.save_adapter(tmp_path / "saved")
    settings = json.loads((path / "mmembed.json").read_text())
    settings["base"] = {"path": "someone/tiny", "revision": "a" * 40}
    (path / "mmembed.json").write_text(json.dumps(settings))
    found = in_a_fresh_process(path, tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    torch.testing.assert_close(found, encoder.encode_document(TEXTS), rtol=0, atol=1e-6)
    code = (
        "import sys; from lightning_mmembed import MLLMEncoder\nprint(MLLMEncoder.from_pretrained('someone/tiny').base)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == repr({"path": "someone/tiny", "revision": "b" * 40})


def test_an_adapter_of_an_encoder_without_lora_holds_all_but_the_frozen_tower(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    encoder = adapted(tiny_checkpoint, lora=None, freeze_vision=True)
    path = encoder.save_adapter(tmp_path / "saved")
    held = load_file(path / ADAPTER_FILE)
    assert not any("vision_tower" in name for name in held)
    assert any("language_model" in name for name in held)
    found = MLLMEncoder.from_pretrained(path).encode_document(TEXTS)
    assert torch.equal(found, encoder.encode_document(TEXTS))


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize(("lora", "freeze_vision"), [({}, False), ({}, None), (None, True), (None, None)])
def test_what_was_trained_is_trained_again_and_gives_the_same_vectors(
    tiny_checkpoint: Path, tmp_path: Path, lora: Any, freeze_vision: bool | None, form: str
) -> None:
    encoder = adapted(tiny_checkpoint, lora=lora, freeze_vision=freeze_vision, dtype="bfloat16")
    again = MLLMEncoder.from_pretrained(save(encoder, tmp_path / "saved", form), dtype="bfloat16")
    assert again.settings == encoder.settings
    kinds = [{name: (p.requires_grad, p.dtype) for name, p in e.named_parameters()} for e in (encoder, again)]
    assert kinds[0] == kinds[1]
    entries = [Item("a red ellipse"), Item(image=Image.new("RGB", (40, 24), "red"))]
    assert torch.equal(again.encode(entries), encoder.encode(entries))


def test_a_directory_is_named_as_seen_from_its_adapter(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "here" / "base")
    encoder = adapted(tmp_path / "here" / "base")
    path = encoder.save_adapter(tmp_path / "here" / "saved")
    settings = json.loads((path / "mmembed.json").read_text())
    settings["base"]["path"] = "../base"
    (path / "mmembed.json").write_text(json.dumps(settings))
    (tmp_path / "elsewhere" / "at").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "at")
    again = MLLMEncoder.from_pretrained(path)
    assert torch.equal(again.encode_document(TEXTS), encoder.encode_document(TEXTS))
    second = again.save_adapter(tmp_path / "second")  # its base is found from there too
    assert torch.equal(MLLMEncoder.from_pretrained(second).encode_document(TEXTS), encoder.encode_document(TEXTS))
    shutil.move(tmp_path / "here" / "base", tmp_path / "elsewhere" / "base")  # where the working directory would see it
    with pytest.raises(UserInputError, match=r"was trained on '.*saved/\.\./base', which is not there"):
        MLLMEncoder.from_pretrained(path)


def test_an_adapter_of_a_loaded_adapter_names_the_first_base(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = adapted(tiny_checkpoint).save_adapter(tmp_path / "one")
    again = MLLMEncoder.from_pretrained(first, lora={"r": 8})
    second = again.save_adapter(tmp_path / "two")
    shutil.rmtree(first)
    assert torch.equal(MLLMEncoder.from_pretrained(second).encode_document(TEXTS), again.encode_document(TEXTS))


def test_an_adapter_gives_the_pooling_up_where_another_one_is_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = adapted(tiny_checkpoint)
    path = encoder.save_adapter(tmp_path / "saved")
    other = MLLMEncoder.from_pretrained(path, pooling="mean")
    expected = adapted(tiny_checkpoint, pooling="mean")
    own = encoder.state_dict()
    expected.load_state_dict({name: own[name] for name in expected.state_dict()})
    assert torch.equal(other.encode_document(TEXTS), expected.encode_document(TEXTS))


def test_a_base_in_bfloat16_is_the_base_of_an_adapter_trained_in_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    encoder = adapted(tiny_checkpoint)
    loaded = MLLMEncoder.from_pretrained(encoder.save_adapter(tmp_path / "saved"), dtype="bfloat16")
    cosines = (loaded.encode_document(TEXTS) * encoder.encode_document(TEXTS)).sum(-1)
    assert 0.9995 < float(cosines.min()) < 0.9999999


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_directory_in_use_is_refused_and_left_as_it_was(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="is in use; give a new or an empty one"):
        save(adapted(tiny_checkpoint), tmp_path, form)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_is_cut_short_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = adapted(tiny_checkpoint)

    def cut_short(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoder.family.image_processor, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        encoder.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# --- checkpoints of the Trainer -------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_is_trained_and_an_optimizer_of_it(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module = module_with_lora(tiny_checkpoint)
    before = weights(module.encoder)
    fit(module, tiny_shards, tmp_path, max_steps=3)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = [name for name, parameter in module.encoder.named_parameters() if parameter.requires_grad]
    assert content["state_dict"].keys() == {f"encoder.{name}" for name in trained}
    assert content[FROZEN].keys() == before.keys() - set(trained)
    held = content["optimizer_states"][0]["state"]
    shapes = [tuple(module.encoder.get_parameter(name).shape) for name in trained]
    assert [tuple(state["exp_avg"].shape) for state in held.values()] == shapes
    after = weights(module.encoder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trained)


def test_a_run_resumed_with_lora_ends_with_the_weights_of_one_that_was_not_interrupted(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = module_with_lora(tiny_checkpoint)
    fit(whole, tiny_shards, tmp_path / "whole", max_epochs=2)
    first = module_with_lora(tiny_checkpoint)
    fit(first, tiny_shards, tmp_path / "first", max_epochs=1)
    resumed = module_with_lora(tiny_checkpoint)
    torch.manual_seed(77)
    with torch.no_grad():  # whatever it starts with
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.uniform_()
    fit(resumed, tiny_shards, tmp_path / "first", tmp_path / "first" / "last.ckpt", max_epochs=2)
    expected, found = weights(whole.encoder), weights(resumed.encoder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    base = weights(MLLMEncoder.from_pretrained(tiny_checkpoint, lora={}))
    frozen = [name for name, parameter in resumed.encoder.named_parameters() if not parameter.requires_grad]
    assert all(torch.equal(found[name], base[name]) for name in frozen)


def test_a_checkpoint_of_another_base_is_refused(tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fit(module_with_lora(tiny_checkpoint), tiny_shards, tmp_path, max_steps=1)
    other = module_with_lora(another_base(tiny_checkpoint, tmp_path))
    before = weights(other.encoder)
    told = r"trained on another base: 1 of \d+ weights .* such as backbone.language_model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserInputError, match=f"the checkpoint was {told}"):
        fit(other, tiny_shards, tmp_path / "resumed", tmp_path / "last.ckpt", max_steps=2)
    with pytest.raises(UserInputError, match=f"ckpt_path='.*last.ckpt' was {told}"):
        load_encoder_weights(other.encoder, tmp_path / "last.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in weights(other.encoder).items())


def test_a_checkpoint_of_a_sharded_encoder_keeps_every_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module = module_with_lora(tiny_checkpoint)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    fully_shard(module.encoder, mesh=init_device_mesh("cpu", (1,)))
    weights = module.state_dict()
    checkpoint = {"state_dict": dict(weights)}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint.keys() == {"state_dict", SETTINGS}
    assert checkpoint["state_dict"].keys() == weights.keys()
    module.on_load_checkpoint({"epoch": 3})  # the strategy has taken the weights out


def test_a_saved_adapter_is_refused_on_another_base(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = adapted(tiny_checkpoint).save_adapter(tmp_path / "saved")

    def on(base: Path) -> None:
        settings = json.loads((path / "mmembed.json").read_text())
        settings["base"]["path"] = str(base)
        (path / "mmembed.json").write_text(json.dumps(settings))
        MLLMEncoder.from_pretrained(path)

    with pytest.raises(UserInputError, match=r"adapter '.*' was trained on another base: 1 of \d+ weights"):
        on(another_base(tiny_checkpoint, tmp_path))
    with pytest.raises(UserInputError, match=r"was trained on '.*gone', which is not there; put that checkpoint there"):
        on(tmp_path / "gone")
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserInputError, match=r"was trained on another base: \d+ of \d+ weights"):
        on(base_of_another_size(tmp_path))


def test_a_checkpoint_that_lacks_a_weight_which_was_not_frozen_is_refused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fit(module_with_lora(tiny_checkpoint), tiny_shards, tmp_path, max_steps=1)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "encoder.backbone.multi_modal_projector.linear_1.weight"
    del content["state_dict"][name]
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserInputError, match=rf"1 of \d+ weights differ, such as {name} \(checkpoint None"):
        load_encoder_weights(module_with_lora(tiny_checkpoint).encoder, tmp_path / "last.ckpt")


def test_a_checkpoint_with_lora_is_refused_by_a_model_without_it_or_of_another_rank(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fit(module_with_lora(tiny_checkpoint), tiny_shards, tmp_path, max_steps=1)
    for other in (None, {"r": 4}):
        encoder = tiny_module(tiny_checkpoint, lora=other).encoder
        with pytest.raises(UserInputError, match="trained with another architecture"):
            load_encoder_weights(encoder, tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"lora": {"lora_alpha": 8}}, r"lora=\{.*'lora_alpha': 64.*, and the model has lora=\{.*'lora_alpha': 8"),
        ({"pooling": "last"}, "pooling='mean', and the model has pooling='last'"),
        ({"bidirectional": False}, "bidirectional=True, and the model has bidirectional=False"),
    ],
)
def test_a_checkpoint_of_an_encoder_that_was_built_in_another_way_is_refused(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    given: dict[str, Any] = {"pooling": "mean", "lora": {}}
    fit(tiny_module(tiny_checkpoint, **given), tiny_shards, tmp_path, max_steps=1)
    module = tiny_module(tiny_checkpoint, **{**given, **other})
    before = weights(module.encoder)
    with pytest.raises(UserInputError, match=f"the checkpoint was trained with {told}"):
        fit(module, tiny_shards, tmp_path / "resumed", tmp_path / "last.ckpt", max_steps=2)
    with pytest.raises(UserInputError, match=f"ckpt_path='.*last.ckpt' was trained with {told}"):
        load_encoder_weights(module.encoder, tmp_path / "last.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in weights(module.encoder).items())


def test_a_checkpoint_is_loaded_with_other_lengths_and_padding_and_without_settings(
    tiny_shards: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    module = tiny_module(tiny_checkpoint, lora={})
    fit(module, tiny_shards, tmp_path, max_steps=1)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content[SETTINGS] == module.encoder.settings
    free = {"max_length": 40, "padding_side": "left"}
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, lora={}, **free)
    load_encoder_weights(encoder, tmp_path / "last.ckpt")
    assert all(torch.equal(value, module.encoder.state_dict()[name]) for name, value in encoder.state_dict().items())
    del content[SETTINGS]
    torch.save(content, tmp_path / "older.ckpt")
    load_encoder_weights(MLLMEncoder.from_pretrained(tiny_checkpoint, lora={}, pooling="last"), tmp_path / "older.ckpt")


def test_a_saved_encoder_with_other_lora_than_asked_for_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = adapted(tiny_checkpoint).save_adapter(tmp_path / "saved")
    with pytest.raises(UserInputError, match=r"lora=LoRA\(r=4.* is not what .* was trained with: LoRA\(r=8"):
        MLLMEncoder.from_pretrained(path, lora={"r": 4})


@pytest.mark.parametrize("content", [b"", b"no safetensors"])
def test_a_broken_adapter_is_named(tiny_checkpoint: Path, tmp_path: Path, content: bytes) -> None:
    path = adapted(tiny_checkpoint).save_adapter(tmp_path / "saved")
    (path / ADAPTER_FILE).write_bytes(content)
    with pytest.raises(UserInputError, match=r"adapter '.*adapter.safetensors' cannot be read"):
        MLLMEncoder.from_pretrained(path)


def test_an_adapter_that_lacks_a_weight_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = adapted(tiny_checkpoint).save_adapter(tmp_path / "saved")
    other = adapted(tiny_checkpoint, seed=1, lora={"target_modules": ["q_proj"]}).save_adapter(tmp_path / "other")
    shutil.copy(other / ADAPTER_FILE, path / ADAPTER_FILE)
    with pytest.raises(UserInputError, match=r"does not fit its base: \d+ weights differ, such as .*down_proj"):
        MLLMEncoder.from_pretrained(path)


# --- from the command line ------------------------------------------------------------------------------------------


def overrides(checkpoint: Path, source: Path, directory: Path) -> list[str]:
    return [
        "data=mbeir",
        "dataset=pets",
        f"data.source={source}",
        "data.batch_size=8",
        *tiny_paths(directory),
        f"model.encoder.pretrained_model_name_or_path={checkpoint}",
        "model.encoder.max_length=48",
        "callbacks.evaluation.dtype=float32",
    ]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_paper_s_model_trains_from_the_command_line_with_another_rank(
    tiny_source: Path, tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    given = ["model=mm_embed", "model.encoder.lora.r=16", *overrides(tiny_checkpoint, tiny_source, tmp_path)]
    _, objects = train(
        composed("train", *given, f"+trainer.precision={precision}", "trainer.max_steps=1", "test=false")
    )
    encoder = objects["module"].encoder
    assert encoder.lora.r == 16
    assert encoder.lora.lora_alpha == 64
    assert {p.dtype for p in encoder.parameters()} == {torch.float32, torch.bfloat16}
    held = {id(p) for group in objects["trainer"].optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in encoder.parameters() if p.requires_grad}


def test_a_checkpoint_with_lora_is_tested_evaluated_and_resumed_by_its_path_alone(
    tiny_source: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = ["model=llava_next", "model.encoder.lora={r: 4}", *overrides(tiny_checkpoint, tiny_source, tmp_path)]
    metrics, _ = train(composed("train", *model, "trainer.max_epochs=1"))
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    assert not any("base_layer" in name for name in torch.load(best, weights_only=True)["state_dict"])
    elsewhere = [f"ckpt_path={best}", f"paths.output_dir={tmp_path / 'again'}"]
    again, _ = evaluate(composed("evaluate", *model, *elsewhere))
    assert again == {name: value for name, value in metrics.items() if name.startswith("test/")}
    resumed, objects = train(composed("train", *model, *elsewhere, "trainer.max_epochs=2"))
    assert objects["trainer"].global_step == 2 * 6
    assert "train/loss" in resumed


def test_a_model_without_lora_is_trained_whole(tiny_checkpoint: Path, tiny_source: Path, tmp_path: Path) -> None:
    cfg = composed("train", "model=llava_next", *overrides(tiny_checkpoint, tiny_source, tmp_path))
    encoder = instantiate(cfg.model.encoder, _convert_="all")
    assert all(p.requires_grad for p in encoder.parameters())
    assert torch.equal(
        encoder.encode([Item("a red ellipse")]),
        MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48).encode([Item("a red ellipse")]),
    )
