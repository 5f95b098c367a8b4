"""Best of n: imitate the best of several own replies to each prompt (rejection sampling fine-tuning)."""

import torch

from .base import Method
from .rollout import Rollouts
from .sft import SFT


def objective(rollouts: Rollouts) -> SFT:
    """Maximum likelihood on the reply of each group with the largest return; of equals, the first.

    See *RAFT*, Dong et al. 2023, algorithm 1, one reply kept of each prompt. Raises ValueError for one reply a prompt.
    """
    k = rollouts.group
    if k < 2:
        raise ValueError(f"best_of_n: group={k}: at least 2 replies to a prompt are needed")
    best = rollouts.grouped().argmax(-1) + k * torch.arange(len(rollouts.batch) // k, device=rollouts.returns.device)
    return SFT(rollouts.batch.take(best), rollouts.temperature)


METHOD = Method(
    name="best_of_n",
    title="Best of n (rejection sampling fine-tuning)",
    source="Dong et al. 2023, algorithm 1",
    takes="rollouts",
    formula=r"w = \tfrac{1}{B}\, [\text{best of its group}]",
    curves="Reward rises and entropy falls fast: nothing is lowered, and what is best already is repeated.",
    rollouts=objective,
    strength="1 for every reply that is kept",
    compared=True,
)
