"""Learning rates chosen by one rule for all methods: what is best on validation prompts, which nothing else reads."""

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
    """What a training run's final policy earns with sampled replies to the validation prompts.

    By the true reward where it is known, else by a reward model of the pairs.
    """

    kind: Literal["validation"] = "validation"
    run: recipes.PairRun | online.OnlineRun | ppo.PPORun
    reward: ppo.RewardRun | None  # None: the world's true reward
    samples: int  # replies to a prompt

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *([self.reward] if self.reward else [])]

    def work(self) -> float:
        return self.run.data.validation * self.samples

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write validation.parquet: prompt (its number), reward (points, of one reply)."""
        spec = self.run.data
        model, tokenizer = recipes.final_policy(store.get(self.run))
        prompts = recipes.dataset(spec).prompts["validation"]
        if not prompts:
            raise ValueError(
                f"validation={spec.validation}: none of these prompts can be used, so nothing can be chosen"
            )
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        ids, answers = reply(model, tokenizer, asked, temperature=1.0, seed=0, **limits)
        score = ppo.scorer(store, tokenizer, spec, self.reward)
        parts = pad(ids, answers, tokenizer.pad_token_id).to(model.device).slices(256)
        each = zip(parts, range(0, len(asked), 256), strict=True)
        points = [score(asked[first : first + 256], part) for part, first in each]
        number = {prompt: i for i, prompt in enumerate(prompts)}
        rows = {"prompt": [number[prompt] for prompt in asked], "reward": [x for part in points for x in part.tolist()]}
        pd.DataFrame(rows).to_parquet(folder / "validation.parquet")
        tick(self.work())


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
    """The table that `chosen` reads: method (as it is called), lr, reward (mean over replies), kept in the store."""
    return pd.DataFrame(
        [
            {"method": name, "lr": s.run.optimisation.lr, "reward": store.get(s).frame("validation")["reward"].mean()}
            for name, s in specs
        ]
    )
