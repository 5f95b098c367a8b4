"""What the weights of an objective go to: tables of omega (a pair's, in DPO) and of |advantage| (a token's, in PPO).

Pure functions over the tables of alignment runs, gathered over seeds (column `seed`).
"""

import pandas as pd
import torch

from ..lens.controls import THIRDS, thirds
from .stats import auc, rank_correlation

RUN = ["seed", "step"]


def with_thirds(table: pd.DataFrame, strength: str) -> pd.DataFrame:
    """`table` with a column `third` of names, within each seed and step by the column `strength` (dimensionless).

    Numbers of `controls.thirds` that are there already are named; rows of a step without thirds are left out.
    """
    if "third" in table:
        number = table["third"]
    else:
        number = table.groupby(RUN)[strength].transform(lambda x: thirds(torch.tensor(x.to_numpy())).numpy())
    named = table.assign(third=number.map(dict(enumerate(THIRDS))))
    return named[named["third"].notna()]


def spread(table: pd.DataFrame, strength: str) -> pd.DataFrame:
    """Median, smallest and largest `strength` by seed, step and third (of `with_thirds`), in that column's unit."""
    groups = table.groupby([*RUN, "third"], observed=True)[strength]
    return groups.agg(median="median", smallest="min", largest="max", n="size").reset_index()


def signal(sequences: pd.DataFrame, pairs: dict[int, list[dict]]) -> pd.DataFrame:
    """What omega goes to, by seed and step, where the truth about the pairs is known.

    Args: sequences, of `with_thirds`: seed, step, example, omega. pairs, for each seed the rows (reward_chosen,
    reward_rejected in points, flipped) of which `example` is the number.
    Returns correlation: Spearman's of omega and true gap (reward of chosen minus rejected); auc_flipped: of omega for
    labels that were turned round; auc_worse: for pairs whose chosen response has the lower reward; share_flipped: of
    pairs that were turned round; weight_flipped: their share of the sum of omega; worse_top, worse_middle,
    worse_bottom: share of pairs of each third whose chosen response has the lower reward.
    """
    rows = []
    for (seed, step), one in sequences.groupby(RUN):
        known = pd.DataFrame(pairs[seed]).iloc[one["example"]]
        gap = (known["reward_chosen"] - known["reward_rejected"]).to_numpy()
        flipped, omega = known["flipped"].to_numpy(bool), one["omega"].to_numpy()
        found = {
            "correlation": rank_correlation(omega, gap),
            "auc_flipped": auc(omega, flipped),
            "auc_worse": auc(omega, gap < 0),
            "share_flipped": flipped.mean(),
            "weight_flipped": omega[flipped].sum() / omega.sum(),
        }
        found |= {f"worse_{third}": (gap[one["third"] == third] < 0).mean() for third in THIRDS}
        rows.append({"seed": seed, "step": step, **found})
    return pd.DataFrame(rows)


def top_share(tokens: pd.DataFrame, by: str) -> pd.DataFrame:
    """Share of each group's tokens that are in the top third, by seed and step; `tokens`: how many the group has."""
    groups = tokens.assign(top=tokens["third"] == "top").groupby([*RUN, by], observed=True)["top"]
    return groups.agg(share="mean", tokens="size").reset_index()


def push(tokens: pd.DataFrame, by: str) -> pd.DataFrame:
    """Where groups of tokens push, by seed and step.

    Returns g: sum of w * a (the unit of G, over the tokens given); weight: sum of |w|; direction: g / weight, the score
    per unit of weight, which does not depend on how large the weights are; tokens: how many.
    """
    products = tokens.assign(g=tokens["w"] * tokens["a"], weight=tokens["w"].abs())
    table = products.groupby([*RUN, by], observed=True).agg(
        g=("g", "sum"), weight=("weight", "sum"), tokens=("g", "size")
    )
    return table.assign(direction=table["g"] / table["weight"]).reset_index()
