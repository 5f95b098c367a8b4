"""What a run is: supervised fine-tuning, its log-probs as a reference, and methods of pairs from it, as specs."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, SerializationInfo, field_serializer
from safetensors.torch import load_file, load_model, save_file, save_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens import likelihood
from ..lens.batch import Batch
from ..lens.controls import FULL, Control
from ..methods import own, registry
from ..methods.base import Method, PairObjective
from ..methods.sft import SFT
from . import chat, checkpoints, data, layouts, policy
from .account import Limits
from .data import SIDES, mismatched
from .evaluate import evaluate, win_rate
from .train import (
    Controlled,
    Objective,
    Optimisation,
    adamw_scale,
    checkpoint_steps,
    fit,
    kept_by_clipping,
    second_moment,
)
from .worlds import WORLDS

if TYPE_CHECKING:  # what a result depends on does not include the store that keeps it
    from .runs import Run, RunStore

PROBES = ("train", "check")
CHECKED = 128  # examples of what was not trained on that an evaluation measures the objective on, at most


class Spec(BaseModel):
    """Base of all specs: frozen, strict, nothing extra."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(Spec):
    """Where a model or its tokenizer comes from: "scratch", or a checkpoint, a folder or a name on the hub.

    content identifies a checkpoint: the hash of its files, or the commit that a name on the hub stood for.
    """

    model: str
    content: str | None
    hub: bool = False

    @field_serializer("model")
    def _where(self, model: str, info: SerializationInfo) -> str | None:
        return None if info.context == "identity" and self.content and not self.hub else model

    @property
    def revision(self) -> str | None:
        """The commit on the hub, None for what is not there."""
        return self.content if self.hub else None


class DataSpec(Spec):
    """Which data, and how it becomes tokens. A file is named by `path` but identified by `content`, its hash."""

    path: str | None  # None: the world
    content: str | None
    difficulty: str  # of the world, one of worlds.WORLDS
    seed: int  # of the world's demonstrations and pairs
    pairs: int
    check: int
    demonstrations: int
    label_noise: float
    skills: tuple[tuple[str, float, float, float], ...]  # of the world: demonstrators by name, share, habit and slip
    validation: int
    held_out: int
    max_prompt: int  # tokens
    max_response: int  # tokens
    tokenizer: ModelSpec
    vocab_size: int  # of the byte-pair tokenizer trained on a file
    today: str  # what a chat template that asks for the date is told

    carries: ClassVar[frozenset[str]] = frozenset({"world.SKILLS"})  # what a reader may set, since it is in the key

    def without_labels(self) -> "DataSpec":
        """The same for runs that read no label (SFT, PPO with the true reward), so that they are shared."""
        return self.model_copy(update={"label_noise": 0.0})

    def limits(self) -> Limits:
        return Limits(self.max_prompt, self.max_response)

    @field_serializer("path")
    def _where(self, path: str | None, info: SerializationInfo) -> str | None:
        return None if info.context == "identity" else path


class PolicySpec(ModelSpec):
    """Which model: "scratch" with its architecture (one of policy.ARCHITECTURES) and sizes, or a checkpoint."""

    architecture: str
    layers: int
    width: int
    heads: int


@functools.lru_cache(maxsize=8)
def reading(path: str, content: str) -> layouts.Reading:
    """What a preference file holds. Raises DataError if it is no longer what `content` says."""
    return layouts.read(path, content)


@functools.cache
def _words_of(difficulty: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a world, one for all seeds: what has been encoded for one of them is known for the others."""
    return policy.word_tokenizer(WORLDS[difficulty].vocabulary())


@functools.lru_cache(maxsize=32)
def tokenizer_of(spec: DataSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of `spec`: the world's words, one trained on the pairs of the file, or a checkpoint's."""
    if spec.tokenizer.model != "scratch":
        if not spec.tokenizer.hub:
            folder = Path(spec.tokenizer.model)
            checkpoints.unchanged(folder, spec.tokenizer.content, checkpoints.tokenizer_identity)
        loaded = policy.load_tokenizer(spec.tokenizer.model, spec.tokenizer.revision)
        loaded.chat_template = chat.with_date(loaded.chat_template, spec.today)
        return loaded
    if spec.path is None:
        return _words_of(spec.difficulty)
    rows = reading(spec.path, spec.content).pairs
    sizes = {"pairs": spec.pairs, "check": spec.check, "validation": spec.validation, "held_out": spec.held_out}
    dealt, _ = data.split_by_prompt(rows, **sizes)
    texts = [
        text
        for row in dealt["train"][: spec.pairs]
        for text in (*(content for _, content in chat.turns(row["prompt"])), row["chosen"], row["rejected"])
    ]
    return policy.bpe_tokenizer(texts, spec.vocab_size)


@functools.lru_cache(maxsize=32)
def dataset(spec: DataSpec) -> data.Dataset:
    """The dataset of `spec` under its limits, with its account.

    The last ones are kept, more than an edition has (seeds, with labels and without, rates of wrong labels): planning
    asks for each of them again and again.
    """
    if spec.path is not None:
        return data.from_file(
            reading(spec.path, spec.content),
            tokenizer_of(spec),
            spec.limits(),
            pairs=spec.pairs,
            check=spec.check,
            validation=spec.validation,
            held_out=spec.held_out,
        )
    known = data.from_world(
        WORLDS[spec.difficulty],
        seed=spec.seed,
        pairs=spec.pairs,
        check=spec.check,
        demonstrations=spec.demonstrations,
        label_noise=spec.label_noise,
        validation=spec.validation,
        held_out=spec.held_out,
        skills={name: {"share": share, "habit": habit, "slip": slip} for name, share, habit, slip in spec.skills},
    )
    return data.under_limits(known, tokenizer_of(spec), spec.limits())


def untrained(
    policy_spec: PolicySpec, data_spec: DataSpec, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy before any training here, and its tokenizer."""
    words = tokenizer_of(data_spec)
    if policy_spec.model != "scratch":
        if not policy_spec.hub:
            checkpoints.unchanged(Path(policy_spec.model), policy_spec.content)
        return policy.load(policy_spec.model, policy_spec.revision)[0], words
    model = policy.scratch_model(
        words,
        architecture=policy_spec.architecture,
        layers=policy_spec.layers,
        width=policy_spec.width,
        heads=policy_spec.heads,
        context=data_spec.max_prompt + data_spec.max_response,
        seed=seed,
    )
    return model, words


def device() -> torch.device:
    """Where models are computed: an accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, rows: list[dict], field: str) -> Batch:
    """Prompts and one field ("response", "chosen" or "rejected") of `rows` as a Batch on the device."""
    prompts, responses = [row["prompt"] for row in rows], [row[field] for row in rows]
    limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
    return data.encode(tokenizer, prompts, responses, **limits).to(device())


def load_checkpoint(run: "Run", step: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy of a training run after `step` updates, and its tokenizer."""
    model, tokenizer = policy.load(str(run.folder / "policy"))
    load_model(model, run.folder / f"checkpoint-{step}.safetensors")
    return model.to(device()), tokenizer


def final_policy(run: "Run") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained policy of a training run, and its tokenizer."""
    model, tokenizer = policy.load(str(run.folder / "policy"))
    return model.to(device()), tokenizer


Prober = Callable[[int, PreTrainedModel], tuple[Objective, torch.Tensor]]  # (step, policy) -> objective, examples


class Training(Spec):
    """What training runs share: when checkpoints are kept, what is evaluated there, and the files that are left."""

    optimisation: Optimisation
    checkpoints: int

    def trained_on(self, objective: Objective, step: int) -> Objective:
        """An objective as the run steps on it after `step` updates."""
        control = getattr(self, "control", FULL)
        return objective if control == FULL else Controlled(objective, control, step)

    def steps(self) -> list[int]:
        """The steps at which the run keeps a checkpoint."""
        return checkpoint_steps(self.optimisation.steps, self.checkpoints)

    def step_scale(self, run: "Run", step: int, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What clipping and the optimiser would multiply `gradient` with after `step` steps, by parameter name."""
        if self.optimisation.optimizer == "sgd":
            kept = kept_by_clipping(gradient, self.optimisation.clip)
            return {name: torch.full_like(g, kept) for name, g in gradient.items()}
        path = run.folder / f"moment-{step}.safetensors"
        moment = {name: t.to(device()) for name, t in load_file(path).items()} if path.exists() else {}
        return adamw_scale(gradient, moment, self.optimisation.clip)

    def keep_checkpoint(
        self,
        folder: Path,
        step: int,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        check: Objective,
        spec: DataSpec,
    ) -> None:
        """Evaluate on held-out prompts and on the objective `check`; write checkpoint-, moment- and evaluation-STEP."""
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        seed = self.optimisation.seed
        metrics, replies = evaluate(model, reference, tokenizer, dataset(spec), seed=seed, **limits)
        index = torch.arange(min(check.size, CHECKED), device=model.device)
        batch = check.batch(index)
        with torch.no_grad():
            logps = torch.cat([likelihood.token_logps(model, part) for part in batch.slices(256)])
        checked = {f"check_{k}": v for k, v in check.metrics(logps, batch, index).items()}
        save_model(model, str(folder / f"checkpoint-{step}.safetensors"))
        if moment := second_moment(model, optimizer):
            save_file(moment, folder / f"moment-{step}.safetensors")
        kept = {"metrics": metrics | checked, "replies": replies}
        (folder / f"evaluation-{step}.json").write_text(json.dumps(kept), encoding="utf-8")

    def finish(
        self,
        folder: Path,
        log: list[dict],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        before: "Run | None" = None,
    ) -> None:
        """Write steps, checkpoints and replies (parquet) and policy/, and clear what only continuing needed.

        before: the SFT run that training started from, for the win rate against its final greedy replies.
        """
        pd.DataFrame(log).to_parquet(folder / "steps.parquet")
        kept = {step: json.loads((folder / f"evaluation-{step}.json").read_text()) for step in self.steps()}
        replies = [{"step": step, "index": i, **row} for step, k in kept.items() for i, row in enumerate(k["replies"])]
        table = pd.DataFrame([{"step": step, **k["metrics"]} for step, k in kept.items()])
        replies = pd.DataFrame(replies)
        if before is not None:
            baseline = before.frame("replies").query("step == step.max()")["reward"].to_numpy()
            wins = {step: win_rate(rows["reward"], baseline) for step, rows in replies.groupby("step")}
            table["win_rate"] = float("nan") if np.isnan(baseline).all() else table["step"].map(wins)
        table.to_parquet(folder / "checkpoints.parquet")
        replies.to_parquet(folder / "replies.parquet")
        policy.save(model, tokenizer, folder / "policy")
        # state.json first: without it nothing else is taken for a state to continue from
        for done in [folder / "state.json", *folder.glob("state-*"), *folder.glob("evaluation-*.json")]:
            done.unlink()


class _Fitted(Training):
    """Training on examples that are there beforehand."""

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> Prober:
        """What G is measured on at a step: here the same examples at every step."""
        objective = self.probe(store, tokenizer, probe)
        index = torch.arange(min(size, objective.size), device=device())
        return lambda step, model: (objective, index)

    def _fit(
        self,
        folder: Path,
        tick,
        model: PreTrainedModel,
        objective: Objective,
        keep: Callable[[int, torch.optim.Optimizer], None],
        control: Control = FULL,
    ) -> list[dict]:
        """Train and keep checkpoints; returns the log."""
        rows_a_step = len(objective.batch(torch.arange(2, device=model.device))) // 2 * self.optimisation.batch_size
        return fit(
            model,
            objective,
            self.optimisation,
            control=control,
            at=self.steps(),
            on_checkpoint=keep,
            state=folder,
            tick=lambda: tick(rows_a_step),
        )


class SFTRun(_Fitted):
    """Supervised fine-tuning on demonstrations, from random weights or from a checkpoint."""

    takes: ClassVar[str] = "demonstrations"
    kind: Literal["sft"] = "sft"
    data: DataSpec
    policy: PolicySpec
    seed: int

    def parents(self) -> list[Spec]:
        return []

    def work(self) -> float:
        return self.optimisation.steps * self.optimisation.batch_size

    def probe(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str) -> SFT:
        """The objective on the data it trains on ("train") or on demonstrations like them ("check")."""
        known = dataset(self.data)
        rows = known.demonstrations if probe == "train" else known.check_demonstrations
        return SFT(encode(self.data, tokenizer, rows, "response"))

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        model, tokenizer = untrained(self.policy, self.data, self.seed)
        model.to(device())
        train, check = (self.probe(store, tokenizer, probe) for probe in PROBES)

        def keep(step: int, optimizer: torch.optim.Optimizer) -> None:
            self.keep_checkpoint(folder, step, model, optimizer, None, tokenizer, check, self.data)

        self.finish(folder, self._fit(folder, tick, model, train, keep), model, tokenizer)


class ReferenceRun(Spec):
    """Log-probs of all chosen and rejected responses under an SFT policy, computed once for all that start from it."""

    kind: Literal["reference"] = "reference"
    sft: SFTRun
    data: DataSpec
    mismatched: bool = False  # also of each chosen response after another prompt

    def parents(self) -> list[Spec]:
        return [self.sft]

    def work(self) -> float:
        return (self.data.pairs + self.data.check) / 2

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write train.parquet and check.parquet: a row a pair, log-probs of whole responses, nats."""
        model, tokenizer = final_policy(store.get(self.sft))
        known = dataset(self.data)
        for probe, rows in zip(PROBES, (known.pairs, known.check), strict=True):
            batches = {side: encode(self.data, tokenizer, rows, side) for side in SIDES}
            if self.mismatched:
                batches["mismatched"] = encode(self.data, tokenizer, mismatched(rows), "chosen")
            columns = {name: likelihood.sequence_logps(model, rows).cpu().numpy() for name, rows in batches.items()}
            pd.DataFrame(columns).to_parquet(folder / f"{probe}.parquet")
        tick(self.work())


def pairs_objective(
    store: "RunStore",
    tokenizer: PreTrainedTokenizerBase,
    scored: ReferenceRun,
    probe: str,
    method: Method,
    settings: Mapping[str, float],
) -> PairObjective:
    """A method's objective on the "train" or "check" pairs, with the SFT policy as the reference."""
    known = dataset(scored.data)
    rows = known.pairs if probe == "train" else known.check
    table = store.get(scored).frame(probe)
    reference = {name: torch.tensor(table[name].to_numpy(), device=device()) for name in table}
    sides = [encode(scored.data, tokenizer, rows, side) for side in SIDES] + [reference[side] for side in SIDES]
    if method.objective is not None:
        return method.objective(*sides, **settings)
    if not method.kl:
        return PairObjective(method, *sides, **settings)
    others = encode(scored.data, tokenizer, mismatched(rows), "chosen")
    return PairObjective(method, *sides, others, reference["mismatched"], **settings)


class PairRun(_Fitted):
    """A method of preference pairs (`methods`) from an SFT policy, under a control."""

    sft: SFTRun
    data: DataSpec
    method: str
    code: str  # of its loss, where it is one's own (`methods.own`)
    settings: tuple[tuple[str, float], ...]
    control: Control

    takes: ClassVar[str] = "pairs"

    @property
    def kind(self) -> str:
        """What the run is called by in the store: its method."""
        return self.method

    def reaches(self) -> list[str]:
        """The module of the method, which nothing imports by name."""
        return [] if self.code else [registry.module_of(self.method)]

    def found(self) -> Method:
        """The method itself."""
        return own.read(self.method, self.code) if self.code else registry.find(self.method)

    def scored(self) -> ReferenceRun:
        """The reference log-probs that it starts from."""
        return ReferenceRun(sft=self.sft, data=self.data, mismatched=self.found().kl)

    def parents(self) -> list[Spec]:
        return [self.sft, self.scored()]

    def work(self) -> float:
        return 2 * self.optimisation.steps * self.optimisation.batch_size

    def probe(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str) -> PairObjective:
        """The objective on the pairs it trains on ("train") or on pairs like them ("check")."""
        return pairs_objective(store, tokenizer, self.scored(), probe, self.found(), dict(self.settings))

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write what every training run writes."""
        start = store.get(self.sft)
        model, tokenizer = final_policy(start)
        reference, _ = final_policy(start)
        train, check = (self.probe(store, tokenizer, probe) for probe in PROBES)

        def keep(step: int, optimizer: torch.optim.Optimizer) -> None:
            self.keep_checkpoint(folder, step, model, optimizer, reference, tokenizer, check, self.data)

        log = self._fit(folder, tick, model, train, keep, self.control)
        self.finish(folder, log, model, tokenizer, before=start)
