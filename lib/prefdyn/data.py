"""Preference data: from the world or from a file, as one `Dataset`; and its encoding as padded tensors."""

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from . import world


class DataError(ValueError):
    """A dataset that cannot be read or cannot be split as asked; the message says what to change."""


@dataclass(frozen=True)
class Dataset:
    """Everything an experiment reads, as plain text.

    pairs, check: dicts of prompt, chosen, rejected and, from the world, reward_chosen, reward_rejected and
        flipped. `check` is drawn like `pairs` but disjoint from it: a second probe to measure on.
    demonstrations, check_demonstrations: dicts of prompt, response, likewise.
    prompts: those of "train", "validation" and "held_out".
    reward: (prompt, reply) -> points of true reward, or None where no true reward is known.
    """

    pairs: list[dict]
    check: list[dict]
    demonstrations: list[dict]
    check_demonstrations: list[dict]
    prompts: dict[str, list[str]]
    reward: Callable[[str, str], float] | None
    problems: tuple[str, ...] = ()


def from_world(
    *,
    seed: int,
    pairs: int,
    check: int,
    demonstrations: int,
    label_noise: float,
    validation: int,
    held_out: int,
) -> Dataset:
    """The controlled world as a Dataset.

    The split of prompts is the same for every seed, so that seeds can be compared prompt by prompt; pairs and
    demonstrations differ by seed. Raises ValueError on impossible settings (see `world`).
    """
    split = world.split_prompts(0, validation, held_out)
    train = split["train"]
    train_pairs = world.pairs(train, pairs, label_noise, seed)
    seen = {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in train_pairs}
    # the second probe leaves out the training pairs that it happens to draw again
    drawn = world.pairs(train, 2 * check + 100, label_noise, seed, part="check")
    fresh = [row for row in drawn if (row["prompt"], *sorted((row["chosen"], row["rejected"]))) not in seen]
    if len(fresh) < check:
        raise DataError(f"check={check}: the world yields only {len(fresh)} pairs that are not among pairs={pairs}")
    return Dataset(
        pairs=train_pairs,
        check=fresh[:check],
        demonstrations=world.demonstrations(train, demonstrations, seed),
        check_demonstrations=world.demonstrations(train, check, seed, part="check demonstrations"),
        prompts={name: [p.text for p in part] for name, part in split.items()},
        reward=lambda prompt, reply: world.reward(world.parse_prompt(prompt), reply),
    )


def _text(value, role: str) -> str:
    """The text of a standard (str) or conversational (list of messages) field."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        messages = [m for m in value if m.get("role") == role]
        if messages and isinstance(messages[-1].get("content"), str):
            return messages[-1]["content"]
    raise ValueError(f"neither a text nor a list of messages with a {role!r} message")


def _prompt_of(row: dict) -> str:
    """The prompt, explicit or, in conversational rows, the user's last message before the answers."""
    if "prompt" in row:
        return _text(row["prompt"], "user")
    if isinstance(row.get("chosen"), list):
        return _text(row["chosen"], "user")
    raise ValueError("no 'prompt'")


def _parse_pair(line: str) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"no {missing[0]!r}")
    pair = {
        "prompt": _prompt_of(row),
        "chosen": _text(row["chosen"], "assistant"),
        "rejected": _text(row["rejected"], "assistant"),
    }
    empty = [key for key, text in pair.items() if not text.strip()]
    if empty:
        raise ValueError(f"{empty[0]!r} is empty")
    "".join(pair.values()).encode()  # raises where an escaped half of a character pair stands alone
    if pair["chosen"] == pair["rejected"]:
        raise ValueError("'chosen' and 'rejected' are the same text")
    return pair


def read_pairs(path: str | Path) -> tuple[list[dict], list[str]]:
    """Read preference pairs from a .jsonl or .jsonl.gz file of prompt, chosen, rejected.

    Texts may be plain strings or conversations (lists of role and content, prompt explicit or implicit).
    Returns the pairs and one message for each line that could not be used, by number.
    Raises DataError if the file cannot be read at all or holds no usable pair.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"dataset={str(path)!r}: must be 'world' or the path of a .jsonl or .jsonl.gz file")
    if not path.is_file():
        raise DataError(f"dataset={str(path)!r}: no such file (the path is relative to {Path.cwd().name!r})")
    pairs, problems, number = [], [], 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, raw in enumerate(lines, 1):
                try:
                    if raw.strip():
                        pairs.append(_parse_pair(raw.decode("utf-8")))
                except ValueError as error:  # includes JSON and UTF-8 errors
                    problems.append(f"line {number}: {error}")
                except RecursionError:
                    problems.append(f"line {number}: nested too deeply")
    except (OSError, EOFError, zlib.error) as error:
        problems.append(f"after line {number}: {error}")
    if not pairs:
        raise DataError(f"dataset={str(path)!r}: no usable pair; " + "; ".join(problems[:3] or ["the file is empty"]))
    return pairs, problems


def from_file(path: str | Path, *, pairs: int, check: int, validation: int, held_out: int) -> Dataset:
    """A local preference file as a Dataset, split by prompt; chosen responses serve as demonstrations.

    The split is by a hash of the prompt's text: it does not depend on the order of the lines. `pairs` and
    `check` are upper bounds, `validation` and `held_out` numbers of prompts. Raises DataError.
    """
    rows, problems = read_pairs(path)
    order = sorted({row["prompt"] for row in rows}, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    if validation + held_out + 2 > len(order):
        raise DataError(
            f"validation={validation}, held_out={held_out}: the file has {len(order)} different prompts, "
            "and at least two must be left to train and check on"
        )
    rest = order[validation + held_out :]
    share = check / (pairs + check)
    cut = min(max(1, round(share * len(rest))), len(rest) - 1)
    part = dict.fromkeys(rest[:cut], "check") | dict.fromkeys(rest[cut:], "train")
    shuffled = random.Random("0/file").sample(rows, len(rows))
    train_pairs = [row for row in shuffled if part.get(row["prompt"]) == "train"][:pairs]
    check_pairs = [row for row in shuffled if part.get(row["prompt"]) == "check"][:check]
    return Dataset(
        pairs=train_pairs,
        check=check_pairs,
        demonstrations=[{"prompt": row["prompt"], "response": row["chosen"]} for row in train_pairs],
        check_demonstrations=[{"prompt": row["prompt"], "response": row["chosen"]} for row in check_pairs],
        prompts={
            "train": rest[cut:],
            "validation": order[:validation],
            "held_out": order[validation : validation + held_out],
        },
        reward=None,
        problems=tuple(problems),
    )


@dataclass(frozen=True)
class Batch:
    """Padded token sequences: a prompt followed by a response, N rows of T positions.

    ids: int64 [N, T]. attention: bool [N, T], False on padding (on either side). response: bool [N, T], True on
    the tokens of the response, its end-of-text token included.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor

    def __post_init__(self):
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.ids.ndim != 2:
            raise ValueError(f"Batch: one shape [N, T] for all is needed, given {shapes}")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, index: torch.Tensor | slice) -> "Batch":
        """Some rows, without the columns that are padding in all of them."""
        used = self.attention[index].any(0).nonzero()
        keep = slice(int(used.min()), int(used.max()) + 1)
        return Batch(self.ids[index][:, keep], self.attention[index][:, keep], self.response[index][:, keep])

    def take(self, index: torch.Tensor) -> "Batch":
        """Some rows, with all columns."""
        return Batch(self.ids[index], self.attention[index], self.response[index])

    def chunks(self, size: int) -> list["Batch"]:
        """The rows in order, in chunks of at most `size`, each without the columns that it does not use."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def slices(self, size: int) -> list["Batch"]:
        """The rows in order, in chunks of at most `size` with all columns kept, so that results can be concatenated."""
        parts = (getattr(self, field.name).split(size) for field in fields(self))
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def to(self, device) -> "Batch":
        return Batch(self.ids.to(device), self.attention.to(device), self.response.to(device))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Rows of several batches in one, padded on the right to the longest."""
    width = max(b.ids.shape[1] for b in batches)

    def stack(name: str) -> torch.Tensor:
        parts = [getattr(b, name) for b in batches]
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])

    return Batch(stack("ids"), stack("attention"), stack("response"))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, max_prompt: int) -> list[int]:
    """Token ids of a prompt, ready for a reply: the tokenizer's chat template, or two newlines without one.

    Longer prompts lose their beginning: the last `max_prompt` ids are kept.
    """
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt + "\n\n")["input_ids"]
    return ids[-max_prompt:]


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str, max_response: int) -> list[int]:
    """Token ids of a response with its end-of-text token; a longer one is cut and then has no end."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids[:max_response]


def pad(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, side: str = "right") -> Batch:
    """Stack prompts and responses (token ids) into a Batch, padded on one side.

    Raises ValueError if the numbers differ, a sequence is empty or `side` is neither "right" nor "left".
    """
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: must be 'right' or 'left'")
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one response a prompt is needed")
    if not all(prompts) or not all(responses):
        raise ValueError("an empty prompt or response: each needs at least one token")
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    attention = torch.zeros((len(prompts), width), dtype=torch.bool)
    response = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        start = 0 if side == "right" else width - len(p) - len(r)
        middle, end = start + len(p), start + len(p) + len(r)
        ids[row, start:end] = torch.tensor([*p, *r])
        attention[row, start:end] = True
        response[row, middle:end] = True
    return Batch(ids, attention, response)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    max_prompt: int,
    max_response: int,
) -> Batch:
    """Texts to a right-padded Batch; each different prompt is tokenised once."""
    known = {text: prompt_ids(tokenizer, text, max_prompt) for text in dict.fromkeys(prompts)}
    encoded = [response_ids(tokenizer, text, max_response) for text in responses]
    return pad([known[text] for text in prompts], encoded, tokenizer.pad_token_id)
