"""What a method is: its loss or its weights, where it comes from, what data it takes, and what its numbers mean."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..lens.batch import Batch, concatenate
from ..lens.losses import from_loss
from ..lens.weights import TokenWeights

ROUNDING = 1e-4  # nats: margins up to here are float32 noise of sums over responses
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
        """Log-probs of whole responses, chosen and rejected, [B] each; what stands outside of them does not count."""
        return (self.chosen * self.chosen_mask).sum(-1), (self.rejected * self.rejected_mask).sum(-1)

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
    reference policy. kl: whether it reads `Pairs.kl`. objective: how it is trained and measured, where it has analytic
    weights or another kind of data: of pairs (chosen, rejected, ref_chosen, ref_rejected, **settings). rollouts: of
    replies that were just sampled, (Rollouts, **settings) -> an objective on them; a method of rollouts without it
    needs a value model. code: the text of its loss, where that is not in a file of this package (`own`). compared:
    whether it takes part where methods are compared and none are named.
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
    objective: Callable | None = None
    rollouts: Callable | None = None
    code: str = ""
    compared: bool = False

    def __post_init__(self):
        if self.takes not in TAKES:
            raise ValueError(f"method {self.name!r}: takes={self.takes!r}; allowed: {', '.join(TAKES)}")
        if unsaid := set(self.settings) - set(self.meaning):
            raise ValueError(f"method {self.name!r}: what {', '.join(sorted(unsaid))} means is not said")


class PairObjective:
    """A method's loss on preference pairs. An example is a pair; its batch holds chosen rows, then rejected rows.

    Where the method reads `Pairs.kl`, rows of prompts with other prompts' replies follow: they have no weight, and
    their mean log-ratio, at least 0, is the divergence (Ethayarajh et al. 2024, section 4.1).
    """

    temperature = 1.0

    def __init__(
        self,
        method: Method,
        chosen: Batch,
        rejected: Batch,
        ref_chosen: torch.Tensor,
        ref_rejected: torch.Tensor,
        mismatched: Batch | None = None,
        ref_mismatched: torch.Tensor | None = None,
        **settings: float,
    ):
        sizes = {len(chosen), len(rejected), len(ref_chosen), len(ref_rejected)}
        if len(sizes) != 1:
            raise ValueError(
                f"{method.name}: chosen, rejected and their reference log-probs differ in number: {sorted(sizes)}"
            )
        if method.kl and (mismatched is None or ref_mismatched is None):
            raise ValueError(f"{method.name}: replies to other prompts, and their reference log-probs, are needed too")
        if unknown := set(settings) - set(method.settings):
            raise ValueError(
                f"{method.name}: no such setting: {', '.join(sorted(unknown))}; there are: {', '.join(method.settings)}"
            )
        self.method, self.settings = method, {**method.settings, **settings}
        self.rows = concatenate([chosen, rejected, *([mismatched] if method.kl else [])])
        self.reference = (ref_chosen, ref_rejected)
        self.ref_mismatched = ref_mismatched
        self.size = len(chosen)

    def batch(self, index: torch.Tensor) -> Batch:
        """The rows of the pairs `index`, [2B, T], or [3B, T] where the method reads `Pairs.kl`."""
        blocks = len(self.rows) // self.size
        return self.rows.rows(torch.cat([index + block * self.size for block in range(blocks)]))

    def pairs(self, logps: torch.Tensor, response: torch.Tensor, index: torch.Tensor) -> Pairs:
        """What the loss reads, from the policy's token log-probs of the batch of the pairs `index`."""
        chosen, rejected, *others = logps.split(len(index))
        masks = response.split(len(index))
        kl = None
        if others:
            kl = (others[0].detach().sum(-1) - self.ref_mismatched[index]).mean().clamp(min=0)
        ref_chosen, ref_rejected = (side[index] for side in self.reference)
        return Pairs(chosen, rejected, masks[0], masks[1], ref_chosen, ref_rejected, kl)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        """Minus the gradient of the mean loss with respect to the log-probs; a unit is a pair."""
        unit = torch.arange(len(index), device=logps.device).repeat(len(batch) // len(index))
        unit = unit[:, None].expand_as(batch.response).masked_fill(~batch.response, -1)
        unit[2 * len(index) :] = -1

        def loss(leaf: torch.Tensor) -> torch.Tensor:
            inside = leaf.masked_fill(~batch.response, 0.0)  # a loss that reads tokens need not mask
            return self.method.loss(self.pairs(inside, batch.response, index), **self.settings).mean()

        return from_loss(loss, logps, batch.response, unit)

    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]:
        """loss, margin, logp_chosen, logp_rejected: means, nats. accuracy: share of margins above 0, ties half."""
        pairs = self.pairs(logps, batch.response, index)
        margin, (chosen, rejected) = pairs.margin(), pairs.sums()
        return {
            "loss": self.method.loss(pairs, **self.settings).mean().item(),
            "margin": margin.mean().item(),
            "accuracy": (0.5 + 0.5 * margin.sign() * (margin.abs() > ROUNDING)).mean().item(),
            "logp_chosen": chosen.mean().item(),
            "logp_rejected": rejected.mean().item(),
        }
