"""Do two directions agree? Whether G tells what is earned, whether d_R does, and where both part.

Pure functions over the tables of earning runs (`findings.earning`), of several seeds under each other (column `seed`).
"""

import math

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from .stats import Estimate, mean_interval, require_columns

READINGS = ("g", "g_opt", "cosine", "cosine_opt")


def side_by_side(
    earning: pd.DataFrame, towards: str = "reward", reading: str = "g", part: str = "full"
) -> pd.DataFrame:
    """G towards the final responses and towards a reward, a row a seed and checkpoint: seed, step, final, `towards`.

    Args: earning, with the columns seed, step, towards, part and `reading`, one of READINGS. towards, "reward" or
    "learned". Raises ValueError for another reading and where one of the two was not measured.
    """
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r}: must be one of {', '.join(READINGS)}")
    require_columns(earning, ["seed", "step", "towards", "part", reading])
    own = earning[earning["part"] == part]
    wide = own.pivot(index=["seed", "step"], columns="towards", values=reading)
    if missing := [name for name in ("final", towards) if name not in wide]:
        raise ValueError(f"part={part!r}: nothing was measured towards {missing[0]}; there are {', '.join(wide)}")
    return wide[["final", towards]].reset_index().rename_axis(columns=None)


def agreement(
    earning: pd.DataFrame,
    towards: str = "reward",
    reading: str = "g",
    part: str = "full",
    level: float = 0.95,
    changes: bool = False,
) -> Estimate:
    """Correlation over checkpoints of G towards the final responses and towards a reward: mean and interval over seeds.

    Pearson's, one a seed, the interval cut at -1 and 1; a seed of fewer than three checkpoints, or in which one of both
    is constant, is left out. Checkpoints follow each other, so that a common decay makes a correlation too: it says
    that both fall together, not that one causes the other. changes: correlate the changes from checkpoint to
    checkpoint, which a common trend does not make. Arguments and errors as for `side_by_side`; NaN where no seed is
    left.
    """
    wide = side_by_side(earning, towards, reading, part).sort_values(["seed", "step"])
    if changes:
        wide[["final", towards]] = wide.groupby("seed")[["final", towards]].diff()
        wide = wide.dropna()
    found = [_correlation(one["final"], one[towards]) for _, one in wide.groupby("seed")]
    return _over_seeds(found, level, (-1, 1))


def same_side(earning: pd.DataFrame, towards: str = "reward", reading: str = "g", part: str = "full") -> Estimate:
    """Share of checkpoints at which both have the same sign: mean and interval over seeds. As `agreement` otherwise."""
    wide = side_by_side(earning, towards, reading, part)
    shares = (np.sign(wide["final"]) == np.sign(wide[towards])).groupby(wide["seed"]).mean()
    return mean_interval(shares.to_numpy(), within=(0, 1))


def foretold(moved: pd.DataFrame, towards: str = "reward", second_order: bool = False) -> dict[str, Estimate]:
    """Does <d, update> tell the change until the next checkpoint? Slope and correlation, with intervals over seeds.

    slope: of the real change over the predicted one, through the origin (sum xy / sum x^2): 1 if the size is right too.
    It is short of 1 by the noise of d, which adds to x^2. correlation: Pearson's. Each over the intervals of a seed.

    Args: moved, with the columns seed, towards, moved, moved_end, change (of `EarningRun`). second_order: predict by
    the mean of d at both ends of the update, which is right to second order. NaN where nothing is known.
    """
    require_columns(moved, ["seed", "towards", "moved", "moved_end", "change"])
    own = moved[moved["towards"] == towards]
    x = (own["moved"] + own["moved_end"]) / 2 if second_order else own["moved"]
    known = own.assign(x=x).dropna(subset=["x", "change"])
    slopes, correlations = [], []
    for _, one in known.groupby("seed"):
        square = one["x"].pow(2).sum()
        slopes.append((one["x"] * one["change"]).sum() / square if square > 0 else math.nan)
        correlations.append(_correlation(one["x"], one["change"]))
    return {
        "slope": _over_seeds(slopes),
        "correlation": _over_seeds(correlations, 0.95, (-1, 1)),
    }


def tells_change(
    earning: pd.DataFrame, moved: pd.DataFrame, towards: str, reading: str = "g", of: str = "reward"
) -> Estimate:
    """Does G at a checkpoint tell the change of reward until the next one? Correlation, mean and interval over seeds.

    G stands for a rate: its value by the number of updates in between is compared with the real change, over the
    intervals of a seed. Where the learning rate is constant it does not enter a correlation. Args: earning, as for
    `agreement`; moved, with the columns seed, step, towards, change. towards, whose G: "final", "reward" or "learned".
    reading, "g" (a step of gradient descent) or "g_opt" (of the optimiser); or without G, to compare with: "updates",
    a rate that is always the same, and "step", one that falls as 1 / (1 + step). of: which reward changes, "reward" or
    "learned". NaN where no seed has three intervals that vary.
    """
    require_columns(earning, ["seed", "step", "towards", "part", "g"])
    require_columns(moved, ["seed", "step", "towards", "change"])
    own = earning[(earning["part"] == "full") & (earning["towards"] == towards)]
    own = own.assign(updates=1.0, rate=1 / (1 + own["step"]))
    own = own[["seed", "step"]].assign(x=own["rate" if reading == "step" else reading])
    table = own.merge(moved[moved["towards"] == of][["seed", "step", "change"]]).sort_values(["seed", "step"])
    table["width"] = table.groupby("seed")["step"].shift(-1) - table["step"]
    known = table.dropna(subset=["change", "width"])
    found = [_correlation(one["x"] * one["width"], one["change"]) for _, one in known.groupby("seed")]
    return _over_seeds(found, 0.95, within=(-1, 1))


def parting(
    earning: pd.DataFrame, towards: str = "reward", part: str = "full", level: float = 0.95, checkpoints: int = 1
) -> pd.Series:
    """The first checkpoint where a step surely leads to the final responses and surely away from the reward, by seed.

    Surely: G - z se > 0 towards the final responses and G + z se < 0 towards the reward, with z the one-sided normal
    quantile of `level`. That is over-optimisation seen from its gradient: the run still goes where it will end, and it
    costs reward. NaN for a seed in which it does not happen, which is no proof that it does not: an error may hide it.
    (The direction's part of se is of `reward.PARTS` parts, 7 degrees of freedom: where it is most of se, level is a
    little less than it says. se itself is on the large side, see `earning`.)

    Args: earning, with the columns seed, step, towards, part, g, se. checkpoints: how many are looked at together; the
    chance of error of 1 - level is divided by it (Bonferroni), so that with all of a run's checkpoints it is that of a
    false alarm anywhere in the run. Raises ValueError for missing columns or directions.
    """
    require_columns(earning, ["seed", "step", "towards", "part", "g", "se"])
    g = side_by_side(earning, towards, "g", part)
    errors = earning[earning["part"] == part].pivot(index=["seed", "step"], columns="towards", values="se")
    errors = errors[["final", towards]].reset_index()
    z = scipy_stats.norm.ppf(1 - (1 - level) / checkpoints)
    apart = (g["final"] - z * errors["final"] > 0) & (g[towards] + z * errors[towards] < 0)
    first = g[apart].groupby("seed")["step"].min()
    return first.reindex(sorted(g["seed"].unique())).astype(float).rename("step").rename_axis("seed")


def past_peak(
    replies: pd.DataFrame, towards: str = "reward", level: float = 0.95, checkpoints: int = 1
) -> pd.DataFrame:
    """Where each seed's J is largest, and whether it surely earns less at the end: the other sign of over-optimisation.

    Returns seed, peak (step), best, last (J, points), lost (best - last), sure (lost > z sqrt(se^2 + se^2), as if the
    two were independent: prompts are shared, so that it is too careful). The largest of several noisy numbers is too
    large: a small loss is to be expected even where nothing is lost. checkpoints: how many it was picked from, by which
    the chance of error is divided (Bonferroni), as for `parting`. Args: replies, with the columns seed, step, towards,
    reward, se.
    """
    require_columns(replies, ["seed", "step", "towards", "reward", "se"])
    z = scipy_stats.norm.ppf(1 - (1 - level) / checkpoints)
    rows = []
    for seed, one in replies[replies["towards"] == towards].sort_values("step").groupby("seed"):
        best, last = one.loc[one["reward"].idxmax()], one.iloc[-1]
        lost = best["reward"] - last["reward"]
        sure = bool(lost > z * math.hypot(best["se"], last["se"]))
        row = {"seed": seed, "peak": int(best["step"]), "best": best["reward"], "last": last["reward"]}
        rows.append(row | {"lost": lost, "sure": sure})
    return pd.DataFrame(rows, columns=["seed", "peak", "best", "last", "lost", "sure"])


def _correlation(x: pd.Series, y: pd.Series) -> float:
    """Pearson's; NaN for fewer than three values, or where one of both is constant."""
    x, y = x.to_numpy(float), y.to_numpy(float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def _over_seeds(values: list[float], level: float = 0.95, within: tuple[float, float] | None = None) -> Estimate:
    """`mean_interval` of the values that are known; NaN of 0 seeds where none is."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return mean_interval(known, level, within)
