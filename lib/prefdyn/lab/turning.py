"""Training whose target is known by construction: it stays, is turned round on the way, or never was.

Runs that G can be calibrated on. Training has a number of equal parts, its phases, and in every second one something is
turned: all labels, or one axis of the world's reward. "nothing" trains as the plain run does, bit for bit; with
"random" there is nothing to learn at all. All else (start, data, their order, optimiser, checkpoints) is that of the
plain run.
"""

import bisect
import copy
import dataclasses
import difflib
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from pydantic import model_validator
from safetensors.torch import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens.batch import Batch
from ..lens.controls import FULL
from ..methods.base import PairObjective
from ..methods.ppo import PPO
from ..methods.sft import SFT
from . import online, policy, ppo, recipes
from .ppo import Score
from .train import Objective, Optimisation, fit
from .world import World
from .worlds import WORLDS

if TYPE_CHECKING:
    from .runs import RunStore

NOTHING, LABELS, RANDOM = "nothing", "labels", "random"
SPREAD = 3.0  # points, of random rewards: the standard deviation of the true ones of demonstrations (hard world)
TIE = 1e-9  # points: sums of scores that differ by less are equal


class Construction(NamedTuple):
    """What the target of training is: what is turned in every second of how many phases."""

    turned: str
    phases: int

    def __str__(self) -> str:
        return f"{self.turned}, {self.phases} phase{'' if self.phases == 1 else 's'}"


def ends(steps: int, phases: int) -> list[int]:
    """Where each of `phases` equal parts of `steps` updates ends, rounded down; the last one with the last update.

    Raises ValueError for phases below 1 or above `steps`.
    """
    if not 1 <= phases <= steps:
        raise ValueError(f"phases={phases}: must be from 1 to the number of steps, {steps}")
    return [(phase + 1) * steps // phases for phase in range(phases)]


def is_turned(turned: str, phase: int) -> bool:
    """Whether something is otherwise than it was given in a phase: every odd one, and with "random" every one."""
    return turned == RANDOM or (turned != NOTHING and phase % 2 == 1)


def axis_points(world: World, axis: str, prompt: str, reply: str) -> float:
    """What an axis of quality adds to the true reward of a reply, points: its weight times its score."""
    return world.weights[axis] * world.axes(world.parse_prompt(prompt), reply)[axis]


def other_order(world: World, axis: str, row: dict) -> bool:
    """Whether the responses of a pair are ordered the other way round by the reward with one axis' sign reversed.

    Where the true reward or the reversed one has them equal (to TIE points), no order is the other one: False.

    Args: row, with prompt, chosen, rejected, reward_chosen and reward_rejected (points).
    """
    true = row["reward_chosen"] - row["reward_rejected"]
    own = [axis_points(world, axis, row["prompt"], row[side]) for side in ("chosen", "rejected")]
    reversed_ = true - 2 * (own[0] - own[1])
    return min(abs(true), abs(reversed_)) > TIE and (true > 0) != (reversed_ > 0)


def swaps(rows: Sequence[dict], turned: str, phase: int, world: World | None, stream: str) -> list[bool]:
    """Which pairs have their given label swapped in a phase, one bool a pair.

    Args: world, for an axis. stream, names the random numbers of "random", with which each pair is swapped with
    probability 1/2 whatever its label is: labels are fair coins, independent between phases.
    """
    if not is_turned(turned, phase):
        return [False] * len(rows)
    if turned == LABELS:
        return [True] * len(rows)
    if turned == RANDOM:
        rng = random.Random(f"{stream}/{phase}")
        return [rng.random() < 0.5 for _ in rows]
    return [other_order(world, turned, row) for row in rows]


def swapped(objective: PairObjective, swap: torch.Tensor) -> PairObjective:
    """The same objective with chosen and rejected responses exchanged in the pairs of `swap`, bool [pairs].

    Replies to other prompts, which `Pairs.kl` is estimated from, stay what they are.
    """
    n = objective.size
    if swap.shape != (n,):
        raise ValueError(f"swapped: a bool for each of {n} pairs is needed, given shape {tuple(swap.shape)}")
    turned, own = copy.copy(objective), torch.arange(n, device=swap.device)
    chosen, rejected = torch.where(swap, own + n, own), torch.where(swap, own, own + n)
    others = torch.arange(2 * n, len(objective.rows), device=swap.device)
    turned.rows = objective.rows.take(torch.cat([chosen, rejected, others]))
    first, second = objective.reference
    turned.reference = (torch.where(swap, second, first), torch.where(swap, first, second))
    return turned


def noise(batch: Batch, seed: int, phase: int) -> torch.Tensor:
    """Rewards that say nothing, [N], points: normal with standard deviation SPREAD, a function of the whole batch.

    The same reply has another reward in another batch, and twice in one batch two rewards.
    """
    told = zlib.crc32(batch.ids.cpu().numpy().tobytes())
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{phase}".encode(), told))
    return SPREAD * torch.randn(len(batch), generator=rng).to(batch.ids.device)


class Rewards:
    """What rollouts are rewarded by in each phase, `at(phase)`; called itself, it rewards as in the first one.

    plain: as without turning. axis: (prompts, rollouts) -> what the turned axis adds to it [N], where an axis is.
    """

    def __init__(self, turned: str, seed: int, plain: Score, axis: Score | None = None):
        self.turned, self.seed, self.plain, self.axis = turned, seed, plain, axis

    def __call__(self, prompts: list[str], batch: Batch) -> torch.Tensor:
        return self.at(0)(prompts, batch)

    def at(self, phase: int) -> Score:
        """(prompts, rollouts) -> points [N] in a phase."""
        if not is_turned(self.turned, phase):
            return self.plain
        if self.turned == RANDOM:
            return lambda prompts, batch: noise(batch, self.seed, phase)
        if self.turned == LABELS:
            return lambda prompts, batch: -self.plain(prompts, batch)
        return lambda prompts, batch: self.plain(prompts, batch) - 2 * self.axis(prompts, batch)


class _Turning(recipes.Training):
    """What all turning runs share. `phases` are of updates, or of iterations.

    turned: "nothing", "labels" (all: chosen and rejected, or the sign of the reward), "random" (no target: labels are
    fair coins in every phase, rewards noise in every batch), or an axis of the world's reward, whose sign is reversed.
    Phase k, from 0, is turned where k is odd. Checkpoints are those of the plain run and all ends of phases.
    """

    turned: str
    phases: int

    @model_validator(mode="after")
    def _possible(self):
        self.require_possible()
        return self

    def require_possible(self) -> None:
        """Raise ValueError that names what cannot be: a number of phases, an axis that the world lacks."""
        ends(self.optimisation.steps, self.phases)
        axes = tuple(WORLDS[self.data.difficulty].weights) if self.data.path is None else ()
        allowed = (NOTHING, LABELS, RANDOM, *axes)
        if self.turned not in allowed:
            near = difflib.get_close_matches(self.turned, allowed, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            what = f"axes of the {self.data.difficulty} world" if axes else "and a file has no axes"
            raise ValueError(f"turned={self.turned!r}: not one of {', '.join(allowed)} ({what}).{hint}")

    @property
    def construction(self) -> Construction:
        """What is turned in how many phases."""
        return Construction(self.turned, self.phases)

    @property
    def kind(self) -> str:
        """What the run is called by in the store: turning, and its method."""
        return f"turning_{super().kind}"

    @property
    def axis(self) -> str | None:
        """The axis that is turned, if one is."""
        return None if self.turned in (NOTHING, LABELS, RANDOM) else self.turned

    def ends(self) -> list[int]:
        """The steps at which phases end."""
        return ends(self.optimisation.steps, self.phases)

    def phase(self, step: int) -> int:
        """The phase of the update that follows `step` updates; after the last one, its phase."""
        return min(bisect.bisect_right(self.ends(), step), self.phases - 1)

    def steps(self) -> list[int]:
        """The steps at which the run keeps a checkpoint."""
        return sorted({*super().steps(), *self.ends()})


class _TurningPairs(_Turning):
    """Training on pairs that are there beforehand, a phase after the other.

    A phase is a call of `train.fit`, which continues from the state that the one before has left.
    """

    def require_possible(self) -> None:
        """The same, and a schedule that would depend on the phase."""
        super().require_possible()
        if self.optimisation.schedule != "constant":
            raise ValueError(
                f"schedule={self.optimisation.schedule!r}: a turning run of pairs needs 'constant', since the decay "
                "would depend on the phase"
            )

    def rows(self, probe: str) -> list[dict]:
        """The pairs that it trains on ("train") or pairs like them ("check"), as they were labelled."""
        known = recipes.dataset(self.data)
        return known.pairs if probe == "train" else known.check

    def swaps(self, probe: str, phase: int) -> list[bool]:
        """Which of these have their label swapped in a phase."""
        world = recipes.dataset(self.data).world
        return swaps(self.rows(probe), self.turned, phase, world, f"{self.optimisation.seed}/turning/{probe}")

    def objectives(
        self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str
    ) -> Callable[[int], Objective]:
        """phase -> the objective on the pairs `probe` as they are labelled then."""
        raise NotImplementedError

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> recipes.Prober:
        """What G is measured on at a step: the same pairs at every step, labelled as for the update that follows."""
        objectives = functools.lru_cache(maxsize=2)(self.objectives(store, tokenizer, probe))
        index = torch.arange(min(size, objectives(0).size), device=recipes.device())
        return lambda step, model: (objectives(self.phase(step)), index)

    def optimised(self, end: int) -> Optimisation:
        """How to step up to the end of a phase: with as long a warm-up as the whole training has."""
        whole = self.optimisation
        return dataclasses.replace(whole, steps=end, warmup=round(whole.warmup * whole.steps) / end)

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write what every training run writes. What it is checked on is labelled as it was given, in every phase."""
        self.require_possible()
        start = store.get(self.sft)
        model, tokenizer = recipes.final_policy(start)
        reference, _ = recipes.final_policy(start)
        check, objectives = self.probe(store, tokenizer, "check"), self.objectives(store, tokenizer, "train")

        def keep(step: int, optimizer: torch.optim.Optimizer) -> None:
            self.keep_checkpoint(folder, step, model, optimizer, reference, tokenizer, check, self.data)

        each, done = self.work() / self.optimisation.steps, 0
        log: list[dict] = []
        for phase, end in enumerate(self.ends()):
            told = 0

            def once() -> None:
                """Each call of `fit` tells of all steps from the first on; pass each on once."""
                nonlocal told, done
                told += 1
                if told > done:
                    done = told
                    tick(each)

            log = fit(
                model,
                objectives(phase),
                self.optimised(end),
                control=getattr(self, "control", FULL),
                at=self.steps(),
                on_checkpoint=keep,
                state=folder,
                tick=once,
            )
        self.finish(folder, log, model, tokenizer, before=start)


class TurningPairRun(_TurningPairs, recipes.PairRun):
    """A method of preference pairs whose labels are turned in every second phase.

    "random" is without a target only as far as labels are not seen twice: within a phase they are fixed, and can be
    memorised over several passes. With one phase they are a target of their own, which is refused.
    """

    def require_possible(self) -> None:
        """The same, and random labels that are drawn once."""
        super().require_possible()
        if (self.turned, self.phases) == (RANDOM, 1):
            raise ValueError("phases=1: random labels that are drawn once can be learned; at least 2 are needed")

    def objectives(
        self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str
    ) -> Callable[[int], PairObjective]:
        """phase -> the method's objective on the pairs `probe` as they are labelled then."""
        plain = self.probe(store, tokenizer, probe)

        def at(phase: int) -> PairObjective:
            swap = torch.tensor(self.swaps(probe, phase), device=plain.rows.ids.device)
            return swapped(plain, swap) if bool(swap.any()) else plain

        return at


class TurningImitationRun(_TurningPairs):
    """Supervised fine-tuning from an SFT policy on the chosen responses of pairs; where they are turned, the rejected.

    The same start, data, order and reference as a `TurningPairRun` has. "random" is refused: to imitate one of two
    responses by a coin is to imitate both, which is a target that stays.
    """

    takes: ClassVar[str] = "demonstrations"
    sft: recipes.SFTRun
    data: recipes.DataSpec

    @property
    def kind(self) -> str:
        """What the run is called by in the store."""
        return "turning_sft"

    def require_possible(self) -> None:
        """The same, and random labels."""
        super().require_possible()
        if self.turned == RANDOM:
            raise ValueError("turned='random': imitating one of two responses by a coin has a target, both of them")

    def parents(self) -> list[recipes.Spec]:
        return [self.sft]

    def work(self) -> float:
        return self.optimisation.steps * self.optimisation.batch_size

    def probe(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str) -> SFT:
        """The objective on the chosen responses, as they were labelled, of the pairs `probe`."""
        return SFT(recipes.encode(self.data, tokenizer, self.rows(probe), "chosen"))

    def objectives(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str) -> Callable[[int], SFT]:
        """phase -> the objective on the responses of the pairs `probe` that are to be imitated then."""

        def at(phase: int) -> SFT:
            imitated = [
                {"prompt": row["prompt"], "response": row["rejected" if swap else "chosen"]}
                for row, swap in zip(self.rows(probe), self.swaps(probe, phase), strict=True)
            ]
            return SFT(recipes.encode(self.data, tokenizer, imitated, "response"))

        return at


class _TurningRollouts(_Turning):
    """Training on fresh replies whose reward is turned in every second iteration's phase.

    Rewards in `steps` are those that it learns from; those of checkpoints and replies are true.
    """

    def require_possible(self) -> None:
        """The same, and rewards that cannot be turned."""
        super().require_possible()
        if self.reward is None and self.data.path is not None:
            raise ValueError("reward: the true reward is turned here, which only the world has")
        if self.reward is not None and self.axis:
            raise ValueError(f"turned={self.turned!r}: a learned reward has no axes; the true one (reward=None) has")

    def score(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase) -> Rewards:
        """What rollouts are rewarded by in every phase."""
        plain, known = super().score(store, tokenizer), recipes.dataset(self.data)

        def of_axis(prompts: list[str], batch: Batch) -> torch.Tensor:
            answers = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.response, strict=True)]
            told = zip(prompts, policy.decode(tokenizer, answers), strict=True)
            points = [axis_points(known.world, self.axis, prompt, reply) for prompt, reply in told]
            return torch.tensor(points, device=batch.ids.device)

        return Rewards(self.turned, self.optimisation.seed, plain, of_axis if self.axis else None)

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write what the plain run writes."""
        self.require_possible()
        super().compute(folder, store, tick)


class TurningPPORun(_TurningRollouts, ppo.PPORun):
    """PPO with a reward that is turned in every second phase of its iterations."""

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> recipes.Prober:
        """What G is measured on at a step, as for the plain run, with the reward of the iteration that follows."""
        run, start = store.get(self), store.get(self.sft)
        reference, _ = recipes.final_policy(start)
        value_model = ppo.headed(start.folder / "policy", bias=True)
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"][:size]

        def at(step: int, model: PreTrainedModel) -> tuple[PPO, torch.Tensor]:
            load_model(value_model, run.folder / f"value-{step}.safetensors")
            seed = 2 * step + 2_000_000 * (1 + recipes.PROBES.index(probe))  # as the plain run's
            points = score.at(self.phase(step))
            collected = self.collect(model, reference, value_model, tokenizer, points, prompts, seed, 256)
            return collected[0], torch.arange(len(prompts), device=model.device)

        return at

    def _iterate(self, step: int, parts, reference, tokenizer, score: Rewards, prompts: list[str]) -> dict[str, float]:
        """One iteration, with the reward of its phase."""
        return super()._iterate(step, parts, reference, tokenizer, score.at(self.phase(step)), prompts)


class TurningOnlineRun(_TurningRollouts, online.OnlineRun):
    """A method of rollouts without a value model, e.g. online DPO, with a judge that changes its mind."""

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> recipes.Prober:
        """What G is measured on at a step, as for the plain run, with the reward of the iteration that follows.

        Raises ValueError at a step where the method finds nothing to learn.
        """
        reference, _ = recipes.final_policy(store.get(self.sft))
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"][: max(1, size // self.group)]

        def at(step: int, model: PreTrainedModel) -> tuple[Objective, torch.Tensor]:
            seed = 2 * step + 2_000_000 * (1 + recipes.PROBES.index(probe))  # as the plain run's
            points = score.at(self.phase(step))
            objective, _ = self.collect(model, reference, tokenizer, points, prompts, seed, 256)
            if objective is None:
                raise ValueError(f"{self.method}, step {step}: no reply to any prompt is better than another one")
            return objective, torch.arange(objective.size, device=model.device)

        return at

    def _iterate(self, step: int, model, optimizer, reference, tokenizer, score: Rewards, prompts: list[str]) -> dict:
        """One iteration, with the reward of its phase."""
        return super()._iterate(step, model, optimizer, reference, tokenizer, score.at(self.phase(step)), prompts)


Turning = TurningPairRun | TurningImitationRun | TurningPPORun | TurningOnlineRun


def turning(plain: recipes.PairRun | ppo.PPORun | online.OnlineRun, construction: Construction) -> Turning:
    """The turning run with all settings of a plain one, which learns at a constant rate after its warm-up.

    Raises ValueError for a construction that is not possible.
    """
    kinds = {recipes.PairRun: TurningPairRun, ppo.PPORun: TurningPPORun, online.OnlineRun: TurningOnlineRun}
    kind = kinds.get(type(plain))
    if kind is None:
        raise ValueError(
            f"turning: a {type(plain).__name__} cannot be turned; allowed: a plain run of pairs or rollouts"
        )
    fields = {name: getattr(plain, name) for name in type(plain).model_fields}
    optimisation = dataclasses.replace(plain.optimisation, schedule="constant")
    return kind(**fields | {"optimisation": optimisation} | construction._asdict())


def imitation(plain: recipes.PairRun, construction: Construction, lr: float | None = None) -> TurningImitationRun:
    """Supervised fine-tuning on the pairs of a run of pairs, in its order; lr: of its own, by default that run's."""
    rate = plain.optimisation.lr if lr is None else lr
    return TurningImitationRun(
        sft=plain.sft,
        data=plain.data,
        optimisation=dataclasses.replace(plain.optimisation, schedule="constant", lr=rate),
        checkpoints=plain.checkpoints,
        **construction._asdict(),
    )
