"""Online DPO: of the policy's own replies to a prompt the best is chosen and the worst rejected."""

import torch

from .base import Method
from .dpo import DPO
from .rollout import Rollouts


def objective(rollouts: Rollouts, *, beta: float) -> DPO | None:
    """DPO on pairs of the best and the worst reply to each prompt, by their returns; groups of equals are left out.

    See *Direct Language Model Alignment from Online AI Feedback*, Guo et al. 2024, algorithm 1, with the reward as the
    judge. The reference is that of the run.

    Args: beta, in 1/nats. Returns None where all groups are groups of equals: there is nothing to prefer. Raises
    ValueError for one reply a prompt.
    """
    k, returns = rollouts.group, rollouts.grouped()
    if k < 2:
        raise ValueError(f"online_dpo: group={k}: at least 2 replies to a prompt are needed")
    first = k * torch.arange(len(returns), device=returns.device)
    told = returns.amax(-1) > returns.amin(-1)
    if not bool(told.any()):
        return None
    best, worst = (first + returns.argmax(-1))[told], (first + returns.argmin(-1))[told]
    ref = rollouts.ref.sum(-1)
    return DPO(rollouts.batch.take(best), rollouts.batch.take(worst), ref[best], ref[worst], beta)


METHOD = Method(
    name="online_dpo",
    title="Online DPO",
    source="Guo et al. 2024, algorithm 1",
    takes="rollouts",
    formula=r"w = \pm \tfrac{\beta}{B}\, \sigma(-\beta \cdot \text{margin})",
    curves="Margins are always those of fresh replies; reward rises, and the pairs become harder to tell apart.",
    rollouts=objective,
    settings={"beta": 0.1},
    meaning={"beta": "strength of the tie to the reference"},
    strength="omega of a pair of own replies",
)
