"""The final responses D': how they are drawn, and how much G depends on that choice."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lab import online, ppo, recipes
from ..lab.evaluate import reply
from ..lab.train import Objective
from ..lens import alignment, likelihood
from ..lens.batch import Batch, pad
from ..lens.faithful import faithful

if TYPE_CHECKING:
    from ..lab.runs import RunStore

BLOCKS = 8  # parts of a probe whose spread gives the standard error of G


class TargetSpec(recipes.Spec):
    """How D' is drawn: a declared choice, since the paper's text leaves it open.

    responses: "final", what the run's final policy answers to `prompts`; "unrelated", the same answers, each to
    another prompt; "chosen", the chosen responses of the check pairs.
    """

    responses: Literal["final", "chosen", "unrelated"] = "final"
    prompts: Literal["held_out", "train"] = "held_out"
    decoding: Literal["greedy", "sampled"] = "greedy"
    reduction: Literal["sum", "mean"] = "sum"
    count: int = 384  # responses at most

    def draw(self, spec: recipes.DataSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Batch:
        """D' of the final policy `model`."""
        known = recipes.dataset(spec)
        if self.responses == "chosen":
            return recipes.encode(spec, tokenizer, known.check[: self.count], "chosen")
        prompts = known.prompts[self.prompts][: self.count]
        temperature = 0.0 if self.decoding == "greedy" else 1.0
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        asked, answers = reply(model, tokenizer, prompts, temperature=temperature, seed=0, **limits)
        if self.responses == "unrelated":
            answers = answers[1:] + answers[:1]
        return pad(asked, answers, tokenizer.pad_token_id).to(model.device)


def block_gradients(
    model: PreTrainedModel, objective: Objective, index: torch.Tensor
) -> Iterator[tuple[Batch, torch.Tensor, alignment.Direction]]:
    """Yield rows, their weights and the descent direction -grad L of the objective on them, for BLOCKS of examples.

    The directions add up to the whole: weights are those of all examples of `index` together.
    """
    batch = objective.batch(index)
    with torch.no_grad(), faithful(model):
        logps = torch.cat([likelihood.token_logps(model, part, objective.temperature) for part in batch.slices(256)])
    w = objective.weights(logps, batch, index).w
    rows = torch.arange(len(batch), device=w.device).reshape(-1, len(index))  # an example's rows are a column
    for block in torch.arange(len(index), device=w.device).tensor_split(min(BLOCKS, len(index))):
        own = rows[:, block].flatten()
        part = batch.take(own)
        part_w = w[own]
        parts = ((rows, part_w[place]) for place, rows in part.pieces(256))
        yield part, part_w, alignment.gradient(model, parts, objective.temperature)


class TargetsRun(recipes.Spec):
    """G and its cosine with several choices of D', at every checkpoint of a training run; the first one is checked.

    One gradient of the objective serves all choices: G is its inner product with d. The standard error is that of the
    sum over BLOCKS parts of the probe. All directions d are in memory at once.
    """

    kind: Literal["targets"] = "targets"
    run: recipes.SFTRun | recipes.PairRun | online.OnlineRun | ppo.PPORun
    choices: dict[str, TargetSpec]
    probe: Literal["train", "check"]
    size: int  # examples measured at most

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        rows = self.size * (1 if self.run.takes == "demonstrations" else 2)
        return (2.0 * rows + sum(choice.count for choice in self.choices.values())) * len(self.run.steps())

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write targets.parquet: step, choice, n, g, se, cosine, g_opt, cosine_opt, logp (mean of D', nats a response).

        cosine_opt is that of d and the objective's gradient as the optimiser scales it.
        """
        run = store.get(self.run)
        model, tokenizer = recipes.final_policy(run)
        drawn = {name: choice.draw(self.run.data, model, tokenizer) for name, choice in self.choices.items()}
        prober = self.run.prober(store, tokenizer, self.probe, self.size)
        method = alignment.choose_method(model, tokenizer)
        rows = []
        for step in self.run.steps():
            model, _ = recipes.load_checkpoint(run, step)
            objective, index = prober(step, model)
            objective = self.run.trained_on(objective, step)
            for name, measures in self._at(run, step, model, objective, index, drawn, method).items():
                rows.append({"step": step, "choice": name, "n": len(index), **measures})
            tick(self.work() / len(self.run.steps()))
        pd.DataFrame(rows).to_parquet(folder / "targets.parquet")

    def _at(
        self,
        run,
        step: int,
        model: PreTrainedModel,
        objective: Objective,
        index: torch.Tensor,
        drawn: dict[str, Batch],
        method: str,
    ) -> dict[str, dict[str, float]]:
        """Measures of every choice at one checkpoint; token scores of one block check those of the first choice."""
        ways = {
            name: alignment.target_direction(model, drawn[name], choice.reduction)
            for name, choice in self.choices.items()
        }
        parts: dict[str, list[float]] = {name: [] for name in ways}
        whole: alignment.Direction = {}
        for part, w, ascent in block_gradients(model, objective, index):
            if not whole:
                first = next(iter(ways.values()))
                scored = alignment.token_scores(model, part, first, method, temperature=objective.temperature)
                alignment.check(f"step {step}", method, w, scored, ascent, first)
            whole = {name: whole[name] + g for name, g in ascent.items()} if whole else ascent
            for name, way in ways.items():
                parts[name].append(alignment.inner(ascent, way).item())
        aware = alignment.scaled(whole, self.run.step_scale(run, step, whole))
        length, aware_length = alignment.norm(whole).item(), alignment.norm(aware).item()
        found = {}
        for name, way in ways.items():
            g, g_opt, size = np.array(parts[name]), alignment.inner(aware, way).item(), alignment.norm(way).item()
            found[name] = {
                "g": g.sum(),
                "se": np.sqrt(len(g) * g.var(ddof=1)) if len(g) > 1 else np.nan,
                "cosine": g.sum() / (length * size) if length * size > 0 else np.nan,
                "g_opt": g_opt,
                "cosine_opt": g_opt / (aware_length * size) if aware_length * size > 0 else np.nan,
                "logp": likelihood.sequence_logps(model, drawn[name]).mean().item(),
            }
        return found
