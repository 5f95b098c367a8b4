"""Sequence likelihood calibration: a hinge on the margin, which lets go of pairs that are ordered clearly enough."""

import torch
import torch.nn.functional as F

from .base import Method, Pairs


def loss(pairs: Pairs, *, beta: float, delta: float) -> torch.Tensor:
    """max(0, delta - beta * margin), [B].

    The calibration term of *SLiC-HF*, Zhao et al. 2023, section 2, in the form with log-ratios that *Statistical
    Rejection Sampling Improves Preference Optimization*, Liu et al. 2024, calls hinge-norm. Our choices: SLiC-HF
    compares plain log-probs and adds a regularising likelihood term; here the reference policy regularises, and delta
    is compared with beta * margin (hinge-norm: delta 1), not with the margin in nats.

    Args: beta, in 1/nats. delta, the value of beta * margin from which on a pair no longer counts.
    """
    return F.relu(delta - beta * pairs.margin())


METHOD = Method(
    name="slic",
    title="Sequence likelihood calibration (SLiC), hinge on log-ratios",
    source="Zhao et al. 2023 (arXiv 2305.10425), section 2, as hinge-norm of Liu et al. 2024 (arXiv 2309.06657)",
    takes="pairs",
    formula=r"w = \pm \tfrac{\beta}{B}\, [\beta \cdot \text{margin} < \delta]",
    curves=(
        "Margins grow at an even pace until they pass delta/beta nats, and the pair's weights become 0. "
        "Pairs that stay short of it are never let go, so mislabelled ones end up driving the updates."
    ),
    loss=loss,
    settings={"beta": 0.1, "delta": 1.0},
    meaning={
        "beta": "strength of the tie to the reference (gamma of hinge-norm)",
        "delta": "value of beta * margin from which on a pair has no weight",
        "loss": "what beta * margin lacks to delta; delta at the start",
    },
    strength="beta where beta * margin is short of delta, 0 elsewhere",
)
