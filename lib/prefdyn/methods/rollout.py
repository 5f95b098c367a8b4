"""Rollouts: rewards by token, values, advantages by time or by group; pure functions over padded tensors.

Rows are sequences and columns positions, [N, T]; `response` marks the tokens of responses, which are contiguous in a
row. The token at a marked position is the action, taken in the state of all tokens before it.
"""

from dataclasses import dataclass

import torch

from ..lens.batch import Batch

ROUNDING = 1e-6  # deviations up to here, relative to the largest number, are float32 noise of equal numbers
KL_ESTIMATORS = {
    "k1": "log p - log q: unbiased, of either sign",
    "k2": "(log p - log q)^2 / 2: biased, of low variance, never negative",
    "k3": "q/p - 1 - log(q/p): unbiased and never negative",
}


def kl_estimate(logps: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimate of KL(p || q) at each sampled token from its log-probs under p and q, same shape.

    See *Approximating KL Divergence*, Schulman 2020. Raises ValueError for another `kind` than KL_ESTIMATORS.
    """
    difference = logps - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"kl_estimator={kind!r}: must be one of {', '.join(KL_ESTIMATORS)}")


def last_token(response: torch.Tensor) -> torch.Tensor:
    """Column of the last response token of each row, [N]. Raises ValueError if a response is empty."""
    if not bool(response.any(-1).all()):
        rows = (~response.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"an empty response in row {rows[0]}: every rollout needs at least one token")
    columns = torch.arange(response.shape[1], device=response.device)
    return (columns * response).argmax(-1)


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, response: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Reward of each token, [N, T]: minus `coefficient` * kl everywhere, and the score at the last token.

    Args: scores [N], kl [N, T]. Raises ValueError if a score is missing or not finite.
    """
    if scores.shape != response.shape[:1]:
        raise ValueError(f"reward: one number a response is needed, [{response.shape[0]}], given {list(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(f"reward: not finite ({scores[row].item()}) for response {row}")
    rewards = -coefficient * kl.masked_fill(~response, 0.0)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_token(response)] += scores.to(rewards.dtype)
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, response: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages and returns (advantage + value) of response tokens, [N, T] each, zero elsewhere.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}; after the last token of a response
    value and advantage are 0, also where the response was cut at its longest. values[t] is the value of the state in
    which token t is chosen. See *High-Dimensional Continuous Control Using GAE*, Schulman et al. 2016, eq. 16.
    """
    if not rewards.shape == values.shape == response.shape:
        shapes = [tuple(t.shape) for t in (rewards, values, response)]
        raise ValueError(f"gae: rewards, values and response must share one shape [N, T], given {shapes}")
    values = values.masked_fill(~response, 0.0)
    advantages = torch.zeros_like(rewards)
    following, following_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = response[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following = torch.where(here, delta + gamma * lam * following, torch.zeros_like(following))
        following_value = values[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values).masked_fill(~response, 0.0)


def ties(returns: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
    """How groups of replies differ, from their returns and rewards [groups, k], points.

    spread: the standard deviation of returns in a group, mean. equals: share of groups of equal returns. tied: share of
    groups of equal rewards, whose returns may differ by the penalty alone. tied_distance: the share that they have in
    all distances of returns from the mean of their group, the advantages of RLOO and Dr. GRPO; tied_relative: in all
    distances in units of the group's spread, those of GRPO. Both are 0 where no returns differ.
    """
    spread = returns.std(-1, unbiased=False, keepdim=True)
    equal = spread <= ROUNDING * returns.abs().amax(-1, keepdim=True).clamp(min=1.0)
    distance = (returns - returns.mean(-1, keepdim=True)).abs().masked_fill(equal, 0.0)
    relative = distance / spread.clamp(min=1e-30)
    tied = rewards.amax(-1) == rewards.amin(-1)

    def share(x: torch.Tensor) -> float:
        return (x[tied].sum() / x.sum().clamp(min=1e-30)).item()

    return {
        "spread": spread.mean().item(),
        "equals": equal.float().mean().item(),
        "tied": tied.float().mean().item(),
        "tied_distance": share(distance),
        "tied_relative": share(relative),
    }


def whiten(x: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """`x` with mean 0 and standard deviation 1 over response tokens, zero elsewhere; a constant becomes 0."""
    inside = x[response]
    deviation = inside.std(unbiased=False)
    if deviation <= ROUNDING * inside.abs().max():
        return torch.zeros_like(x)
    return ((x - inside.mean()) / deviation).masked_fill(~response, 0.0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for perfect values, 0 for a constant; NaN for constant returns."""
    if returns.std(unbiased=False) <= ROUNDING * returns.abs().max():
        return float("nan")
    return (1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)).item()


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, response: torch.Tensor, clip: float
) -> torch.Tensor:
    """Half the mean squared error of the values over response tokens, a scalar.

    With `clip` > 0 values count as no further than that from the old ones if this makes the error larger, as in the
    reference implementation of PPO.
    """
    error = (values - returns).square()
    if clip > 0:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error[response].mean()


@dataclass(frozen=True)
class Rollouts:
    """Replies that a policy has just sampled, `group` to a prompt: rows of one prompt follow each other, N in all.

    old, ref: token log-probs under the policy that sampled and under the reference [N, T]. returns: the reward of each
    reply less the penalty for its divergence from the reference, [N], points. temperature: of the sampling. longest:
    tokens that a reply may have at most.
    """

    batch: Batch
    old: torch.Tensor
    ref: torch.Tensor
    returns: torch.Tensor
    group: int
    temperature: float
    longest: int

    def __post_init__(self):
        if self.group < 1 or len(self.batch) % self.group:
            raise ValueError(f"group={self.group}: must divide the number of replies, {len(self.batch)}")

    def grouped(self) -> torch.Tensor:
        """Returns by prompt, [N / group, group]."""
        return self.returns.reshape(-1, self.group)


def spread(group_values: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """A number for each reply [N / group, group] on all of its tokens, [N, T], zero elsewhere."""
    return group_values.reshape(-1, 1).to(torch.get_default_dtype()) * response


def token_count(response: torch.Tensor, per: str, longest: int = 0) -> torch.Tensor:
    """By what a token's part is divided in a mean over a minibatch, to be broadcast over [N, T].

    per: "token", the number of tokens: the mean over all of them. "reply", replies times tokens of the reply: the mean
    over replies of the mean over their tokens. "limit", replies times `longest`, the length that a reply may have: the
    mean over replies of sums over tokens in that unit. At least 1. Raises ValueError for another word.
    """
    if per == "token":
        return response.sum().clamp(min=1)
    if per == "reply":
        return (response.sum(-1, keepdim=True) * len(response)).clamp(min=1)
    if per == "limit":
        return torch.tensor(longest * len(response), device=response.device)
    raise ValueError(f"per={per!r}: must be 'token', 'reply' or 'limit'")
