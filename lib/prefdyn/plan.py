"""From parameters to runs: which specs a chapter's parameters describe."""

import hashlib
from pathlib import Path

from transformers import AutoConfig

from . import variants
from .controls import Control
from .explore import ExplorationRun
from .measure import AlignmentRun
from .params import ParameterError, Parameters
from .ppo import PPORun, RewardRun
from .recipes import DataSpec, DPORun, PolicySpec, SFTRun, dataset
from .runs import file_hash
from .targets import TargetSpec, TargetsRun
from .train import Optimisation


def _folder_hash(folder: Path) -> str:
    """Hash of the files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def data_spec(p: Parameters, seed: int) -> DataSpec:
    """The data of one seed. Raises ParameterError if the file does not exist."""
    path = None
    if p.dataset != "world":
        path = Path(p.dataset).expanduser()
        if not path.is_file():
            raise ParameterError(
                f"dataset: given {p.dataset!r}, and there is no such file; allowed: 'world' or the path of a "
                f".jsonl or .jsonl.gz file, relative to the folder of this kernel ({Path.cwd().name!r}) or absolute"
            )
    return DataSpec(
        path=None if path is None else str(path.resolve()),
        content=None if path is None else file_hash(path),
        seed=seed if path is None else 0,
        pairs=p.pairs,
        check=p.check,
        demonstrations=p.demonstrations,
        label_noise=p.label_noise,
        validation=p.validation,
        held_out=p.held_out,
        max_prompt=p.max_prompt,
        max_response=p.max_response,
        vocab_size=p.vocab_size,
    )


def _check_context(p: Parameters, folder: Path) -> None:
    """Raise ParameterError if a checkpoint cannot read the longest prompt and response that the parameters allow."""
    context = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    if context is not None and p.max_prompt + p.max_response > context:
        raise ParameterError(
            f"max_prompt, max_response: given {p.max_prompt} and {p.max_response} (int), together more than the "
            f"{context} tokens that the model in {folder.name!r} can read; allowed: a sum of at most {context}"
        )


def policy_spec(p: Parameters) -> PolicySpec:
    """The model before training. Raises ParameterError if it is a folder that does not exist."""
    folder = Path(p.model).expanduser()
    if p.model.startswith((".", "/", "~")) and not folder.is_dir():
        raise ParameterError(
            f"model: given {p.model!r}, and there is no such folder; allowed: 'scratch', a folder with a saved "
            "checkpoint or the name of a model on the hub"
        )
    local = p.model != "scratch" and folder.is_dir()
    if local:
        _check_context(p, folder)
    return PolicySpec(
        model=str(folder.resolve()) if local else p.model,
        content=_folder_hash(folder) if local else None,
        layers=p.layers,
        width=p.width,
        heads=p.heads,
    )


def sft_run(p: Parameters, seed: int) -> SFTRun:
    """Supervised fine-tuning, from which everything else starts."""
    spec = data_spec(p, seed).without_labels()
    demonstrations = len(dataset(spec).demonstrations)  # a file may hold fewer than were asked for
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


def dpo_run(p: Parameters, seed: int, part: str = "full", long: bool = False) -> DPORun:
    """DPO from the SFT policy of the same seed, with a part of its weights (one of `controls.CONTROLS`).

    `long` trains for `long_epochs` at a constant learning rate.
    """
    sft = sft_run(p, seed)
    data = data_spec(p, seed)
    pairs = len(dataset(data).pairs)  # a file may hold fewer than were asked for
    if p.batch > pairs:
        raise ParameterError(
            f"batch: given {p.batch} (int), more than the {pairs} pairs to train on; allowed: 1 to {pairs}"
        )
    steps = max(1, round((p.long_epochs if long else p.epochs) * pairs / p.batch))
    return DPORun(
        sft=sft,
        data=data,
        beta=p.beta,
        control=Control(part=part),
        optimisation=Optimisation(
            steps=steps,
            batch_size=p.batch,
            lr=p.lr,
            optimizer=p.optimizer,
            schedule="constant" if long else "linear",
            micro_batch=p.micro_batch,
            seed=seed,
        ),
        checkpoints=p.checkpoints,
    )


def reward_run(p: Parameters, seed: int) -> RewardRun:
    """A reward model trained on the pairs, from the SFT policy of the same seed."""
    data = data_spec(p, seed)
    pairs = len(dataset(data).pairs)
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


def ppo_run(
    p: Parameters, seed: int, part: str = "full", reward: str | None = None, leash: float | None = None
) -> PPORun:
    """PPO from the SFT policy of the same seed, with a part of its weights (one of `controls.CONTROLS`).

    reward: "true" or "learned", by default as the parameter says. leash: the KL penalty, by default the parameter's
    for that reward.
    """
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
    prompts = len(dataset(data).prompts["train"])
    if p.rollouts > prompts:
        raise ParameterError(
            f"rollouts: given {p.rollouts} (int), more than the {prompts} training prompts; allowed: 2 to {prompts}"
        )
    return PPORun(
        sft=sft_run(p, seed),
        data=data,
        reward=None if reward == "true" else reward_run(p, seed),
        control=Control(part=part),
        optimisation=Optimisation(
            steps=p.iterations,
            batch_size=p.ppo_batch,
            lr=p.ppo_lr,
            optimizer=p.optimizer,
            schedule="constant",
            micro_batch=p.micro_batch,
            seed=seed,
        ),
        checkpoints=p.checkpoints,
        rollouts=p.rollouts,
        temperature=p.temperature,
        epochs=p.ppo_epochs,
        value_lr=p.value_lr,
        clip=p.clip,
        value_clip=p.value_clip,
        kl_coefficient=leash,
        kl_estimator=p.kl_estimator,
        gamma=p.gamma,
        lam=p.lam,
        whiten=p.whiten,
        stop_kl=p.stop_kl,
    )


def variant_run(p: Parameters, seed: int, method: str, name: str, long: bool = False) -> DPORun | PPORun:
    """A controlled variant (`variants`) of "dpo" or "ppo": the plain run of the same seed in all but its control.

    long: of the over-long DPO run. A named schedule is stretched over it, a free one keeps its steps.
    """
    plain = dpo_run(p, seed, long=long) if method == "dpo" else ppo_run(p, seed)
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


def targets_run(p: Parameters, run: SFTRun | DPORun | PPORun, choices: dict[str, TargetSpec]) -> TargetsRun:
    """G and cosine of a training run on the check probe, with several choices of D'."""
    return TargetsRun(run=run, choices=choices, probe="check", size=p.choice_probe)


def exploration_run(p: Parameters, run: DPORun | PPORun) -> ExplorationRun:
    """What a training run's policies say when they are asked again and again."""
    return ExplorationRun(run=run, prompts=p.explore_prompts, samples=p.explore_samples)


def alignment_run(
    p: Parameters, run: SFTRun | DPORun | PPORun, probe: str = "train", aware: bool = True
) -> AlignmentRun:
    """The measurement of a training run on one probe, with the declared choices of the parameters.

    aware: of the alignment for the optimiser's steps too.
    """
    return AlignmentRun(
        run=run,
        targets=target_spec(p),
        probe=probe,
        size=p.ppo_probe if run.kind == "ppo" else p.probe,
        method=p.method,
        aware=aware,
    )
