"""The lens: how an objective's updates change the likelihood of some responses. It needs torch and transformers alone.

    from prefdyn.lens import Batch, TokenWeights, pad, target_direction, token_scores

A batch of responses, a direction (the gradient of what is asked about) and token weights (of any objective) are all
that it takes: G is the sum of weights times scores.
"""

from .alignment import (
    MeasurementError,
    by_sequence,
    check,
    choose_method,
    gradient,
    inner,
    norm,
    scaled,
    target_direction,
    token_scores,
)
from .batch import Batch, concatenate, pad
from .controls import Control, apply, thirds
from .faithful import faithful
from .likelihood import entropy_and_kl, response_logits, sequence_logps, token_logps
from .losses import from_loss, logit_contributions
from .weights import TokenWeights

__all__ = [
    "Batch",
    "Control",
    "LensCallback",
    "MeasurementError",
    "TokenWeights",
    "apply",
    "by_sequence",
    "check",
    "choose_method",
    "concatenate",
    "entropy_and_kl",
    "faithful",
    "from_loss",
    "gradient",
    "inner",
    "logit_contributions",
    "norm",
    "pad",
    "response_logits",
    "scaled",
    "sequence_logps",
    "target_direction",
    "thirds",
    "token_logps",
    "token_scores",
]


def __getattr__(name: str):
    """`LensCallback`, read when it is asked for: what it needs of transformers takes a while to import."""
    if name == "LensCallback":
        from .callback import LensCallback

        return LensCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
