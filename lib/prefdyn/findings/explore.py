"""What a policy would say if asked again and again: how varied its replies are, and the best that is among them."""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from ..lab import online, policy, ppo, recipes
from ..lab.evaluate import reply, rewards
from ..lab.world import World

if TYPE_CHECKING:
    from ..lab.runs import RunStore


def variety(prompt: str, replies: list[str], points: list[float], world: World | None) -> dict[str, float]:
    """Measures of several replies to one prompt.

    distinct: share of different texts. reward, best: mean and largest true reward. In the world also coverage: the
    share of the prompt's `World.answer_types` among the replies; typed, the share of replies of any of these types;
    ideal, of the type of the reply that earns most.
    """
    measures = {
        "distinct": len(set(replies)) / len(replies),
        "reward": sum(points) / len(points),
        "best": max(points),
    }
    if world is not None:
        asked = world.parse_prompt(prompt)
        types = [kind for text in replies if (kind := world.answer_type(asked, text))]
        measures |= {
            "coverage": len(set(types)) / len(world.answer_types(asked)),
            "typed": len(types) / len(replies),
            "ideal": types.count(world.answer_type(asked, world.best(asked))) / len(replies),
        }
    return measures


def distance(text: str, other: str) -> float:
    """Share of words that differ between two texts, 0 to 1: one minus difflib's similarity ratio."""
    return 1 - difflib.SequenceMatcher(None, text.split(), other.split(), autojunk=False).ratio()


def drift(replies: pd.DataFrame) -> pd.DataFrame:
    """How far greedy replies are from the final ones: columns seed, step, same, distance (means over prompts).

    Args: replies, a table of seed, step, index (prompt) and reply. same: share of prompts with the final reply.
    """
    final = replies[replies["step"] == replies["step"].max()].set_index(["seed", "index"])["reply"]
    goal = final.loc[pd.MultiIndex.from_frame(replies[["seed", "index"]])].to_numpy()
    measured = replies[["seed", "step"]].assign(
        same=replies["reply"].to_numpy() == goal,
        distance=[distance(text, other) for text, other in zip(replies["reply"], goal, strict=True)],
    )
    return measured.groupby(["seed", "step"])[["same", "distance"]].mean().reset_index()


def same_final_replies(replies: pd.DataFrame, label: str, other: str, by: str = "label") -> pd.Series:
    """Share of prompts on which two trainings end at the same greedy reply, by seed.

    Args: replies, a table of seed, step, index (prompt), reply and `by`, in whose values the two are named.
    """
    final = replies[replies["step"] == replies["step"].max()]
    wide = final.pivot(index=["seed", "index"], columns=by, values="reply")
    return (wide[label] == wide[other]).groupby("seed").mean()


class ExplorationRun(recipes.Spec):
    """Several sampled replies to each of some held-out prompts, at every checkpoint of a training run."""

    kind: Literal["exploration"] = "exploration"
    run: recipes.SFTRun | recipes.PairRun | online.OnlineRun | ppo.PPORun
    prompts: int  # at most
    samples: int  # replies to each

    def parents(self) -> list[recipes.Spec]:
        return [self.run, *self.run.parents()]

    def work(self) -> float:
        return 0.3 * self.prompts * self.samples * len(self.run.steps())

    def compute(self, folder: Path, store: "RunStore", tick) -> None:
        """Write exploration.parquet: a row a step and prompt, with the columns of `variety`."""
        run, spec = store.get(self.run), self.run.data
        known = recipes.dataset(spec)
        prompts = known.prompts["held_out"][: self.prompts]
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        limits = {"max_prompt": spec.max_prompt, "max_response": spec.max_response}
        rows = []
        for step in self.run.steps():
            model, tokenizer = recipes.load_checkpoint(run, step)
            _, sampled = reply(model, tokenizer, asked, temperature=1.0, seed=step, **limits)
            texts = policy.decode(tokenizer, sampled)
            points = rewards(known, asked, texts)
            for i, prompt in enumerate(prompts):
                own = slice(i * self.samples, (i + 1) * self.samples)
                measures = variety(prompt, texts[own], points[own], known.world)
                rows.append({"step": step, "index": i, **measures})
            tick(self.work() / len(self.run.steps()))
        pd.DataFrame(rows).to_parquet(folder / "exploration.parquet")
