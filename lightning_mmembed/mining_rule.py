"""The settings of hard-negative mining: which rule, and which candidates it leaves out because of their scores.

Names and meanings of the thresholds are those of ``sentence_transformers.util.mine_hard_negatives``; the cross-check by
another model is not one of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_mmembed.errors import UserInputError, refuse_below_one

if TYPE_CHECKING:
    from lightning_mmembed.mining import Rankings

WRONG_MODALITY = "wrong_modality"
WRONG_CONTENT = "wrong_content"
ANY_MODALITY = "any_modality"

#: Kinds by their number. A file of negatives holds the number: new kinds come at the end.
KINDS = (WRONG_MODALITY, WRONG_CONTENT, ANY_MODALITY)

#: The kinds of negatives that each rule looks for.
RULES = {
    "modality_aware": (WRONG_MODALITY, WRONG_CONTENT),
    "wrong_modality": (WRONG_MODALITY,),
    "wrong_content": (WRONG_CONTENT,),
    "top_k": (ANY_MODALITY,),
    "window": (ANY_MODALITY,),
}

STRATEGIES = ("top", "random")


@dataclass(frozen=True)
class MiningRule:
    """Which candidates of a ranking are hard negatives.

    A candidate that a threshold leaves out keeps its rank; only the window counts what is left.

    Args:
        rule: ``"modality_aware"``, the paper's two kinds; ``"wrong_modality"`` or ``"wrong_content"``, one of them;
            ``"top_k"``, every candidate; ``"window"``, those from ``range_min`` to ``range_max``.
        k: Depth of the ranking.
        k_prime: Rank below which candidates of the wanted modality count as ``wrong_content``.
        range_min: How many of the best candidates that are neither positives nor left out the window skips.
        range_max: Where the window ends, counted alike; by default with the ranking.
        absolute_margin: How far below the lowest score of a labelled positive a negative's score has to be; not that of
            ``wrong_modality``, which is above the best positive by its definition.
        relative_margin: The same, as a share of the size of that score.
        max_score: The highest score of a negative.
        min_score: The lowest score of a negative.
        check_margin: How far below the lowest score of a labelled positive the score of a negative of the wanted
            modality has to be by more than, both by another model: what that model takes for a positive is likely one
            that nobody labelled. What has another modality cannot be one, and is kept.
        num_negatives: How many of each kind to keep for each query; by default all.
        sampling_strategy: Keep the best (``"top"``) or any (``"random"``).
        seed: Of the random ones.

    Raises:
        UserInputError: If a setting is unknown, cannot be, or has no effect on the rule.

    Example:
        >>> MiningRule("window", range_min=10, num_negatives=4, sampling_strategy="random").range_min
        10
    """

    rule: str = "modality_aware"
    k: int = 50
    k_prime: int = 45
    range_min: int = 0
    range_max: int | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    check_margin: float | None = None
    num_negatives: int | None = None
    sampling_strategy: str = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserInputError(f"rule={self.rule!r} is unknown; write one of {', '.join(RULES)}")
        refuse_below_one(k=self.k, num_negatives=self.num_negatives)
        if WRONG_CONTENT in RULES[self.rule]:
            check_band(self.k, self.k_prime)
        if self.sampling_strategy not in STRATEGIES:
            raise UserInputError(
                f"sampling_strategy={self.sampling_strategy!r} is unknown; write one of {', '.join(STRATEGIES)}"
            )
        if self.sampling_strategy == "random" and self.num_negatives is None:
            raise UserInputError("sampling_strategy='random' keeps all without num_negatives; say how many to keep")
        if not 0 <= self.seed < 2**64:
            raise UserInputError(f"seed={self.seed} must be from 0 to 2**64 - 1")
        self._check_window()
        for name in FILTERS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserInputError(f"{name}={value} must be a finite number, or null to leave nothing out")
            if value is not None and name in (*MARGINS, "check_margin") and RULES[self.rule] == (WRONG_MODALITY,):
                raise UserInputError(
                    f"{name}={value} has no effect with rule={self.rule!r}: it leaves out candidates that may be "
                    "unlabelled positives, and none of another modality than wanted is one; leave it out"
                )

    def _check_window(self) -> None:
        end = self.k if self.range_max is None else self.range_max
        if self.rule != "window":
            if self.range_min or self.range_max is not None:
                raise UserInputError(
                    f"range_min={self.range_min}, range_max={self.range_max} have no effect with rule={self.rule!r}; "
                    "write rule=window, or leave them out"
                )
        elif not 0 <= self.range_min < end <= self.k:
            raise UserInputError(
                f"range_min={self.range_min}, range_max={self.range_max}: they must obey 0 <= range_min < range_max "
                f"<= k={self.k}"
            )

    @property
    def needs_positive_scores(self) -> bool:
        """Whether the scores of labelled positives are needed."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def needs_check_scores(self) -> bool:
        """Whether the scores of another model are needed."""
        return self.check_margin is not None

    def check_scores_of(self, rankings: Rankings) -> None:
        """Refuse rankings that lack scores that the rule needs.

        Raises:
            UserInputError: If they do.
        """
        if self.needs_positive_scores and rankings.positive_scores is None:
            raise UserInputError(
                f"absolute_margin={self.absolute_margin}, relative_margin={self.relative_margin}: the scores of the "
                "labelled positives are missing; give positive_scores"
            )
        if self.needs_check_scores and (rankings.check_scores is None or rankings.check_positive_scores is None):
            raise UserInputError(
                f"check_margin={self.check_margin}: the scores of another model are missing; give check_scores and "
                "check_positive_scores"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, for fingerprints and files."""
        return dataclasses.asdict(self)


def check_band(k: int, k_prime: int) -> None:
    """Refuse a ``k_prime`` that is not a rank.

    Raises:
        UserInputError: If it is not between 0 and ``k``.
    """
    if not 0 <= k_prime <= k:
        raise UserInputError(f"k_prime={k_prime} must lie between 0 and k={k}")


def _above_absolute_margin(rankings: Rankings, margin: float) -> np.ndarray:
    assert rankings.positive_scores is not None
    above: np.ndarray = rankings.scores + margin > rankings.positive_scores[:, None]
    return above


def _above_relative_margin(rankings: Rankings, margin: float) -> np.ndarray:
    assert rankings.positive_scores is not None
    # The share is taken off a negative score, too: times (1 - margin) it would rise.
    threshold = rankings.positive_scores - np.abs(rankings.positive_scores) * margin
    above: np.ndarray = rankings.scores > threshold[:, None]
    return above


def _near_for_another_model(rankings: Rankings, margin: float) -> np.ndarray:
    assert rankings.check_scores is not None
    assert rankings.check_positive_scores is not None
    near = rankings.check_scores >= rankings.check_positive_scores[:, None] - margin
    # The instruction rules another modality out, however near it is: no such candidate is an unlabelled positive.
    near_and_wanted: np.ndarray = near & (rankings.modalities == rankings.wanted)
    return near_and_wanted


#: Filters that go by the score of a positive.
MARGINS = ("absolute_margin", "relative_margin")

#: Settings that leave candidates out because of their scores, in the order in which they do: from the rankings and
#: the setting to ``(Q, K)`` booleans, True for what is left out. A comparison with NaN is False.
FILTERS: dict[str, Callable[[Rankings, float], np.ndarray]] = {
    "absolute_margin": _above_absolute_margin,
    "relative_margin": _above_relative_margin,
    "max_score": lambda rankings, highest: rankings.scores > highest,
    "min_score": lambda rankings, lowest: rankings.scores < lowest,
    "check_margin": _near_for_another_model,
}
