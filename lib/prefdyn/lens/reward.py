"""Towards reward: the lens along the gradient of what a policy is expected to earn, and how well that is known.

    J(theta) = E_x E_{y ~ pi(.|x)}[ R(x, y) ],     d_R = grad J = E_x E_y[ (R(x, y) - b) grad log pi(y|x) ]

by the score function (REINFORCE, Williams 1992, https://doi.org/10.1007/BF00992696). Each reply's baseline b is the
mean reward of the *other* replies to its prompt (*Buy 4 REINFORCE Samples, Get a Baseline for Free!*, Kool et al. 2019,
eq. 8): it does not depend on the reply, so the estimate stays unbiased. With its own reward in it, the estimate would
be too short by the factor (K - 1) / K.

d_R is a direction as any other: <d_R, -grad L> = sum_tok w_tok a_tok, and a step of size lr along -grad L changes J by
lr times that, in points. But unlike the direction towards fixed responses it is an estimate. It is made in independent
parts, whose spread is its noise. Parts can be of two kinds, which estimate different things:

"prompts"   each part has some of the prompts with all of their replies. Parts differ by prompts and by replies, as
            another sample of prompts would: errors, cosines and squared norms are those of J over all prompts such as
            these. The parts add up to `reward_direction` itself, and cost no more than it does. The default.
"replies"   each part has all prompts and some of the replies to each, with a baseline of its own. Parts differ by
            replies alone: what they estimate is the J of these very prompts. Their baselines are of fewer replies, so
            that their sum is another, somewhat noisier estimate than `reward_direction`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .alignment import Direction, cosine, gradient, inner
from .batch import Batch
from .faithful import faithful
from .likelihood import token_logps

PARTS = 8  # of an estimated direction: enough for a standard error, few enough to cost no more than the whole
KINDS = ("prompts", "replies")


def reward_weights(points: torch.Tensor, group: int) -> torch.Tensor:
    """What every token of each reply weighs in d_R: (R - mean R of the other replies to its prompt) / (P K), [P K].

    See Kool et al. 2019, eq. 8; K / (K - 1) (R - mean of all K) is the same number. In points.

    Args: points, [P K], the rewards of K = `group` replies to each of P prompts; those of a prompt follow each other.
    Raises ValueError for a group below 2, a number of replies that it does not divide, and rewards that are not finite.
    """
    if group < 2:
        raise ValueError(f"group={group}: at least 2 replies to a prompt are needed; the others are the baseline")
    if points.ndim != 1 or not len(points) or len(points) % group:
        raise ValueError(f"points {tuple(points.shape)}: must be [P * K], a multiple of group={group}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"points: {int((~points.isfinite()).sum())} of {len(points)} rewards are not finite")
    own = points.reshape(-1, group)
    return (group / (group - 1) * (own - own.mean(-1, keepdim=True))).flatten() / len(points)


def on_tokens(weights: torch.Tensor, replies: Batch, dtype: torch.dtype) -> torch.Tensor:
    """A weight of each reply [N] on all of its tokens, the end token included, [N, T], zero elsewhere."""
    return weights[:, None].to(dtype) * replies.response


def reward_direction(
    model: PreTrainedModel, replies: Batch, points: torch.Tensor, group: int, temperature: float = 1.0, size: int = 256
) -> Direction:
    """d_R, an unbiased estimate of the gradient of the expected reward, points a unit of every parameter.

    Args: replies, P K of them, sampled from `model` at `temperature`, the K = `group` replies to a prompt one after the
    other; points [P K], their rewards. size, rows a pass. Raises ValueError as `reward_weights`, and if there is not
    one reward a reply.
    """
    return _weighted(model, replies, _checked(replies, points, group), temperature, size)


def expected_direction(
    model: PreTrainedModel, replies: Batch, points: torch.Tensor, prompts: int, temperature: float = 1.0
) -> tuple[torch.Tensor, Direction]:
    """J and its exact gradient, where all replies to each prompt can be listed: weights pi(y) (R(y) - J_x) / P.

    The baseline J_x, the expected reward of the prompt, changes nothing in a sum over all replies, whose probabilities
    add up to 1; a J_x of 0 would do. What sampled replies are compared with.

    Args: replies, all that the policy can give to each of `prompts` prompts, as many to each, those of a prompt one
    after the other; points, their rewards, [N]. Raises ValueError if their probabilities do not add up to 1.
    """
    with torch.no_grad(), faithful(model):
        logps = torch.cat([token_logps(model, part, temperature).sum(-1) for part in replies.slices(256)])
    pi = logps.exp().reshape(prompts, -1)
    if not bool(((pi.sum(-1) - 1).abs() < 1e-4).all()):
        raise ValueError(f"replies: the probabilities of a prompt's replies add up to {pi.sum(-1).tolist()}, not to 1")
    rewards = points.reshape(prompts, -1).to(pi.dtype)
    mean = (pi * rewards).sum(-1, keepdim=True)
    weights = (pi * (rewards - mean)).flatten() / prompts
    return mean.mean(), _weighted(model, replies, weights, temperature, 256)


def reward_parts(
    model: PreTrainedModel,
    replies: Batch,
    points: torch.Tensor,
    group: int,
    parts: int = PARTS,
    by: str = "prompts",
    temperature: float = 1.0,
    size: int = 256,
) -> Iterator[tuple[float, Direction]]:
    """Independent estimates of d_R, one after the other, each times its share of the data: (share, direction).

    Shares add up to 1, and directions to the estimate of all (see the module for what the two kinds of parts tell).
    Only one of them is in memory at once.

    Args: as for `reward_direction`. by, one of KINDS. parts, how many at most: no more than there are prompts, or
    groups of at least 2 replies to a prompt. Raises ValueError as `reward_direction`, for another `by`, and where there
    would be fewer than two parts.
    """
    weights = _checked(replies, points, group)
    if by not in KINDS:
        raise ValueError(f"by={by!r}: must be one of {', '.join(KINDS)}")
    rows = torch.arange(len(points), device=points.device).reshape(-1, group)
    most = len(rows) if by == "prompts" else group // 2
    if min(parts, most) < 2:
        raise ValueError(f"reward_parts: {parts} parts by {by} of {len(rows)} prompts x {group} replies; 2 are needed")
    for own in rows.tensor_split(min(parts, most), 0 if by == "prompts" else 1):
        index = own.flatten()
        share = len(index) / len(points)
        own_weights = weights[index] if by == "prompts" else share * reward_weights(points[index], own.shape[1])
        yield share, _weighted(model, replies.take(index), own_weights, temperature, size)


@dataclass(frozen=True)
class Estimated:
    """A direction that is known by independent parts: their sum, that of the first half of them, and their spread.

    whole, half: directions. shares: [B], the part of the data that each has, together 1. in_half: that of the half.
    along: by the name of a vector v, the inner products of the parts with it, [B]. squared: of the parts with
    themselves, [B].
    """

    whole: Direction
    half: Direction
    shares: torch.Tensor
    in_half: float
    along: dict[str, torch.Tensor]
    squared: torch.Tensor

    def halves(self) -> tuple[Direction, Direction]:
        """Two independent estimates of the direction, by the first half of the parts and by the others."""
        first = {name: t / self.in_half for name, t in self.half.items()}
        return first, {name: (self.whole[name] - t) / (1 - self.in_half) for name, t in self.half.items()}

    def agreement(self) -> float:
        """Cosine of the two halves: near 1 where the direction is known, near 0 where it is mostly noise."""
        return cosine(*self.halves())

    def squared_norm(self) -> float:
        """Squared length of what is estimated, free of noise: the mean inner product of two different parts.

        |sum of parts|^2 is too long by the noise; products of parts that are independent are not. With two parts it is
        the inner product of the halves. Unbiased, so that it may be below 0 where there is little but noise.
        """
        between = inner(self.whole, self.whole).double() - self.squared.sum()
        return (between / (1 - self.shares.square().sum())).item()

    def reliability(self) -> float:
        """squared_norm / |estimate|^2: what of its squared length is no noise; cut to 0 to 1.

        Its square root is the cosine that the estimate is expected to have with the truth. A cosine with some other
        vector, divided by it, is free of the shortening by this noise (Spearman 1904).
        """
        length = inner(self.whole, self.whole).item()
        return min(1.0, max(0.0, self.squared_norm() / length)) if length > 0 else math.nan

    def inner(self, name: str) -> tuple[float, float]:
        """<d, v> of a vector that the parts were projected on, and its standard error by the spread of parts."""
        return self.along[name].sum().item(), spread_error(self.along[name], self.shares)


def estimated(parts: Iterable[tuple[float, Direction]], onto: Mapping[str, Direction] | None = None) -> Estimated:
    """Add up the `parts` of a direction (`reward_parts`) and project each on the vectors `onto`.

    Of the parts no more than their sum and half of it is kept. Raises ValueError for fewer than two.
    """
    whole: Direction = {}
    shares, squared = [], []
    along: dict[str, list[torch.Tensor]] = {name: [] for name in onto or {}}
    half, in_half = {}, 0.0
    for share, part in parts:
        whole = {name: whole[name] + t for name, t in part.items()} if whole else dict(part)
        shares.append(share)
        squared.append(inner(part, part).double())
        for name, vector in (onto or {}).items():
            along[name].append(inner(part, vector).double())
        if not half and sum(shares) >= 0.5 - 1e-9:
            half, in_half = {name: t.clone() for name, t in whole.items()}, sum(shares)
    if len(shares) < 2:
        raise ValueError(f"estimated: {len(shares)} parts; at least 2 are needed to tell signal from noise")
    return Estimated(
        whole=whole,
        half=half,
        shares=torch.tensor(shares, dtype=torch.float64),
        in_half=in_half,
        along={name: torch.stack(values).cpu() for name, values in along.items()},
        squared=torch.stack(squared).cpu(),
    )


def spread_error(values: torch.Tensor, shares: torch.Tensor) -> float:
    """Standard error of the sum of independent `values` [B], each its share [B] of one number but for noise.

    With x_i = value / share and variances in proportion to 1 / share: sqrt(sum share (x - mean)^2 / (B - 1)), which for
    equal shares is sqrt(B) times the standard deviation of the values. It has B - 1 degrees of freedom.
    """
    single = values / shares
    return ((shares * (single - values.sum()).square()).sum() / (len(values) - 1)).sqrt().item()


def error_by_prompt(points: torch.Tensor, scores: torch.Tensor, group: int) -> tuple[float, float]:
    """<d_R, v> and its standard error over prompts, from the `token_scores` of the replies along v, [P K, T].

    Dearer than by parts (a forward-mode pass of all replies for every v), and surer: P - 1 degrees of freedom.
    Raises ValueError as `reward_weights`, and for one prompt.
    """
    sums = (reward_weights(points, group) * scores.sum(-1)).double().reshape(-1, group).sum(-1)
    if len(sums) < 2:
        raise ValueError("error_by_prompt: one prompt has no spread")
    return sums.sum().item(), spread_error(sums, torch.full_like(sums, 1 / len(sums)))


def cosine_of(a: Estimated, b: Estimated) -> tuple[float, float]:
    """Cosine of two estimated directions: as they are, and of what they estimate, free of noise.

    The second is by halves: (<a1, b2> + <a2, b1>) / 2 over sqrt(<a1, a2> <b1, b2>), in which no product has the same
    noise twice, also where both are made of the same replies (rewarded in two ways, say). NaN where a product of halves
    is not above 0: then nothing is known of the angle. It is a ratio of noisy numbers and may leave -1 to 1.
    """
    (a1, a2), (b1, b2) = a.halves(), b.halves()
    squares = inner(a1, a2).item(), inner(b1, b2).item()
    across = (inner(a1, b2) + inner(a2, b1)).item() / 2
    clean = across / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else math.nan
    return cosine(a.whole, b.whole), clean


def _checked(replies: Batch, points: torch.Tensor, group: int) -> torch.Tensor:
    """`reward_weights`, one a reply."""
    if len(points) != len(replies):
        raise ValueError(f"{len(points)} rewards for {len(replies)} replies: one a reply is needed")
    return reward_weights(points, group)


def _weighted(
    model: PreTrainedModel, replies: Batch, weights: torch.Tensor, temperature: float, size: int
) -> Direction:
    """sum of weights times grad log pi(reply), of equal rows once and of those that weigh 0 not at all."""
    told = torch.cat([replies.ids, replies.attention.long(), replies.response.long()], 1)
    _, place = torch.unique(told, dim=0, return_inverse=True)
    place = place.to(weights.device)
    total = weights.new_zeros(int(place.max()) + 1).index_add(0, place, weights)
    first = torch.full_like(total, len(weights), dtype=torch.int64)
    first.scatter_reduce_(0, place, torch.arange(len(weights), device=place.device), "amin")
    counted = total != 0
    rows, w = first[counted], total[counted]
    own = replies.take(rows)
    on = on_tokens(w, own, model.dtype)
    return gradient(model, ((part, on[where]) for where, part in own.pieces(size)) if len(rows) else (), temperature)
