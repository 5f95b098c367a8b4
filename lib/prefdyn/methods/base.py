"""What a method is: its loss or its weights, where it comes from, what data it takes, and what its numbers mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

TAKES = ("demonstrations", "pairs", "rollouts")


@dataclass(frozen=True)
class Pairs:
    """What a loss of preference pairs reads of B pairs.

    chosen, rejected: the policy's token log-probs [B, T], nats, zero outside responses. chosen_mask, rejected_mask:
    bool [B, T], the tokens of the responses. ref_chosen, ref_rejected: log-probs of whole responses under the reference
    policy, [B]. kl: the KL divergence from the reference that KTO compares with, nats a response, a scalar without
    gradient.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_mask: torch.Tensor
    rejected_mask: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    kl: torch.Tensor | None = None

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of whole responses, chosen and rejected, [B] each."""
        return self.chosen.sum(-1), self.rejected.sum(-1)

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of responses, their ends included, chosen and rejected, [B] each."""
        return self.chosen_mask.sum(-1), self.rejected_mask.sum(-1)

    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-ratios of policy and reference of whole responses, chosen and rejected, [B] each."""
        chosen, rejected = self.sums()
        return chosen - self.ref_chosen, rejected - self.ref_rejected

    def margin(self) -> torch.Tensor:
        """Log-ratio of the chosen minus log-ratio of the rejected response, [B] (Rafailov et al. 2023, eq. 7)."""
        chosen, rejected = self.ratios()
        return chosen - rejected


@dataclass(frozen=True)
class Method:
    """A method of preference optimisation in one record.

    name: as parameters and runs call it. title, source: for people; the source names paper and equation. takes: one of
    TAKES. formula: its token weights, in LaTeX. loss: of pairs, (Pairs, **settings) -> [B], whose mean is trained on.
    settings: its own numbers and their defaults. meaning: what each setting and each metric means, in a few words.
    curves: what its curves should look like. strength: what its reweighting acts on. reference: whether it reads a
    reference policy. kl: whether it reads `Pairs.kl`.
    """

    name: str
    title: str
    source: str
    takes: Literal["demonstrations", "pairs", "rollouts"]
    formula: str
    curves: str
    loss: Callable[..., torch.Tensor] | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    meaning: Mapping[str, str] = field(default_factory=dict)
    strength: str = "the size of a pair's weights"
    reference: bool = True
    kl: bool = False

    def __post_init__(self):
        if self.takes not in TAKES:
            raise ValueError(f"method {self.name!r}: takes={self.takes!r}; allowed: {', '.join(TAKES)}")
        if unsaid := set(self.settings) - set(self.meaning):
            raise ValueError(f"method {self.name!r}: what {', '.join(sorted(unsaid))} means is not said")
