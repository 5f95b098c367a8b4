"""Preference data: from the world or a file, as one `Dataset` with its account; its encoding as padded tensors."""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..lens.batch import Batch, pad
from . import chat
from .account import Account, Encoder, Limits, count
from .layouts import DataError, Prompt, Reading, identity
from .world import World

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Dataset:
    """Everything an experiment reads.

    pairs, check: dicts of prompt, chosen, rejected and, from the world, reward_chosen, reward_rejected and
        flipped. `check` is drawn like `pairs` but disjoint from it: a second probe to measure on.
    demonstrations, check_demonstrations: dicts of prompt, response, likewise.
    prompts: those of "train", "validation" and "held_out"; a text, or a conversation (`layouts.Prompt`).
    account: what became of every record, once the limits on lengths are known.
    reward: (prompt, reply) -> points of true reward, or None where no true reward is known.
    world: the world that it was drawn from, if it was.
    """

    pairs: list[dict]
    check: list[dict]
    demonstrations: list[dict]
    check_demonstrations: list[dict]
    prompts: dict[str, list[Prompt]]
    reward: Callable[[str, str], float] | None
    account: Account | None = None
    world: World | None = None

    def digest(self) -> str:
        """A hash of the pairs, their labels included: two data sets can be compared by it."""
        shown = [[identity(row["prompt"]), row["chosen"], row["rejected"]] for row in self.pairs + self.check]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def from_world(
    world: World,
    *,
    seed: int,
    pairs: int,
    check: int,
    demonstrations: int,
    label_noise: float,
    validation: int,
    held_out: int,
    skills: dict[str, dict[str, float]] | None = None,
) -> Dataset:
    """A controlled world as a Dataset, by demonstrators of the given skills (None: `world.SKILLS`).

    The split of prompts is the same for every seed, so that seeds can be compared prompt by prompt; pairs and
    demonstrations differ by seed. Raises ValueError on impossible settings (see `world`).
    """
    split = world.split_prompts(0, validation, held_out)
    train = split["train"]
    train_pairs = world.pairs(train, pairs, label_noise, seed, skills=skills)
    seen = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in train_pairs}
    # the second probe leaves out the training pairs that it happens to draw again
    drawn = world.pairs(train, 2 * check + 100, label_noise, seed, part="check", skills=skills)
    fresh = [row for row in drawn if (row["prompt"], *sorted((row["chosen"], row["rejected"]))) not in seen]
    if len(fresh) < check:
        raise DataError(f"check={check}: the world yields only {len(fresh)} pairs that are not among pairs={pairs}")
    return Dataset(
        pairs=train_pairs,
        check=fresh[:check],
        demonstrations=world.demonstrations(train, demonstrations, seed, skills=skills),
        check_demonstrations=world.demonstrations(train, check, seed, part="check demonstrations", skills=skills),
        prompts={name: [p.text for p in part] for name, part in split.items()},
        reward=lambda prompt, reply: world.reward(world.parse_prompt(prompt), reply),
        world=world,
    )


def split_by_prompt(
    rows: Sequence[dict], *, pairs: int, check: int, validation: int, held_out: int
) -> tuple[dict[str, list[dict]], dict[str, list[Prompt]]]:
    """Deal out all pairs of a file, and its prompts, to "train", "check", "validation" and "held_out".

    By a hash of the prompt: who gets what does not depend on the order of the file. `pairs` and `check` say in which
    proportion, `validation` and `held_out` are numbers of prompts. Raises DataError if there are too few prompts.
    """
    known = {identity(row["prompt"]): row["prompt"] for row in rows}
    order = [known[key] for key in sorted(known, key=lambda text: hashlib.sha256(text.encode()).hexdigest())]
    if validation + held_out + 2 > len(order):
        raise DataError(
            f"validation={validation}, held_out={held_out}: the file has {len(order)} different prompts, "
            "and at least two must be left to train and check on"
        )
    rest = order[validation + held_out :]
    share = check / (pairs + check)
    cut = min(max(1, round(share * len(rest))), len(rest) - 1)
    prompts = {
        "validation": order[:validation],
        "held_out": order[validation : validation + held_out],
        "check": rest[:cut],
        "train": rest[cut:],
    }
    part = {prompt: name for name, own in prompts.items() for prompt in own}
    dealt: dict[str, list[dict]] = {name: [] for name in prompts}
    for row in random.Random("0/file").sample(rows, len(rows)):
        dealt[part[row["prompt"]]].append(row)
    return dealt, prompts


def from_file(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, limits: Limits, *, pairs: int, check: int, **kept: int
) -> Dataset:
    """A preference file as a Dataset: what can be used of it under the limits; chosen responses are demonstrations too.

    At most `pairs` and `check` pairs; what cutting makes equal is left out (see `account.Encoder`). kept: as for
    `split_by_prompt`. Raises DataError if nothing is left of a part.
    """
    dealt, prompts = split_by_prompt(reading.pairs, pairs=pairs, check=check, **kept)
    order = [prompt for own in prompts.values() for prompt in own]
    encoder = Encoder(tokenizer, limits, order, [row[side] for row in reading.pairs for side in SIDES])
    dropped = encoder.faults(reading.pairs)
    left = {name: [row for row in rows if encoder.fault(row) is None] for name, rows in dealt.items()}
    asked = {name: [prompt for prompt in own if encoder.prompt_fault(prompt) is None] for name, own in prompts.items()}
    for name, rest in (("pairs", left["train"]), ("check", left["check"]), ("held_out", asked["held_out"])):
        if not rest:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in count(dropped).items())
            raise DataError(f"{name}: nothing is left of this part of the file under {limits} ({reasons})")
    train, checked = left["train"][:pairs], left["check"][:check]
    in_use = train + checked
    parts = {
        "to train on": len(train),
        "to check on": len(checked),
        "of prompts kept for validation and evaluation": len(left["validation"]) + len(left["held_out"]),
        "more than were asked for": len(left["train"]) + len(left["check"]) - len(in_use),
    }
    read = dict.fromkeys([*(row["prompt"] for row in in_use), *asked["validation"], *asked["held_out"]])
    cuts = encoder.cuts(list(read), **{side: [row[side] for row in in_use] for side in SIDES})
    return Dataset(
        pairs=train,
        check=checked,
        demonstrations=[{"prompt": row["prompt"], "response": row["chosen"]} for row in train],
        check_demonstrations=[{"prompt": row["prompt"], "response": row["chosen"]} for row in checked],
        prompts={name: asked[name] for name in ("train", "validation", "held_out")},
        reward=None,
        account=Account(
            layout=reading.layout,
            columns=reading.unread,
            files=reading.passed_over,
            records=reading.records,
            unread=tuple(reading.left_out),
            pairs=len(reading.pairs),
            dropped=tuple(dropped),
            parts=parts,
            limits=limits,
            cut=cuts,
        ),
    )


def mismatched(rows: Sequence[dict]) -> list[dict]:
    """Each prompt with the chosen response of the pair after it, the last one with the first's."""
    return [
        {"prompt": row["prompt"], "chosen": other["chosen"]}
        for row, other in zip(rows, [*rows[1:], *rows[:1]], strict=True)
    ]


def under_limits(known: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Dataset:
    """The world with its account: the same where no text is longer than the limits, else without what they make equal.

    Raises DataError if nothing is left of a part.
    """
    rows, shown = known.pairs + known.check, known.demonstrations + known.check_demonstrations
    order = [prompt for name in ("validation", "held_out", "train") for prompt in known.prompts[name]]
    texts = [row[side] for row in rows for side in SIDES] + [row["response"] for row in shown]
    encoder = Encoder(tokenizer, limits, order, texts)
    pairs, check = ([row for row in part if encoder.fault(row) is None] for part in (known.pairs, known.check))
    told, check_told = (
        [row for row in part if encoder.prompt_fault(row["prompt"]) is None]
        for part in (known.demonstrations, known.check_demonstrations)
    )
    prompts = {
        name: [prompt for prompt in own if encoder.prompt_fault(prompt) is None] for name, own in known.prompts.items()
    }
    if not all((pairs, check, told, check_told, *prompts.values())):
        raise DataError(f"under {limits} too little of the world can be told apart")
    responses = {side: [row[side] for row in rows] for side in SIDES}
    cuts = encoder.cuts(order, **responses, demonstrations=[row["response"] for row in shown])
    account = Account(
        layout="the world",
        columns=(),
        files=(),
        records=0,
        unread=(),
        pairs=len(rows),
        dropped=tuple(encoder.faults(rows)),
        parts={"to train on": len(pairs), "to check on": len(check)},
        limits=limits,
        cut=cuts,
    )
    return Dataset(pairs, check, told, check_told, prompts, known.reward, account, known.world)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    max_prompt: int,
    max_response: int,
) -> Batch:
    """Prompts and responses as a right-padded Batch; each different text is encoded once.

    Of a longer prompt the last `max_prompt` tokens are kept, of a longer response the first `max_response`: it then
    has no end. Raises ChatError.
    """
    asked, told = list(dict.fromkeys(prompts)), list(dict.fromkeys(responses))
    questions = dict(zip(asked, chat.prompt_ids(tokenizer, asked), strict=True))
    answers = dict(zip(told, chat.response_ids(tokenizer, told), strict=True))
    return pad(
        [questions[prompt][-max_prompt:] for prompt in prompts],
        [answers[response][:max_response] for response in responses],
        tokenizer.pad_token_id,
    )
