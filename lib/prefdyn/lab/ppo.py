"""Proximal policy optimisation on replies, and the reward model it may learn from, as specs of the run store.

One iteration: sample replies to training prompts, score them, subtract a penalty for each token's KL to the reference,
turn rewards and values into advantages, and take several passes of clipped policy steps and value steps over them. The
policy steps go through the same token weights and the same `update` as every other objective.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens import likelihood
from ..lens.batch import Batch, pad
from ..lens.controls import Control
from ..methods import dpo, rollout
from ..methods.ppo import METHOD, PPO
from . import policy, recipes
from .evaluate import reply, rewards
from .train import Optimisation, digest, example_order, learning_rate, load_state, make_optimizer, save_state, update

if TYPE_CHECKING:
    from .runs import RunStore

Score = Callable[[list[str], Batch], torch.Tensor]  # (prompts, rollouts) -> one number a rollout


class Headed(torch.nn.Module):
    """A policy with a head of one output in the place of its output layer: of values (with a bias) or of rewards.

    The head is at first zero, the body a copy. Raises ValueError if a policy has no output layer that can be replaced.
    """

    def __init__(self, model: PreTrainedModel, bias: bool):
        super().__init__()
        output = model.get_output_embeddings()
        if output is None or model.base_model is model:
            raise ValueError(f"{type(model).__name__} has no output layer that a head could replace")
        self.body = copy.deepcopy(model.base_model)
        self.head = torch.nn.Linear(output.in_features, 1, bias, device=model.device, dtype=model.dtype)
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)

    def states(self, batch: Batch) -> torch.Tensor:
        """What the head reads, the body's last states [N, T, width]."""
        return self.body(**likelihood.inputs(self.body, batch)).last_hidden_state

    def forward(self, batch: Batch) -> torch.Tensor:
        """What the head says at each position, [N, T]."""
        return self.head(self.states(batch)).squeeze(-1)


def headed(folder: Path, bias: bool) -> Headed:
    """The policy saved in `folder` with a head of one output, on the device."""
    return Headed(policy.load(str(folder))[0], bias).eval().to(recipes.device())


def token_values(model: Headed, batch: Batch) -> torch.Tensor:
    """Value of the state in which each token is chosen, [N, T], zero outside responses."""
    return F.pad(model(batch)[:, :-1], (1, 0)).masked_fill(~batch.response, 0.0)


def sequence_scores(model: Headed, batch: Batch) -> torch.Tensor:
    """Score of each reply by a reward model, [N]: its head at the last token, also where that is the padding token."""
    states = model.states(batch)
    rows = torch.arange(len(batch), device=states.device)
    return model.head(states[rows, rollout.last_token(batch.response)]).squeeze(-1)


class RewardRun(recipes.Spec):
    """A reward model: the SFT policy with a scalar head, trained on pairs by -log sigmoid(r_chosen - r_rejected)."""

    kind: Literal["reward"] = "reward"
    sft: recipes.SFTRun
    data: recipes.DataSpec
    optimisation: Optimisation

    def parents(self) -> list[recipes.Spec]:
        return [self.sft]

    def work(self) -> float:
        return 2 * self.optimisation.steps * self.optimisation.batch_size

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write model.safetensors, steps.parquet, and check.parquet: score differences of the check pairs."""
        start, spec = store.get(self.sft), self.data
        _, tokenizer = recipes.final_policy(start)
        known = recipes.dataset(spec)
        sides = [recipes.encode(spec, tokenizer, known.pairs, side) for side in ("chosen", "rejected")]
        model = headed(start.folder / "policy", bias=False)
        optimizer = make_optimizer(model, self.optimisation)
        parts = {"reward": (model, optimizer)}
        size = (self.optimisation.micro_batch + 1) // 2  # pairs in memory at once
        first, log = load_state(folder, parts)
        tick(2 * self.optimisation.batch_size * first)
        for step in range(first, self.optimisation.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.optimisation, step)
            index = example_order(len(known.pairs), step, self.optimisation).to(recipes.device())
            differences = []
            optimizer.zero_grad(set_to_none=True)
            for part in index.split(size or len(index)):
                chosen, rejected = (sequence_scores(model, side.rows(part)) for side in sides)
                (-F.logsigmoid(chosen - rejected).sum() / len(index)).backward()
                differences.append((chosen - rejected).detach())
            clip_grad_norm_(model.parameters(), self.optimisation.clip or float("inf"))
            optimizer.step()
            difference = torch.cat(differences)
            accuracy = (0.5 + 0.5 * difference.sign()).mean().item()  # ties half
            log.append({"step": step, "loss": -F.logsigmoid(difference).mean().item(), "accuracy": accuracy})
            tick(2 * self.optimisation.batch_size)
            if step % 50 == 49:
                save_state(folder, parts, step + 1, log)
        check_sides = [recipes.encode(spec, tokenizer, known.check, side) for side in ("chosen", "rejected")]
        with torch.no_grad():
            chosen, rejected = (
                torch.cat([sequence_scores(model, part) for part in side.chunks(256)]) for side in check_sides
            )
        check = pd.DataFrame({"difference": (chosen - rejected).cpu().numpy()})
        if known.reward is not None:
            check["true_difference"] = [row["reward_chosen"] - row["reward_rejected"] for row in known.check]
        check.to_parquet(folder / "check.parquet")
        pd.DataFrame(log).to_parquet(folder / "steps.parquet")
        save_model(model, str(folder / "model.safetensors"))
        for done in [folder / "state.json", *folder.glob("state-*")]:
            done.unlink(missing_ok=True)


def scorer(
    store: "RunStore", tokenizer: PreTrainedTokenizerBase, data: recipes.DataSpec, reward: RewardRun | None
) -> Score:
    """What replies are rewarded by: a reward model, or without one the world's true reward.

    Raises ValueError if the true reward is asked for and not known.
    """
    known = recipes.dataset(data)
    if reward is not None:
        model = headed(store.get(reward.sft).folder / "policy", bias=False)
        load_model(model, store.get(reward).folder / "model.safetensors")
        return torch.no_grad()(lambda prompts, batch: sequence_scores(model, batch))
    if known.reward is None:
        raise ValueError("reward='true': the true reward of this dataset is not known; use 'learned'")

    def true_reward(prompts: list[str], batch: Batch) -> torch.Tensor:
        answers = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.response, strict=True)]
        points = rewards(known, prompts, policy.decode(tokenizer, answers))
        return torch.tensor(points, device=batch.ids.device)

    return true_reward


class Sampled(NamedTuple):
    """Replies with their log-probs [N, T] under the policy that sampled and under the reference, and chunks of them."""

    batch: Batch
    old: torch.Tensor
    ref: torch.Tensor
    parts: list[Batch]


def sample(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    data: recipes.DataSpec,
    temperature: float,
    seed: int,
    size: int,
    micro_batch: int,
) -> Sampled:
    """One reply to each prompt, by the policy at `temperature`.

    Passes are in chunks of `size` rows with all columns, taken apart by `micro_batch`: the same shapes as the
    minibatches of a first pass over them, so that its first ratio is exactly 1.
    """
    limits = {"max_prompt": data.max_prompt, "max_response": data.max_response}
    asked, answers = reply(model, tokenizer, prompts, temperature=temperature, seed=seed, **limits)
    batch = pad(asked, answers, tokenizer.pad_token_id).to(model.device)
    parts = [part for block in batch.slices(size) for part in block.slices(micro_batch or size)]
    with torch.no_grad():
        old, ref = (
            torch.cat([likelihood.token_logps(m, part, temperature) for part in parts]) for m in (model, reference)
        )
    return Sampled(batch, old, ref, parts)


def described(sampled: Sampled, points: torch.Tensor) -> dict[str, float]:
    """Metrics of replies: reward (points), kl to the reference (nats a reply), entropy (nats a token), length (tokens)
    and distinct, the share of different ones."""
    inside = sampled.batch.response
    told = [tuple(ids[mask].tolist()) for ids, mask in zip(sampled.batch.ids, inside, strict=True)]
    return {
        "reward": points.mean().item(),
        "kl": (sampled.old - sampled.ref).sum(-1).mean().item(),
        "entropy": -sampled.old[inside].mean().item(),
        "length": inside.sum(-1).float().mean().item(),
        "distinct": len(set(told)) / len(told),
    }


class PPORun(recipes.Training):
    """PPO from an SFT policy. `optimisation.steps` counts iterations, its batch size is that of a minibatch."""

    takes: ClassVar[str] = "rollouts"
    sft: recipes.SFTRun
    data: recipes.DataSpec
    reward: RewardRun | None  # None: the world's true reward
    control: Control
    rollouts: int  # replies an iteration
    temperature: float  # of sampling, and of the policy that is trained
    epochs: int  # passes over them
    value_lr: float
    clip: float
    value_clip: float  # 0: none
    kl_coefficient: float
    kl_estimator: Literal["k1", "k2", "k3"]
    gamma: float
    lam: float
    whiten: bool
    stop_kl: float  # nats a token from the sampling policy at which an iteration's passes end; 0: never

    @property
    def kind(self) -> str:
        """What the run is called by in the store: its method."""
        return METHOD.name

    def scored(self) -> recipes.ReferenceRun:
        return recipes.ReferenceRun(sft=self.sft, data=self.data)

    def parents(self) -> list[recipes.Spec]:
        return [self.sft, self.scored(), *([self.reward] if self.reward else [])]

    def work(self) -> float:
        return self.optimisation.steps * self.rollouts * (3 + 2 * self.epochs)

    def score(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase) -> Score:
        """What rollouts are rewarded by, as `scorer`."""
        return scorer(store, tokenizer, self.data, self.reward)

    def collect(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        value_model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        score: Score,
        prompts: list[str],
        seed: int,
        size: int,
    ) -> tuple[PPO, torch.Tensor, torch.Tensor, dict[str, float]]:
        """Sample one reply to each prompt; returns the objective on them, old values, returns and metrics.

        Ratios, KL and entropy refer to the policy that sampled, the one at `temperature`. size: rows, as for `sample`.
        """
        sampled = sample(
            model,
            reference,
            tokenizer,
            prompts,
            data=self.data,
            temperature=self.temperature,
            seed=seed,
            size=size,
            micro_batch=self.optimisation.micro_batch,
        )
        batch, old, ref, parts = sampled
        with torch.no_grad():
            values = torch.cat([token_values(value_model, part) for part in parts])
        points = score(prompts, batch)
        kl = rollout.kl_estimate(old, ref, self.kl_estimator)
        token_rewards = rollout.token_rewards(points, kl, batch.response, self.kl_coefficient)
        advantages, returns = rollout.gae(token_rewards, values, batch.response, self.gamma, self.lam)
        inside = batch.response
        metrics = described(sampled, points) | {
            "return": token_rewards.sum(-1).mean().item(),
            "explained_variance": rollout.explained_variance(values[inside], returns[inside]),
        }
        if self.whiten:
            advantages = rollout.whiten(advantages, inside)
        return PPO(batch, old, advantages, self.clip, self.temperature), values, returns, metrics

    def prober(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase, probe: str, size: int) -> recipes.Prober:
        """What G is measured on at a step: fresh rollouts of that step's policy, with that step's values."""
        run, start = store.get(self), store.get(self.sft)
        reference, _ = recipes.final_policy(start)
        value_model = headed(start.folder / "policy", bias=True)
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"][:size]

        def at(step: int, model: PreTrainedModel) -> tuple[PPO, torch.Tensor]:
            load_model(value_model, run.folder / f"value-{step}.safetensors")
            seed = 2 * step + 2_000_000 * (1 + recipes.PROBES.index(probe))  # even: training's seeds are odd
            collected = self.collect(model, reference, value_model, tokenizer, score, prompts, seed, 256)
            return collected[0], torch.arange(len(prompts), device=model.device)

        return at

    def _center_values(self, model, reference, value_model, tokenizer, score, prompts: list[str]) -> None:
        """Let values begin at the mean return, far from 0: else the first iterations only learn that number.

        With lambda 1: other returns lean on the values, which are 0 here.
        """
        whole = self.model_copy(update={"lam": 1.0})
        objective, _, returns, _ = whole.collect(model, reference, value_model, tokenizer, score, prompts, 0, 256)
        torch.nn.init.constant_(value_model.head.bias, returns[objective.rollouts.response].mean().item())

    def _value_step(self, part, batch: Batch, old_values: torch.Tensor, returns: torch.Tensor) -> float:
        """One optimiser step of the value model on a minibatch; returns the loss before it."""
        model, optimizer = part
        size = self.optimisation.micro_batch or len(batch)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows, old, goal in zip(batch.slices(size), old_values.split(size), returns.split(size), strict=True):
            loss = rollout.value_loss(token_values(model, rows), old, goal, rows.response, self.value_clip)
            loss = loss * rows.response.sum() / batch.response.sum()
            loss.backward()
            total += loss.item()
        clip_grad_norm_(model.parameters(), self.optimisation.clip or float("inf"))
        optimizer.step()
        return total

    def _iterate(self, step: int, parts, reference, tokenizer, score, prompts: list[str]) -> dict[str, float]:
        """One iteration: rollouts, then passes over them in minibatches."""
        (model, optimizer), (value_model, value_optimizer) = parts["policy"], parts["value"]
        config = self.optimisation
        for part, lr in ((optimizer, config.lr), (value_optimizer, self.value_lr)):
            for group in part.param_groups:
                group["lr"] = learning_rate(config, step) / config.lr * lr
        order = Optimisation(steps=config.steps, batch_size=self.rollouts, lr=config.lr, seed=config.seed)
        index = example_order(len(prompts), step, order)
        chosen = [prompts[i] for i in index.tolist()]
        seed = (config.seed * 100_003 + step) * 2 + 1
        objective, old_values, returns, metrics = self.collect(
            model, reference, value_model, tokenizer, score, chosen, seed, config.batch_size
        )
        made: list[dict[str, float]] = []
        for epoch in range(self.epochs):
            rng = torch.Generator().manual_seed(seed * 101 + epoch)
            rows = torch.arange(objective.size) if epoch == 0 else torch.randperm(objective.size, generator=rng)
            for minibatch in rows.to(model.device).split(config.batch_size):
                if made and 0 < self.stop_kl < made[-1]["moved"]:
                    break
                step_metrics = update(
                    model, objective, optimizer, minibatch, self.control, config.clip, config.micro_batch, step
                )
                loss = self._value_step(
                    parts["value"], objective.batch(minibatch), old_values[minibatch], returns[minibatch]
                )
                made.append(step_metrics | {"value_loss": loss})
        mean = pd.DataFrame(made).mean().to_dict()
        first = {f"first_{name}": made[0][name] for name in ("ratio_max", "clip_fraction")}
        metrics = {"examples": digest(index), **metrics}
        return {"step": step, **metrics, **mean, **first, "updates": len(made), "lr": optimizer.param_groups[0]["lr"]}

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write what every training run writes, and the value model at each checkpoint."""
        start = store.get(self.sft)
        model, tokenizer = recipes.final_policy(start)
        reference, _ = recipes.final_policy(start)
        value_model = headed(start.folder / "policy", bias=True)
        score = self.score(store, tokenizer)
        prompts = recipes.dataset(self.data).prompts["train"]
        if self.rollouts > len(prompts):
            raise ValueError(f"rollouts={self.rollouts}: more than the {len(prompts)} training prompts")
        check = recipes.pairs_objective(store, tokenizer, self.scored(), "check", dpo.METHOD, {"beta": 0.1})
        parts = {"policy": (model, make_optimizer(model, self.optimisation))}
        parts["value"] = (value_model, make_optimizer(value_model, self.optimisation))
        if not (folder / "state.json").exists():
            self._center_values(model, reference, value_model, tokenizer, score, prompts[: self.rollouts])
        first, log = load_state(folder, parts)
        tick(self.rollouts * (3 + 2 * self.epochs) * first)
        for step in range(first, self.optimisation.steps + 1):
            if step in self.steps() and (step > first or step == 0):
                self.keep_checkpoint(folder, step, model, parts["policy"][1], reference, tokenizer, check, self.data)
                save_model(value_model, str(folder / f"value-{step}.safetensors"))
                save_state(folder, parts, step, log)
            if step < self.optimisation.steps:
                log.append(self._iterate(step, parts, reference, tokenizer, score, prompts))
                tick(self.rollouts * (3 + 2 * self.epochs))
        self.finish(folder, log, model, tokenizer, before=start)
