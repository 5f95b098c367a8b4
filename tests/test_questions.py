"""Questions over many methods: what is planted is measured, seed by seed, and flips verdicts as the rules say."""

import math
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from prefdyn.findings import claims, questions
from prefdyn.findings.claims import Rule, apply_rule
from prefdyn.findings.questions import QUESTIONS, RULES

ROOT = Path(__file__).resolve().parents[1]
Values = tuple[float, float, float]  # of seeds 0, 1 and 2


def stability(values: Values, column: str, factor: str) -> pd.DataFrame:
    """An effect of one factor, by seed, beside a constant one of the other; two entries a cell, on either side."""
    return pd.DataFrame(
        {"seed": s, "fixed": fixed, "raising": raising, column: 0.4 + other + side}
        for s, effect in enumerate(values)
        for fixed in (True, False)
        for raising in (True, False)
        for other in (effect * (fixed if factor == "fixed" else raising) + 0.3 * (raising if factor == "fixed" else fixed),)
        for side in (-0.1, 0.1)
    )


ORDERS = {1.0: (1, 2, 3), 0.5: (1, 3, 2), -0.5: (2, 3, 1), -1.0: (3, 2, 1)}  # by their rank correlation with 1, 2, 3


def chosen(values: Values) -> pd.DataFrame:
    """Three methods, whose rewards follow the change of chosen log-probs in one of ORDERS."""
    return pd.DataFrame(
        {"seed": s, "chosen": -10.0 * chosen, "reward": -float(reward)}
        for s, value in enumerate(values)
        for chosen, reward in zip((1, 2, 3), ORDERS[value], strict=True)
    )


def over_training(values: Values, column: str) -> pd.DataFrame:
    """A tenth below the value at one checkpoint, a tenth above it at another."""
    return pd.DataFrame({"seed": s, column: part * v} for s, v in enumerate(values) for part in (0.9, 1.1))


def ties(values: Values, column: str) -> pd.DataFrame:
    """0.4 v + 0.1 v over 0.2 + 0.3 is v, though no step has this ratio."""
    return pd.DataFrame(
        {"seed": s, "tied": tied, column: part * v}
        for s, v in enumerate(values)
        for tied, part in ((0.2, 0.4), (0.3, 0.1))
    )


def orpo(values: Values, column: str) -> pd.DataFrame:
    """The whole is better by the value, from where each seed is; the rows come in another order."""
    return pd.DataFrame(
        {"seed": s, "name": name, column: 5.0 + s + more}
        for s, v in reversed(list(enumerate(values)))
        for name, more in (("part", 0.0), ("whole", v))
    )


def same(values: Values) -> pd.DataFrame:
    """Replies are compared once, and this is told of the part alone."""
    return pd.DataFrame(
        {"seed": s, "name": name, "same": share}
        for s, v in enumerate(values)
        for name, share in (("whole", math.nan), ("part", v))
    )


def entropy(values: Values, negatives: float = 0.0, clip: float = 0.0) -> pd.DataFrame:
    """Entropy falls as reward rises; what is lost without a part is so many times the value, and 0.5 in any case."""
    lost = {"whole": lambda v: 0.0, "without negatives": lambda v: negatives * v + 0.5 * (clip == 0 != negatives) * 0}
    lost["without clip"] = lambda v: clip * v
    return pd.DataFrame(
        {"seed": s, "step": t, "name": name, "reward_sampled": float(t), "entropy": 9.0 - t - less(v)}
        for s, v in enumerate(values)
        for name, less in lost.items()
        for t in range(5)
    )
