"""The measurement: alignment of an objective with the final responses at every checkpoint of a run, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from . import alignment, controls, ppo, recipes
from .data import Batch
from .objectives import TokenWeights
from .policy import sequence_logps
from .targets import TargetSpec

if TYPE_CHECKING:
    from .runs import RunStore

TOKENS_OF = 256  # examples of a probe whose tokens are kept one by one


def token_table(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    weights: TokenWeights,
    logps: torch.Tensor,
    scores: torch.Tensor,
    examples: int,
    count: int,
) -> pd.DataFrame:
    """A row for each response token of the first `count` of `examples` examples, in order.

    Columns: example; side (0, or for pairs 0 chosen and 1 rejected); position in the response; token (its text);
    logp; w; a (its alignment score); strength of its unit; third (controls.thirds of all units, -1 where undefined).
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
            "strength": values(weights.strength[unit], np.float32),
            "third": values(controls.thirds(weights.strength)[unit], np.int8),
        }
    ).sort_values(["example", "side", "position"])


class AlignmentRun(recipes.Spec):
    """G and its components on one probe, at every checkpoint of a training run."""

    kind: Literal["alignment"] = "alignment"
    run: recipes.SFTRun | recipes.DPORun | ppo.PPORun
    targets: TargetSpec
    probe: Literal["train", "check"]
    size: int  # examples measured at most: pairs for DPO, demonstrations for SFT, replies for PPO
    method: Literal["forward", "central"]

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        rows = self.size * (1 if self.run.kind == "sft" else 2)
        return 1.6 * rows * len(self.run.steps())  # a measured row costs about 1.6 trained ones

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write alignment, sequences and tokens (parquet), with a row a step and, in turn, component, example, token.

        Columns of alignment: step, component, g, se, n, logp_targets.
        Columns of sequences: step, example, and its contribution to each component; for DPO also omega, margin,
        and the scores of its chosen and rejected response.
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
        batch = objective.batch(index)
        direction = alignment.target_direction(model, targets, self.targets.reduction)
        logps, scores = alignment.token_scores(model, batch, direction, self.method, temperature=objective.temperature)
        weights = objective.weights(logps, batch, index)
        rows = {name: alignment.by_sequence(weights, scores, name) for name in controls.CONTROLS}
        # an example's rows (the two responses of a pair) are one unit of sampling
        examples = {name: g.reshape(-1, len(index)).sum(0).double().cpu().numpy() for name, g in rows.items()}
        n = len(index)
        summary = pd.DataFrame(
            {
                "component": list(examples),
                "g": [g.sum() for g in examples.values()],
                "se": [np.sqrt(n * g.var(ddof=1)) for g in examples.values()],
                "n": n,
                "logp_targets": sequence_logps(model, targets).mean().item(),
            }
        )
        sequences = {"example": np.arange(n, dtype=np.int32)}
        sequences |= {k: g.astype(np.float32) for k, g in examples.items()}
        if self.run.kind == "dpo":
            chosen, rejected = scores.sum(-1).chunk(2)
            sequences |= {
                "omega": weights.strength.float().cpu().numpy(),
                "margin": objective.margin(logps, index).float().cpu().numpy(),
                "a_chosen": chosen.float().cpu().numpy(),
                "a_rejected": rejected.float().cpu().numpy(),
            }
        tokens = token_table(batch, tokenizer, weights, logps, scores, n, TOKENS_OF)
        return {"alignment": summary, "sequences": pd.DataFrame(sequences), "tokens": tokens}
