"""From a ranking to modality-aware hard negatives: the rule of MM-Embed (section 3.2 of the paper), as pure functions.

Two kinds of negatives come out of the top ``k`` of one mixed pool:

* ``wrong_modality`` (C1): another modality than the instruction asks for, ranked above the best labelled positive;
  if no positive is among the top ``k``, every candidate of another modality there.
* ``wrong_content`` (C2): the wanted modality, but ranked below ``k_prime``, where unlabelled positives are rare.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

WRONG_MODALITY = "wrong_modality"
WRONG_CONTENT = "wrong_content"


@dataclass(frozen=True)
class HardNegatives:
    """The mined negatives of one query, each a 0-based position in its ranking, best first.

    Args:
        wrong_modality: Positions of the C1 candidates.
        wrong_content: Positions of the C2 candidates.
    """

    wrong_modality: tuple[int, ...]
    wrong_content: tuple[int, ...]


def mine_modality_aware(
    ranking: Sequence[object],
    modalities: Sequence[object],
    positives: Collection[object],
    wanted: object,
    k: int = 50,
    k_prime: int = 45,
) -> HardNegatives:
    """Pick the modality-aware hard negatives out of one query's ranking.

    Args:
        ranking: ``did`` of the candidates, best first; only the first ``k`` are looked at.
        modalities: Modality of each ranked candidate, in any type that compares with ``wanted``.
        positives: ``did`` of every labelled positive, whatever its dataset.
        wanted: The modality that the instruction asks for.
        k: Depth of the ranking.
        k_prime: Candidates of the wanted modality count as negatives from rank ``k_prime + 1`` on.

    Returns:
        Positions in ``ranking``; no labelled positive is ever among them.

    Raises:
        ValueError: If ``k_prime`` is not between 0 and ``k``.

    Example:
        >>> mine_modality_aware(["a", "b", "c", "d"], ["text", "image", "text", "image"], {"c"}, "image", 4, 3)
        HardNegatives(wrong_modality=(0,), wrong_content=(3,))
    """
    if not 0 <= k_prime <= k:
        raise ValueError(f"k_prime={k_prime} must lie between 0 and k={k}")
    top = list(ranking[:k])
    is_positive = [did in positives for did in top]
    best = is_positive.index(True) if True in is_positive else len(top)
    wrong_modality = tuple(i for i in range(best) if modalities[i] != wanted)
    wrong_content = tuple(i for i in range(k_prime, len(top)) if modalities[i] == wanted and not is_positive[i])
    return HardNegatives(wrong_modality, wrong_content)
