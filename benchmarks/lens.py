"""What the lens costs: beside training, beside an epoch, beside gradients of single rows, and on a card.

    python benchmarks/lens.py [--sizes 0.4M,3M,70M] [--repeats N] [--threads N] [--json FILE]
    python benchmarks/lens.py --device cuda [--sizes 0.1B,0.4B,1.4B,2.8B] [--peak-tflops X] [--repeats N] [--json FILE]

All models are GPT-NeoX with random weights, all texts are random words; a training batch is 8 pairs of 32 + 96 tokens.
What is compared takes turns, round by round, so that other load on the machine hits all of it alike; a first round
warms up and is not counted. "ms" is the median over rounds, "ratio" the median (and range) over rounds of the ratio to
the first line of its table in the same round.

Without --device, for each size three tables (where there is a card, the first two are of it):

while it trains     LensCallback in a DPOTrainer of TRL (AdamW, the reference's log-probs at every step, no gradient
                    checkpointing). A training step is from `on_step_begin` to `on_step_end` without what the lens takes
                    of it; the cheap tier is what the lens does at every step, a measurement (probe of 64 pairs, targets
                    the chosen ones) what it does at some. The report at the end is not in it. Where trl, accelerate or
                    datasets are missing, this is said, and the functions of both tiers are called from a plain loop.
afterwards          `Follow` over two checkpoints, a checkpoint's share of it: its passes as about.json says, and all of
                    it, with files, hashes, loading, the reference and tables. Beside an epoch of plain training
                    (forward, backward and AdamW, the reference's log-probs known) on the same pairs.
gradients of rows   <d, gradient> for each of 16 rows: from our pass, which gives all tokens, from per-sample gradients
                    by torch.func, and from libraries of influence, where they are installed and give the same numbers.

With --device: measurement in bfloat16 (`lens.precision`) at the shapes of Pythia, 16 rows of 128 + 384 tokens, beside
forward+backward as in training. "share" is of the card's dense bfloat16 peak, by --peak-tflops or PEAKS, and counts
matrix products as `products` says; "MB" is the peak of allocated memory, with model and direction. --device cpu takes
the same path where there is no card, at a tiny size.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from alignment import (
    BETA,
    PAIRS,
    PROMPT,
    RESPONSE,
    Case,
    Size,
    environment,
    forward_backward,
    make_case,
    random_batch,
    vmapped,
)
from prefdyn.findings import asked
from prefdyn.findings.afterwards import Follow
from prefdyn.lab import folders, policy
from prefdyn.lab.recipes import device
from prefdyn.lens import alignment, captured, likelihood, precision
from prefdyn.lens.batch import Batch, concatenate
from prefdyn.lens.callback import SHARE, LensCallback
from prefdyn.methods import registry
from prefdyn.methods.dpo import dpo_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDED = ("trl", "accelerate", "datasets")  # by the trainer
RATE, NORM = 1e-5, 1.0  # of AdamW, of the gradient
CHECKPOINTS = 2  # that `Follow` measures: before and after an epoch
SAME = 1e-3  # differences up to here, relative to the largest number, are float32 noise

Seconds = dict[str, float]  # by what they were spent on


@dataclass(frozen=True, kw_only=True)
class Setting(Size):
    """A size, its batches of `pairs`, the pairs of a probe, and tokens of a prompt and of a response."""

    pairs: int = PAIRS
    probe: int = 64
    prompt: int = PROMPT
    response: int = RESPONSE


SMALL = {"pairs": 2, "probe": 6, "prompt": 4, "response": 6}
SIZES = {
    "tiny": Setting(layers=2, width=16, heads=2, vocab=24, repeats=1, **SMALL),  # for tests
    "0.4M": Setting(layers=2, width=128, heads=4, vocab=128, repeats=8),
    "3M": Setting(layers=4, width=256, heads=8, vocab=256, repeats=4),
    "70M": Setting(layers=6, width=512, heads=8, vocab=50_304, repeats=2),  # the shape of Pythia-70m
}
LONG = {"vocab": 50_304, "prompt": 128, "response": 384, "repeats": 10}
CARD_SIZES = {
    "tiny": SIZES["tiny"],
    "0.1B": Setting(layers=12, width=768, heads=12, **LONG),  # the shapes of Pythia-160m,
    "0.4B": Setting(layers=24, width=1024, heads=16, **LONG),  # -410m,
    "1.4B": Setting(layers=24, width=2048, heads=16, **LONG),  # -1.4b
    "2.8B": Setting(layers=32, width=2560, heads=32, **LONG),  # and -2.8b
}
# Dense bfloat16 of tensor cores, TFLOP/s, by the name that torch gives. From NVIDIA's data sheets of A100, H100, H200,
# L4 and L40S; where these state it with sparsity alone, half of that.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
}


# Time


def now() -> float:
    """Seconds of a clock, once a card has done what was asked of it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def clocked(name: str, call: Callable[[], object]) -> Seconds:
    """What a call takes."""
    start = now()
    call()
    return {name: now() - start}


def turns(calls: list[Callable[[], Seconds]], repeats: int, tick: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds by name, round by round, each round with all calls; without the round that warms up."""
    elapsed: dict[str, list[float]] = {}
    for round_ in range(repeats + 1):
        for call in calls:
            for name, spent in call().items():
                elapsed.setdefault(name, []).extend([spent] if round_ else [])
            tick()
    return elapsed


def ratios(elapsed: dict[str, list[float]]) -> dict[str, dict]:
    """Rows of a table: milliseconds, and ratios to the first name in the same round."""
    base = next(iter(elapsed.values()))
    rows = {}
    for name, spent in elapsed.items():
        each = [its / first for its, first in zip(spent, base, strict=True)]
        rows[name] = {"ms": 1000 * median(spent), "ratio": median(each), "ratios": each}
    return rows


# What all parts share


def make_model(setting: Setting, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Random weights, and a tokenizer of as many words."""
    tokenizer = policy.word_tokenizer(f"w{i}" for i in range(setting.vocab - 4))  # 4 special tokens
    shape = {"layers": setting.layers, "width": setting.width, "heads": setting.heads}
    context = setting.prompt + setting.response + 1  # a chat template marks where the reply begins
    return policy.scratch_model(tokenizer, **shape, context=context, seed=seed), tokenizer


def make_pairs(setting: Setting, count: int, seed: int = 1) -> list[dict[str, str]]:
    """Pairs of random words, all of one length; the end of a response is its last token."""
    rng = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(setting.vocab - 4, (length,), generator=rng).tolist())

    lengths = {"prompt": setting.prompt, "chosen": setting.response - 1, "rejected": setting.response - 1}
    return [{name: words(length) for name, length in lengths.items()} for _ in range(count)]


def random_rows(setting: Setting, rows: int, seed: int) -> Batch:
    """Random tokens without padding."""
    shape = (rows, setting.prompt + setting.response)
    ids = torch.randint(4, setting.vocab, shape, generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones(shape, dtype=torch.bool), (torch.arange(shape[1]) >= setting.prompt).expand(shape))


def dpo_loss(model: PreTrainedModel, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
    """DPO's loss as most trainers write it, by the log-softmax of all logits (Rafailov et al. 2023, eq. 7).

    Args: batch, 2B rows, chosen ones first. reference, log-probs of whole responses [2B], nats.
    """
    logits = model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    chosen, rejected = ((logps * batch.response[:, 1:]).sum(-1) - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def in_batches(chosen: Batch, rejected: Batch, pairs: int) -> list[Batch]:
    """Batches of `pairs` pairs, chosen rows first."""
    return [concatenate(list(sides)) for sides in zip(chosen.slices(pairs), rejected.slices(pairs), strict=True)]


def adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)


# While it trains


class Timed(LensCallback):
    """The callback, which also keeps what each step took, and what it took of it itself (`rounds`)."""

    def __init__(self, *args, tick: Callable[[], object], **kwargs):
        super().__init__(*args, **kwargs)
        self.rounds: list[Seconds] = []
        self._tick, self._start, self._own = tick, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = now()
        super().on_step_begin(args, state, control, **kwargs)
        self._own = now() - self._start

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        start = now()
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self._own += now() - start

    def on_step_end(self, args, state, control, **kwargs):
        trained = now()
        super().on_step_end(args, state, control, **kwargs)
        step = trained - self._start - self._own
        self.rounds.append({"training step": step, "cheap tier": self._own, "measurement": now() - trained})
        self._tick()


def missing() -> list[str]:
    """What of NEEDED is not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Inside, these loggers say nothing below an error."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def with_trainer(setting: Setting, repeats: int, tick: Callable[[], object]) -> dict[str, list[float]]:
    """Rounds of a DPOTrainer with a measurement after every step. Raises RuntimeError if the lens gave up."""
    import datasets  # all three are extras
    import trl
    from transformers.trainer_callback import PrinterCallback

    datasets.disable_progress_bars()
    (model, tokenizer), (reference, _) = (make_model(setting, seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder, quiet("prefdyn.lens"):
        args = trl.DPOConfig(
            output_dir=str(Path(folder) / "run"),
            per_device_train_batch_size=setting.pairs,
            max_steps=repeats + 1,
            learning_rate=RATE,
            max_grad_norm=NORM,
            beta=BETA,
            use_cpu=device().type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [
            {
                "prompt": row["prompt"],
                "chosen": f" {row['chosen']}",
                "rejected": f" {row['rejected']}",
            }  # texts are joined
            for row in make_pairs(setting, setting.probe)
        ]
        data = datasets.Dataset.from_list(rows)
        given = {"model": model, "ref_model": reference, "args": args, "train_dataset": data}
        trainer = trl.DPOTrainer(**given, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        lens = Timed(trainer, probe=setting.probe, every=1, report=Path(folder) / "lens", tick=tick)
        trainer.add_callback(lens)
        trainer.train()
        if lens.quiet:
            raise RuntimeError((Path(folder) / "lens" / "about.json").read_text(encoding="utf-8"))
    return {name: [round_[name] for round_ in lens.rounds[1:]] for name in lens.rounds[0]}


def measurement(
    model: PreTrainedModel, reference: PreTrainedModel, batches: list[Batch], targets: Batch
) -> tuple[alignment.Direction, float, float]:
    """What a measurement of the callback computes: d, and G = <d, -grad L> by tokens and by a backward pass.

    batches: of the probe, all of one size, chosen rows first. L is the mean of their losses.
    """
    named = captured.moving(model)
    d, _ = captured.direction_to(model, targets, len(batches[0]) // 2)
    by_tokens = by_gradient = 0.0
    for batch in batches:
        known = likelihood.sequence_logps(reference, batch)
        with torch.enable_grad(), captured.listening(model) as calls:
            loss = dpo_loss(model, batch, known)
        grads, readings = captured.read(loss / len(batches), calls, list(named.values()))
        by_gradient -= sum((d[name] * grad).sum().item() for name, grad in zip(named, grads, strict=True))
        for reading in readings:
            _, a = captured.scores(model, reading.call, d, "forward", 1.0, model.config.vocab_size)
            by_tokens += (reading.w * a).sum().item()
    return d, by_tokens, by_gradient


class PlainLoop:
    """DPO steps in plain torch, with the functions of both tiers at every step."""

    def __init__(self, setting: Setting):
        self.model, self.reference = (make_model(setting, seed)[0].to(device()) for seed in (0, 1))
        sides = [random_rows(setting, setting.probe, seed).to(device()) for seed in (2, 3)]
        self.batches, self.targets = in_batches(*sides, setting.pairs), sides[0]
        self.optimizer, self.steps = adamw(self.model), 0
        self.direction, _ = captured.direction_to(self.model, self.targets, setting.pairs)

    def cheap(self) -> tuple[float, float]:
        """G of the gradient that the optimiser is about to get, and its norm."""
        grads = {name: p.grad for name, p in captured.moving(self.model).items()}
        return -alignment.inner(self.direction, grads).item(), alignment.norm(grads).item()

    def round(self) -> Seconds:
        """One step, and what both tiers take."""
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        start = now()
        self.optimizer.zero_grad(set_to_none=True)
        dpo_loss(self.model, batch, likelihood.sequence_logps(self.reference, batch)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
        cheap = clocked("cheap tier", self.cheap)
        self.optimizer.step()
        step = now() - start - cheap["cheap tier"]
        given = (self.model, self.reference, self.batches, self.targets)
        measured = clocked("measurement", lambda: measurement(*given))
        return {"training step": step} | cheap | measured


def while_it_trains(setting: Setting, repeats: int, tick: Callable[[], object]) -> dict:
    """What both tiers of the callback take, in units of a training step."""
    lacking = missing()
    if lacking:
        how = f"no {', '.join(lacking)} here: a plain loop calls the functions of both tiers"
        elapsed = turns([PlainLoop(setting).round], repeats, tick)
    else:
        how, elapsed = "LensCallback in TRL's DPOTrainer", with_trainer(setting, repeats, tick)
    return {"how": how, "rows": ratios(elapsed)}


def steps_between(rows: dict[str, dict]) -> int | None:
    """Steps between measurements with which the lens takes SHARE of all time; None where its cheap tier takes more."""
    left = SHARE / (1 - SHARE) - rows["cheap tier"]["ratio"]
    return math.ceil(rows["measurement"]["ratio"] / left) if left > 0 else None


# Afterwards


class Afterwards:
    """A run of two checkpoints in `folder`, and what is compared on its pairs."""

    def __init__(self, setting: Setting, folder: Path):
        self.folder, self.setting = folder, setting
        self.model, tokenizer = make_model(setting)
        self.model.to(device())
        # the first half of them is measured on, chosen responses of the others are the targets
        lines = [json.dumps(row) for row in make_pairs(setting, 2 * setting.probe)]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.question = asked.Question(
            str(folder / "pairs.jsonl"), settings=(("beta", BETA),), targets="chosen", probe=setting.probe
        )
        probe = asked.draw(self.question, registry.find("dpo"), tokenizer, None)
        self.batches = in_batches(probe.batches["chosen"], probe.batches["rejected"], setting.pairs)
        self.known = [likelihood.sequence_logps(self.model, batch) for batch in self.batches]
        self.optimizer, self.made = adamw(self.model), []
        for number in range(CHECKPOINTS):
            if number:
                self.epoch()
            self.made.append(folder / f"checkpoint-{number * len(self.batches)}")
            policy.save(self.model, tokenizer, self.made[-1])

    def epoch(self) -> None:
        """Forward, backward and a step on every batch of the probe."""
        for batch, known in zip(self.batches, self.known, strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            dpo_loss(self.model, batch, known).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
            self.optimizer.step()

    def follow(self) -> Seconds:
        """What a checkpoint takes: its passes, and its part of all."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            start = now()
            follow = Follow(folders.read(self.made), self.question, Path(out) / "lens", tell=lambda line: None)
            about = json.loads((follow.run() / "about.json").read_text(encoding="utf-8"))
            whole = now() - start
        seconds = {"a checkpoint, its passes": about["cost"]["seconds"], "a checkpoint, all of it": whole}
        return {name: spent / CHECKPOINTS for name, spent in seconds.items()}


def afterwards(setting: Setting, repeats: int, tick: Callable[[], object]) -> dict:
    """What the offline lens takes a checkpoint, in units of an epoch on the same pairs."""
    with tempfile.TemporaryDirectory() as folder:
        run = Afterwards(setting, Path(folder))
        calls = [functools.partial(clocked, "an epoch on the probe", run.epoch), run.follow]
        return {"rows": ratios(turns(calls, repeats, tick))}


# Gradients of rows


class Logps(torch.nn.Module):
    """Log-probs [N, T] of the tokens of unpadded rows, with no mask that a library's `vmap` could not look into."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.pad(logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1), (1, 0))


def ours(case: Case) -> torch.Tensor:
    """<d, gradient of a row> for all rows [N], as sums over tokens of our pass."""
    _, scores = alignment.token_scores(case.model, case.batch, case.direction)
    return (case.weights.w * scores).sum(-1)


def by_captum(case: Case, targets: Batch) -> torch.Tensor:
    """The same by captum's TracInCP: inner products of gradients of all rows with those of all targets."""
    from captum.influence import TracInCP

    def loss(logps: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return -(w * logps).sum(-1)

    data = torch.utils.data.TensorDataset(case.batch.ids, case.weights.w)
    # one checkpoint, which is loaded already, and counts once
    loading = {"checkpoints": [0], "checkpoints_load_func": lambda model, path: 1.0}
    tracin = TracInCP(Logps(case.model), data, **loading, loss_fn=loss, batch_size=len(data))
    return tracin.influence((targets.ids, targets.response / len(targets))).sum(0)


def by_dattri(case: Case, targets: Batch) -> torch.Tensor:
    """The same by dattri's TracInAttributor without projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    wrapped = Logps(case.model)

    def loss(params: dict[str, torch.Tensor], row: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, w = row
        with sdpa_kernel(SDPBackend.MATH):
            return -(w * torch.func.functional_call(wrapped, params, (ids[None],))[0]).sum()

    def loader(ids: torch.Tensor, w: torch.Tensor) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, w), batch_size=len(ids))

    task = AttributionTask(loss_func=loss, model=wrapped, checkpoints=[wrapped.state_dict()])
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    rows = loader(case.batch.ids, case.weights.w), loader(targets.ids, targets.response / len(targets))
    return attributor.attribute(*rows).sum(1)


# Written after their documentation: what a library says is timed only where it is the same numbers.
LIBRARIES: dict[str, Callable[[Case, Batch], torch.Tensor]] = {"captum": by_captum, "dattri": by_dattri}
OTHERS = {
    "trak": "projects gradients at random, to other numbers",
    "kronfluence": "reads gradients of linear layers alone, to other numbers",
}


def comparable(case: Case, targets: Batch) -> tuple[dict[str, Callable[[], torch.Tensor]], list[str]]:
    """Libraries that give the numbers of our pass, and a sentence on every other one."""
    found, told, expected = {}, [], ours(case)
    for name, call in LIBRARIES.items():
        if importlib.util.find_spec(name) is None:
            told.append(f"{name}: not installed")
            continue
        try:
            off = ((call(case, targets) - expected).abs().max() / expected.abs().max()).item()
        except Exception as error:  # whatever another version of it raises: the others can still be compared
            told.append(f"{name}: not timed, {type(error).__name__}: {error}")
            continue
        if off <= SAME:
            found[name] = functools.partial(call, case, targets)
        else:
            told.append(f"{name}: not timed, its numbers are off by {off:.1e} of the largest")
    for name, why in OTHERS.items():
        told.append(f"{name}: not " + ("timed, it " + why if importlib.util.find_spec(name) else "installed"))
    return found, told


def gradients_of_rows(setting: Setting, repeats: int, tick: Callable[[], object]) -> dict:
    """What <d, gradient of a row> for all rows takes, in units of one forward and backward pass. On the CPU."""
    case, targets = make_case(setting), random_batch(setting.vocab, seed=3)  # whose gradient the case's d is
    libraries, told = comparable(case, targets)
    calls = {"forward+backward": lambda: forward_backward(case), "our pass": lambda: ours(case)}
    calls |= {"per sample, torch.func.vmap": lambda: vmapped(case), **libraries}
    elapsed = turns([functools.partial(clocked, *each) for each in calls.items()], repeats, tick)
    off = ((ours(case) - vmapped(case)).abs().max() / vmapped(case).abs().max()).item()
    return {"rows": ratios(elapsed), "off": off, "libraries": told}


# On a card


PASSES = {"forward+backward": 3, "forward": 1, "direction d": 3, "our pass": 3}  # in forward ones


@contextmanager
def made_in(dtype: torch.dtype, where: torch.device) -> Iterator[None]:
    """Inside, tensors are made in this precision and in this place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with where:
            yield
    finally:
        torch.set_default_dtype(before)


def products(setting: Setting) -> float:
    """Floating-point operations of the matrix products in a forward pass over the batch.

    2 for each weight and token, with the output layer at responses alone; attention over all pairs of positions, as
    unfused kernels compute it. A backward pass takes twice as many, and so do tangents: `PASSES`.
    """
    rows, length = 2 * setting.pairs, setting.prompt + setting.response
    layer = 2 * 12 * setting.width**2 + 4 * length * setting.width
    return rows * (length * setting.layers * layer + 2 * setting.response * setting.width * setting.vocab)


def card_case(setting: Setting, where: torch.device) -> tuple[Case, Batch]:
    """A bfloat16 model and its batch, with DPO's weights of random omega, and the targets whose gradient d is."""
    with made_in(torch.bfloat16, where):
        model, _ = make_model(setting)
    batch, targets = (random_rows(setting, 2 * setting.pairs, seed).to(where) for seed in (1, 3))
    omega = 0.05 + 0.9 * torch.rand(setting.pairs, generator=torch.Generator().manual_seed(2))
    weights = dpo_weights(batch.response, omega.to(where), BETA)
    return Case(model, batch, precision.target_direction(model, targets), weights), targets


def card_calls(case: Case, targets: Batch) -> dict[str, Callable[[], object]]:
    """A training step's forward and backward pass, all rows at once, and what the lens does in low precision."""
    model, batch, rows = case.model, case.batch, len(case.batch)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return likelihood.token_logps(model, batch)

    return {
        "forward+backward": lambda: alignment.gradient(model, [(batch, case.weights.w)]),
        "forward": forward,
        "direction d": lambda: precision.target_direction(model, targets),
        "our pass": lambda: precision.token_scores(model, batch, case.direction, size=rows),
    }


def measured_on_card(
    setting: Setting, repeats: int, where: torch.device, peak: float | None, tick: Callable[[], object]
) -> dict:
    """Times, tokens a second, memory and share of the peak (TFLOP/s, None where it is not known), after a check."""
    case, targets = card_case(setting, where)
    calls, most = card_calls(case, targets), {}
    ascent = precision.gradient(case.model, [(case.batch, case.weights.w)])
    scored = calls["our pass"]()
    excess = precision.check("on the card", "forward", case.weights.w, scored, ascent, case.direction, case.model)
    del ascent, scored

    def one(name: str) -> Seconds:
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        spent = clocked(name, calls[name])
        most[name] = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None
        return spent

    rows = ratios(turns([functools.partial(one, name) for name in calls], repeats, tick))
    for name, row in rows.items():
        rate = 1000 / row["ms"]
        row["tokens_a_second"] = case.batch.ids.numel() * rate
        row["bytes"] = most[name]
        row["share"] = None if peak is None else PASSES[name] * products(setting) * rate / (peak * 1e12)
    return {"parameters": sum(p.numel() for p in case.model.parameters()), "rows": rows, "excess": excess}


def on_card(
    setting: Setting, repeats: int, where: torch.device, peak: float | None, tick: Callable[[], object]
) -> dict:
    """`measured_on_card`, or why a size is left out."""
    try:
        return measured_on_card(setting, repeats, where, peak, tick)
    except torch.OutOfMemoryError as error:
        return {"left_out": f"does not fit: {str(error).splitlines()[0]}"}


# What is said


def line(name: str, row: dict, more: str = "") -> str:
    """A line of a table: milliseconds, a ratio and its range."""
    spread = f"({min(row['ratios']):.3f} to {max(row['ratios']):.3f})"
    return f"  {name:30}{row['ms']:12,.1f}{row['ratio']:10.3f}{spread:>24}{more}".rstrip()


def heading(title: str, more: str = "") -> str:
    return f"  {title:30}{'ms':>12}{'ratio':>10}{'(range)':>24}{more}"


def report(name: str, setting: Setting, result: dict) -> str:
    """All that is said about one size, by part."""
    live, after, rows = (result[part] for part in ("while it trains", "afterwards", "gradients of rows"))
    apart = steps_between(live["rows"])
    advice = f"every {apart} steps or more" if apart else f"never: the cheap tier takes more than {SHARE:.0%}"
    return "\n".join(
        [
            f"{name}: {result['parameters']:,} parameters ({setting.layers} layers, width {setting.width}, vocabulary "
            f"{setting.vocab:,}); {setting.pairs} pairs a batch, {setting.probe} a probe; rounds: {result['repeats']}",
            heading("while it trains"),
            *(line(*row) for row in live["rows"].items()),
            f"  {live['how']}; with measurements {advice} the lens takes at most {SHARE:.0%} of the time",
            heading("afterwards"),
            *(line(*row) for row in after["rows"].items()),
            heading("gradients of rows"),
            *(line(*row) for row in rows["rows"].items()),
            f"  check: our pass and torch.func differ by {rows['off']:.1e} of the largest; "
            + "; ".join(rows["libraries"]),
        ]
    )


def report_card(name: str, setting: Setting, result: dict) -> str:
    """All that is said about one size on a card."""
    if "left_out" in result:
        return f"{name}: {result['left_out']}"
    lines = []
    for method, row in result["rows"].items():
        memory, share = (
            "n/a" if value is None else form.format(value)
            for value, form in ((row["bytes"] and row["bytes"] / 1e6, "{:,.0f}"), (row["share"], "{:.1%}"))
        )
        lines.append(line(method, row, f"{row['tokens_a_second']:12,.0f}{memory:>10}{share:>8}"))
    head = (
        f"{name}: {result['parameters']:,} parameters ({setting.layers} layers, width {setting.width}); "
        f"{2 * setting.pairs} x {setting.prompt + setting.response} tokens in bfloat16; rounds: {result['repeats']}"
    )
    check = f"  check: scores and a backward pass differ by {result['excess']:.2g} of what rounding explains"
    return "\n".join([head, heading("", f"{'tokens/s':>12}{'MB':>10}{'share':>8}"), *lines, check])


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `sizes` becomes a dict of settings, `peak` is in TFLOP/s or None. Sets torch's threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", help=f"of {','.join(SIZES)}, with --device of {','.join(CARD_SIZES)}")
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: fewer for larger sizes)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure the lens in bfloat16 there, and no more")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the card (default: of those known)")
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    args = parser.parse_args(argv)
    known = CARD_SIZES if args.device else SIZES
    every = ["tiny"] if args.device == "cpu" else [name for name in known if name != "tiny"]
    names = args.sizes.split(",") if args.sizes else every
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--sizes {unknown[0]!r}: must be of {','.join(known)}")
    if args.threads < 1 or (args.repeats is not None and args.repeats < 1):
        parser.error("--threads and --repeats must be at least 1")
    if args.peak_tflops is not None and not (args.device and args.peak_tflops > 0):
        parser.error(f"--peak-tflops {args.peak_tflops:g}: must be above 0, and given with --device")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA card on this machine, and the numbers are of a card")
    card = torch.cuda.get_device_name() if args.device == "cuda" else None
    args.peak, args.card = args.peak_tflops or PEAKS.get(card), card
    args.sizes = {name: known[name] for name in names}
    torch.set_num_threads(args.threads)
    return args


def surroundings(card: str | None) -> dict[str, str | int | float]:
    """Where the times are taken: packages, machine, threads, and what else runs on it."""
    found = environment()
    for name in (*NEEDED, *LIBRARIES):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    found |= {"card": card} if card else {}
    return found | {"load average": round(os.getloadavg()[0], 2)}


def measure(setting: Setting, repeats: int, tick: Callable[[], object]) -> dict:
    """All parts of one size without --device."""
    model, _ = make_model(setting)
    parts = {"while it trains": while_it_trains, "afterwards": afterwards, "gradients of rows": gradients_of_rows}
    result = {"parameters": sum(p.numel() for p in model.parameters())}
    del model
    return result | {name: part(setting, repeats, tick) for name, part in parts.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure the sizes asked for, and print one block each."""
    args = arguments(argv)
    where = surroundings(args.card)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    if args.device and args.peak is None:
        print("the peak of this device is not known; --peak-tflops gives shares of it")
    results = {}
    with tqdm(disable=None, leave=False) as bar:
        for name, setting in args.sizes.items():
            bar.set_description(name)
            repeats = args.repeats or setting.repeats
            if args.device:
                result = on_card(setting, repeats, torch.device(args.device), args.peak, bar.update)
            else:
                result = measure(setting, repeats, bar.update)
            results[name] = result | {"repeats": repeats}
            told = (report_card if args.device else report)(name, setting, results[name])
            with bar.external_write_mode():
                print(f"\n{told}", flush=True)
    if args.json:
        where |= {"load average at the end": round(os.getloadavg()[0], 2)}
        args.json.write_text(json.dumps({"where": where, "peak_tflops": args.peak, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
