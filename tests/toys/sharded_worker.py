"""What one of two processes does in tests of `prefdyn.lens.sharded`: shard tiny models, measure them, keep the numbers.

    python -m toys.sharded_worker RANK FOLDER torch|accelerate

The processes meet through a file in FOLDER, and leave RANK.pt there.
"""

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from prefdyn.lens import sharded
from prefdyn.lens.batch import Batch
from prefdyn.lens.faithful import faithful
from prefdyn.lens.likelihood import token_logps
from prefdyn.methods.dpo import dpo_weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from .models import build, random_batch

WORLD = 2
# How models are sharded, and which: any setting can be sharded in any way but frozen parameters among flat ones.
CASES = (
    ("fully_shard", "gpt_neox"),
    ("fully_shard", "llama"),
    ("fully_shard", "llama, tied"),
    ("fully_shard", "gpt_neox, frozen"),
    ("within replicas", "gpt_neox"),
    ("classic", "gpt_neox"),
    ("classic", "llama, tied"),
    ("classic", "gpt_neox, frozen"),
    ("classic, flat", "llama"),
)
PAIRS, TARGETS = 4, 3
ROWS = ((0, 1, 2, 4, 5, 6), (3, 7))  # of the probe, by process: three pairs and one
OWN_TARGETS = ((0, 1, 2), ())  # of D', by process: all and none
SIZE = 2  # rows per pass: three passes on one process and one on the other


def setting(name: str) -> tuple[torch.nn.Module, Batch, torch.Tensor, Batch]:
    """A model, pairs as a batch of chosen and then rejected rows, DPO's weights of their tokens, and D'."""
    model = build(name.removesuffix(", frozen"))
    if name.endswith("frozen"):
        model.get_input_embeddings().requires_grad_(False)
        layers(model)[0].requires_grad_(False)
    batch, targets = random_batch(2 * PAIRS, seed=1), random_batch(TARGETS, seed=2)
    return model, batch, dpo_weights(batch.response, torch.linspace(0.2, 0.7, PAIRS), beta=0.3).w, targets


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a transformer, each of which is gathered by itself."""
    return list(model.base_model.layers)


def shard(model: torch.nn.Module, kind: str = "fully_shard", **more) -> torch.nn.Module:
    """`model`, with parameters sharded over both processes in one of the ways of CASES."""
    if kind.startswith("classic"):
        blocks = ModuleWrapPolicy({type(layer) for layer in layers(model)})
        more |= {"auto_wrap_policy": blocks, "use_orig_params": kind == "classic", "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, **more)
    shape, names = ((WORLD,), ("shard",)) if kind == "fully_shard" else ((WORLD, 1), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


def own_part(rank: int, batch: Batch, w: torch.Tensor, targets: Batch) -> tuple[Batch, torch.Tensor, Batch]:
    """The rows of a process."""
    rows, mine = torch.tensor(ROWS[rank]), torch.tensor(OWN_TARGETS[rank], dtype=torch.int64)
    return batch.take(rows), w[rows], targets.take(mine)


def accumulated(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradients after one more backward pass of a user."""
    with faithful(model):
        token_logps(model, batch).sum().backward()
    return {name: sharded._local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(model: torch.nn.Module, batch: Batch, w: torch.Tensor, targets: Batch) -> dict:
    """All that is measured of a sharded model, between two backward passes of a training that accumulates gradients."""
    first = accumulated(model, batch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    direction = sharded.target_direction(model, targets, TARGETS, SIZE)
    parts = sharded.components(model, batch, w, direction, SIZE)
    logps, scores = scored = sharded.token_scores(model, batch, direction, SIZE)
    unmoved = all(bool((p == before[name]).all()) for name, p in model.named_parameters())
    second = accumulated(model, batch)
    return {
        "direction": {name: sharded._local(d).flatten() for name, d in direction.items()},
        "norm": sharded.norm(direction),
        "parts": parts,
        "logps": logps,
        "scores": scores,
        "share of rounding": sharded.check("here", w, scored, parts),
        "parameters as they were": unmoved,
        "gradients as they were": all(torch.allclose(second[name], 2 * first[name], rtol=1e-4) for name in second),
        "gradients": sum(float(g.square().sum()) for g in first.values()),
    }


def refused(call: Callable[[], object]) -> str:
    """The error that `call` raises, in words."""
    try:
        call()
    except (ArithmeticError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int) -> dict[str, str]:
    """What is refused, in words."""
    model, batch, w, targets = setting("gpt_neox")
    batch, w, targets = own_part(rank, batch, w, targets)
    whole = shard(build("gpt_neox"))
    mixed, replicated = build("gpt_neox"), ShardingStrategy.NO_SHARD
    for module in (*layers(mixed), mixed):
        back = torch.float32 if module is mixed else None  # so that the logits do not tell
        fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=back))
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    frozen = shard(build("gpt_neox").requires_grad_(False))
    summing, silent = shard(build("gpt_neox")), shard(build("gpt_neox"))
    for module in summing.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    silent.set_requires_gradient_sync(False)

    def checked(model: torch.nn.Module) -> None:
        d = sharded.target_direction(model, targets, TARGETS)
        scored = sharded.token_scores(model, batch, d)
        sharded.check("step 7", w, scored, sharded.components(model, batch, w, d))

    d = sharded.target_direction(whole, targets, TARGETS)
    zero = {name: torch.zeros_like(t) for name, t in d.items()}
    return {
        "plain": refused(lambda: sharded.gradient(model, batch, w)),
        "frozen": refused(lambda: sharded.gradient(frozen, batch, w)),
        "bfloat16": refused(lambda: sharded.gradient(shard(build("gpt_neox").bfloat16()), batch, w)),
        "mixed": refused(lambda: sharded.gradient(mixed, batch, w)),
        "mixed scores": refused(lambda: sharded.token_scores(mixed, batch, d)),
        "replicated": refused(
            lambda: sharded.gradient(shard(build("gpt_neox"), "classic", sharding_strategy=replicated), batch, w)
        ),
        "total": refused(lambda: sharded.target_direction(whole, targets, 2 * TARGETS)),
        "shape": refused(lambda: sharded.gradient(whole, batch, w[:, 1:])),
        "group": refused(lambda: sharded.gradient(whole, batch, w, group=alone)),
        "direction": refused(lambda: sharded.token_scores(whole, batch, {})),
        "inner": refused(lambda: sharded.inner(d, {})),
        "silent": refused(lambda: sharded.gradient(silent, batch, w)),
        "averaged otherwise": refused(lambda: checked(summing)),
        "averaged": refused(lambda: checked(whole)),
        "no direction": str(float(sharded.token_scores(whole, batch, zero)[1].abs().max())),
    }


def through_accelerate(rank: int) -> dict:
    """The same of models that `accelerate` has sharded.

    On CPUs it makes nothing of an FSDP plugin, and of two processes plain data parallelism; that its way of sharding
    can be tested there, its state is set to what it is on other devices.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    results = {}
    for name in ("gpt_neox", "llama"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        results["its own choice"] = str(accelerator.distributed_type)
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model, batch, w, targets = setting(name)
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        results["accelerate", name] = measure(model, *own_part(rank, batch, w, targets))
        accelerator.state.distributed_type = DistributedType.MULTI_CPU
    return results


def main(rank: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting, patience = (folder / "meeting").as_uri(), datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=patience)
    if what == "accelerate":
        results = through_accelerate(rank)
    else:
        results = {}
        for kind, name in CASES:
            model, *data = setting(name)
            results[kind, name] = measure(shard(model, kind), *own_part(rank, *data))
        results["refused"] = refusals(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
