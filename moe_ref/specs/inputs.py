"""moe_ref, the inputs of a router: what a selector reads besides the logits, in one object and one table.

The arrays are those of the room that computes: NumPy, JAX (traced too) or torch. Here only their shape and kind are
looked at; what they hold is looked at by `moe_ref.route`.

Legend: T tokens, K top_k, V table rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from moe_ref.specs.checks import require, shape_and_kind
from moe_ref.specs.router import RouterSpec

NOISE = {"logit_factors_TE": False, "logit_noise_TE": False}
READS: dict[str, dict[str, bool]] = {
    "top_k": NOISE,
    "group_top_k": NOISE,
    "sparsemixer": NOISE,
    "sinkhorn": NOISE,
    "expert_choice": NOISE,
    "threshold": NOISE,
    "top_p": NOISE,
    "table": {"token_ids_T": True, "table_VK": True},
    "given": {"given_ids_TK": True, "given_weights_TK": False},
    "round_robin": {"first_token": False},
    "random": {"seed": False},
}
"""Selector -> the fields of RouterInputs that it reads, and whether it needs them."""

BY_TOKEN = ("token_ids_T", "given_ids_TK", "given_weights_TK", *NOISE)
"""The fields with an entry for each token."""

ARRAYS = (*BY_TOKEN, "table_VK")

BY_SHARD = {"token_ids_by_shard": "token_ids_T", "given_ids_by_shard": "given_ids_TK"}
"""Names of lists with one array for each token shard -> the field of those arrays, one after the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterInputs:
    """What a selector reads besides the logits (`READS`); None where it is not given.

    In moe_jax this is a pytree, so that a compiled layer takes it as an argument.
    """

    token_ids_T: Any = None
    """(T,) ints: the row of the table for each token, for selector 'table'."""
    table_VK: Any = None
    """(V, K) expert ids, for selector 'table'."""
    given_ids_TK: Any = None
    """(T, K) ids to replay, for selector 'given'; -1 is an unused slot of weight 0."""
    given_weights_TK: Any = None
    """(T, K) final weights to replay with them; None: the weights are those of the logits."""
    logit_factors_TE: Any = None
    """(T, num_logits) positive factors on the logits, before all else: jitter, in training alone (`moe_ref.noise`)."""
    logit_noise_TE: Any = None
    """(T, num_logits) added to the logits after the factors: noisy top-k, Gumbel, in training alone."""
    first_token: Any = None
    """The number of the first token in the whole batch, for selector 'round_robin': with it, shards choose what the
    whole batch would. None: 0."""
    seed: Any = None
    """What the draw of selector 'random' starts from. moe_ref: what `numpy.random.default_rng` takes, None for 0;
    moe_jax: a `jax.random` key, which it needs; moe_torch: a `torch.Generator`, None for that of the device."""

    def check(self, spec: RouterSpec, num_tokens: int) -> None:
        """Every field is there if the selector needs it, and only if it reads it, with its shape and kind.

        Raises:
            ValueError: it names field, value and bound.
        """
        T, K = num_tokens, spec.top_k
        shapes = {
            "token_ids_T": ((T,), "int"),
            "table_VK": ((None, K), "int"),
            "given_ids_TK": ((T, K), "int"),
            "given_weights_TK": ((T, K), "float"),
            **dict.fromkeys(NOISE, ((T, spec.num_logits), "float")),
        }
        read = READS[spec.selector]
        for field in (*shapes, "first_token", "seed"):
            value = getattr(self, field)
            if value is None:
                require(not read.get(field, False), f"{field} is None; selector {spec.selector!r} needs it")
                continue
            # It would be silently ignored.
            require(field in read, f"{field} is given, but selector {spec.selector!r} takes none")
            if field in shapes:
                shape_and_kind(field, value, *shapes[field])

    def map(self, function: Callable[[Any], Any]) -> "RouterInputs":
        """The inputs with each array converted, to that of another framework or device, say."""
        return self._with({name: function(getattr(self, name)) for name in self._given(ARRAYS)})

    def tokens(self, rows: Any) -> "RouterInputs":
        """The inputs of some of the tokens; where these begin in the batch is for the caller to say."""
        return self._with({name: getattr(self, name)[rows] for name in self._given(BY_TOKEN)})

    def shards(self, spec: RouterSpec, tokens_per_shard: Sequence[int]) -> list["RouterInputs"]:
        """The inputs of consecutive shards with so many tokens, each with the number of its first token."""
        ends = np.cumsum(tokens_per_shard).tolist()
        found = [self.tokens(slice(end - size, end)) for end, size in zip(ends, tokens_per_shard, strict=True)]
        if spec.selector != "round_robin":
            return found
        begins = [(self.first_token or 0) + end - size for end, size in zip(ends, tokens_per_shard, strict=True)]
        return [replace(each, first_token=begin) for each, begin in zip(found, begins, strict=True)]

    def read_by(self, spec: RouterSpec) -> "RouterInputs":
        """What the selector reads of them, without the rest."""
        return self._with({field.name: None for field in fields(self) if field.name not in READS[spec.selector]})

    @classmethod
    def from_named(cls, named: Mapping[str, Any]) -> tuple["RouterInputs", dict[str, Any]]:
        """The inputs among NumPy arrays by name, and what else there is, such as a mask.

        Lists by shard (`BY_SHARD`) become one array of all shards.
        """
        own = {field.name for field in fields(cls)}
        found, rest = {}, {}
        for name, value in named.items():
            if name in BY_SHARD:
                found[BY_SHARD[name]] = None if value is None else np.concatenate(value)
            else:
                (found if name in own else rest)[name] = value
        return cls(**found), rest

    @classmethod
    def keywords(cls, named: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of `route` or `moe_layer` from arrays by name: `inputs`, and the rest as it is."""
        inputs, rest = cls.from_named(named)
        return rest | {"inputs": inputs}

    def _given(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if getattr(self, name) is not None]

    def _with(self, values: dict[str, Any]) -> "RouterInputs":
        # A call with nothing to change makes no copy: most selectors read nothing.
        return replace(self, **values) if values else self


NO_INPUTS = RouterInputs()
"""For the selectors that read the logits alone."""
