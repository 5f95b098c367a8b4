"""Does G predict? What is predicted to happen to the final responses between checkpoints, and what happened.

Pure functions over the tables of alignment runs (column `seed`) and of the steps of the runs that they measured.
"""

import numpy as np
import pandas as pd

from .stats import rank_correlation, require_columns

PREDICTIONS = {
    "raw": "raw G, times the learning rates",
    "aware": "optimiser-aware G, times the learning rates",
    "update": "inner product of d with the update that was really made",
}


def intervals(alignment: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """What each interval between checkpoints was predicted to bring D', and what it brought: a row a seed and interval.

    Args: alignment, with the columns seed, step, component, g, g_opt, moved, logp_targets; steps, with seed, step, lr
    and, for PPO, updates (optimiser steps an iteration; 1 where the column is missing).
    Returns seed, step (the interval's first), width (steps), rate (the sum of learning rates over its updates), the
    PREDICTIONS of the change in mean log-likelihood of D', and change, what really happened: nats a response.
    """
    require_columns(alignment, ["seed", "step", "component", "g", "g_opt", "moved", "logp_targets"])
    require_columns(steps, ["seed", "step", "lr"])
    full = alignment[alignment["component"] == "full"].sort_values(["seed", "step"])
    columns = ["seed", "step", "width", "rate", *PREDICTIONS, "change"]
    rates = steps.assign(rate=steps["lr"] * steps.get("updates", 1))
    rows = []
    for seed, one in full.groupby("seed"):
        own = rates[rates["seed"] == seed]
        for here, there in zip(one.iloc[:-1].itertuples(), one.iloc[1:].itertuples(), strict=True):
            rate = own.loc[own["step"].between(here.step, there.step - 1), "rate"].sum()
            rows.append(
                {
                    "seed": seed,
                    "step": here.step,
                    "width": there.step - here.step,
                    "rate": rate,
                    "raw": rate * here.g,
                    "aware": rate * here.g_opt,
                    "update": here.moved,
                    "change": there.logp_targets - here.logp_targets,
                }
            )
    return pd.DataFrame(rows, columns=columns)


def quality(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """How well each of the PREDICTIONS tells the change, by the columns `by` (of `intervals`, and others).

    Returns prediction, correlation (Pearson's; NaN where something is constant), rank (Spearman's), sign (share of
    intervals whose sign it tells), ratio (median of change over prediction: 1 if the size is right too) and intervals.
    """
    require_columns(table, [*by, *PREDICTIONS, "change"])
    rows = []
    for key, one in table.groupby(by):
        for name in PREDICTIONS:
            x, y = one[name].to_numpy(), one["change"].to_numpy()
            known = np.isfinite(x) & np.isfinite(y)
            x, y = x[known], y[known]
            varies = len(x) > 1 and x.std() > 0 and y.std() > 0
            rows.append(
                {
                    **dict(zip(by, key, strict=True)),
                    "prediction": name,
                    "correlation": np.corrcoef(x, y)[0, 1] if varies else np.nan,
                    "rank": rank_correlation(x, y),
                    "sign": (np.sign(x) == np.sign(y)).mean() if len(x) else np.nan,
                    "ratio": np.median(y[x != 0] / x[x != 0]) if (x != 0).any() else np.nan,
                    "intervals": len(x),
                }
            )
    return pd.DataFrame(rows)
