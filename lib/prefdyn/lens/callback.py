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
import inspect
import json
import logging
import math
import os
import platform
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from . import captured, controls
from .alignment import Direction, MeasurementError, inner, norm
from .batch import Batch, concatenate, pad
from .faithful import faithful
from .groups import groups, inner_by_group
from .losses import from_loss
from .weights import TokenWeights

SHARE = 0.10  # of the time of training that measurements at evaluation steps may take
COMPONENTS = ("full", "positive", "negative", "top", "middle", "bottom")
TOKENS_OF = 8  # examples whose tokens and texts are written
TEXT = 2_000  # characters of a text that are written
FEW = 4  # targets that the way of measuring is tried out on
REPORTS = "prefdyn.report"  # group of entry points; that named "html" makes a report of a folder
SETTINGS = ("beta", "label_smoothing", "ld_alpha", "desirable_weight", "undesirable_weight", "epsilon", "epsilon_high")
SETTINGS += ("temperature", "num_generations", "num_iterations", "learning_rate", "weight_decay", "max_grad_norm")
PACKAGES = ("prefdyn", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
OFFLINE = "prefdyn lens RUN/checkpoint-*"

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
        _check_trainer(trainer)
        _check_count("probe", probe, "a number of examples, at least 1")
        if every is not None:
            _check_count("every", every, "None (at evaluations) or a number of optimiser steps, at least 1")
        self.trainer, self.probe, self.every, self.quiet = trainer, probe, every, False
        self._layout = _layout(trainer)
        with untouched(trainer):
            self._data = None if self._layout == "rollouts" else _collated(trainer, probe)
            self._targets, self._what, self._unusable = _targets(trainer, self._layout, self._data, targets)
        self._folder = _Folder(Path(report), _identity(trainer))
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
        self._room = 0.0  # what of the latest difference rounding explains
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
        self._note("final", f"While it trains there are no final responses: {OFFLINE} measures towards them later.")
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
        likelihood = [_likelihood(step, "target", logps, targets.response)]
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
        found, ascent = self._probed(batches)
        return self._write(step, found, ascent, logps.mean().item(), likelihood)

    def _probed(self, batches: list[tuple[int, dict[str, Any]]]) -> tuple["_Found", Direction]:
        """The trainer's loss on the probe, mean over its examples: tokens that it weighs, and -gradient."""
        trainer, model = self.trainer, self.trainer.model
        named, parts, examples = captured.moving(model), [], 0
        ascent = {name: torch.zeros_like(p) for name, p in named.items()}
        total, self._room = sum(count for count, _ in batches), 0.0
        for count, inputs in batches:
            inputs = _on_device(trainer, inputs)
            with torch.enable_grad(), captured.listening(model) as calls:
                loss = trainer.compute_loss(model, dict(inputs))
            if not isinstance(loss, torch.Tensor) or loss.ndim != 0 or not bool(loss.isfinite()):
                raise MeasurementError(f"the trainer's loss of the probe is {loss!r}; a finite scalar is needed")
            grads, readings = captured.read(loss * (count / total), calls, list(named.values()))
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    ascent[name] -= grad
            rows = sum(len(reading.call.batch) for reading in readings)
            example, side = _places(self._layout, rows, count, inputs)
            start = 0
            for reading in readings:
                own = slice(start, start + len(reading.call.batch))
                parts.append(self._scored(reading, example[own] + examples, side[own]))
                start = own.stop
            examples += int(example.max()) + 1
            del loss, grads, readings, calls  # a graph at a time
        self._used = examples
        return _join(parts), ascent

    def _scored(self, reading: captured.Reading, example: torch.Tensor, side: torch.Tensor) -> "_Found":
        """Scores of the tokens of one call, and what each contributes to G."""
        model, call = self.trainer.model, reading.call
        temperature = float(getattr(self.trainer, "temperature", 1.0)) if reading.logps is not None else 1.0
        vocabulary = captured.base_of(model).config.get_text_config().vocab_size
        given = (self._direction, self._method, temperature, vocabulary)
        logps, a = captured.scores(model, call, *given)
        coarsest = captured.coarsest_of(self._direction, self.trainer.accelerator.mixed_precision)
        if reading.logps is not None:
            room = (1e-3 if torch.finfo(coarsest).eps < 1e-6 else 0.1) * (1 + logps.abs())
            off = (logps - reading.logps).abs()[call.batch.response]
            if bool((off > room[call.batch.response]).any()):
                raise MeasurementError(
                    f"log-probs that the loss reads are up to {off.max().item():.3g} nats from those of the model at "
                    f"temperature {temperature:g}: what the trainer does to them cannot be measured"
                )
        w = reading.w.to(a.dtype)
        c = w * a
        self._room += captured.explained(self._method, coarsest, w, (logps, a))
        if reading.at_logits:
            if self._method != "forward":
                raise MeasurementError("a loss that reads more than log-probs of tokens needs a forward derivative")
            whole = captured.contributions(model, reading, self._direction, temperature, vocabulary)
            size = whole.abs().sum().item()
            left = (whole - c).abs().sum().item() / size if size else 0.0
            self._note(
                "residual",
                "The loss reads more of distributions than log-probs of tokens: contributions are those of logits; "
                f"signs and strengths are those of token weights, which leave {left:.1%} of contributions.",
            )
            c = whole
        elif reading.whole:
            left = math.sqrt(reading.left / reading.whole)
            self._note("residual", f"Token weights are the whole loss: they leave {left:.1g} of dL/dlogits.")
        batch = call.batch
        return _Found(*(t.cpu() for t in (batch.ids, batch.attention, batch.response, w, logps, a, c, example, side)))

    # Where it goes

    def _write(
        self, step: int, found: "_Found", ascent: Direction, logp_targets: float, likelihood: list[dict]
    ) -> dict[str, float]:
        """Append the rows of a measurement; returns what is logged."""
        examples = int(found.example.max()) + 1
        strength, margin = self._strength(examples)
        weights = _weights(self._layout, found, strength)
        parts = {name: found.by_example(_component(name, weights, found.c)) for name in COMPONENTS}
        exact = inner(self._direction, ascent).item()
        size, rest = found.c.double().abs().sum().item(), exact - found.c.double().sum().item()
        self._worst = max(self._worst, abs(rest) / size if size else 0.0)
        if abs(rest) > self._room:
            self._note(
                "rest",
                f"At step {step} no token explains {rest:.3g} of G = {exact:.3g}, more than rounding does: the loss "
                "has a part beside them, such as an auxiliary loss of the model; it is in G of the whole alone.",
            )
        lengths = self._size * norm(ascent).item()
        cosine = exact / lengths if lengths > 0 else math.nan
        rows = []
        for name, each in parts.items():
            row = {"step": step, "component": name, "g": exact if name == "full" else each.sum().item()}
            row |= {"se": _error_of_sum(each), "g_opt": math.nan, "se_opt": math.nan, "n": examples}
            row |= {"weight": controls.apply(name, weights).abs().sum().item()}
            row |= {"cosine": cosine if name == "full" else math.nan, "cosine_opt": math.nan}
            rows.append(row | {"logp_targets": logp_targets, "moved": math.nan})
        self._folder.append("alignment", rows)
        self._folder.append("groups", self._groups(step, ascent))
        first = self._first_example()
        self._folder.append("sequences", _sequences(step, first, found, weights, parts, margin))
        tokenizer = _tokenizer(self.trainer)
        self._folder.append("tokens", _tokens(step, first, found, weights, tokenizer))
        if self._layout == "rollouts" or not self._folder.has("texts"):
            self._folder.append("texts", _texts(step, first, found, tokenizer))
        kinds = {"pairs": ("chosen", "rejected"), "judged": ("chosen", "rejected")}.get(self._layout, ("response",))
        for side, kind in enumerate(kinds):
            own = found.side == side
            if bool(own.any()):
                likelihood.append(_likelihood(step, kind, found.logps[own].sum(-1), found.response[own]))
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

    def _groups(self, step: int, ascent: Direction) -> list[dict]:
        """Where in the model d and the descent direction meet."""
        policy = captured.base_of(self.trainer.model)
        by_tensor = {id(p): name for name, p in policy.named_parameters()}
        of = groups(policy)
        own = {name: of[by_tensor[id(p)]] for name, p in captured.moving(self.trainer.model).items()}
        ab, aa, bb = (
            inner_by_group(*pair, own)
            for pair in ((self._direction, ascent), (self._direction, self._direction), (ascent, ascent))
        )
        lengths = {group: math.sqrt(aa[group] * bb[group]) for group in ab}
        return [
            {
                "step": step,
                "part": "full",
                "group": group,
                "g": g,
                "cosine": g / lengths[group] if lengths[group] else math.nan,
            }
            for group, g in ab.items()
        ]

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
                "left_out": {},
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
            "versions": _versions(),
            "hardware": _hardware(args.device),
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


# What is measured


@dataclass(frozen=True)
class _Found:
    """Tokens of a probe, on the CPU: [R, T], and the example and side (0 chosen or only, 1 rejected) of rows [R]."""

    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor
    w: torch.Tensor
    logps: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor  # contributions to G
    example: torch.Tensor
    side: torch.Tensor

    def by_example(self, each: torch.Tensor) -> torch.Tensor:
        """Sums [examples] of [R, T]."""
        total = torch.zeros(int(self.example.max()) + 1, dtype=torch.float64)
        return total.index_add(0, self.example, each.double().sum(-1))


def _join(parts: list[_Found]) -> _Found:
    """Rows of all parts, padded on the right to the longest."""
    width = max(part.ids.shape[1] for part in parts)

    def stack(name: str) -> torch.Tensor:
        each = [getattr(part, name) for part in parts]
        if each[0].ndim == 1:
            return torch.cat(each)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in each])

    return _Found(*(stack(field.name) for field in fields(_Found)))


@dataclass(frozen=True)
class _Data:
    """A probe as the trainer collates it: batches with their numbers of examples."""

    name: str
    records: int
    batches: list[tuple[int, dict[str, Any]]]


def _layout(trainer: Any) -> str:
    """How a trainer's rows make examples: "pairs", "judged" (desirable or not), "rollouts" or "single"."""
    names = {kind.__name__ for kind in type(trainer).__mro__}
    known = {"DPOTrainer": "pairs", "KTOTrainer": "judged", "GRPOTrainer": "rollouts", "RLOOTrainer": "rollouts"}
    return next((layout for name, layout in known.items() if name in names), "single")


def _places(layout: str, rows: int, count: int, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Example and side of the rows of a batch, [rows] each, int64."""
    needed = {"pairs": 2 * count, "judged": count}.get(layout, rows)
    if rows != needed:
        raise MeasurementError(f"the loss reads {rows} rows of {count} examples, where {needed} were expected")
    if layout == "pairs":
        return torch.arange(count).repeat(2), torch.arange(2).repeat_interleave(count)
    side = torch.zeros(rows, dtype=torch.int64)
    if layout == "judged":
        side = 1 - torch.as_tensor(inputs["label"]).long().cpu()
    return torch.arange(rows), side


def _collated(trainer: Any, size: int) -> _Data:
    """The first examples of the eval dataset, or of the train dataset, through the trainer's own collator."""
    name = "eval_dataset" if trainer.eval_dataset is not None else "train_dataset"
    data = getattr(trainer, name)
    if isinstance(data, dict):
        first = next(iter(data))
        name, data = f"{name}[{first!r}]", data[first]
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"probe: {name} is a {type(data).__name__}; its examples cannot be read without taking them from training; "
            "give the trainer an eval_dataset that has a length"
        )
    records, collate = len(data), trainer.data_collator
    if records == 0:
        raise ValueError(f"probe: {name} is empty")
    if hasattr(data, "column_names"):
        data = trainer._remove_unused_columns(data, description="lens")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="lens")
    examples = [data[i] for i in range(min(size, records))]
    rows, batches = trainer.args.per_device_train_batch_size, []
    for start in range(0, len(examples), rows):
        part = [dict(e) if isinstance(e, Mapping) else e for e in examples[start : start + rows]]
        batches.append((len(part), dict(collate(part))))
    if pictures := [key for key in batches[0][1] if "pixel" in key or "image" in key]:
        raise ValueError(f"trainer: its batches hold {', '.join(pictures)}; only text can be measured")
    return _Data(name, records, batches)


def _on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs where the model is; GRPO's own preparation would sample."""
    from transformers import Trainer

    return Trainer._prepare_input(trainer, inputs)


def _targets(trainer: Any, layout: str, data: _Data | None, given: Any) -> tuple[Batch, tuple[str, str], int]:
    """D', what it is (a name and a sentence), and how many chosen responses had no token. Raises ValueError."""
    advice = "give a list of {'prompt': ..., 'response': ...}"
    if isinstance(given, str):
        if given != "chosen":
            raise ValueError(f"targets={given!r}: allowed are 'chosen' and a list or dataset; {advice}")
        name = type(trainer).__name__
        if layout == "rollouts":
            raise ValueError(f"targets='chosen': {name} samples its responses, and none is chosen beforehand; {advice}")
        key = "labels" if layout == "single" else "completion_mask"
        if missing := {"input_ids", key} - set(data.batches[0][1]):
            raise ValueError(f"targets='chosen': the batches of {name} have no {', '.join(sorted(missing))}; {advice}")
        batch, unusable = _chosen(layout, data)
        what = {"pairs": "chosen responses", "judged": "desirable completions"}.get(layout, "completions")
        if len(batch) == 0:
            raise ValueError(
                f"targets='chosen': there are no {what} among the {sum(n for n, _ in data.batches)} of the probe"
            )
        return batch, ("chosen", f"the {what} of the probe"), unusable
    rows = list(given) if hasattr(given, "__iter__") and not isinstance(given, Mapping) else None
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        found = "nothing in it" if rows == [] else type(given).__name__
        raise ValueError(f"targets: given {found}; allowed are 'chosen' and a list or dataset; {advice}")
    tokenizer = _tokenizer(trainer)
    if tokenizer is None:
        raise ValueError("targets: the trainer has no processing_class that could tokenize them")
    pairs = [_encoded(tokenizer, row, place) for place, row in enumerate(rows)]
    named = getattr(getattr(given, "info", None), "dataset_name", None)
    batch = pad(*zip(*pairs, strict=True), tokenizer.pad_token_id or 0)
    return batch, (named or "given", f"{len(rows)} responses that were given"), 0


def _chosen(layout: str, data: _Data) -> tuple[Batch, int]:
    """Chosen, desirable or all responses of a probe, and how many were left out since nothing of them is left."""
    batches, unusable = [], 0
    for count, inputs in data.batches:
        ids = inputs["input_ids"]
        attention = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        response = inputs["labels"] != -100 if layout == "single" else inputs["completion_mask"].bool()
        response = response & attention
        response[:, 0] = False
        wanted = torch.ones(len(ids), dtype=torch.bool)
        if layout == "pairs":
            wanted[count:] = False
        elif layout == "judged":
            wanted = torch.as_tensor(inputs["label"]).bool()
        usable = wanted & response.any(-1)
        unusable += int(wanted.sum() - usable.sum())
        batches.append(Batch(ids, attention, response).take(usable.nonzero().squeeze(-1)))
    return concatenate(batches), unusable


def _encoded(tokenizer: Any, row: Mapping[str, Any], place: int) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and the response of one target. Raises ValueError that names it."""
    response = row.get("response", row.get("completion"))
    prompt = row.get("prompt")
    if prompt is None or response is None:
        raise ValueError(f"targets[{place}]: given {sorted(row)}; 'prompt' and 'response' (or 'completion') are needed")
    if isinstance(prompt, str) != isinstance(response, str):
        raise ValueError(f"targets[{place}]: prompt and response must both be texts or both be lists of messages")
    if isinstance(prompt, str):
        asked = tokenizer(text=prompt)["input_ids"]
        if asked and asked[-1] == tokenizer.eos_token_id:
            asked = asked[:-1]  # some tokenizers end whatever they are given
        said = tokenizer(text=response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is None:
            raise ValueError("targets: the tokenizer has no eos_token that could end a response")
        said = said if said and said[-1] == tokenizer.eos_token_id else [*said, tokenizer.eos_token_id]
    else:
        if not tokenizer.chat_template:
            raise ValueError(f"targets[{place}]: a conversation, and the tokenizer has no chat_template")
        asked = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*prompt, *response], return_dict=False)
        if whole[: len(asked)] != asked:
            raise ValueError(f"targets[{place}]: the chat template does not continue its prompt with the response")
        said = whole[len(asked) :]
    if not asked or not said:
        raise ValueError(f"targets[{place}]: an empty {'prompt' if not asked else 'response'}")
    return list(asked), list(said)


def _tokenizer(trainer: Any) -> Any:
    """The tokenizer of a trainer, be it inside of a processor; None if it has none."""
    given = trainer.processing_class
    return getattr(given, "tokenizer", given)


# Rows


def _weights(layout: str, found: _Found, factor: float) -> TokenWeights:
    """Token weights of a probe. Units: pairs, whole responses, or of rollouts tokens; see `_strength` for `factor`."""
    unit = None
    if layout != "rollouts":
        unit = found.example[:, None].expand_as(found.response).masked_fill(~found.response, -1)
    w = found.w.masked_fill(~found.response, 0.0)
    weights = from_loss(lambda logps: -(w * logps).sum(), torch.zeros_like(w), found.response, unit)
    return TokenWeights(w=weights.w, strength=weights.strength * factor, unit=weights.unit)


def _component(name: str, weights: TokenWeights, c: torch.Tensor) -> torch.Tensor:
    """The part of contributions [R, T] that a component keeps; NaN where it is undefined."""
    if name == "full":
        return c
    kept = controls.apply(name, weights) / torch.where(weights.w == 0, torch.ones_like(c), weights.w)
    return c * kept


def _error_of_sum(each: torch.Tensor) -> float:
    """Standard error of a sum over examples drawn at random, NaN for one."""
    return math.sqrt(len(each) * each.var().item()) if len(each) > 1 else math.nan


def _likelihood(step: int, kind: str, logps: torch.Tensor, response: torch.Tensor) -> dict[str, Any]:
    """A row of `likelihood` from log-probs of whole responses [N]."""
    n, logps = len(logps), logps.double()
    error = math.sqrt(logps.var().item() / n) if n > 1 else math.nan
    per_token = (logps.sum() / response.sum()).item()
    return {"step": step, "kind": kind, "logp": logps.mean().item(), "se": error, "per_token": per_token, "n": n}


def _sequences(
    step: int, first: int, found: _Found, weights: TokenWeights, parts: dict[str, torch.Tensor], beta: float | None
) -> list[dict[str, Any]]:
    """Rows of `sequences`; of pairs also omega, margin (where the loss is DPO's own) and scores of both sides."""
    table = {name: parts[name].tolist() for name in ("full", "positive", "negative")}
    if bool((found.side == 1).any()) and len(found.example) == 2 * len(table["full"]):
        omega = weights.strength.double()
        table["omega"] = omega.tolist()
        table["margin"] = (-omega.logit() / beta).tolist() if beta else [math.nan] * len(omega)
        for side, name in enumerate(("a_chosen", "a_rejected")):
            table[name] = found.by_example(found.a * (found.side == side)[:, None]).tolist()
    return [
        {"step": step, "example": first + i, **{name: values[i] for name, values in table.items()}}
        for i in range(len(table["full"]))
    ]


def _tokens(step: int, first: int, found: _Found, weights: TokenWeights, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `tokens`, of the first TOKENS_OF examples."""
    third = controls.thirds(weights.strength)
    start, rows = found.response.int().argmax(-1), []
    for row, column in found.response.nonzero().tolist():
        example = int(found.example[row])
        if example >= TOKENS_OF:
            continue
        token, unit = int(found.ids[row, column]), int(weights.unit[row, column])
        values = {"step": step, "example": first + example, "side": int(found.side[row])}
        values |= {
            "position": column - int(start[row]),
            "token": tokenizer.decode([token]) if tokenizer else str(token),
        }
        values |= {name: float(t[row, column]) for name, t in (("logp", found.logps), ("w", found.w), ("a", found.a))}
        rows.append(values | {"a_opt": math.nan, "strength": float(weights.strength[unit]), "third": int(third[unit])})
    return rows


def _texts(step: int, first: int, found: _Found, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `texts`, of the same examples."""
    rows = []
    for row in (found.example < TOKENS_OF).nonzero().squeeze(-1).tolist():
        inside = found.response[row]
        asked = found.attention[row] & ~inside & (inside.long().cumsum(-1) == 0)
        prompt, response = (found.ids[row][each].tolist() for each in (asked, inside))
        prompt, response = (tokenizer.decode(each) if tokenizer else str(each) for each in (prompt, response))
        place = {"example": first + int(found.example[row]), "side": int(found.side[row])}
        rows.append(place | {"prompt": prompt[:TEXT], "response": response[:TEXT], "step": step})
    return rows


class _Folder:
    """A lens folder that is written while training goes on: about.json and a TABLE.jsonl for every table."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Raises ValueError for a folder of something else."""
        self.path, self.identity, self.examples = path, identity, 0
        self._written: set[str] = set()
        if (path / "about.json").is_file():
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            if about.get("run") != identity:
                raise ValueError(
                    f"report={str(path)!r}: holds the tables of another run ({about.get('title')}); give another "
                    "folder, or remove this one"
                )

    def begin(self, step: int) -> None:
        """Make the folder, and drop the rows of steps from `step` on, which come again."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._written, self.examples = set(), 0
        for file in self.path.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            file.write_text("", encoding="utf-8")
            self.append(file.stem, [row for row in rows if row["step"] < step])

    def has(self, table: str) -> bool:
        return table in self._written

    def append(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table; what is no finite number becomes null."""
        if not rows:
            return
        lines = [json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) for row in rows]
        with (self.path / f"{table}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        self._written.add(table)
        if table == "sequences":
            self.examples = max(self.examples, 1 + max(row["example"] for row in rows))

    def about(self, content: dict[str, Any]) -> None:
        """Write about.json, whole or not at all."""
        new = self.path / "about.json.new"
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.path / "about.json")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What is refused, and what is said


def _check_count(name: str, given: Any, allowed: str) -> None:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"{name}={given!r}: must be {allowed}")


def _check_trainer(trainer: Any) -> None:
    """Raises TypeError or ValueError that says what of a trainer cannot be measured."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer: given a {type(trainer).__name__}; a transformers.Trainer, or one built on it, is needed"
        )
    args, model = trainer.args, trainer.model
    sharded = {
        f"world_size={args.world_size}": args.world_size > 1,
        f"n_gpu={args.n_gpu}": args.n_gpu > 1,
        "DeepSpeed": getattr(trainer, "is_deepspeed_enabled", False),
        "FSDP": getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_fsdp_xla_enabled", False),
    }
    if found := [name for name, there in sharded.items() if there]:
        raise ValueError(
            f"trainer: LensCallback measures a model that one process holds as a whole, and this trainer has "
            f"{', '.join(found)}; train on one device, or measure the checkpoints afterwards: {OFFLINE}"
        )
    if getattr(trainer, "padding_free", False) or getattr(args, "packing", False):
        raise ValueError(
            "trainer: padding_free or packing puts several sequences into one row; only rows of one are measured"
        )
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"trainer: the adapter {name!r} ({adapter.peft_type}) adds virtual tokens; LoRA can be measured"
            )
    if not captured.moving(model):
        raise ValueError("trainer: no parameter of its model requires a gradient, so that nothing can move")
    if "input_ids" not in inspect.signature(type(captured.base_of(model)).forward).parameters:
        raise ValueError(
            f"trainer: its model {type(model).__name__} takes no input_ids; a causal language model is needed"
        )


def _identity(trainer: Any) -> dict[str, Any]:
    """What tells one run from another, in a folder."""
    policy = captured.base_of(trainer.model)
    return {
        "trainer": type(trainer).__name__,
        "output": Path(trainer.args.output_dir).name,
        "model": type(policy).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": trainer.args.seed,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores"
