"""Methods that learn from fresh replies without a value model, as a spec of the run store.

One iteration: sample several replies to each of some training prompts, reward them, take off the penalty for their
divergence from the reference, let the method make an objective of them, and take passes over it in minibatches. One
sampler, one reward and one penalty serve all methods, and PPO too.
"""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens.controls import Control
from ..methods import dpo, registry, rollout
from . import recipes
from .ppo import RewardRun, Score, described, sample, scorer
from .train import (
    Objective,
    Optimisation,
    digest,
    example_order,
    learning_rate,
    load_state,
    make_optimizer,
    save_state,
    update,
)

if TYPE_CHECKING:
    from .runs import RunStore


class OnlineRun(recipes.Training):
    """A method of rollouts (`methods`) from an SFT policy. `optimisation.steps` counts iterations."""

    sft: recipes.SFTRun
    data: recipes.DataSpec
    reward: RewardRun | None  # None: the world's true reward
    method: str
    settings: tuple[tuple[str, float], ...]
    control: Control
    rollouts: int  # replies an iteration
    group: int  # replies to a prompt
    temperature: float  # of sampling, and of the policy that is trained
    epochs: int  # passes over them
    kl_coefficient: float
    kl_estimator: Literal["k1", "k2", "k3"]

    takes: ClassVar[str] = "rollouts"

    @property
    def kind(self) -> str:
        """What the run is called by in the store: its method."""
        return self.method

    def reaches(self) -> list[str]:
        """The module of the method, which nothing imports by name."""
        return [registry.module_of(self.method)]

    def scored(self) -> recipes.ReferenceRun:
        """The reference log-probs of the pairs that it is checked on."""
        return recipes.ReferenceRun(sft=self.sft, data=self.data)

    def parents(self) -> list[recipes.Spec]:
        return [self.sft, self.scored(), *([self.reward] if self.reward else [])]

    def work(self) -> float:
        return self.optimisation.steps * self.rollouts * (2 + self.epochs)

    def collect(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        score: Score,
        prompts: list[str],
        seed: int,
        size: int,
    ) -> tuple[Objective | None, dict[str, float]]:
        """Sample `group` replies to each prompt; returns the method's objective on them and metrics.

        size: rows, as for `ppo.sample`. The objective is None where the method finds nothing to learn from them.
        """
        asked = [prompt for prompt in prompts for _ in range(self.group)]
        settings = {"data": self.data, "temperature": self.temperature, "seed": seed, "size": size}
        sampled = sample(model, reference, tokenizer, asked, **settings, micro_batch=self.optimisation.micro_batch)
        points = score(asked, sampled.batch)
        kl = rollout.kl_estimate(sampled.old, sampled.ref, self.kl_estimator)
        rewards = rollout.token_rewards(points, kl, sampled.batch.response, self.kl_coefficient)
        fresh = rollout.Rollouts(
            batch=sampled.batch,
            old=sampled.old,
            ref=sampled.ref,
            returns=rewards.sum(-1),
            group=self.group,
            temperature=self.temperature,
            longest=self.data.max_response,
        )
        metrics = described(sampled, points) | {"return": fresh.returns.mean().item()}
        metrics |= rollout.ties(fresh.grouped(), points.reshape(-1, self.group))
        return registry.find(self.method).rollouts(fresh, **dict(self.settings)), metrics

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> recipes.Prober:
        """What G is measured on at a step: fresh replies of that step's policy, at most `size`.

        Raises ValueError at a step where the method finds nothing to learn.
        """
        reference, _ = recipes.final_policy(store.get(self.sft))
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"][: max(1, size // self.group)]

        def at(step: int, model: PreTrainedModel) -> tuple[Objective, torch.Tensor]:
            seed = 2 * step + 2_000_000 * (1 + recipes.PROBES.index(probe))  # even: training's seeds are odd
            objective, _ = self.collect(model, reference, tokenizer, score, prompts, seed, 256)
            if objective is None:
                raise ValueError(f"{self.method}, step {step}: no reply to any prompt is better than another one")
            return objective, torch.arange(objective.size, device=model.device)

        return at

    def score(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase) -> Score:
        """What replies are rewarded by, as `ppo.scorer`."""
        return scorer(store, tokenizer, self.data, self.reward)

    def _iterate(self, step: int, model, optimizer, reference, tokenizer, score, prompts: list[str]) -> dict:
        """One iteration: fresh replies, then passes over them in minibatches."""
        config = self.optimisation
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        order = Optimisation(steps=config.steps, batch_size=self.rollouts // self.group, lr=config.lr, seed=config.seed)
        index = example_order(len(prompts), step, order)
        seed = (config.seed * 100_003 + step) * 2 + 1
        chosen = [prompts[i] for i in index.tolist()]
        objective, metrics = self.collect(model, reference, tokenizer, score, chosen, seed, config.batch_size)
        made: list[dict[str, float]] = []
        for epoch in range(self.epochs if objective is not None else 0):
            rng = torch.Generator().manual_seed(seed * 101 + epoch)
            rows = torch.arange(objective.size) if epoch == 0 else torch.randperm(objective.size, generator=rng)
            for minibatch in rows.to(model.device).split(config.batch_size):
                made.append(
                    update(model, objective, optimizer, minibatch, self.control, config.clip, config.micro_batch, step)
                )
        mean = pd.DataFrame(made).mean().to_dict()
        return {"step": step, "examples": digest(index), **metrics, **mean, "updates": len(made)}

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write what every training run writes."""
        start = store.get(self.sft)
        model, tokenizer = recipes.final_policy(start)
        reference, _ = recipes.final_policy(start)
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"]
        check = recipes.pairs_objective(store, tokenizer, self.scored(), "check", dpo.METHOD, {"beta": 0.1})
        optimizer = make_optimizer(model, self.optimisation)
        parts = {"policy": (model, optimizer)}
        first, log = load_state(folder, parts)
        each = self.work() / max(1, self.optimisation.steps)
        tick(each * first)
        for step in range(first, self.optimisation.steps + 1):
            if step in self.steps() and (step > first or step == 0):
                self.keep_checkpoint(folder, step, model, optimizer, reference, tokenizer, check, self.data)
                save_state(folder, parts, step, log)
            if step < self.optimisation.steps:
                log.append(self._iterate(step, model, optimizer, reference, tokenizer, score, prompts))
                tick(each)
        self.finish(folder, log, model, tokenizer, before=start)
