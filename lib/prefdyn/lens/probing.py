"""A measurement inside a trainer: what it is made on, a probe and targets, and what it finds.

Trainers lay examples out in rows of their own ways (`layout_of`). A probe is collated once, by the trainer itself;
`probed` computes the trainer's loss of it and reads every token's weight and score out of that (see `captured`).
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from . import captured
from .alignment import Direction, MeasurementError
from .batch import Batch, concatenate, pad

OFFLINE = "prefdyn lens RUN/checkpoint-*"


# What is refused


def check_trainer(trainer: Any) -> None:
    """Raises TypeError or ValueError that says what of a trainer cannot be measured."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer: given a {type(trainer).__name__}; a transformers.Trainer, or one built on it, is needed"
        )
    args, model = trainer.args, trainer.model
    sharded = {
        f"world_size={args.world_size}": args.world_size > 1,
        f"n_gpu={args.n_gpu}": args.n_gpu > 1,
        "DeepSpeed": getattr(trainer, "is_deepspeed_enabled", False),
        "FSDP": getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_fsdp_xla_enabled", False),
    }
    if found := [name for name, there in sharded.items() if there]:
        raise ValueError(
            f"trainer: LensCallback measures a model that one process holds as a whole, and this trainer has "
            f"{', '.join(found)}; train on one device, or measure the checkpoints afterwards: {OFFLINE}"
        )
    if getattr(trainer, "padding_free", False) or getattr(args, "packing", False):
        raise ValueError(
            "trainer: padding_free or packing puts several sequences into one row; only rows of one are measured"
        )
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"trainer: the adapter {name!r} ({adapter.peft_type}) adds virtual tokens; LoRA can be measured"
            )
    if not captured.moving(model):
        raise ValueError("trainer: no parameter of its model requires a gradient, so that nothing can move")
    if "input_ids" not in inspect.signature(type(captured.base_of(model)).forward).parameters:
        raise ValueError(
            f"trainer: its model {type(model).__name__} takes no input_ids; a causal language model is needed"
        )


# Examples and targets


def layout_of(trainer: Any) -> str:
    """How a trainer's rows make examples: "pairs", "judged" (desirable or not), "rollouts" or "single"."""
    names = {kind.__name__ for kind in type(trainer).__mro__}
    known = {"DPOTrainer": "pairs", "KTOTrainer": "judged", "GRPOTrainer": "rollouts", "RLOOTrainer": "rollouts"}
    return next((layout for name, layout in known.items() if name in names), "single")


@dataclass(frozen=True)
class Collated:
    """A probe as the trainer collates it: batches with their numbers of examples."""

    name: str
    records: int
    batches: list[tuple[int, dict[str, Any]]]


def collated(trainer: Any, size: int) -> Collated:
    """The first examples of the eval dataset, or of the train dataset, through the trainer's own collator."""
    name = "eval_dataset" if trainer.eval_dataset is not None else "train_dataset"
    data = getattr(trainer, name)
    if isinstance(data, dict):
        first = next(iter(data))
        name, data = f"{name}[{first!r}]", data[first]
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(
            f"probe: {name} is a {type(data).__name__}; its examples cannot be read without taking them from training; "
            "give the trainer an eval_dataset that has a length"
        )
    records, collate = len(data), trainer.data_collator
    if records == 0:
        raise ValueError(f"probe: {name} is empty")
    if hasattr(data, "column_names"):
        data = trainer._remove_unused_columns(data, description="lens")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="lens")
    examples = [data[i] for i in range(min(size, records))]
    rows, batches = trainer.args.per_device_train_batch_size, []
    for start in range(0, len(examples), rows):
        part = [dict(e) if isinstance(e, Mapping) else e for e in examples[start : start + rows]]
        batches.append((len(part), dict(collate(part))))
    if pictures := [key for key in batches[0][1] if "pixel" in key or "image" in key]:
        raise ValueError(f"trainer: its batches hold {', '.join(pictures)}; only text can be measured")
    return Collated(name, records, batches)


def targets_of(trainer: Any, layout: str, data: Collated | None, given: Any) -> tuple[Batch, tuple[str, str], int]:
    """D', what it is (a name and a sentence), and how many chosen responses had no token. Raises ValueError."""
    advice = "give a list of {'prompt': ..., 'response': ...}"
    if isinstance(given, str):
        if given != "chosen":
            raise ValueError(f"targets={given!r}: allowed are 'chosen' and a list or dataset; {advice}")
        name = type(trainer).__name__
        if layout == "rollouts":
            raise ValueError(f"targets='chosen': {name} samples its responses, and none is chosen beforehand; {advice}")
        key = "labels" if layout == "single" else "completion_mask"
        if missing := {"input_ids", key} - set(data.batches[0][1]):
            raise ValueError(f"targets='chosen': the batches of {name} have no {', '.join(sorted(missing))}; {advice}")
        batch, unusable = _chosen(layout, data)
        what = {"pairs": "chosen responses", "judged": "desirable completions"}.get(layout, "completions")
        if len(batch) == 0:
            raise ValueError(
                f"targets='chosen': there are no {what} among the {sum(n for n, _ in data.batches)} of the probe"
            )
        return batch, ("chosen", f"the {what} of the probe"), unusable
    rows = list(given) if hasattr(given, "__iter__") and not isinstance(given, Mapping) else None
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        found = "nothing in it" if rows == [] else type(given).__name__
        raise ValueError(f"targets: given {found}; allowed are 'chosen' and a list or dataset; {advice}")
    tokenizer = tokenizer_of(trainer)
    if tokenizer is None:
        raise ValueError("targets: the trainer has no processing_class that could tokenize them")
    pairs = [_encoded(tokenizer, row, place) for place, row in enumerate(rows)]
    named = getattr(getattr(given, "info", None), "dataset_name", None)
    batch = pad(*zip(*pairs, strict=True), tokenizer.pad_token_id or 0)
    return batch, (named or "given", f"{len(rows)} responses that were given"), 0


def _chosen(layout: str, data: Collated) -> tuple[Batch, int]:
    """Chosen, desirable or all responses of a probe, and how many were left out since nothing of them is left."""
    batches, unusable = [], 0
    for count, inputs in data.batches:
        ids = inputs["input_ids"]
        attention = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        response = inputs["labels"] != -100 if layout == "single" else inputs["completion_mask"].bool()
        response = response & attention
        response[:, 0] = False
        wanted = torch.ones(len(ids), dtype=torch.bool)
        if layout == "pairs":
            wanted[count:] = False
        elif layout == "judged":
            wanted = torch.as_tensor(inputs["label"]).bool()
        usable = wanted & response.any(-1)
        unusable += int(wanted.sum() - usable.sum())
        batches.append(Batch(ids, attention, response).take(usable.nonzero().squeeze(-1)))
    return concatenate(batches), unusable


def _encoded(tokenizer: Any, row: Mapping[str, Any], place: int) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and the response of one target. Raises ValueError that names it."""
    response = row.get("response", row.get("completion"))
    prompt = row.get("prompt")
    if prompt is None or response is None:
        raise ValueError(f"targets[{place}]: given {sorted(row)}; 'prompt' and 'response' (or 'completion') are needed")
    if isinstance(prompt, str) != isinstance(response, str):
        raise ValueError(f"targets[{place}]: prompt and response must both be texts or both be lists of messages")
    if isinstance(prompt, str):
        asked = tokenizer(text=prompt)["input_ids"]
        if asked and asked[-1] == tokenizer.eos_token_id:
            asked = asked[:-1]  # some tokenizers end whatever they are given
        said = tokenizer(text=response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is None:
            raise ValueError("targets: the tokenizer has no eos_token that could end a response")
        said = said if said and said[-1] == tokenizer.eos_token_id else [*said, tokenizer.eos_token_id]
    else:
        if not tokenizer.chat_template:
            raise ValueError(f"targets[{place}]: a conversation, and the tokenizer has no chat_template")
        asked = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*prompt, *response], return_dict=False)
        if whole[: len(asked)] != asked:
            raise ValueError(f"targets[{place}]: the chat template does not continue its prompt with the response")
        said = whole[len(asked) :]
    if not asked or not said:
        raise ValueError(f"targets[{place}]: an empty {'prompt' if not asked else 'response'}")
    return list(asked), list(said)


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer of a trainer, be it inside of a processor; None if it has none."""
    given = trainer.processing_class
    return getattr(given, "tokenizer", given)


# One measurement


@dataclass(frozen=True)
class Found:
    """Tokens of a probe, on the CPU: [R, T], and the example and side (0 chosen or only, 1 rejected) of rows [R]."""

    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor
    w: torch.Tensor
    logps: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor  # contributions to G
    example: torch.Tensor
    side: torch.Tensor

    def by_example(self, each: torch.Tensor) -> torch.Tensor:
        """Sums [examples] of [R, T]."""
        total = torch.zeros(int(self.example.max()) + 1, dtype=torch.float64)
        return total.index_add(0, self.example, each.double().sum(-1))


def _join(parts: list[Found]) -> Found:
    """Rows of all parts, padded on the right to the longest."""
    width = max(part.ids.shape[1] for part in parts)

    def stack(name: str) -> torch.Tensor:
        each = [getattr(part, name) for part in parts]
        if each[0].ndim == 1:
            return torch.cat(each)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in each])

    return Found(*(stack(field.name) for field in fields(Found)))


@dataclass(frozen=True)
class Probed:
    """What a measurement finds of the trainer's loss on a probe, mean over its examples.

    found: the tokens that it weighs. ascent: -gradient, by the names of `captured.moving`. room: what of the difference
    of the two rounding explains. notes: sentences on what was measured, the latest of each kind.
    """

    found: Found
    ascent: Direction
    room: float
    notes: dict[str, str]


def probed(
    trainer: Any, layout: str, batches: list[tuple[int, dict[str, Any]]], direction: Direction, method: str
) -> Probed:
    """The trainer's loss on a probe, in `batches` with their numbers of examples; method, of `alignment.METHODS`.

    Raises MeasurementError for what of the loss cannot be measured.
    """
    model = trainer.model
    named, parts, examples = captured.moving(model), [], 0
    ascent = {name: torch.zeros_like(p) for name, p in named.items()}
    total, room, notes = sum(count for count, _ in batches), 0.0, {}
    for count, inputs in batches:
        inputs = _on_device(trainer, inputs)
        with torch.enable_grad(), captured.listening(model) as calls:
            loss = trainer.compute_loss(model, dict(inputs))
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0 or not bool(loss.isfinite()):
            raise MeasurementError(f"the trainer's loss of the probe is {loss!r}; a finite scalar is needed")
        grads, readings = captured.read(loss * (count / total), calls, list(named.values()))
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                ascent[name] -= grad
        rows = sum(len(reading.call.batch) for reading in readings)
        example, side = _places(layout, rows, count, inputs)
        start = 0
        for reading in readings:
            own = slice(start, start + len(reading.call.batch))
            found, explained, note = _scored(trainer, reading, example[own] + examples, side[own], direction, method)
            parts.append(found)
            room += explained
            notes |= {"residual": note} if note else {}
            start = own.stop
        examples += int(example.max()) + 1
        del loss, grads, readings, calls  # a graph at a time
    return Probed(_join(parts), ascent, room, notes)


def _scored(
    trainer: Any,
    reading: captured.Reading,
    example: torch.Tensor,
    side: torch.Tensor,
    direction: Direction,
    method: str,
) -> tuple[Found, float, str]:
    """Scores of the tokens of one call and what each contributes to G, what rounding explains, and a note or ""."""
    model, call = trainer.model, reading.call
    temperature = float(getattr(trainer, "temperature", 1.0)) if reading.logps is not None else 1.0
    vocabulary = captured.base_of(model).config.get_text_config().vocab_size
    logps, a = captured.scores(model, call, direction, method, temperature, vocabulary)
    coarsest = captured.coarsest_of(direction, trainer.accelerator.mixed_precision)
    if reading.logps is not None:
        room = (1e-3 if torch.finfo(coarsest).eps < 1e-6 else 0.1) * (1 + logps.abs())
        off = (logps - reading.logps).abs()[call.batch.response]
        if bool((off > room[call.batch.response]).any()):
            raise MeasurementError(
                f"log-probs that the loss reads are up to {off.max().item():.3g} nats from those of the model at "
                f"temperature {temperature:g}: what the trainer does to them cannot be measured"
            )
    w = reading.w.to(a.dtype)
    c, note = w * a, ""
    explained = captured.explained(method, coarsest, w, (logps, a))
    if reading.at_logits:
        if method != "forward":
            raise MeasurementError("a loss that reads more than log-probs of tokens needs a forward derivative")
        whole = captured.contributions(model, reading, direction, temperature, vocabulary)
        size = whole.abs().sum().item()
        left = (whole - c).abs().sum().item() / size if size else 0.0
        note = (
            "The loss reads more of distributions than log-probs of tokens: contributions are those of logits; "
            f"signs and strengths are those of token weights, which leave {left:.1%} of contributions."
        )
        c = whole
    elif reading.whole:
        left = math.sqrt(reading.left / reading.whole)
        note = f"Token weights are the whole loss: they leave {left:.1g} of dL/dlogits."
    batch = call.batch
    found = (t.cpu() for t in (batch.ids, batch.attention, batch.response, w, logps, a, c, example, side))
    return Found(*found), explained, note


def _places(layout: str, rows: int, count: int, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Example and side of the rows of a batch, [rows] each, int64."""
    needed = {"pairs": 2 * count, "judged": count}.get(layout, rows)
    if rows != needed:
        raise MeasurementError(f"the loss reads {rows} rows of {count} examples, where {needed} were expected")
    if layout == "pairs":
        return torch.arange(count).repeat(2), torch.arange(2).repeat_interleave(count)
    side = torch.zeros(rows, dtype=torch.int64)
    if layout == "judged":
        side = 1 - torch.as_tensor(inputs["label"]).long().cpu()
    return torch.arange(rows), side


def _on_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs where the model is; GRPO's own preparation would sample."""
    from transformers import Trainer

    return Trainer._prepare_input(trainer, inputs)
