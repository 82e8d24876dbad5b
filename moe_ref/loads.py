"""moe_ref, loads: logits whose expected load follows a chosen distribution, for load tests.

    uniform      every expert alike
    zipf:S       the expert of rank r has a share in proportion to (r + 1) ** -S, expert 0 the most
    hot:P        expert 0 has the share P, the others share the rest evenly
    3,1,1,...    a share in proportion to each number

The logits are the logarithms of the shares plus Gumbel noise: the best of them is drawn from the shares exactly, the
K best are K draws without replacement. So with top_k 1 the expected load of an expert is its share; with more, the
busiest cannot have more than one slot of a token, and the load is flatter. Any score function that rises with the
logit keeps this; a bias, and groups that are dropped, do not.

Legend: T tokens, E choices.
"""

from collections.abc import Sequence

import numpy as np

from moe_ref.specs.checks import entries, number, require
from moe_ref.specs.router import RouterSpec

NAMES = ("uniform", "zipf:S", "hot:P")


def shares(distribution: str | Sequence[float] | np.ndarray, num_choices: int) -> np.ndarray:
    """(E,) shares that sum to 1.

    Raises:
        ValueError: the name is unknown, or a number is out of its range; it names the value and the bound.
    """
    if isinstance(distribution, str) and "," not in distribution:
        name, _, value = distribution.partition(":")
        if name == "uniform" and not value:
            return np.full(num_choices, 1 / num_choices)
        require(
            name in ("zipf", "hot") and value != "",
            f"distribution is {distribution!r}; it is one of {', '.join(NAMES)}, or {num_choices} numbers with commas",
        )
        parameter = _number(value, distribution)
        if name == "zipf":
            number("the exponent of zipf", parameter, low=0.0)
            found_E = (np.arange(num_choices) + 1.0) ** -parameter
            return found_E / found_E.sum()
        require(0 <= parameter <= 1, f"the share of hot is {parameter!r}; it is between 0 and 1")
        if num_choices == 1:
            return np.ones(1)
        return np.r_[parameter, np.full(num_choices - 1, (1 - parameter) / (num_choices - 1))]
    if isinstance(distribution, str):
        distribution = [_number(each, distribution) for each in distribution.split(",")]
    found_E = np.asarray(distribution, np.float64)
    require(found_E.shape == (num_choices,), f"distribution has shape {found_E.shape}; it is ({num_choices},)")
    entries("distribution", found_E, np.isfinite(found_E) & (found_E >= 0), "shares are finite and at least 0")
    require(found_E.sum() > 0, "distribution is 0 for every expert")
    return found_E / found_E.sum()


def logits_of_load(
    distribution: str | Sequence[float] | np.ndarray, num_tokens: int, spec: RouterSpec, rng: np.random.Generator
) -> np.ndarray:
    """(T, num_logits) logits whose K best choices are K draws from the shares, without replacement.

    An expert without a share has logits of -inf. Router-scored shared experts, which nobody chooses, get normal ones.

    Raises:
        ValueError: fewer than top_k choices have a share; or as `shares`.
    """
    shares_E = shares(distribution, spec.num_choices)
    some = int((shares_E > 0).sum())
    require(some >= spec.top_k, f"distribution has {some} experts with a share; top_k is {spec.top_k}")
    with np.errstate(divide="ignore"):
        choices_TE = np.log(shares_E) + rng.gumbel(size=(num_tokens, spec.num_choices))
    others_TS = rng.standard_normal((num_tokens, spec.num_scored_shared_experts))
    return np.concatenate([choices_TE, others_TS], axis=1) / spec.logit_scale


def _number(text: str, distribution: object) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"distribution is {distribution!r}; {text!r} is no number") from None
