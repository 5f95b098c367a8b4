"""Tiny policies: a table of logits whose gradients are known by hand, and real architectures with random weights."""

from types import SimpleNamespace

import torch
from prefdyn import policy, world
from prefdyn.data import Batch, pad
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


class Table(torch.nn.Module):
    """A policy of V x V logits: the next token depends on the present one alone.

    With p = softmax of the row of token x, the gradient of log pi(y | x) is e_y - p in row x and 0 elsewhere.
    """

    def __init__(self, logits):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.get_default_dtype()))

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids, logits_to_keep=slice(None), **kwargs):
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=self.table[input_ids[:, keep]], past_key_values=None)


def tiny_policy(seed: int = 0, width: int = 16, layers: int = 1):
    """A random GPT-NeoX over the world's words and its tokenizer."""
    tokenizer = policy.word_tokenizer(world.vocabulary())
    model = policy.scratch_model(tokenizer, layers=layers, width=width, heads=2, context=52, seed=seed)
    return model, tokenizer


VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}


def _llama(**more) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **more))


def _qwen3(**more) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8, **more))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_implementation="eager")
    )


ARCHITECTURES = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "llama": lambda: _llama(tie_word_embeddings=False),
    "qwen3": lambda: _qwen3(tie_word_embeddings=False),
    "qwen3, tied": lambda: _qwen3(tie_word_embeddings=True),
    "gpt2": _gpt2,  # learned positions: unlike rotary ones, they notice a shift
}


def build(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model of torch's default dtype, with weights large enough that nothing is nearly linear or uniform."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().to(torch.get_default_dtype()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(8.0)  # of about unit length, as those of trained models
    return model


def lift_float32(monkeypatch) -> None:
    """Let float64 pass through transformers' softmax of attention and RMS norm, which compute in float32."""
    softmax = torch.nn.functional.softmax

    def softmax_as_given(input, dim=None, _stacklevel=3, dtype=None):
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    def norm_as_given(self, hidden_states):
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean_square + self.variance_epsilon))

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_as_given)
    for norm in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", norm_as_given)


def random_batch(rows: int, seed: int = 0, vocab: int = VOCAB, side: str = "right", longest: int = 6) -> Batch:
    """Random prompts and responses of different lengths; token 0 is padding."""
    rng = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=rng))
        return torch.randint(1, vocab, (length,), generator=rng).tolist()

    return pad([tokens() for _ in range(rows)], [tokens() for _ in range(rows)], 0, side)
