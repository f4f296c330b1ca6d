"""``mmembed-embed source=...`` and ``mmembed-search``: from plain files to a ranking, with one and the same encoder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_cli import composed
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MLLMEncoder, Query
from lightning_mmembed.cli_files import INDEX_FILE, embed, quoted, search
from lightning_mmembed.data import MBEIRDataModule
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.items import Item
from lightning_mmembed.retrieval.report import GalleryQuery

COLOURS = ("red", "green", "blue", "gold", "purple", "gray")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve drawn pictures, half of them in a folder with a space in its name."""
    folder = tmp_path / "photos"
    for n, colour in enumerate(COLOURS):
        for name in (f"{colour}.jpg", f"my trip/{colour}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (60, 40), "white")
            ImageDraw.Draw(image).ellipse((n, 5, 30 + 4 * n, 35), fill=colour)
            image.save(folder / name)
    return folder


def made(checkpoint: Path, source: Path, out: Path, *overrides: str) -> Path:
    model = (
        "model=llava_next",
        f"model.encoder.pretrained_model_name_or_path={checkpoint}",
        "model.encoder.max_length=48",
    )
    where = (f"source={source}", f"out={out}", f"paths.root_dir={out.parent}", "fabric.accelerator=cpu")
    return embed(composed("embed", *model, *where, *overrides))


def found(index: Path, *overrides: str) -> list[GalleryQuery]:
    return search(composed("search", f"index={index}", f"paths.root_dir={index.parent}", "device=cpu", *overrides))


def by_hand(checkpoint: Path, photos: Path, query: Query) -> dict[str, float]:
    """The score of every picture, best first, by a full sort in float64 of the stored precision."""
    encoder = MLLMEncoder.from_pretrained(checkpoint, max_length=48).eval()
    paths = {path.relative_to(photos).as_posix(): path for path in photos.rglob("*.*")}
    documents = encoder.encode_document(list(paths.values()), convert_to_numpy=True).astype(np.float16)
    scores = documents.astype(np.float64) @ encoder.encode([query], convert_to_numpy=True)[0].astype(np.float64)
    return dict(sorted(zip(paths, scores.tolist(), strict=True), key=lambda pair: -pair[1]))


# --- what is found --------------------------------------------------------------------------------------------------


def test_a_search_gives_the_ranking_of_every_picture_by_hand(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index")
    assert "12 items, 32 dimensions" in capsys.readouterr().out
    red = photos / "red.jpg"
    asked = {
        ("query=a red pet",): Query(Item("a red pet")),
        ("query=a red pet", "instruction=Find it."): Query(Item("a red pet"), "Find it."),
        (f"query_image={red}",): Query(Item(None, red.read_bytes())),
        (f"query_image={red}", "query=in blue"): Query(Item("in blue", red.read_bytes())),
    }
    seen = set()
    for overrides, query in asked.items():
        (one,) = found(index, *overrides, "top_k=12")
        expected = by_hand(tiny_checkpoint, photos, query)
        assert [result.did for result in one.results] == list(expected)
        assert [result.score for result in one.results] == pytest.approx(list(expected.values()), abs=1e-6)
        assert {result.modality for result in one.results} == {"image"}
        seen.add(one.results[0].score)
    assert len(seen) == 4, "text, picture and instruction all count"
    (few,) = found(index, "query=a red pet", "top_k=3")
    assert [result.did for result in few.results] == [r.did for r in found(index, "query=a red pet")[0].results][:3]
    printed = capsys.readouterr().out
    assert "my trip/" in printed
    assert "query: 'a red pet'" in printed


def test_texts_are_found_by_their_line_and_shown(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a [red] pet\n\na blue pet that is <b>bold</b>\n")
    index = made(tiny_checkpoint, captions, tmp_path / "index")
    results = found(index, f"queries={photos}", "top_k=5")
    assert [query.qid for query in results] == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))
    for query in results:
        assert sorted((r.did, r.text) for r in query.results) == [
            ("1", "a [red] pet"),
            ("3", "a blue pet that is <b>bold</b>"),
        ]
    assert "a [red] pet" in capsys.readouterr().out


def test_a_run_has_six_columns_and_a_page_needs_nothing_else(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    Image.effect_noise((900, 900), 90).save(photos / "large.png")
    (tmp_path / "both.jsonl").write_text(
        "".join(
            json.dumps({"txt": f"<script>{p.stem}", "img_path": f"photos/{p.name}"}) + "\n" for p in photos.glob("*.*")
        )
    )
    index = made(tiny_checkpoint, tmp_path / "both.jsonl", tmp_path / "index")
    pictures = made(tiny_checkpoint, photos, tmp_path / "pictures")
    (tmp_path / "asked.txt").write_text("a red pet\na blue pet\n")
    asked = f"queries={tmp_path / 'asked.txt'}"
    results = found(pictures, asked, f"out={tmp_path / 'found.run'}", "top_k=13")
    lines = [line.split() for line in (tmp_path / "found.run").read_text().splitlines()]
    assert [len(line) for line in lines] == [6] * 26
    assert [(line[0], line[3]) for line in lines] == [(str(q), str(rank)) for q in (1, 2) for rank in range(1, 14)]
    assert [line[2].replace("%20", " ") for line in lines] == [r.did for query in results for r in query.results]

    found(index, asked, f"page={tmp_path / 'found.html'}")
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 7
    assert "<script" not in page
    assert "&lt;script&gt;red" in page
    assert not re.search(r"https?://|src=\"(?!data:)", page)
    assert len(page) < 2 * (photos / "large.png").stat().st_size, "thumbnails, not pictures"


def test_an_index_remembers_the_checkpoint_that_a_training_wrote(
    tiny_checkpoint: Path, tiny_shards: Path, photos: Path, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    module = tiny_module(tiny_checkpoint)
    trainer.fit(module, MBEIRDataModule(tiny_shards, batch_size=8))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    index = made(tiny_checkpoint, photos, tmp_path / "index", f"ckpt_path={tmp_path / 'trained.ckpt'}")
    (one,) = found(index, "query=a red pet", "top_k=1")
    best = module.encoder.encode_document([photos / one.results[0].did]) @ module.encoder.encode_query(["a red pet"]).T
    assert one.results[0].score == pytest.approx(float(best), abs=1e-3)
    untrained = (f"model.encoder.pretrained_model_name_or_path={tiny_checkpoint}", "model.encoder.max_length=48")
    with pytest.raises(UserInputError, match=r"was made by another encoder.*trained\.ckpt"):
        found(index, "query=a red pet", "model=llava_next", *untrained)


def test_weights_that_no_checkpoint_holds_are_drawn_as_they_were(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index", "model.encoder.pooling=latent-attention", "seed=7")
    torch.manual_seed(0)
    assert len(found(index, "query=a red pet")[0].results) == 10


# --- what is kept ---------------------------------------------------------------------------------------------------


def content(index: Path) -> dict[str, bytes]:
    return {str(path.relative_to(index)): path.read_bytes() for path in index.rglob("*.*")}


def test_a_killed_run_leaves_no_index_and_ends_as_one_that_was_not_killed(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mmembed.data.folder import FileItems
    from lightning_mmembed.retrieval import embed as embedding

    monkeypatch.setattr(embedding, "PART_SIZE", 5)
    whole = made(tiny_checkpoint, photos, tmp_path / "whole")
    read: list[Any] = []
    get = FileItems.__getitem__

    def fatal(items: FileItems, position: Any) -> Any:
        if len(read) == 7:
            raise KeyboardInterrupt
        read.append(position)
        return get(items, position)

    with monkeypatch.context() as patched:
        patched.setattr(FileItems, "__getitem__", fatal)
        with pytest.raises(KeyboardInterrupt):
            made(tiny_checkpoint, photos, tmp_path / "killed")
    assert len(list((tmp_path / "killed").rglob("*.npy"))) == 1
    with pytest.raises(UserInputError, match=r"killed' holds no index\.json.*goes on where it was stopped"):
        found(tmp_path / "killed", "query=a red pet")
    assert content(made(tiny_checkpoint, photos, tmp_path / "killed")) == content(whole)


def test_a_second_run_embeds_nothing_and_one_over_other_files_searches_those(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index")
    parts = {path: path.stat().st_mtime_ns for path in index.rglob("*.npy")}
    made(tiny_checkpoint, photos, tmp_path / "index")
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*.npy")} == parts
    Image.new("RGB", (30, 30), "black").save(photos / "black.png")
    (photos / "red.jpg").unlink()
    made(tiny_checkpoint, photos, tmp_path / "index")
    names = {result.did for result in found(index, "query=a red pet", "top_k=20")[0].results}
    assert names == {path.relative_to(photos).as_posix() for path in photos.rglob("*.*")}


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "give query=<text>, query_image=<picture> or both, or else queries="),
        (("query=a", "queries=b.txt"), "give query=<text>"),
        (("query_image=absent.jpg",), "picture 'absent.jpg' cannot be read: No such file"),
        (("queries=absent.txt",), "'absent.txt' does not exist"),
    ],
)
def test_a_query_that_cannot_be_used_is_named_before_a_model_is_loaded(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"vectors": "v", "dim": 1}))
    (tmp_path / "items.json").write_text(json.dumps({"root": "r", "items": [], "left_out": {}}))
    with pytest.raises(UserInputError, match=message):
        found(tmp_path, *overrides)


@pytest.mark.parametrize("overrides", [("source=photos",), ("out=index",)])
def test_a_source_without_a_place_for_its_vectors_is_refused(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserInputError, match="belong together; give both or neither"):
        embed(composed("embed", *overrides, f"paths.root_dir={tmp_path}"))


def test_the_default_model_that_needs_a_dataset_says_how_to_name_another(photos: Path, tmp_path: Path) -> None:
    overrides = (
        f"source={photos}",
        f"out={tmp_path / 'index'}",
        f"paths.root_dir={tmp_path}",
        "fabric.accelerator=cpu",
    )
    with pytest.raises(UserInputError, match=r"manifest\.json is missing.*; name one with model=llava_next"):
        embed(composed("embed", *overrides))


def test_what_an_index_names_is_loaded_as_weights_and_never_run(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index")
    facts = json.loads((index / INDEX_FILE).read_text())
    assert facts["model"]["_target_"].endswith("MLLMEncoder.from_pretrained")
    command = {"_target_": "os.mkdir", "path": str(tmp_path / "trace")}
    for model, message in (
        (command, "names no model to load"),
        (facts["model"] | {"pooling_options": command}, r"index\.json names a model that cannot be loaded"),
        (facts["model"] | {"pooling": command}, "."),
    ):
        (index / INDEX_FILE).write_text(json.dumps(facts | {"model": model}))
        with pytest.raises(Exception, match=message):
            found(index, "query=a red pet")
    assert not (tmp_path / "trace").exists()


def test_vectors_that_are_gone_are_told(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index")
    next(index.rglob("*.npy")).unlink()
    with pytest.raises(UserInputError, match="has 0 vectors of 12 items; embed the source again"):
        found(index, "query=a red pet")


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a red bus",
        "what's red, and a bus?",
        "a\\b",
        "end\\",
        "a\\'b",
        "${x}",
        "{a: b}",
        "[1,2]",
        "a=b",
        '"q"',
        "12",
        "",
    ],
)
@pytest.mark.parametrize("key", ["query", "instruction"])
def test_a_text_on_the_command_line_is_taken_as_it_is_written(key: str, text: str) -> None:
    assert composed("search", quoted(f"{key}={text}"))[key] == text


def test_other_arguments_are_left_to_hydra() -> None:
    for argument in ("top_k=3", "query=null", "query_image=a,b", "--cfg", "~data"):
        assert quoted(argument) == argument


def run(command: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / command), *arguments],
        cwd=directory,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # starts commands, which import torch and transformers
def test_the_commands_find_pictures_from_a_shell(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    model = ("model=llava_next", f"model.encoder.pretrained_model_name_or_path={tiny_checkpoint}")
    process = run("mmembed-embed", tmp_path, "source=photos", "out=vectors/photos", *model)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "vectors: vectors/photos"
    asked = ("query=what's red, and a pet?", "instruction=Find a picture.", "top_k=3", "page=found.html")
    process = run("mmembed-search", tmp_path, "index=vectors/photos", *asked)
    assert process.returncode == 0, process.stderr
    assert "what's red, and a pet?" in process.stdout
    assert process.stdout.count("image") == 3
    assert process.stdout.splitlines()[-1] == "page: found.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.html", "photos", "vectors"]
    process = run("mmembed-search", tmp_path, "index=absent", "query=a")
    assert process.returncode == 2
    assert process.stderr.startswith("error: index='absent' holds no index.json")
