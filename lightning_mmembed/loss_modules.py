"""Losses that hold another loss: with a learned temperature, or over vectors that are cut to several lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmembed.errors import UserInputError
from lightning_mmembed.losses import contrastive_loss


class LearnedTemperature(nn.Module):
    """A loss whose temperature is trained with the encoder (CLIP, Radford et al., 2021, section 2.5).

    What is trained is the logarithm of the scale, which is 1 over the temperature, and that is held between 0 and the
    logarithm of ``max_scale``: the weight itself is brought back there, so that it cannot drift away unnoticed.

    Args:
        loss: Any loss with the argument ``temperature``.
        temperature: What to start with.
        max_scale: The largest scale; 100 is CLIP's.

    Raises:
        UserInputError: If the temperature is not between ``1 / max_scale`` and 1.

    Example:
        >>> eye, index = torch.eye(2), torch.tensor([0, 1])
        >>> round(LearnedTemperature(temperature=1.0)(eye, eye, index).item(), 4)
        0.3133
    """

    def __init__(
        self, loss: Callable[..., Tensor] = contrastive_loss, temperature: float = 0.05, max_scale: float = 100.0
    ) -> None:
        super().__init__()
        if not 1 <= max_scale < math.inf or not 1 / max_scale <= temperature <= 1:
            raise UserInputError(
                f"temperature={temperature} must lie between 1 / max_scale={max_scale} and 1; change one of them"
            )
        self.loss = loss
        self.max_log_scale = math.log(max_scale)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    @property
    def temperature(self) -> Tensor:
        """The temperature of now, with its gradient."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, self.max_log_scale)
        return torch.exp(-self.log_scale)

    def forward(
        self, queries: Tensor, candidates: Tensor, positive_index: Tensor, mask: Tensor | None = None, **batch: Tensor
    ) -> Tensor:
        """The loss at the temperature of now.

        Args:
            queries: ``(Q, D)`` unit vectors.
            candidates: ``(C, D)`` unit vectors.
            positive_index: ``(Q,)`` column of each query's positive.
            mask: ``(Q, C)`` boolean, True where a candidate is left out.
            batch: What else the loss asks for (:data:`~lightning_mmembed.losses.BATCH_ARGUMENTS`).
        """
        return self.loss(queries, candidates, positive_index, mask, temperature=self.temperature, **batch)


class MatryoshkaLoss(nn.Module):
    """The weighted sum of a loss over vectors that are cut to several lengths and made unit vectors again.

    So the first numbers of a vector can be searched alone (Kusupati et al., 2022, "Matryoshka Representation
    Learning").

    Args:
        loss: Any loss.
        matryoshka_dims: The lengths, such as ``[4096, 1024, 256]``, the width of the vectors among them: what lies
            past the largest one would not be trained.
        matryoshka_weights: The weight of each; by default 1.

    Raises:
        UserInputError: If a length is below 1 or there are none, or there is not one weight for each.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not matryoshka_dims or min(matryoshka_dims) < 1:
            raise UserInputError(f"matryoshka_dims={list(matryoshka_dims)} must be one length or more, each from 1 on")
        weights = [1.0] * len(matryoshka_dims) if matryoshka_weights is None else list(matryoshka_weights)
        if len(weights) != len(matryoshka_dims):
            raise UserInputError(
                f"matryoshka_weights={weights} must be as many as matryoshka_dims={list(matryoshka_dims)}"
            )
        self.loss = loss
        self.matryoshka_dims, self.matryoshka_weights = tuple(matryoshka_dims), tuple(weights)

    def forward(
        self,
        queries: Tensor,
        candidates: Tensor,
        positive_index: Tensor,
        mask: Tensor | None = None,
        all_queries: Tensor | None = None,
        **batch: Tensor,
    ) -> Tensor:
        """The weighted sum.

        Args:
            queries: ``(Q, D)`` unit vectors.
            candidates: ``(C, D)`` unit vectors.
            positive_index: ``(Q,)`` column of each query's positive.
            mask: ``(Q, C)`` boolean, True where a candidate is left out.
            all_queries: ``(N, D)`` queries of all processes, where the loss asks for them; they are cut, too.
            batch: What else it asks for (:data:`~lightning_mmembed.losses.BATCH_ARGUMENTS`).

        Raises:
            UserInputError: If the largest length is not ``D``.
        """
        check_widths(self, queries.shape[1])
        total = torch.zeros((), device=queries.device)
        for dim, weight in zip(self.matryoshka_dims, self.matryoshka_weights, strict=True):
            extra = batch if all_queries is None else {**batch, "all_queries": _cut(all_queries, dim)}
            cut = self.loss(_cut(queries, dim), _cut(candidates, dim), positive_index, mask, **extra)
            total = total + weight * cut
        return total


def check_widths(loss: Callable[..., Tensor], width: int) -> None:
    """Refuse a loss that holds, or is, a :class:`MatryoshkaLoss` for vectors of another width.

    Args:
        loss: Any loss.
        width: ``D``, of the vectors that it is to be given.

    Raises:
        UserInputError: If the largest of the ``matryoshka_dims`` is another one.
    """
    for part in loss.modules() if isinstance(loss, nn.Module) else ():
        if isinstance(part, MatryoshkaLoss) and max(part.matryoshka_dims) != width:
            such = [width // share for share in (1, 4, 16) if width >= share]
            raise UserInputError(
                f"matryoshka_dims={list(part.matryoshka_dims)}: the largest must be {width}, the width of the vectors, "
                f"since what lies past it is not trained; give such as matryoshka_dims={such}"
            )


def _cut(vectors: Tensor, dim: int) -> Tensor:
    """The first numbers of the vectors, as unit vectors, in float32 or better."""
    return F.normalize(vectors[:, :dim].to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
