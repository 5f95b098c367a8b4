"""Token weights read out of whatever loss a trainer computes, with scores on the inputs just as the trainer gave them.

A trainer's loss reads what its policy answers to some rows of tokens: log-probs of tokens, and entropies at most, where
the trainer fuses the output layer into the model, or logits. `listening` keeps these calls while the loss is computed,
and autograd from the loss to what it reads gives w = -dL/dlogp.

With z the logits of a position and y its token, a loss that reads log-probs alone has dL/dz_v = -w (delta_vy - p_v). At
logits the weights are those that come nearest to this, in least squares over the vocabulary; what they leave of dL/dz
is the residual. A loss that reads more (entropies, smoothed labels) is measured at the logits, where a position adds
- sum_v dL/dz_v dz_v to G: exact for it too.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from .alignment import METHODS, TOLERANCES, Direction, MeasurementError, Scored, gradient, inner, precision
from .batch import Batch
from .faithful import faithful
from .likelihood import token_logps
from .losses import logit_contributions

NUMBERS = 2**26  # logits that one forward-mode pass holds at most, unless a single row has more
RESIDUAL = (
    1e-2  # share of dL/dz up to which token weights are taken for the whole of it: half precision leaves some 1e-3
)
READ = ("input_ids", "attention_mask", "labels")  # of a call, what a `Call` has for itself
# What changes the form of an answer and not what it says.
FORM = {"use_cache", "return_dict", "logits_to_keep", "fused_lm_head", "num_items_in_batch", "output_router_logits"}


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model of transformers within `model`: itself, or what adapters are put into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def moving(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require a gradient, by the names that they have in `Called(model)`."""
    return {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}


class Called(torch.nn.Module):
    """A trainer's model, called by the lens as the trainer calls it.

    Without positions of the lens's own, which a trainer does not give, and with whatever it gives beside tokens and
    their mask (`extra`). masked: whether it gives a mask at all.
    """

    def __init__(self, model: torch.nn.Module, masked: bool = True, extra: dict[str, Any] | None = None):
        super().__init__()
        self.model, self._masked, self._extra = model, masked, extra or {}
        self._named = inspect.signature(type(base_of(model)).forward).parameters

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: torch.Tensor, **others: Any
    ) -> SimpleNamespace:
        """Logits [N, C, V] of the C positions `logits_to_keep`."""
        given = {"input_ids": input_ids, **self._extra}
        if self._masked:
            given["attention_mask"] = attention_mask
        if "use_cache" in self._named:
            given["use_cache"] = False
        if "logits_to_keep" in self._named:
            return SimpleNamespace(logits=self.model(**given, logits_to_keep=logits_to_keep).logits)
        return SimpleNamespace(logits=self.model(**given).logits[:, logits_to_keep])


@dataclass(frozen=True)
class Call:
    """One call of the policy by a loss.

    batch: its rows [N, T]; `response`, where labels were given, are the tokens that these name. masked, extra: as for
    `Called`. answers: what the loss may read of the answer, still in its graph: "log_probs" and "entropy" [N, T - 1] of
    tokens 1 to T - 1, or "logits" [N, K, V]. predicted: the columns of tokens that answers are about, int64 [K].
    labelled: whether labels were given.
    """

    batch: Batch
    masked: bool
    extra: dict[str, Any]
    answers: dict[str, torch.Tensor]
    predicted: torch.Tensor
    labelled: bool

    def called(self, model: torch.nn.Module, rows: slice) -> Called:
        """`model` with what was given beside some rows."""
        count = len(self.batch)
        own = {name: t[rows] if _by_row(t, count) else t for name, t in self.extra.items()}
        return Called(model, self.masked, own)


def _by_row(given: Any, rows: int) -> bool:
    return isinstance(given, torch.Tensor) and given.ndim > 0 and given.shape[0] == rows


@contextlib.contextmanager
def listening(model: torch.nn.Module) -> Iterator[list[Call]]:
    """Inside, calls of `model` with gradients are kept in the list that this yields; afterwards nothing is changed.

    Listens at the `forward` of the model of transformers, which adapters and mixed precision leave in place, and at the
    model's own loss function, since what that reads is converted before it is returned.
    """
    policy, calls, read = base_of(model), [], []
    forward, loss = policy.forward, getattr(policy, "loss_function", None)
    saved = {name: vars(policy).get(name) for name in ("forward", "_loss_function")}

    def heard(*args: Any, **kwargs: Any):
        read.clear()
        answer = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            named = inspect.signature(type(policy).forward).bind_partial(policy, *args).arguments if args else {}
            given = {name: value for name, value in {**named, **kwargs}.items() if name != "self" and value is not None}
            calls.append(_call(given, answer, read[-1] if read else None))
        return answer

    def computed(logits: torch.Tensor, *args: Any, **kwargs: Any):
        read.append(logits)
        return loss(logits, *args, **kwargs)

    try:
        policy.forward = heard
        if loss is not None:
            policy.loss_function = computed
        yield calls
    finally:
        for name, value in saved.items():
            vars(policy).pop(name, None)
            if value is not None:
                vars(policy)[name] = value


def _call(given: dict[str, Any], answer: Any, logits: torch.Tensor | None) -> Call:
    """The `Call` with the arguments `given`; logits, what the model's own loss function read, if it was asked."""
    if "input_ids" not in given:
        raise MeasurementError(f"the loss calls the model with {sorted(given)}; without input_ids there are no tokens")
    if "shift_labels" in given:
        raise MeasurementError("the loss calls the model with shift_labels; only labels that the model shifts are read")
    ids, mask = given["input_ids"], given.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise MeasurementError(f"attention_mask has the shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}")
    attention = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    response, labels = torch.zeros_like(attention), given.get("labels")
    if labels is not None:
        response = labels != -100
        response[:, 0] = False  # nothing predicts it
        if bool((labels != ids)[response].any()):
            raise MeasurementError("labels are not the tokens that follow; only losses of next tokens can be measured")
    width, log_probs = ids.shape[1], getattr(answer, "log_probs", None)
    if log_probs is not None:
        predicted = torch.arange(1, width, device=ids.device)
        answers = {"log_probs": log_probs}
        if getattr(answer, "entropy", None) is not None:
            answers["entropy"] = answer.entropy
    else:
        logits = answer.logits if logits is None else logits
        if logits is None:
            raise MeasurementError(f"{type(answer).__name__} has neither log_probs nor logits for a loss to read")
        keep = given.get("logits_to_keep")
        kept = keep if isinstance(keep, torch.Tensor) else torch.arange(width, device=ids.device)[-logits.shape[1] :]
        predicted, answers = kept + 1, {"logits": logits}
    extra = {name: value for name, value in given.items() if name not in {*READ, *FORM}}
    return Call(Batch(ids, attention, response), mask is not None, extra, answers, predicted, labels is not None)


@dataclass(frozen=True)
class Reading:
    """How a loss reads one call. A unit of w is the loss's own.

    w: -dL/dlogp of each response token [N, T], zero elsewhere; at logits the nearest. logps: what the call said of
    tokens, [N, T], or None at logits. entropy: dL/d(entropy) [N, T], or None where the loss does not read it. slope:
    dL/dlogits [N, K, V], or None where token weights are all of it. left, whole: squares of what token weights leave of
    dL/dlogits, and of all of it; (0, 0) at log-probs.
    """

    call: Call
    w: torch.Tensor
    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    slope: torch.Tensor | None = field(default=None, repr=False)
    left: float = 0.0
    whole: float = 0.0

    @property
    def at_logits(self) -> bool:
        """Whether token weights are not all that the loss reads."""
        return self.entropy is not None or self.slope is not None


def read(
    loss: torch.Tensor, calls: Sequence[Call], parameters: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], list[Reading]]:
    """Gradient of the scalar `loss` with respect to the parameters, and how it reads each of the calls, by one pass.

    Raises MeasurementError if the loss reads nothing of any call.
    """
    answers = [t for call in calls for t in call.answers.values() if t.requires_grad]
    found = torch.autograd.grad(loss, [*parameters, *answers], allow_unused=True)
    slopes = {id(t): slope for t, slope in zip(answers, found[len(parameters) :], strict=True) if slope is not None}
    if not slopes:
        raise MeasurementError("the loss reads neither the log-probs nor the logits of the model that is trained")
    own = [{name: slopes[id(t)] for name, t in call.answers.items() if id(t) in slopes} for call in calls]
    readings = [_reading(call, slope) for call, slope in zip(calls, own, strict=True) if slope]
    return list(found[: len(parameters)]), readings


def _reading(call: Call, slopes: dict[str, torch.Tensor]) -> Reading:
    if "logits" in slopes:
        return _at_logits(call, slopes["logits"])
    inside = call.batch.response

    def placed(each: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(each, (1, 0)).masked_fill(~inside, 0.0)

    w = -placed(slopes["log_probs"]) if "log_probs" in slopes else torch.zeros_like(inside, dtype=torch.float32)
    entropy = placed(slopes["entropy"]) if "entropy" in slopes else None
    if entropy is not None and not bool(entropy.any()):
        entropy = None
    return Reading(call, w, placed(call.answers["log_probs"].detach()), entropy)


def _at_logits(call: Call, slope: torch.Tensor) -> Reading:
    """Token weights nearest to dL/dlogits, position by position; row by row, since there may be many numbers."""
    ids, width = call.batch.ids, call.batch.ids.shape[1]
    inside = call.predicted < width  # the last position predicts nothing
    if bool(slope[:, ~inside].any()):
        raise MeasurementError("the loss reads the logits after the last token, which predict nothing that is there")
    logits, slope, columns = call.answers["logits"].detach()[:, inside], slope[:, inside], call.predicted[inside]
    w = torch.zeros(ids.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=ids.device)
    left = whole = 0.0
    for row in range(len(ids)):
        exact = slope[row].to(w.dtype)
        toward = -logits[row].to(w.dtype).softmax(-1)
        toward.scatter_add_(-1, ids[row, columns, None], torch.ones_like(toward[:, :1]))  # delta - p
        size = toward.square().sum(-1).clamp(min=1e-30)
        nearest = -(exact * toward).sum(-1) / size
        w[row, columns] = nearest
        left += (exact + nearest[:, None] * toward).square().sum().item()
        whole += exact.square().sum().item()
    response = call.batch.response
    if not call.labelled:
        response = response.clone()
        response[:, columns] = (slope != 0).any(-1)
    outside = slope[~response[:, columns]]
    if bool(outside.any()):
        raise MeasurementError("the loss reads logits of tokens that its labels leave out")
    call = replace(call, batch=replace(call.batch, response=response), answers={}, predicted=columns)
    much = whole > 0 and math.sqrt(left / whole) > RESIDUAL
    return Reading(call, w.masked_fill(~response, 0.0), slope=slope if much else None, left=left, whole=whole)


def slices(call: Call, vocabulary: int) -> Iterator[slice]:
    """Rows of a call in order, as many as a forward-mode pass holds."""
    columns = max(1, int(call.batch.response.any(0).sum()))
    size = max(1, NUMBERS // (columns * vocabulary))
    for start in range(0, len(call.batch), size):
        yield slice(start, start + size)


def scores(
    model: torch.nn.Module, call: Call, direction: Direction, method: str, temperature: float, vocabulary: int
) -> Scored:
    """Log-probs and scores a of the response tokens of a call, [N, T] each, by one of `alignment.METHODS`.

    direction: by the names of `moving`. temperature: that of the log-probs which the loss reads.
    """
    parts = []
    with faithful(model):
        for rows in slices(call, vocabulary):
            part = _rows(call.batch, rows)
            parts.append(METHODS[method](call.called(model, rows), part, direction, temperature))
    return tuple(torch.cat(each).masked_fill(~call.batch.response, 0.0) for each in zip(*parts, strict=True))


def contributions(
    model: torch.nn.Module, reading: Reading, direction: Direction, temperature: float, vocabulary: int
) -> torch.Tensor:
    """What each response token adds to G of a loss that reads more than log-probs, [N, T]."""
    call, parts = reading.call, []
    with faithful(model):
        for rows in slices(call, vocabulary):

            def linear(logits: torch.Tensor, part: Batch, columns: torch.Tensor, rows: slice = rows) -> torch.Tensor:
                if reading.slope is not None:
                    places = torch.searchsorted(call.predicted, columns)
                    return (reading.slope[rows][:, places] * logits).sum()
                logp = logits.log_softmax(-1)
                picked = logp.gather(-1, part.ids[:, columns, None]).squeeze(-1)
                entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
                w, pull = reading.w[rows][:, columns], reading.entropy[rows][:, columns]
                return (pull * entropy - w * picked).sum()

            part = _rows(call.batch, rows)
            called = call.called(model, rows)
            parts.append(logit_contributions(called, part, direction, linear, len(part), temperature))
    return torch.cat(parts)


def _rows(batch: Batch, rows: slice) -> Batch:
    """Some rows with all their columns: a model that counts positions from the left must not notice."""
    return Batch(batch.ids[rows], batch.attention[rows], batch.response[rows])


def direction_to(model: torch.nn.Module, targets: Batch, size: int) -> tuple[Direction, torch.Tensor]:
    """d, the gradient of the mean log-likelihood of `targets`, by the names of `moving`, and their log-likelihoods [N].

    In parts of `size` rows. Raises ValueError if nothing requires a gradient.
    """
    named, called, found = moving(model), Called(model), []
    if not named:
        raise ValueError("no parameter of the model requires a gradient, so that nothing can move")
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    with faithful(model), torch.enable_grad():
        for part in targets.slices(size):
            logps = token_logps(called, part).sum(-1)
            grads = torch.autograd.grad(logps.sum() / len(targets), list(named.values()), allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            found.append(logps.detach())
    return total, torch.cat(found)


def explained(method: str, coarsest: torch.dtype, w: torch.Tensor, scored: Scored) -> float:
    """How far sum w a may be from a backward pass by rounding alone; see `alignment.check`."""
    logps, a = (t.double() for t in scored)
    moved = (w * a).abs() / (-logps.expm1()).clamp(min=torch.finfo(coarsest).eps)
    return TOLERANCES[method][coarsest] * moved.sum().item()


def choose(model: torch.nn.Module, few: Batch, coarsest: torch.dtype) -> str:
    """ "forward", or "central" where the model has no forward derivative: tried on a few rows against a backward pass.

    coarsest: the precision that the model computes in. Raises MeasurementError that says why of both if neither works.
    """
    failures, called, w = [], Called(model), few.response.to(torch.float32)
    with faithful(model):
        with torch.enable_grad():
            direction = gradient(called, [(few, w)])
        expected = float(inner(direction, direction))
        for method in TOLERANCES:
            try:
                scored = METHODS[method](called, few, direction, 1.0)
                found, room = (w * scored[1]).double().sum().item(), explained(method, coarsest, w, scored)
                if not abs(found - expected) <= room:
                    raise MeasurementError(f"<d, d> is {expected:.6g} by a backward pass and {found:.6g} by scores")
            except Exception as error:  # whatever torch or the model's code raises, the other method may do
                failures.append(f"{method}: {type(error).__name__}: {error}")
            else:
                return method
    raise MeasurementError("this model cannot be measured by any method. " + " | ".join(failures))


def coarsest_of(direction: Direction, mixed: str) -> torch.dtype:
    """The coarsest precision of parameters, of mixed precision ("no", "bf16", "fp16") and of products on a GPU.

    Products of float32 by TF32 keep 11 bits, as float16 does.
    """
    dtypes = [precision(direction), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed, torch.float64)]
    matmul = torch.backends.cuda.matmul
    short = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    if short and any(t.is_cuda for t in direction.values()):
        dtypes.append(torch.float16)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
