"""The lens while a trainer trains: a callback for `transformers.Trainer` and the trainers that are built on it (TRL's).

    trainer.add_callback(LensCallback(trainer, probe=64, targets="chosen", report="lens/"))

Cheap, at every step of the optimiser: g = -<d, gradient>, with the gradient that the optimiser gets (accumulated,
unscaled, clipped) and the d of the last measurement. Now and then a measurement: d anew, and G with its components on a
fixed probe, of whatever loss the trainer computes (see `captured`). Training is the same, bit for bit, with and without
it: generators of random numbers, modes of modules and what the trainer collects are put back, and no gradient, data
loader or state of the optimiser is touched.
"""

import contextlib
import copy
import functools
import importlib.metadata
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from . import captured, folder, probing
from .alignment import Direction, inner, norm
from .faithful import faithful

SHARE = 0.10  # of the time of training that measurements at evaluation steps may take
FEW = 4  # targets that the way of measuring is tried out on
OWN = (
    "The loss of the probe is about the very responses that are targets: G of the probe holds what each of them does "
    "to itself, and that is the more the fewer they are. G of `steps` is of batches of training."
)
REPORTS = "prefdyn.report"  # group of entry points; that named "html" makes a report of a folder
SETTINGS = ("beta", "label_smoothing", "ld_alpha", "desirable_weight", "undesirable_weight", "epsilon", "epsilon_high")
SETTINGS += ("temperature", "num_generations", "num_iterations", "learning_rate", "weight_decay", "max_grad_norm")

_log = logging.getLogger("prefdyn.lens")


def _apart(event: Callable) -> Callable:
    """An event whose errors end the lens and not the training, and whose time is counted."""

    @functools.wraps(event)
    def guarded(self: "LensCallback", args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.quiet:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what training has queued is not our time
        start = time.perf_counter()
        try:
            event(self, state, control)
        except Exception as error:  # whatever it is, a run is worth more than its measurement
            self._give_up(state.global_step, error)
        finally:
            self._seconds += time.perf_counter() - start

    return guarded


class LensCallback(TrainerCallback):
    """Measures, while `trainer` trains, how its loss changes the likelihood of target responses; see the module.

    Args: trainer, to which it is added. probe, examples that G is measured on: the first of its eval dataset, or of its
    train dataset if there is none, in batches of its training batch size; a trainer that samples its responses (GRPO,
    RLOO) is measured on the inputs of its latest training loss instead. targets, the responses D' whose likelihood is
    asked about: "chosen", those of the probe (of KTO the desirable ones, of SFT all), or a list or dataset of
    {"prompt", "response"} (or "completion"): texts, which are joined as they are and ended with the end of text, or
    conversations, which go through the tokenizer's chat template. every, optimiser steps between measurements; None: at
    evaluations, as long as they take less than SHARE of the time. The beginning and the end are always measured.
    report, the folder that tables and the report are written to.

    A folder of the same run is continued: rows of steps that come again are replaced. One of another run is refused.
    After an error the lens says why, once, and is quiet; training goes on.
    Raises TypeError and ValueError for what it cannot measure, before training begins.
    """

    def __init__(
        self,
        trainer: Any,
        probe: int = 64,
        targets: Any = "chosen",
        every: int | None = None,
        report: str | os.PathLike = "lens/",
    ):
        probing.check_trainer(trainer)
        _check_count("probe", probe, "a number of examples, at least 1")
        if every is not None:
            _check_count("every", every, "None (at evaluations) or a number of optimiser steps, at least 1")
        self.trainer, self.probe, self.every, self.quiet = trainer, probe, every, False
        self._layout = probing.layout_of(trainer)
        with untouched(trainer):
            self._data = None if self._layout == "rollouts" else probing.collated(trainer, probe)
            self._targets, self._what, self._unusable = probing.targets_of(trainer, self._layout, self._data, targets)
        self._folder = folder.Folder(Path(report), folder.identity(trainer))
        self._rows = trainer.args.per_device_train_batch_size
        self._notes: dict[str, str] = {}  # the latest of each kind
        self._before: Any = None
        self._reset()

    def _reset(self) -> None:
        """Back to before any measurement."""
        self._seconds = self._opening = self._latest_cost = 0.0
        self._began = time.perf_counter()
        self._method: str | None = None
        self._direction: Direction | None = None
        self._d_step = self._decided = -1
        self._first = 0  # step at which training began
        self._size = 0.0  # of d
        self._inputs: dict[str, Any] | None = None
        self._loss_before: torch.Tensor | None = None
        self._asked = self._omitted = 0
        self._worst = 0.0  # largest difference of tokens and backward pass, in sizes of contributions
        self._training, self._used = False, 0

    # Events

    @_apart
    def on_train_begin(self, state: Any, control: Any) -> None:
        self._reset()
        self._training, self._first = True, state.global_step
        self._folder.begin(self._first)
        if self._layout == "rollouts":
            self._listen_to_losses()
            self._note(
                "rollouts",
                f"G is of the inputs of the latest training loss, however many: probe={self.probe} is not used.",
            )
        if self._what[0] == "chosen":
            self._note("own", OWN)
        self._note(
            "final", f"While it trains there are no final responses: {probing.OFFLINE} measures towards them later."
        )
        self._measure(state.global_step)
        self._opening = self._latest_cost

    @_apart
    def on_step_begin(self, state: Any, control: Any) -> None:
        total = getattr(self.trainer, "_tr_loss", None)
        self._loss_before = total.detach().clone() if isinstance(total, torch.Tensor) else None

    @_apart
    def on_pre_optimizer_step(self, state: Any, control: Any) -> None:
        if self._direction is not None:
            self._folder.append("steps", [{"step": state.global_step, **self._cheap()}])

    @_apart
    def on_step_end(self, state: Any, control: Any) -> None:
        step = state.global_step
        last = control.should_training_stop or step >= state.max_steps > 0
        if last or (self.every is not None and step % self.every == 0):
            self._measure(step)
        elif self.every is None and control.should_evaluate:
            self._measure_if_affordable(step)

    @_apart
    def on_epoch_end(self, state: Any, control: Any) -> None:
        if self.every is None and control.should_evaluate:
            self._measure_if_affordable(state.global_step)

    @_apart
    def on_evaluate(self, state: Any, control: Any) -> None:
        if self.every is None and self._training:
            self._measure_if_affordable(state.global_step)

    @_apart
    def on_train_end(self, state: Any, control: Any) -> None:
        self._training = False
        if not (self.trainer.args.load_best_model_at_end and state.best_model_checkpoint):
            self._measure(state.global_step)
        elif state.global_step != self._decided:
            self._note("best", f"Step {state.global_step} was not measured: the best model had taken its place.")
        self._stop_listening()
        self._direction = self._inputs = None
        self._write_report()
        self._folder.about(self._about())

    # When

    def _measure_if_affordable(self, step: int) -> None:
        """A measurement at an evaluation, unless it would take more than SHARE of the time, beside the one at first."""
        if step == self._decided:
            return
        self._asked += 1
        if self._seconds - self._opening + self._latest_cost <= SHARE * (time.perf_counter() - self._began):
            self._measure(step)
        else:
            self._decided, self._omitted = step, self._omitted + 1

    def _measure(self, step: int) -> None:
        """A measurement, unless this step has had its own."""
        if step == self._decided:
            return
        self._decided, start = step, time.perf_counter()
        with untouched(self.trainer), faithful(self.trainer.model):
            values = self._measured(step)
        self._latest_cost = time.perf_counter() - start
        share = self._share(self._latest_cost)
        if self.every is not None and share > SHARE and step > self._first:
            self._say_once(
                "share", f"every={self.every}: the lens takes {share:.0%} of the time, more than {SHARE:.0%}."
            )
        self._folder.about(self._about(self._latest_cost))
        if values:
            self._tell({**values, "lens/share": share})

    def _share(self, running: float = 0.0) -> float:
        """Share of the time since training began that the lens has taken; running, seconds not yet counted."""
        return (self._seconds + running) / max(time.perf_counter() - self._began, 1e-9)

    # What

    def _cheap(self) -> dict[str, float | int | None]:
        """A row of `steps`, but for its step, of the gradient that the optimiser is about to get."""
        trainer, products, squares = self.trainer, [], []
        for name, p in captured.moving(trainer.model).items():
            if p.grad is not None and name in self._direction:
                grad = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
                products.append((self._direction[name] * grad).sum())
                squares.append(grad.square().sum())
        scaler = getattr(trainer.accelerator, "scaler", None)
        scaled = scaler is not None and not trainer.args.max_grad_norm > 0  # clipping takes the scale out
        scale = scaler.get_scale() if scaled else 1.0
        loss = math.nan
        if self._loss_before is not None:
            loss = (trainer._tr_loss.detach() - self._loss_before).item()
        product, square = (torch.stack(each).double().sum().item() if each else 0.0 for each in (products, squares))
        length = math.sqrt(square)
        return {
            "g": -product / scale,
            "d_step": self._d_step,
            "norm": length / scale,
            "cosine": -product / (self._size * length) if self._size * length > 0 else math.nan,
            "loss": loss,
        }

    def _measured(self, step: int) -> dict[str, float]:
        """Measure, write the rows of `step`, and return what is logged; nothing where there are no inputs yet."""
        trainer, model = self.trainer, self.trainer.model
        targets = self._targets.to(trainer.args.device)
        if self._method is None:
            coarsest = captured.coarsest_of(captured.moving(model), trainer.accelerator.mixed_precision)
            self._method = captured.choose(model, targets.slices(FEW)[0], coarsest)
        self._direction, logps = captured.direction_to(model, targets, self._rows)
        self._d_step, self._size = step, norm(self._direction).item()
        likelihood = [folder.likelihood_row(step, "target", logps, targets.response)]
        if self._layout == "rollouts":
            batches = [(len(self._inputs["completion_ids"]), self._inputs)] if self._inputs else []
        else:
            batches = self._data.batches
        if not batches:
            self._folder.append("likelihood", likelihood)
            self._note(
                "empty", f"At step {step} nothing was sampled yet: there are d and the targets' likelihood alone."
            )
            return {}
        probed = probing.probed(trainer, self._layout, batches, self._direction, self._method)
        self._used = int(probed.found.example.max()) + 1
        self._notes |= probed.notes
        return self._write(step, probed, logps.mean().item(), likelihood)

    # Where it goes

    def _write(
        self, step: int, probed: probing.Probed, logp_targets: float, likelihood: list[dict]
    ) -> dict[str, float]:
        """Append the rows of a measurement; returns what is logged."""
        found, ascent = probed.found, probed.ascent
        strength, beta = self._strength(self._used)
        weights = folder.token_weights(self._layout, found, strength)
        parts = {name: found.by_example(folder.component(name, weights, found.c)) for name in folder.COMPONENTS}
        exact = inner(self._direction, ascent).item()
        size, rest = found.c.double().abs().sum().item(), exact - found.c.double().sum().item()
        self._worst = max(self._worst, abs(rest) / size if size else 0.0)
        if abs(rest) > probed.room:
            self._note(
                "rest",
                f"At step {step} no token explains {rest:.3g} of G = {exact:.3g}, more than rounding does: the loss "
                "has a part beside them, such as an auxiliary loss of the model; it is in G of the whole alone.",
            )
        lengths = self._size * norm(ascent).item()
        cosine = exact / lengths if lengths > 0 else math.nan
        self._folder.append("alignment", folder.alignment_rows(step, weights, parts, exact, cosine, logp_targets))
        self._folder.append("groups", folder.group_rows(step, self.trainer.model, self._direction, ascent))
        first = self._first_example()
        self._folder.append("sequences", folder.sequence_rows(step, first, found, weights, parts, beta))
        tokenizer = probing.tokenizer_of(self.trainer)
        self._folder.append("tokens", folder.token_rows(step, first, found, weights, tokenizer))
        if self._layout == "rollouts" or not self._folder.has("texts"):
            self._folder.append("texts", folder.text_rows(step, first, found, tokenizer))
        named = {"pairs": ("chosen", "rejected"), "judged": ("chosen", "rejected"), "rollouts": ("sampled",)}
        kinds = named.get(self._layout, ("response",))
        for side, kind in enumerate(kinds):
            own = found.side == side
            if bool(own.any()):
                likelihood.append(folder.likelihood_row(step, kind, found.logps[own].sum(-1), found.response[own]))
        self._folder.append("likelihood", likelihood)
        positive, negative = (parts[name].sum().item() for name in ("positive", "negative"))
        return {"lens/g": exact, "lens/g_positive": positive, "lens/g_negative": negative, "lens/cosine": cosine}

    def _strength(self, examples: int) -> tuple[float, float | None]:
        """What the mean size of a unit's weights is multiplied with, and beta where that makes omega of DPO."""
        trainer = self.trainer
        plain = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
        if (
            self._layout == "pairs"
            and list(getattr(trainer, "loss_types", [])) == ["sigmoid"]
            and list(getattr(trainer, "loss_weights", [1.0])) == [1.0]
            and all(getattr(trainer, name, value) == value for name, value in plain.items())
        ):
            return examples / trainer.beta, trainer.beta
        return float(examples), None

    def _first_example(self) -> int:
        """The number of the first example: of rollouts, which are others every time, the next that is free."""
        return self._folder.examples if self._layout == "rollouts" else 0

    def _tell(self, values: dict[str, float]) -> None:
        """Through the loggers of the trainer, at once, and not through a `log` of its own, which ends its averages."""
        from transformers import Trainer

        due = self.trainer.control.should_log
        Trainer.log(self.trainer, {name: value for name, value in values.items() if math.isfinite(value)})
        self.trainer.control.should_log = due  # it has not logged its own yet

    def _write_report(self) -> None:
        found = list(importlib.metadata.entry_points(group=REPORTS, name="html"))
        self._folder.about(self._about())
        if not found:
            self._say_once(
                "report", "No report was written, only tables: pip install 'prefdyn[book]' brings what makes it."
            )
            return
        try:
            found[0].load()(self._folder.path)
        except Exception as error:
            self._say_once(
                "report", f"The report could not be written ({type(error).__name__}: {error}); the tables are there."
            )

    def _about(self, running: float = 0.0) -> dict[str, Any]:
        """What about.json says now; running, seconds not yet counted."""
        trainer = self.trainer
        policy, args = captured.base_of(trainer.model), trainer.args
        loss = getattr(trainer, "loss_type", None) or getattr(trainer, "loss_types", None)
        loss = ", ".join(map(str, loss)) if isinstance(loss, (list, tuple)) else loss
        numbers = {name: getattr(args, name, None) for name in SETTINGS}
        parameters = list(trainer.model.parameters())
        adapters = sorted(
            {
                str(getattr(c.peft_type, "value", c.peft_type))
                for c in getattr(trainer.model, "peft_config", {}).values()
            }
        )
        notes = list(self._notes.values())
        if self._omitted:
            notes.append(
                f"{self._omitted} of {self._asked} evaluations were not measured, which would have taken more than "
                f"{SHARE:.0%} of the time; every=STEPS measures whatever it takes."
            )
        if self._unusable:
            notes.append(f"{self._unusable} of the probe's chosen responses had no token left and are no targets.")
        data = self._data
        more = data.records - sum(count for count, _ in data.batches) if data else 0
        return {
            "kind": "live",
            "title": f"{type(trainer).__name__}, while it trained",
            "made": datetime.now().isoformat(timespec="seconds"),
            "command": None,
            "method": {
                "name": type(trainer).__name__,
                "title": type(trainer).__name__,
                "settings": {
                    k: v for k, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
                },
                "loss": loss or "as the trainer computes it",
            },
            "targets": {"what": self._what[0], "count": len(self._targets), "sentence": self._what[1]},
            "models": [],
            "reference": None,
            "model": {
                "class": type(policy).__name__,
                "parameters": sum(p.numel() for p in parameters),
                "moving": sum(p.numel() for p in parameters if p.requires_grad),
                "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "adapter": ", ".join(adapters) or None,
            },
            "data": {
                "name": data.name if data else "the trainer's latest rollouts",
                "records": data.records if data else self._used,
                "used": self._used,
                "left_out": {"more than were asked for": more} if more else {},
                "cut": {"prompts": None, "chosen": None, "rejected": None},
                "max_prompt": None,
                "max_response": None,
            },
            "accuracy": {
                "method": self._method or "forward",
                "sentence": (
                    "G of the whole loss is that of a backward pass through the trainer's own loss; sums over tokens "
                    f"differ from it by {self._worst:.1g} of the sum of sizes at most."
                ),
            },
            "cost": {
                "seconds": self._seconds + running,
                "share": self._share(running),
                "rows": self._rows,
                "memory": "one more copy of the parameters that move between measurements, two more during one",
            },
            "versions": folder.versions(),
            "hardware": folder.hardware(args.device),
            "notes": [
                "g of `steps` is of the gradient that the optimiser gets: accumulated, unscaled and clipped.",
                "g_opt is not measured while it trains. In measurements dropout is off and the loss is scaled as in an "
                "evaluation. What the trainer's own pipeline cuts is not counted here.",
                *notes,
            ],
            "run": self._folder.identity,
        }

    # Whatever happens

    def _note(self, kind: str, sentence: str) -> None:
        self._notes[kind] = sentence

    def _say_once(self, kind: str, sentence: str) -> None:
        if kind not in self._notes:
            _log.warning("LensCallback: %s", sentence)
        self._note(kind, sentence)

    def _give_up(self, step: int, error: Exception) -> None:
        """Say why, once, and be quiet from now on."""
        self.quiet, self._direction, self._inputs = True, None, None
        reason = f"stopped at step {step}: {type(error).__name__}: {error}"
        _log.warning("LensCallback %s. Training goes on without it.", reason)
        self._stop_listening()
        self._note("error", f"The lens {reason}. Training went on without it.")
        with contextlib.suppress(Exception):  # the folder may be what failed
            self._folder.about(self._about())

    def _listen_to_losses(self) -> None:
        """Keep the inputs of the latest training loss."""
        if self._before is not None:
            return
        compute = self.trainer.compute_loss
        self._before = (vars(self.trainer).get("compute_loss"),)

        @functools.wraps(compute)
        def heard(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
            if model.training:
                self._inputs = dict(inputs)
            return compute(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = heard

    def _stop_listening(self) -> None:
        if self._before is not None:
            (before,), self._before = self._before, None
            if before is None:
                del self.trainer.compute_loss
            else:
                self.trainer.compute_loss = before


# What training must not notice


@contextlib.contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Afterwards generators of random numbers are where they were, and attributes and collections of `trainer` as well.

    Datasets are left alone; what is no collection is put back as the same object, whatever happened inside of it.
    """
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    kept: list[tuple[Any, Any]] = []
    _keep({k: v for k, v in vars(trainer).items() if not k.endswith("_dataset")}, kept, set())
    kept[0] = (vars(trainer), dict(vars(trainer)))
    try:
        yield
    finally:
        for thing, before in kept:
            _put_back(thing, before)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _keep(thing: Any, kept: list[tuple[Any, Any]], seen: set[int]) -> None:
    """Add `thing`, with a copy, and all collections in it to `kept`."""
    if not isinstance(thing, (dict, list, deque, set)) or id(thing) in seen:
        return
    seen.add(id(thing))
    kept.append((thing, copy.copy(thing)))
    for each in thing.values() if isinstance(thing, dict) else thing:
        _keep(each, kept, seen)


def _put_back(thing: Any, before: Any) -> None:
    """Make the contents of a collection what they were."""
    if isinstance(thing, dict):
        for name in [name for name in thing if name not in before]:
            del thing[name]
        thing.update({name: value for name, value in before.items() if name not in thing or thing[name] is not value})
    elif len(thing) != len(before) or any(a is not b for a, b in zip(thing, before, strict=True)):
        thing.clear()
        thing.update(before) if isinstance(thing, set) else thing.extend(before)


def _check_count(name: str, given: Any, allowed: str) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"{name}={given!r}: must be {allowed}")
