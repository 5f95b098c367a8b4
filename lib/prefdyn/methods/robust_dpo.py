"""Robust DPO: an unbiased estimate, from labels that are flipped at a known rate, of the DPO loss on clean ones."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, epsilon: float) -> torch.Tensor:
    """((1 - epsilon) DPO(margin) - epsilon DPO(-margin)) / (1 - 2 epsilon), [B].

    DPO(m) = -log sigmoid(beta * m). Over a label that is flipped with probability epsilon its expectation is the DPO
    loss of the right label. See *Provably Robust DPO*, Chowdhury et al. 2024, section 3.1.

    Args: beta, in 1/nats. epsilon, the rate of flipped labels, at least 0 (plain DPO) and below 1/2.
    Raises ValueError for another epsilon.
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"robust_dpo: epsilon={epsilon}; allowed: from 0 to below 0.5")
    scaled = beta * pairs.margin()
    return (epsilon * F.logsigmoid(-scaled) - (1 - epsilon) * F.logsigmoid(scaled)) / (1 - 2 * epsilon)


METHOD = Method(
    name="robust_dpo",
    title="Robust DPO (rDPO)",
    source="Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1",
    takes="pairs",
    formula=(
        r"w = \pm \tfrac{\beta}{B} \left( \sigma(-\beta \cdot \text{margin}) + \tfrac{\varepsilon}{1 - 2\varepsilon} "
        r"\right)"
    ),
    curves=(
        "Margins grow faster than in DPO and do not settle: sigmoid(-beta * margin) falls to 0, but the "
        "epsilon / (1 - 2 epsilon) beside it does not. The loss has no lower bound, so its value alone says little."
    ),
    loss=loss,
    settings={"beta": 0.1, "epsilon": 0.1},
    meaning={
        "beta": "strength of the tie to the reference",
        "epsilon": "rate of flipped labels; 0 is DPO",
        "loss": "estimate of the DPO loss on clean labels: log 2 at the start, falls below 0 at large margins",
    },
    strength="sigmoid(-beta * margin) + epsilon / (1 - 2 epsilon), which never vanishes",
)
