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
from hydra.errors import InstantiationException
from PIL import Image, ImageDraw
from test_cli import composed
from worlds import tiny_module, tiny_trainer

from lightning_mmembed import MLLMEncoder, Query
from lightning_mmembed.cli_files import EMBED_TEXTS, SEARCH_TEXTS, embed, quoted, search
from lightning_mmembed.data import MBEIRDataModule
from lightning_mmembed.data.folder import INDEX_FILE
from lightning_mmembed.errors import UserInputError
from lightning_mmembed.files import file_sha256
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


def test_an_index_is_refused_from_the_change_of_its_items_to_the_end_of_the_next_embedding(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    index = made(tiny_checkpoint, photos, tmp_path / "index")
    (photos / "red.jpg").rename(photos / "zebra.jpg")  # as many items as before, in another order
    assert len(found(index, "query=a red pet")) == 1, "the files may change, the list of them not"
    with pytest.raises(InstantiationException, match="absent"):
        made(tiny_checkpoint.with_name("absent"), photos, index)
    with pytest.raises(UserInputError, match=r"was made of other items than items\.json lists now.*embed the source"):
        found(index, "query=a red pet")
    made(tiny_checkpoint, photos, index)
    (one,) = found(index, f"query_image={photos / 'zebra.jpg'}", "top_k=12")
    expected = by_hand(tiny_checkpoint, photos, Query(Item(None, (photos / "zebra.jpg").read_bytes())))
    assert [result.did for result in one.results] == list(expected)


def test_only_a_checkpoint_is_looked_for_where_the_command_was_started(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mean").mkdir()
    (tmp_path / "here").symlink_to(tiny_checkpoint)
    index = made(Path("here"), photos, tmp_path / "index", "model.encoder.pooling=mean")
    model = json.loads((index / INDEX_FILE).read_text())["model"]
    assert model["pooling"] == "mean"
    assert model["pretrained_model_name_or_path"] == str(tiny_checkpoint.resolve())
    monkeypatch.chdir(photos)
    assert len(found(index, "query=a red pet")) == 1


# --- bad input ------------------------------------------------------------------------------------------------------


def empty_index(folder: Path, **changes: Any) -> Path:
    """What a search reads before it loads a model; a change to ``...`` leaves a key out."""
    (folder / "items.json").write_text(json.dumps({"root": "r", "items": [], "left_out": {}}))
    facts = {"vectors": "v", "items": file_sha256(folder / "items.json"), "encoder": "e", "seed": 0, "dim": 1}
    facts |= {"model": None, "ckpt_path": None, **changes}
    facts = {key: value for key, value in facts.items() if value is not ...}
    (folder / INDEX_FILE).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "give query=<text>, query_image=<picture> or both, or else queries="),
        (("query=a", "queries=b.txt"), "give query=<text>"),
        (("query_image=absent.jpg",), "picture 'absent.jpg' cannot be read: No such file"),
        (("queries=absent.txt",), "'absent.txt' does not exist"),
        (("query=a", "top_k=0"), "top_k=0 is no number of results; write 1 or more"),
        (("query=a", "top_k=x"), "top_k='x' is no number of results"),
        (("query=a", "device=foo"), "device='foo' cannot be used: .*foo"),
        (("query=a", "device=meter:1"), "device='meter:1' cannot be used: "),
        (("query=a", "page=."), r"page='\.' is a folder; give the name of a file"),
        (("query=a", "out=."), r"out='\.' is a folder; give the name of a file"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_before_a_model_is_loaded(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        found(empty_index(tmp_path), *overrides)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"device='cuda' cannot be used: .*; write cpu"):
        found(empty_index(tmp_path), "query=a", "device=cuda")


def test_a_file_in_the_place_of_a_folder_is_named_by_both_commands(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    root = (f"paths.root_dir={tmp_path}", "fabric.accelerator=cpu")
    for place in (file, file / "below"):
        for name, other in (("out", (f"source={photos}",)), ("vectors.directory", ())):
            with pytest.raises(UserInputError, match=rf"^{name}='{place}' needs a folder where the file '{file}' is"):
                embed(composed("embed", f"{name}={place}", *other, *root))
    for name in ("out", "page"):
        with pytest.raises(UserInputError, match=rf"^{name}='{file}/a/b' needs a folder where the file '{file}' is"):
            found(empty_index(tmp_path), "query=a", f"{name}={file}/a/b")
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_bad_fraction=x", "max_bad_fraction='x' is no share"),
        ("vectors.dtype=int8", "dtype='int8' is unknown; write 'float16' or 'float32'"),
    ],
)
def test_a_setting_of_an_embedding_that_cannot_be_used_is_named(
    photos: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserInputError, match=message):
        made(tmp_path / "absent", photos, tmp_path / "index", override)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "\\xff"])
def test_a_malformed_index_is_named(tmp_path: Path, content: str) -> None:
    (empty_index(tmp_path) / INDEX_FILE).write_bytes(content.encode().decode("unicode_escape").encode("latin-1"))
    with pytest.raises(UserInputError, match=r"index\.json is no index: .*; embed the source again"):
        found(tmp_path, "query=a")


@pytest.mark.parametrize("key", ["vectors", "items", "encoder", "seed", "dim", "model", "ckpt_path"])
def test_an_index_without_one_of_its_facts_is_named(tmp_path: Path, key: str) -> None:
    for value in (..., 1.5):
        with pytest.raises(UserInputError, match=rf"index\.json is no index: it has no usable {key}; embed the source"):
            found(empty_index(tmp_path, **{key: value}), "query=a")


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
        "IMG (1).jpg",
        "12",
        "",
    ],
)
@pytest.mark.parametrize("key", ["query", "instruction", "query_image", "queries", "index", "out", "page"])
def test_a_text_or_path_of_a_search_is_taken_as_it_is_written(key: str, text: str) -> None:
    assert composed("search", quoted(f"{key}={text}", SEARCH_TEXTS))[key] == text


@pytest.mark.parametrize("text", ["IMG (1)", "what's, this", "${x}", "a=b", "12"])
@pytest.mark.parametrize("key", ["source", "out"])
def test_a_path_of_an_embedding_is_taken_as_it_is_written(key: str, text: str) -> None:
    assert composed("embed", quoted(f"{key}={text}", EMBED_TEXTS))[key] == text


def test_other_arguments_are_left_to_hydra() -> None:
    for argument in ("top_k=3", "query=null", "query", "device=a,b", "--cfg", "~data"):
        assert quoted(argument, SEARCH_TEXTS) == argument
    assert quoted("instruction=0", EMBED_TEXTS) == "instruction=0"


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
    photos.rename(tmp_path / "photos (1)")
    (tmp_path / "photos (1)" / "red.jpg").rename(tmp_path / "photos (1)" / "IMG (1).jpg")
    process = run("mmembed-embed", tmp_path, "source=photos (1)", "out=vectors/photos, mine", *model)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "vectors: vectors/photos, mine"
    asked = ("query=what's red, and a pet?", "instruction=Find a picture.", "top_k=3", "page=found (1).html")
    picture = "query_image=photos (1)/IMG (1).jpg"
    process = run("mmembed-search", tmp_path, "index=vectors/photos, mine", picture, *asked)
    assert process.returncode == 0, process.stderr
    assert "what's red, and a pet?" in " ".join(process.stdout.split())
    assert process.stdout.count("image") == 3
    assert process.stdout.splitlines()[-1] == "page: found (1).html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found (1).html", "photos (1)", "vectors"]
    process = run("mmembed-search", tmp_path, "index=vectors/photos, mine", "query=a", "top_k=0")
    assert (process.returncode, process.stderr) == (2, "error: top_k=0 is no number of results; write 1 or more\n")
    process = run("mmembed-search", tmp_path, "index=absent", "query=a")
    assert process.returncode == 2
    assert process.stderr.startswith("error: index='absent' holds no index.json")
