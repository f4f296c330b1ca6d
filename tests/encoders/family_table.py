"""The table family x contract of docs/encoders.md; run this file to write it anew."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from family_worlds import WORLDS, build

from lightning_mmembed import MLLMEncoder
from lightning_mmembed.encoders.contracts import Contract, check_contracts, gradient_reach
from lightning_mmembed.files import write_atomically

DOCUMENT = Path(__file__).parents[2] / "docs" / "encoders.md"
BEGIN, END = "<!-- contracts: begin -->", "<!-- contracts: end -->"


def results(path: Path, name: str) -> list[Contract]:
    """Every contract in both kinds of attention and with both poolings."""
    found = []
    for bidirectional in (True, False):
        for pooling in ("mean", "last"):
            encoder = MLLMEncoder.from_pretrained(
                path, pooling=pooling, bidirectional=bidirectional, check_contracts=False
            )
            found += [*check_contracts(encoder), gradient_reach(encoder, WORLDS[name].unread)]
    return found


def table(outcomes: Callable[[str], list[Contract]]) -> str:
    """A row for each family, a column for each contract."""
    columns: list[str] = []
    rows = []
    for name in WORLDS:
        found = outcomes(name)
        columns = list(dict.fromkeys(contract.name for contract in found))
        broken = {contract.name: contract.detail for contract in found if not contract.passed}
        rows.append([f"`{name}`", *("no: " + broken[c] if c in broken else "yes" for c in columns)])
    lines = [["family", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written() -> str:
    """The table as it stands in the document."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Write the table into the document, between its two marks."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    with tempfile.TemporaryDirectory() as root:
        new = table(lambda name: results(build(Path(root) / name, WORLDS[name]), name))
    write_atomically(DOCUMENT, f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.partition(END)[2]}")
    print(f"written: {DOCUMENT}")


if __name__ == "__main__":
    main()
