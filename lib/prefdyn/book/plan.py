"""From parameters to runs: which specs a chapter's parameters describe."""

import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..findings.earning import EarningRun
from ..findings.explore import ExplorationRun
from ..findings.mass import DisplacementRun, MassRun
from ..findings.measure import AlignmentRun
from ..findings.targets import TargetSpec, TargetsRun
from ..findings.tuning import ValidationRun
from ..lab import checkpoints, recipes, sources, world
from ..lab.online import OnlineRun
from ..lab.ppo import PPORun, RewardRun
from ..lab.recipes import DataSpec, ModelSpec, PairRun, PolicySpec, SFTRun
from ..lab.runs import RunStore
from ..lab.sizes import Sizes, sizes
from ..lab.train import Optimisation
from ..lens import alignment
from ..lens.controls import Control
from ..methods import own, registry
from ..methods.base import Method
from . import variants
from .params import ParameterError, Parameters


def _model(p: Parameters, identity: Callable[[Path], str]) -> dict:
    """The fields of a `recipes.ModelSpec`; `identity` of a checkpoint's folder. Raises ParameterError."""
    if p.model == "scratch":
        return {"model": p.model, "content": None}
    folder = Path(p.model).expanduser()
    if not folder.is_dir() and p.model.startswith((".", "/", "~")):
        raise ParameterError(
            f"model: given {p.model!r}, and there is no such folder; allowed: 'scratch', a folder with a saved "
            "checkpoint or the name of a model on the hub"
        )
    try:
        if folder.is_dir():
            return {"model": str(folder.resolve()), "content": identity(folder.resolve())}
        return {"model": p.model, "content": checkpoints.hub_revision(p.model), "hub": True}
    except ValueError as error:
        raise ParameterError(f"model: given {p.model!r}, which is no checkpoint that can be read: {error}") from error


def _source(given: str) -> str:
    """Where preferences are: the absolute path of what there is, or a name on the hub. Raises ParameterError."""
    path = Path(given).expanduser()
    if path.exists():
        return str(path.resolve())
    if sources.hub_name(given):
        return given
    raise ParameterError(
        f"dataset: given {given!r}, and there is no such file; allowed: 'world', the path of a preference file or of "
        f"a folder of such files, relative to the folder of this kernel ({Path.cwd().name!r}) or absolute, or the name "
        "of a data set on the hub"
    )


@functools.lru_cache(maxsize=64)
def _fingerprint(source: str, state: tuple) -> str:
    """The hash of a source in its present state: it is read once, not at every look."""
    return sources.fingerprint(source)


def _state(source: str) -> tuple:
    """What tells, without reading, that the files of a source have changed; () for the hub."""
    path = Path(source)
    inside = path.iterdir() if path.is_dir() else [path]
    files = sorted(file for file in inside if file.is_file())
    return tuple((str(file), known.st_size, known.st_mtime_ns) for file in files for known in [file.stat()])


def data_spec(p: Parameters, seed: int) -> DataSpec:
    """The data of one seed, as the parameters and `world.SKILLS` are now.

    Raises ParameterError for what cannot be found, DataError for what cannot be read, ValueError for unusable skills.
    """
    file = None if p.dataset == "world" else _source(p.dataset)
    skills = {} if file else world.usable_skills()
    return DataSpec(
        path=file,
        content=None if file is None else _fingerprint(file, _state(file)),
        difficulty=p.difficulty if file is None else "",
        seed=seed if file is None else 0,
        pairs=p.pairs,
        check=p.check,
        demonstrations=p.demonstrations,
        label_noise=p.label_noise,
        skills=tuple((name, s["share"], s["habit"], s["slip"]) for name, s in skills.items()),
        validation=p.validation,
        held_out=p.held_out,
        max_prompt=p.max_prompt,
        max_response=p.max_response,
        tokenizer=ModelSpec(**_model(p, checkpoints.tokenizer_identity)),
        vocab_size=p.vocab_size,
        today=p.today,
    )


def _check_context(p: Parameters, spec: PolicySpec) -> None:
    """Raise ParameterError if a checkpoint cannot read the longest prompt and response that the parameters allow."""
    config = AutoConfig.from_pretrained(spec.model, revision=spec.revision)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and p.max_prompt + p.max_response > context:
        raise ParameterError(
            f"max_prompt, max_response: given {p.max_prompt} and {p.max_response} (int), together more than the "
            f"{context} tokens that the model {Path(spec.model).name!r} can read; allowed: a sum of at most {context}"
        )


def policy_spec(p: Parameters) -> PolicySpec:
    """The model before training. Raises ParameterError if it is a folder that does not exist."""
    sizes = {name: getattr(p, name) for name in ("architecture", "layers", "width", "heads")}
    spec = PolicySpec(**_model(p, checkpoints.identity), **sizes)
    if spec.model != "scratch":
        _check_context(p, spec)
    return spec


@functools.lru_cache(maxsize=8)
def _method_that_works(policy: PolicySpec, data: DataSpec) -> str:
    return alignment.choose_method(*recipes.untrained(policy, data, seed=0))


def measuring_method(p: Parameters) -> str:
    """How G is measured: as the parameters say, or with "auto" as works for this model, tried before any training."""
    return p.method if p.method != "auto" else _method_that_works(policy_spec(p), data_spec(p, p.seeds[0]))


def sizes_of(spec: DataSpec) -> Sizes:
    """How much there is to train on; a file may hold less than was asked for."""
    return sizes(spec, RunStore().root)


def sft_run(p: Parameters, seed: int) -> SFTRun:
    """Supervised fine-tuning, from which everything else starts."""
    spec = data_spec(p, seed).without_labels()
    demonstrations = sizes_of(spec).demonstrations
    if p.sft_steps and p.sft_batch > demonstrations:
        raise ParameterError(
            f"sft_batch: given {p.sft_batch} (int), more than the {demonstrations} demonstrations; "
            f"allowed: 1 to {demonstrations}"
        )
    return SFTRun(
        data=spec,
        policy=policy_spec(p),
        seed=seed,
        optimisation=Optimisation(
            steps=p.sft_steps,
            batch_size=p.sft_batch,
            lr=p.sft_lr,
            optimizer=p.optimizer,
            micro_batch=p.micro_batch,
            seed=seed,
        ),
        checkpoints=p.checkpoints,
    )


def run(
    p: Parameters, seed: int, method: str | Callable, part: str = "full", **choices
) -> PairRun | PPORun | OnlineRun:
    """A method from the SFT policy of the same seed, trained on what it takes.

    method: a name in `methods.registry`, or a loss of pairs of one's own (`methods.own`). part: one of
    `controls.CONTROLS`. choices: `reward` ("true" or "learned"), `leash` (the penalty for divergence) and `group`
    (replies to a prompt) of rollouts; `lr`; all others are settings of the method. What is not given is as the
    parameters say, or the method's file.
    """
    found = own.from_function(method) if callable(method) else registry.find(method)
    if found.takes not in ("pairs", "rollouts"):
        raise ValueError(f"method={method!r}: takes {found.takes}; allowed here: methods of pairs or of rollouts")
    build = _pair_run if found.takes == "pairs" else _critic_run if found.rollouts is None else _online_run
    _check_choices(found, choices, list(inspect.signature(build).parameters)[4:-1])
    return build(p, seed, found, part, **choices)


def _check_choices(method: Method, given: dict, own_choices: list[str]) -> None:
    """Raise ValueError for a choice that is none of `own_choices` and no setting, or a learning rate that is none."""
    known = [*method.settings, *own_choices]
    if unknown := [name for name in given if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{method.name}: no such setting: {unknown[0]}.{hint} There are: {', '.join(method.settings) or 'none'}; "
            f"and beside settings: {', '.join(own_choices)}"
        )
    lr = given.get("lr")
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0):
        raise ValueError(f"lr: given {lr!r} ({type(lr).__name__}); allowed: a number > 0")


def _pair_run(p: Parameters, seed: int, method: Method, part: str, lr: float | None = None, **settings) -> PairRun:
    sft = sft_run(p, seed)
    data = data_spec(p, seed)
    pairs = sizes_of(data).pairs
    if p.batch > pairs:
        raise ParameterError(
            f"batch: given {p.batch} (int), more than the {pairs} pairs to train on; allowed: 1 to {pairs}"
        )
    steps = max(1, round(p.epochs * pairs / p.batch))
    return PairRun(
        sft=sft,
        data=data,
        method=method.name,
        code=method.code,
        settings=registry.settings(method, p.settings_of(method.name) | settings),
        control=Control(part=part),
        optimisation=Optimisation(
            steps=steps,
            batch_size=p.batch,
            lr=p.lr if lr is None else lr,
            optimizer=p.optimizer,
            schedule=p.schedule,
            micro_batch=p.micro_batch,
            seed=seed,
        ),
        checkpoints=p.checkpoints,
    )


def reward_run(p: Parameters, seed: int) -> RewardRun:
    """A reward model trained on the pairs, from the SFT policy of the same seed."""
    data = data_spec(p, seed)
    pairs = sizes_of(data).pairs
    batch = min(p.batch, pairs)
    return RewardRun(
        sft=sft_run(p, seed),
        data=data,
        optimisation=Optimisation(
            steps=max(1, round(p.reward_epochs * pairs / batch)),
            batch_size=batch,
            lr=p.reward_lr,
            optimizer=p.optimizer,
            micro_batch=p.micro_batch,
            seed=seed,
        ),
    )


def _rollouts(
    p: Parameters, seed: int, part: str, reward: str | None, leash: float | None, lr: float | None
) -> dict[str, Any]:
    """The fields that all methods of rollouts share. leash: by default the parameter's for that reward."""
    reward = reward or p.reward
    if leash is None:
        leash = p.kl_coefficient if reward == "true" else p.learned_kl
    if reward == "true" and p.dataset != "world":
        raise ParameterError("reward: given 'true' (str), which only the world has; allowed here: learned")
    if p.ppo_batch > p.rollouts:
        raise ParameterError(
            f"ppo_batch: given {p.ppo_batch} (int), more than rollouts={p.rollouts}; allowed: 1 to {p.rollouts}"
        )
    data = data_spec(p, seed)
    if reward == "true":
        data = data.without_labels()
    prompts = sizes_of(data).prompts
    if p.rollouts > prompts:
        raise ParameterError(
            f"rollouts: given {p.rollouts} (int), more than the {prompts} training prompts; allowed: 2 to {prompts}"
        )
    return {
        "sft": sft_run(p, seed),
        "data": data,
        "reward": None if reward == "true" else reward_run(p, seed),
        "control": Control(part=part),
        "optimisation": Optimisation(
            steps=p.iterations,
            batch_size=p.ppo_batch,
            lr=p.ppo_lr if lr is None else lr,
            optimizer=p.optimizer,
            schedule="constant",
            micro_batch=p.micro_batch,
            seed=seed,
        ),
        "checkpoints": p.checkpoints,
        "rollouts": p.rollouts,
        "temperature": p.temperature,
        "epochs": p.ppo_epochs,
        "kl_coefficient": leash,
        "kl_estimator": p.kl_estimator,
    }


def _critic_run(
    p: Parameters,
    seed: int,
    method: Method,
    part: str,
    reward: str | None = None,
    leash: float | None = None,
    lr: float | None = None,
    **settings,
) -> PPORun:
    """With a value model, and one reply to a prompt."""
    return PPORun(
        **_rollouts(p, seed, part, reward, leash, lr),
        **dict(registry.settings(method, p.settings_of(method.name) | settings)),
        value_lr=p.value_lr,
        value_clip=p.value_clip,
        gamma=p.gamma,
        lam=p.lam,
        whiten=p.whiten,
        stop_kl=p.stop_kl,
    )


def _online_run(
    p: Parameters,
    seed: int,
    method: Method,
    part: str,
    reward: str | None = None,
    leash: float | None = None,
    group: int | None = None,
    lr: float | None = None,
    **settings,
) -> OnlineRun:
    """Without a value model: as many replies an iteration, the same reward and the same penalty as with one."""
    group = p.group if group is None else group
    if group < 1 or p.rollouts % group:
        raise ParameterError(
            f"rollouts: given {p.rollouts} (int); allowed here: a multiple of {group} replies a prompt"
        )
    return OnlineRun(
        **_rollouts(p, seed, part, reward, leash, lr),
        method=method.name,
        settings=registry.settings(method, p.settings_of(method.name) | settings),
        group=group,
    )


def variant_run(p: Parameters, seed: int, method: str, name: str, **choices) -> PairRun | PPORun | OnlineRun:
    """A controlled variant (`variants`) of a method: the plain run of the same seed in all but its control.

    choices: as for `run`. A named schedule is stretched over the whole training, a free one keeps its steps.
    """
    plain = run(p, seed, method, **choices)
    return plain.model_copy(update={"control": variants.control(p, method, name, plain.optimisation.steps)})


def target_spec(p: Parameters, **other: str) -> TargetSpec:
    """D' as the parameters declare it, but for what is given by name."""
    declared = {
        "responses": p.target_responses,
        "prompts": p.target_prompts,
        "decoding": p.target_decoding,
        "reduction": p.target_reduction,
    }
    return TargetSpec(**declared | other, count=p.held_out)


# What each declared choice of D' could have been instead; "responses: unrelated" is no choice but a floor.
CHOICES = {
    "prompts": ("held_out", "train"),
    "decoding": ("greedy", "sampled"),
    "reduction": ("sum", "mean"),
    "responses": ("final", "chosen", "unrelated"),
}


def target_choices(p: Parameters) -> dict[str, TargetSpec]:
    """D' as declared, and with one choice at a time made otherwise; named "as declared", "prompts: train", ...

    Chosen responses have neither prompts nor a decoding to choose.
    """
    declared = target_spec(p)
    fixed = ("prompts", "decoding") if p.target_responses == "chosen" else ()
    return {"as declared": declared} | {
        f"{name}: {value}": target_spec(p, **{name: value})
        for name, values in CHOICES.items()
        for value in values
        if name not in fixed and getattr(declared, name) != value
    }


def targets_run(p: Parameters, run: SFTRun | PairRun | PPORun, choices: dict[str, TargetSpec]) -> TargetsRun:
    """G and cosine of a training run on the check probe, with several choices of D'."""
    return TargetsRun(run=run, choices=choices, probe="check", size=p.choice_probe)


SAMPLES = 2  # replies to each validation prompt, at each checkpoint


def validation_run(p: Parameters, seed: int, run: PairRun | PPORun | OnlineRun) -> ValidationRun:
    """What a run earns on validation prompts: by the true reward where there is one, else by a model of the pairs."""
    known = data_spec(p, seed).path is None
    return ValidationRun(run=run, reward=None if known else reward_run(p, seed), samples=SAMPLES)


def exploration_run(p: Parameters, run: PairRun | PPORun) -> ExplorationRun:
    """What a training run's policies say when they are asked again and again."""
    return ExplorationRun(run=run, prompts=p.explore_prompts, samples=p.explore_samples)


def earning_run(p: Parameters, seed: int, run: SFTRun | PairRun | PPORun | OnlineRun) -> EarningRun:
    """G towards reward on `sequences` of the check probe: the true one and a model of the pairs, or that alone."""
    return EarningRun(
        run=run,
        targets=target_spec(p),
        prompts=p.earning_prompts,
        samples=p.earning_samples,
        size=max(2, p.sequences // (2 if run.takes == "pairs" else 1)),
        probe="check",
        method=measuring_method(p),
        learned=reward_run(p, seed),
    )


def mass_run(p: Parameters, seed: int, run: SFTRun | PairRun | PPORun | OnlineRun) -> MassRun:
    """What a training run's policies say to the prompts of unseen pairs, labelled as the parameters have it."""
    return MassRun(run=run, pairs=p.mass_pairs, samples=p.mass_samples, data=data_spec(p, seed))


def displacement_run(p: Parameters, run: PairRun) -> DisplacementRun:
    """Which unseen pairs' chosen responses fall in a training run."""
    return DisplacementRun(run=run, pairs=p.mass_pairs)


def alignment_run(
    p: Parameters, run: SFTRun | PairRun | PPORun, probe: str = "train", aware: bool = True
) -> AlignmentRun:
    """The measurement of a training run on one probe, with the declared choices of the parameters.

    aware: of the alignment for the optimiser's steps too.
    """
    return AlignmentRun(
        run=run,
        targets=target_spec(p),
        probe=probe,
        size=p.ppo_probe if run.takes == "rollouts" else p.probe,
        method=measuring_method(p),
        aware=aware,
    )
