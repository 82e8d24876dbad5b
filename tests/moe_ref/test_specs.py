"""moe_ref, tests of all specs: any object in any field is taken, or refused by a ValueError that names the field."""

import json
from dataclasses import MISSING, fields

import numpy as np
import pytest

from moe_ref import (
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    ExpertSpec,
    LayerSpec,
    RouterSpec,
    ShardLayout,
    SharedSpec,
)

ROUTER, EXPERTS = RouterSpec(num_experts=8, top_k=2), ExpertSpec(dim=4, hidden_dim=8)
VALID = {
    RouterSpec: {"num_experts": 8, "top_k": 2, "num_expert_groups": 4, "num_limited_groups": 2},
    ExpertSpec: {"dim": 4, "hidden_dim": 8, "clamp": 1.0},
    SharedSpec: {"hidden_dim": 8},
    LayerSpec: {"router": ROUTER, "experts": EXPERTS},
    BalanceSpec: {},
    BiasUpdateSpec: {},
    CapacitySpec: {"factor": 1.0},
    ShardLayout: {"expert": 2},
}
STRANGE = {
    "none": None,
    "text": "x",
    "empty text": "",
    "bytes": b"x",
    "true": True,
    "minus one": -1,
    "zero": 0,
    "half": 0.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "beyond float64": 10**400,
    "beyond int64": 10**30,
    "complex": 1j,
    "list": [1, 2],
    "empty list": [],
    "nested list": [[1], [2, 3]],
    "tuple of text": ("a", "b"),
    "dict": {"a": 1},
    "set": {1, 2},
    "0-d array": np.array(3),
    "array": np.arange(3),
    "two axes": np.zeros((2, 2)),
    "array of bools": np.array([True, False]),
    "array of objects": np.array([None, "x"], dtype=object),
    "numpy int": np.int64(3),
    "numpy float": np.float32(0.5),
    "numpy bool": np.True_,
    "object": object(),
    "class": int,
    "function": len,
    "range": range(3),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("spec", VALID, ids=lambda spec: spec.__name__)
def test_any_object_in_any_field_is_taken_or_refused_by_name(spec, name):
    for field in fields(spec):
        refused = refusal(spec, field.name, STRANGE[name])
        if refused is not None:
            assert field.name in refused
            continue
        made = spec(**VALID[spec] | {field.name: STRANGE[name]})
        json.dumps(made.to_dict())  # what is taken is plain data
        assert spec.from_dict(made.to_dict()) == made
        assert hash(made) == hash(made.replace())


def refusal(spec: type, field: str, value) -> str | None:
    """What the ValueError says by which a spec refuses a value; None where it takes it."""
    try:
        spec(**VALID[spec] | {field: value})
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("spec", VALID, ids=lambda spec: spec.__name__)
def test_a_field_that_is_missing_is_named(spec):
    for field in fields(spec):
        if field.default is MISSING and field.default_factory is MISSING:
            rest = {name: value for name, value in VALID[spec].items() if name != field.name}
            plain = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in rest.items()}
            with pytest.raises(ValueError, match=field.name):
                spec.from_dict(plain)
