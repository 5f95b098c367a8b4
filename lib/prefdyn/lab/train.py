"""One trainer for every objective: it steps on -(w.detach() * logp).sum(), whose gradient is the objective's."""

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..lens import controls
from ..lens.batch import Batch
from ..lens.likelihood import token_logps
from ..lens.weights import TokenWeights

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
UPDATES = "updates"  # beside parameter names, which all have a dot in them


class Objective(Protocol):
    """What the trainer and the measurement need to know of an objective; see `methods`."""

    size: int  # examples
    temperature: float  # of the policy whose log-probs it weighs

    def batch(self, index: torch.Tensor) -> Batch: ...
    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights: ...
    def metrics(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> dict[str, float]: ...


class Controlled:
    """An objective as a run trains on it after `step` updates: its weights under the run's control."""

    def __init__(self, objective: Objective, control: controls.Control, step: int):
        self.objective, self.control, self.step = objective, control, step

    def __getattr__(self, name: str) -> Any:
        if "objective" not in self.__dict__:  # while it is copied, say
            raise AttributeError(name)
        return getattr(self.objective, name)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        """Those of the objective, of which the control has kept or scaled parts, and what is left to reweight."""
        whole = self.objective.weights(logps, batch, index)
        even = torch.full_like(whole.strength, whole.strength.mean().item())
        return dataclasses.replace(
            whole,
            w=controls.apply_in_training(self.control, whole, self.step),
            strength=even if self.control.part == "uniform" else whole.strength,
        )


@dataclass(frozen=True)
class Optimisation:
    """How to step. warmup is a fraction of all steps; clip is the largest gradient norm (0: no clipping)."""

    steps: int
    batch_size: int
    lr: float
    optimizer: str = "adamw"  # or "sgd"
    warmup: float = 0.05
    schedule: str = "linear"  # to 0 at the last step, or "constant"
    clip: float = 1.0
    weight_decay: float = 0.0
    micro_batch: int = 0  # rows (sequences) in memory at once; 0: all
    seed: int = 0


def learning_rate(config: Optimisation, step: int) -> float:
    """The learning rate of the update that follows `step` updates: linear warm-up, then linear decay or constant.

    Raises ValueError for another schedule.
    """
    if config.schedule not in ("linear", "constant"):
        raise ValueError(f"schedule={config.schedule!r}: must be 'linear' or 'constant'")
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    return config.lr * (config.steps - step) / max(1, config.steps - warm)


def make_optimizer(model: torch.nn.Module, config: Optimisation) -> torch.optim.Optimizer:
    """AdamW or plain SGD over all parameters. Raises ValueError for another name."""
    if config.optimizer == "adamw":
        decay = config.weight_decay
        return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=BETAS, eps=EPS, weight_decay=decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    raise ValueError(f"optimizer={config.optimizer!r}: must be 'adamw' or 'sgd'")


def example_order(size: int, step: int, config: Optimisation) -> torch.Tensor:
    """The examples of update number `step`: passes over all data, each in a new order that depends only on the seed.

    Because it is a function of the step, an interrupted run continues with the same batches.
    """
    start, stop = step * config.batch_size, (step + 1) * config.batch_size
    orders = [
        torch.randperm(size, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
        for epoch in range(start // size, (stop - 1) // size + 1)
    ]
    offset = start - start // size * size
    return torch.cat(orders)[offset : offset + config.batch_size]


def digest(index: torch.Tensor) -> int:
    """A number that tells which examples an update used, and in which order: two runs can be compared by it."""
    return zlib.crc32(index.to(torch.int64).numpy().tobytes())


def second_moment(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's running mean of squared gradients by parameter name, and under UPDATES how many there were.

    Empty for SGD and before the first update.
    """
    known = {
        name: optimizer.state[p] for name, p in model.named_parameters() if "exp_avg_sq" in optimizer.state.get(p, {})
    }
    if not known:
        return {}
    updates = next(iter(known.values()))["step"].reshape(1).float()
    return {UPDATES: updates} | {name: state["exp_avg_sq"] for name, state in known.items()}


def kept_by_clipping(gradient: dict[str, torch.Tensor], clip: float) -> float:
    """What clipping to the norm `clip` (0: none) multiplies a gradient with, at most 1."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
    return min(1.0, clip / max(norm.item(), 1e-30)) if clip > 0 else 1.0


def adamw_scale(
    gradient: dict[str, torch.Tensor], moment: dict[str, torch.Tensor], clip: float
) -> dict[str, torch.Tensor]:
    """What AdamW would multiply this gradient with, by parameter, if it came next: 1 / (sqrt(v) + eps).

    v is the running mean of squares with this gradient in it, without the bias of its start. But for momentum the step
    is -lr * scale * gradient, at most lr * sqrt((1 - beta2^(t + 1)) / (1 - beta2)) after t updates, however small
    earlier gradients were. (With momentum a gradient's own part of a step is spread over those that follow.)
    See *Adam*, Kingma & Ba 2015, algorithm 1.

    Args: moment, of `second_moment`, {} before the first update. clip, the largest gradient norm of training (0: none):
    the scale holds what clipping takes away too.
    """
    kept = kept_by_clipping(gradient, clip)
    updates = moment[UPDATES].item() if moment else 0
    scales = {}
    for name, g in gradient.items():
        before = moment[name] if moment else torch.zeros_like(g)
        v = (BETAS[1] * before + (1 - BETAS[1]) * (kept * g).square()) / (1 - BETAS[1] ** (updates + 1))
        scales[name] = kept / (v.sqrt() + EPS)
    return scales


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """At most `count` steps from 0 to `steps`, both included, closer together early on."""
    if count < 2:
        raise ValueError(f"checkpoints={count}: at least 2 are needed, the first and the last step")
    return sorted({round(steps * (i / (count - 1)) ** 1.5) for i in range(count)})


def update(
    model: PreTrainedModel,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    index: torch.Tensor,
    control: controls.Control = controls.FULL,
    clip: float = 1.0,
    micro_batch: int = 0,
    step: int = 0,
) -> dict[str, float]:
    """One optimiser step on the examples `index`; returns the objective's metrics before it and the gradient norm.

    step: where training is, for controls that change over it.

    With more rows than `micro_batch`, a first pass without gradients gives the weights of the whole batch, and the
    gradient is accumulated over parts in a second one: the same step, with less memory.
    """
    batch = objective.batch(index)
    logps_of = functools.partial(token_logps, model, temperature=objective.temperature)
    optimizer.zero_grad(set_to_none=True)
    if 0 < micro_batch < len(batch):
        with torch.no_grad():
            fixed = torch.cat([logps_of(part) for part in batch.slices(micro_batch)])
        w = controls.apply_in_training(control, objective.weights(fixed, batch, index), step)
        for part, part_w in zip(batch.slices(micro_batch), w.split(micro_batch), strict=True):
            (-(part_w * logps_of(part)).sum()).backward()
    else:
        logps = logps_of(batch)
        fixed = logps.detach()
        w = controls.apply_in_training(control, objective.weights(fixed, batch, index), step)
        (-(w * logps).sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient is not finite (norm {norm.item()}); a smaller learning rate may help, "
            f"now {optimizer.param_groups[0]['lr']:g}"
        )
    optimizer.step()
    return objective.metrics(fixed, batch, index) | {"gradient_norm": norm.item()}


Parts = dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]  # what is trained, by name, with its optimiser


def save_state(folder: Path, parts: Parts, step: int, log: list[dict]) -> None:
    """Write everything that continuing needs; the JSON file, written last and in one move, makes it valid."""
    tensors = {}
    for part, (model, optimizer) in parts.items():
        tensors |= {f"{part}/model/{k}": v for k, v in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}/optimizer/{number}/{k}": v for k, v in state.items()}
    weights = f"state-{step}.safetensors"
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / weights)
    new = folder / "state.json.new"
    new.write_text(json.dumps({"step": step, "weights": weights, "log": log}))
    os.replace(new, folder / "state.json")
    for old in folder.glob("state-*.safetensors"):
        if old.name != weights:
            old.unlink()


def load_state(folder: Path, parts: Parts) -> tuple[int, list[dict]]:
    """Bring `parts` to where `save_state` left them; returns the step and the log, (0, []) if there is no state."""
    if not (folder / "state.json").exists():
        return 0, []
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / state["weights"])  # each goes to its place from here
    for part, (model, optimizer) in parts.items():
        own = {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")}
        model.load_state_dict({k.removeprefix("model/"): v for k, v in own.items() if k.startswith("model/")})
        full = optimizer.state_dict()
        for key, value in own.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/")
                full["state"].setdefault(int(number), {})[name] = value
        optimizer.load_state_dict(full)
    return state["step"], state["log"]


def fit(
    model: PreTrainedModel,
    objective: Objective,
    config: Optimisation,
    *,
    control: controls.Control = controls.FULL,
    at: list[int],
    on_checkpoint: Callable[[int, torch.optim.Optimizer], None],
    state: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Train `model` in place; returns one dict of metrics per step.

    Args:
      at: steps (numbers of updates done) at which `on_checkpoint(step, optimizer)` is called; 0 is before the first.
      state: a folder; if given, training continues from what an interrupted call left there, as if it had never
        stopped, and leaves its own state there at each checkpoint.
      tick: called once a step, for a progress bar.
    Raises ValueError if the batch is larger than the data, FloatingPointError if the gradient is not finite.
    """
    if config.steps and config.batch_size > objective.size:
        raise ValueError(f"batch_size={config.batch_size}: more than the {objective.size} examples there are")
    optimizer = make_optimizer(model, config)
    parts = {"policy": (model, optimizer)}
    start, log = load_state(state, parts) if state else (0, [])
    for _ in range(start):
        tick()
    for step in range(start, config.steps + 1):
        if step in at and (step > start or step == 0):
            on_checkpoint(step, optimizer)
            if state:
                save_state(state, parts, step, log)
        if step == config.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        index = example_order(objective.size, step, config)
        metrics = update(
            model, objective, optimizer, index.to(model.device), control, config.clip, config.micro_batch, step
        )
        log.append({"step": step, "examples": digest(index), **metrics, "lr": optimizer.param_groups[0]["lr"]})
        tick()
    return log
