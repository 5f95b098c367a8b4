"""DPO with smoothed labels: as if each label were wrong with a known probability.

The literature's "conservative DPO" or cDPO. It is not the cDPO of arXiv 2512.00778, which shifts from positive to
negative learning over training.
"""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, epsilon: float) -> torch.Tensor:
    """-(1 - epsilon) log sigmoid(beta * margin) - epsilon log sigmoid(-beta * margin), [B].

    See *A note on DPO with noisy preferences & relationship to IPO*, Mitchell 2023, eq. 3.

    Args: beta, in 1/nats. epsilon, the probability that a label is wrong, from 0 (plain DPO) up to 1/2.
    Raises ValueError for another epsilon.
    """
    if not 0 <= epsilon <= 0.5:
        raise ValueError(f"smoothed_dpo: epsilon={epsilon}; allowed: from 0 to 0.5")
    scaled = beta * pairs.margin()
    return -(1 - epsilon) * F.logsigmoid(scaled) - epsilon * F.logsigmoid(-scaled)


METHOD = Method(
    name="smoothed_dpo",
    title="Label-smoothed DPO (conservative DPO)",
    source="Mitchell 2023, A note on DPO with noisy preferences, eq. 3",
    takes="pairs",
    formula=r"w = \pm \tfrac{\beta}{B} \left( \sigma(-\beta \cdot \text{margin}) - \varepsilon \right)",
    curves=(
        "Margins grow as in DPO and settle where sigmoid(beta * margin) = 1 - epsilon; beyond it the weights change "
        "sign. Both log-probs may fall on the way."
    ),
    loss=loss,
    settings={"beta": 0.1, "epsilon": 0.1},
    meaning={
        "beta": "strength of the tie to the reference",
        "epsilon": "probability that a label is wrong; 0 is DPO",
        "loss": "cross-entropy with the smoothed label: log 2 at the start, never below the entropy of the label",
    },
    strength="|sigmoid(-beta * margin) - epsilon|, the distance from the smoothed label",
)
