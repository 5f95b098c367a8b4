"""What a policy says and how good it is: replies, true reward, win rate, entropy, KL to the reference."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lens.batch import pad
from ..lens.likelihood import entropy_and_kl
from . import chat
from .data import Dataset
from .layouts import Prompt, shown
from .policy import decode, generate


def win_rate(rewards: Sequence[float], baseline: Sequence[float]) -> float:
    """Share of prompts on which `rewards` beats `baseline`, ties counted half. Raises ValueError on unequal lengths."""
    a, b = np.asarray(rewards, float), np.asarray(baseline, float)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"win_rate: two lists of equal length are needed, given {a.shape} and {b.shape}")
    return float((a > b).mean() + 0.5 * (a == b).mean())


def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_prompt: int,
    max_response: int,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the policy's replies to them, greedy by default (see `generate`).

    Of a longer prompt the last `max_prompt` tokens are kept; a reply ends where the model's turn does (`chat.ends`).
    """
    distinct = list(dict.fromkeys(prompts))
    known = dict(zip(distinct, chat.prompt_ids(tokenizer, distinct), strict=True))
    asked = [known[prompt][-max_prompt:] for prompt in prompts]
    responses = generate(
        model,
        asked,
        max_response=max_response,
        ends=chat.ends(tokenizer, getattr(model, "generation_config", None)),
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        seed=seed,
    )
    return asked, responses


def rewards(dataset: Dataset, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
    """True reward of each reply; NaN where no true reward is known."""
    if dataset.reward is None:
        return [float("nan")] * len(replies)
    return [dataset.reward(prompt, text) for prompt, text in zip(prompts, replies, strict=True)]


def evaluate(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    max_prompt: int,
    max_response: int,
    seed: int,
    part: str = "held_out",
) -> tuple[dict[str, float], list[dict]]:
    """Evaluate a policy on the prompts `part`.

    Returns metrics and the greedy replies (dicts of prompt, reply, reward, and sampled, the reward of a sampled reply
    to the same prompt). Metrics: reward_greedy and reward_sampled (points, at temperature 1), length (tokens of a
    sampled reply), entropy and kl (nats a reply, over sampled replies; kl to `reference`, NaN without one).
    """
    prompts = dataset.prompts[part]
    limits = {"max_prompt": max_prompt, "max_response": max_response}
    n = len(prompts)
    heat = [0.0] * n + [1.0] * n  # in one batch: half the steps
    asked, answers = reply(model, tokenizer, [*prompts, *prompts], temperature=heat, seed=seed, **limits)
    asked, greedy, sampled = asked[:n], answers[:n], answers[n:]
    greedy_texts = decode(tokenizer, greedy)
    greedy_rewards = rewards(dataset, prompts, greedy_texts)
    sampled_rewards = rewards(dataset, prompts, decode(tokenizer, sampled))
    batch = pad(asked, sampled, tokenizer.pad_token_id).to(model.device)
    entropy, kl = entropy_and_kl(model, reference or model, batch)
    metrics = {
        "reward_greedy": float(np.mean(greedy_rewards)),
        "reward_sampled": float(np.mean(sampled_rewards)),
        "length": float(np.mean([len(ids) for ids in sampled])),
        "entropy": entropy.mean().item(),
        "kl": kl.mean().item() if reference is not None else float("nan"),
    }
    rows = [
        {"prompt": shown(prompt), "reply": text, "reward": points, "sampled": other}
        for prompt, text, points, other in zip(prompts, greedy_texts, greedy_rewards, sampled_rewards, strict=True)
    ]
    return metrics, rows
