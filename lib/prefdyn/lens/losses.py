"""Any loss as weights: of tokens by autograd at the log-probs, or of the whole vocabulary by autograd at the logits.

The gradient of a loss L that reads token log-probs alone is a weighted sum, grad L = - sum_tok w_tok grad log pi(tok)
with w = -dL/dlogp. A loss that reads whole distributions (an entropy bonus, an exact KL divergence, distillation) has
weights over positions and vocabulary, and the forward-mode pass serves it as well: G = - sum dL/dlogits * (tangent of
logits).
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .alignment import Direction, logits_with_tangent
from .batch import Batch
from .faithful import faithful
from .weights import TokenWeights


def from_loss(
    loss: Callable[[torch.Tensor], torch.Tensor],
    logps: torch.Tensor,
    response: torch.Tensor,
    unit: torch.Tensor | None = None,
    strength: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> TokenWeights:
    """Token weights w = -dL/dlogp of a loss, by autograd at the log-probs.

    Args: loss, a function of the token log-probs [N, T] alone that returns a scalar; whatever else it reads (masks,
    references, advantages) it closes over. response, bool [N, T]. unit, int64 [N, T], what reweighting acts on as a
    whole (-1 outside responses); by default each token is a unit. strength, (w) -> [U], the factor that the loss gives
    to each unit; by default the mean of |w| over its tokens.
    Raises ValueError if the loss is no scalar, is not finite, or has a gradient outside of responses.
    """
    leaf = logps.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = loss(leaf)
        if value.ndim != 0:
            raise ValueError(f"from_loss: the loss must be a scalar, given the shape {tuple(value.shape)}")
        if not bool(value.isfinite()):
            raise ValueError(f"from_loss: the loss is {value.item()}")
        (grad,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
    if bool((grad[~response] != 0).any()):
        raise ValueError("from_loss: the loss depends on log-probs outside of the responses; mask them")
    w = -grad
    if unit is None:
        unit = torch.full(response.shape, -1, dtype=torch.int64, device=response.device)
        unit[response] = torch.arange(int(response.sum()), device=response.device)
    return TokenWeights(w=w, strength=_mean_size(w, unit) if strength is None else strength(w), unit=unit)


def _mean_size(w: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Mean of |w| over the tokens of each unit, [U], at least 1e-30: weights are divided by it."""
    inside = unit >= 0
    units = int(unit.max()) + 1 if bool(inside.any()) else 0
    total = w.new_zeros(units).index_add(0, unit[inside], w[inside].abs())
    count = w.new_zeros(units).index_add(0, unit[inside], torch.ones_like(w[inside]))
    return (total / count.clamp(min=1)).clamp(min=1e-30)


LogitLoss = Callable[[torch.Tensor, Batch, torch.Tensor], torch.Tensor]  # (logits [N, C, V], rows, columns) -> scalar


def logit_contributions(
    model: PreTrainedModel,
    batch: Batch,
    direction: Direction,
    loss: LogitLoss,
    size: int = 32,
    temperature: float = 1.0,
) -> torch.Tensor:
    """What each response token contributes to G of a loss that reads whole distributions, [N, T]; their sum is G.

    With z the logits that predict a token and dz their derivative along `direction`, a token contributes
    - sum_v dL/dz_v dz_v. One forward-mode pass, in chunks of `size` rows.

    Args: loss, (logits [n, C, V] of the C columns `likelihood.response_columns` of a chunk, the chunk, the columns) ->
    a scalar. It must be a sum over rows, since chunks are added up: a mean divides by the number of all rows itself.
    Raises ValueError if the loss is no scalar, or reads logits outside of responses.
    """
    parts = []
    with faithful(model):
        for rows in batch.slices(size):
            logits, tangent, columns = logits_with_tangent(model, rows, direction, temperature)
            leaf = logits.detach().requires_grad_(True)
            with torch.enable_grad():
                value = loss(leaf, rows, columns)
            if value.ndim != 0:
                raise ValueError(f"logit_contributions: the loss must be a scalar, given {tuple(value.shape)}")
            (grad,) = torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)
            if bool((grad[~rows.response[:, columns]] != 0).any()):
                raise ValueError("logit_contributions: the loss depends on logits outside of the responses; mask them")
            # where a logit is -inf its probability is 0, and so is all that it could change
            found = -(grad * tangent).nan_to_num(0.0).sum(-1)
            parts.append(found.new_zeros(rows.ids.shape).index_copy(1, columns, found))
    return torch.cat(parts)
