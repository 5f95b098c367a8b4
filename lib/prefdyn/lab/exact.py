"""A policy small enough to enumerate: log-linear over K responses, with everything about it in closed form.

    log pi = log softmax(features @ theta),      grad log pi_i = features_i - mean of features under pi

The table (features = identity) gives every response a parameter of its own. An objective is again a set of weights,
here one for each *response*, and `ascent(weights)` is minus its gradient. Leading dimensions (...) are problems solved
side by side. `Enumerated` is the same policy as a module, for the code that trains and measures language models.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from scipy.special import lambertw

from ..lens.batch import Batch, pad


class Enumerated(torch.nn.Module):
    """The policy as a causal language model: the token after any prompt is the response, and there are K tokens.

    Args: theta, float [F], the parameters. features, float [K, F], by default the table. Raises ValueError if their
    shapes do not fit.
    """

    def __init__(self, theta: torch.Tensor, features: torch.Tensor | None = None):
        super().__init__()
        features = torch.eye(len(theta), dtype=theta.dtype) if features is None else features
        if theta.ndim != 1 or features.ndim != 2 or features.shape[1] != len(theta):
            raise ValueError(
                f"Enumerated: theta {tuple(theta.shape)} and features {tuple(features.shape)} must be [F] and [K, F]"
            )
        self.theta = torch.nn.Parameter(theta.detach().clone())
        self.register_buffer("features", features)

    @property
    def dtype(self) -> torch.dtype:
        return self.theta.dtype

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_) -> SimpleNamespace:
        logits = self.features @ self.theta
        return SimpleNamespace(logits=logits.expand(len(input_ids), len(logits_to_keep), -1))


def say(responses: Sequence[int]) -> Batch:
    """A batch of one-token responses, by number, each to the same prompt of one token."""
    return pad([[0]] * len(responses), [[int(i)] for i in responses], 0)


def draw(seeds: Sequence[int], each: int, responses: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random problems: logits and rewards, standard normal, [len(seeds) * each, responses] each; a seed's are its own.

    Raises ValueError for fewer than two responses, between which there would be nothing to prefer.
    """
    if responses < 2:
        raise ValueError(f"responses={responses}: at least 2 are needed")
    drawn = [torch.randn(2, each, responses, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    logits, reward = torch.cat(drawn, 1)
    return logits, reward


def ascent(weights: torch.Tensor, pi: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """sum_i w_i grad log pi_i = features^T (w - (sum of w) pi), [..., F]: minus the gradient of what w belongs to.

    With the probabilities of final responses as weights it is the direction d of G.

    Args: weights and probabilities of the responses, [..., K] each. features, [K, F], or None for the table.
    Raises ValueError if they differ in K.
    """
    _same_responses("ascent", pi, weights)
    moved = weights - weights.sum(-1, keepdim=True) * pi
    return moved if features is None else moved @ _of(features, pi)


def scores(direction: torch.Tensor, pi: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """a_i = <grad log pi_i, direction>, [..., K]; their mean under pi is 0.

    Args: direction, [..., F]. pi, [..., K]. features, [K, F], or None for the table. Raises ValueError if K differs.
    """
    along = direction if features is None else direction @ _of(features, pi).T
    _same_responses("scores", pi, along)
    return along - (pi * along).sum(-1, keepdim=True)


def change(move: torch.Tensor, logp: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """Change of every log-probability, [..., K], when theta moves by `move` [..., F], of any size: exact.

    a_i less log E_pi exp(a), the same for all responses and never negative. Args: logp, [..., K], before the move.
    """
    along = scores(move, logp.exp(), features)
    return along - torch.logsumexp(logp + along, -1, keepdim=True)


def population(drawn: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Probability that a labelled pair is (chosen i, rejected j), [..., K, K]; all together 1.

    Two different responses are drawn from `drawn` and labelled after Bradley and Terry (1952).

    Args: drawn, [..., K], probabilities. reward, [..., K], in points: i is preferred with sigmoid(r_i - r_j).
    Raises ValueError if only one response is ever drawn.
    """
    two = drawn[..., :, None] * drawn[..., None, :] * (1 - torch.eye(drawn.shape[-1], dtype=drawn.dtype))
    total = two.sum((-2, -1), keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("drawn: at least two responses must have a probability above 0")
    return 2 * two / total * (reward[..., :, None] - reward[..., None, :]).sigmoid()


def pair_weights(
    logp: torch.Tensor, ref: torch.Tensor, pairs: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of DPO's mean loss over pairs: of responses as chosen (>= 0) and as rejected (<= 0), [..., K] each.

    Args: log-probs of policy and reference, [..., K]. pairs, [..., K, K], probability of (chosen, rejected). beta, > 0.
    See *Direct Preference Optimization*, Rafailov et al. 2023, the gradient in section 4. Raises ValueError for beta.
    """
    _positive("beta", beta)
    log_ratio = logp - ref
    omega = (-beta * (log_ratio[..., :, None] - log_ratio[..., None, :])).sigmoid()
    pull = beta * pairs * omega
    return pull.sum(-1), -pull.sum(-2)


def pair_loss(logp: torch.Tensor, ref: torch.Tensor, pairs: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO's mean loss over pairs, [...], in nats; arguments as for `pair_weights`."""
    _positive("beta", beta)
    log_ratio = logp - ref
    return -(pairs * F.logsigmoid(beta * (log_ratio[..., :, None] - log_ratio[..., None, :]))).sum((-2, -1))


def optimum(ref: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """log pi* with pi* proportional to pi_ref exp(r / beta), [..., K]. See Rafailov et al. 2023, eq. 4."""
    _positive("beta", beta)
    return (ref + reward / beta).log_softmax(-1)


def break_even(ref: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """The reward, [...], below which a response is less likely at DPO's optimum than under the reference policy.

    beta log E_ref exp(r / beta): between the mean and the largest reward. Arguments as for `optimum`.
    """
    _positive("beta", beta)
    return beta * torch.logsumexp(ref + reward / beta, -1)


def entropy(logp: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, [...], of log-probs [..., K]."""
    return -(logp.exp() * logp).sum(-1)


def kl(logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, [...], of log-probs [..., K]."""
    return (logp.exp() * (logp - logq)).sum(-1)


def above_typical(logp: torch.Tensor) -> torch.Tensor:
    """psi_i = pi_i (log pi_i + H), [..., K]: minus the gradient of the entropy in the table.

    Above 0 where a response is likelier than exp(-H), the geometric mean of the probabilities that pi meets.
    """
    return logp.exp() * (logp + entropy(logp)[..., None])


def entropy_threshold(logp: torch.Tensor) -> torch.Tensor:
    """The probability, [...], above which a response, lowered alone in the table, gives way to a higher entropy.

    The solution p >= exp(-H) of p (log p + H) = sum_i pi_i psi_i, by Lambert's W. Args: logp, [..., K].
    """
    h = entropy(logp)
    right = (logp.exp() * above_typical(logp)).sum(-1).clamp(min=0)  # never negative but for rounding
    return (torch.as_tensor(lambertw((right * h.exp()).numpy()).real) - h).exp()


def flow(
    velocity: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, times: torch.Tensor, longest: float
) -> torch.Tensor:
    """The path d theta / dt = velocity(theta) from `start` [...] at `times`, [T, ...].

    Steps of Runge and Kutta's fourth order, of at most `longest`. Args: times, [T], from the start's time on, in order.
    Raises ValueError for times that are not, and for `longest` not above 0.
    """
    _positive("longest", longest)
    if times.ndim != 1 or bool((times.diff() < 0).any()):
        raise ValueError(f"times: must be [T] in increasing order, given {times.tolist()}")
    path = [start]
    for span in times.diff().tolist():
        theta, parts = path[-1], max(1, -int(-span // longest))
        h = span / parts
        for _ in range(parts):
            k1 = velocity(theta)
            k2 = velocity(theta + h / 2 * k1)
            k3 = velocity(theta + h / 2 * k2)
            k4 = velocity(theta + h * k3)
            theta = theta + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(theta)
    return torch.stack(path)


def _of(features: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    if features.ndim != 2 or len(features) != pi.shape[-1]:
        raise ValueError(f"features: given {tuple(features.shape)}, must be [K, F] with K = {pi.shape[-1]} responses")
    return features


def _same_responses(name: str, pi: torch.Tensor, other: torch.Tensor) -> None:
    if other.shape[-1] != pi.shape[-1]:
        raise ValueError(
            f"{name}: given {other.shape[-1]} numbers for {pi.shape[-1]} responses; one a response is needed"
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}: must be above 0")
