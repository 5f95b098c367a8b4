"""What a policy says of a batch: logits, token log-probs, entropy and KL, whatever its padding and precision."""

import functools
import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from .batch import Batch
from .faithful import faithful


@functools.cache
def _named(kind: type[torch.nn.Module]) -> frozenset[str]:
    """The inputs that models of this class name."""
    return frozenset(inspect.signature(kind.forward).parameters)


def accepted(model: torch.nn.Module, **given: Any) -> dict[str, Any]:
    """Those of the inputs `given` that `model` reads.

    A model that places tokens by the attention mask alone names no positions, and may refuse what it does not name.
    """
    if not isinstance(model, PreTrainedModel):
        return given  # a wrapper passes on what it does not name
    known = _named(type(model)) | _named(type(model.base_model))
    return {name: value for name, value in given.items() if name in known}


def inputs(model: torch.nn.Module, batch: Batch, **more: Any) -> dict[str, Any]:
    """What `model` reads of a batch, and of `more`; positions are counted from the first real token."""
    attention = batch.attention.long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    return accepted(model, input_ids=batch.ids, attention_mask=attention, position_ids=positions, **more)


def response_columns(batch: Batch) -> torch.Tensor:
    """The columns of `batch` that hold a response token in any row, [C]; the first column has no prediction."""
    return batch.response[:, 1:].any(0).nonzero().squeeze(-1) + 1


def response_logits(
    model: PreTrainedModel, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C, V], over `temperature`, that predict the C `response_columns` of `batch`, and those columns.

    The output layer, the dearest part of a small model with a large vocabulary, is computed for these only. Positions
    are counted from the first real token, so a row's logits do not depend on its padding, on either side.
    """
    columns = response_columns(batch)
    out = model(**inputs(model, batch, use_cache=False, logits_to_keep=columns - 1))
    return out.logits if temperature == 1 else out.logits / temperature, columns


def token_logps(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token given what precedes it, [N, T], zero elsewhere.

    Those of the policy that samples at `temperature`. Computed in float32 at least, whatever the model's precision.
    """
    return logps_of(*response_logits(model, batch, temperature), batch)


def logps_of(logits: torch.Tensor, columns: torch.Tensor, batch: Batch) -> torch.Tensor:
    """`token_logps` from the `response_logits` of `batch`."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    picked = logits.log_softmax(-1).gather(-1, batch.ids[:, columns, None]).squeeze(-1)
    logps = picked.masked_fill(~batch.response[:, columns], 0.0)
    return logps.new_zeros(batch.ids.shape).index_copy(1, columns, logps)


@torch.no_grad()
def sequence_logps(model: PreTrainedModel, batch: Batch, size: int = 256) -> torch.Tensor:
    """Log-probability of every whole response, [N], in chunks of `size` rows and without gradients."""
    with faithful(model):
        return torch.cat([token_logps(model, part).sum(-1) for part in batch.chunks(size)])


def _expected(x: torch.Tensor, p: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_v p_v x_v of [N, C, V], summed over positions in `mask`, [N]. What is never drawn adds 0, be x infinite."""
    return (p * x).masked_fill(p == 0, 0.0).sum(-1).masked_fill(~mask, 0.0).sum(-1)


@torch.no_grad()
def entropy_and_kl(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact entropy of `model` and KL(model || reference) at each response token, summed over the response, [N] each.

    Over responses sampled from `model`, the mean of the second is an unbiased estimate of the KL divergence of
    the two policies over whole responses (the expectation over the next token is taken exactly).
    """
    entropies, divergences = [], []
    for part in batch.chunks(size):
        with faithful(model), faithful(reference):
            logits, columns = response_logits(model, part)
            logq = response_logits(reference, part)[0].float().log_softmax(-1)
        logp = logits.float().log_softmax(-1)
        p, mask = logp.exp(), part.response[:, columns]
        entropies.append(-_expected(logp, p, mask))
        divergences.append(_expected(logp - logq, p, mask))
    return torch.cat(entropies), torch.cat(divergences)
