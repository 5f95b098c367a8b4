"""DPO with a likelihood term on the chosen response, the loss of iterative reasoning preference optimisation."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, alpha: float) -> torch.Tensor:
    """-log sigmoid(beta * margin) - alpha * (mean log-prob a token of the chosen response), [B].

    See *Iterative Reasoning Preference Optimization*, Pang et al. 2024, eq. 1 (third version). As there, the likelihood
    term is divided by the length of its response and the DPO term is not. Our choice: each response is averaged by
    itself, then the pairs are; trainers that average over all tokens of a batch weight long responses more.

    Args: beta, in 1/nats. alpha, the weight of the likelihood term, in 1/nats.
    """
    likelihood = pairs.sums()[0] / pairs.lengths()[0]
    return -F.logsigmoid(beta * pairs.margin()) - alpha * likelihood


METHOD = Method(
    name="rpo",
    title="DPO with a likelihood term (RPO, DPO + NLL)",
    source="Pang et al. 2024 (arXiv 2404.19733v3), eq. 1",
    takes="pairs",
    formula=(
        r"w_{\text{chosen}} = \tfrac{1}{B} \left( \beta\, \sigma(-\beta \cdot \text{margin}) + \tfrac{\alpha}{|y|} "
        r"\right), \quad w_{\text{rejected}} = -\tfrac{\beta}{B}\, \sigma(-\beta \cdot \text{margin})"
    ),
    curves=(
        "Margins grow as in DPO while the log-prob of chosen responses is held up or rises. "
        "How well it is held depends on alpha and on the length, since the term counts per token."
    ),
    loss=loss,
    settings={"beta": 0.1, "alpha": 1.0},
    meaning={
        "beta": "strength of the tie to the reference",
        "alpha": "weight of the chosen response's negative log-likelihood a token; 0 is DPO",
        "loss": "DPO loss plus alpha times nats a token of the chosen response",
    },
)
