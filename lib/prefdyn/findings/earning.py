"""Towards what do updates point: the final responses, the true reward, or a learned one? And where in the model?

The lens with more than one direction at every checkpoint of a run. G with the final responses says whether the run
goes where it will end; G with d_R, the gradient of the expected true reward (`lens.reward`), says whether that is
worth going to; and a learned reward's direction has an angle to the true one.

Where its errors come from. `se` of a component G = <d, -grad L> has two sources, taken as independent since they are
made of different samples: the examples of the probe (the spread of their contributions along d, as in `measure`), and
for a direction of reward its own noise (the spread over `reward.PARTS` parts of the prompts of their inner product with
-grad L). se^2 is the sum of both squares. Each is measured where the other is as noisy as it is, so that the product of
the noises counts twice: se is somewhat too large where both are mostly noise (at worst by sqrt 2), never too small.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lab import online, ppo, recipes
from ..lab.evaluate import reply
from ..lens import alignment, controls, groups, reward
from ..lens.alignment import Direction
from ..lens.batch import Batch, pad
from ..lens.likelihood import sequence_logps
from ..lens.weights import TokenWeights
from . import measure
from .targets import TargetSpec

if TYPE_CHECKING:
    from ..lab.runs import Run, RunStore

TOKENS_OF = 64  # examples of a probe whose tokens are kept one by one
SIGNS = ("positive", "negative")
PARTS = ("full", *SIGNS)
FIRST_SEED = 8_000_000  # of replies; even, and behind those of probes: training's are odd
ROWS = 96  # of a probe a pass: rows of like length together, so that little is computed for padding
TABLES = ("earning", "groups", "directions", "replies", "moved", "tokens")


@dataclass(frozen=True)
class Heading:
    """A direction d at a checkpoint, what is known of its noise (None for final responses), and what it raises.

    levels: the log-likelihood of D' (nats, one number), or the mean reward of the replies to each prompt (points).
    """

    d: Direction
    known: reward.Estimated | None
    levels: np.ndarray

    def along(self, name: str, vector: Direction) -> tuple[float, float]:
        """<d, v> and its standard error, NaN without noise. v is the vector that d was projected on as `name`."""
        return self.known.inner(name) if self.known else (alignment.inner(self.d, vector).item(), math.nan)


@dataclass(frozen=True)
class Reached:
    """What is kept of a heading for the way between checkpoints: its levels, and <d, update> to the next checkpoint
    ("to") and from the last one ("from"), each with its standard error."""

    levels: np.ndarray
    along: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Asked:
    """Held-out prompts, each as often as it is answered, and what replies are scored by: {"reward", "learned"}."""

    prompts: list
    samples: int
    scores: dict[str, ppo.Score]

    def headings(
        self, model: PreTrainedModel, replies: Batch, onto: dict[str, Direction], size: int = 256
    ) -> dict[str, Heading]:
        """Directions towards the rewards of `replies`, one to each of the prompts, projected on the vectors `onto`."""
        places = range(0, len(replies), size)
        found = {}
        for name, score in self.scores.items():
            chunks = zip(places, replies.slices(size), strict=True)
            points = torch.cat([score(self.prompts[at : at + size], part) for at, part in chunks])
            known = reward.estimated(reward.reward_parts(model, replies, points, self.samples), onto)
            by_prompt = points.double().reshape(-1, self.samples).mean(-1).cpu().numpy()
            found[name] = Heading(known.whole, known, by_prompt)
        return found


class EarningRun(recipes.Spec):
    """G towards the final responses, the true reward and a learned one, at every checkpoint of a training run.

    Of the weights that the run's control leaves. Replies are sampled afresh at each checkpoint, at temperature 1.
    """

    kind: Literal["earning"] = "earning"
    run: recipes.SFTRun | recipes.PairRun | online.OnlineRun | ppo.PPORun
    targets: TargetSpec
    prompts: int = Field(ge=2)  # held-out prompts at most
    samples: int = Field(ge=2)  # replies to each
    size: int = Field(ge=2)  # examples of the probe at most, as for `measure.AlignmentRun`
    probe: Literal["train", "check"]
    method: Literal["forward", "central"]
    learned: ppo.RewardRun | None  # a reward model, to measure towards it too

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents(), *([self.learned] if self.learned else [])]

    def work(self) -> float:
        rows = self.size * (1 if self.run.takes == "demonstrations" else 2)
        ways = 2 if self.learned else 1
        # rows trained on in the same time
        return (rows * (2.5 + 1.6 * ways) + self.prompts * self.samples * (1 + ways)) * len(self.run.steps())

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write TABLES (parquet). `towards`: final, reward, learned; `part`: full, positive, negative.

        earning: step, towards, part, g, se, se_probe, se_direction (0 for final), g_opt, cosine, cosine_opt, n
        (examples). g is <d, -grad L> a unit of learning rate, in nats for final, in points for rewards; g_opt the same
        for what the optimiser would make of the part with the scale that the whole gradient meets (as in `measure`;
        before the first update of AdamW that scale is 1 / |gradient|, so that parts which nearly cancel in a parameter
        are huge there, and only that of the whole can be read); cosines are those of d and the part, raw or scaled.
        groups: step, towards, part, group (`lens.groups`), g, g_opt (which add up to those of earning), cosine.
        directions: step, towards, norm (of d), squared (norm, free of noise), reliability, halves (cosine of d by two
        halves of the prompts), to_final, to_reward (cosines of d with the others as they are), angle (cosine with the
        direction of the true reward, free of noise). NaN where it does not apply: d of D' has no noise, given D'.
        replies: step, towards (reward, learned), reward (J: mean, points), se (over prompts), n (replies).
        moved: as `moved_table`. tokens: step and the columns of `measure.token_table`, but in the place of its scores
        a_final, a_reward, a_learned: what raising a token is worth, in nats of D' or in points.

        Raises ValueError where the true reward is not known and no learned one is given, and for fewer than two
        held-out prompts.
        """
        run = store.get(self.run)
        final, tokenizer = recipes.final_policy(run)
        asked = self._asked(store, tokenizer)
        targets = self.targets.draw(self.run.data, final, tokenizer)
        prober = self.run.prober(store, tokenizer, self.probe, self.size)
        of = groups.groups(final)
        tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES if name != "moved"}
        seen: dict[int, dict[str, Reached]] = {}
        for step, model, moves in self._checkpoints(run):
            found, made = self._at(run, step, model, tokenizer, prober, targets, asked, moves, of)
            for name, table in made.items():
                table.insert(0, "step", np.int32(step))
                tables[name].append(table)
            seen[step] = {
                name: Reached(one.levels, {way: one.along(way, move) for way, move in moves.items()})
                for name, one in found.items()
            }
            tick(self.work() / len(self.run.steps()))
        whole = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
        whole["tokens"]["token"] = whole["tokens"]["token"].astype("category")
        whole["moved"] = moved_table(seen)
        for name, table in whole.items():
            table.to_parquet(folder / f"{name}.parquet")

    def _asked(self, store: "RunStore", tokenizer: PreTrainedTokenizerBase) -> Asked:
        """The prompts and what replies to them are rewarded by."""
        spec = self.run.data
        known = recipes.dataset(spec)
        if known.reward is None and self.learned is None:
            raise ValueError(
                "earning: the true reward of this dataset is not known, and no learned one is given, so there is "
                "nothing to earn; give a reward model (learned)"
            )
        prompts = known.prompts["held_out"][: self.prompts]
        if len(prompts) < 2:
            raise ValueError(f"earning: held-out prompts: there is {len(prompts)}; at least 2 are needed")
        models = ({"reward": None} if known.reward is not None else {}) | (
            {"learned": self.learned} if self.learned else {}
        )
        scores = {name: ppo.scorer(store, tokenizer, spec, model) for name, model in models.items()}
        return Asked([prompt for prompt in prompts for _ in range(self.samples)], self.samples, scores)

    def _checkpoints(self, run: "Run") -> Iterator[tuple[int, PreTrainedModel, dict[str, Direction]]]:
        """Yield steps, the policy there, and the updates to the next checkpoint ("to") and from the last ("from").

        Each policy is read once.
        """
        steps = self.run.steps()
        model, moves = recipes.load_checkpoint(run, steps[0])[0], {}
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if following is None:
                yield step, model, moves
                return
            after, _ = recipes.load_checkpoint(run, following)
            to = update_between(model, after)
            yield step, model, moves | {"to": to}
            model, moves = after, {"from": to}

    def _at(
        self,
        run: "Run",
        step: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prober: recipes.Prober,
        targets: Batch,
        asked: Asked,
        moves: dict[str, Direction],
        of: dict[str, str],
    ) -> tuple[dict[str, Heading], dict[str, pd.DataFrame]]:
        """Directions and tables at one checkpoint; scores along every direction are checked by the backward pass."""
        objective, index = prober(step, model)
        objective = self.run.trained_on(objective, step)
        batch, settings = (
            objective.batch(index),
            {"method": self.method, "temperature": objective.temperature, "size": ROWS},
        )
        d = alignment.target_direction(model, targets, self.targets.reduction)
        logps, scores = alignment.token_scores(model, batch, d, **settings)
        weights, scored = objective.weights(logps, batch, index), {"final": scores}
        ways = _descent(model, batch, weights, objective.temperature)
        alignment.check(f"step {step}, towards final", self.method, weights.w, (logps, scores), ways["full"], d)
        limits = {"max_prompt": self.run.data.max_prompt, "max_response": self.run.data.max_response}
        seed = FIRST_SEED + 2 * step
        replies = pad(
            *reply(model, tokenizer, asked.prompts, temperature=1.0, seed=seed, **limits), tokenizer.pad_token_id
        ).to(model.device)
        found = {"final": _final(model, d, targets)} | asked.headings(model, replies, ways | moves)
        for name in asked.scores:
            own = alignment.token_scores(model, batch, found[name].d, **settings)
            alignment.check(f"step {step}, towards {name}", self.method, weights.w, own, ways["full"], found[name].d)
            scored[name] = own[1]
        rows, by_group = _components(ways, self.run.step_scale(run, step, ways["full"]), found, of)
        errors = [
            _errors(weights, scored[row["towards"]], len(index), found[row["towards"]], row["part"]) for row in rows
        ]
        return found, {
            "earning": pd.DataFrame([row | error for row, error in zip(rows, errors, strict=True)])[EARNING],
            "groups": pd.DataFrame(by_group),
            "directions": pd.DataFrame(_direction_rows(found)),
            "replies": pd.DataFrame([_earned(name, found[name], self.samples) for name in asked.scores]),
            "tokens": _tokens(batch, tokenizer, weights, logps, scored, len(index)),
        }


EARNING = ["towards", "part", "g", "se", "se_probe", "se_direction", "g_opt", "cosine", "cosine_opt", "n"]


def update_between(before: PreTrainedModel, after: PreTrainedModel) -> Direction:
    """The update from a checkpoint to another, of what can move. What stays where it is, be it -inf, has not moved."""
    there = dict(after.named_parameters())
    return {
        name: torch.where(there[name] == p, 0.0, there[name] - p).detach()
        for name, p in before.named_parameters()
        if p.requires_grad
    }


def _descent(model: PreTrainedModel, batch: Batch, weights: TokenWeights, temperature: float) -> dict[str, Direction]:
    """-grad L of PARTS of an objective on a probe: a backward pass for each sign, of the rows that have it."""
    ways: dict[str, Direction] = {}
    for sign in SIGNS:
        w = controls.apply(sign, weights)
        rows = (w != 0).any(-1).nonzero().squeeze(-1)
        own, own_w = batch.take(rows), w[rows]
        parts = ((part, own_w[place]) for place, part in own.pieces(ROWS)) if len(rows) else ()
        ways[sign] = alignment.gradient(model, parts, temperature)
    return {"full": {name: t + ways["negative"][name] for name, t in ways["positive"].items()}} | ways


def _final(model: PreTrainedModel, d: Direction, targets: Batch) -> Heading:
    """The direction towards final responses, and their mean log-likelihood."""
    return Heading(d, None, sequence_logps(model, targets).double().mean(0, keepdim=True).cpu().numpy())


def _components(
    ways: Mapping[str, Direction], scale: Direction, found: Mapping[str, Heading], of: Mapping[str, str]
) -> tuple[list[dict], list[dict]]:
    """G and cosines of every part towards every heading, raw and for the optimiser's steps: of all, and by group."""
    rows, by_group = [], []
    lengths = {name: groups.inner_by_group(one.d, one.d, of) for name, one in found.items()}
    for part, way in ways.items():
        made = alignment.scaled(way, scale)
        size, size_made = (groups.inner_by_group(v, v, of) for v in (way, made))
        for name, one in found.items():
            g, g_opt = (groups.inner_by_group(one.d, v, of) for v in (way, made))
            place = {"towards": name, "part": part}
            rows.append(
                place
                | {
                    "g": sum(g.values()),
                    "g_opt": sum(g_opt.values()),
                    "cosine": _cosine(g, lengths[name], size),
                    "cosine_opt": _cosine(g_opt, lengths[name], size_made),
                }
            )
            angles = groups.cosines(g, lengths[name], size)
            by_group += [
                place | {"group": group, "g": g[group], "g_opt": g_opt[group], "cosine": angles[group]} for group in g
            ]
    order = {part: i for i, part in enumerate(PARTS)}
    names = list(found)

    def place_of(row: dict) -> tuple[int, int]:
        return names.index(row["towards"]), order[row["part"]]

    return sorted(rows, key=place_of), sorted(by_group, key=place_of)


def _cosine(ab: Mapping[str, float], aa: Mapping[str, float], bb: Mapping[str, float]) -> float:
    """The cosine over all groups from inner products by group."""
    return groups.cosines(*({"all": sum(x.values())} for x in (ab, aa, bb)))["all"]


def _errors(weights: TokenWeights, scores: torch.Tensor, n: int, heading: Heading, part: str) -> dict[str, float]:
    """Standard errors of a component of G: of the probe's n examples, of the direction, and of both."""
    by_row = alignment.by_sequence(weights, scores, part).double()
    by_example = by_row.reshape(-1, n).sum(0)  # a pair has two rows
    probe = math.sqrt(n * by_example.var().item())
    direction = heading.known.inner(part)[1] if heading.known else 0.0
    return {"se": math.hypot(probe, direction), "se_probe": probe, "se_direction": direction, "n": n}


def _direction_rows(found: Mapping[str, Heading]) -> list[dict]:
    """How long and how well known every direction is, and the angles between them."""
    rows = []
    true = found.get("reward")
    for name, one in found.items():
        row = {"towards": name, "norm": alignment.norm(one.d).item()}
        row |= {"squared": math.nan, "reliability": math.nan, "halves": math.nan, "angle": math.nan}
        if one.known:
            row |= {"squared": one.known.squared_norm(), "reliability": one.known.reliability()}
            row["halves"] = one.known.agreement()
        row["to_final"] = alignment.cosine(one.d, found["final"].d)
        row["to_reward"] = alignment.cosine(one.d, true.d) if true else math.nan
        if true and one.known:
            row["angle"] = reward.cosine_of(one.known, true.known)[1]
        rows.append(row)
    return rows


def _earned(name: str, heading: Heading, samples: int) -> dict[str, float]:
    """J at a checkpoint and its standard error over prompts."""
    levels = heading.levels
    error = levels.std(ddof=1) / math.sqrt(len(levels))
    return {"towards": name, "reward": levels.mean(), "se": error, "n": len(levels) * samples}


def _tokens(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    weights: TokenWeights,
    logps: torch.Tensor,
    scored: Mapping[str, torch.Tensor],
    n: int,
) -> pd.DataFrame:
    """`measure.token_table` of the first TOKENS_OF examples, with the worth of each token towards every heading."""
    tables = {
        name: measure.token_table(batch, tokenizer, weights, logps, scores, scores, n, TOKENS_OF)
        for name, scores in scored.items()
    }
    first = tables["final"].drop(columns=["a", "a_opt"])
    return first.assign(**{f"a_{name}": table["a"] for name, table in tables.items()})


def moved_table(seen: Mapping[int, Mapping[str, Reached]]) -> pd.DataFrame:
    """What each update between checkpoints was predicted to bring, and what it brought: a row a checkpoint and heading.

    Columns: step, towards; moved, <d, update to the next checkpoint>, and its standard error se (by the spread of the
    parts of d; NaN towards final); moved_end, the same update with d of where it ends, and se_end: the mean of both is
    right to second order in the update; change, of J (points) or of the mean log-likelihood of D' (nats a response) to
    the next checkpoint, and change_se (over prompts, paired; NaN towards final, whose change is exact). All are NaN at
    the last checkpoint. The noise of the replies is in both J and d of a checkpoint: `moved` and `change` share some.
    """
    rows = []
    steps = list(seen)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        for name, here in seen[step].items():
            row = {"step": step, "towards": name}
            if following is None:
                rows.append(row | dict.fromkeys(MOVED, math.nan))
                continue
            there = seen[following][name]
            gained = there.levels - here.levels
            values = (
                *here.along["to"],
                *there.along["from"],
                gained.mean(),
                gained.std(ddof=1) / math.sqrt(len(gained)) if len(gained) > 1 else math.nan,
            )
            rows.append(row | dict(zip(MOVED, values, strict=True)))
    return pd.DataFrame(rows).astype({"step": np.int32})


MOVED = ("moved", "se", "moved_end", "se_end", "change", "change_se")
