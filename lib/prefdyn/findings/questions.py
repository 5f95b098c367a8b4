"""Questions that need more than two methods, and the rules that answer them.

They were written down before the chapter that asks them had been run. What was known: the chapters about DPO and PPO,
and the reward and divergence at the end of training, one seed, of DPO, SimPO, KTO, ORPO, GRPO and best of n at four
learning rates, from which the rates to try were taken.
"""

import math
from collections.abc import Callable

import pandas as pd

from . import stats
from .claims import SMALL_EFFECT, Rule
from .stats import Estimate

FEW = 5  # methods: of fewer, an order by chance is too likely (1 of 24 orders of four)
QUESTIONS = {
    "Q1": "Are stable targets a matter of fixed data, or of raising without lowering?",
    "Q2": "Does it cost anything when the log-probs of chosen responses fall?",
    "Q3": "GRPO's loss is 0 by construction: what do its steps do?",
    "Q4": "What do groups of replies do that all earn the same?",
    "Q5": "Does ORPO's preference term change anything beside its likelihood term?",
    "Q6": "Who keeps entropy in an online method: negative samples, or the clip?",
}


def _effect(column: str, factor: str) -> Callable[[pd.DataFrame], Estimate]:
    """Main effect of a factor (true minus false) on a column: mean over the other factor's levels, a value a seed."""
    other = {"fixed": "raising", "raising": "fixed"}[factor]

    def measure(table: pd.DataFrame) -> Estimate:
        cells = table.groupby(["seed", other, factor])[column].mean().unstack(factor)
        if cells.shape != (2 * table["seed"].nunique(), 2) or cells.isna().any(axis=None):  # a cell is missing
            return Estimate(math.nan, math.nan, math.nan, 0)
        return stats.mean_interval((cells[True] - cells[False]).groupby("seed").mean())

    return measure


def _chosen_and_reward(table: pd.DataFrame) -> Estimate:
    """Rank correlation over methods between the change of chosen log-probs and reward, a value a seed.

    Of fewer than FEW methods a rank correlation says nothing.
    """
    seeds = [one for _, one in table.groupby("seed") if len(one) >= FEW]
    found = [stats.rank_correlation(one["chosen"], one["reward"]) for one in seeds]
    known = [value for value in found if math.isfinite(value)]
    return stats.mean_interval(known, within=(-1, 1)) if known else Estimate(math.nan, math.nan, math.nan, 0)


def _mean(column: str, within: tuple[float, float] | None = None) -> Callable[[pd.DataFrame], Estimate]:
    """Mean over seeds of the mean of a column."""
    return lambda table: stats.mean_interval(table.groupby("seed")[column].mean(), within=within)


def _ratio(column: str, to: str) -> Callable[[pd.DataFrame], Estimate]:
    """Mean over seeds of a column's sum over another one's; seeds where that is 0 say nothing."""

    def measure(table: pd.DataFrame) -> Estimate:
        sums = table.groupby("seed")[[column, to]].sum().query(f"{to} > 0")
        return stats.mean_interval(sums[column] / sums[to]) if len(sums) else Estimate(math.nan, math.nan, math.nan, 0)

    return measure


def _difference(column: str) -> Callable[[pd.DataFrame], Estimate]:
    """The whole method minus the one without its part, paired by seed."""
    return lambda table: stats.differences(table, "name", "whole", "part", [column])[column]


def _entropy_kept(part: str) -> Callable[[pd.DataFrame], Estimate]:
    """Entropy of the whole method minus that of the one without `part`, at equal reward."""
    return lambda table: stats.at_equal(table, "reward_sampled", "entropy", "name", "whole", part)


def _negatives_against_clip(table: pd.DataFrame) -> Estimate:
    """The entropy that negative samples keep minus the entropy that the clip keeps, at equal reward, by seed."""
    kept = [_entropy_kept(part)(table).values for part in ("without negatives", "without clip")]
    return stats.mean_interval([one - other for one, other in zip(*kept, strict=True)])


STABLE = ("seed", "fixed", "raising")
ENTROPY = ("seed", "step", "name", "reward_sampled", "entropy")
RULES = (
    Rule(
        "Q1", "Q1a", "G is surely positive more often on fixed data than on fresh replies (difference of shares)",
        "if fixed data makes targets stable; mean over methods with and without lowering",
        "stability", (), (*STABLE, "share"), _effect("share", "fixed"), "above", 0.0, "09-methods#fig-stability",
    ),
    Rule(
        "Q1", "Q1b", "and more often where nothing is lowered (difference of shares)",
        "if supervised form does; mean over fixed data and fresh replies",
        "stability", (), (*STABLE, "share"), _effect("share", "raising"), "above", 0.0, "09-methods#fig-stability",
    ),
    Rule(
        "Q1", "Q1c", "the cosine is larger on fixed data (mean over training)",
        "a share of checkpoints has a ceiling, a cosine has none that is near",
        "stability", (), (*STABLE, "cosine"), _effect("cosine", "fixed"), "above", 0.0, "09-methods#fig-stability",
    ),
    Rule(
        "Q1", "Q1d", "and larger where nothing is lowered",
        "the same for the other factor",
        "stability", (), (*STABLE, "cosine"), _effect("cosine", "raising"), "above", 0.0, "09-methods#fig-stability",
    ),
    Rule(
        "Q2", "Q2a", "methods whose chosen log-probs fall further earn less (rank correlation over methods)",
        "the worry: what should be raised is lost; each method with its own learning rate",
        "chosen", (), ("seed", "chosen", "reward"), _chosen_and_reward, "above", 0.0, "09-methods#fig-chosen",
    ),
    Rule(
        "Q3", "Q3a", "GRPO's weights cancel (size of their sum by the sum of their sizes)",
        "minus their sum is the loss where ratios are 1: it says nothing of the step",
        "grpo", (), ("seed", "net"), _mean("net", (0, 1)), "below", 0.01, "09-methods#fig-grpo",
    ),
    Rule(
        "Q3", "Q3b", "though its G is surely positive at more than half of the checkpoints (share)",
        "the weights that cancel stand on tokens that differ in alignment",
        "grpo", (), ("seed", "sure"), _mean("sure", (0, 1)), "above", 0.5, "09-methods#fig-grpo",
    ),
    Rule(
        "Q4", "Q4a", "groups of equal reward carry weight in GRPO (share of distances in spreads, by share of groups)",
        "their returns differ by the penalty alone, and every spread is scaled to 1; half as much as others counts",
        "ties", (), ("seed", "tied", "tied_relative"), _ratio("tied_relative", "tied"), "above", 0.5,
        "09-methods#fig-ties",
    ),
    Rule(
        "Q4", "Q4b", "and little without the division by the spread, as in Dr. GRPO and RLOO",
        "the penalty is small beside a point of reward",
        "ties", (), ("seed", "tied", "tied_distance"), _ratio("tied_distance", "tied"), "below", 0.5,
        "09-methods#fig-ties",
    ),
    Rule(
        "Q5", "Q5a", "with the preference term final replies are others (share of equal replies)",
        "nine of ten equal replies are the same place, as in C3",
        "orpo", (), ("seed", "name", "same"), lambda t: _mean("same", (0, 1))(t[t["name"] == "part"]), "below", 0.9,
        "09-methods#fig-orpo",
    ),
    Rule(
        "Q5", "Q5b", "and earn more (points, sampled replies)",
        "it is there to tell good from bad; the smallest effect that matters, as in C7",
        "orpo", (), ("seed", "name", "reward_sampled"), _difference("reward_sampled"), "above", SMALL_EFFECT,
        "09-methods#fig-orpo",
    ),
    Rule(
        "Q5", "Q5c", "rejected responses are less likely with it (nats a response)",
        "what it penalises",
        "orpo", (), ("seed", "name", "check_logp_rejected"), _difference("check_logp_rejected"), "below", 0.0,
        "09-methods#fig-orpo",
    ),
    Rule(
        "Q6", "Q6a", "with negative samples entropy is higher at equal reward (nats a reply)",
        "claim C5 of the paper, for GRPO",
        "entropy", (), ENTROPY, _entropy_kept("without negatives"), "above", 0.0, "09-methods#fig-entropy",
    ),
    Rule(
        "Q6", "Q6b", "with the clip too",
        "a clip holds the tokens that move most",
        "entropy", (), ENTROPY, _entropy_kept("without clip"), "above", 0.0, "09-methods#fig-entropy",
    ),
    Rule(
        "Q6", "Q6c", "negative samples keep more of it than the clip (difference)",
        "each switched off alone, at the learning rate of the whole",
        "entropy", (), ENTROPY, _negatives_against_clip, "above", 0.0, "09-methods#fig-entropy",
    ),
)  # fmt: skip
