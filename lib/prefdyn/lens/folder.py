"""A lens folder as the callback writes it while training goes on, and the rows of its tables.

It holds about.json and, a JSON object a row, TABLE.jsonl of alignment, sequences, tokens, groups, likelihood, texts and
steps. Contributions to G are in nats a unit of learning rate, log-likelihoods in nats.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import captured, controls
from .alignment import Direction
from .groups import groups, inner_by_group
from .losses import from_loss
from .probing import Found
from .weights import TokenWeights

COMPONENTS = ("full", "positive", "negative", "top", "middle", "bottom")
TOKENS_OF = 8  # examples whose tokens and texts are written
TEXT = 2_000  # characters of a text that are written
PACKAGES = ("prefdyn", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")


def token_weights(layout: str, found: Found, factor: float) -> TokenWeights:
    """Token weights of a probe; a unit is a pair, a whole response or, of rollouts, a token.

    factor: the strength of a unit is that times the mean size of its weights.
    """
    unit = None
    if layout != "rollouts":
        unit = found.example[:, None].expand_as(found.response).masked_fill(~found.response, -1)
    w = found.w.masked_fill(~found.response, 0.0)
    weights = from_loss(lambda logps: -(w * logps).sum(), torch.zeros_like(w), found.response, unit)
    return TokenWeights(w=weights.w, strength=weights.strength * factor, unit=weights.unit)


def component(name: str, weights: TokenWeights, c: torch.Tensor) -> torch.Tensor:
    """The part of contributions [R, T] that a component keeps; NaN where it is undefined."""
    if name == "full":
        return c
    kept = controls.apply(name, weights) / torch.where(weights.w == 0, torch.ones_like(c), weights.w)
    return c * kept


def _error_of_sum(each: torch.Tensor) -> float:
    """Standard error of a sum over examples drawn at random, NaN for one."""
    return math.sqrt(len(each) * each.var().item()) if len(each) > 1 else math.nan


def alignment_rows(
    step: int, weights: TokenWeights, parts: dict[str, torch.Tensor], exact: float, cosine: float, logp_targets: float
) -> list[dict[str, Any]]:
    """Rows of `alignment` from contributions [examples] by component; exact, cosine: G and cosine of the whole loss."""
    rows = []
    for name, each in parts.items():
        row = {"step": step, "component": name, "g": exact if name == "full" else each.sum().item()}
        row |= {"se": _error_of_sum(each), "g_opt": math.nan, "se_opt": math.nan, "n": len(each)}
        row |= {"weight": controls.apply(name, weights).abs().sum().item()}
        row |= {"cosine": cosine if name == "full" else math.nan, "cosine_opt": math.nan}
        rows.append(row | {"logp_targets": logp_targets, "moved": math.nan})
    return rows


def group_rows(step: int, model: torch.nn.Module, direction: Direction, ascent: Direction) -> list[dict[str, Any]]:
    """Rows of `groups`: where in the model d and the descent direction meet."""
    policy = captured.base_of(model)
    by_tensor = {id(p): name for name, p in policy.named_parameters()}
    of = groups(policy)
    own = {name: of[by_tensor[id(p)]] for name, p in captured.moving(model).items()}
    ab, aa, bb = (
        inner_by_group(*pair, own) for pair in ((direction, ascent), (direction, direction), (ascent, ascent))
    )
    lengths = {group: math.sqrt(aa[group] * bb[group]) for group in ab}
    return [
        {
            "step": step,
            "part": "full",
            "group": group,
            "g": g,
            "cosine": g / lengths[group] if lengths[group] else math.nan,
        }
        for group, g in ab.items()
    ]


def likelihood_row(step: int, kind: str, logps: torch.Tensor, response: torch.Tensor) -> dict[str, Any]:
    """A row of `likelihood` from log-probs of whole responses [N]."""
    n, logps = len(logps), logps.double()
    error = math.sqrt(logps.var().item() / n) if n > 1 else math.nan
    per_token = (logps.sum() / response.sum()).item()
    return {"step": step, "kind": kind, "logp": logps.mean().item(), "se": error, "per_token": per_token, "n": n}


def sequence_rows(
    step: int, first: int, found: Found, weights: TokenWeights, parts: dict[str, torch.Tensor], beta: float | None
) -> list[dict[str, Any]]:
    """Rows of `sequences`; of pairs also omega, margin (where the loss is DPO's own) and scores of both sides."""
    table = {name: parts[name].tolist() for name in ("full", "positive", "negative")}
    if bool((found.side == 1).any()) and len(found.example) == 2 * len(table["full"]):
        omega = weights.strength.double()
        table["omega"] = omega.tolist()
        table["margin"] = (-omega.logit() / beta).tolist() if beta else [math.nan] * len(omega)
        for side, name in enumerate(("a_chosen", "a_rejected")):
            table[name] = found.by_example(found.a * (found.side == side)[:, None]).tolist()
    return [
        {"step": step, "example": first + i, **{name: values[i] for name, values in table.items()}}
        for i in range(len(table["full"]))
    ]


def token_rows(step: int, first: int, found: Found, weights: TokenWeights, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `tokens`, of the first TOKENS_OF examples."""
    third = controls.thirds(weights.strength)
    start, rows = found.response.int().argmax(-1), []
    for row, column in found.response.nonzero().tolist():
        example = int(found.example[row])
        if example >= TOKENS_OF:
            continue
        token, unit = int(found.ids[row, column]), int(weights.unit[row, column])
        values = {"step": step, "example": first + example, "side": int(found.side[row])}
        values |= {
            "position": column - int(start[row]),
            "token": tokenizer.decode([token]) if tokenizer else str(token),
        }
        values |= {name: float(t[row, column]) for name, t in (("logp", found.logps), ("w", found.w), ("a", found.a))}
        rows.append(values | {"a_opt": math.nan, "strength": float(weights.strength[unit]), "third": int(third[unit])})
    return rows


def text_rows(step: int, first: int, found: Found, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `texts`, of the same examples."""
    rows = []
    for row in (found.example < TOKENS_OF).nonzero().squeeze(-1).tolist():
        inside = found.response[row]
        asked = found.attention[row] & ~inside & (inside.long().cumsum(-1) == 0)
        prompt, response = (found.ids[row][each].tolist() for each in (asked, inside))
        prompt, response = (tokenizer.decode(each) if tokenizer else str(each) for each in (prompt, response))
        place = {"example": first + int(found.example[row]), "side": int(found.side[row])}
        rows.append(place | {"prompt": prompt[:TEXT], "response": response[:TEXT], "step": step})
    return rows


class Folder:
    """A lens folder that is written while training goes on: about.json and a TABLE.jsonl for every table."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Raises ValueError for a folder of something else."""
        self.path, self.identity, self.examples = path, identity, 0
        self._written: set[str] = set()
        if (path / "about.json").is_file():
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            if about.get("run") != identity:
                raise ValueError(
                    f"report={str(path)!r}: holds the tables of another run ({about.get('title')}); give another "
                    "folder, or remove this one"
                )

    def begin(self, step: int) -> None:
        """Make the folder, and drop the rows of steps from `step` on, which come again, and a torn last line."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._written, self.examples = set(), 0
        for file in self.path.glob("*.jsonl"):
            *lines, _ = file.read_text(encoding="utf-8").split("\n")  # texts may hold other separators of lines
            rows = [json.loads(line) for line in lines]
            file.write_text("", encoding="utf-8")
            self.append(file.stem, [row for row in rows if row["step"] < step])

    def has(self, table: str) -> bool:
        """Whether rows of a table were written since `begin`."""
        return table in self._written

    def append(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table; what is no finite number becomes null."""
        if not rows:
            return
        lines = [json.dumps({k: _plain(v) for k, v in row.items()}, ensure_ascii=False) for row in rows]
        with (self.path / f"{table}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        self._written.add(table)
        if table == "sequences":
            self.examples = max(self.examples, 1 + max(row["example"] for row in rows))

    def about(self, content: dict[str, Any]) -> None:
        """Write about.json, whole or not at all."""
        new = self.path / "about.json.new"
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.path / "about.json")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def identity(trainer: Any) -> dict[str, Any]:
    """What tells one run from another, in a folder."""
    policy = captured.base_of(trainer.model)
    return {
        "trainer": type(trainer).__name__,
        "output": Path(trainer.args.output_dir).name,
        "model": type(policy).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seed": trainer.args.seed,
    }


def versions() -> dict[str, str]:
    """Versions of what takes part, of what of it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware(device: torch.device) -> str:
    """What it is computed on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores"
