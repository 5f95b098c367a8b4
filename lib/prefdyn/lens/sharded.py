"""The lens on a model that several processes share: parameters sharded by torch's FSDP, examples divided among them.

Either FSDP will do: `fully_shard` (FSDP2), or `FullyShardedDataParallel` with parameters fully sharded, best with
use_orig_params=True; `accelerate` makes either. Each process has its shards of every parameter, its part of the
responses D' and its part of the probe; a Batch of no rows is a part too. G is the same sum as in `alignment`,

    G(part) = sum_tok w_tok * a_tok = < sum_tok w_tok grad log pi(tok), d >,     a_tok = < grad log pi(tok), d >

where sums go over the tokens of all processes and d is sharded like the parameters. It has no forward mode here, and
two ways remain, which check each other:

    d = sharded.target_direction(model, targets_here, total=1000)
    parts = sharded.components(model, batch_here, w_here, d)     # {"full": G, "positive": ..., "negative": ...}
    scored = sharded.token_scores(model, batch_here, d)          # log-probs and a_tok of this process's tokens
    sharded.check("step 100", w_here, scored, parts)

`components`, inner products of shards: exact up to rounding. A forward and a backward pass for the positive part and
as much for the negative one, and the memory of one more gradient. Use it where G and its parts are all that is asked.
`token_scores`, central differences: three forward passes for the scores of all tokens, after which every further
weighting is a sum, by sequences, groups, thirds or other objectives too. They are good to some 1e-4 of the largest
score, and need memory for one more copy of this process's shards. Use it for scores of tokens and standard errors.

All functions but `check` call the model, and all are collective: every process has to call them, in the same order.
Processes with fewer rows, or none, take part in the passes of the others with a row that weighs nothing, since a pass
gathers shards from all. Numbers that are returned as float are those of all processes, and the same on each.

FSDP averages gradients over processes; here they are summed, since weights and D' are those of the whole objective: w
is divided by the number of examples of all processes, not of this one. Measure between steps of the optimiser: what is
half accumulated without synchronisation (`no_sync`) would be taken for a part of d. Gradients that are there are put
aside, and back. All is in float32, the reduction of gradients included; low precision in a pass is refused. A model
whose gradients are divided by something else than the number of processes (`set_gradient_divide_factor`) fails `check`.
A mixture of experts has to route something to every expert on every process, in measurements as in training.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .alignment import TOLERANCES, Direction, MeasurementError, Scored
from .batch import Batch
from .faithful import faithful
from .likelihood import token_logps

Group = dist.ProcessGroup | None  # the processes that share the model; None for all there are
WRAPPER = "_fsdp_wrapped_module."  # what classic FSDP puts into the names of parameters
SCALE = 1e-4  # the step of a central difference over the size of the parameters, as in `alignment`
FULLY_SHARDED = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a parameter or of a direction."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _copies(tensor: torch.Tensor) -> int:
    """The number of processes that have the same shard: 1, or more where a model is sharded within replicas."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = [tensor.device_mesh.size(i) for i, place in enumerate(tensor.placements) if place.is_replicate()]
    return math.prod(sizes)


def _summed(value: torch.Tensor, group: Group) -> float:
    """The sum of a number over processes, in float64."""
    total = value.detach().to(torch.float64, copy=True)
    dist.all_reduce(total, group=group)
    return total.item()


def _total(terms: Iterable[tuple[torch.Tensor, torch.Tensor]], group: Group) -> float:
    """The sum over processes and over all numbers in `terms`: pairs of a shard and the parameter that it belongs to."""
    sums = [shard.sum(dtype=torch.float64) / _copies(whole) for shard, whole in terms]
    return _summed(torch.stack(sums).sum(), group)


def inner(a: Direction, b: Direction, group: Group = None) -> float:
    """Inner product of two sharded directions over all parameters.

    Raises ValueError if they are not of the same parameters.
    """
    if a.keys() != b.keys():
        differ = sorted(a.keys() ^ b.keys())[:3]
        raise ValueError(f"inner: two directions of the same parameters are needed; they differ in {differ}")
    return _total(((_local(a[name]) * _local(b[name]), a[name]) for name in a), group)


def norm(direction: Direction, group: Group = None) -> float:
    """Euclidean length of a sharded direction over all parameters."""
    return math.sqrt(inner(direction, direction, group))


def _reshard(model: torch.nn.Module) -> None:
    """Let go of what FSDP has gathered and kept, so that the next pass gathers the shards as they are by then.

    FSDP keeps its outermost parameters after a forward pass, for a backward pass that may never come.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and module._handle and module._is_root is not None:
            module._handle.reshard(True)  # there is no public way; `_is_root` is None before the first pass


def _moving(model: torch.nn.Module, group: Group) -> Direction:
    """The parameters that require a gradient, by the names that they have on one process, each as this process's shard.

    Raises ValueError if there is none, or they are not in float32, not fully sharded, or not over `group`.
    """
    named = {name.replace(WRAPPER, ""): p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the model requires a gradient, so that nothing can move")
    if coarse := [f"{name} in {p.dtype}" for name, p in named.items() if p.dtype != torch.float32]:
        raise ValueError(f"a sharded measurement needs parameters in float32, given {', '.join(coarse[:3])}")
    if isinstance(model, FullyShardedDataParallel):
        units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
        if other := {unit.sharding_strategy for unit in units} - {*FULLY_SHARDED}:
            allowed = ", ".join(strategy.name for strategy in FULLY_SHARDED)
            raise ValueError(f"sharding_strategy: given {other.pop().name}; allowed: one of {allowed}")
        sizes = {unit.process_group.size() for unit in units}
    else:
        for name, p in named.items():
            if not isinstance(p, DTensor):
                raise ValueError(f"parameter {name} is not sharded; a model that is whole is measured by `alignment`")
            if sum(not place.is_replicate() for place in p.placements) > 1:
                raise ValueError(f"parameter {name} is sharded twice ({p.placements}); allowed: by FSDP alone")
        sizes = {p.device_mesh.size() for p in named.values()}
    if sizes != {dist.get_world_size(group)}:
        shared = ", ".join(map(str, sorted(sizes)))
        raise ValueError(f"group: given {dist.get_world_size(group)} processes; the model is shared by {shared}")
    return named


@contextlib.contextmanager
def _exact(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the precision of what modules return is noted. At the end a ValueError if any is too coarse.

    Neither parameters nor logits tell: FSDP and `accelerate` may cast the former on the way in and the latter back.
    """
    seen: dict[torch.dtype, str] = {}

    def note(module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            seen.setdefault(output.dtype, type(module).__name__)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if coarse := [f"{kind} in {dtype}" for dtype, kind in seen.items() if dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"a sharded measurement needs passes in float32, and the model computes {', '.join(coarse)}; "
            "measure without mixed precision"
        )


def _filler(device: torch.device) -> Batch:
    """A row for passes in which a process has none left: token 0 after token 0, of no weight."""
    ids = torch.zeros((1, 2), dtype=torch.int64, device=device)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[False, True]], device=device))


def _passes(batch: Batch, size: int, group: Group) -> Iterator[tuple[tuple | None, Batch]]:
    """`batch.pieces(size)`, then fillers without a place, until all processes have had as many."""
    pieces = list(batch.pieces(size)) if len(batch) else []
    most = torch.tensor(len(pieces), device=batch.ids.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    yield from pieces
    for _ in range(int(most) - len(pieces)):
        yield None, _filler(batch.ids.device)


def gradient(model: PreTrainedModel, batch: Batch, w: torch.Tensor, size: int = 64, group: Group = None) -> Direction:
    """sum_tok w_tok * grad log pi(tok) over the tokens of all processes, of each parameter this process's shard.

    Args: batch and w [N, T], the rows of this process and the weights of their tokens. size, rows per pass.
    Raises ValueError for shapes that differ, and for models that cannot be measured (see `_moving`), and RuntimeError
    if no gradient arrives.
    """
    if w.shape != batch.ids.shape:
        raise ValueError(f"w: given {tuple(w.shape)}; allowed: the shape of the batch, {tuple(batch.ids.shape)}")
    _reshard(model)
    named = _moving(model, group)
    kept = {name: p.grad for name, p in named.items()}
    try:
        for p in named.values():
            p.grad = None
        with faithful(model), torch.enable_grad():
            for place, part in _passes(batch, size, group):
                with _exact(model):
                    logps = token_logps(model, part)
                own = torch.zeros_like(logps) if place is None else w[place]
                (dist.get_world_size(group) * (own * logps).sum()).backward()  # FSDP will average over processes
        arrived = torch.tensor(sum(p.grad is not None for p in named.values()), device=batch.ids.device)
        if _summed(arrived, group) == 0:
            raise RuntimeError("no gradient arrived: FSDP is told not to synchronise them, or no pass was made")
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in named.items()}
    finally:
        _reshard(model)
        for name, p in named.items():
            p.grad = kept[name]


def target_direction(
    model: PreTrainedModel, targets: Batch, total: int, size: int = 64, group: Group = None
) -> Direction:
    """d: the gradient of the mean log-likelihood of the responses D', of each parameter this process's shard.

    Args: targets, this process's part of D'. total, the number of responses in D', over all processes. size, rows per
    pass. Raises ValueError if the parts do not add up to `total`: samplers that give as many rows to each process
    repeat some, which would count twice.
    """
    if (given := int(_summed(torch.tensor(len(targets), device=targets.ids.device), group))) != total:
        raise ValueError(f"targets: all processes together give {given} responses, and total={total}")
    return gradient(model, targets, targets.response / total, size, group)


def components(
    model: PreTrainedModel, batch: Batch, w: torch.Tensor, direction: Direction, size: int = 64, group: Group = None
) -> dict[str, float]:
    """G of an objective and of its positive and negative part, by inner products of shards.

    Args: batch and w [N, T], this process's rows and their weights in the whole objective. direction, of
    `target_direction`. size, rows per pass.
    Returns "full", "positive" and "negative", the first being the sum of the others: G is linear in w.
    """
    parts = {"positive": w.clamp(min=0), "negative": w.clamp(max=0)}
    g = {name: inner(gradient(model, batch, part, size, group), direction, group) for name, part in parts.items()}
    return {"full": g["positive"] + g["negative"], **g}


def _logps(model: PreTrainedModel, batch: Batch, size: int, group: Group) -> torch.Tensor:
    """`token_logps` [N, T] of this process's rows, gathering the shards as they are now."""
    logps = torch.zeros(batch.ids.shape, device=batch.ids.device)
    for place, part in _passes(batch, size, group):
        with _exact(model):
            found = token_logps(model, part)
        if place is not None:
            logps[place] = found
    _reshard(model)
    return logps


@torch.no_grad()
def token_scores(
    model: PreTrainedModel, batch: Batch, direction: Direction, size: int = 64, group: Group = None
) -> Scored:
    """Log-probs and alignment scores a_tok = <grad log pi(tok), d> of this process's response tokens, [N, T] each.

    By a central difference of passes at theta +- eps * d, where each process shifts its shards; eps as in `alignment`.
    Args: direction, of `target_direction`. size, rows per pass. Raises ValueError if direction is not of this model.
    """
    _reshard(model)
    named = _moving(model, group)
    if direction.keys() != named.keys():
        raise ValueError(f"direction and model differ in the parameters {sorted(direction.keys() ^ named.keys())[:3]}")
    saved = {name: _local(p).clone() for name, p in named.items()}
    # a bias may be -inf
    finite = ((saved[name].masked_fill(~saved[name].isfinite(), 0.0), p) for name, p in named.items())
    size_of_model = math.sqrt(_total(((shard.square(), p) for shard, p in finite), group))
    eps = SCALE * size_of_model / max(norm(direction, group), 1e-30)
    found = []
    try:
        with faithful(model):
            for shift in (0.0, eps, -eps):
                for name, p in named.items():
                    _local(p).copy_(saved[name] + shift * _local(direction[name]))
                found.append(_logps(model, batch, size, group))
    finally:
        _reshard(model)
        for name, p in named.items():
            _local(p).copy_(saved[name])
    logps, raised, lowered = found
    return logps, (raised - lowered) / (2 * eps)


def check(where: str, w: torch.Tensor, scored: Scored, parts: dict[str, float], group: Group = None) -> float:
    """Compare the two ways: sum_tok w_tok a_tok over all processes is G, for the objective and both its parts.

    Args: where, the step or whatever else names the measurement. w [N, T] and scored, of this process's tokens.
    parts, of `components`.
    Returns the largest difference as a part of what rounding explains. Raises MeasurementError, on every process, if
    one is more than that.
    """
    logps, scores = (t.double() for t in scored)
    odds = (-logps.expm1()).clamp(min=torch.finfo(torch.float32).eps)
    worst = 0.0
    for name, part in {"full": w, "positive": w.clamp(min=0), "negative": w.clamp(max=0)}.items():
        found = _summed((part * scores).sum(), group)
        explained = TOLERANCES["central"][torch.float32] * _summed(((part * scores).abs() / odds).sum(), group)
        if not abs(found - parts[name]) <= explained:  # also where one of them is no number
            raise MeasurementError(
                f"{where}, {name}: the scores give G = {found:.6g}, inner products of shards {parts[name]:.6g}, and "
                f"rounding explains a difference of {explained:.1g} at most; gradients are not averaged over all "
                "processes in float32, or the model is not one function in both"
            )
        worst = max(worst, abs(found - parts[name]) / explained if explained else 0.0)
    return worst
