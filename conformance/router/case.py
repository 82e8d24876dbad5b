"""conformance, the case: one input of a router, with an id, tags, and a JSON form that replays."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import numpy as np

from moe_ref import RouterInputs, RouterSpec, route
from moe_ref.specs.inputs import BY_TOKEN

INT_INPUTS = ("token_ids_T", "table_VK", "given_ids_TK")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A spec and the arrays that go with it. Everything is float64 or int64; dtype says what the subject is given."""

    spec: RouterSpec
    logits_TE: np.ndarray
    expert_bias_E: np.ndarray | None = None
    inputs: dict = field(default_factory=dict)
    """By name what moe_ref.route reads: learned_scale, token_ids_T, table_VK, given_ids_TK, token_mask_T, seed."""
    dtype: str = "float32"
    seed: int = 0
    """Of the draws that a metamorphic requirement makes: permutations, constants."""

    @cached_property
    def reference(self):
        """The oracle's trace of this case."""
        return route(self.logits_TE, self.spec, expert_bias_E=self.expert_bias_E, **RouterInputs.keywords(self.inputs))

    @cached_property
    def tags(self) -> frozenset[str]:
        """What is special about this case; deviations are declared by tags."""
        return frozenset(tag for tag, holds in TAGS.items() if holds(self))

    @property
    def num_tokens(self) -> int:
        return len(self.logits_TE)

    def rng(self) -> np.random.Generator:
        """The source of a metamorphic requirement's draws."""
        return np.random.default_rng(self.seed)

    def with_(self, **changes) -> "Case":
        """A copy with other values."""
        return replace(self, **changes)

    def tokens(self, rows) -> "Case":
        """The case of some of its tokens, in the order given."""
        inputs = dict(self.inputs)
        for name in ("token_mask_T", *BY_TOKEN):
            if name in inputs:
                inputs[name] = inputs[name][rows]
        return self.with_(logits_TE=self.logits_TE[rows], inputs=inputs)

    def to_json(self) -> dict:
        """Plain data; -inf and NaN are strings, so that any JSON reader takes it."""
        found = {
            "spec": {k: _plain(v) for k, v in self.spec.to_dict().items()},
            "logits_TE": _plain(self.logits_TE),
            "expert_bias_E": _plain(self.expert_bias_E),
            "inputs": {name: _plain(value) for name, value in self.inputs.items()},
            "dtype": self.dtype,
            "seed": self.seed,
        }
        return {k: v for k, v in found.items() if v is not None and v != {}}

    @classmethod
    def from_json(cls, data: dict) -> "Case":
        """Reads what `to_json` wrote; an unknown or missing key is a ValueError."""
        unknown = data.keys() - {f.name for f in fields(cls)}
        if unknown or not {"spec", "logits_TE"} <= data.keys():
            raise ValueError(f"a case has the keys {sorted(f.name for f in fields(cls))}, not {sorted(data)}")
        spec = RouterSpec.from_dict(data["spec"])
        inputs = {name: _array(name, value) for name, value in data.get("inputs", {}).items()}
        bias = data.get("expert_bias_E")
        return cls(
            spec=spec,
            logits_TE=np.array(data["logits_TE"], dtype=np.float64).reshape(-1, spec.num_logits),
            expert_bias_E=None if bias is None else np.array(bias, dtype=np.float64),
            inputs=inputs,
            dtype=data.get("dtype", "float32"),
            seed=data.get("seed", 0),
        )

    @cached_property
    def digest(self) -> str:
        """Six hex digits that name the case."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:6]


def valid_tokens(case: Case) -> np.ndarray:
    """(T,) which tokens are not padding."""
    return case.inputs.get("token_mask_T", np.ones(case.num_tokens, dtype=bool))


def _plain(value):
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value] if value.ndim else _plain(value.item())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _array(name: str, value):
    if name == "seed":
        return int(value)
    if name == "token_mask_T":
        return np.array(value, dtype=bool)
    return np.array(value, dtype=np.int64 if name in INT_INPUTS else np.float64)


def _choice_below_zero(case: Case) -> bool:
    if case.spec.selector != "top_k" or case.num_tokens == 0 or np.isnan(case.logits_TE).any():
        return False
    ungrouped = case.spec.without_groups()
    choice_TE = case.with_(spec=ungrouped).reference.scores_for_choice_TE
    assert choice_TE is not None
    return bool((np.isfinite(choice_TE) & (choice_TE < 0)).any())


def _has_ties(logits_TE) -> bool:
    in_order_TE = np.sort(logits_TE, axis=-1)
    return bool(((in_order_TE[:, 1:] == in_order_TE[:, :-1]) & np.isfinite(in_order_TE[:, 1:])).any())


def _finite(case: Case) -> np.ndarray:
    return case.logits_TE[np.isfinite(case.logits_TE)]


TAGS = {
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
    "sparsemixer": lambda c: c.spec.selector == "sparsemixer",
    "zero_tokens": lambda c: c.num_tokens == 0,
    "one_token": lambda c: c.num_tokens == 1,
    "padding": lambda c: "token_mask_T" in c.inputs,
    "masked_logits": lambda c: bool(np.isneginf(c.logits_TE).any()),
    "nan_logits": lambda c: bool(np.isnan(c.logits_TE).any()),
    "large_logits": lambda c: bool((np.abs(_finite(c)) > 80).any()),
    "small_scores": lambda c: bool((_finite(c) < -15).any()),
    "equal_logits": lambda c: _has_ties(c.logits_TE),
    "bfloat16": lambda c: c.dtype == "bfloat16",
}
"""name -> whether a case has it. Each is decided from the case alone, so that a replay decides alike."""
