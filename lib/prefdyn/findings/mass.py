"""Where probability goes when chosen responses lose it: to better replies, to what no one would say, or to one peak.

A preference loss asks for a difference, so the log-prob of a chosen text may fall while training succeeds. `MassRun`
follows what is said instead; `DisplacementRun` asks which pairs' chosen responses fall, and whether that was to be seen
beforehand (`lens.displacement`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats as distributions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lab import online, others, policy, ppo, recipes
from ..lab.evaluate import reply
from ..lab.world import World
from ..lens import alignment, displacement
from ..lens.batch import Batch, pad
from ..lens.faithful import faithful
from ..lens.likelihood import sequence_logps, token_logps
from .stats import Estimate, auc, mean_interval, require_columns

if TYPE_CHECKING:
    from ..lab.runs import RunStore

GREEDY = "greedy"  # a sort of response beside others.SORTS: what the policy of that step answers
COLUMNS = ("step", "index", "category", "share", "reward", "above")  # of the table `mass`
ALONE = 15  # rows that are trained on in the time that a pair by itself takes
SUMMED = ("reward", *others.KINDS)  # what `outcomes` follows of the replies to a prompt


def by_category(world: World, pair: dict, replies: Sequence[str]) -> list[dict[str, float]]:
    """What replies to the prompt of a pair are, a dict for each of `others.KINDS`, in order; shares sum to 1.

    Args: pair, with prompt, chosen and rejected. share: of the replies that are of the category; reward: their mean
    true reward, NaN where there is none; above: share of all replies that are of the category and earn more than the
    pair's chosen response.
    """
    prompt = world.parse_prompt(pair["prompt"])
    kinds = [others.kind_of(world, prompt, text, pair["chosen"], pair["rejected"]) for text in replies]
    points = [others.standing(world, prompt, text).reward for text in replies]
    bar = others.standing(world, prompt, pair["chosen"]).reward
    rows = []
    for category in others.KINDS:
        own = [x for x, kind in zip(points, kinds, strict=True) if kind == category]
        rows.append(
            {
                "category": category,
                "share": len(own) / len(replies),
                "reward": sum(own) / len(own) if own else math.nan,
                "above": sum(x > bar for x in own) / len(replies),
            }
        )
    return rows


def _worth(mass: pd.DataFrame) -> pd.Series:
    """Share times mean reward of each row, 0 where there are no replies."""
    return (mass["share"] * mass["reward"]).fillna(0.0)


def flow(mass: pd.DataFrame) -> pd.DataFrame:
    """Where probability goes, means over pairs: columns seed, step, category, share, above, change, gained.

    Args: mass, tables of `MassRun` with the column seed. change: of the share since the seed's first step; those of all
    categories sum to 0. gained: what the category has added to the mean true reward since then, in points; they sum
    to its change. Reward is counted from its mean at the first step, so that a category of poorer replies adds by
    shrinking: gained is the change of share * (reward - mean reward at the first step).
    """
    require_columns(mass, ["seed", *COLUMNS])
    table = mass.assign(worth=_worth(mass))
    table = table.groupby(["seed", "step", "category"])[["share", "above", "worth"]].mean().reset_index()
    start = table[table["step"] == table.groupby("seed")["step"].transform("min")]
    level = table["seed"].map(start.groupby("seed")["worth"].sum())
    table["relative"] = table["worth"] - level * table["share"]
    before = start.assign(relative=table.loc[start.index, "relative"]).set_index(["seed", "category"])
    place = pd.MultiIndex.from_frame(table[["seed", "category"]])
    table["change"] = table["share"] - before["share"].loc[place].to_numpy()
    table["gained"] = table["relative"] - before["relative"].loc[place].to_numpy()
    order = table["category"].map({kind: i for i, kind in enumerate(others.KINDS)})
    table = table.assign(order=order).sort_values(["seed", "step", "order"], ignore_index=True)
    return table[["seed", "step", "category", "share", "above", "change", "gained"]]


def moved(responses: pd.DataFrame) -> pd.DataFrame:
    """How log-probs of each sort of response change since the first step, a row a seed, step and sort.

    Args: responses, tables `others` of `MassRun` with the column seed. Columns: seed, step, sort, n (responses there
    are), change (nats a response), change_token (nats a token, the mean over responses of their means), and beside:
    change minus that of the chosen responses of the same pairs, which sorts that not every pair has are to be compared
    by. Of `GREEDY` the text itself changes.
    """
    require_columns(responses, ["seed", "step", "index", "sort", "logp", "tokens"])
    table = responses.assign(each=responses["logp"] / responses["tokens"])
    keys = ["seed", "index", "sort"]
    start = table[table["step"] == table.groupby("seed")["step"].transform("min")].set_index(keys)
    place = pd.MultiIndex.from_frame(table[keys])
    table["change"] = table["logp"] - start["logp"].loc[place].to_numpy()
    table["change_token"] = table["each"] - start["each"].loc[place].to_numpy()
    pair = ["seed", "step", "index"]
    chosen = table[table["sort"] == "chosen"].set_index(pair)["change"]
    table["beside"] = table["change"] - chosen.loc[pd.MultiIndex.from_frame(table[pair])].to_numpy()
    grouped = table.groupby(["seed", "step", "sort"])
    means = grouped[["change", "change_token", "beside"]].mean()
    means.insert(0, "n", grouped.size())
    return means.reset_index()


def outcomes(mass: pd.DataFrame, responses: pd.DataFrame) -> pd.DataFrame:
    """What became of each pair from its seed's first step to its last: is it harm where the chosen response fell?

    Args: the tables `mass` and `others` of `MassRun` with the column seed. Returns a row a seed and index (pair):
    chosen (change of the chosen response's log-prob, nats), reward (change of the mean true reward of the replies to
    its prompt, points) and, for each of `others.KINDS`, the change of its share.
    """
    require_columns(mass, ["seed", *COLUMNS])
    wide = mass.pivot(index=["seed", "step", "index"], columns="category", values="share")
    wide["reward"] = mass.assign(worth=_worth(mass)).groupby(["seed", "step", "index"])["worth"].sum()
    logps = responses[responses["sort"] == "chosen"].set_index(["seed", "step", "index"])["logp"]
    wide["chosen"] = logps.loc[wide.index]
    ordered = wide.sort_index().groupby(["seed", "index"])[["chosen", *SUMMED]]
    return (ordered.last() - ordered.first()).reset_index().rename_axis(columns=None)


def squeezed(peak: pd.DataFrame) -> pd.DataFrame:
    """Means over all tokens: columns seed, step, response, likeliest, own, entropy.

    Args: peak, tables of `MassRun` with the column seed. Where likeliest grows while own falls, probability is squeezed
    into the likeliest tokens (Ren & Sutherland, ICLR 2025).
    """
    names = ["likeliest", "own", "entropy"]
    require_columns(peak, ["seed", "step", "response", "n", *names])
    weighted = peak.assign(**{name: peak[name] * peak["n"] for name in names})
    sums = weighted.groupby(["seed", "step", "response"])[[*names, "n"]].sum()
    return sums[names].div(sums["n"], axis=0).reset_index()


def auc_over_pairs(scores: Sequence[float], falls: Sequence[bool], level: float = 0.95) -> Estimate:
    """Area under the ROC curve with an interval over pairs; no interval where a side has fewer than two of them.

    Its variance is that of DeLong, DeLong & Clarke-Pearson 1988: how much each positive's share of negatives below it
    varies, and each negative's share of positives above. The interval, a normal one, is cut at 0 and 1; a perfect score
    has one of no width.
    """
    scores, falls = np.asarray(scores, float), np.asarray(falls, bool)
    mean, n = auc(scores, falls), len(scores)
    if min(falls.sum(), (~falls).sum()) < 2:
        return Estimate(mean, math.nan, math.nan, n)
    above, below = scores[falls][:, None], scores[~falls][None]
    wins = (above > below) + 0.5 * (above == below)
    error = math.sqrt(sum(x.var(ddof=1) / len(x) for x in (wins.mean(1), wins.mean(0))))
    half = float(distributions.norm.ppf((1 + level) / 2)) * error
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def auc_of_falling(table: pd.DataFrame, score: str, change: str = "change") -> Estimate:
    """How well `score` tells the pairs whose `change` is below 0, larger where they fall: the area under the ROC curve.

    Args: table, with the columns seed, `score` and `change`, a row a pair. The mean over seeds with its interval; of
    one seed, an interval over its pairs (`auc_over_pairs`). Seeds in which all pairs fall or none does tell nothing
    and are left out; NaN where none is left.
    """
    require_columns(table, ["seed", score, change])
    told = {
        seed: one
        for seed, one in table.dropna(subset=[score, change]).groupby("seed")
        if 0 < (one[change] < 0).sum() < len(one)
    }
    if not told:
        return Estimate(math.nan, math.nan, math.nan, 0)
    if len(told) == 1:
        (one,) = told.values()
        return auc_over_pairs(one[score].to_numpy(), (one[change] < 0).to_numpy())
    return mean_interval([auc(one[score], one[change] < 0) for one in told.values()], within=(0, 1))


def _by_position(step: int, response: str, batch: Batch, found: Sequence[torch.Tensor]) -> pd.DataFrame:
    """Means of `displacement.peaks` over the responses that have a token in a place, a row a place."""
    row, column = batch.response.nonzero(as_tuple=True)
    first = batch.response.int().argmax(-1)
    values = {
        name: x[row, column].cpu().numpy() for name, x in zip(("likeliest", "own", "entropy"), found, strict=True)
    }
    tokens = pd.DataFrame({"position": (column - first[row]).cpu().numpy(), **values})
    grouped = tokens.groupby("position")
    means = grouped.mean().assign(n=grouped.size()).reset_index()
    means.insert(0, "response", response)
    means.insert(0, "step", step)
    return means


class MassRun(recipes.Spec):
    """What a run's policies say to the prompts of some pairs, and what other responses to them become, at every step.

    The pairs are not trained on. Replies are sampled at temperature 1.
    """

    kind: Literal["mass"] = "mass"
    run: recipes.SFTRun | recipes.PairRun | online.OnlineRun | ppo.PPORun
    pairs: int  # of the check pairs, at most
    samples: int  # replies to each of their prompts
    data: recipes.DataSpec | None = None  # whose check pairs, for other labels than the run's; None: the run's own

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        return (0.3 * (self.samples + 1) + 2) * self.pairs * len(self.run.steps())

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write mass, others and peak (parquet).

        mass: a row a step, index (pair) and category, those of `by_category`: share, reward, above. Without rows where
        no world is known.
        others: a row a step, index and sort of response (`others.SORTS` and `GREEDY`; a pair without a paraphrase has
        no such row): logp, nats a response, and tokens, its end included.
        peak: a row a step, response ("chosen", or `GREEDY`, the reply of that step) and position in it: means over
        the n responses that are so long of likeliest (the largest probability), own (the token's) and entropy (nats).
        Raises ValueError for fewer than two pairs.
        """
        run, spec = store.get(self.run), self.data or self.run.data
        known = recipes.dataset(spec)
        rows = known.check[: self.pairs]
        texts = others.beside(known.world, known.check[: self.pairs + 1])  # the last one's neighbour too
        asked = [
            {"prompt": row["prompt"], "sort": sort, "index": i, "text": own[i]}
            for i, row in enumerate(rows)
            for sort, own in texts.items()
            if own[i] is not None
        ]
        tables: dict[str, list[pd.DataFrame]] = {"mass": [], "others": [], "peak": []}
        for step in self.run.steps():
            model, tokenizer = recipes.load_checkpoint(run, step)
            for name, table in self._at(step, model, tokenizer, spec, known.world, rows, asked).items():
                tables[name].append(table)
            tick(self.work() / len(self.run.steps()))
        for name, parts in tables.items():
            pd.concat(parts, ignore_index=True).to_parquet(folder / f"{name}.parquet")

    def _at(
        self,
        step: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: recipes.DataSpec,
        world: World | None,
        rows: list[dict],
        asked: list[dict],
    ) -> dict[str, pd.DataFrame]:
        """The tables of one step."""
        n = len(rows)
        prompts = [row["prompt"] for row in rows]
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        heat = [0.0] * n + [1.0] * (n * self.samples)  # greedy replies in the same pass
        every = [*prompts, *(prompt for prompt in prompts for _ in range(self.samples))]
        ids, answers = reply(model, tokenizer, every, temperature=heat, seed=step, **limits)
        said = policy.decode(tokenizer, answers[n:])
        found = [
            {"step": step, "index": i, **row}
            for i, pair in enumerate(rows if world else [])
            for row in by_category(world, pair, said[i * self.samples : (i + 1) * self.samples])
        ]
        fixed = recipes.encode(spec, tokenizer, asked, "text")
        greedy = pad(ids[:n], answers[:n], tokenizer.pad_token_id).to(model.device)
        chosen = torch.tensor([row["sort"] == "chosen" for row in asked], device=model.device)
        sides = {"chosen": fixed.rows(chosen), GREEDY: greedy}
        logps = pd.concat(
            pd.DataFrame(
                {
                    "step": step,
                    "index": index,
                    "sort": sorts,
                    "logp": sequence_logps(model, batch).cpu().numpy(),
                    "tokens": batch.response.sum(-1).cpu().numpy(),
                }
            )
            for batch, index, sorts in (
                (fixed, [row["index"] for row in asked], [row["sort"] for row in asked]),
                (greedy, list(range(n)), GREEDY),
            )
        )
        peak = pd.concat(
            _by_position(step, name, side, displacement.peaks(model, side)) for name, side in sides.items()
        )
        return {"mass": pd.DataFrame(found, columns=list(COLUMNS)), "others": logps, "peak": peak}


class DisplacementRun(recipes.Spec):
    """Which unseen pairs' chosen responses fall, and what was to be seen of it at the SFT start, a row a step and pair.

    The condition and the scores are those of a pair by itself. What it says is tried out on the pair alone, by one step
    of plain gradient descent on the run's own objective and control; whether it says anything of a whole run, in which
    thousands of other pairs are trained on, is what the table is for.
    """

    kind: Literal["displacement"] = "displacement"
    run: recipes.PairRun
    pairs: int  # of the check pairs, at most
    rates: tuple[float, ...] = (1e-3, 1e-2, 1e-1)  # learning rates of the steps on one pair alone

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        return (ALONE + 0.6 * len(self.run.steps())) * self.pairs

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write displacement and alone (parquet).

        displacement: a row a step and index (pair). At the start, the same at every step: gc_gc, gr_gc (see
        `displacement.condition`); condition, gr_gc - gc_gc, and ches and ches_normalised, each the larger the more the
        chosen response should fall; omega, the strength of the pair; one_step, the real change of the chosen log-prob
        by a step of the smallest of `rates` on the pair alone. At the step: change and change_rejected, of the
        log-probs of both responses since the first step. Nats a response. And what else may tell as much, or be what a
        score is really about: tokens, tokens_rejected and, NaN where no true reward is known, reward, reward_rejected.
        alone: a row an index and rate: lr; predicted, to first order; change, the real one, nats.
        """
        run = store.get(self.run)
        steps = self.run.steps()
        model, tokenizer = recipes.load_checkpoint(run, steps[0])
        rows = recipes.dataset(self.run.data).check[: self.pairs]
        chosen, rejected = (recipes.encode(self.run.data, tokenizer, rows, side) for side in recipes.SIDES)
        objective = self.run.trained_on(self.run.probe(store, tokenizer, "check"), steps[0])
        own, shared = displacement.condition(model, chosen, rejected)
        alone, omega = self._alone(model, objective, chosen)
        columns = {
            "gc_gc": own,
            "gr_gc": shared,
            "condition": shared - own,
            "ches": displacement.ches(model, chosen, rejected),
            "ches_normalised": displacement.ches(model, chosen, rejected, normalised=True),
        }
        start = pd.DataFrame({name: x.cpu().numpy() for name, x in columns.items()})
        start.insert(0, "index", np.arange(len(rows)))
        smallest = alone[alone["lr"] == min(self.rates)]
        start["omega"], start["one_step"] = omega, smallest["change"].to_numpy()
        for side, batch, suffix in (("chosen", chosen, ""), ("rejected", rejected, "_rejected")):
            start[f"tokens{suffix}"] = batch.response.sum(-1).cpu().numpy()
            start[f"reward{suffix}"] = [row.get(f"reward_{side}", math.nan) for row in rows]
        tick(ALONE * self.pairs)
        before, tables = None, []
        for step in steps:
            model, _ = recipes.load_checkpoint(run, step)
            logps = np.stack([sequence_logps(model, side).cpu().numpy() for side in (chosen, rejected)])
            before = logps if before is None else before
            table = start.assign(**dict(zip(("change", "change_rejected"), logps - before, strict=True)))
            table.insert(0, "step", step)
            tables.append(table)
            tick(0.6 * self.pairs)
        pd.concat(tables, ignore_index=True).to_parquet(folder / "displacement.parquet")
        alone.to_parquet(folder / "alone.parquet")

    def _alone(self, model: PreTrainedModel, objective, chosen: Batch) -> tuple[pd.DataFrame, list[float]]:
        """The table `alone`, and the strength of each pair when it is trained on alone."""
        rates, rows, omega = sorted(self.rates), [], []
        for i in range(len(chosen)):
            index = torch.tensor([i], device=model.device)
            batch = objective.batch(index)
            with torch.no_grad(), faithful(model):
                weights = objective.weights(token_logps(model, batch), batch, index)
            omega.append(weights.strength.mean().item())
            step = alignment.gradient(model, [(batch, weights.w)])
            slope = alignment.inner(step, displacement.response_gradient(model, chosen, i)).item()
            changes = displacement.after_moving(model, step, rates, chosen.rows(slice(i, i + 1)))
            for lr, change in zip(rates, changes[:, 0].tolist(), strict=True):
                rows.append({"index": i, "lr": lr, "predicted": lr * slope, "change": change})
        return pd.DataFrame(rows), omega
