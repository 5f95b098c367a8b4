"""The ledger: what each claim of the paper predicts, as rules that a computer judges on the evidence that there is.

A rule says which table it reads, what it measures there, and on which side of a threshold the 95% interval must lie.
A claim is judged by all of its rules. Nothing here computes a run: what is missing is "not run".

The thresholds of C1 to C6 follow the predictions at the head of the chapters. When they were written down here, those
chapters' results with seeds 0 to 2 of the easy world were known; other seeds and the hard world are the test. Those of
C7 were written before any controlled variant had been run. Rules with a later date (`Rule.since`) were added when all
results of the easy world were known and before any result of the hard one was, but for rewards and divergences of one
seed, from which the lengths of training were taken; but C6c and C6d, which were added when the chapters on the setting
and on prediction had been seen in a first edition of the hard world.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from . import ablations, stats
from .explore import same_final_replies
from .stats import Estimate

SURE = 0.8  # "nearly every" checkpoint: surely more than four in five
SMALL_SHARE = 0.1  # a half with less than a tenth of G has no part worth the name
SAME_REPLIES = 0.9  # two trainings that agree on nine replies of ten end at the same place
SMALL_EFFECT = 0.2  # points: the smallest difference in reward that would matter to a reader of the replies
SMALL_DISTANCE = 0.2  # nats a reply: the smallest difference in divergence or entropy that would matter
HALF_LEFT = 0.5  # halves of which less than half is left when they are added offset each other
NEARLY_ORTHOGONAL = 0.1  # cosine; more than 84 degrees

FIRST, SECOND = "2026-11-24", "2026-11-25"  # when rules were written

VERDICTS = ("supported", "partly", "not supported", "inconclusive", "not run")


def _surely_positive(g: str, se: str) -> Callable[[pd.DataFrame], Estimate]:
    def measure(table: pd.DataFrame) -> Estimate:
        full = table[table["component"] == "full"].sort_values("step")
        shares = [stats.sign_summary(one[g], one[se])["positive"] for _, one in full.groupby("seed")]
        return stats.mean_interval(shares, within=(0, 1))

    return measure


def _above_floor(table: pd.DataFrame) -> Estimate:
    cosine = table.groupby(["seed", "choice"])["cosine"].mean().unstack()
    return stats.mean_interval(cosine["as declared"] - cosine["responses: unrelated"])


def _negative_share(table: pd.DataFrame) -> Estimate:
    """Share of the negative half in the sizes of both halves of G, mean over checkpoints."""
    size = table.pivot(index=["seed", "step"], columns="component", values="g").abs()
    share = size["negative"] / (size["negative"] + size["positive"])
    return stats.mean_interval(share.groupby("seed").mean(), within=(0, 1))


def _two(table: pd.DataFrame) -> list[str]:
    """The two methods that a table compares, in its order."""
    return list(dict.fromkeys(table["label"]))


def _surer(table: pd.DataFrame) -> Estimate:
    """How much more often the first method is sure of the sign of its G than the second, mean over checkpoints."""
    means = table.groupby(["seed", "label"])["sure"].mean().unstack()
    first, second = _two(table)
    return stats.mean_interval(means[first] - means[second])


def _surer_along(column: str) -> Callable[[pd.DataFrame], Estimate]:
    """The same along the stretch of `column` that both cover."""
    return lambda table: stats.along(table, column, "sure", "label", *_two(table))


def _change(column: str) -> Callable[[pd.DataFrame], Estimate]:
    """Last minus first checkpoint."""

    def measure(table: pd.DataFrame) -> Estimate:
        ordered = table.sort_values("step").groupby("seed")[column]
        return stats.mean_interval(ordered.last() - ordered.first())

    return measure


def _left_by_halves(g: str) -> Callable[[pd.DataFrame], Estimate]:
    """Size of the sum of both halves by the sum of their sizes, mean over checkpoints; 0 where they cancel."""

    def measure(table: pd.DataFrame) -> Estimate:
        parts = table.pivot(index=["seed", "step"], columns="component", values=g)[["positive", "negative"]]
        left = parts.sum(axis=1).abs() / parts.abs().sum(axis=1)
        return stats.mean_interval(left.groupby("seed").mean(), within=(0, 1))

    return measure


def _negative_share_in(*thirds: int) -> Callable[[pd.DataFrame], Estimate]:
    """Share of the negative half in the sizes of both, in one third of training (0 to 2), or one minus another's."""

    def measure(table: pd.DataFrame) -> Estimate:
        size = table.pivot(index=["seed", "step"], columns="component", values="g").abs()
        share = (size["negative"] / (size["negative"] + size["positive"])).rename("share").reset_index()
        third = np.minimum(3 * share["step"] // share["step"].max(), 2)
        means = share.groupby(["seed", third])["share"].mean().unstack()
        if len(thirds) == 1:
            return stats.mean_interval(means[thirds[0]], within=(0, 1))
        return stats.mean_interval(means[thirds[0]] - means[thirds[1]], within=(-1, 1))

    return measure


def _size_of_cosine(table: pd.DataFrame) -> Estimate:
    """Size of the cosine, mean over checkpoints."""
    full = table[table["component"] == "full"]
    return stats.mean_interval(full["cosine"].abs().groupby(full["seed"]).mean(), within=(0, 1))


def _size(found: Estimate) -> Estimate:
    """The same without its sign: an effect of either direction."""
    if found.mean >= 0:
        return found
    return Estimate(-found.mean, -found.high, -found.low, found.n, tuple(-x for x in found.values), found.prompts)


def _change_of(label: str, column: str) -> Callable[[pd.DataFrame], Estimate]:
    """Last minus first checkpoint of the runs that are labelled so."""
    return lambda table: _change(column)(table[table["label"] == label])


def _agreement(half: str) -> Callable[[pd.DataFrame], Estimate]:
    return lambda table: stats.mean_interval(same_final_replies(table, half, "full"), within=(0, 1))


def _full_minus(other: str, column: str) -> Callable[[pd.DataFrame], Estimate]:
    return lambda table: stats.differences(table, "label", "full", other, [column])[column]


def _top_minus_bottom(column: str) -> Callable[[pd.DataFrame], Estimate]:
    return lambda table: stats.differences(table, "third", "top", "bottom", [column])[column]


@dataclass(frozen=True)
class Rule:
    """One computable consequence of a claim.

    says: the prediction. why: why the claim implies it, where its threshold comes from. measure: an Estimate from the
    table named `table` of `methods`, of which it reads `columns`. predicted: the side of `threshold` on which the
    interval must lie. figure: chapter and figure that show it. since: the day on which the rule was written. foil: the
    methods on which the claim would have it fail; a rule that comes out as predicted there too tells nothing apart.
    yardstick: those on which it would have it hold.
    """

    claim: str
    name: str
    says: str
    why: str
    table: str
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    measure: Callable[[pd.DataFrame], Estimate]
    predicted: str  # "above" or "below"
    threshold: float
    figure: str
    since: str = FIRST
    foil: tuple[str, ...] = ()
    yardstick: tuple[str, ...] = ()


G = ("seed", "step", "component")
GAINS = ("variant", "seed", "index", "step", "reward")
PATHS = ("variant", "seed", "step", "kl", "reward_sampled")
HALVES = ("label", "seed", "step", "kl", "reward_sampled")
CLAIMS = {
    "C1": "DPO's updates follow stable targets",
    "C2": "PPO's updates balance exploration and exploitation",
    "C3": "in DPO, positive and negative learning jointly shape the targets",
    "C4": "in DPO, loss reweighting is less a reward signal than a regulariser against overfitting",
    "C5": "in PPO, negative learning supports exploration rather than determining the targets",
    "C6": "in PPO, groups of tokens by absolute advantage have distinct roles",
    "C7": "controlling these dynamics changes efficiency and performance",
}
STATEMENTS = {  # of the paper's first version
    "S1": "the halves of DPO offset each other",
    "S2": "in DPO, positive learning leads early and negative learning later",
    "S3": "without positive learning DPO collapses",
    "S4": "PPO's updates are nearly orthogonal to its final responses",
    "S5": "in PPO, reweighting controls exploration",
}
RULES = (
    Rule(
        "C1", "C1a", "G of DPO is surely positive at nearly every checkpoint (share)",
        "stable targets: each update points at where training ends; nearly every is more than four in five",
        "G", ("dpo",), (*G, "g", "se"), _surely_positive("g", "se"), "above", SURE, "02-targets#fig-g", foil=("ppo",),
        yardstick=("sft",),
    ),
    Rule(
        "C1", "C1b", "so is the optimiser-aware G (share)",
        "G speaks of gradient descent; the claim is about the updates that AdamW makes",
        "G", ("dpo",), (*G, "g_opt", "se_opt"), _surely_positive("g_opt", "se_opt"), "above", SURE, "02-targets#fig-g",
        foil=("ppo",), yardstick=("sft",),
    ),
    Rule(
        "C1", "C1c", "cosine with the final responses above that with responses to other prompts",
        "else the targets would be no more than the style that all replies share",
        "choices of D'", ("dpo",), ("seed", "choice", "cosine"), _above_floor, "above", 0.0, "02-targets#fig-choices",
        foil=("ppo",), yardstick=("sft",),
    ),
    Rule(
        "C2", "C2a", "DPO's G is sure of its sign more often than PPO's, at equal numbers of sequences (difference)",
        "exploration: PPO's updates point at its end less reliably than supervised ones do",
        "sureness", ("dpo", "ppo"), ("label", "seed", "step", "sure"), _surer, "above", 0.0, "02-targets#fig-equal",
    ),
    Rule(
        "C2", "C2d", "the same where both have come equally far from SFT (mean over the KL that both cover)",
        "at equal steps one may have hardly moved and the other be done",
        "sureness", ("dpo", "ppo"), ("label", "seed", "step", "sure", "kl"), _surer_along("kl"), "above", 0.0,
        "02-targets#fig-ground", since=SECOND,
    ),
    Rule(
        "C2", "C2e", "the same where both earn as much (mean over the rewards that both pass)",
        "or one may be good already and the other have all to learn",
        "sureness", ("dpo", "ppo"), ("label", "seed", "step", "sure", "reward_sampled"), _surer_along("reward_sampled"),
        "above", 0.0, "02-targets#fig-ground", since=SECOND,
    ),
    Rule(
        "C2", "C2b", "the true reward of PPO's sampled replies rises (points)",
        "exploitation: what is found is used",
        "curve", ("ppo",), ("seed", "step", "reward_sampled"), _change("reward_sampled"), "above", 0.0,
        "02-targets#fig-ppo", foil=("dpo",),
    ),
    Rule(
        "C2", "C2c", "the entropy of PPO's policy falls (nats a reply)",
        "balance: exploration gives way to exploitation over training",
        "curve", ("ppo",), ("seed", "step", "entropy"), _change("entropy"), "below", 0.0, "02-targets#fig-ppo",
        foil=("dpo",),
    ),
    Rule(
        "C3", "C3a", "negative learning has a part in DPO's G (share of sizes)",
        "jointly: no half is negligible, here less than a tenth",
        "G", ("dpo",), (*G, "g"), _negative_share, "above", SMALL_SHARE, "03-positive-negative#fig-parts",
    ),
    Rule(
        "C3", "C3b", "so has positive learning: the negative share is not all (share of sizes)",
        "the same from the other side",
        "G", ("dpo",), (*G, "g"), _negative_share, "below", 1 - SMALL_SHARE, "03-positive-negative#fig-parts",
    ),
    Rule(
        "C3", "C3c", "without negative learning training ends at other replies (share of equal replies)",
        "a half that can be left out without changing where training ends does not shape it",
        "replies of halves", ("dpo",), ("label", "seed", "index", "step", "reply"), _agreement("positive"), "below",
        SAME_REPLIES, "03-positive-negative#fig-dpo-halves",
    ),
    Rule(
        "C3", "C3d", "without positive learning too (share of equal replies)",
        "the same for the other half",
        "replies of halves", ("dpo",), ("label", "seed", "index", "step", "reply"), _agreement("negative"), "below",
        SAME_REPLIES, "03-positive-negative#fig-dpo-halves",
    ),
    Rule(
        "C4", "C4a", "omega does not follow the true gap in reward (rank correlation, unseen pairs)",
        "a reward signal would give more weight to clearer pairs",
        "omega", ("dpo",), ("seed", "correlation"),
        lambda t: stats.mean_interval(t["correlation"], within=(-1, 1)), "below", 0.0,
        "04-reweighting#fig-omega-signal",
    ),
    Rule(
        "C4", "C4b", "omega is larger where the worse response is the chosen one (AUC, unseen pairs)",
        "a reward signal would give less weight to wrong labels",
        "omega", ("dpo",), ("seed", "auc_worse"),
        lambda t: stats.mean_interval(t["auc_worse"], within=(0, 1)), "above", 0.5,
        "04-reweighting#fig-omega-signal",
    ),
    Rule(
        "C4", "C4c", "past its best: final sampled replies earn more with omega than without (points of true reward)",
        "a regulariser keeps what training too long would lose",
        "with and without omega", ("dpo",), ("label", "seed", "reward_sampled"),
        _full_minus("uniform", "reward_sampled"), "above", 0.0,
        "04-reweighting#fig-uniform",
    ),
    Rule(
        "C4", "C4d", "past its best: accuracy on training minus unseen pairs is smaller with omega (share)",
        "overfitting in the narrow sense",
        "with and without omega", ("dpo",), ("label", "seed", "overfit"), _full_minus("uniform", "overfit"), "below",
        0.0,
        "04-reweighting#fig-uniform-why",
    ),
    Rule(
        "C5", "C5a", "the negative half is the smaller one in PPO's G (share of sizes)",
        "rather than determining the targets: the positive half carries them",
        "G", ("ppo",), (*G, "g"), _negative_share, "below", 0.5, "03-positive-negative#fig-parts", foil=("dpo",),
    ),
    Rule(
        "C5", "C5b", "with negative learning entropy is higher at equal reward (nats a reply)",
        "supports exploration: more is left to be tried",
        "variety of halves", ("ppo",), ("label", "seed", "step", "reward", "entropy"),
        lambda t: stats.at_equal(t, "reward", "entropy", "label", "full", "positive"), "above", 0.0,
        "03-positive-negative#fig-path",
    ),
    Rule(
        "C5", "C5c", "and more kinds of answer are found at equal reward (share)",
        "entropy may be spent on wording; kinds of answer are what exploration should find",
        "variety of halves", ("ppo",), ("label", "seed", "step", "reward", "coverage"),
        lambda t: stats.at_equal(t, "reward", "coverage", "label", "full", "positive"), "above", 0.0,
        "03-positive-negative#fig-path",
    ),
    Rule(
        "C6", "C6a", "the top third of tokens contributes more to G than the bottom third (G of the tokens kept)",
        "distinct roles: the groups do not move the targets alike",
        "roles of thirds", ("ppo",), ("third", "seed", "g"), _top_minus_bottom("g"), "above", 0.0,
        "04-reweighting#fig-advantage-thirds",
    ),
    Rule(
        "C6", "C6b", "also per unit of weight",
        "a group with more weight moves more; a role is more than its size",
        "roles of thirds", ("ppo",), ("third", "seed", "direction"), _top_minus_bottom("direction"), "above", 0.0,
        "04-reweighting#fig-advantage-thirds",
    ),
    Rule(
        "C6", "C6c", "the top third contributes more to G than the bottom third after the first checkpoint too",
        "at the first one |advantage| is largely the position in the reply: a role is more than a start",
        "roles of thirds", ("ppo",), ("third", "seed", "later_g"), _top_minus_bottom("later_g"), "above", 0.0,
        "04-reweighting#fig-advantage-thirds", since=SECOND,
    ),
    Rule(
        "C6", "C6d", "and per unit of weight",
        "the same",
        "roles of thirds", ("ppo",), ("third", "seed", "later_direction"), _top_minus_bottom("later_direction"),
        "above", 0.0, "04-reweighting#fig-advantage-thirds", since=SECOND,
    ),
    Rule(
        "C7", "C7a", "some variant of DPO changes the reward of final greedy replies (points, of either sign)",
        "performance; an effect has to be surely larger than the smallest that matters",
        "variants", ("dpo",), GAINS, ablations.largest_effect, "above", SMALL_EFFECT,
        "05-ablations#fig-ablation-effects",
    ),
    Rule(
        "C7", "C7b", "some variant of PPO does (points, of either sign)",
        "the same for PPO",
        "variants", ("ppo",), GAINS, ablations.largest_effect, "above", SMALL_EFFECT,
        "05-ablations#fig-ablation-effects",
    ),
    Rule(
        "C7", "C7c", "some variant of DPO changes the mean reward of greedy replies over training (points)",
        "efficiency: what learns sooner has earned more on the way",
        "variants", ("dpo",), GAINS, lambda t: ablations.largest_effect(t, ablations.over_training), "above",
        SMALL_EFFECT, "05-ablations#fig-ablation-effects",
    ),
    Rule(
        "C7", "C7d", "some variant of PPO does (points, of either sign)",
        "the same for PPO",
        "variants", ("ppo",), GAINS, lambda t: ablations.largest_effect(t, ablations.over_training), "above",
        SMALL_EFFECT, "05-ablations#fig-ablation-effects",
    ),
    Rule(
        "C7", "C7e", "some variant of DPO earns more or less at equal KL (points, sampled replies)",
        "else the variant is no more than a shorter or a longer way along the same path",
        "curves of variants", ("dpo",), PATHS, lambda t: ablations.largest_at_equal(t, "kl", "reward_sampled"), "above",
        SMALL_EFFECT, "05-ablations#fig-ablation-frontier", since=SECOND,
    ),
    Rule(
        "C7", "C7f", "some variant of PPO does",
        "the same for PPO",
        "curves of variants", ("ppo",), PATHS, lambda t: ablations.largest_at_equal(t, "kl", "reward_sampled"), "above",
        SMALL_EFFECT, "05-ablations#fig-ablation-frontier", since=SECOND,
    ),
    Rule(
        "C7", "C7g", "some variant of DPO needs more or less KL for equal reward (nats a reply)",
        "efficiency: distance from SFT is a price",
        "curves of variants", ("dpo",), PATHS, lambda t: ablations.largest_at_equal(t, "reward_sampled", "kl"), "above",
        SMALL_DISTANCE, "05-ablations#fig-ablation-frontier", since=SECOND,
    ),
    Rule(
        "C7", "C7h", "some variant of PPO does",
        "the same for PPO",
        "curves of variants", ("ppo",), PATHS, lambda t: ablations.largest_at_equal(t, "reward_sampled", "kl"), "above",
        SMALL_DISTANCE, "05-ablations#fig-ablation-frontier", since=SECOND,
    ),
    Rule(
        "S1", "S1a", "less than half of the sizes of DPO's halves of G is left when they are added (share)",
        "offset: they pull in opposite directions; equal and opposite halves would leave nothing",
        "G", ("dpo",), (*G, "g"), _left_by_halves("g"), "below", HALF_LEFT, "03-positive-negative#fig-parts",
        since=SECOND, foil=("ppo",),
    ),
    Rule(
        "S1", "S1b", "so of the optimiser-aware G (share)",
        "the same of the updates that AdamW makes",
        "G", ("dpo",), (*G, "g_opt"), _left_by_halves("g_opt"), "below", HALF_LEFT, "03-positive-negative#fig-parts",
        since=SECOND, foil=("ppo",),
    ),
    Rule(
        "S2", "S2a", "in the first third of training the negative half is the smaller one in DPO's G (share of sizes)",
        "leads early: positive learning is more than half",
        "G", ("dpo",), (*G, "g"), _negative_share_in(0), "below", 0.5, "03-positive-negative#fig-parts", since=SECOND,
    ),
    Rule(
        "S2", "S2b", "in the last third it is the larger one (share of sizes)",
        "and negative learning later",
        "G", ("dpo",), (*G, "g"), _negative_share_in(2), "above", 0.5, "03-positive-negative#fig-parts", since=SECOND,
    ),
    Rule(
        "S2", "S2c", "its share grows from the first third to the last (difference of shares)",
        "roles shift, whichever leads",
        "G", ("dpo",), (*G, "g"), _negative_share_in(2, 0), "above", 0.0, "03-positive-negative#fig-parts",
        since=SECOND, foil=("ppo",),
    ),
    Rule(
        "S3", "S3a", "negative learning alone ends below the SFT policy's reward (points, sampled replies)",
        "collapse: worse than where it began",
        "halves", ("dpo",), HALVES, _change_of("negative", "reward_sampled"), "below", 0.0,
        "03-positive-negative#fig-dpo-halves", since=SECOND,
    ),
    Rule(
        "S3", "S3b", "positive learning alone does not: it ends above it (points, sampled replies)",
        "else it is training for long that collapses, whatever is left out",
        "halves", ("dpo",), HALVES, _change_of("positive", "reward_sampled"), "above", 0.0,
        "03-positive-negative#fig-dpo-halves", since=SECOND,
    ),
    Rule(
        "S4", "S4a", "the cosine of PPO's gradient with the direction of its final responses is small (size, mean)",
        "nearly orthogonal: more than 84 degrees apart",
        "G", ("ppo",), (*G, "cosine"), _size_of_cosine, "below", NEARLY_ORTHOGONAL, "02-targets#fig-cosine",
        since=SECOND, foil=("dpo",),
    ),
    Rule(
        "S5", "S5a", "with all |advantages| made equal, entropy differs at equal reward (nats a reply, of either sign)",
        "controls exploration: without it more, or less, is left to be tried",
        "sizes of advantages", ("ppo",), ("label", "seed", "step", "reward_sampled", "entropy"),
        lambda t: _size(stats.at_equal(t, "reward_sampled", "entropy", "label", "full", "uniform")), "above",
        SMALL_DISTANCE, "04-reweighting#fig-sizes", since=SECOND,
    ),
)  # fmt: skip


def find(name: str) -> Rule:
    """The rule of this name. Raises KeyError."""
    return {rule.name: rule for rule in RULES}[name]


@dataclass(frozen=True)
class Finding:
    """A rule with what was found: its Estimate and verdict, or the reason why there is none.

    evidence: a hash of the table that was judged; findings with the same one rest on the same numbers.
    """

    rule: Rule
    found: Estimate | None
    verdict: str  # one of stats.judge, or "not run"
    reason: str = ""
    evidence: int = 0


def apply_rule(rule: Rule, table: pd.DataFrame) -> Finding:
    """Judge one rule on its table. Raises ValueError that names the rule where a column is missing."""
    missing = [column for column in rule.columns if column not in table]
    if missing:
        raise ValueError(
            f"rule {rule.name}: its table {rule.table!r} has no column {', '.join(missing)}; there are: "
            f"{', '.join(map(str, table.columns))}"
        )
    found = rule.measure(table)
    if not np.isfinite(found.mean):
        return Finding(rule, None, "not run", "what it measures is not known here")
    evidence = int(pd.util.hash_pandas_object(table, index=False).sum())
    return Finding(rule, found, stats.judge(found, rule.predicted, rule.threshold), evidence=evidence)


def judge_all(rules: Iterable[Rule], tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
    """Judge rules on tables by name; a rule whose table is not there is "not run"."""
    missing = "what it needs has not been trained, or is not known here"
    return [
        apply_rule(rule, tables[rule.table]) if rule.table in tables else Finding(rule, None, "not run", missing)
        for rule in rules
    ]


def verdict(findings: Iterable[Finding]) -> str:
    """The verdict on a claim from all of its rules, one of VERDICTS.

    supported: all are as predicted. not supported: at least one is against the prediction, none as predicted. partly:
    some are as predicted, not all. inconclusive: all are undecided. not run: a rule could not be judged.
    """
    found = [finding.verdict for finding in findings]
    if not found or "not run" in found:
        return "not run"
    good, bad = found.count("as predicted"), found.count("against the prediction")
    if good == len(found):
        return "supported"
    return "partly" if good else "not supported" if bad else "inconclusive"


def ledger(findings: Iterable[Finding]) -> dict[str, str]:
    """The verdict on each claim, and on each statement."""
    findings = list(findings)
    return {claim: verdict(f for f in findings if f.rule.claim == claim) for claim in CLAIMS | STATEMENTS}
