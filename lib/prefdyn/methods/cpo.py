"""Contrastive preference optimisation: DPO against a uniform reference, kept in place by the chosen likelihood."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, alpha: float) -> torch.Tensor:
    """-log sigmoid(beta * (log-prob chosen - log-prob rejected)) - alpha * (log-prob chosen), [B]; whole responses.

    See *Contrastive Preference Optimization*, Xu et al. 2024, eq. 3 for the first term, and its final objective, to
    which the likelihood term is added with weight 1. Under a uniform reference the two reference log-probs cancel, as
    the paper has it. Our choice: the likelihood term is a sum over the response, as the paper writes it; trainers
    average it over tokens, which is a smaller alpha.

    Args: beta, in 1/nats. alpha, the weight of the likelihood term, in 1/nats.
    """
    chosen, rejected = pairs.sums()
    return -F.logsigmoid(beta * (chosen - rejected)) - alpha * chosen


METHOD = Method(
    name="cpo",
    title="Contrastive preference optimisation (CPO)",
    source="Xu et al. 2024 (arXiv 2401.08417), eq. 3 and the likelihood term of its final objective",
    takes="pairs",
    formula=(
        r"w_{\text{chosen}} = \tfrac{1}{B} \left( \beta\, \sigma(-\beta \Delta) + \alpha \right), \quad "
        r"w_{\text{rejected}} = -\tfrac{\beta}{B}\, \sigma(-\beta \Delta), \quad "
        r"\Delta = \log \pi(y_w) - \log \pi(y_l)"
    ),
    curves=(
        "The log-prob of chosen responses rises as in supervised fine-tuning, which at alpha 1 outweighs the "
        "preference term; rejected responses usually rise with them, but less. Longer responses weigh more."
    ),
    loss=loss,
    settings={"beta": 0.1, "alpha": 1.0},
    meaning={
        "beta": "scale of the difference of log-probs",
        "alpha": "weight of the chosen response's negative log-likelihood, summed over its tokens",
        "loss": "preference term plus alpha times nats of the whole chosen response",
    },
    reference=False,
)
