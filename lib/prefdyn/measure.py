"""The measurement: alignment of an objective with the final responses at every checkpoint of a run, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from . import alignment, controls, ppo, recipes
from .data import Batch, pad
from .evaluate import reply
from .objectives import TokenWeights
from .policy import sequence_logps

if TYPE_CHECKING:
    from .runs import RunStore


class TargetSpec(recipes.Spec):
    """How the final responses D' are drawn: a declared choice, since the paper's text leaves it open."""

    prompts: Literal["held_out", "train"] = "held_out"
    decoding: Literal["greedy", "sampled"] = "greedy"
    reduction: Literal["sum", "mean"] = "sum"
    count: int = 384  # prompts at most


class AlignmentRun(recipes.Spec):
    """G and its components on one probe, at every checkpoint of a training run."""

    kind: Literal["alignment"] = "alignment"
    run: recipes.SFTRun | recipes.DPORun | ppo.PPORun
    targets: TargetSpec
    probe: Literal["train", "check"]
    size: int  # examples measured at most: pairs for DPO, demonstrations for SFT
    method: Literal["forward", "central"]

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        rows = self.size * (1 if self.run.kind == "sft" else 2)
        return 2.4 * rows * len(self.run.steps())  # a measured row costs about 2.4 trained ones: G and one gradient

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write alignment.parquet (a row a step and component) and sequences.parquet (a row a step and example).

        Columns of alignment: step, component, g, se, n, cosine (of the full objective, on the second
        probe), logp_targets.
        Columns of sequences: step, example, and its contribution to each component; for DPO also omega, margin,
        and the scores of its chosen and rejected response.
        """
        run = store.get(self.run)
        model, tokenizer = recipes.final_policy(run)
        targets = self._targets(model, tokenizer)
        prober = self.run.prober(store, tokenizer, self.probe, self.size)
        summaries, sequences = [], []
        for step in self.run.steps():
            part_summary, part_sequences = self._at(run, step, prober, targets)
            summaries.append(part_summary)
            sequences.append(part_sequences)
            tick(self.work() / len(self.run.steps()))
        pd.concat(summaries, ignore_index=True).to_parquet(folder / "alignment.parquet")
        pd.concat(sequences, ignore_index=True).astype({"step": "int32"}).to_parquet(folder / "sequences.parquet")

    def _targets(self, model, tokenizer) -> Batch:
        """D': what the final policy answers."""
        spec = self.run.data
        prompts = recipes.dataset(spec).prompts[self.targets.prompts][: self.targets.count]
        temperature = 0.0 if self.targets.decoding == "greedy" else 1.0
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        asked, answers = reply(model, tokenizer, prompts, temperature=temperature, seed=0, **limits)
        return pad(asked, answers, tokenizer.pad_token_id).to(model.device)

    def _cosine(self, model, batch: Batch, weights: TokenWeights, direction: alignment.Direction) -> float:
        """Cosine of the descent direction of the full objective with d. It costs a backward pass over the probe."""
        ascent = alignment.gradient(model, zip(batch.slices(256), weights.w.split(256), strict=True))
        length = alignment.norm(ascent) * alignment.norm(direction)
        return (alignment.inner(ascent, direction) / length).item() if length > 0 else float("nan")

    def _at(self, run, step: int, prober: recipes.Prober, targets: Batch):
        """Both tables at one checkpoint."""
        model, _ = recipes.load_checkpoint(run, step)
        objective, index = prober(step, model)
        batch = objective.batch(index)
        direction = alignment.target_direction(model, targets, self.targets.reduction)
        logps, scores = alignment.token_scores(model, batch, direction, self.method)
        weights = objective.weights(logps, batch, index)
        rows = {name: alignment.by_sequence(weights, scores, name) for name in controls.CONTROLS}
        # an example's rows (the two responses of a pair) are one unit of sampling
        examples = {name: g.reshape(-1, len(index)).sum(0).double().cpu().numpy() for name, g in rows.items()}
        n = len(index)
        summary = pd.DataFrame(
            {
                "step": step,
                "component": list(examples),
                "g": [g.sum() for g in examples.values()],
                "se": [np.sqrt(n * g.var(ddof=1)) for g in examples.values()],
                "n": n,
            }
        )
        cosine = self._cosine(model, batch, weights, direction) if self.probe == "check" else float("nan")
        summary["cosine"] = np.where(summary["component"] == "full", cosine, np.nan)
        summary["logp_targets"] = sequence_logps(model, targets).mean().item()
        table = {"step": step, "example": np.arange(n, dtype=np.int32)} | {
            k: g.astype(np.float32) for k, g in examples.items()
        }
        if self.run.kind == "dpo":
            chosen, rejected = scores.sum(-1).chunk(2)
            table |= {
                "omega": weights.strength.float().cpu().numpy(),
                "margin": objective.margin(logps, index).float().cpu().numpy(),
                "a_chosen": chosen.float().cpu().numpy(),
                "a_rejected": rejected.float().cpu().numpy(),
            }
        return summary, pd.DataFrame(table)
