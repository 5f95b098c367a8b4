"""When a preference step lowers the chosen response: the exact first-order condition, and cheaper signs of it.

A gradient step on one pair moves the parameters along g_c - g_r, the gradients of the log-probs of its chosen and its
rejected response (of DPO, by lr * beta * omega of it). By the chain rule log pi(chosen) changes by that size times

    <g_c, g_c - g_r> = |g_c|^2 - <g_r, g_c>,

so it falls where the two gradients overlap by more than the squared length of the chosen one's own.
See *A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement*, Yuan et al., ICLR 2025
(https://arxiv.org/abs/2410.13828), and *Unintentional Unalignment: Likelihood Displacement in Direct Preference
Optimization*, Razin et al., ICLR 2025 (https://arxiv.org/abs/2410.08847), who derive from it, for hidden states that
move freely, the score of embeddings `ches`.
"""

import functools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .alignment import Direction, gradient, inner
from .batch import Batch
from .faithful import faithful
from .likelihood import inputs, response_logits, sequence_logps


def _same_number(chosen: Batch, rejected: Batch) -> None:
    if len(chosen) != len(rejected):
        raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected responses: one of each a pair is needed")


def response_gradient(model: PreTrainedModel, batch: Batch, row: int) -> Direction:
    """Gradient of log pi(response) of one row of `batch`, over the parameters that require one."""
    one = batch.rows(slice(row, row + 1))
    return gradient(model, [(one, one.response.to(model.dtype))])


def condition(model: PreTrainedModel, chosen: Batch, rejected: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """|g_c|^2 and <g_r, g_c> of each pair, [N] each, nats squared a unit of parameter: what is above decides.

    Where the second is the larger, a small enough gradient step on that pair alone makes its chosen response *less*
    likely; the change is their difference times the size of the step. Exact, by two backward passes a pair.
    Raises ValueError if there are not as many rejected responses as chosen ones.
    """
    _same_number(chosen, rejected)
    own, shared = [], []
    for row in range(len(chosen)):
        g_c, g_r = (response_gradient(model, side, row) for side in (chosen, rejected))
        own.append(inner(g_c, g_c))
        shared.append(inner(g_r, g_c))
    return torch.stack(own), torch.stack(shared)


@torch.no_grad()
def after_moving(model: PreTrainedModel, direction: Direction, sizes: Sequence[float], batch: Batch) -> torch.Tensor:
    """Real change of the log-prob of each response when the parameters move by a size times `direction`, [S, N], nats.

    Args: sizes, S of them; a descent step of SGD on a loss is of size lr along minus its gradient. The model is left as
    it was. In float32 a change below some 1e-5 nats is mostly rounding.
    """
    named = {name: p for name, p in model.named_parameters() if name in direction}
    saved = {name: p.clone() for name, p in named.items()}
    before, changes = sequence_logps(model, batch), []
    try:
        for size in sizes:
            for name, p in named.items():
                p.copy_(saved[name] + size * direction[name])
            changes.append(sequence_logps(model, batch) - before)
    finally:
        for name, p in named.items():
            p.copy_(saved[name])
    return torch.stack(changes)


@torch.no_grad()
def summed_states(model: PreTrainedModel, batch: Batch, size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states summed over the positions that predict a response's tokens, [N, D], and their number, [N].

    From the last token of the prompt to the last but one of the response: what comes after its end predicts nothing.
    In float32 at least.
    """
    sums = []
    with faithful(model):
        for part in batch.chunks(size):
            states = model.base_model(**inputs(model, part, use_cache=False)).last_hidden_state[:, :-1]
            exact = states.to(torch.promote_types(states.dtype, torch.float32))
            sums.append(exact.masked_fill(~part.response[:, 1:, None], 0.0).sum(1))
    return torch.cat(sums), batch.response.sum(-1)


def centred_similarity(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """<rejected, chosen> - |chosen|^2 of each row of two tensors [N, D], [N]."""
    return ((rejected - chosen) * chosen).sum(-1)


def ches(model: PreTrainedModel, chosen: Batch, rejected: Batch, normalised: bool = False) -> torch.Tensor:
    """Centred hidden embedding similarity of each pair, [N]: the larger, the more the chosen response should fall.

        CHES = < sum_k h(y-)_k, sum_k h(y+)_k > - | sum_k h(y+)_k |^2

    with the last hidden states h that predict the tokens of the rejected (y-) and the chosen response (y+).
    normalised: with means over the tokens in the place of sums, the length-normalised score of the same paper.
    See *Unintentional Unalignment*, Razin et al., ICLR 2025. One forward pass, no gradient.
    Raises ValueError if there are not as many rejected responses as chosen ones.
    """
    _same_number(chosen, rejected)
    sides = (summed_states(model, side) for side in (chosen, rejected))
    return centred_similarity(*(total / count[:, None] if normalised else total for total, count in sides))


@torch.no_grad()
def peaks(model: PreTrainedModel, batch: Batch, size: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every next-token distribution along the responses: the largest probability, the token's own, and the entropy.

    [N, T] each, in the places of the response tokens and zero elsewhere; entropy in nats. Where the first grows while
    the second falls, probability is squeezed into what was likeliest (Ren & Sutherland, ICLR 2025).
    """
    exact = torch.promote_types(model.dtype, torch.float32)
    found = [torch.zeros(batch.ids.shape, dtype=exact, device=batch.ids.device) for _ in range(3)]
    with faithful(model):
        for place, part in batch.pieces(size):
            logits, columns = response_logits(model, part)
            logp = logits.to(exact).log_softmax(-1)
            own = logp.gather(-1, part.ids[:, columns, None]).squeeze(-1).exp()
            entropy = -(logp.exp() * logp).masked_fill(logp.isneginf(), 0.0).sum(-1)
            mask = part.response[:, columns]
            blank = functools.partial(torch.zeros, part.ids.shape, dtype=exact, device=logp.device)
            for whole, values in zip(found, (logp.amax(-1).exp(), own, entropy), strict=True):
                whole[place] = blank().index_copy(1, columns, values.masked_fill(~mask, 0.0))
    return tuple(found)
