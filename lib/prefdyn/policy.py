"""A policy: a causal language model and its tokenizer; per-token log-probs, entropy, KL, and decoding."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from .data import Batch

if not sys.stderr.isatty():
    disable_progress_bar()  # of loading and saving, which fill logs and pages

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
REPLY = "<reply>"  # stands between a prompt and its reply
# One turn: the prompt, the marker, the reply, its end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ '" + REPLY + "' if message['role'] == 'user' else '" + SPECIAL["eos_token"] + "' }}{% endfor %}"
)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL,
        additional_special_tokens=[REPLY],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words separated by spaces, as a normal Hugging Face tokenizer."""
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), REPLY, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer trained on `texts`: any text goes in, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL.values(), REPLY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def scratch_model(
    tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, heads: int, context: int, seed: int
) -> GPTNeoXForCausalLM:
    """A small GPT-NeoX (the architecture of Pythia) with random weights from `seed`.

    Raises ValueError if `width` is not a multiple of 2 * `heads` (rotary embeddings turn pairs of coordinates).
    """
    if width % (2 * heads):
        raise ValueError(f"width={width}, heads={heads}: width must be a multiple of 2 * heads")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config).eval()


def load(name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer from a local folder or, by name, from the Hugging Face hub.

    Only safetensors weights are read and no code from the checkpoint is run.
    Raises ValueError with what was given and what is allowed if that fails.
    """
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    path = Path(name_or_path).expanduser()
    if looks_local and not path.is_dir():
        raise ValueError(
            f"model={name_or_path!r}: no such folder; allowed: 'scratch', a folder with a saved checkpoint "
            "(config.json, model.safetensors, tokenizer.json) or the name of a model on the hub"
        )
    source = str(path) if path.is_dir() else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model={name_or_path!r}: could not be loaded; allowed: 'scratch', a folder with a saved checkpoint "
            f"or the name of a model on the hub. The loader said: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a policy so that `load` and any Hugging Face tool can read it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def response_columns(batch: Batch) -> torch.Tensor:
    """The columns of `batch` that hold a response token in any row, [C]; the first column has no prediction."""
    return batch.response[:, 1:].any(0).nonzero().squeeze(-1) + 1


def response_logits(
    model: PreTrainedModel, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C, V], over `temperature`, that predict the C `response_columns` of `batch`, and those columns.

    The output layer, the dearest part of a small model with a large vocabulary, is computed for these only. Positions
    are counted from the first real token, so a row's logits do not depend on its padding, on either side.
    """
    columns = response_columns(batch)
    attention = batch.attention.long()
    out = model(
        input_ids=batch.ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=columns - 1,
    )
    return out.logits if temperature == 1 else out.logits / temperature, columns


def token_logps(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of every response token given what precedes it, [N, T], zero elsewhere.

    Those of the policy that samples at `temperature`. Computed in float32 at least, whatever the model's precision.
    """
    logits, columns = response_logits(model, batch, temperature)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    picked = logits.log_softmax(-1).gather(-1, batch.ids[:, columns, None]).squeeze(-1)
    logps = picked.masked_fill(~batch.response[:, columns], 0.0)
    return logps.new_zeros(batch.ids.shape).index_copy(1, columns, logps)


@torch.no_grad()
def sequence_logps(model: PreTrainedModel, batch: Batch, size: int = 256) -> torch.Tensor:
    """Log-probability of every whole response, [N], in chunks of `size` rows and without gradients."""
    return torch.cat([token_logps(model, part).sum(-1) for part in batch.chunks(size)])


@torch.no_grad()
def entropy_and_kl(
    model: PreTrainedModel, reference: PreTrainedModel, batch: Batch, size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact entropy of `model` and KL(model || reference) at each response token, summed over the response, [N] each.

    Over responses sampled from `model`, the mean of the second is an unbiased estimate of the KL divergence of
    the two policies over whole responses (the expectation over the next token is taken exactly).
    """
    entropies, divergences = [], []
    for part in batch.chunks(size):
        logits, columns = response_logits(model, part)
        logp = logits.float().log_softmax(-1)
        logq = response_logits(reference, part)[0].float().log_softmax(-1)
        p, mask = logp.exp(), part.response[:, columns]
        entropies.append((-(p * logp).sum(-1) * mask).sum(-1))
        divergences.append(((p * (logp - logq)).sum(-1) * mask).sum(-1))
    return torch.cat(entropies), torch.cat(divergences)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_response: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 0.0,
    seed: int = 0,
    size: int = 512,
) -> list[list[int]]:
    """Responses to `prompts` (token ids) through a key-value cache: greedy at temperature 0, else sampled.

    Each response ends with `eos_id` unless it reached `max_response` tokens. Sampling uses a generator of its own
    seeded with `seed`; results depend on the chunk size `size` only through the order of its draws.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be 0 (greedy) or positive")
    device = model.device
    rng = torch.Generator(device).manual_seed(seed)
    out: list[list[int]] = []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        width = max(map(len, chunk))
        ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in chunk], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chunk], device=device)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        done = torch.zeros(len(chunk), dtype=torch.bool, device=device)
        cache, steps = None, []
        for _ in range(max_response):
            result = model(
                input_ids=ids,
                attention_mask=attention,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = result.past_key_values, result.logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng).squeeze(-1)
            token = token.masked_fill(done, pad_id)
            steps.append(token)
            done = done | (token == eos_id)
            if bool(done.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, torch.ones_like(ids)], 1)
        for row in torch.stack(steps, 1).tolist():
            out.append(row[: row.index(eos_id) + 1] if eos_id in row else row)
    return out


def decode(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    """Texts of responses, without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in responses]
