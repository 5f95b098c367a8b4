"""Intervals and summaries; what scipy has is scipy's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval and the number of independent values behind it; prints as "0.63 [0.60, 0.66]".

    values: the independent values themselves, one a seed; prompts: how many prompts each seed answered, 0 where the
    values do not come from prompts. Two estimates are equal if mean, interval and n are.
    """

    mean: float
    low: float
    high: float
    n: int
    values: tuple[float, ...] = field(default=(), compare=False)
    prompts: int = field(default=0, compare=False)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        if not math.isfinite(self.low):
            return f"{self.mean:{spec}} [no interval, n = {self.n}]"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above 0; False where there is no interval."""
        return self.low > 0


def direction(change: Estimate) -> str:
    """A change in words: "rises" or "falls" if its interval excludes 0, else "does not clearly change"."""
    return "rises" if change.low > 0 else "falls" if change.high < 0 else "does not clearly change"


def comparison(difference: Estimate) -> str:
    """A difference in words: "higher" or "lower" if its interval excludes 0, else "not clearly different"."""
    return "higher" if difference.low > 0 else "lower" if difference.high < 0 else "not clearly different"


def require_columns(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError that names the columns which `table` lacks and those that it has."""
    if missing := [str(column) for column in columns if column not in table.columns]:
        have = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"the table has no column {', '.join(missing)}; there are: {have}")


def require_within(values: np.ndarray, within: tuple[float, float] | None) -> None:
    """Raise ValueError that names the first of `values` outside of `within` = (lowest, highest); NaN is let through."""
    if within is not None and (outside := values[(values < within[0]) | (values > within[1])]).size:
        raise ValueError(f"the value {outside[0]:g} is outside of what is possible, {within[0]:g} to {within[1]:g}")


def mean_interval(values: Sequence[float], level: float = 0.95, within: tuple[float, float] | None = None) -> Estimate:
    """Mean of independent values (one a seed) with Student's t interval; no interval from fewer than two.

    Args: within, the lowest and highest possible value, (0, 1) for shares: the interval is cut there. Raises
    ValueError if there is no value, or one outside of `within`.
    """
    x = np.asarray(values, float)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"mean_interval: a list of at least one value is needed, given shape {x.shape}")
    require_within(x, within)
    if x.size == 1:
        return Estimate(float(x[0]), math.nan, math.nan, 1, values=tuple(x.tolist()))
    half = stats.t.ppf((1 + level) / 2, x.size - 1) * stats.sem(x)
    low, high = np.clip([x.mean() - half, x.mean() + half], *(within or (-math.inf, math.inf)))
    return Estimate(float(x.mean()), float(low), float(high), int(x.size), values=tuple(x.tolist()))


def over_seeds(table: pd.DataFrame, by: str | list[str], value: str) -> pd.DataFrame:
    """Mean and interval over seeds of `value` within each group of `by`: columns mean, low, high, n."""
    require_columns(table, [*([by] if isinstance(by, str) else by), value])
    groups = table.groupby(by)[value].apply(lambda x: mean_interval(x.to_numpy()))
    return pd.DataFrame(
        [{"mean": e.mean, "low": e.low, "high": e.high, "n": e.n} for e in groups], index=groups.index
    ).reset_index()


def differences(table: pd.DataFrame, by: str, first: str, second: str, columns: list[str]) -> dict[str, Estimate]:
    """`first` minus `second` (values of the column `by`) for each of `columns`, paired by seed: mean and interval."""
    require_columns(table, ["seed", by, *columns])
    one, other = (table[table[by] == name].set_index("seed")[columns] for name in (first, second))
    return {name: mean_interval((one - other)[name].to_numpy()) for name in columns}


def read_at(path: pd.DataFrame, x: str, y: str, at: float) -> float:
    """`y` where a path has come as far as `at` in `x`, by linear interpolation; NaN where it never comes so far.

    Args: path, rows of one run in the order of training. Where `x` falls back in between, its largest value so far
    counts, and what is read is where it first came to `at`. A path that begins beyond `at` is read at its start.
    """
    far, values = np.maximum.accumulate(path[x].to_numpy(float)), path[y].to_numpy(float)
    reached = np.flatnonzero(far >= at)[:1]
    if not reached.size:
        return math.nan
    around = [max(reached[0] - 1, 0), reached[0]]
    return float(np.interp(at, far[around], values[around]))


def at_equal(table: pd.DataFrame, x: str, y: str, by: str, first: str, second: str) -> Estimate:
    """`first` minus `second` (values of the column `by`) in `y` where both have come equally far in `x`, over seeds.

    Args: table, with the columns seed and step. Each path is read, as by `read_at`, at the largest `x` that both reach.
    """
    require_columns(table, ["seed", "step", by, x, y])
    gaps = []
    for _, one in table.groupby("seed"):
        paths = [one[one[by] == name].sort_values("step") for name in (first, second)]
        far = min(path[x].max() for path in paths)
        ends = [read_at(path, x, y, far) for path in paths]
        gaps.append(ends[0] - ends[1])
    return mean_interval(gaps)


def along(table: pd.DataFrame, x: str, y: str, by: str, first: str, second: str, places: int = 9) -> Estimate:
    """`first` minus `second` (values of the column `by`) in `y`, mean over the stretch of `x` that both cover, by seed.

    Args: table, with the columns seed and step. Each path is read, as by `read_at`, at `places` equally far apart: from
    where the later one begins to where the one that comes less far ends.
    """
    require_columns(table, ["seed", "step", by, x, y])
    gaps = []
    for _, one in table.groupby("seed"):
        paths = [one[one[by] == name].sort_values("step") for name in (first, second)]
        near = max(path[x].iloc[0] for path in paths)
        far = max(near, min(path[x].max() for path in paths))
        read = [[read_at(path, x, y, at) for at in np.linspace(near, far, places)] for path in paths]
        gaps.append(np.mean(read[0]) - np.mean(read[1]))
    return mean_interval(gaps)


def steps_to(table: pd.DataFrame, by: str, value: str, goal: float) -> pd.Series:
    """Where each seed's `value` first reaches `goal` from below: the efficiency of a training run, in units of `by`.

    Args: table, with the columns seed, `by` (steps, say) and `value`, a row a checkpoint, in any order. Between the
    last checkpoint below the goal and the first at or above it, the place is interpolated linearly; a checkpoint
    whose value is unknown is left out. Returns a Series by seed, NaN where the goal is never reached. Raises
    ValueError for a missing column, or where a seed has two rows of one checkpoint.
    """
    require_columns(table, ["seed", by, value])
    if (twice := table.duplicated(["seed", by])).any():
        seed, at = table.loc[twice, ["seed", by]].iloc[0]
        raise ValueError(f"steps_to: seed {seed} has more than one row with {by} = {at}")
    found = {}
    for seed, one in table.sort_values(by).groupby("seed"):
        known = one.dropna(subset=value)
        x, y = known[by].to_numpy(float), known[value].to_numpy(float)
        reached = np.flatnonzero(y >= goal)[:1]
        around = [max(i + j, 0) for i in reached for j in (-1, 0)]
        found[seed] = float(np.interp(goal, y[around], x[around])) if around else math.nan
    return pd.Series(found, name=by, dtype=float).rename_axis("seed")


def judge(found: Estimate, predicted: str, at: float = 0.0) -> str:
    """Whether an interval lies where it was predicted ("above" or "below" `at`), on the other side, or neither."""
    if predicted not in ("above", "below"):
        raise ValueError(f"judge: predicted={predicted!r}; must be 'above' or 'below'")
    sides = {"above": found.low > at, "below": found.high < at}
    if sides[predicted]:
        return "as predicted"
    return "against the prediction" if any(sides.values()) else "undecided"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive has a larger score than a negative, ties half: the area under the ROC curve.

    NaN where all are positive or none is. It is the statistic of Mann and Whitney over the number of pairs.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return math.nan
    pairs = positive.sum() * (~positive).sum()
    return float(stats.mannwhitneyu(scores[positive], scores[~positive]).statistic / pairs)


def sign_summary(
    g: Sequence[float], se: Sequence[float], level: float = 0.95, df: int | None = None
) -> dict[str, float]:
    """How stable the sign of G is over the checkpoints of one run.

    Returns positive, negative: share of checkpoints whose interval g +- z * se lies above, below 0; flips: changes of
    sign between successive checkpoints where both intervals exclude 0. Missing values are left out. z is a normal
    quantile or, with `df` degrees of freedom behind se, Student's.
    """
    g, se = np.asarray(g, float), np.asarray(se, float)
    if g.shape != se.shape:
        raise ValueError(f"sign_summary: g {g.shape} and se {se.shape} differ in shape")
    known = np.isfinite(g) & np.isfinite(se)
    z = (stats.norm if df is None else stats.t(df)).ppf((1 + level) / 2)
    sign = np.where(np.abs(g) > z * se, np.sign(g), 0)[known]
    if sign.size == 0:
        return {"positive": math.nan, "negative": math.nan, "flips": math.nan}
    sure = sign[sign != 0]
    return {
        "positive": float((sign > 0).mean()),
        "negative": float((sign < 0).mean()),
        "flips": float((sure[1:] != sure[:-1]).sum()),
    }


def subsample_sureness(
    sequences: pd.DataFrame, n: int, draws: int = 40, level: float = 0.95, seed: int = 0
) -> pd.Series:
    """How often a probe of `n` examples is sure of the sign that the whole probe gives to G, by step.

    Args: sequences, a table with the columns step, example and full (an example's contribution to G). For each step,
    `draws` subsets of `n` examples are drawn without replacement; one is sure if its normal interval excludes 0 on the
    side of the sum over all. Raises ValueError if `n` is below 2 or above the number of examples.
    """
    require_columns(sequences, ["step", "example", "full"])
    wide = sequences.pivot(index="step", columns="example", values="full")
    steps, wide = wide.index, wide.to_numpy()
    if not 2 <= n <= wide.shape[1]:
        raise ValueError(f"subsample_sureness: n={n} must be between 2 and the {wide.shape[1]} examples")
    rng = np.random.default_rng(seed)
    z = stats.norm.ppf((1 + level) / 2)
    sure = []
    for _ in range(draws):
        drawn = wide[:, rng.permutation(wide.shape[1])[:n]]
        mean, error = drawn.mean(1), drawn.std(1, ddof=1) / math.sqrt(n)
        sure.append(mean * np.sign(wide.sum(1)) > z * error)
    return pd.Series(np.mean(sure, axis=0), index=steps, name="sure")
