"""conformance, router: its case. Logits, and what goes with them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np

from conformance.core.case import Case, plain, rounder
from conformance.core.judge import cast
from conformance.core.rounding import EPSILON
from conformance.core.subject import Subject
from moe_ref import RouterInputs, RouterSpec, route
from moe_ref.specs.inputs import BY_TOKEN

INT_INPUTS = ("token_ids_T", "table_VK", "given_ids_TK")


@dataclass(frozen=True, kw_only=True)
class RouterCase(Case):
    """A spec and the arrays that go with it. Everything is float64 or int64; dtype says what the subject is given.

    `inputs`: further ones of moe_ref.route: learned_scale, token_ids_T, table_VK, given_ids_TK, token_mask_T, seed.
    """

    KEYS = frozenset({"spec", "logits_TE"})

    spec: RouterSpec
    logits_TE: np.ndarray
    expert_bias_E: np.ndarray | None = None

    @cached_property
    def reference(self):
        """The oracle's trace of this case."""
        return route(self.logits_TE, self.spec, expert_bias_E=self.expert_bias_E, **RouterInputs.keywords(self.inputs))

    @property
    def num_tokens(self) -> int:
        return len(self.logits_TE)

    @property
    def is_routable(self) -> bool:
        """Whether the reference routes it: no NaN, and no row of -inf alone."""
        return not np.isnan(self.logits_TE).any() and not np.isneginf(self.logits_TE).all(axis=-1).any()

    def with_logits(self, logits_TE: np.ndarray) -> Self:
        """A copy with other logits, as its dtype holds them."""
        return self.with_(logits_TE=held(logits_TE, self.dtype))

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, in the order given."""
        rowwise = ("token_mask_T", *BY_TOKEN)
        inputs = {name: value[rows] if name in rowwise else value for name, value in self.inputs.items()}
        return self.with_(logits_TE=self.logits_TE[rows], inputs=inputs)

    def simpler(self) -> Iterator[Self]:
        """In float32; without a bias, or parts of it; rounder numbers."""
        if self.dtype != "float32":
            yield self.with_(dtype="float32")
        bias_E = self.expert_bias_E
        if bias_E is not None:
            yield self.with_(expert_bias_E=None)
            for e in np.flatnonzero(bias_E):
                yield self.with_(expert_bias_E=np.where(np.arange(len(bias_E)) == e, 0, bias_E))
            yield from (self.with_(expert_bias_E=each) for each in rounder(bias_E))
        yield from (self.with_logits(each) for each in rounder(self.logits_TE))

    def why_not(self, subject: Subject, method: str) -> str | None:
        """By its spec."""
        return subject.supports(self.spec)

    def to_json(self) -> dict:
        """Plain data."""
        found = {
            "spec": plain(self.spec.to_dict()),
            "logits_TE": plain(self.logits_TE),
            "expert_bias_E": plain(self.expert_bias_E),
            "inputs": plain(self.inputs),
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return {k: v for k, v in found.items() if v is not None and v != {}}

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote."""
        unknown = data.keys() - {f.name for f in fields(cls)}
        if unknown or not data.keys() >= cls.KEYS:
            raise ValueError(f"a case has the keys {sorted(f.name for f in fields(cls))}, not {sorted(data)}")
        spec = RouterSpec.from_dict(data["spec"])
        bias = data.get("expert_bias_E")
        return cls(
            spec=spec,
            logits_TE=np.array(data["logits_TE"], dtype=np.float64).reshape(-1, spec.num_logits),
            expert_bias_E=None if bias is None else np.array(bias, dtype=np.float64),
            inputs={name: input_of_json(name, value, spec) for name, value in data.get("inputs", {}).items()},
            dtype=data.get("dtype", "float32"),
            seed=data.get("seed", 0),
        )


def held(values: np.ndarray, dtype: str) -> np.ndarray:
    """What float32 and this dtype both hold, in float64: every subject reads the numbers that the reference reads."""
    return cast(cast(np.asarray(values), dtype), "float32").astype(np.float64)


def input_of_json(name: str, value: Any, spec: RouterSpec) -> Any:
    """A further input of a router, read from plain data."""
    if name == "seed":
        return int(value)
    if name == "token_mask_T":
        return np.array(value, dtype=bool)
    found = np.array(value, dtype=np.int64 if name in INT_INPUTS else np.float64)
    # Of zero tokens the list does not say how many slots each would have.
    return found.reshape(0, spec.top_k) if name.endswith("_TK") and not found.size else found


def _choice_below_zero(case: RouterCase) -> bool:
    if case.spec.selector != "top_k" or case.num_tokens == 0 or not case.is_routable:
        return False
    ungrouped = case.spec.without_groups()
    choice_TE = case.with_(spec=ungrouped).reference.scores_for_choice_TE
    assert choice_TE is not None
    return bool((np.isfinite(choice_TE) & (choice_TE < 0)).any())


def _has_ties(logits_TE) -> bool:
    in_order_TE = np.sort(logits_TE, axis=-1)
    return bool(((in_order_TE[:, 1:] == in_order_TE[:, :-1]) & np.isfinite(in_order_TE[:, 1:])).any())


def _small_gaps(case: RouterCase) -> bool:
    """Whether some token's logits lie apart, but closer than bfloat16 tells numbers of their size apart."""
    in_order_TE = np.sort(np.where(np.isfinite(case.logits_TE), case.logits_TE, np.nan), axis=-1)
    gaps_TE, sizes_TE = np.diff(in_order_TE, axis=-1), np.abs(in_order_TE[:, 1:])
    return bool(((gaps_TE > 0) & (gaps_TE < EPSILON["bfloat16"] / 2 * sizes_TE)).any())


def _some_row(rows_T: np.ndarray) -> bool:
    return bool(rows_T.any())


def _finite(case: RouterCase) -> np.ndarray:
    return case.logits_TE[np.isfinite(case.logits_TE)]


RouterCase.TAGS = {
    "grouped": lambda c: c.spec.num_expert_groups is not None,
    "biased": lambda c: c.expert_bias_E is not None and bool(np.any(c.expert_bias_E)),
    "negative_choice": _choice_below_zero,
    "softmax": lambda c: c.spec.score_func == "softmax",
    "sigmoid": lambda c: c.spec.score_func == "sigmoid",
    "sqrtsoftplus": lambda c: c.spec.score_func == "sqrtsoftplus",
    "score_over_selected": lambda c: c.spec.score_over == "selected",
    "select_by_logit": lambda c: c.spec.select_by == "logit",
    "fills_zero": lambda c: c.spec.mask_fill == 0,
    "masked_scores": lambda c: c.spec.weights_from == "masked_scores",
    "route_norm": lambda c: c.spec.route_norm,
    "no_norm_eps": lambda c: c.spec.route_norm and c.spec.norm_eps == 0,
    "scaled": lambda c: c.spec.route_scale != 1,
    "one_expert_per_token": lambda c: c.spec.top_k == 1,
    "all_experts": lambda c: c.spec.top_k == c.spec.num_choices,
    "null_experts": lambda c: c.spec.num_null_experts > 0,
    "scored_shared": lambda c: c.spec.num_scored_shared_experts > 0,
    "table": lambda c: c.spec.selector == "table",
    "given": lambda c: c.spec.selector == "given",
    "random": lambda c: c.spec.selector == "random",
    "sparsemixer": lambda c: c.spec.selector == "sparsemixer",
    "varying": lambda c: c.spec.varies,
    "relu": lambda c: c.spec.score_func == "relu",
    "zero_tokens": lambda c: c.num_tokens == 0,
    "one_token": lambda c: c.num_tokens == 1,
    "padding": lambda c: "token_mask_T" in c.inputs,
    "masked_logits": lambda c: bool(np.isneginf(c.logits_TE).any()),
    "nan_logits": lambda c: bool(np.isnan(c.logits_TE).any()),
    "large_logits": lambda c: bool((np.abs(_finite(c)) > 80).any()),
    "small_scores": lambda c: bool((_finite(c) < -15).any()),
    "equal_logits": lambda c: _has_ties(c.logits_TE),
    "close_logits": _small_gaps,
    "nan_row": lambda c: _some_row(np.isnan(c.logits_TE).all(axis=-1)),
    "infinite_row": lambda c: _some_row(np.isneginf(c.logits_TE).all(axis=-1)),
    "saturated_row": lambda c: _some_row((c.logits_TE > 17).all(axis=-1)),
    "negative_row": lambda c: _some_row((c.logits_TE < 0).all(axis=-1)),
    "bfloat16": lambda c: c.dtype == "bfloat16",
    "float16": lambda c: c.dtype == "float16",
    "float64": lambda c: c.dtype == "float64",
    "many_tokens": lambda c: c.num_tokens > 16,
    "many_experts": lambda c: c.spec.num_experts > 16,
}
