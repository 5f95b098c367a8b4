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


def fisher(pi: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """F = E_pi[grad log pi grad log pi^T], the covariance of the features under pi, [..., F, F].

    To second order KL(pi_theta+v || pi_theta) = v^T F v / 2. Args: pi, [..., K]. features, [K, F], None for the table.
    """
    phi = torch.eye(pi.shape[-1], dtype=pi.dtype) if features is None else _of(features, pi)
    centred = phi - (pi @ phi)[..., None, :]
    return centred.mT @ (pi[..., None] * centred)


def natural(direction: torch.Tensor, pi: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """F^+ direction, [..., F]: the shortest step along which `direction`, a sum of scores, grows most for its KL.

    In the table it is direction / pi, centred. Args: direction, [..., F], in the range of F. pi, [..., K], all above 0.
    """
    if features is None:
        raised = direction / pi
        return raised - raised.mean(-1, keepdim=True)
    inverse = torch.linalg.pinv(fisher(pi, features), rtol=1e-12, hermitian=True)
    return (inverse @ direction[..., None])[..., 0]


def reach(direction: torch.Tensor, pi: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """|direction| in the Fisher metric, [...]: the largest <direction, v> of a step v with v^T F v = 1.

    Of the direction towards reward in the table it is the reward's standard deviation under pi. Args: as `natural`.
    """
    return (direction * natural(direction, pi, features)).sum(-1).clamp(min=0).sqrt()


def fisher_cosine(
    a: torch.Tensor, b: torch.Tensor, pi: torch.Tensor, features: torch.Tensor | None = None
) -> torch.Tensor:
    """Cosine of the angle between two directions in the Fisher metric, [...]; args as for `natural`."""
    inner = (a * natural(b, pi, features)).sum(-1)
    return inner / (reach(a, pi, features) * reach(b, pi, features))


def wedge(along: torch.Tensor, cosine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest cosine with a second direction of a step whose cosine with the first is `along`, [...] each.

    cos(angle +- arccos along), angle = arccos cosine the one between the directions. Both are met by some step.
    """
    middle = along * cosine
    half = ((1 - along**2).clamp(min=0) * (1 - cosine**2).clamp(min=0)).sqrt()
    return middle - half, middle + half


def reward_direction(pi: torch.Tensor, reward: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
    """d_R: gradient of the expected reward, [..., F] = features^T (pi * (reward - mean reward)).

    The direction d of G with the reward in the place of final responses. Args: pi and reward, [..., K] each.
    """
    return ascent(pi * reward, pi, features)


def reward_change(
    move: torch.Tensor, logp: torch.Tensor, reward: torch.Tensor, features: torch.Tensor | None = None
) -> torch.Tensor:
    """Change of the expected reward, [...], when theta moves by `move` [..., F], of any size: exact.

    Cov_pi(reward, e^a) / E_pi e^a with the scores a of the move. Args: as for `change`; reward, [..., K].
    """
    moved = (logp + change(move, logp, features)).exp()
    return ((moved - logp.exp()) * reward).sum(-1)


def tilt(logp: torch.Tensor, reward: torch.Tensor, nats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy of the largest expected reward among those within KL(. || pi) = nats, and its strength.

    log of pi exp(strength * reward) / Z, [..., K], and the strength, [...], found by halving; 1 / strength is a
    temperature. Args: logp, reward, [..., K]. nats, [...], at least 0 and below -log pi(what is best).
    """
    best = reward == reward.amax(-1, keepdim=True)
    most = -torch.logsumexp(logp.masked_fill(~best, -torch.inf), -1)
    nats = torch.as_tensor(nats, dtype=logp.dtype).expand(most.shape)
    if not bool(((nats >= 0) & (nats < most)).all()):
        raise ValueError("nats: must be at least 0, and below -log of the probability of the best responses")

    def tilted(strength: torch.Tensor) -> torch.Tensor:
        return (logp + strength[..., None] * reward).log_softmax(-1)

    low, high = torch.zeros_like(most), torch.ones_like(most)
    while bool((short := kl(tilted(high), logp) < nats).any()):
        high = torch.where(short, 2 * high, high)
    for _ in range(100):
        middle = (low + high) / 2
        short = kl(tilted(middle), logp) < nats
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return tilted(high), high


def taught(chosen: int, rejected: int, features: torch.Tensor) -> torch.Tensor:
    """tau_j = <phi_j, phi_chosen - phi_rejected>, [K]: how much response j has of what a pair teaches.

    Raises ValueError for a pair of responses with the same features, which teaches nothing.
    """
    tau = features @ (features[chosen] - features[rejected])
    if not bool(tau[chosen] > tau[rejected]):
        raise ValueError(f"taught: responses {chosen} and {rejected} have the same features")
    return tau


def pair_path(logp: torch.Tensor, tau: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """Log-probs, [T, K], on the road of any loss on one pair that raises its margin: log of pi e^(way * tau) / Z.

    theta moves along phi_chosen - phi_rejected, by `way` of it. Args: logp, [K], at the start. tau, [K], by `taught`.
    """
    return (logp + way[:, None] * tau).log_softmax(-1)


def pair_time(way: torch.Tensor, gap: float, beta: float) -> torch.Tensor:
    """The time at which DPO's gradient flow on one pair, from its reference, has come by `way`.

    (way + (e^(beta gap way) - 1) / (beta gap)) / beta with gap = |phi_chosen - phi_rejected|^2, as the rate of `way` is
    beta sigmoid(-beta gap way).
    """
    _positive("beta", beta)
    _positive("gap", gap)
    return (way + torch.expm1(beta * gap * way) / (beta * gap)) / beta


FATES = ("rises for ever", "rises, then falls", "falls at once")


def fate(i: int, tau: torch.Tensor, pi: torch.Tensor) -> str:
    """What becomes of log pi_i on the road of a pair, one of FATES; args as for `pair_path`."""
    if bool(tau[i] <= (pi * tau).sum()):
        return FATES[2]
    return FATES[0] if bool(tau[i] == tau.max()) else FATES[1]


def gains(
    velocity: Callable[[torch.Tensor], torch.Tensor],
    final: torch.Tensor,
    start: torch.Tensor,
    times: torch.Tensor,
    longest: float,
    features: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The path of `flow` with the integral of G from its start on, [T, ..., F] and [T, ...].

    Args: final, [..., K], the frequencies of the final responses; the others as for `flow`.
    """

    def both(state: torch.Tensor) -> torch.Tensor:
        theta = state[..., :-1]
        v = velocity(theta)
        pi = (theta if features is None else theta @ features.T).softmax(-1)
        return torch.cat([v, (v * ascent(final, pi, features)).sum(-1, keepdim=True)], -1)

    path = flow(both, torch.cat([start, torch.zeros_like(start[..., :1])], -1), times, longest)
    return path[..., :-1], path[..., -1]


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
