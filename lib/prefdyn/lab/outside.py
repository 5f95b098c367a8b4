"""For and from outside: replies for a judge of one's own, that judge's annotations, and a reward model by its path.

Both files are AlpacaEval's (Li et al. 2023, https://github.com/tatsu-lab/alpaca_eval): outputs are a JSON list of
{"instruction", "output", "generator", "dataset"}, annotations one of {"instruction", "output_1", "generator_1",
"output_2", "generator_2", "preference"}. Whoever judges, a model or people, stays outside of this book.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from ..lens.batch import Batch, pad
from ..lens.faithful import plain_embeddings
from ..lens.likelihood import inputs
from ..lens.memory import fitting
from . import chat, layouts, policy, sources
from .chat import ChatError
from .layouts import LeftOut, Prompt
from .ppo import Score
from .sources import DataError, Unusable, brief

ROWS = 32  # prompts answered at once, at first
SEVERAL, SYSTEM = "a conversation of several turns", "a system message"


@dataclass(frozen=True)
class Asked:
    """Instructions for a judge, each once, with the name of the data set it is from.

    records: of the source; for pairs, the pairs that were read. repeated: those whose instruction was there before.
    """

    instructions: tuple[tuple[str, str], ...]
    records: int
    repeated: int
    left_out: tuple[LeftOut, ...]


def _instruction(prompt: Prompt) -> str:
    """The text of a prompt of one turn. Raises Unusable: a judge's file has one text for an instruction."""
    if isinstance(prompt, str):
        return prompt
    roles = [role for role, _ in prompt]
    if roles == ["user"]:
        return prompt[0][1]
    raise Unusable(SYSTEM if "system" in roles else SEVERAL, ", ".join(roles))


def _messages(value: list) -> Prompt:
    """A conversation of {"role", "content"}. Raises Unusable for anything else."""
    for message in value:
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise Unusable("a message without a role and a text", brief(message))
    return tuple((message["role"], message["content"]) for message in value)


def _of_record(record: dict | Unusable) -> str:
    """The instruction of a record of prompts. Raises Unusable."""
    if isinstance(record, Unusable):
        raise record
    given = next((record[name] for name in ("instruction", "prompt") if record.get(name) is not None), None)
    if given is None:
        raise Unusable("neither an 'instruction' nor a 'prompt'", ", ".join(map(brief, record)))
    for name, reason in (("input", "an 'input' beside the instruction"), ("system", SYSTEM), ("system_prompt", SYSTEM)):
        if record.get(name):
            raise Unusable(reason, brief(record[name]))
    if not isinstance(given, str | list):
        raise Unusable("the prompt is neither a text nor a conversation", brief(given))
    text = _instruction(_messages(given) if isinstance(given, list) else given)
    if not text.strip():
        raise Unusable("the prompt is empty")
    return text


def _collected(
    found: Sequence[tuple[str, Any, str]], left_out: Sequence[LeftOut], records: int, source: str, read
) -> Asked:
    """Instructions made by `read` of (place, value, data set). Raises DataError if none is left."""
    kept: dict[str, str] = {}
    repeated, lost = 0, list(left_out)
    for where, value, dataset in found:
        try:
            text = read(value)
        except Unusable as error:
            lost.append(LeftOut(where, error.reason, error.detail))
            continue
        repeated += text in kept
        kept.setdefault(text, dataset)
    if not kept:
        first = f"; first, {lost[0]}" if lost else ""
        raise DataError(f"prompts: given {source!r}, of whose {records} records none is an instruction{first}")
    return Asked(tuple(kept.items()), records, repeated, tuple(lost))


def _stem(source: str) -> str:
    return Path(source).name.partition(".")[0]


def prompts_of(source: str) -> Asked:
    """Instructions of a file of records with "instruction" or "prompt" (JSON, JSON lines, parquet), in its order.

    "dataset" is kept where a record names one. Left out by name: conversations of several turns or with a system
    message, which the format cannot hold, and Alpaca's "input", which would be lost. Raises DataError.
    """
    if not Path(source).is_file():
        raise DataError(f"prompts: given {source!r}, no such file")
    entries = list(sources.entries(source))

    def dataset(record: dict | Unusable) -> str:
        named = record.get("dataset") if isinstance(record, dict) else None
        return named if isinstance(named, str) else _stem(source)

    found = [(where, record, dataset(record)) for where, record in entries]
    return _collected(found, (), len(entries), source, _of_record)


def prompts_of_pairs(source: str) -> Asked:
    """The different prompts of preference pairs (see `layouts.read`), in their order. Raises DataError."""
    reading = layouts.read(source)
    found = [(row["where"], row["prompt"], _stem(source)) for row in reading.pairs]
    return _collected(found, reading.left_out, reading.records, source, _instruction)


@dataclass(frozen=True)
class Replies:
    """A policy's replies, rows as an outside judge reads them, and what was cut or left out on the way.

    cut: prompts of which only the last `max_prompt` tokens were read (None: all of each). unended: replies that reached
    the limit before their end. empty: replies without text. left_out: prompts that the chat template cannot hold.
    unasked: instructions behind `count`.
    """

    rows: list[dict[str, str]]
    max_prompt: int | None
    cut: int
    unended: int
    empty: int
    unasked: int
    left_out: tuple[LeftOut, ...] = field(default=())


def _most_prompt(model: PreTrainedModel, max_prompt: int | None, max_response: int) -> int | None:
    """Tokens of a prompt that fit before a reply. Raises ValueError for what does not fit the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, value in (("max_prompt", max_prompt), ("max_response", max_response)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if positions is not None and (max_prompt or 1) + max_response > positions:
        raise ValueError(
            f"max_prompt={max_prompt}, max_response={max_response}: the model has {positions} positions for both"
        )
    return max_prompt if max_prompt or positions is None else positions - max_response


def _encoded(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str, list[int]]], list[LeftOut]]:
    """Instructions with their data set and ids, and those that cannot be encoded."""
    kept, lost = [], []
    for number, (text, dataset) in enumerate(asked, 1):
        try:
            kept.append((text, dataset, chat.prompt_ids(tokenizer, [text])[0]))
        except ChatError as error:
            lost.append(LeftOut(f"instruction {number}", error.reason, error.detail))
    return kept, lost


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    *,
    name: str,
    max_response: int,
    max_prompt: int | None = None,
    count: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    rows: int = ROWS,
) -> Replies:
    """The policy's replies to the first `count` instructions (None: all), greedy at temperature 0.

    Texts are decoded without special tokens and stripped. Args: name, of the generator. max_prompt, max_response,
    tokens; without the first, as many as the model has positions for. rows, prompts at once; fewer where memory is
    short. Raises ValueError for limits that do not fit, and DataError if no instruction can be encoded.
    """
    most = _most_prompt(model, max_prompt, max_response)
    chosen = asked.instructions[:count]
    kept, lost = _encoded(tokenizer, chosen)
    if not kept:
        raise DataError(f"prompts: none of {len(chosen)} can be encoded" + (f"; first, {lost[0]}" if lost else ""))
    ids = [own if most is None else own[-most:] for _, _, own in kept]
    ends = chat.ends(tokenizer, getattr(model, "generation_config", None))
    settings = {"max_response": max_response, "ends": ends, "pad_id": tokenizer.pad_token_id}
    told: list[list[int]] = []
    while (at := len(told)) < len(ids):

        def answer(n: int, at: int = at) -> list[list[int]]:
            return policy.generate(model, ids[at : at + n], temperature=temperature, seed=seed + at, **settings)

        found, rows = fitting(answer, rows)
        told += found
    texts = policy.decode(tokenizer, told)
    made = [
        {"instruction": instruction, "output": text, "generator": name, "dataset": dataset}
        for (instruction, dataset, _), text in zip(kept, texts, strict=True)
    ]
    return Replies(
        rows=made,
        max_prompt=most,
        cut=sum(len(own) > len(read) for (_, _, own), read in zip(kept, ids, strict=True)),
        unended=sum(reply[-1] not in ends for reply in told),
        empty=sum(not text for text in texts),
        unasked=len(asked.instructions) - len(chosen),
        left_out=tuple(lost),
    )


@dataclass(frozen=True)
class Annotation:
    """What a judge said of one pair of replies to an instruction, seen from one of the two generators.

    score: 1 if its reply was preferred, 0 if the other one, 0.5 for a tie, between for a judge that is not sure; None
    without an answer. second: whether its reply was output_2. length, other_length: characters of its reply and of the
    other one. other: the other reply.
    """

    instruction: str
    score: float | None
    second: bool
    length: int
    other_length: int
    other: str


@dataclass(frozen=True)
class Annotations:
    """A file of annotations of `generator` against `baseline`: records == len(rows) + len(left_out)."""

    generator: str
    baseline: str
    records: int
    rows: tuple[Annotation, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def answered(self) -> tuple[Annotation, ...]:
        """Those with an answer."""
        return tuple(row for row in self.rows if row.score is not None)

    def scores(self) -> dict[str, float]:
        """The mean score of each instruction that has an answer: instructions are independent, repetitions are not."""
        found: dict[str, list[float]] = {}
        for row in self.answered:
            found.setdefault(row.instruction, []).append(row.score)
        return {instruction: sum(scores) / len(scores) for instruction, scores in found.items()}


_TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2")


def _preferred(value: object) -> float | None:
    """How far output_2 is preferred, 0 to 1: AlpacaEval's 1 is output_1, 2 is output_2, 0 and 1.5 are ties.

    None for no answer (null or NaN). Raises Unusable for anything else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable("the preference is not a number", brief(value))
    if value == 0:
        return 0.5
    if not 1 <= value <= 2:
        raise Unusable("the preference is neither 0 nor between 1 and 2", brief(value))
    return float(value) - 1


def _checked(record: dict | Unusable) -> tuple[dict, float | None]:
    """A record with its texts, and how far output_2 is preferred. Raises Unusable."""
    if isinstance(record, Unusable):
        raise record
    for name in _TEXTS:
        if not isinstance(record.get(name), str):
            raise Unusable(f"no text in {name!r}", brief(record.get(name)))
    if record["generator_1"] == record["generator_2"]:
        raise Unusable("both replies are of one generator", brief(record["generator_1"]))
    if "preference" not in record:
        raise Unusable("no 'preference'", ", ".join(map(brief, record)))
    return record, _preferred(record["preference"])


def _seen_from(generator: str, record: dict, preferred: float | None) -> Annotation:
    """A record seen from one of its generators."""
    second = record["generator_2"] == generator
    own, other = (record["output_2"], record["output_1"]) if second else (record["output_1"], record["output_2"])
    score = preferred if second or preferred is None else 1 - preferred
    return Annotation(record["instruction"], score, second, len(own), len(other), other)


def annotations(source: str) -> Annotations:
    """Annotations of a file, seen from the generator_2 of the first one; the two may stand in either order.

    Raises DataError for a file that cannot be read, holds no usable annotation or is about more than two generators.
    """
    if not Path(source).is_file():
        raise DataError(f"annotations: given {source!r}, no such file")
    kept, lost, entries = [], [], list(sources.entries(source))
    for where, record in entries:
        try:
            kept.append(_checked(record))
        except Unusable as error:
            lost.append(LeftOut(where, error.reason, error.detail))
    if not kept:
        first = f"; first, {lost[0]}" if lost else ""
        raise DataError(
            f"annotations: given {source!r}, of whose {len(entries)} records none is an annotation{first}; needed: "
            f"{', '.join(_TEXTS)} (texts), preference"
        )
    pairs = {frozenset((record["generator_1"], record["generator_2"])) for record, _ in kept}
    if len(pairs) > 1:
        names = ", ".join(sorted({brief(name) for pair in pairs for name in pair}))
        raise DataError(f"annotations: given {source!r}, about the generators {names}; allowed: two of them in a file")
    generator, baseline = kept[0][0]["generator_2"], kept[0][0]["generator_1"]
    rows = tuple(_seen_from(generator, record, preferred) for record, preferred in kept)
    return Annotations(generator, baseline, len(entries), rows, tuple(lost))


@dataclass(frozen=True)
class Shared:
    """Scores of two files of annotations on the instructions that both answer, (first, second) each.

    other_baseline: instructions left out because the baseline's reply is not the same in both. alone: those that one
    file alone answers.
    """

    scores: tuple[tuple[float, float], ...]
    other_baseline: int
    alone: int


def shared(one: Annotations, other: Annotations) -> Shared:
    """What two generators scored against the same replies of one baseline. Raises ValueError for two baselines."""
    if one.baseline != other.baseline:
        raise ValueError(
            f"against: {other.generator!r} was judged against {other.baseline!r}, and {one.generator!r} against "
            f"{one.baseline!r}; allowed: one baseline for both"
        )
    first, second = one.scores(), other.scores()
    both = [instruction for instruction in first if instruction in second]
    replies_to = [
        {(row.instruction, row.other) for row in file.answered if row.instruction in second} for file in (one, other)
    ]
    differing = {instruction for instruction, _ in replies_to[0] ^ replies_to[1] if instruction in first}
    kept = [instruction for instruction in both if instruction not in differing]
    return Shared(
        scores=tuple((first[instruction], second[instruction]) for instruction in kept),
        other_baseline=len(both) - len(kept),
        alone=len(first) + len(second) - 2 * len(both),
    )


@dataclass(frozen=True)
class RewardModel:
    """A reward model of one label with its tokenizer: what it says of a prompt and a reply, larger is better.

    end: ids that its chat template puts after the token that ends a turn; the score is read at the last token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], size: int = 32) -> torch.Tensor:
        """Scores of replies to prompts, [N] in float32 on the model's device, as of each alone.

        size: rows at once. Raises ValueError for unequal numbers and for texts longer than the model's positions, and
        ChatError for what the chat template cannot hold.
        """
        asked = chat.prompt_ids(self.tokenizer, prompts)
        told = [[*ids, *self.end] for ids in chat.response_ids(self.tokenizer, responses)]
        config = self.model.config.get_text_config()
        positions, padding = getattr(config, "max_position_embeddings", None), config.pad_token_id
        for row, (before, after) in enumerate(zip(asked, told, strict=False)):
            if positions is not None and len(before) + len(after) > positions:
                raise ValueError(
                    f"reward model: prompt and reply {row} have {len(before) + len(after)} tokens, and the model has "
                    f"{positions} positions"
                )
        # without a padding token the model reads its score at the last column: then rows go one by one
        batch = pad(asked, told, 0 if padding is None else padding).to(self.model.device)
        parts = batch.chunks(1 if padding is None else size)
        return torch.cat([self.model(**inputs(self.model, part)).logits.squeeze(-1).float() for part in parts])

    def score(self, tokenizer: PreTrainedTokenizerBase) -> Score:
        """(prompts, rollouts) -> rewards: as `ppo.scorer` gives, for replies in the ids of a policy's `tokenizer`."""

        def of(prompts: list[Prompt], batch: Batch) -> torch.Tensor:
            answers = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.response, strict=True)]
            return self(prompts, policy.decode(tokenizer, answers)).to(batch.ids.device)

        return of


def _refused(path: str, problem: str) -> ValueError:
    return ValueError(f"reward model={path!r}: {problem}")


def _config_problem(folder: Path) -> str | None:
    """What speaks against loading a folder, before any weight is read."""
    if not folder.is_dir():
        return "no such folder; allowed: a folder with config.json, model.safetensors and a tokenizer"
    if find_adapter_config_file(str(folder)):
        return "holds an adapter (adapter_config.json), which would be left out; merge it and save the whole"
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return (
            "its weights are pickled (.bin), which could run code when they are read; save them where they are trusted "
            "with save_pretrained, which writes model.safetensors"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return f"its config.json could not be read: {error}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; dequantise them first (model.dequantize()) and save the whole"
    if config.num_labels != 1:
        return f"has {config.num_labels} labels; allowed: one, the reward (num_labels=1)"
    return None


def _weights_problem(report: dict[str, Any]) -> str | None:
    """What a loading report says of weights that would be random, lost, or of another shape."""
    said = {
        "are not in the checkpoint and would be random": sorted(report["missing_keys"]),
        "of the checkpoint have no place in the model": sorted(report["unexpected_keys"]),
        "have another shape than config.json says": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    named = [f"{len(keys)} weights {what}: {', '.join(keys[:3])}" for what, keys in said.items() if keys]
    return "; ".join(named) + "; save it with save_pretrained of the reward model" if named else None


def _end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that the chat template puts after the end of a reply. Raises ValueError where it has another way of its own.

    A reward model is trained on whole conversations as its template renders them, to the last line break.
    """
    if not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template, which says how prompt and reply are put together")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    whole = tokenizer(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"]
    known = chat.prompt_ids(tokenizer, ["a"])[0] + chat.response_ids(tokenizer, ["a"])[0]
    if whole[: len(known)] != known:
        raise ValueError(
            "its chat template renders a whole conversation otherwise than a prompt that awaits a reply and the reply: "
            f"{tokenizer.decode(whole)!r} is not {tokenizer.decode(known)!r}"
        )
    return tuple(whole[len(known) :])


def reward_model(path: str) -> RewardModel:
    """The reward model in a folder: a sequence classifier of one label, its tokenizer and chat template, in float32.

    As strict as `policy.load`: only safetensors weights are read and no code from the folder is run. Raises ValueError
    with what was given and what to do for adapters, pickled or quantised weights, more than one label, weights that
    would be random, lost or of another shape, a vocabulary without embeddings, and a missing chat template.
    """
    folder = Path(path).expanduser()
    if problem := _config_problem(folder):
        raise _refused(path, problem)
    settings = {"use_safetensors": True, "dtype": torch.float32, "trust_remote_code": False}
    settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they can be named
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    except (OSError, RuntimeError, KeyError, ImportError, ValueError, SafetensorError) as error:
        raise _refused(path, f"could not be loaded. The loader said: {error}") from error
    if problem := _weights_problem(report):
        raise _refused(path, problem)
    tokenizer = policy.load_tokenizer(str(folder))
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise _refused(path, f"its tokenizer has {len(tokenizer)} tokens, and there are {embeddings} embeddings")
    try:
        end = _end(tokenizer)
    except ValueError as error:
        raise _refused(path, str(error)) from error
    return RewardModel(plain_embeddings(model.eval()), tokenizer, end)


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a JSON list in one move: it is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)
