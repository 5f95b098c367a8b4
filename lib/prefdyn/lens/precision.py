"""The lens on a model in bfloat16 or float16: all that is summed is summed in float32, and the error is measured.

A low-precision model computes every gradient and every tangent in its own precision, bfloat16 with 8 bits, float16 with
11. What is added up outside of it need not be: here d and every ascent direction are summed in float32 over small parts
of a batch, and log-probs, scores and all sums of them are float32. A direction keeps its length in float32 too; only
for the pass along it is it cast, at unit length, so that nothing under- or overflows.

`error` says how far such a measurement is from one in float32. Both are of the *same function*: the copy in float32
(`in_float32`) has the weights of the low-precision model, cast up, which is exact. What differs is the arithmetic.
How far rounding the weights moved the model, when it was saved in bfloat16, is another question that no copy answers.

For a model in float32 or better, every function here is that of `lens.alignment`, bit for bit, of a model as trainers
leave it: `unmarked`.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import alignment
from .alignment import Direction, Scored
from .batch import Batch
from .controls import CONTROLS
from .weights import TokenWeights

ROWS = 4  # of a low-precision batch whose gradient is taken at once: what is summed there is summed in its precision
LOW = (torch.bfloat16, torch.float16)


def low(model: PreTrainedModel) -> torch.dtype | None:
    """The coarsest precision below float32 that any parameter of `model` has, frozen or not; None if none is below."""
    found = {p.dtype for p in model.parameters() if p.dtype in LOW}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps) if found else None


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with every floating-point parameter and buffer cast up to float32, which is exact.

    The same function in other arithmetic. It needs as much memory again as the model does, and once more.
    """
    return copy.deepcopy(model).float()


_MARKING = "make_inputs_require_grad"  # how the names of transformers' and peft's hooks begin


@contextlib.contextmanager
def unmarked(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no hook of `model` marks activations as requiring a gradient; afterwards, also after an error, all do.

    Such a hook has no place in forward mode. `lens.faithful` takes away one; but a trainer of adapters marks the
    embeddings once itself and, with gradient checkpointing, once more by transformers, which forgets the first hook.
    """
    saved = [(module._forward_hooks, module._forward_hooks.copy()) for module in model.modules()]
    known = vars(model).get("_require_grads_hook", _MARKING)  # where a wrapper has none of its own
    try:
        for hooks, _ in saved:
            for number, hook in list(hooks.items()):
                if getattr(hook, "__name__", "").startswith(_MARKING):
                    del hooks[number]
        model._require_grads_hook = None
        yield
    finally:
        for hooks, before in saved:
            hooks.clear()
            hooks.update(before)
        if known is _MARKING:
            del model._require_grads_hook
        else:
            model._require_grads_hook = known


def choose_method(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """`alignment.choose_method`: "forward", or "central" where a model in float32 has no forward derivative."""
    with unmarked(model):
        return alignment.choose_method(model, tokenizer)


def _power_of_two(size: float) -> float:
    """The power of two just below `size`, 1 for 0: to divide by it is exact."""
    return 2.0 ** math.floor(math.log2(size)) if size > 0 else 1.0


def _require_finite(found: Direction, dtype: torch.dtype) -> None:
    """Raise MeasurementError that names parameters whose gradient is not finite."""
    if bad := [name for name, t in found.items() if not bool(t.isfinite().all())]:
        raise alignment.MeasurementError(
            f"the gradient of {len(bad)} parameters is not finite in {dtype}: {', '.join(bad[:3])}; "
            "use torch.bfloat16 or torch.float32, whose range is larger"
        )


def gradient(
    model: PreTrainedModel,
    parts: Iterable[tuple[Batch, torch.Tensor]],
    temperature: float = 1.0,
    rows: int = ROWS,
) -> Direction:
    """sum_tok w_tok * grad log pi(tok) over parts of (batch, token weights [N, T]), summed in float32.

    As `alignment.gradient`, over the parameters that require a gradient. Of a low-precision model it is made `rows`
    rows at a time, each time with weights of about 1: those of one in many responses would underflow in float16.
    Returns float32 tensors. Raises ValueError if no parameter requires a gradient, and MeasurementError if one is not
    finite.
    """
    dtype = low(model)
    if dtype is None:
        with unmarked(model):
            return alignment.gradient(model, parts, temperature)
    with unmarked(model):
        empty = alignment.gradient(model, [], temperature)
    total = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in empty.items()}
    for batch, weights in parts:
        for place, piece in batch.pieces(rows):
            w = weights[place].to(torch.promote_types(weights.dtype, torch.float32))
            scale = _power_of_two(w.abs().max().item())
            with unmarked(model):
                found = alignment.gradient(model, [(piece, w / scale)], temperature)
            for name, part in found.items():
                total[name].add_(part, alpha=scale)
    _require_finite(total, dtype)
    return total


def target_direction(
    model: PreTrainedModel, targets: Batch, reduction: str = "sum", size: int = 256, rows: int = ROWS
) -> Direction:
    """d: the gradient of the mean log-likelihood of the responses D' in `targets`, summed in float32.

    As `alignment.target_direction` with `reduction` ("sum" or "mean" over the tokens of a response) and `size`, the
    rows of a pass of a model in float32; of a low-precision model passes are of `rows` rows.
    """
    if low(model) is None or reduction not in ("sum", "mean"):  # which is refused there
        with unmarked(model):
            return alignment.target_direction(model, targets, reduction, size)
    w = targets.response.float()
    if reduction == "mean":
        w = w / w.sum(-1, keepdim=True)
    return gradient(model, [(targets, w / len(targets))], rows=rows)


def token_scores(
    model: PreTrainedModel,
    batch: Batch,
    direction: Direction,
    method: str = "forward",
    size: int = 256,
    temperature: float = 1.0,
) -> Scored:
    """Log-probs and alignment scores a_tok = <grad log pi(tok), d> of all response tokens, [N, T] each, in float32.

    As `alignment.token_scores`, with a direction in float32 on a low-precision model. A tangent must have its
    parameter's precision: d is scaled to about unit length by a power of two, cast, and the scores are scaled back.
    Raises ValueError for method "central" on a low-precision model, where a difference of two passes is mostly
    rounding, and MeasurementError if a score is not finite.
    """
    dtype = low(model)
    if dtype is None or method != "forward":
        with unmarked(model):
            return alignment.token_scores(model, batch, direction, method, size, temperature)
    held = {name: p.dtype for name, p in model.named_parameters()}
    scale = _power_of_two(float(alignment.norm(direction)))
    tangents = {name: (t / scale).to(held.get(name, t.dtype)) for name, t in direction.items()}
    with unmarked(model):
        logps, scores = alignment.token_scores(model, batch, tangents, method, size, temperature)
    if not bool(scores.isfinite().all()):
        raise alignment.MeasurementError(
            f"{int((~scores.isfinite()).sum())} scores are not finite in {dtype}; use torch.bfloat16 or torch.float32"
        )
    return logps, scores * scale


def check(
    where: str,
    method: str,
    w: torch.Tensor,
    scored: Scored,
    ascent: Direction,
    direction: Direction,
    model: PreTrainedModel,
) -> float:
    """`alignment.check` with what rounding may do in the precision of `model`, whatever that of the directions is."""
    dtype = low(model)
    told = direction if dtype is None else direction | {"": torch.zeros((), dtype=dtype)}  # says how coarse; not summed
    return alignment.check(where, method, w, scored, ascent, told)


@dataclass(frozen=True)
class Error:
    """How far a measurement in low precision is from the same one in float32: d, log-probs, scores and G.

    dtype: of the low-precision model. direction: |d - d32| / |d32|. cosine: of d and d32. logps: the largest
    difference of a token's log-prob, nats. scores_rms, scores_largest: of a - a32 over response tokens, each measured
    along its own d, as parts of the largest |a32|. g: by component, (in low precision, in float32), nats a unit of
    learning rate; NaN where a component is undefined. Prints as a sentence.
    """

    dtype: str
    direction: float
    cosine: float
    logps: float
    scores_rms: float
    scores_largest: float
    g: dict[str, tuple[float, float]]

    def relative(self, component: str) -> float:
        """|G - G32| / |G32|; where positive and negative parts nearly cancel, G is small and this is large."""
        found, exact = self.g[component]
        return abs(found - exact) / abs(exact) if exact else (0.0 if found == exact else math.inf)

    def __str__(self) -> str:
        known = {name: self.relative(name) for name in self.g if not math.isnan(self.g[name][1])}
        components = ", ".join(f"{name} {value:.1%}" for name, value in known.items())
        return (
            f"against the same weights in float32, {self.dtype} is off by {self.direction:.2%} of |d| (cosine "
            f"{self.cosine:.5f}), by {self.scores_rms:.2%} (rms) and {self.scores_largest:.2%} (at most) of the "
            f"largest score, by up to {self.logps:.2g} nats a token in log-probs, and in G by: {components}"
        )


def _require_same(model: PreTrainedModel, exact: PreTrainedModel) -> None:
    """Raise ValueError unless `exact` has the parameters and buffers of `model`, cast up, and the same of them move."""
    if (dtype := low(exact)) is not None:
        raise ValueError(f"same_model_in_float32: has parameters in {dtype}; `in_float32(model)` makes a copy")
    one, other = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, exact))
    if one.keys() != other.keys():
        raise ValueError(f"same_model_in_float32: not the same model; {sorted(one.keys() ^ other.keys())[:3]} differ")
    for name, t in one.items():
        if not torch.equal(t.to(other[name].dtype), other[name].to(t.device)):
            raise ValueError(
                f"same_model_in_float32: {name} is not that of the model, cast up, so that the two are different "
                "functions; `in_float32(model)` makes a copy"
            )
        if t.requires_grad != other[name].requires_grad:
            raise ValueError(f"same_model_in_float32: {name} requires a gradient in one of the two models alone")


def error(
    model: PreTrainedModel,
    same_model_in_float32: PreTrainedModel,
    batch: Batch,
    weights: TokenWeights,
    targets: Batch,
    size: int = 256,
) -> Error:
    """What low precision does to d, to the scores along d and to every component of G, against float32.

    The whole measurement is made twice: d on `targets`, scores on `batch` along that d, G with `weights`, once by
    `model` and once by the same weights cast up (`in_float32`). `weights` are the same in both: what an objective makes
    of low-precision log-probs (a pair's omega, say) is not in this error; `logps` says how far those are off.

    Args: size, rows a pass. Raises ValueError if the second model is not the first one, cast up.
    """
    _require_same(model, same_model_in_float32)
    d, exact = (target_direction(m, targets, size=size) for m in (model, same_model_in_float32))
    (logps, scores), (logps32, scores32) = (
        token_scores(m, batch, direction, size=size) for m, direction in ((model, d), (same_model_in_float32, exact))
    )
    inside = batch.response
    largest = scores32.abs().max().item() or 1.0
    off = (scores.double() - scores32.double())[inside] / largest
    g = {
        name: tuple(alignment.by_sequence(weights, a.double(), name).sum().item() for a in (scores, scores32))
        for name in CONTROLS
    }
    length = alignment.norm(exact).item() or 1.0
    return Error(
        dtype=str(low(model) or alignment.precision(d)).removeprefix("torch."),
        direction=alignment.norm({name: d[name] - exact[name] for name in exact}).item() / length,
        cosine=alignment.cosine(d, exact),
        logps=(logps - logps32)[inside].abs().max().item(),
        scores_rms=off.pow(2).mean().sqrt().item(),
        scores_largest=off.abs().max().item(),
        g=g,
    )
