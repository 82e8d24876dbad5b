"""conformance, balance: its case. A routed batch, and what is counted, charged, bounded or moved in it.

Legend: T tokens, E experts, K top_k, S ranks or micro-batches of one step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np

from conformance.core.case import Case, plain, rounder
from conformance.core.subject import LoadRule, Subject
from moe_ref import (
    UNUSED,
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    QuantileSpec,
    RouterSpec,
    SparsitySpec,
    apply_capacity,
    balance,
    balance_loss_backward,
    capacity_backward,
)
from moe_ref.backward.routing import scale_logits_backward
from moe_ref.balance import BalanceTrace
from moe_ref.capacity import CapacityTrace
from moe_ref.routing import scale_logits

RULES = {
    "load": None, "z_loss": None, "balance_loss": "balance", "bias_update": "update", "quantile_update": "quantile",
    "next_coefficient": "sparsity", "capacity": "capacity",
}  # fmt: skip
"""Methods of a subject, and the field of a BatchSpec with the rule that each gets."""
LENGTHS = ("sequence_lengths", "tokens_per_shard")
"""Inputs that cut a batch into consecutive parts."""
ARRAYS: dict[str, Any] = {
    "logits_TE": np.float64,
    "expert_ids_TK": np.int64,
    "weights_TK": np.float64,
    "d_weights_TK": np.float64,
    "counts_SE": np.int64,
    "expert_bias_E": np.float64,
}


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """The sizes of a batch, and the rule that is judged on it, if any."""

    num_experts: int
    top_k: int
    num_null_experts: int = 0
    balance: BalanceSpec | None = None
    update: BiasUpdateSpec | None = None
    capacity: CapacitySpec | None = None
    quantile: QuantileSpec | None = None
    sparsity: SparsitySpec | None = None
    router: RouterSpec | None = None
    """What the router does besides scoring; None: nothing."""
    coeff: float = 1.0
    """Of the z-loss."""

    @property
    def rule(self) -> LoadRule | None:
        """The spec that a subject says it supports."""
        return self.balance or self.update or self.capacity or self.quantile or self.sparsity

    @property
    def num_choices(self) -> int:
        return self.num_experts + self.num_null_experts

    def is_for(self, method: str) -> bool:
        """Whether the batch has the rule that a method of a subject gets; or none, where the method gets none."""
        rule = RULES[method]
        return self.rule is None if rule is None else getattr(self, rule) is not None

    def to_dict(self) -> dict:
        """Plain data; `from_dict` reads it back."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return {name: value if isinstance(value, (int, float)) else value.to_dict() for name, value in found.items()}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """Reads what `to_dict` wrote."""
        rules = {
            "balance": BalanceSpec, "update": BiasUpdateSpec, "capacity": CapacitySpec, "quantile": QuantileSpec,
            "sparsity": SparsitySpec, "router": RouterSpec,
        }  # fmt: skip
        return cls(**{name: rules[name].from_dict(v) if name in rules else v for name, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class BalanceCase(Case):
    """A routed batch, in float64; the subject is given float32, which holds the numbers.

    `inputs`: token_mask_T, sequence_lengths, tokens_per_shard.
    """

    KEYS = frozenset({"load_spec", *ARRAYS})

    spec: BatchSpec
    logits_TE: np.ndarray
    expert_ids_TK: np.ndarray
    """In slot order; chosen with a bias, so that they are not the best scores."""
    weights_TK: np.ndarray
    d_weights_TK: np.ndarray
    """What a loss sends back to the weights that a capacity returns."""
    counts_SE: np.ndarray
    """Counts of one step by rank or micro-batch."""
    expert_bias_E: np.ndarray

    @cached_property
    def scaled_logits_TE(self) -> np.ndarray:
        """What the loss scores: the logits as the router scales and caps them."""
        return scale_logits(self.logits_TE, self.router)

    @cached_property
    def balance_trace(self) -> BalanceTrace:
        """The oracle's trace of the balance loss."""
        return balance(self.scaled_logits_TE, self.expert_ids_TK, self.rule("balance"), **self.inputs)

    @cached_property
    def balance_gradient_TE(self) -> np.ndarray:
        """The oracle's gradient of the balance loss by the logits."""
        scaled_TE = self.scaled_logits_TE
        d_scaled_TE = balance_loss_backward(scaled_TE, self.expert_ids_TK, self.rule("balance"), **self.inputs)
        return scale_logits_backward(d_scaled_TE, scaled_TE, self.router)

    @cached_property
    def capacity_trace(self) -> CapacityTrace:
        """The oracle's trace of the capacity."""
        return apply_capacity(
            self.expert_ids_TK, self.weights_TK, self.rule("capacity"), self.spec.num_experts, **self.inputs
        )

    @cached_property
    def capacity_gradient_TK(self) -> np.ndarray:
        """The oracle's gradient by the weights before the capacity."""
        return capacity_backward(self.capacity_trace, self.rule("capacity"), self.d_weights_TK)

    def rule(self, name: str) -> Any:
        """The rule of that name, which the case has."""
        found = getattr(self.spec, name)
        assert found is not None, f"a case without {name}"
        return found

    @property
    def router(self) -> RouterSpec:
        """The router of the spec, or one of these sizes that scores as the loss does."""
        if self.spec.router is not None:
            return self.spec.router
        score_func = self.spec.balance.score_func if self.spec.balance else "softmax"
        return RouterSpec(
            num_experts=self.spec.num_experts,
            top_k=self.spec.top_k,
            num_null_experts=self.spec.num_null_experts,
            score_func=score_func,
            selector="threshold" if score_func == "relu" else "top_k",  # relu ranks nothing
        )

    @property
    def num_tokens(self) -> int:
        return len(self.logits_TE)

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, which stay in their order, sequence and shard."""
        rows = np.sort(rows)
        inputs = dict(self.inputs)
        for name in LENGTHS:
            if name in inputs:
                part_of_T = np.repeat(np.arange(len(inputs[name])), inputs[name])
                inputs[name] = tuple(np.bincount(part_of_T[rows], minlength=len(inputs[name])).tolist())
        if "token_mask_T" in inputs:
            inputs["token_mask_T"] = inputs["token_mask_T"][rows]
        by_token = ("logits_TE", "expert_ids_TK", "weights_TK", "d_weights_TK")
        return self.with_(inputs=inputs, **{name: getattr(self, name)[rows] for name in by_token})

    def simpler(self) -> Iterator[Self]:
        """Without a mask or lengths; counts of fewer ranks; rounder numbers."""
        for name in self.inputs:
            yield self.with_inputs(**{name: None})
        if len(self.counts_SE) > 1:
            yield from (self.with_(counts_SE=np.delete(self.counts_SE, s, axis=0)) for s in range(len(self.counts_SE)))
        yield from (self.with_(expert_bias_E=each) for each in rounder(self.expert_bias_E))
        # Not so far that experts are equal, of which either may be counted.
        several = _different(self.logits_TE)
        yield from (self.with_(logits_TE=each) for each in rounder(self.logits_TE) if _different(each) == several)

    def why_not(self, subject: Subject, method: str) -> str | None:
        """By the rule, where the method gets one."""
        rule = self.spec.rule
        return None if RULES[method] is None or rule is None else subject.supports_load(rule)

    def to_json(self) -> dict:
        """Plain data."""
        arrays = {name: _packed(getattr(self, name)) for name in ARRAYS}
        inputs = {name: plain(v) if isinstance(v, np.ndarray) else list(v) for name, v in self.inputs.items()}
        return {"load_spec": self.spec.to_dict(), **arrays, "inputs": inputs, "seed": self.seed}

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote."""
        known = cls.KEYS | {"inputs", "seed"}
        if data.keys() - known or not data.keys() >= cls.KEYS:
            raise ValueError(f"a case of balance has the keys {sorted(known)}, not {sorted(data)}")
        spec = BatchSpec.from_dict(data["load_spec"])
        width = {"E": spec.num_experts, "K": spec.top_k}
        arrays = {}
        for name, dtype in ARRAYS.items():
            shape = (-1,) if name == "expert_bias_E" else (-1, width[name[-1]])
            arrays[name] = np.asarray(_unpacked(data[name], dtype)).reshape(shape)
        inputs = {
            name: np.array(value, dtype=bool) if name == "token_mask_T" else tuple(value)
            for name, value in data.get("inputs", {}).items()
        }
        return cls(spec=spec, inputs=inputs, seed=data.get("seed", 0), **arrays)


def _different(logits_TE: np.ndarray) -> int:
    """How many different logits the tokens have between them, each token counted by itself."""
    return sum(len(np.unique(row)) for row in logits_TE) if len(logits_TE) < MANY_ROWS else 0


MANY_ROWS = 4096


def _packed(array: np.ndarray) -> Any:
    """Plain data; an array of many rows that are all the same as one of them and their number."""
    if len(array) > MANY_ROWS and (array == array[:1]).all():
        return {"rows": len(array), "row": plain(array[0])}
    return plain(array)


def _unpacked(data: Any, dtype: Any) -> np.ndarray:
    """What `_packed` made plain."""
    if isinstance(data, dict):
        row = np.array(data["row"], dtype=dtype)
        return np.broadcast_to(row, (data["rows"], *row.shape))
    return np.array(data, dtype=dtype)


def _has(name: str, /, **wanted) -> Callable[[BalanceCase], bool]:
    """Whether a case has the rule of that name, with these values."""
    return lambda c: (
        (found := getattr(c.spec, name)) is not None
        and all(getattr(found, field) == value for field, value in wanted.items())
    )


BalanceCase.TAGS = {
    "balance": _has("balance"),
    "softmax_scores": _has("balance", score_func="softmax"),
    "sigmoid_scores": _has("balance", score_func="sigmoid"),
    "sqrtsoftplus_scores": _has("balance", score_func="sqrtsoftplus"),
    "normed_scores": _has("balance", norm_scores=True),
    "unbiased_counts": _has("balance", counts="unbiased"),
    "counts_over_tokens": _has("balance", counts_over="tokens"),
    "per_sequence": _has("balance", per="sequence"),
    "local_scope": _has("balance", scope="local"),
    "running_scope": _has("balance", scope="running"),
    "running_mean_scope": _has("balance", scope="running_mean"),
    "separate_layers": _has("balance", over_layers="separate"),
    "first_slots": lambda c: c.spec.balance is not None and c.spec.balance.counted_slots is not None,
    "bias_update": _has("update"),
    "sign_rule": _has("update", rule="sign"),
    "tanh_rule": _has("update", rule="tanh"),
    "momentum": lambda c: c.spec.update is not None and c.spec.update.momentum > 0,
    "quantile": _has("quantile"),
    "sparsity": _has("sparsity"),
    "relu_scores": _has("balance", score_func="relu"),
    "quantile_of_bins": lambda c: c.spec.quantile is not None and c.spec.quantile.bins is not None,
    "quantile_of_batches": _has("quantile", over="batches"),
    "centred": _has("update", centred=True),
    "frozen": lambda c: c.spec.update is not None and any(c.spec.update.frozen_E or ()),
    "large_counts": lambda c: bool((c.counts_SE >= 2**24).any()),
    "many_tokens": lambda c: c.num_tokens > 256,
    "many_experts": lambda c: c.spec.num_experts > 32,
    "scaled_logits": lambda c: c.router.scales_logits,
    "grouped_router": lambda c: (c.router.num_expert_groups or 1) > 1,
    "barred_experts": lambda c: bool(np.isneginf(c.logits_TE).any()),
    "unused_tokens": lambda c: bool((c.expert_ids_TK == UNUSED).all(axis=-1).any()),
    "equal_counts": lambda c: len(set(c.counts_SE.sum(axis=0).tolist())) == 1,
    "several_counts": lambda c: len(c.counts_SE) > 1,
    "capacity": _has("capacity"),
    "per_sequence_capacity": _has("capacity", scope="sequence"),
    "per_rank_capacity": _has("capacity", scope="rank"),
    "slot_major": _has("capacity", drop_order="slot_major"),
    "by_weight": _has("capacity", drop_order="by_weight"),
    "by_best_weight": _has("capacity", drop_order="by_best_weight"),
    "renormalised": lambda c: c.spec.capacity is not None and c.spec.capacity.renormalise != "no",
    "two_limits": lambda c: c.spec.capacity is not None and c.spec.capacity.then is not None,
    "padded_to_capacity": _has("capacity", pad_to_capacity=True),
    "one_slot": lambda c: c.spec.top_k == 1,
    "null_choices": lambda c: c.spec.num_null_experts > 0,
    "unused_slots": lambda c: bool((c.expert_ids_TK == UNUSED).any()),
    "masked_tokens": lambda c: "token_mask_T" in c.inputs,
    "all_masked": lambda c: not c.valid_T.any(),
    "sequences": lambda c: len(c.inputs.get("sequence_lengths", (0,))) > 1,
    "shards": lambda c: len(c.inputs.get("tokens_per_shard", (0,))) > 1,
    "no_tokens": lambda c: c.num_tokens == 0,
    "big_logits": lambda c: bool((np.abs(c.logits_TE[np.isfinite(c.logits_TE)]) > 80).any()),
}
