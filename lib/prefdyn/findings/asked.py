"""What is asked of a series of checkpoints: the pairs that G is measured on, and the responses that it is asked about.

A file of pairs is drawn from with a fixed seed. Every record of it is used, or left out and counted by its reason, and
what limits cut is counted; of a file of targets nothing is left out.
"""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..lab import chat, data, folders, layouts, sources
from ..lab.account import Cut, Encoder, Limits, count
from ..lab.evaluate import reply
from ..lab.layouts import DataError, Prompt
from ..lab.recipes import device
from ..lens import memory
from ..lens.batch import Batch, pad
from ..methods import registry
from ..methods.base import Method

CHOICES = ("final", "chosen")  # of targets, beside a file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNLIMITED = 2**31
REPLIES = 64  # that are generated at once; fewer where memory runs out


@dataclass(frozen=True)
class Question:
    """What is asked of a series: all that its numbers depend on, beside the models.

    pairs: a preference file, a folder of such files or a name on the hub. method: name of one of `methods`. settings:
    its own numbers, the others are its defaults. targets: "final", "chosen", or a file of JSON lines with prompt and
    response. probe: pairs to measure on, at most. max_prompt, max_response: tokens, None for no limit. dtype: one of
    DTYPES, in which the models are computed.
    """

    pairs: str
    method: str = "dpo"
    settings: tuple[tuple[str, float], ...] = ()
    targets: str = "final"
    probe: int = 64
    max_prompt: int | None = None
    max_response: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("probe", "max_prompt", "max_response"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")

    def found(self) -> Method:
        """The method. Raises ValueError for one that is not there, or that pairs of a file are not enough for."""
        method = registry.find(self.method)
        if method.takes == "rollouts":
            able = ", ".join((*registry.names("pairs"), *registry.names("demonstrations")))
            raise ValueError(
                f"method={method.name!r}: its weights come from replies sampled while it trains and their rewards, "
                "which neither checkpoints nor a file of pairs hold; measure it while it trains, with the callback of "
                f"prefdyn.lens. Allowed here: {able}"
            )
        registry.settings(method, dict(self.settings))
        return method

    def limits(self) -> Limits:
        return Limits(self.max_prompt or UNLIMITED, self.max_response or UNLIMITED)


def digest_of(value: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# What is measured on


@dataclass(frozen=True)
class Probe:
    """The pairs that G is measured on, and what else of the file the targets may be drawn from.

    rows: dicts of prompt, chosen, rejected. others: pairs to other prompts, one a prompt. batches: their tokens, by
    "chosen", "rejected" and, where the method reads it, "mismatched". about: what about.json says of the data. notes:
    what a reader must know of it.
    """

    rows: list[dict]
    others: list[dict]
    batches: dict[str, Batch]
    about: dict[str, Any]
    notes: tuple[str, ...]

    def digest(self) -> str:
        """A hash of all tokens."""
        return digest_of({name: [b.ids.tolist(), b.response.tolist()] for name, b in self.batches.items()})


def draw(question: Question, method: Method, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Probe:
    """Draw the probe from a file of pairs, at random with a fixed seed.

    context: tokens that the model has positions for, None if any number; longer pairs are left out, and counted.
    Raises DataError if the file cannot be read, does not fit the method, or nothing of it can be used.
    """
    with _given_as("pairs"):
        reading = layouts.read(question.pairs)
    if "unpaired" in reading.layout and method.takes == "pairs" and not method.kl:
        single = ", ".join(name for name in registry.names("pairs") if registry.find(name).kl)
        raise DataError(
            f"pairs={question.pairs!r}: holds single completions with labels, and method={method.name!r} compares the "
            f"two sides of a pair; allowed: a file of pairs, or a method of single completions ({single})"
        )
    rows = random.Random(0).sample(reading.pairs, len(reading.pairs))
    pool, faults, encoder = _pool(rows, tokenizer, question.limits(), context, question.probe)
    dropped = [layouts.LeftOut(row["where"], *why) for row, why in zip(pool, faults, strict=True) if why is not None]
    chosen, others = _split(pool, faults, question.probe)
    if not chosen:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in count(dropped).items())
        raise DataError(f"pairs={question.pairs!r}: none of {len(pool)} pairs can be used: {reasons}")
    cuts = encoder.cuts(
        list({row["prompt"]: None for row in chosen}), **{side: [row[side] for row in chosen] for side in data.SIDES}
    )
    left_out = count([*reading.left_out, *dropped])
    if more := len(rows) - len(chosen) - len(dropped):
        left_out["more than were asked for"] = more
    return Probe(
        rows=chosen,
        others=others,
        batches=_encoded(question, method, tokenizer, chosen),
        about={
            "name": Path(question.pairs).name,
            "layout": reading.layout,
            "records": reading.records,
            "pairs": len(rows),
            "used": len(chosen),
            "left_out": left_out,
            "cut": {kind: cut.cut for kind, cut in cuts.items()},
            "max_prompt": question.max_prompt,
            "max_response": question.max_response,
        },
        notes=tuple(_data_notes(question, tokenizer, cuts, len(chosen), reading)),
    )


@contextlib.contextmanager
def _given_as(name: str) -> Iterator[None]:
    """Let an error of reading a source name the option that it was given by."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace("dataset:", f"{name}:", 1)) from error


def _pool(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, limits: Limits, context: int | None, probe: int
) -> tuple[list[dict], list[tuple[str, str] | None], Encoder]:
    """The first rows with what is wrong with each: enough for a probe and as many other prompts, or all."""
    size = min(len(rows), 4 * probe)
    while True:
        pool = rows[:size]
        encoder = Encoder(
            tokenizer, limits, [row["prompt"] for row in pool], [row[side] for row in pool for side in data.SIDES]
        )
        faults = [encoder.fault(row) or _too_long(row, tokenizer, limits, context) for row in pool]
        if size == len(rows) or len(_split(pool, faults, probe)[1]) >= probe:
            return pool, faults, encoder
        size = min(len(rows), 2 * size)


def _split(pool: list[dict], faults: list[tuple[str, str] | None], probe: int) -> tuple[list[dict], list[dict]]:
    """The first `probe` pairs that can be used, and of the others the first one to each other prompt."""
    usable = [row for row, fault in zip(pool, faults, strict=True) if fault is None]
    chosen, others = usable[:probe], {}
    asked = {row["prompt"] for row in chosen}
    for row in usable[probe:]:
        if row["prompt"] not in asked:
            others.setdefault(row["prompt"], row)
    return chosen, list(others.values())


def _too_long(
    row: dict, tokenizer: PreTrainedTokenizerBase, limits: Limits, context: int | None
) -> tuple[str, str] | None:
    """Why a pair that can be encoded is longer than the model can read, or None."""
    if context is None:
        return None
    (asked,), told = (
        chat.prompt_ids(tokenizer, [row["prompt"]]),
        chat.response_ids(tokenizer, [row[s] for s in data.SIDES]),
    )
    length = min(len(asked), limits.max_prompt) + max(min(len(ids), limits.max_response) for ids in told)
    return (f"longer than the {context} tokens that the model reads", f"{length} tokens") if length > context else None


def _encoded(
    question: Question, method: Method, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> dict[str, Batch]:
    """The tokens of the pairs by side, on the device."""
    limits = question.limits()._asdict()

    def batch(rows: list[dict], side: str) -> Batch:
        prompts, texts = [row["prompt"] for row in rows], [row[side] for row in rows]
        return data.encode(tokenizer, prompts, texts, **limits).to(device())

    found = {side: batch(rows, side) for side in data.SIDES}
    return found | ({"mismatched": batch(data.mismatched(rows), "chosen")} if method.kl else {})


def _data_notes(
    question: Question, tokenizer: PreTrainedTokenizerBase, cuts: dict[str, Cut], used: int, reading: layouts.Reading
) -> Iterator[str]:
    """What a reader must know of how texts became tokens."""
    if tokenizer.chat_template:
        how = "through the tokenizer's chat template, plain texts as one message of the user"
    else:
        how = "as a text, two newlines and the reply with an end of text, as the tokenizer has no chat template"
    yield f"Prompts and replies were encoded {how}. A trainer that joins texts otherwise has trained on other tokens."
    if used < question.probe:
        yield f"The probe was to have {question.probe} pairs; the file has {used} that can be used, and all are."
    tokens, unknown = (sum(getattr(cut, name) for cut in cuts.values()) for name in ("tokens", "unknown"))
    if unknown:
        share = f"{unknown} of {tokens} tokens of the probe ({unknown / tokens:.1%})"
        yield f"{share} stand for words that the tokenizer does not know."
    if reading.unread:
        yield f"Columns of the pairs that were not read: {', '.join(reading.unread)}."


def context_of(series: folders.Series) -> int | None:
    """The tokens that the models of a series have positions for, as their configuration says."""
    where = series.base if series.adapter is not None else str(series.checkpoints[0].folder)
    try:
        config = AutoConfig.from_pretrained(
            str(Path(where).expanduser()) if Path(where).expanduser().is_dir() else where,
            revision=series.revision,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise folders.FolderError(f"{where}: its config.json cannot be read ({error})") from error
    known = getattr(config, "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


# Targets


@dataclass(frozen=True)
class Targets:
    """D': the responses that are asked about, as tokens, and a sentence on what they are."""

    prompts: list[list[int]]
    responses: list[list[int]]
    sentence: str

    def batch(self, pad_id: int) -> Batch:
        return pad(self.prompts, self.responses, pad_id).to(device())


def _from_texts(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Prompt, str]],
    what: str,
    context: int | None,
) -> Targets:
    """Given texts as targets, cut at the limits; what is cut is said. Raises ChatError, and DataError if too long."""
    most_prompt, most = question.limits()
    asked = chat.prompt_ids(tokenizer, [prompt for prompt, _ in rows])
    told = chat.response_ids(tokenizer, [text for _, text in rows])
    cut = sum(len(ids) > most for ids in told)
    sentence = f"{what}; {cut} of them are cut to {most} tokens." if cut else f"{what}."
    found = Targets([ids[-most_prompt:] for ids in asked], [ids[:most] for ids in told], sentence)
    for number, ids in enumerate(zip(found.prompts, found.responses, strict=True), 1):
        if context is not None and sum(map(len, ids)) > context:
            raise DataError(
                f"targets={question.targets!r}: number {number} has {sum(map(len, ids))} tokens with its prompt, and "
                f"the model reads {context}; leave it out, or set max_prompt and max_response"
            )
    return found


def read_targets(path: str) -> list[tuple[Prompt, str]]:
    """Prompts and responses of a file of records with `prompt`, a text or a list of messages, and `response`.

    Raises DataError that names the first record that cannot be used: of targets none is left out.
    """
    found = []
    with _given_as("targets"):
        entries = list(sources.entries(path))
    for where, record in entries:
        if isinstance(record, sources.Unusable):
            raise DataError(
                f"targets={path!r}: {where}: {record.reason}" + (f" ({record.detail})" if record.detail else "")
            )
        prompt, response = record.get("prompt"), record.get("response")
        if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
            prompt = tuple((turn.get("role"), turn.get("content")) for turn in prompt)
            is_prompt = all(role in layouts.ROLES and isinstance(text, str) for role, text in prompt)
        else:
            is_prompt = isinstance(prompt, str) and bool(prompt.strip())
        if not is_prompt or not isinstance(response, str) or not response.strip():
            raise DataError(
                f"targets={path!r}: {where}: needs `prompt`, a text or a list of messages with role and content, and "
                f"`response`, a text; given {sources.brief(record)}"
            )
        found.append((prompt, response))
    if not found:
        raise DataError(f"targets={path!r}: holds no record")
    return found


def _drawn_from(question: Question, probe: Probe) -> tuple[list[dict], str]:
    """The pairs whose prompts D' answers, and words on which they are: others than the probe's if there are enough."""
    name, n = probe.about["name"], len(probe.rows)
    if len(probe.others) >= n:
        return probe.others[:n], f"{n} prompts of {name} that are not of the probe"
    own = list({row["prompt"]: row for row in probe.rows}.values())
    few = len(probe.others)
    return own, f"the {len(own)} prompts of the probe itself, as {name} has only {few} others that can be used"


def make_targets(
    question: Question,
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    last: Callable[[], PreTrainedModel],
    name: str,
    context: int | None,
) -> Targets:
    """D' as it is asked for.

    Args: last, gives the model of the last checkpoint, which is called `name`; needed for "final" alone. context, as
    for `draw`.
    """
    if question.targets not in CHOICES:
        rows = read_targets(question.targets)
        return _from_texts(
            question, tokenizer, rows, f"The {len(rows)} responses of {Path(question.targets).name}", context
        )
    rows, which = _drawn_from(question, probe)
    if question.targets == "chosen":
        pairs = [(row["prompt"], row["chosen"]) for row in rows]
        own = "" if rows == probe.others[: len(rows)] else "; G holds what each of them does to itself"
        return _from_texts(question, tokenizer, pairs, f"The chosen responses to {which}{own}", context)
    prompts = [row["prompt"] for row in rows]
    longest = max(int(batch.response.sum(-1).max()) for batch in probe.batches.values())
    most, why = (
        (question.max_response, "") if question.max_response else (longest, ", as long as the longest of the probe")
    )
    if context is not None:
        asked = max(min(len(ids), question.limits().max_prompt) for ids in chat.prompt_ids(tokenizer, prompts))
        if most > context - asked:
            most, why = context - asked, f", as many as the model's {context} leave after the longest prompt"
    limits = {"max_prompt": question.limits().max_prompt, "max_response": most}
    model = last()

    def replies(size: int) -> tuple[list[list[int]], list[list[int]]]:
        parts = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        found = [reply(model, tokenizer, part, **limits) for part in parts]
        return [ids for asked, _ in found for ids in asked], [ids for _, told in found for ids in told]

    (asked, answers), _ = memory.fitting(replies, REPLIES)
    unended, different = sum(len(ids) == most for ids in answers), len(set(map(tuple, answers)))
    same = "" if different == len(answers) else f" Of the {len(answers)} replies {different} are different."
    told = f"What {name} answers greedily to {which}; up to {most} tokens{why}, which {unended} reach.{same}"
    return Targets(asked, answers, told)
