"""The model card says what is known and no more, its snippet runs, and what is pushed is the encoder with its card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MBEIRDataModule, MLLMEncoder, RetrievalEvaluation
from lightning_mmembed.encoders.card import model_card
from lightning_mmembed.errors import UserInputError


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> MLLMEncoder:
    return MLLMEncoder.from_pretrained(tiny_checkpoint, max_length=48)


@pytest.fixture(scope="module")
def metrics(tiny_shards: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation of the small dataset writes."""
    directory = tmp_path_factory.mktemp("evaluation")
    trainer = tiny_trainer(directory, callbacks=[RetrievalEvaluation()])
    trainer.test(tiny_module(tiny_checkpoint), MBEIRDataModule(tiny_shards), verbose=False)
    return directory / "metrics.json"


def table(card: ModelCard, first: str) -> dict[str, list[str]]:
    """The rows of the table whose head begins with ``first``, by their first cell."""
    rows = [line.strip("|").split("|") for line in card.text.split(f"| {first} |")[1].split("\n\n")[0].splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def test_the_front_matter_holds_what_the_hub_asks_for(encoder: MLLMEncoder, tmp_path: Path) -> None:
    card = model_card(encoder, "me/mine", license="cc-by-nc-4.0", base_model=["a/b", "c/d"])
    card.save(tmp_path / "README.md")
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "lightning-mmembed"
    assert front["pipeline_tag"] == "feature-extraction"
    assert front["base_model"] == ["a/b", "c/d"]
    assert front["license"] == "cc-by-nc-4.0"
    assert "multimodal-retrieval" in front["tags"]
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc-by-nc-4.0"


def test_data_and_stages_are_listed_in_their_order(encoder: MLLMEncoder) -> None:
    card = model_card(
        encoder, "me/mine", training_data=["M-BEIR, train", "MS MARCO"], stages=["random", "continual", "one of my own"]
    )
    assert "- M-BEIR, train\n- MS MARCO\n" in card.text
    stages = re.findall(r"^(\d)\. (\w+)", card.text, re.MULTILINE)
    assert stages == [("1", "random"), ("2", "continual"), ("3", "one")]


def test_what_is_not_given_is_said_to_be_not_stated(encoder: MLLMEncoder) -> None:
    card = model_card(encoder, "me/mine")
    for sentence in ("training data is not stated", "stages of training are not stated", "No evaluation is given"):
        assert sentence in card.text
    assert {"license", "base_model"}.isdisjoint(card.data.to_dict())


def test_the_metrics_are_those_of_the_evaluation(encoder: MLLMEncoder, metrics: Path) -> None:
    content = json.loads(metrics.read_text())
    card = model_card(encoder, "me/mine", metrics=metrics)
    rows = table(card, "task")
    headline = {pool: content[pool]["headline"] for pool in ("union", "local")}
    assert set(rows) == set(headline["union"]["tasks"]) | (headline["union"].keys() - {"tasks"})
    for task, figure in headline["union"]["tasks"].items():
        local = headline["local"]["tasks"][task]
        assert rows[task][0] == figure["metric"]
        assert rows[task][1].split()[0] == f"{100 * figure['value']:.1f}"
        assert rows[task][2] == f"{100 * local['value']:.1f} [{100 * local['low']:.1f}, {100 * local['high']:.1f}]"
    assert rows["average"][1].startswith(f"{100 * headline['union']['average']['value']:.1f} [")
    assert f"queries {content['protocol']['queries']};" in card.text
    assert model_card(encoder, "me/mine", metrics=content).text == card.text


def test_no_path_of_the_evaluation_s_machine_is_published(encoder: MLLMEncoder, metrics: Path, tmp_path: Path) -> None:
    content = json.loads(metrics.read_text())
    content["protocol"]["checkpoint"] = str(tmp_path / "runs" / "best.ckpt")
    text = model_card(encoder, "me/mine", metrics=content).text
    assert "; checkpoint best.ckpt." in text
    assert str(tmp_path) not in text
    assert content["protocol"]["checkpoint"] == str(tmp_path / "runs" / "best.ckpt")


def test_the_card_says_how_the_encoder_is_built(tiny_checkpoint: Path) -> None:
    encoder = MLLMEncoder.from_pretrained(tiny_checkpoint, pooling="last", bidirectional=False, max_length=17)
    rows = table(model_card(encoder, "me/mine"), "property")
    assert rows["pooling"] == ["last"]
    assert rows["attention"] == ["causal"]
    assert rows["longest text"] == ["17 tokens"]
    assert rows["dimension"] == [str(encoder.embedding_dim)]


def test_the_snippet_of_the_card_runs_as_it_stands(
    encoder: MLLMEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = encoder.save_pretrained(tmp_path / "encoder")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "bus.jpg")
    (snippet,) = re.findall(r"```python\n(.*?)```", model_card(encoder, str(directory)).text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert found["scores"].shape == (1, 3)
    assert torch.equal(found["queries"].norm(dim=1).round(decimals=5), torch.ones(1))


@pytest.mark.parametrize("content", ["{}", "no json", '{"union": {"headline": {}}}'])
def test_a_file_that_no_evaluation_wrote_is_named(encoder: MLLMEncoder, tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserInputError, match=r"metrics='.*other\.json' is not what mmembed-evaluate writes"):
        model_card(encoder, "me/mine", metrics=path)


# --- to the hub -----------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_the_encoder_with_its_card(encoder: MLLMEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    items = ["a red ellipse", Image.new("RGB", (40, 30), "red")]

    def create_repo(api: HfApi, repo_id: str, **options: Any) -> Any:
        calls["repo"] = (repo_id, options, api.token)
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(api: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        calls["folder"], calls["upload"] = Path(folder_path), repo_id
        calls["vectors"] = MLLMEncoder.from_pretrained(folder_path).encode_document(items)
        calls["card"] = ModelCard.load(Path(folder_path) / "README.md")
        return SimpleNamespace(commit_url="https://huggingface.co/someone/mine/commit/0")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    url = encoder.push_to_hub("mine", private=True, token="hf_mine", license="mit", training_data=["M-BEIR"])
    assert url == "https://huggingface.co/someone/mine/commit/0"
    assert calls["repo"] == ("mine", {"private": True, "exist_ok": True}, "hf_mine")
    assert calls["upload"] == "someone/mine"
    assert torch.equal(calls["vectors"], encoder.encode_document(items))
    assert calls["card"].data.license == "mit"
    assert "- M-BEIR" in calls["card"].text
    assert 'from_pretrained("someone/mine")' in calls["card"].text
    assert not calls["folder"].exists()


def test_without_a_network_the_push_says_so_and_leaves_nothing(
    encoder: MLLMEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserInputError, match=r"repo_id='me/mine' cannot be pushed to the hub: .*offline"):
        encoder.push_to_hub("me/mine", token="hf_mine")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_hub_does_not_allow_is_named(encoder: MLLMEncoder) -> None:
    with pytest.raises(UserInputError, match="repo_id='a/b/c' cannot be pushed to the hub"):
        encoder.push_to_hub("a/b/c", token="hf_mine")


def test_a_card_that_cannot_be_written_stops_the_push(encoder: MLLMEncoder, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="metrics="):
        encoder.push_to_hub("me/mine", metrics=tmp_path / "absent.json")
