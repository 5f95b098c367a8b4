"""The measurement: alignment of an objective with the final responses at every checkpoint of a run, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lab import online, ppo, recipes
from ..lens import alignment, controls
from ..lens.batch import Batch
from ..lens.likelihood import sequence_logps
from ..lens.weights import TokenWeights
from .targets import TargetSpec

if TYPE_CHECKING:
    from ..lab.runs import RunStore

TOKENS_OF = 256  # examples of a probe whose tokens are kept one by one
CHECKED = 256  # rows whose scores are checked where the gradient of the whole probe is not needed


def token_table(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    weights: TokenWeights,
    logps: torch.Tensor,
    scores: torch.Tensor,
    scores_opt: torch.Tensor,
    examples: int,
    count: int,
) -> pd.DataFrame:
    """A row for each response token of the first `count` of `examples` examples, in order.

    Columns: example; side (0, or for pairs 0 chosen and 1 rejected); position in the response; token (its text);
    logp; w; a, a_opt (its alignment scores, raw and for the optimiser's steps); strength of its unit; third
    (controls.thirds of all units, -1 where undefined).
    """
    row, column = batch.response.nonzero(as_tuple=True)
    kept = row % examples < count
    row, column = row[kept], column[kept]
    unit = weights.unit[row, column]
    first = batch.response.int().argmax(-1)
    text = {i: tokenizer.decode([i]) for i in batch.ids[row, column].unique().tolist()}

    def values(x: torch.Tensor, kind) -> np.ndarray:
        return x.cpu().numpy().astype(kind)

    return pd.DataFrame(
        {
            "example": values(row % examples, np.int32),
            "side": values(row // examples, np.int8),
            "position": values(column - first[row], np.int16),
            "token": pd.Categorical([text[i] for i in batch.ids[row, column].tolist()]),
            "logp": values(logps[row, column], np.float32),
            "w": values(weights.w[row, column], np.float32),
            "a": values(scores[row, column], np.float32),
            "a_opt": values(scores_opt[row, column], np.float32),
            "strength": values(weights.strength[unit], np.float32),
            "third": values(controls.thirds(weights.strength)[unit], np.int8),
        }
    ).sort_values(["example", "side", "position"])


class AlignmentRun(recipes.Spec):
    """G and its components on one probe, at every checkpoint of a training run, raw and for the optimiser's steps.

    Weights are those that the run's control leaves.
    """

    kind: Literal["alignment"] = "alignment"
    run: recipes.SFTRun | recipes.PairRun | online.OnlineRun | ppo.PPORun
    targets: TargetSpec
    probe: Literal["train", "check"]
    size: int  # examples measured at most: pairs for DPO, demonstrations for SFT, replies for PPO
    method: Literal["forward", "central"]
    aware: bool = True  # measure the alignment for the optimiser's steps too: one backward and one more forward pass

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        rows = self.size * (1 if self.run.takes == "demonstrations" else 2)
        return (3.6 if self.aware else 1.6) * rows * len(self.run.steps())  # rows trained on in the same time

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write alignment, sequences and tokens (parquet), with a row a step and, in turn, component, example, token.

        Columns of alignment: step, component, g, se, g_opt, se_opt, n, weight, cosine, cosine_opt, logp_targets, moved.
        G is in nats a unit of learning rate; g_opt is the optimiser-aware one (under SGD, g as far as clipping lets it
        through; NaN if it was not asked for); weight is the sum of the sizes of the component's weights; cosine is that
        of d and the descent direction of the whole, cosine_opt the same as the optimiser scales it (both NaN if g_opt
        was not asked for, and for parts); moved is the inner product of d with the update from here to the next
        checkpoint, in nats.
        Columns of sequences: step, example, its contribution to each component and opt, that to g_opt of the whole; for
        pairs also omega (their strength), margin, and the scores of its chosen and rejected response.
        Columns of tokens: step and those of `token_table`.
        """
        run = store.get(self.run)
        model, tokenizer = recipes.final_policy(run)
        targets = self.targets.draw(self.run.data, model, tokenizer)
        prober = self.run.prober(store, tokenizer, self.probe, self.size)
        tables: dict[str, list[pd.DataFrame]] = {"alignment": [], "sequences": [], "tokens": []}
        for step in self.run.steps():
            for name, table in self._at(run, step, prober, targets, tokenizer).items():
                table.insert(0, "step", np.int32(step))
                tables[name].append(table)
            tick(self.work() / len(self.run.steps()))
        for name, parts in tables.items():
            whole = pd.concat(parts, ignore_index=True)
            if name == "tokens":
                whole["token"] = whole["token"].astype("category")
            whole.to_parquet(folder / f"{name}.parquet")

    def _at(
        self, run, step: int, prober: recipes.Prober, targets: Batch, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, pd.DataFrame]:
        """The tables at one checkpoint."""
        model, _ = recipes.load_checkpoint(run, step)
        objective, index = prober(step, model)
        objective = self.run.trained_on(objective, step)
        batch = objective.batch(index)
        direction = alignment.target_direction(model, targets, self.targets.reduction)
        settings = {"method": self.method, "temperature": objective.temperature}
        logps, scores = alignment.token_scores(model, batch, direction, **settings)
        weights = objective.weights(logps, batch, index)
        scores_opt, cosines = self._checked(run, step, model, batch, weights, direction, (logps, scores), settings)
        n = len(index)

        def by_example(scores: torch.Tensor) -> dict[str, np.ndarray]:
            """Contributions to each component; an example's rows (a pair has two) are one unit of sampling."""
            rows = {name: alignment.by_sequence(weights, scores, name) for name in controls.CONTROLS}
            return {name: g.reshape(-1, n).sum(0).double().cpu().numpy() for name, g in rows.items()}

        examples, examples_opt = by_example(scores), by_example(scores_opt)
        summary = pd.DataFrame(
            {
                "component": list(examples),
                "g": [g.sum() for g in examples.values()],
                "se": [np.sqrt(n * g.var(ddof=1)) for g in examples.values()],
                "g_opt": [g.sum() for g in examples_opt.values()],
                "se_opt": [np.sqrt(n * g.var(ddof=1)) for g in examples_opt.values()],
                "n": n,
                "weight": [controls.apply(name, weights).abs().sum().item() for name in examples],
                **{name: [c if part == "full" else np.nan for part in examples] for name, c in cosines.items()},
                "logp_targets": sequence_logps(model, targets).mean().item(),
                "moved": self._moved(run, step, model, direction),
            }
        )
        sequences = {"example": np.arange(n, dtype=np.int32)}
        sequences |= {k: g.astype(np.float32) for k, g in examples.items()}
        sequences["opt"] = examples_opt["full"].astype(np.float32)
        if self.run.takes == "pairs":
            chosen, rejected, *_ = scores.sum(-1).split(n)
            sequences |= {
                "omega": weights.strength.float().cpu().numpy(),
                "margin": objective.pairs(logps, batch.response, index).margin().float().cpu().numpy(),
                "a_chosen": chosen.float().cpu().numpy(),
                "a_rejected": rejected.float().cpu().numpy(),
            }
        tokens = token_table(batch, tokenizer, weights, logps, scores, scores_opt, n, TOKENS_OF)
        return {"alignment": summary, "sequences": pd.DataFrame(sequences), "tokens": tokens}

    def _checked(
        self,
        run,
        step: int,
        model: PreTrainedModel,
        batch: Batch,
        weights: TokenWeights,
        direction: alignment.Direction,
        scored: alignment.Scored,
        settings: dict,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Check the scores against a backward pass; returns those along P d and cosines, NaN if not asked for.

        P is what the optimiser would scale the gradient of the whole probe by, if it came next. That gradient checks
        all scores at no cost; without it one of the first rows is made, and checks theirs.
        """
        own, w = (batch, weights.w) if self.aware else (batch.slices(CHECKED)[0], weights.w[:CHECKED])
        parts = ((part, w[place]) for place, part in own.pieces(256))
        ascent = alignment.gradient(model, parts, settings["temperature"])
        alignment.check(f"step {step}", self.method, w, tuple(t[: len(own)] for t in scored), ascent, direction)
        if not self.aware:
            return torch.full_like(scored[1], torch.nan), {"cosine": np.nan, "cosine_opt": np.nan}
        scale = self.run.step_scale(run, step, ascent)
        cosines = {
            "cosine": alignment.cosine(ascent, direction),
            "cosine_opt": alignment.cosine(alignment.scaled(ascent, scale), direction),
        }
        direction = alignment.scaled(direction, scale)
        scored = alignment.token_scores(model, batch, direction, **settings)
        alignment.check(f"step {step}, for the optimiser", self.method, w, scored, ascent, direction)
        return scored[1], cosines

    def _moved(self, run, step: int, model: PreTrainedModel, direction: alignment.Direction) -> float:
        """<d, update from this checkpoint to the next one>; NaN at the last."""
        following = [s for s in self.run.steps() if s > step]
        if not following:
            return float("nan")
        after = dict(recipes.load_checkpoint(run, following[0])[0].named_parameters())
        before = dict(model.named_parameters())
        # what stays where it is has not moved, though it is -inf
        update = {
            name: torch.where(after[name] == p, 0.0, after[name] - p).detach()
            for name, p in before.items()
            if name in direction
        }
        return alignment.inner(direction, update).item()
