"""Learning rates chosen by one rule for all methods: the rate whose best checkpoint earns most on validation prompts.

Nothing else reads these prompts.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from ..lab import online, ppo, recipes
from ..lab.evaluate import reply
from ..lens.batch import pad
from .stats import require_columns

if TYPE_CHECKING:
    from ..lab.runs import RunStore


class ValidationRun(recipes.Spec):
    """What a training run's policies earn with sampled replies to the validation prompts, at every checkpoint.

    By the true reward where it is known, else by a reward model of the pairs.
    """

    kind: Literal["validation"] = "validation"
    run: recipes.PairRun | online.OnlineRun | ppo.PPORun
    reward: ppo.RewardRun | None  # None: the world's true reward
    samples: int  # replies to a prompt

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *([self.reward] if self.reward else [])]

    def work(self) -> float:
        return 0.3 * self.run.data.validation * self.samples * len(self.run.steps())

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write validation.parquet: step, prompt (its number), reward (points, of one reply)."""
        spec, run = self.run.data, store.get(self.run)
        _, tokenizer = recipes.final_policy(run)
        prompts = recipes.dataset(spec).prompts["validation"]
        if not prompts:
            raise ValueError(
                f"validation={spec.validation}: none of these prompts can be used, so nothing can be chosen"
            )
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        score = ppo.scorer(store, tokenizer, spec, self.reward)
        number = {prompt: i for i, prompt in enumerate(prompts)}
        tables = []
        for step in self.run.steps():
            model, _ = recipes.load_checkpoint(run, step)
            ids, answers = reply(model, tokenizer, asked, temperature=1.0, seed=0, **limits)
            parts = pad(ids, answers, tokenizer.pad_token_id).to(model.device).slices(256)
            each = zip(parts, range(0, len(asked), 256), strict=True)
            points = [x for part, first in each for x in score(asked[first : first + 256], part).tolist()]
            tables.append(
                pd.DataFrame({"step": step, "prompt": [number[prompt] for prompt in asked], "reward": points})
            )
            tick(self.work() / len(self.run.steps()))
        pd.concat(tables, ignore_index=True).to_parquet(folder / "validation.parquet")


def chosen(grid: pd.DataFrame, by: str = "method") -> pd.DataFrame:
    """For each method the learning rate that earns most on validation prompts; of equals the smallest.

    Args: grid, with the columns `by`, lr and reward, a row a rate. Returns `by`, lr, reward, and at_edge: whether it is
    the largest or the smallest rate tried, so that a better one may lie beyond. Raises ValueError where methods were
    not tried at the same number of rates, or a reward is not known: the effort would not be equal.
    """
    require_columns(grid, [by, "lr", "reward"])
    tried = grid.groupby(by)["lr"].nunique()
    if tried.nunique() > 1 or len(grid) != tried.sum():
        raise ValueError(f"chosen: the effort is not equal, rates tried a method: {tried.to_dict()}")
    if grid["reward"].isna().any():
        raise ValueError(f"chosen: no reward is known of {grid.loc[grid['reward'].isna(), by].iloc[0]}")
    rows = []
    for name, one in grid.reset_index(drop=True).sort_values("lr", kind="stable").groupby(by, sort=False):
        best = one.loc[one["reward"].idxmax()]
        edge = len(one) > 1 and best["lr"] in (one["lr"].min(), one["lr"].max())
        rows.append({by: name, "lr": float(best["lr"]), "reward": float(best["reward"]), "at_edge": bool(edge)})
    return pd.DataFrame(rows, columns=[by, "lr", "reward", "at_edge"])


def means(store: "RunStore", specs: Iterable[tuple[str, ValidationRun]]) -> pd.DataFrame:
    """The table that `chosen` reads, kept in the store: method (as it is called), lr, reward and step.

    reward: mean over replies at the checkpoint, `step`, at which it is largest.
    """
    rows = []
    for name, spec in specs:
        by_step = store.get(spec).frame("validation").groupby("step")["reward"].mean()
        best = {"reward": by_step.max(), "step": int(by_step.idxmax())}
        rows.append({"method": name, "lr": spec.run.optimisation.lr, **best})
    return pd.DataFrame(rows)
