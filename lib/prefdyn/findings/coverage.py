"""How often the book's 95% intervals hold the truth where effects are not normal, by simulation.

Of few seeds no interval can hold its 95% for every shape: five that have not collapsed say nothing of the sixth.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import special

from . import paired

COLLAPSE, FAR = 0.2, 10.0  # one seed in five collapses: its effect is 10 standard deviations of the others' lower
LEAD = 0.5  # of the policy whose win rate is asked for, in standard deviations of a cell: it wins about 0.7
POPULATION = 400_000  # draws behind the true win rate: it is known to 0.0005
Sizes = tuple[float, float, float]  # standard deviations of seeds, of prompts and of what is left
SIZES: Sizes = (0.3, 0.3, 1.0)  # as found in differences between variants; `sizes_of` finds those of other data


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal effects; all shapes have mean 0 and standard deviation 1."""
    return rng.normal(size=shape)


def t3(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, variance 3: heavy tails on both sides."""
    return rng.standard_t(3, size=shape) / np.sqrt(3)


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Logs with deviation 1, mean e^(1/2), variance (e - 1) e: skewed, with a long tail upward."""
    return (rng.lognormal(size=shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def collapse(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, but one in five lies far below, at random: mean -0.2 x 10, variance 1 + 0.2 x 0.8 x 10^2."""
    effects = rng.normal(size=shape) - FAR * (rng.random(shape) < COLLAPSE)
    return (effects + COLLAPSE * FAR) / np.sqrt(1 + COLLAPSE * (1 - COLLAPSE) * FAR**2)


Shape = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
SHAPES: dict[str, tuple[Shape, Shape]] = {  # of effects of seeds and of prompts
    "normal": (normal, normal),
    "t3": (t3, t3),
    "lognormal": (lognormal, lognormal),
    "collapse": (collapse, normal),
}


def sizes_of(y: np.ndarray) -> Sizes:
    """Standard deviations of seeds, of prompts and of what is left, in outcomes y [S, P] with S and P >= 2.

    From the mean squares of the two-way analysis of variance: (MS_S - MS_E) / P, (MS_P - MS_E) / S and MS_E, at least
    0. Of few seeds the first is no more than an order of magnitude.
    """
    (seeds, prompts, rest), _ = paired.mean_squares(y)
    variances = np.maximum([(seeds - rest) / y.shape[1], (prompts - rest) / y.shape[0], rest], 0)
    return tuple(np.sqrt(variances).tolist())


def cells(rng: np.random.Generator, shape: str, size: tuple[int, int, int], sizes: Sizes = SIZES) -> np.ndarray:
    """Simulated outcomes [repetitions, seeds, prompts] = `size`, whose mean is 0: crossed effects and normal rest.

    Args: shape, one of SHAPES; sizes, standard deviations of seeds, of prompts, and of what is left.
    """
    repetitions, seeds, prompts = size
    of_seeds, of_prompts = SHAPES[shape]
    y = sizes[2] * rng.normal(size=size)
    y += sizes[0] * of_seeds(rng, (repetitions, seeds, 1))
    y += sizes[1] * of_prompts(rng, (repetitions, 1, prompts))
    return y


def true_win_rate(rng: np.random.Generator, shape: str, lead: float, sizes: Sizes = SIZES) -> float:
    """Probability that `lead` plus a simulated outcome is above 0, over other seeds and prompts."""
    of_seeds, of_prompts = SHAPES[shape]
    effects = sizes[0] * of_seeds(rng, (POPULATION,)) + sizes[1] * of_prompts(rng, (POPULATION,))
    return float(special.ndtr((lead + effects) / sizes[2]).mean())


def misses(y: np.ndarray, truth: float) -> tuple[float, float]:
    """Share of crossed intervals, y [..., S, P], below which the true mean lies, and above which.

    With one prompt it is the plain interval over seeds, `stats.mean_interval`.
    """
    mean, half = paired.grand_mean(y), paired.half_width(y)
    return float((truth < mean - half).mean()), float((truth > mean + half).mean())


def misses_of_win_rate(won: np.ndarray, truth: float) -> tuple[float, float]:
    """The same for intervals of win rates (`paired.win_rate_interval`), won [..., S, P] of 0, 1/2 and 1."""
    rate, (toss, spread) = paired.grand_mean(won), paired.share_terms(won)
    u = truth * (1 - truth)
    missed = (rate - truth) ** 2 > toss * u + spread * u**2
    return float((missed & (truth < rate)).mean()), float((missed & (truth > rate)).mean())


def coverage(
    seeds: Sequence[int] = (2, 3, 5),
    prompts: int = 128,
    repetitions: int = 2_000,
    sizes: Sizes = SIZES,
    seed: int = 0,
) -> pd.DataFrame:
    """How often 95% intervals hold the truth, by the shape of effects, the interval and the number of seeds.

    interval: "mean", Student's over one value a seed, whose shape is the seeds' (prompts = 0); "crossed", of a mean
    over seeds and prompts; "win rate", of the share of outcomes above 0 when the mean is LEAD of their deviations.

    Skewed effects miss on the side of their tail. "Surely above" is wrong where the truth lies below the interval:
    hardly ever with a tail upward (lognormal), often with one downward (collapse); "surely below" the other way round.

    Args: sizes, as of `sizes_of`; only their ratios matter. seed, of the random numbers. Returns a row each: shape,
    interval, seeds, prompts, coverage, and below, above: shares of intervals below and above which the truth lies. A
    coverage near 0.95 is known to 0.005 (one standard error, 2,000 repetitions), one near 0.8 to 0.009. Raises
    ValueError for fewer than two seeds, or where nothing is left beside seeds and prompts.
    """
    if min(seeds) < 2:
        raise ValueError(f"coverage: seeds={tuple(seeds)}; an interval needs at least 2")
    if sizes[2] <= 0:
        raise ValueError(f"coverage: sizes={sizes}; the last, of what is left, must be above 0")
    lead = LEAD * float(np.linalg.norm(sizes))
    rows = []
    for shape, (of_seeds, _) in SHAPES.items():
        rng = np.random.default_rng(seed)
        rate = true_win_rate(rng, shape, lead, sizes)
        for n in seeds:
            y = cells(rng, shape, (repetitions, n, prompts), sizes)
            found = {
                "mean": (0, misses(of_seeds(rng, (repetitions, n, 1)), 0.0)),
                "crossed": (prompts, misses(y, 0.0)),
                "win rate": (prompts, misses_of_win_rate((y + lead > 0).astype(float), rate)),
            }
            rows += [(shape, name, n, p, 1 - sum(sides), *sides) for name, (p, sides) in found.items()]
    return pd.DataFrame(rows, columns=["shape", "interval", "seeds", "prompts", "coverage", "below", "above"])
