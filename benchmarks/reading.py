"""Reading pictures: our shards against a map-style dataset that opens one file an item, on the same pictures.

    python -m benchmarks.reading            20,000 JPEGs, 1 GB in a temporary folder (TMPDIR says on which disk)

Three kinds of work: ``bytes`` reads a picture's bytes; ``decoded`` reads them and decodes to RGB, with the same
decoder for both; ``decode only`` decodes bytes that lie in memory, which no way of reading can beat. Random order is
that of training, sequential order that of embedding a pool; a round reads a part of the pictures, so that random
reads lie far apart, as in a dataset larger than the memory. Cold rounds begin with none of the files' pages in the
page cache, and, where the user is root, no inode or directory entry either. The datasets take turns, so that a
machine whose speed drifts slows both; the figures are medians, of the rates and of the ratios within a turn. Nothing
is returned but a number: what a training adds to a sample (resizing, tokens, a copy between processes) is the same
for both and brings them closer.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mmembed.data import Shards, shard_dataset
from lightning_mmembed.encoders.processor import decode_image

PICTURES, DRAWN, READ, ROUNDS, BATCH_SIZE, SEED = 20_000, 2000, 1000, 9, 25, 0
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
POOL = "cand_pool/global/mbeir_drawn_train_cand_pool.jsonl"


class Files(Dataset[int]):
    """Records in memory, one file opened an item."""

    def __init__(self, root: Path, decode: bool) -> None:
        self.root, self.decode = root, decode
        self.records = [json.loads(line) for line in (root / POOL).read_text().splitlines()]

    def __getitem__(self, index: int) -> int:
        path = self.root / self.records[index]["img_path"]
        return Image.open(path).convert("RGB").height if self.decode else len(path.read_bytes())


class FromShards(Dataset[int]):
    """Our shards, through their index: a batch at a time, as the package reads a pool."""

    def __init__(self, directory: Path, decode: bool) -> None:
        self.items: Any = Shards(directory).pool("train").items
        self.decode = decode

    def __getitems__(self, indices: list[int]) -> list[int]:
        pictures = [candidate.item.image for candidate in self.items.__getitems__(indices)]
        return [decode_image(picture).height if self.decode else len(picture) for picture in pictures]


class InMemory(Dataset[int]):
    """Decodes what was read beforehand."""

    def __init__(self, pictures: dict[int, bytes]) -> None:
        self.pictures = pictures

    def __getitem__(self, index: int) -> int:
        return decode_image(self.pictures[index]).height


class Started(Subset[int]):
    """A part of a dataset whose index -1 reads nothing: what the workers do until all of them run."""

    def __getitems__(self, indices: list[int]) -> list[int]:
        return [0] * len(indices) if indices[0] < 0 else super().__getitems__(indices)


def rate(dataset: Dataset[int], workers: int, order: Sequence[int]) -> float:
    """Samples per second, without the time that the workers need to start."""
    idle = [-1] * BATCH_SIZE * max(1, 2 * workers)  # as many batches as a DataLoader asks for at once
    loader: DataLoader[Any] = DataLoader(
        Started(dataset, order),
        BATCH_SIZE,
        sampler=[*idle, *range(len(order))],
        num_workers=workers,
        collate_fn=list,
    )
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    read = sum(size > 0 for batch in batches for size in batch)
    assert read == len(order)
    return read / (time.perf_counter() - start)


def draw_pictures(root: Path) -> None:
    """Soft shapes under a little noise, 256 pixels on the short side, in M-BEIR's layout; each stands there often."""
    rng = np.random.default_rng(SEED)
    drawn = []
    for _ in range(DRAWN):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((341, 256), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(soft + rng.normal(0, 7, (256, 341, 1)), 0, 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(noisy).save(encoded, "JPEG", quality=80)
        drawn.append(encoded.getvalue())
    records = []
    for number in range(PICTURES):
        path = f"mbeir_images/drawn_images/{number // 100:03d}/{number}.jpg"
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(drawn[number % DRAWN])
        records.append({"did": f"50:{number + 1}", "txt": None, "img_path": path, "modality": "image"})
    query = {"qid": "50:1", "query_txt": "Any", "query_modality": "text", "pos_cand_list": ["50:1"], "task_id": 0}
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    texts = {
        POOL: "\n".join(map(json.dumps, records)),
        "query/train/mbeir_drawn_train.jsonl": json.dumps(query),
        "instructions/query_instructions.tsv": f"{header}\ntext\timage\tdrawn\t50\tFind it.\n",
    }
    (root / "cand_pool/local").mkdir(parents=True)  # a pool of evaluation is not needed, its folder is
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def warm(folder: Path) -> None:
    """Put the files of a folder into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def cold(folder: Path) -> None:
    """Take the files of a folder out of the page cache, and as root the inodes and directory entries too."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("2")


def measure(root: Path, shards: Path, prepare: Callable[[Path], None], workers: int, order: Sequence[int]) -> None:
    """Print a line for bytes and one for decoded pictures."""
    records = Files(root, False).records
    in_memory = {index: (root / records[index]["img_path"]).read_bytes() for index in order}
    for work, decode in (("bytes", False), ("decoded", True)):
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, kind, place in (("files", Files, root), ("shards", FromShards, shards)):
                dataset = kind(place, decode)
                prepare(place)
                rates.setdefault(name, []).append(rate(dataset, workers, order))
                del dataset  # pages that are mapped cannot be dropped
            if decode:
                rates.setdefault("decode only", []).append(rate(InMemory(in_memory), workers, order))
        found = ", ".join(f"{name} {statistics.median(r):.0f}/s" for name, r in rates.items())
        ratios = {
            name: statistics.median(a / b for a, b in zip(r, rates["files"], strict=True))
            for name, r in rates.items()
            if name != "files"
        }
        compared = ", ".join(f"{name} / files {ratio:.2f}" for name, ratio in ratios.items())
        which = "sequential" if isinstance(order, range) else "random"
        print(f"{prepare.__name__}, {workers} workers, {which}, {work}: {found}; {compared}", flush=True)


def main() -> None:
    """Measure each cache, number of workers and order."""
    with tempfile.TemporaryDirectory() as folder:
        root, shards = Path(folder, "source"), Path(folder, "shards")
        draw_pictures(root)
        shard_dataset(root, shards)
        os.sync()  # a page that is not written yet cannot be dropped
        size = sum(path.stat().st_size for path in root.rglob("*.jpg")) / PICTURES
        print(f"{PICTURES} JPEGs of {size / 1000:.1f} kB, {os.cpu_count()} cores", file=sys.stderr)
        scattered = np.random.default_rng(SEED).permutation(PICTURES)[:READ].tolist()
        for prepare, workers, order in itertools.product((warm, cold), (0, 2), (scattered, range(READ))):
            measure(root, shards, prepare, workers, order)


if __name__ == "__main__":
    main()
