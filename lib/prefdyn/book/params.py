"""Parameters of chapters: what they mean, what is allowed, what a profile presets, and errors that help.

A notebook's parameters cell holds nothing but assignments; `None` means "from the profile". The next cell calls
`read()`: the parameters are the values that the names of that cell have in the kernel at that moment, however they were
computed. It stops on a name that the cell does not have, on a wrong type and on a value out of range.
"""

import ast
import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..lens.controls import check_schedule
from ..methods import registry
from .profiles import COMMON, CONSTRUCTED, EASY, FILE, PRESETS, SAVED, VARIANTS


class ParameterError(ValueError):
    """A parameter that is not there or not allowed; the message says which, what was given and what is allowed."""


Schedule = list[tuple[int, float]]
SCHEDULES = ("dpo_positive", "dpo_negative", "ppo_positive", "ppo_negative")
# What a measurement of saved checkpoints reads; all other parameters shape runs of the book's own.
OF_SAVED = ("profile", "dataset", "saved", "reference", "objective", "beta", "probe", "max_prompt", "max_response")


class Parameters(BaseModel):
    """Every parameter that a chapter may have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    profile: Literal["smoke", "reader", "paper"] = Field(description="size of everything that is not given by name")
    dataset: str = Field(
        description="'world', a preference file or a folder of such files (.jsonl, .json, .parquet, .gz), or a "
        "data set's name on the hub, with :split",
        min_length=1,
    )
    difficulty: Literal["easy", "hard"] = Field(description="which world: easy, or hard with room to be better")
    model: str = Field(description="'scratch', or a checkpoint: a folder or a name on the hub", min_length=1)
    saved: str = Field(
        description="'book', a run of the book's own, or checkpoints that a trainer saved: the folder that holds them, "
        "or a pattern such as RUN/checkpoint-*",
        min_length=1,
    )
    reference: str = Field(
        description="the model that saved checkpoints started from, a folder or a name on the hub; 'first': their "
        "checkpoint of step 0, of adapters their base",
        min_length=1,
    )
    objective: str = Field(description="whose token weights the lens takes: a method of pairs, or sft on chosen ones")
    seeds: list[int] = Field(description="one run of everything for each seed", min_length=1)
    pairs: int = Field(description="preference pairs to train on, at most", ge=8)
    check: int = Field(description="pairs of the second, disjoint probe, at most", ge=8)
    demonstrations: int = Field(description="demonstrations for SFT (world only)", ge=8)
    label_noise: float = Field(description="share of labels turned round (world only)", ge=0, le=0.5)
    validation: int = Field(description="prompts kept for choosing learning rates", ge=1)
    held_out: int = Field(description="prompts kept for evaluation", ge=2)
    max_prompt: int = Field(description="tokens of a prompt, the last ones are kept", ge=4)
    max_response: int = Field(description="tokens of a response at most", ge=2)
    vocab_size: int = Field(description="tokens of the tokenizer trained on a file", ge=300)
    architecture: Literal["gpt-neox", "llama", "qwen3", "gpt2"] = Field(
        description="architecture of the model made from scratch"
    )
    layers: int = Field(description="layers of the model made from scratch", ge=1)
    width: int = Field(description="width of the model made from scratch", ge=8)
    heads: int = Field(description="attention heads of the model made from scratch", ge=1)
    sft_steps: int = Field(description="updates of supervised fine-tuning (0: the checkpoint is used as it is)", ge=0)
    sft_lr: float = Field(description="learning rate of SFT", gt=0)
    sft_batch: int = Field(description="demonstrations an update of SFT", ge=1)
    beta: float = Field(
        description="DPO's beta, strength of the tie to the reference", gt=0, json_schema_extra={"sets": "dpo.beta"}
    )
    lr: float = Field(description="learning rate of DPO", gt=0)
    epochs: float = Field(description="passes of DPO over the pairs", gt=0)
    schedule: Literal["constant", "linear"] = Field(
        description="DPO's learning rate after warm-up: the same to the end, or falling to 0 there"
    )
    batch: int = Field(description="pairs an update of DPO", ge=1)
    micro_batch: int = Field(description="sequences in memory at once in training (0: all)", ge=0)
    optimizer: Literal["adamw", "sgd"] = Field(description="optimiser of SFT and DPO")
    iterations: int = Field(description="iterations of PPO: rollouts, then passes over them", ge=1)
    rollouts: int = Field(description="replies sampled in an iteration of PPO", ge=2)
    temperature: float = Field(description="of PPO's sampling, and of the policy that it trains", gt=0)
    ppo_epochs: int = Field(description="passes of PPO over an iteration's rollouts", ge=1)
    ppo_batch: int = Field(description="rollouts an update of PPO", ge=1)
    ppo_lr: float = Field(description="learning rate of PPO's policy", gt=0)
    value_lr: float = Field(description="learning rate of PPO's value model", gt=0)
    reward: Literal["true", "learned"] = Field(description="PPO's reward: the world's own, or a model of the pairs")
    reward_epochs: float = Field(description="passes of the reward model over the pairs", gt=0)
    reward_lr: float = Field(description="learning rate of the reward model", gt=0)
    clip: float = Field(
        description="PPO's clip of the probability ratio, on either side of 1",
        gt=0,
        json_schema_extra={"sets": "ppo.clip"},
    )
    value_clip: float = Field(description="how far values count as moved in an iteration (0: no clipping)", ge=0)
    kl_coefficient: float = Field(description="PPO's penalty for a nat of KL to the reference, in points", ge=0)
    learned_kl: float = Field(description="the same penalty where the reward is learned", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = Field(description="estimator of a token's KL in PPO's penalty")
    gamma: float = Field(description="PPO's discount of later rewards", gt=0, le=1)
    lam: float = Field(description="lambda of generalised advantage estimation", ge=0, le=1)
    whiten: bool = Field(description="scale advantages to mean 0 and deviation 1 in an iteration")
    stop_kl: float = Field(description="nats a token that end an iteration's passes early (0: never)", ge=0)
    checkpoints: int = Field(description="checkpoints a run, the first and last step included", ge=2)
    probe: int = Field(description="pairs (DPO) or demonstrations (SFT) on which G is measured, at most", ge=2)
    ppo_probe: int = Field(description="replies of PPO on which G is measured, at most", ge=2)
    choice_probe: int = Field(description="pairs, demonstrations or replies for G with other choices of D'", ge=2)
    explore_prompts: int = Field(description="held-out prompts that are answered again and again, at most", ge=1)
    explore_samples: int = Field(description="replies to each of them", ge=2)
    earning_prompts: int = Field(description="held-out prompts whose replies tell the direction of reward", ge=2)
    earning_samples: int = Field(description="replies to each of them", ge=2)
    mass_pairs: int = Field(description="unseen pairs whose prompts are answered again and again", ge=2)
    mass_samples: int = Field(description="replies to each of these prompts", ge=1)
    calibrated: Literal["imitation", "dpo", "online_dpo", "ppo"] = Field(
        description="the method whose target is known by construction; imitation: of chosen responses"
    )
    construction: Literal[CONSTRUCTED] = Field(description="what is turned round in training, and how often")
    methods: list[str] = Field(description="methods of pairs and of rollouts that are compared", min_length=1)
    compared_seeds: int = Field(
        description="seeds of that and of what takes as long, the first of `seeds`, at most", ge=1
    )
    rates: list[float] = Field(description="learning rates tried for each of them", min_length=1)
    sequences: int = Field(description="sequences on which G of each is measured: two a pair, one a reply", ge=4)
    group: int = Field(description="replies to a prompt, of methods without a value model", ge=2)
    variants: list[Literal[VARIANTS]] = Field(description="controlled variants of DPO and PPO to train")
    switch_at: float = Field(description="share of training after which variants switch", gt=0, lt=1)
    floor: float = Field(description="least factor of a gradual variant, at one end of training", ge=0, le=1)
    negative_scale: float = Field(description="constant factor on negative learning in the variant 'scaled'", ge=0)
    dpo_positive: Schedule = Field(description="a free schedule of DPO's positive learning: factors at updates")
    dpo_negative: Schedule = Field(description="a free schedule of DPO's negative learning: factors at updates")
    ppo_positive: Schedule = Field(description="a free schedule of PPO's positive learning: factors at iterations")
    ppo_negative: Schedule = Field(description="a free schedule of PPO's negative learning: factors at iterations")
    target_responses: Literal["final", "chosen", "unrelated"] = Field(
        description="D': the final policy's answers, chosen responses of check pairs, or answers to other prompts"
    )
    target_prompts: Literal["held_out", "train"] = Field(description="prompts of the final responses D'")
    target_decoding: Literal["greedy", "sampled"] = Field(description="how D' is decoded")
    target_reduction: Literal["sum", "mean"] = Field(description="over the tokens of a final response")
    method: Literal["auto", "forward", "central"] = Field(
        description="auto: forward mode where it works, else central differences"
    )
    today: str = Field(description="the day that a chat template which asks for the date is told, YYYY-MM-DD")

    def idle(self) -> dict[str, str]:
        """The parameters that nothing reads with the values of the others, and why."""
        reasons = {}
        if self.dataset != "world":
            why = f"only the world has it, and dataset={self.dataset!r}"
            reasons |= dict.fromkeys(("difficulty", "label_noise", "demonstrations"), why)
        if self.model != "scratch":
            why = f"a model from scratch alone has it, and model={self.model!r}"
            reasons |= dict.fromkeys(("vocab_size", "architecture", "layers", "width", "heads"), why)
        if self.target_responses == "chosen":
            why = "chosen responses have neither other prompts nor a decoding"
            reasons |= dict.fromkeys(("target_prompts", "target_decoding"), why)
        if self.saved == "book":
            reasons["reference"] = "saved checkpoints alone need one, and saved='book'"
        else:
            others = [name for name in type(self).model_fields if name not in OF_SAVED]
            reasons |= dict.fromkeys(others, f"the book's own runs alone have it, and saved={self.saved!r}")
            if "beta" not in self.settings_of(self.objective):
                reasons["beta"] = f"it is dpo's, and objective={self.objective!r}"
        return reasons

    def settings_of(self, method: str) -> dict[str, float]:
        """The settings of a method that parameters give, by name."""
        given = {(f.json_schema_extra or {}).get("sets"): name for name, f in type(self).model_fields.items()}
        own = {sets.partition(".")[2]: name for sets, name in given.items() if sets and sets.startswith(f"{method}.")}
        return {setting: getattr(self, name) for setting, name in own.items()}

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        """Accept "0,1,2", which a command line can give, for [0, 1, 2]."""
        if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
            value = [int(part) for part in value.split(",")]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if isinstance(value, list) and len(set(map(str, value))) < len(value):
            raise ValueError("each seed once")
        if isinstance(value, list) and any(isinstance(v, int) and v < 0 for v in value):
            raise ValueError("no negative seed")
        return value

    @field_validator("methods", mode="before")
    @classmethod
    def _every(cls, value: Any) -> Any:
        """Accept "all" for every method there is."""
        return list(registry.comparable()) if value == "all" or value == ["all"] else value

    @field_validator("methods")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        if unknown := [name for name in value if name not in registry.comparable()]:
            near = difflib.get_close_matches(unknown[0], registry.comparable(), n=1, cutoff=0.5)
            raise ValueError(f"no such method: {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        if len(set(value)) < len(value):
            raise ValueError("each method once")
        return value

    @field_validator("objective")
    @classmethod
    def _weighing(cls, value: str) -> str:
        if value not in _objectives():
            near = difflib.get_close_matches(value, _objectives(), n=1, cutoff=0.5)
            raise ValueError("no such method of pairs" + (f"; did you mean {near[0]}?" if near else ""))
        return value

    @field_validator("rates", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        """Accept "1e-4,1e-3", which a command line can give, and a single rate."""
        try:
            if isinstance(value, str):
                value = [float(part) for part in value.split(",")]
        except ValueError:
            return value
        value = [value] if isinstance(value, int | float) and not isinstance(value, bool) else value
        if not isinstance(value, list):
            return value
        return [float(x) if isinstance(x, int) and not isinstance(x, bool) else x for x in value]

    @field_validator("rates")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if any(rate <= 0 for rate in value) or len(set(value)) < len(value):
            raise ValueError("rates above 0, each once")
        return value

    @field_validator("variants", "methods", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accept "shift,switch", which a command line can give, for ["shift", "switch"]."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator(*SCHEDULES, mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        """Accept rows as a notebook gives them, [[0, 1.0], [32, 0.5]]."""
        return [tuple(row) if isinstance(row, list) else row for row in value] if isinstance(value, list) else value

    @field_validator(*SCHEDULES)
    @classmethod
    def _schedule(cls, value: Schedule) -> Schedule:
        """No rows: no such variant."""
        if value:
            check_schedule(tuple(value))
        return value

    @field_validator("today")
    @classmethod
    def _day(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            raise ValueError("no day as YYYY-MM-DD")
        date.fromisoformat(value)
        return value

    @field_validator("reward", mode="before")
    @classmethod
    def _reward(cls, value: Any) -> Any:
        """Accept True, as which a command line's reward=true is read."""
        return "true" if value is True else value


def _objectives() -> list[str]:
    """The methods whose weights a file of pairs is enough for."""
    return [*registry.names("pairs"), *registry.names("demonstrations")]


def presets(
    profile: str, dataset: str, difficulty: str = COMMON["difficulty"], saved: str = COMMON["saved"]
) -> dict[str, Any]:
    """Every parameter's value under a profile, for a world or for a file, of the book's own runs or of saved ones."""
    if profile not in PRESETS:
        raise ParameterError(f"profile: given {profile!r}; allowed: {_allowed('profile')}")
    own = FILE if dataset != "world" else EASY if difficulty == "easy" else {}
    limits = SAVED if saved != COMMON["saved"] else {}
    return COMMON | PRESETS[profile] | own.get(profile, {}) | limits | {"profile": profile}


def _allowed(name: str) -> str:
    """What a parameter allows, in words."""
    schema = Parameters.model_json_schema()["properties"][name]
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if name in SCHEDULES:
        return f"a list of rows [step, factor], steps in order, e.g. [[0, 1.0], [32, 0.5]]: {schema['description']}"
    if name == "methods":
        return f"'all', or a list of some of {', '.join(registry.comparable())}: {schema['description']}"
    if name == "objective":
        return f"one of {', '.join(_objectives())}: {schema['description']}"
    if name == "rates":
        return f"a list of different numbers > 0, e.g. 1e-4,1e-3: {schema['description']}"
    if "enum" in schema.get("items", {}):
        return f"a list of some of {', '.join(schema['items']['enum'])}: {schema['description']}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "True or False",
        "string": "a text",
        "array": "a list of different seeds, e.g. 0,1,2",
    }
    limits = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
    bounds = [text.format(schema[key]) for key, text in limits.items() if key in schema]
    return " ".join([words[schema["type"]], " and ".join(bounds)]).strip() + f": {schema['description']}"


def meaning(name: str) -> tuple[str, str]:
    """What a parameter allows and what it means, each in a few words. Raises ParameterError for a name that is none."""
    if name not in Parameters.model_fields:
        raise ParameterError(_unknown(name, sorted(Parameters.model_fields)))
    description = Parameters.model_fields[name].description
    return _allowed(name).removesuffix(f": {description}"), description


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name}: no such parameter.{hint} There are: {', '.join(known)}"


def _plain(value: Any) -> Any:
    """A value as plain Python, where that is unambiguous: of ranges, tuples, arrays, NumPy's numbers and paths."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, range | tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, PurePath) else value


def check(given: Mapping[str, Any], known: Iterable[str] | None = None) -> Parameters:
    """Parameters from the values that were given, the rest from the profile.

    Args: given, name to value, None for "from the profile". known, the names that are allowed, by default all.
    Raises ParameterError that lists every problem.
    """
    known = sorted(Parameters.model_fields.keys() & (Parameters.model_fields if known is None else set(known)))
    problems = [_unknown(name, known) for name in given if name not in known]
    chosen = {
        name: _plain(given[name]) for name in given if given[name] is not None and name in Parameters.model_fields
    }
    known_by = ("profile", "dataset", "difficulty", "saved")
    profile, dataset, difficulty, saved = (chosen.get(name, COMMON[name]) for name in known_by)
    try:
        if not isinstance(profile, str) or profile not in PRESETS:
            problems.append(f"profile: given {profile!r} ({type(profile).__name__}); allowed: {_allowed('profile')}")
            chosen["profile"] = profile = "reader"
        if not isinstance(dataset, str):  # which validation refuses
            dataset = COMMON["dataset"]
        result = Parameters(**(presets(profile, dataset, difficulty, saved) | chosen))
    except ValidationError as error:
        for item in error.errors():
            name = item["loc"][0]
            value = chosen.get(name)
            reason = f" ({item['ctx']['error']})" if item["type"] == "value_error" else ""
            problems.append(f"{name}: given {value!r} ({type(value).__name__}){reason}; allowed: {_allowed(name)}")
    if problems:
        raise ParameterError("\n  ".join(["these parameters cannot be used:", *dict.fromkeys(problems)]))
    if idle := {name: why for name, why in result.idle().items() if name in chosen}:
        lines = (f"{name}: given {chosen[name]!r}; {why}; allowed here: None" for name, why in idle.items())
        raise ParameterError("\n  ".join(["these parameters would do nothing here:", *lines]))
    if result.saved != "book" and result.dataset == "world":
        raise ParameterError(
            f"dataset: given 'world' (str), and saved={result.saved!r} was not trained on it; allowed here: the "
            "preference file that the run was trained on"
        )
    if profile == "paper" and result.saved == "book" and (result.model == "scratch" or result.dataset == "world"):
        raise ParameterError(
            "profile: 'paper' measures a real checkpoint on real preferences; give `model` (a folder or a name on "
            f"the hub) and `dataset` (a file); given model={result.model!r}, dataset={result.dataset!r}"
        )
    if result.sft_steps == 0 and result.model == "scratch":
        raise ParameterError("sft_steps: given 0 (int); a model from scratch has to learn first; allowed: 1 or more")
    return result


def command(p: Parameters, chapter: str, known: Iterable[str]) -> str:
    """The command that executes a chapter with these parameters: its profile, and what differs from its preset.

    Args: known, the parameters that the chapter has.
    """
    preset = presets(p.profile, p.dataset, p.difficulty, p.saved)
    changed = {name: value for name, value in p.model_dump().items() if value != preset.get(name, COMMON.get(name))}
    given = {"profile": p.profile} | {name: value for name, value in changed.items() if name in known}
    return " ".join(["prefdyn execute", chapter, *(f"-p {shlex.quote(f'{k}={v}')}" for k, v in given.items())])


def _assigned(source: str) -> list[str] | None:
    """The names that a cell assigns if it holds nothing but assignments to plain names, else None."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a text that explains
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
        if not all(isinstance(part, ast.Name) for part in parts):
            return None
        if node.value is not None:  # `beta: float` alone assigns nothing
            names += [part.id for part in parts]
    return names


def _bound(source: str) -> set[str]:
    """The names that a cell gives a value to outside of functions and classes, by whatever statements."""
    try:
        todo: list[ast.AST] = list(ast.parse(source).body)
    except (SyntaxError, ValueError):
        return set()
    names = set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        todo += ast.iter_child_nodes(node)
    return names


def _told(source: str) -> list[str] | None:
    """What `_assigned` says of a cell; of one that does other things too, the parameters that it gives a value to.

    None where it gives none. The others among its names are no faults: they may be steps on the way to a parameter.
    """
    names = _assigned(source)
    return names if names is not None else sorted(_bound(source) & Parameters.model_fields.keys()) or None


History = Sequence[list[str] | None]  # for each cell that was executed, what `_told` says of it


def _following(history: History, at: int) -> list[list[str]]:
    """What the cells of nothing but assignments assign that directly follow cell number `at`."""
    return list(itertools.takewhile(lambda names: names is not None, history[at + 1 :]))


def _parameters_cell(history: History) -> int | None:
    """The number of a chapter's parameters cell: it assigns `profile`, and all that the chapter has. None without one.

    Not every cell that assigns `profile` is one: papermill's, right after it, and a reader's own, later, may give a new
    value to some of its names. One with all of its names is the same cell, executed again; so is one with other names,
    unless it follows directly: then these are faults.
    """
    found = None
    for at, names in enumerate(history):
        if not names or "profile" not in names:
            continue
        if found is not None and not set(names) >= set(history[found]):
            follows = len(_following(history, found)) >= at - found
            if follows or set(names) <= set(history[found]):
                continue
        found = at
    return found


def read_cells(cells: Sequence[str], namespace: Mapping[str, Any]) -> Parameters:
    """Parameters of a notebook: the values that the names of its parameters cell have now.

    The parameters cell assigns `profile`, whatever else it does. Cells of nothing but assignments that directly follow
    it may assign its names alone. In a notebook without such a cell every cell counts that assigns a parameter, and the
    profile is the preset one.

    Args: cells, the sources of those that were executed so far, the one that asks included, last; namespace, what names
    stand for now. Raises ParameterError.
    """
    history, fields = [_told(source) for source in cells[:-1]], Parameters.model_fields
    last = _parameters_cell(history)
    earlier: list[str] = []
    known = None if last is None else history[last]
    if last is None:
        some = [at for at, names in enumerate(history) if names and not fields.keys().isdisjoint(names)]
        if not some:
            raise ParameterError("no parameters cell was executed before this one; run the notebook from its top")
        last = some.pop()
        earlier = [name for at in some for name in history[at] if name in fields]
    names = itertools.chain(earlier, history[last], *_following(history, last))
    return check({name: namespace[name] for name in names if name in namespace}, known)


def read() -> Parameters:
    """The parameters of the notebook that calls this, as `read_cells`."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise ParameterError("parameters can be read only inside a notebook; elsewhere call params.check({...})")
    return read_cells([source for source in shell.user_ns["In"] if source.strip()], shell.user_ns)
