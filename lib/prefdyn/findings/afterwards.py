"""The measurement after the fact: G at every checkpoint that a trainer left, from preference pairs, as a lens folder.

A lens folder holds about.json and tables (parquet), with a row a step and, in turn, component, example, token, group:

    alignment    step, component, g, se, g_opt, se_opt, n, weight, cosine, cosine_opt, logp_targets, moved
    sequences    step, example, full, positive, negative; of pairs also omega, margin, a_chosen, a_rejected
    tokens       step, and the columns of `measure.token_table`
    groups       step, part (full, positive, negative), group (`lens.groups`), g, cosine
    likelihood   step, kind (chosen, rejected, target), logp, se (nats a response), per_token (nats a token), n
    texts        example, side, prompt, response

Columns are as `measure.AlignmentRun.compute` describes them. What the optimiser would make of a gradient (g_opt) is
not known: its state is a pickle, which is not read. The results of a checkpoint are kept in parts/ as soon as it is
done, under a hash of all that they depend on: the same question asked again goes on from there.
"""

import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lab import chat, data, folders, layouts, sources
from ..lab.layouts import DataError, shown
from ..lab.recipes import device
from ..lab.runs import versions
from ..lens import alignment, controls, memory, precision
from ..lens.batch import Batch, concatenate
from ..lens.groups import cosines, groups, inner_by_group
from ..lens.likelihood import sequence_logps
from ..lens.weights import TokenWeights
from ..methods import registry
from ..methods.base import Method, PairObjective
from ..methods.sft import sft_weights
from .asked import CHOICES, DTYPES, Probe, Question, Targets, context_of, digest_of, draw, make_targets, read_targets
from .measure import TOKENS_OF, token_table

COMPONENTS = ("full", "positive", "negative", "top", "middle", "bottom")
HALVES = ("full", "positive", "negative")
TABLES = ("alignment", "sequences", "tokens", "groups", "likelihood")
ROWS = 8  # a pass, where no limit on memory is given
SHOWN = 2000  # characters of a text in `texts`
FORMAT = 1  # of what is kept in parts/; another number finds nothing of this one


# One checkpoint


@dataclass(frozen=True)
class _Found:
    """What one checkpoint's passes give: weights, log-probs and scores of all rows; inner products by group."""

    weights: TokenWeights
    logps: torch.Tensor
    scores: torch.Tensor
    direction: alignment.Direction
    by_group: dict[str, dict[str, float]]  # <d, part> of each of HALVES
    cosine_by_group: dict[str, dict[str, float]]
    cosine: dict[str, float]
    excess: float  # of the check, as a part of what rounding explains


def _weighing(batch: Batch, w: torch.Tensor, rows: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Parts of the rows that have any weight; a row without it adds nothing to a gradient."""
    kept = (w != 0).any(-1).nonzero().squeeze(-1)
    if len(kept):
        own, w = batch.take(kept), w[kept]
        yield from ((part, w[place]) for place, part in own.pieces(rows))


def _passes(
    where: str,
    model: PreTrainedModel,
    targets: Batch,
    batch: Batch,
    weigh: Callable[[torch.Tensor], TokenWeights],
    method: str,
    rows: int,
) -> _Found:
    """d, one forward-mode pass, and a backward pass of either half of the objective, which checks the scores.

    The halves are of different rows as a rule, so together they cost what one backward pass of the whole does.
    """
    d = precision.target_direction(model, targets, size=rows)
    logps, scores = precision.token_scores(model, batch, d, method, size=rows)
    weights = weigh(logps)
    positive, negative = (
        precision.gradient(model, _weighing(batch, w, rows)) for w in (weights.w.clamp(min=0), weights.w.clamp(max=0))
    )
    of = groups(model)
    pp, nn, pn = (inner_by_group(*two, of) for two in ((positive,) * 2, (negative,) * 2, (positive, negative)))
    dd, dp, dn = (inner_by_group(d, other, of) for other in (d, positive, negative))
    inner = {"full": {g: dp[g] + dn[g] for g in dd}, "positive": dp, "negative": dn}
    # rounding may leave a sum of squares that cancels just below 0
    squares = {"full": {g: max(0.0, pp[g] + 2 * pn[g] + nn[g]) for g in dd}, "positive": pp, "negative": nn}
    for name, part in negative.items():
        positive[name] += part
    return _Found(
        weights=weights,
        logps=logps,
        scores=scores,
        direction=d,
        by_group=inner,
        cosine_by_group={half: cosines(inner[half], dd, squares[half]) for half in HALVES},
        cosine={half: _cosine(inner[half], dd, squares[half]) for half in HALVES},
        excess=precision.check(where, method, weights.w, (logps, scores), positive, d, model),
    )


def _cosine(ab: dict[str, float], aa: dict[str, float], bb: dict[str, float]) -> float:
    """Cosine over all groups."""
    lengths = math.sqrt(sum(aa.values()) * sum(bb.values()))
    return sum(ab.values()) / lengths if lengths > 0 else math.nan


class _Demonstrations:
    """Maximum likelihood on the chosen responses, with the interface of `PairObjective`."""

    def __init__(self, chosen: Batch):
        self.rows, self.size = chosen, len(chosen)

    def weights(self, logps: torch.Tensor, batch: Batch, index: torch.Tensor) -> TokenWeights:
        return sft_weights(batch.response)


def _objective(method: Method, question: Question, probe: Probe, reference: dict[str, torch.Tensor]):
    """The objective on the whole probe, and its rows: chosen ones first."""
    settings = dict(registry.settings(method, dict(question.settings)))
    if method.takes == "demonstrations":
        return _Demonstrations(probe.batches["chosen"])
    sides = [probe.batches[side] for side in data.SIDES] + [reference[side] for side in data.SIDES]
    if method.objective is not None:
        return method.objective(*sides, **settings)
    more = [probe.batches["mismatched"], reference["mismatched"]] if method.kl else []
    return PairObjective(method, *sides, *more, **settings)


def _likelihood(kind: str, logps: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    """A row of the table: log-probs of whole responses [N], and their tokens [N]."""
    logps, n = logps.double(), len(logps)
    se = (logps.std() / math.sqrt(n)).item() if n > 1 else math.nan
    per_token = (logps.sum() / lengths.sum()).item()
    return {"kind": kind, "logp": logps.mean().item(), "se": se, "per_token": per_token, "n": n}


def tables_at(
    where: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    objective,
    targets: Batch,
    method: str,
    rows: int,
) -> tuple[dict[str, pd.DataFrame], _Found]:
    """The TABLES of one checkpoint without the column step, `moved` still NaN."""
    n = len(probe.rows)
    index = torch.arange(n, device=targets.ids.device)
    batch = objective.rows
    found = _passes(where, model, targets, batch, lambda logps: objective.weights(logps, batch, index), method, rows)
    own = {
        name: alignment.by_sequence(found.weights, found.scores, name).reshape(-1, n).sum(0).double().cpu().numpy()
        for name in COMPONENTS
    }
    target = sequence_logps(model, targets, rows)
    summary = pd.DataFrame(
        {
            "component": list(COMPONENTS),
            "g": [g.sum() for g in own.values()],
            "se": [np.sqrt(n * g.var(ddof=1)) if n > 1 else np.nan for g in own.values()],
            "g_opt": np.nan,
            "se_opt": np.nan,
            "n": n,
            "weight": [controls.apply(name, found.weights).abs().sum().item() for name in COMPONENTS],
            "cosine": [found.cosine.get(name, np.nan) for name in COMPONENTS],
            "cosine_opt": np.nan,
            "logp_targets": target.double().mean().item(),
            "moved": np.nan,
        }
    )
    sequences = {"example": np.arange(n, dtype=np.int32)} | {half: own[half].astype(np.float32) for half in HALVES}
    if isinstance(objective, PairObjective):
        chosen, rejected, *_ = found.scores.sum(-1).split(n)
        sequences |= {
            "omega": found.weights.strength.float().cpu().numpy(),
            "margin": objective.pairs(found.logps, batch.response, index).margin().float().cpu().numpy(),
            "a_chosen": chosen.float().cpu().numpy(),
            "a_rejected": rejected.float().cpu().numpy(),
        }
    return {
        "alignment": summary,
        "sequences": pd.DataFrame(sequences),
        "tokens": _tokens(tokenizer, batch, found, n),
        "groups": pd.DataFrame(
            [
                {"part": half, "group": group, "g": g, "cosine": found.cosine_by_group[half][group]}
                for half in HALVES
                for group, g in found.by_group[half].items()
            ]
        ),
        "likelihood": pd.DataFrame(_likelihoods(model, probe, batch, found, n, targets, target, rows)),
    }, found


def _likelihoods(
    model: PreTrainedModel,
    probe: Probe,
    batch: Batch,
    found: _Found,
    n: int,
    targets: Batch,
    target: torch.Tensor,
    rows: int,
) -> Iterator[dict[str, Any]]:
    """Rows for both sides of the pairs and for D'; a side that the objective does not read has a pass of its own."""
    for place, side in enumerate(data.SIDES):
        block = slice(place * n, (place + 1) * n)
        if block.stop <= len(batch):
            yield _likelihood(side, found.logps[block].sum(-1), batch.response[block].sum(-1))
        else:
            own = probe.batches[side]
            yield _likelihood(side, sequence_logps(model, own, rows), own.response.sum(-1))
    yield _likelihood("target", target, targets.response.sum(-1))


def _tokens(tokenizer: PreTrainedTokenizerBase, batch: Batch, found: _Found, n: int) -> pd.DataFrame:
    """`measure.token_table` of the pairs; rows that only make a divergence have no unit, and are no one's tokens."""
    real = torch.arange(min(len(batch), 2 * n), device=batch.ids.device)
    weights = TokenWeights(found.weights.w[real], found.weights.strength, found.weights.unit[real])
    unknown = torch.full_like(found.scores[real], torch.nan)
    sides = (found.logps[real], found.scores[real], unknown)
    return token_table(batch.take(real), tokenizer, weights, *sides, n, TOKENS_OF).reset_index(drop=True)


def _along(direction: alignment.Direction, model: PreTrainedModel) -> float:
    """<direction, parameters>, in float64, so that a small difference of two of them keeps its digits.

    What is not finite, such as a bias that is -inf, stays where it is, and counts as 0.
    """
    named = dict(model.named_parameters())
    finite = ((t, named[name].detach()) for name, t in direction.items())
    return sum((t.double() * torch.where(p.isfinite(), p, 0.0).double()).sum().item() for t, p in finite)


# A series


class Follow:
    """A question asked of a series, checkpoint by checkpoint.

    Args: series, of `folders.read`. reference, a folder or a name on the hub, None for the default: of adapters their
    base, else a checkpoint of step 0. out, the lens folder. rows, a pass at most; fewer where memory runs out. limit,
    bytes that the process may use, from which rows are found, or None. command, as one would type it. tell, what
    reports are given to.
    Raises ValueError, of which FolderError and DataError are kinds, that says what does not fit.
    """

    def __init__(
        self,
        series: folders.Series,
        question: Question,
        out: Path,
        *,
        reference: str | None = None,
        rows: int = ROWS,
        limit: int | None = None,
        command: str | None = None,
        tell: Callable[[str], None] = print,
    ):
        self._series, self._question, self._out, self._tell = series, question, out, tell
        self._method, self._command, self._limit = question.found(), command, limit
        before = _about_before(out)
        is_same = bool(before) and before.get("command") == command
        self._made = before["made"] if is_same else datetime.now(UTC).isoformat(timespec="seconds")
        if reference is not None:
            folders.require_there("reference", reference)
        self._reference, self._reference_told = self._which_reference(reference)
        self._tokenizer, where = folders.tokenizer_of(series, reference)
        if reference is not None and self._method.takes != "pairs" and where != reference:
            raise ValueError(f"reference={reference!r}: method={self._method.name!r} reads no reference; leave it out")
        today = self._made[:10]  # a template that asks for the date is told the same one when this is resumed
        self._dated = "strftime_now" in str(self._tokenizer.chat_template)
        self._tokenizer.chat_template = chat.with_date(self._tokenizer.chat_template, today)
        if question.targets not in CHOICES:
            read_targets(question.targets)  # what cannot be read is said before anything is computed
        self._context = context_of(series)
        self._probe = draw(question, self._method, self._tokenizer, self._context)
        self._loader = folders.Loader(series, where, device(), DTYPES[question.dtype])
        self._rows, self._rows_told = rows, None
        self._way: str | None = None
        self._error: str | None = None

    def _which_reference(self, given: str | None) -> tuple[str | None, str]:
        """Where the reference is, or None, and a sentence on it. Raises ValueError if one is needed and not there."""
        first = self._series.checkpoints[0]
        if given is not None:
            return given, f"The reference is {Path(given).name!r}, as given."
        if self._method.takes != "pairs":
            return None, ""
        if not self._method.reference:
            return None, f"{self._method.name} reads no reference; margins are differences of plain log-probs."
        if self._series.adapter is not None:
            return self._series.base, "The reference is the base model without the adapter."
        if first.step == 0:
            return str(first.folder), f"The reference is {first.name}, the checkpoint of step 0."
        raise ValueError(
            f"reference: method={self._method.name!r} compares with a reference policy and none was given; allowed: "
            "--reference with the model that the run started from, or a checkpoint of step 0 among the checkpoints"
        )

    def run(self) -> Path:
        """Measure what is not measured yet; returns the lens folder, with its tables and about.json."""
        self._out.mkdir(parents=True, exist_ok=True)
        reference = self._reference_logps()
        targets = self._targets()
        batch = targets.batch(self._tokenizer.pad_token_id)
        objective = _objective(self._method, self._question, self._probe, reference)
        keys = self._keys(targets, reference)
        texts = _texts(self._probe, data.SIDES if self._method.takes == "pairs" else data.SIDES[:1])
        _replace(self._out / "texts.parquet", texts.to_parquet)
        before: tuple[folders.Checkpoint, dict, dict, alignment.Direction, float] | None = None
        last = self._series.checkpoints[-1]
        for checkpoint in self._series.checkpoints:
            kept = self._part(checkpoint, keys).is_dir()
            if kept and before is None:
                self._tell(f"{checkpoint.name}: measured before")
                continue
            model = None  # the one before makes room
            model = self._loader.model(checkpoint)
            if before is not None:
                earlier, tables, record, direction, at = before
                tables["alignment"]["moved"] = _along(direction, model) - at
                before = direction = None
                self._keep(earlier, keys, tables, record, targets)
            if kept:
                self._tell(f"{checkpoint.name}: measured before")
                continue
            tables, record, direction = self._measure(checkpoint, model, objective, batch)
            if checkpoint == last:
                self._keep(checkpoint, keys, tables, record, targets)
            else:
                before = checkpoint, tables, record, direction, _along(direction, model)
            del direction
        self._write(keys, targets)
        return self._out

    def _keys(self, targets: Targets, reference: dict[str, torch.Tensor]) -> dict[int, str]:
        """By step, a hash of all that the results of a checkpoint depend on, the next checkpoint included."""
        known = {
            "format": FORMAT,
            "method": self._method.name,
            "settings": registry.settings(self._method, dict(self._question.settings)),
            "dtype": self._question.dtype,
            "probe": self._probe.digest(),
            "targets": [targets.prompts, targets.responses],
            "reference": {name: t.tolist() for name, t in reference.items()},
        }
        names = [folders.identity(self._series, c) for c in self._series.checkpoints]
        self._identities = {c.step: name for c, name in zip(self._series.checkpoints, names, strict=True)}
        return {
            c.step: digest_of([known, own, following, c.step])
            for c, own, following in zip(self._series.checkpoints, names, [*names[1:], None], strict=True)
        }

    def _part(self, checkpoint: folders.Checkpoint, keys: dict[int, str]) -> Path:
        return self._out / "parts" / f"{checkpoint.step}-{keys[checkpoint.step][:16]}"

    def _reference_logps(self) -> dict[str, torch.Tensor]:
        """Log-probs of whole responses of the probe under the reference, [N] by side; 0 where there is none."""
        batches = self._probe.batches
        if self._method.takes != "pairs":
            return {}
        if self._reference is None:
            return {name: torch.zeros(len(b), device=b.ids.device) for name, b in batches.items()}
        is_base = self._series.adapter is not None and self._reference == self._series.base
        content = folders.model_identity(self._reference, self._series.revision if is_base else None)
        first = folders.identity(self._series, self._series.checkpoints[0])  # which the reference is compared with
        key = digest_of([FORMAT, content, first, self._question.dtype, self._probe.digest()])
        file = self._out / "parts" / f"reference-{key[:16]}.json"
        if not file.is_file():
            if is_base:
                model, told = self._loader.base(), self._reference_told
            elif self._reference == str(self._series.checkpoints[0].folder):
                model, told = self._loader.model(self._series.checkpoints[0]), self._reference_told
            else:
                model, distance = self._loader.reference(self._reference)
                told = f"{self._reference_told} {distance}"
            _require_words(model, batches)
            logps, self._rows = memory.fitting(
                lambda rows: {name: sequence_logps(model, b, rows).tolist() for name, b in batches.items()}, self._rows
            )
            _write_json(file, {"logps": logps, "told": told})
        known = json.loads(file.read_text(encoding="utf-8"))
        self._reference_told = known["told"]
        return {name: torch.tensor(values, device=device()) for name, values in known["logps"].items()}

    def _targets(self) -> Targets:
        """D', made once."""
        last = self._series.checkpoints[-1]
        question, content = self._question, None
        if question.targets == "final":
            content = folders.identity(self._series, last)
        elif question.targets != "chosen":
            content = sources.fingerprint(question.targets)
        asked = [question.targets, content, question.dtype, question.max_prompt, question.max_response]
        rows = [[layouts.identity(row["prompt"]), row["chosen"]] for row in (*self._probe.rows, *self._probe.others)]
        key = digest_of([FORMAT, asked, rows, self._probe.digest(), self._context])
        file = self._out / "parts" / f"targets-{key[:16]}.json"
        if not file.is_file():
            given = (question, self._probe, self._tokenizer)
            _write_json(file, asdict(make_targets(*given, lambda: self._loader.model(last), last.name, self._context)))
        return Targets(**json.loads(file.read_text(encoding="utf-8")))

    def _measure(
        self, checkpoint: folders.Checkpoint, model: PreTrainedModel, objective, targets: Batch
    ) -> tuple[dict[str, pd.DataFrame], dict[str, Any], alignment.Direction]:
        """Tables of a checkpoint, what is to be recorded of it, and d."""
        began = time.monotonic()
        if self._way is None:
            _require_words(model, self._probe.batches | {"targets": targets})
            self._way = alignment.choose_method(model, self._tokenizer)
            self._find_rows(model, concatenate([objective.rows, targets]))
        given = (model, self._tokenizer, self._probe, objective, targets, self._way)
        (tables, found), self._rows = memory.fitting(lambda rows: tables_at(checkpoint.name, *given, rows), self._rows)
        moving = [p.numel() for p in model.parameters() if p.requires_grad]
        record = {
            "method": self._way,
            "excess": found.excess,
            "rows": self._rows,
            "rows_told": self._rows_told,
            "error": self._low_precision_error(model, objective, found, targets),
            "memory": _most_memory(),
            "model": {
                "class": type(model).__name__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "moving": sum(moving),
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "seconds": time.monotonic() - began,
        }
        return tables, record, found.direction

    def _find_rows(self, model: PreTrainedModel, batch: Batch) -> None:
        """Find the rows of a pass that fit into the limit on memory, by passes over the longest row."""
        if self._limit is None:
            return
        longest = batch.rows(batch.attention.sum(-1).argmax()[None])

        def cost(n: int) -> None:
            part = longest.take(torch.zeros(n, dtype=torch.int64, device=longest.ids.device))
            _passes("memory", model, part, part, lambda logps: sft_weights(part.response), self._way, n)

        left = self._limit - memory.held(device())
        if left < 1:
            raise memory.DoesNotFit(
                f"memory: {memory.readable(self._limit)} is less than what is in use once a model is loaded, "
                f"{memory.readable(memory.held(device()))}"
            )
        found = memory.rows_within(left, cost, len(batch), device())
        self._rows, self._rows_told = found.rows, str(found)

    def _low_precision_error(self, model: PreTrainedModel, objective, found: _Found, targets: Batch) -> str | None:
        """A sentence on how far low precision is from float32, at the first checkpoint that is measured."""
        if precision.low(model) is None or self._error is not None:
            return self._error
        try:
            error, _ = memory.fitting(
                lambda rows: precision.error(
                    model, precision.in_float32(model), objective.rows, found.weights, targets, rows
                ),
                self._rows,
            )
            self._error = f"At one checkpoint, {error}."
        except memory.DoesNotFit as error:
            self._error = f"The error of {model.dtype} was not measured: a copy in float32 does not fit ({error})."
        return self._error

    def _keep(
        self,
        checkpoint: folders.Checkpoint,
        keys: dict[int, str],
        tables: dict[str, pd.DataFrame],
        record: dict[str, Any],
        targets: Targets,
    ) -> None:
        """Keep a checkpoint's results: whole or not at all."""
        part = self._part(checkpoint, keys)
        unfinished = part.with_name(f".{part.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, table in tables.items():
            table.insert(0, "step", np.int32(checkpoint.step))
            table.to_parquet(unfinished / f"{name}.parquet")
        _write_json(unfinished / "record.json", record)
        os.replace(unfinished, part)
        full = tables["alignment"].iloc[0]
        told = f"G = {full['g']:.4g} (standard error {full['se']:.2g}), cosine {full['cosine']:.3f}"
        self._tell(f"{checkpoint.name}: {told}; {record['seconds']:.1f} s")
        self._write(keys, targets)

    def _write(self, keys: dict[int, str], targets: Targets) -> None:
        """The tables and about.json of what is measured so far."""
        done = [c for c in self._series.checkpoints if self._part(c, keys).is_dir()]
        for name in TABLES:
            whole = pd.concat(
                [pd.read_parquet(self._part(c, keys) / f"{name}.parquet") for c in done], ignore_index=True
            )
            if name == "tokens":
                whole["token"] = whole["token"].astype("category")
            _replace(self._out / f"{name}.parquet", whole.to_parquet)
        records = [json.loads((self._part(c, keys) / "record.json").read_text(encoding="utf-8")) for c in done]
        _write_json(self._out / "about.json", self._about(done, records, targets))

    def _about(self, done: list[folders.Checkpoint], records: list[dict], targets: Targets) -> dict[str, Any]:
        method, question, series = self._method, self._question, self._series
        adapter = None if series.adapter is None else folders.adapter_sentence(series.adapter)
        where = self._reference
        return {
            "kind": "after",
            "title": f"{method.title} on {self._probe.about['name']}: {done[0].folder.resolve().parent.name}",
            "made": self._made,
            "command": self._command,
            "method": {
                "name": method.name,
                "title": method.title,
                "settings": dict(registry.settings(method, dict(question.settings))),
                "loss": method.source,
            },
            "targets": {
                "what": question.targets if question.targets in CHOICES else Path(question.targets).name,
                "count": len(targets.responses),
                "sentence": targets.sentence,
            },
            "models": [{"step": c.step, "name": c.name, "sha256": self._identities[c.step]} for c in done],
            "reference": None if where is None else Path(where).name if Path(where).is_dir() else where,
            "model": records[0]["model"] | {"adapter": adapter},
            "data": self._probe.about,
            "accuracy": _accuracy(records),
            "cost": {
                "seconds": round(sum(record["seconds"] for record in records), 3),
                "share": None,
                "rows": min(record["rows"] for record in records),
                "memory": records[-1]["memory"],
            },
            "versions": _versions(series.adapter is not None),
            "hardware": _hardware(),
            "notes": self._notes(records[0], adapter, done),
        }

    def _notes(self, record: dict, adapter: str | None, done: list[folders.Checkpoint]) -> list[str]:
        """What a reader must know, in sentences."""
        series, notes = self._series, [self._reference_told] if self._reference_told else []
        model, stored = record["model"], ", ".join(series.stored)
        notes.append(
            "G for the optimiser's steps (g_opt) is not known: the optimiser's state is a pickle, which is not read."
        )
        notes.append(f"Weights are stored as {stored}, and were computed with in {model['dtype']}.")
        if adapter is None:
            notes.append("All parameters count as moving; which of them a trainer kept fixed is not in a checkpoint.")
        else:
            notes.append(
                f"The alignment is over the {model['moving']} trained parameters of the adapter alone ({adapter}), on "
                f"the base {Path(series.base).name}, of {model['parameters']} parameters with it."
            )
        if self._dated:
            notes.append(f"The chat template asks for the date, and was told {self._made[:10]}.")
        if record["rows_told"]:
            notes.append(f"Memory: {record['rows_told']}.")
        if len(done) < len(series.checkpoints):
            notes.append(f"{len(done)} of {len(series.checkpoints)} checkpoints are measured so far.")
        return [*notes, *series.notes, *self._probe.notes]


def _require_words(model: PreTrainedModel, batches: dict[str, Batch]) -> None:
    """Raise DataError for tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    for name, batch in batches.items():
        beyond = batch.attention & (batch.ids >= rows)
        if bool(beyond.any()):
            raise DataError(
                f"pairs: {int(beyond.sum())} tokens of {name} in {int(beyond.any(-1).sum())} of {len(batch)} rows have "
                f"ids from {int(batch.ids[beyond].min())} on, and the model has {rows} embeddings; the tokenizer is "
                "not the model's"
            )


def _texts(probe: Probe, sides: Sequence[str]) -> pd.DataFrame:
    """The texts of the examples whose tokens are kept."""
    rows = [
        {
            "example": example,
            "side": side,
            "prompt": shown(row["prompt"])[:SHOWN],
            "response": row[name][:SHOWN],
        }
        for example, row in enumerate(probe.rows[:TOKENS_OF])
        for side, name in enumerate(sides)
    ]
    return pd.DataFrame(rows).astype({"example": np.int32, "side": np.int8})


def _accuracy(records: list[dict]) -> dict[str, str]:
    """How the scores were checked, and what low precision did to them."""
    largest = max(record["excess"] for record in records)
    told = (
        f"At each of {len(records)} checkpoints G of the scores was compared with a backward pass; the largest "
        f"difference is {largest:.2g} of what rounding explains."
    )
    errors = [record["error"] for record in records if record["error"]]
    return {"method": records[-1]["method"], "sentence": " ".join([told, *errors[:1]])}


def _most_memory() -> str:
    """The most memory that was in use, in words."""
    if torch.cuda.is_available():
        return f"{memory.readable(torch.cuda.max_memory_allocated())} of {torch.cuda.get_device_name()}"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return f"{memory.readable(most)} of the process"


def _versions(with_peft: bool) -> dict[str, str]:
    own = {"prefdyn": importlib.metadata.version("prefdyn"), "python": platform.python_version()}
    return versions() | own | ({"peft": importlib.metadata.version("peft")} if with_peft else {})


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"


def _about_before(out: Path) -> dict[str, Any]:
    """about.json of an earlier measurement in the folder, {} if there is none. Raises ValueError for what is none."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; allowed: a folder, or the name of a new one")
    if not (out / "about.json").is_file():
        return {}
    try:
        about = json.loads((out / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or about.get("kind") != "after":
        raise ValueError(
            f"out={str(out)!r}: its about.json is not of a measurement after the fact, and would be written over; name "
            "another folder with --out"
        )
    return about


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}")
    write(beside)
    os.replace(beside, path)


def _write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    _replace(path, lambda beside: beside.write_text(text, encoding="utf-8"))
