"""The two commands for vectors: ``mmembed-embed`` makes them, ``mmembed-search`` searches those of plain files."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from lightning_mmembed.cli import CONFIG_PATH, apply_extras, run_command, user_error
from lightning_mmembed.errors import UserInputError

if TYPE_CHECKING:
    import torch

    from lightning_mmembed.data.folder import FileItems
    from lightning_mmembed.encoders.base import Encoder
    from lightning_mmembed.items import Query
    from lightning_mmembed.retrieval.embed import VectorStore
    from lightning_mmembed.retrieval.report import GalleryQuery

#: Queries whose results are printed.
_SHOWN = 20

#: What loads weights and runs no code of their own: an index may name these, so that a search need not be told.
_LOADERS = (
    "lightning_mmembed.MLLMEncoder.from_pretrained",
    "lightning_mmembed.MLLMEncoder.from_parts",
    "lightning_mmembed.encoders.DualEncoder.from_pretrained",
)

#: Their arguments that may be folders, which a search finds wherever it is started.
_CHECKPOINTS = ("pretrained_model_name_or_path", "llava_next", "nv_embed")

#: Arguments of the command lines that are taken as they are written.
EMBED_TEXTS = ("source", "out")
SEARCH_TEXTS = ("query", "instruction", "query_image", "queries", "index", "out", "page")


def embed(cfg: DictConfig) -> Path:
    """Embed plain files, or the pool and the queries of a split, to disk, each process its own parts.

    Args:
        cfg: A configuration composed from ``conf/embed.yaml``.

    Returns:
        The folder of the vectors: of plain files, what ``mmembed-search`` is given as ``index``; of a split, what an
        evaluation is given as ``callbacks.evaluation.vectors_dir``.

    Raises:
        UserInputError: If the source, the model, the checkpoint, the instruction or the place for the vectors cannot be
            used.
    """
    if (cfg.source is None) != (cfg.out is None):
        raise UserInputError(f"source={cfg.source!r} and out={cfg.out!r} belong together; give both or neither")
    if cfg.instruction != "random" and not isinstance(cfg.instruction, int):
        raise UserInputError(f"instruction={cfg.instruction!r} is no single prompt; write a place from 0, or random")
    place = ("vectors.directory", cfg.vectors.directory) if cfg.out is None else ("out", cfg.out)
    check_place(*place, is_folder=True)
    apply_extras(cfg)
    fabric, store = start(cfg, place[1])
    report = _embed_split(cfg, store, fabric.device) if cfg.source is None else _embed_files(cfg, store, fabric.device)
    if fabric.is_global_zero:
        print(f"{report}\nvectors: {store.directory}")
    return store.directory


def start(cfg: DictConfig, directory: str) -> tuple[Any, VectorStore]:
    """Start the processes, seed them, and open a store that they share.

    Args:
        cfg: A configuration with ``fabric``, ``seed`` and ``vectors``.
        directory: Where the vectors lie; that of the first process counts.

    Returns:
        The Fabric and the store.

    Raises:
        UserInputError: If a setting of the store cannot be used.
    """
    from lightning_mmembed.distributed import Processes
    from lightning_mmembed.retrieval.embed import VectorStore

    fabric = hydra.utils.instantiate(cfg.fabric, _convert_="all")
    fabric.launch()
    fabric.seed_everything(cfg.seed, workers=True, verbose=False)
    settings: Any = OmegaConf.to_container(cfg.vectors, resolve=True)
    processes = Processes(fabric.global_rank, fabric.world_size, fabric.device)
    settings |= {"directory": processes.broadcast(directory)}  # others may have made up one, such as by the time
    try:
        return fabric, VectorStore(**settings, processes=processes, precision=fabric.autocast)
    except ValueError as error:
        raise UserInputError(f"vectors: {error}") from error


def _embed_split(cfg: DictConfig, store: VectorStore, device: Any) -> str:
    from lightning_mmembed.retrieval.embed import encoder_fingerprint

    datamodule = hydra.utils.instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    # Before the model: a prompt or a split that is not there is told before the work.
    pool = datamodule.shards.pool(cfg.split)
    query_sets = datamodule.shards.query_sets(cfg.split, cfg.instruction, cfg.instruction_seed)
    encoder = load_encoder(cfg.model.encoder, cfg.ckpt_path).to(device)
    made_by = encoder_fingerprint(encoder)
    vectors, _ = store.embed_pool(encoder, pool, made_by, query_sets)
    return f"{len(vectors):,} candidates, {vectors.dim} dimensions, {vectors.dtype}"


def _embed_files(cfg: DictConfig, store: VectorStore, device: Any) -> str:
    from lightning_mmembed.data.folder import checked_source, write_index
    from lightning_mmembed.retrieval.embed import encoder_fingerprint

    items = checked_source(cfg.source, store.directory, cfg.max_bad_fraction)
    try:
        encoder = load_encoder(cfg.model.encoder, cfg.ckpt_path).to(device)
    except Exception as error:
        if cfg.model.encoder._target_ in _LOADERS or user_error(error) is None:
            raise
        raise UserInputError(
            f"the default model cannot be made ({user_error(error)}); name one with model=llava_next "
            "model.encoder.pretrained_model_name_or_path=<a directory or a hub id>"
        ) from error
    content, made_by = items.fingerprint(), encoder_fingerprint(encoder)
    vectors = store.embed(encoder, items, content, made_by, "embedding", items.likeness)
    made = {
        "vectors": store.folder(content, made_by).name,
        "encoder": made_by,
        "seed": cfg.seed,
        "dim": vectors.dim,
        "model": _plain_model(cfg.model.encoder),
        "ckpt_path": None if cfg.ckpt_path is None else str(Path(cfg.ckpt_path).resolve()),
    }
    if store.processes.rank == 0:
        write_index(store.directory, made)
    return f"{len(vectors):,} items, {vectors.dim} dimensions, {vectors.dtype}"


def load_encoder(node: DictConfig, ckpt_path: str | None) -> Encoder:
    """The configured encoder with the weights of a checkpoint, if there is one, for inference."""
    return _with_weights(hydra.utils.instantiate(node, _convert_="all"), ckpt_path)


def _with_weights(encoder: Encoder, ckpt_path: str | None) -> Encoder:
    from lightning_mmembed.checkpoints import load_encoder_weights

    if ckpt_path is not None:
        load_encoder_weights(encoder, ckpt_path)
    return encoder.eval()


def _plain_model(node: DictConfig) -> dict[str, Any] | None:
    """What an index says of an encoder that a search can load without being told; ``None`` for any other."""
    arguments: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    if arguments.get("_target_") not in _LOADERS:
        return None
    named = {key: arguments[key] for key in _CHECKPOINTS if isinstance(arguments.get(key), str)}
    return arguments | {key: str(Path(name).resolve()) for key, name in named.items() if Path(name).is_dir()}


def check_place(name: str, value: object, is_folder: bool) -> None:
    """Refuse a place that cannot be written: a folder for a file, or a file for a folder or above the place."""
    path = Path(str(value)).absolute()
    if not is_folder and path.is_dir():
        raise UserInputError(f"{name}={value!r} is a folder; give the name of a file")
    folders = [path, *path.parents] if is_folder else path.parents
    file = next((str(folder) for folder in folders if folder.exists() and not folder.is_dir()), None)
    if file is not None:
        raise UserInputError(f"{name}={value!r} needs a folder where the file {file!r} is; give another place")


def _device(name: str | None) -> torch.device:
    """The device that a search computes on, tried."""
    import torch

    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, TypeError) as error:  # an AssertionError where torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserInputError(
            f"device={name!r} cannot be used: {reason}; write cpu, or null for what there is"
        ) from error


def search(cfg: DictConfig) -> list[GalleryQuery]:
    """Search plain files that were embedded, and print what is found.

    Args:
        cfg: A configuration composed from ``conf/search.yaml``.

    Returns:
        The queries with their results, best first.

    Raises:
        UserInputError: If there is no index or no query, the encoder is not the one that made the vectors, or an
            argument cannot be used.
    """
    from rich.console import Console

    from lightning_mmembed.data.folder import known_items, read_index
    from lightning_mmembed.files import write_atomically
    from lightning_mmembed.retrieval.found import found_table, run_lines, write_page
    from lightning_mmembed.retrieval.search import exact_search
    from lightning_mmembed.retrieval.vectors import Vectors

    if not isinstance(cfg.top_k, int) or cfg.top_k < 1:
        raise UserInputError(f"top_k={cfg.top_k!r} is no number of results; write 1 or more")
    for name in ("out", "page"):
        if cfg[name] is not None:
            check_place(name, cfg[name], is_folder=False)
    apply_extras(cfg)
    device, index, made = _device(cfg.device), Path(cfg.index), read_index(cfg.index)
    items, queries = known_items(index), _queries(cfg)
    vectors = Vectors(sorted((index / made["vectors"]).glob("part-*.npy")), made["dim"])
    if len(vectors) != len(items):
        raise UserInputError(
            f"index={cfg.index!r} has {len(vectors):,} vectors of {len(items):,} items; embed the source again"
        )
    encoded = _index_encoder(cfg, made).to(device).encode(queries, show_progress_bar=True)
    (ranking,) = exact_search(encoded, vectors, cfg.top_k)
    lists = zip(queries, ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
    found = [
        _found(query, zip(rows, scores, strict=True), items, cfg.page is not None) for query, rows, scores in lists
    ]
    for one in found[:_SHOWN]:
        Console().print(found_table(one))
    if len(found) > _SHOWN:
        print(f"... and {len(found) - _SHOWN:,} more queries, which out=... and page=... hold")
    if cfg.out is not None:
        print(f"TREC run: {write_atomically(cfg.out, run_lines(found))}")
    if cfg.page is not None:
        print(f"page: {write_page(cfg.page, f'Search of {cfg.index}', found)}")
    return found


def _queries(cfg: DictConfig) -> list[Query]:
    """The queries of a file or a folder, or the one of the command line."""
    from lightning_mmembed.data.folder import read_source
    from lightning_mmembed.encoders.base import read_picture
    from lightning_mmembed.items import Item, Query

    single = cfg.query is not None or cfg.query_image is not None
    if single == (cfg.queries is not None):
        raise UserInputError("give query=<text>, query_image=<picture> or both, or else queries=<file or folder>")
    if single:
        picture = None if cfg.query_image is None else read_picture(Path(cfg.query_image))
        text = None if cfg.query is None else str(cfg.query)
        return [Query(Item(text, picture), cfg.instruction, "query" if picture is None else str(cfg.query_image))]
    return [Query(candidate.item, cfg.instruction, candidate.did) for candidate in read_source(cfg.queries)]


def _index_encoder(cfg: DictConfig, made: dict[str, Any]) -> Encoder:
    """The encoder that made the vectors: the one that the index names, or the configured one."""
    import torch

    from lightning_mmembed.retrieval.embed import encoder_fingerprint

    torch.manual_seed(made["seed"])  # weights that no checkpoint holds are drawn as they were
    encoder = (
        load_encoder(cfg.model.encoder, cfg.ckpt_path) if cfg.get("model") is not None else _named_encoder(cfg, made)
    )
    if encoder_fingerprint(encoder) != made["encoder"]:
        raise UserInputError(
            f"index={cfg.index!r} was made by another encoder, with model={made['model']} and "
            f"ckpt_path={made['ckpt_path']!r}; search with that one, or embed the source again with this one"
        )
    return encoder


def _named_encoder(cfg: DictConfig, made: dict[str, Any]) -> Encoder:
    """The encoder that an index names; a foreign index can have nothing run but what loads weights."""
    arguments = dict(made["model"] or {})
    loader = arguments.pop("_target_", None)
    if loader not in _LOADERS:
        raise UserInputError(f"index={cfg.index!r} names no model to load; give model=... as when it was embedded")
    try:
        encoder: Encoder = hydra.utils.get_method(loader)(**arguments)
    except TypeError as error:
        raise UserInputError(
            f"{cfg.index}/index.json names a model that cannot be loaded ({error}); give model=... yourself"
        ) from error
    return _with_weights(encoder, cfg.ckpt_path or made["ckpt_path"])


def _found(query: Query, ranked: Iterable[tuple[int, float]], items: FileItems, thumbnails: bool) -> GalleryQuery:
    from lightning_mmembed.retrieval.found import thumbnail
    from lightning_mmembed.retrieval.report import GalleryQuery, GalleryResult

    results = []
    for number, score in ranked:
        if number >= 0:  # less is the padding of a pool that is smaller than top_k
            row = items.rows[number]
            picture = thumbnail(items.picture(row)) if thumbnails else None
            results.append(GalleryResult(row.id, score, row.txt, picture, row.modality.value, False, True))
    asked = thumbnail(cast(bytes | None, query.item.image))
    return GalleryQuery("", query.qid, query.instruction, query.item.text, asked, (), tuple(results))


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="embed")
def _embed_main(cfg: DictConfig) -> None:
    run_command(embed, cfg)


def embed_main() -> None:
    """``mmembed-embed``: see ``conf/embed.yaml``."""
    sys.argv[1:] = [quoted(argument, EMBED_TEXTS) for argument in sys.argv[1:]]
    _embed_main()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="search")
def _search_main(cfg: DictConfig) -> None:
    run_command(search, cfg)


def search_main() -> None:
    """``mmembed-search``: see ``conf/search.yaml``."""
    sys.argv[1:] = [quoted(argument, SEARCH_TEXTS) for argument in sys.argv[1:]]
    _search_main()


def quoted(argument: str, keys: Collection[str]) -> str:
    r"""An argument of the command line that Hydra is to take as it is, commas, quotes and all, where its key is named.

    Example:
        >>> quoted("query=what's red, and a bus?", ["query"]), quoted("top_k=3", ["query"])
        ("query='what\\'s red, and a bus?'", 'top_k=3')
    """
    key, equals, text = argument.partition("=")
    if not equals or key not in keys or text == "null":
        return argument
    # Backslashes count only before a quote, where Hydra takes them in pairs; OmegaConf takes ${ for a reference.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text).replace("${", r"\${")
    return f"{key}='{escaped}'"
