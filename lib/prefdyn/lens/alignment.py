"""Gradient alignment: how a descent step on an objective changes the likelihood of the final responses.

    G(L; theta) = E_{D'}[ -grad log pi(y'|x') ] . grad L(D; theta)             (arXiv 2512.00778)

With d = E_{D'}[ grad log pi(y'|x') ] and grad L = - sum_tok w_tok grad log pi(tok), this is

    G = sum_tok w_tok * a_tok,     a_tok = < grad log pi(tok), d >

and one forward-mode pass along d gives a_tok for every token at once. G is linear in w, so every component of
every objective costs a weighted sum, not a backward pass. A plain SGD step of size lr changes the mean
negative log-likelihood of D' by about -lr * G.

AdamW does not step along the gradient but along P grad L, with a scale P for each parameter. The optimiser-aware
alignment takes the scaled direction P d in the place of d, with the P that the gradient of the whole probe would meet
if it came next: then a step of size lr changes it by about -lr times *that*, momentum aside, and parts still add up.

Forward mode, reverse mode and finite differences reach G by different ways through torch and a model's code, so one
checks the other (`check`), in every measurement.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import controls
from .batch import Batch, pad
from .faithful import faithful
from .likelihood import logps_of, response_columns, response_logits, token_logps
from .weights import TokenWeights

Direction = dict[str, torch.Tensor]  # one tensor a parameter, by its name
Scored = tuple[torch.Tensor, torch.Tensor]  # log-probs and alignment scores of tokens, [N, T] each


class MeasurementError(ArithmeticError):
    """A measurement that does not agree with a backward pass; the message says where, and both numbers."""


class _ResponseLogits(torch.nn.Module):
    """`response_logits` as a module, so that `torch.func` can call it with other parameters."""

    def __init__(self, model: PreTrainedModel, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, batch: Batch) -> torch.Tensor:
        return response_logits(self.model, batch, self.temperature)[0]


def gradient(
    model: PreTrainedModel, parts: Iterable[tuple[Batch, torch.Tensor]], temperature: float = 1.0
) -> Direction:
    """sum_tok w_tok * grad log pi(tok), accumulated over parts of (batch, token weights [N, T]).

    Over the parameters that require a gradient. Raises ValueError if there is none.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient, so that nothing can move")
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    with faithful(model):
        for batch, w in parts:
            value = (w * token_logps(model, batch, temperature)).sum()
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    total[name] += grad
    return total


def target_direction(model: PreTrainedModel, targets: Batch, reduction: str = "sum", size: int = 256) -> Direction:
    """d: the gradient of the mean log-likelihood of the responses D' in `targets`.

    reduction: over the tokens of a response, "sum" (its log-likelihood) or "mean" (per token). The paper's text
    leaves this open.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: must be 'sum' or 'mean'")

    def weighted(part: Batch) -> tuple[Batch, torch.Tensor]:
        w = part.response.to(model.dtype)
        if reduction == "mean":
            w = w / w.sum(-1, keepdim=True)
        return part, w / len(targets)

    return gradient(model, (weighted(part) for part in targets.chunks(size)))


def norm(direction: Direction) -> torch.Tensor:
    """Euclidean length over all parameters."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in direction.values()]))


def inner(a: Direction, b: Direction) -> torch.Tensor:
    """Inner product over all parameters."""
    return sum((a[name] * b[name]).sum() for name in a)


def cosine(a: Direction, b: Direction) -> float:
    """Cosine of the angle between two directions, NaN where one of them is 0."""
    lengths = (norm(a) * norm(b)).item()
    return inner(a, b).item() / lengths if lengths > 0 else math.nan


def precision(direction: Direction) -> torch.dtype:
    """The coarsest of its precisions."""
    return max((t.dtype for t in direction.values()), key=lambda dtype: torch.finfo(dtype).eps)


def scaled(direction: Direction, scale: Direction) -> Direction:
    """`direction` times `scale`, parameter by parameter."""
    return {name: t * scale[name] for name, t in direction.items()}


def logits_with_tangent(
    model: PreTrainedModel, batch: Batch, direction: Direction, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`response_logits` [N, C, V] and their derivative along `direction` by one forward-mode pass, and the columns [C].

    Value and directional derivative come together (Baydin et al. 2022 use the same product).
    """
    tangents = {f"model.{name}": t for name, t in direction.items()}
    params = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    fixed = {name: p for name, p in params.items() if name not in tangents}
    moving = {name: p for name, p in params.items() if name in tangents}
    wrapped = _ResponseLogits(model, temperature)

    def logits(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(wrapped, {**fixed, **moved}, (batch,))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
        return *torch.func.jvp(logits, (moving,), (tangents,)), response_columns(batch)


@torch.no_grad()
def _forward(model: PreTrainedModel, batch: Batch, direction: Direction, temperature: float) -> Scored:
    """One forward-mode pass."""
    value, tangent, _ = logits_with_tangent(model, batch, direction, temperature)
    return _log_softmax_with_tangent(value, tangent, batch)


def _log_softmax_with_tangent(logits: torch.Tensor, tangent: torch.Tensor, batch: Batch, block: int = 2**22) -> Scored:
    """`token_logps` and its directional derivative from those of the logits [N, C, V], [N, T] each.

    d log p_y = dl_y - sum_v p_v dl_v. Over a large vocabulary this is bound by memory: few passes, in blocks of about
    `block` numbers, are faster than the derivative of logsumexp that torch would build.
    """
    columns = response_columns(batch)
    targets, mask = batch.ids[:, columns, None], batch.response[:, columns]
    exact = torch.promote_types(logits.dtype, torch.float32)
    parts = []
    for rows in torch.arange(len(batch)).split(max(1, block // logits[0].numel())):
        own = slice(int(rows[0]), int(rows[-1]) + 1)
        logp, moved = logits[own].to(exact).log_softmax(-1), tangent[own].to(exact)
        value = logp.gather(-1, targets[own]).squeeze(-1)
        mean = torch.matmul(logp.exp_().unsqueeze(-2), moved.unsqueeze(-1)).squeeze(-1).squeeze(-1)
        parts.append((value, moved.gather(-1, targets[own]).squeeze(-1) - mean))
    found = (torch.cat(part).masked_fill(~mask, 0.0) for part in zip(*parts, strict=True))
    return tuple(part.new_zeros(batch.ids.shape).index_copy(1, columns, part) for part in found)


@torch.no_grad()
def _central(model: PreTrainedModel, batch: Batch, direction: Direction, temperature: float) -> Scored:
    """Central difference of two passes at theta +- eps * d, beside a plain one; any kernel, float32 or better.

    Raises ValueError if what moves, or the logits that it moves, are coarser: then most of the difference is rounding.
    """
    named = {name: p for name, p in model.named_parameters() if name in direction}
    saved = {name: p.clone() for name, p in named.items()}
    logits, columns = response_logits(model, batch, temperature)
    coarse = {t.dtype for t in (*named.values(), logits)} & {torch.float16, torch.bfloat16}
    if coarse:
        raise ValueError(
            f"method='central': a difference of two passes in {', '.join(sorted(map(str, coarse)))} is mostly "
            "rounding; use method='forward' or a model in float32"
        )
    # the step that balances truncation and rounding, relative to the size of the parameters; in float64 there is
    # rounding to float32 too, in softmax and norms
    scale = 1e-4 if precision(saved) == torch.float32 else 1e-5
    size = norm({name: p.masked_fill(~p.isfinite(), 0.0) for name, p in saved.items()})  # a bias may be -inf
    eps = (scale * size / norm(direction).clamp(min=1e-30)).item()
    values = []
    try:
        for signed in (eps, -eps):
            for name, p in named.items():
                p.copy_(saved[name] + signed * direction[name])
            values.append(token_logps(model, batch, temperature))
    finally:
        for name, p in named.items():
            p.copy_(saved[name])
    return logps_of(logits, columns, batch), (values[0] - values[1]) / (2 * eps)


def _backward(model: PreTrainedModel, batch: Batch, direction: Direction, temperature: float) -> Scored:
    """One backward pass per token: the definition, for tests and tiny examples."""
    named = {name: p for name, p in model.named_parameters() if name in direction}
    logps = token_logps(model, batch, temperature)
    scores = torch.zeros_like(logps)
    for row, col in batch.response.nonzero().tolist():
        grads = torch.autograd.grad(logps[row, col], list(named.values()), retain_graph=True, allow_unused=True)
        scores[row, col] = sum(
            (g * direction[name]).sum() for name, g in zip(named, grads, strict=True) if g is not None
        )
    return logps.detach(), scores.detach()


METHODS: dict[str, Callable] = {"forward": _forward, "central": _central, "backward": _backward}


def token_scores(
    model: PreTrainedModel,
    batch: Batch,
    direction: Direction,
    method: str = "forward",
    size: int = 256,
    temperature: float = 1.0,
) -> Scored:
    """Log-probs and alignment scores a_tok = <grad log pi(tok), d> of all response tokens, [N, T] each.

    Args: method, "forward" (one forward-mode pass), "central" (two forward passes) or "backward" (one backward
    pass per token). size, rows per pass. temperature, of the policy whose log-probs are meant.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    missing = set(direction) - {name for name, _ in model.named_parameters()}
    if missing:
        raise ValueError(f"direction has no counterpart in the model for {sorted(missing)[:3]}")
    exact = torch.promote_types(model.dtype, torch.float32)
    logps, scores = (torch.zeros(batch.ids.shape, dtype=exact, device=batch.ids.device) for _ in range(2))
    with faithful(model):
        for place, part in batch.pieces(size):
            found, moved = METHODS[method](model, part, direction, temperature)
            logps[place], scores[place] = found.to(exact), moved.masked_fill(~part.response, 0.0).to(exact)
    return logps, scores


# How far sum w a may be from <grad L, d>, by method and by the coarsest precision that moves, in units of the sum of
# |w a| / (1 - p): rounding acts on logits, and a / (1 - p) is how a token's log-odds move. Ten times and more what was
# seen over architectures and policies. Models in float64 pass through float32 in softmax and norms; bfloat16 keeps 8
# bits, float16 11; a central difference is off by up to some 1e-3.
TOLERANCES = {
    "forward": {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2},
    "central": {torch.float64: 1e-2, torch.float32: 1e-2},
}


def check(where: str, method: str, w: torch.Tensor, scored: Scored, ascent: Direction, direction: Direction) -> float:
    """Compare scores with a backward pass: sum_tok w_tok a_tok is <grad L, d>, up to rounding.

    Args: where, the step or whatever else names the measurement. w, weights of the tokens [N, T] that were `scored`
    by `method` along `direction`. ascent, the `gradient` of these tokens with these weights.
    Returns the difference as a part of what rounding explains. Raises MeasurementError if that is more than all.
    """
    logps, scores = (t.double() for t in scored)
    coarsest = precision(direction)
    found, expected = (w * scores).sum().item(), float(inner(ascent, direction))
    moved = (w * scores).abs() / (-logps.expm1()).clamp(min=torch.finfo(coarsest).eps)
    explained = TOLERANCES[method][coarsest] * moved.sum().item()
    if not abs(found - expected) <= explained:  # also where one of them is no number
        raise MeasurementError(
            f"{where}, method={method!r}: the scores give G = {found:.6g}, a backward pass {expected:.6g}, and "
            f"rounding explains a difference of {explained:.1g} at most; the model is not one function in both, or an "
            "operation in it has a wrong derivative"
        )
    return abs(found - expected) / explained if explained else 0.0


def _short_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
    """A prompt of ids from all over the vocabulary, the end of text among them, and likely tokens as a response."""
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    prompt = [0, known // 3, tokenizer.eos_token_id, 2 * known // 3]
    asked = pad([prompt], [[0]], tokenizer.pad_token_id).to(model.device)
    with torch.no_grad():
        likely = response_logits(model, asked)[0][0, -1].topk(3).indices.tolist()
    return pad([prompt], [likely], tokenizer.pad_token_id).to(model.device)


def choose_method(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """ "forward", or "central" where a model has no forward derivative: tried out and checked on one short row.

    Raises MeasurementError that says why of both if neither works.
    """
    failures = []
    with faithful(model):
        row = _short_row(model, tokenizer)
        w = row.response.to(torch.float32)
        direction = gradient(model, [(row, w)])
        for method in TOLERANCES:
            try:
                check("on one short row", method, w, token_scores(model, row, direction, method), direction, direction)
            except Exception as error:  # whatever torch or the model's code raises, the other method may do
                failures.append(f"{method}: {type(error).__name__}: {error}")
            else:
                return method
    raise MeasurementError("this model cannot be measured by any method. " + " | ".join(failures))


def by_sequence(weights: TokenWeights, scores: torch.Tensor, control: str) -> torch.Tensor:
    """Contribution of each row to the component `control` of G, [N]; their sum is the component."""
    return (controls.apply(control, weights) * scores).sum(-1)
