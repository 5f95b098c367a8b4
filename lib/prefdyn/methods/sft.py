"""Supervised fine-tuning: maximum likelihood on demonstrations."""

import torch

from ..lens.batch import Batch
from ..lens.weights import TokenWeights
from .base import Method


def sft_weights(response: torch.Tensor) -> TokenWeights:
    """Weights of maximum likelihood: 1/B on every token of every demonstration.

    Args: response, bool [B, T]. The loss is the mean over demonstrations of their negative log-likelihood.
    """
    rows = response.shape[0]
    unit = torch.arange(rows, device=response.device)[:, None].expand_as(response)
    return TokenWeights(
        w=response.to(torch.get_default_dtype()) / rows,
        strength=torch.ones(rows, device=response.device),
        unit=unit.masked_fill(~response, -1),
    )


class SFT:
    """Maximum likelihood on demonstrations. An example is a demonstration."""

    def __init__(self, demonstrations: Batch, temperature: float = 1.0):
        self.demonstrations, self.temperature = demonstrations, temperature
        self.size = len(demonstrations)

    def batch(self, index: torch.Tensor) -> Batch:
        return self.demonstrations.rows(index)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return sft_weights(batch.response)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss: negative log-likelihood of a demonstration, nats."""
        return {"loss": -logps.sum(-1).mean().item()}


METHOD = Method(
    name="sft",
    title="Supervised fine-tuning (SFT)",
    source="Maximum likelihood",
    takes="demonstrations",
    formula=r"w = \tfrac{1}{B}",
    curves="The likelihood of demonstrations rises until the policy imitates them; entropy falls towards theirs.",
    strength="1 for every demonstration: there is nothing to reweight",
    reference=False,
    objective=SFT,
)
