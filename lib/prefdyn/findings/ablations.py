"""Controlled variants beside their plain method: were conditions equal, what did it change, how fast, at what cost?

Pure functions over the tables of training runs, gathered over variants (column `variant`) and seeds (column `seed`).
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from ..lab.runs import Run
from .paired import Comparison, adjusted, by_seed_and_prompt, crossed_interval, paired, win_rate_interval
from .stats import Estimate, at_equal, mean_interval, require_columns

PLAIN = "plain"  # the method as it is
Measure = Callable[..., np.ndarray]  # `final` or `over_training`


def unequal(run: Run, plain: Run) -> list[str]:
    """What differs between two training runs besides their control; empty if they can be compared.

    Compared are their settings, the weights they start from, the examples of every update in their order, and the
    replies before training.
    """
    found = []
    specs = [r.json("spec") for r in (run, plain)]
    for name in sorted(set(specs[0]) | set(specs[1])):
        if name != "control" and specs[0].get(name) != specs[1].get(name):
            found.append(f"setting {name}")
    starts = [r.json("manifest").get("checkpoint-0.safetensors") for r in (run, plain)]
    if starts[0] is None or starts[0] != starts[1]:
        found.append("weights at the start")
    orders = [r.frame("steps")["examples"].tolist() for r in (run, plain)]
    if orders[0] != orders[1]:
        found.append("order of the data")
    replies = [r.frame("replies").query("step == 0")["reply"].tolist() for r in (run, plain)]
    if replies[0] != replies[1]:
        found.append("replies before training")
    return found


def require_equal(runs: Mapping[tuple[str, int], Run]) -> int:
    """The number of comparisons between variants and the plain method of the same seed, all of them fair.

    Args: runs, (variant, seed) -> run, with (PLAIN, seed) for each seed. Raises ValueError that names a
    variant, its seed and what differs.
    """
    pairs = [(key, run, runs[PLAIN, key[1]]) for key, run in runs.items() if key[0] != PLAIN]
    for (variant, seed), run, plain in pairs:
        if problems := unequal(run, plain):
            raise ValueError(f"variant {variant!r}, seed {seed}, is not comparable: unequal {', '.join(problems)}")
    return len(pairs)


def _of_variant(replies: pd.DataFrame, variant: str, value: str) -> pd.DataFrame:
    require_columns(replies, ["variant", "step", "seed", "index", value])
    own = replies[replies["variant"] == variant]
    if own.empty:
        raise ValueError(f"variant {variant!r}: not in the table; there are {sorted(set(replies['variant']))}")
    return own


def final(replies: pd.DataFrame, variant: str, value: str = "reward") -> np.ndarray:
    """Rewards of a variant's final replies, [seeds, prompts] in points.

    value: "reward" of the greedy reply, or "sampled", that of a sampled one. Raises ValueError for a missing column or
    variant.
    """
    own = _of_variant(replies, variant, value)
    return by_seed_and_prompt(own[own["step"] == own["step"].max()], value)


def over_training(replies: pd.DataFrame, variant: str, value: str = "reward") -> np.ndarray:
    """Mean reward of a variant's replies over training, [seeds, prompts] in points: the area below the curve.

    The mean over steps follows the trapezoidal rule between checkpoints. It is large for what learns early. Arguments
    as for `final`.
    """
    own = _of_variant(replies, variant, value)
    steps = np.sort(own["step"].unique())
    curve = np.stack([by_seed_and_prompt(own[own["step"] == step], value) for step in steps])
    return np.trapezoid(curve, steps, axis=0) / (steps[-1] - steps[0])


def _in_deviations(found: Comparison, y: np.ndarray) -> Estimate:
    """Cohen's d: the difference and its interval in standard deviations of the paired differences y, taken as known."""
    spread, difference = y.std(ddof=1), found.difference
    if not np.isfinite(difference.low):  # one seed
        bounds = (np.nan, np.nan)
    elif spread > 0:
        bounds = (difference.low / spread, difference.high / spread)
    else:
        bounds = (found.effect, found.effect)
    return Estimate(found.effect, *map(float, bounds), difference.n)


def compare(
    replies: pd.DataFrame, variants: Iterable[str], measure: Measure = final, value: str = "reward"
) -> pd.DataFrame:
    """Each variant against the plain method, paired by seed and prompt, with a correction for their number.

    Args: measure, `final` or `over_training`, of the column `value`. Returns a row a variant: variant, difference
    (Estimate, points), effect (Estimate, Cohen's d of the paired differences), win_rate (Estimate, ties half), p, and
    adjusted (for all rows together).
    """
    plain, rows = measure(replies, PLAIN, value), []
    for variant in variants:
        own = measure(replies, variant, value)
        found: Comparison = paired(own, plain)
        rows.append(
            {
                "variant": variant,
                "difference": found.difference,
                "effect": _in_deviations(found, own - plain),
                "win_rate": win_rate_interval(own, plain),
                "p": found.p,
            }
        )
    table = pd.DataFrame(rows, columns=["variant", "difference", "effect", "win_rate", "p"])
    return table.assign(adjusted=adjusted(table["p"].tolist()))


def largest_effect(replies: pd.DataFrame, measure: Measure = final) -> Estimate:
    """Size of the largest difference, of either sign, that any variant makes to the plain method, in points.

    Its bounds are those of intervals at 95% for all variants together (Bonferroni): the largest of their lower bounds
    on |difference| and the largest of their upper ones.
    """
    variants, level = _variants(replies)
    plain = measure(replies, PLAIN)
    return _largest([crossed_interval(measure(replies, v) - plain, level) for v in variants])


def largest_at_equal(curves: pd.DataFrame, x: str, y: str) -> Estimate:
    """The same in `y`, over seeds, where a variant and the plain method have come equally far in `x`.

    As `stats.at_equal` reads it. Args: curves, checkpoints with the columns variant, seed, step, `x` and `y`.
    """
    variants, level = _variants(curves)
    gaps = [at_equal(curves, x, y, "variant", v, PLAIN) for v in variants]
    return _largest([mean_interval(e.values, level) for e in gaps])


def _variants(table: pd.DataFrame) -> tuple[list[str], float]:
    """The variants in a table, and the level of each one's interval so that all hold together at 95% (Bonferroni)."""
    variants = [name for name in pd.unique(table["variant"]) if name != PLAIN]
    if not variants:
        raise ValueError("there is no variant in the table")
    return variants, 1 - 0.05 / len(variants)


def _largest(found: list[Estimate]) -> Estimate:
    """Size of the largest of some differences: the largest of their lower bounds on |difference| and of their upper."""
    biggest = max(found, key=lambda e: abs(e.mean))
    known = np.isfinite(biggest.low)
    return Estimate(
        abs(biggest.mean),
        max(max(0.0, e.low, -e.high) for e in found) if known else np.nan,
        max(max(abs(e.low), abs(e.high)) for e in found) if known else np.nan,
        biggest.n,
    )


def overshoot(curves: pd.DataFrame, value: str) -> pd.DataFrame:
    """How far the last checkpoint is below the best one, by variant and seed: columns variant, seed, overshoot."""
    require_columns(curves, ["variant", "seed", "step", value])
    ordered = curves.sort_values("step").groupby(["variant", "seed"], sort=False)[value]
    return (ordered.max() - ordered.last()).rename("overshoot").reset_index()
