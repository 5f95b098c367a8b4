"""What all tests share: one thread a process, no network, small models and a place for runs that is thrown away."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test asks the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import matplotlib

matplotlib.use("Agg")

import pytest
import torch
from toys.models import tiny_policy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policy_and_tokenizer():
    """One GPT-NeoX of the world's words, random and never changed by a test."""
    return tiny_policy(seed=0)


@pytest.fixture
def double():
    """Float64 as torch's default for one test: masks and constants otherwise pass through float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
