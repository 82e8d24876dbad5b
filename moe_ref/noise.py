"""moe_ref, noise: what is drawn for the logits in training, the same array on any number of ranks and in any framework.

Each entry is a function of the seed, the number of the token in the whole batch and the column alone (a counter,
hashed), so that a shard that knows its first token draws what the whole batch would.

    jitter    factors in [1 - eps, 1 + eps], to multiply with (Switch, arXiv:2101.03961; there on the gate's input)
    normal    noisy top-k (arXiv:1701.06538), to add; a standard deviation for each column, or learned ones, multiply it
    gumbel    to add: the best logit is then drawn from the softmax, and the top_k without replacement

Legend: T tokens, E columns of the logits.
"""

import numpy as np

from moe_ref.specs.checks import integer, number

GOLDEN, FIRST, SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Of splitmix64 (Steele, Lea, Flood 2014)."""


def uniform(seed: int, num_tokens: int, num_logits: int, *, first_token: int = 0, stream: int = 0) -> np.ndarray:
    """(T, E) numbers above 0 and below 1; another `stream` of a seed gives others."""
    integer("seed", seed, 0, 2**32 - 1)
    integer("first_token", first_token, 0, 2**40)
    integer("stream", stream, 0, 2**16)
    tokens_T1 = (first_token + np.arange(num_tokens, dtype=np.uint64))[:, None]
    with np.errstate(over="ignore"):  # modulo 2 ** 64
        key = _mixed((np.uint64(seed) << np.uint64(16)) + np.uint64(stream))
        counter_TE = _mixed(key + tokens_T1 * GOLDEN)
        bits_TE = _mixed(counter_TE + np.arange(1, num_logits + 1, dtype=np.uint64) * GOLDEN)
    return ((bits_TE >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def jitter(seed: int, num_tokens: int, num_logits: int, *, eps: float, first_token: int = 0) -> np.ndarray:
    """(T, E) factors in [1 - eps, 1 + eps], for `RouterInputs.logit_factors_TE`."""
    number("eps", eps, low=0.0)
    return 1 + eps * (2 * uniform(seed, num_tokens, num_logits, first_token=first_token) - 1)


def normal(seed: int, num_tokens: int, num_logits: int, *, first_token: int = 0) -> np.ndarray:
    """(T, E) numbers of mean 0 and standard deviation 1, for `RouterInputs.logit_noise_TE`."""
    size_TE, angle_TE = (
        uniform(seed, num_tokens, num_logits, first_token=first_token, stream=stream) for stream in (1, 2)
    )
    return np.sqrt(-2 * np.log(size_TE)) * np.cos(2 * np.pi * angle_TE)


def gumbel(seed: int, num_tokens: int, num_logits: int, *, first_token: int = 0) -> np.ndarray:
    """(T, E) numbers of the standard Gumbel distribution, for `RouterInputs.logit_noise_TE`."""
    return -np.log(-np.log(uniform(seed, num_tokens, num_logits, first_token=first_token, stream=3)))


def _mixed(values: np.ndarray | np.uint64) -> np.ndarray:
    values = np.asarray(values)
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))
