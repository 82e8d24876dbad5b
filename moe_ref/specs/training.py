"""moe_ref, the specs of training: a stack of layers whose biases are balanced, and the events of a script, as data.

Legend: L layers, T tokens, D model dim, K top_k.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from moe_ref.specs.balance import BalanceSpec, BiasUpdateSpec
from moe_ref.specs.base import Spec
from moe_ref.specs.checks import array, integer, one_of, require
from moe_ref.specs.layer import LayerSpec
from moe_ref.specs.quantile import QuantileSpec
from moe_ref.specs.record import RoutingRecord

EVENTS = ("build", "train", "evaluate", "step")
FORWARD = ("train", "evaluate")
"""Events that run the layers."""


@dataclass(frozen=True, kw_only=True)
class StackSpec(Spec):
    """The Mixture-of-Experts layers of one model, and what balances them.

    Raises:
        ValueError: a field is out of its range, or two fields contradict each other.
    """

    layers: tuple[LayerSpec, ...]
    """In the order of the model; none is a model without such layers. They may differ in all but the dim."""
    updates: tuple[BiasUpdateSpec | QuantileSpec | None, ...]
    """The rule by which the bias of each layer moves; None: it stays."""
    balance: BalanceSpec | None = None
    """The balance loss of a forward pass, over all layers; None: there is none."""
    num_ranks: int = 1
    """Pipeline ranks, each with the layers that `rank_of_layer` gives it; a rank may have none."""
    rank_of_layer: tuple[int, ...] | None = None
    """The rank of each layer; None: rank 0 has all of them."""

    def __post_init__(self):
        super().__post_init__()
        L = len(self.layers)
        for field in ("updates", "rank_of_layer"):
            value = getattr(self, field)
            require(value is None or len(value) == L, f"{field} is {value!r}; there are {L} layers")
        for index, (layer, update) in enumerate(zip(self.layers, self.updates, strict=True)):
            require(isinstance(layer, LayerSpec), f"layers[{index}] is {layer!r}; it is a LayerSpec")
            require(
                update is None or isinstance(update, (BiasUpdateSpec, QuantileSpec)),
                f"updates[{index}] is {update!r}; it is a BiasUpdateSpec, a QuantileSpec or None",
            )
            if isinstance(update, QuantileSpec):
                update.check(layer.router)
            require(
                update is None or layer.router.takes_bias,
                f"updates[{index}] is given, but selector {layer.router.selector!r} has no expert_bias",
            )
        dims = sorted({layer.experts.dim for layer in self.layers})
        require(len(dims) <= 1, f"layers have the dims {dims}; they have one")
        integer("num_ranks", self.num_ranks, 1)
        for rank in self.rank_of_layer or ():
            integer("rank_of_layer", rank, 0, self.num_ranks - 1)
        require(
            self.balance is None or isinstance(self.balance, BalanceSpec),
            f"balance is {self.balance!r}; it is a BalanceSpec or None",
        )
        if self.balance is not None and self.balance.over_layers == "pooled":
            sizes = sorted({(layer.router.num_choices, layer.router.top_k) for layer in self.layers})
            require(len(sizes) <= 1, f"layers have the sizes {sizes}; a pooled loss is of layers of one size")

    @property
    def dim(self) -> int:
        """D; 1 without layers."""
        return self.layers[0].experts.dim if self.layers else 1

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """The layers that live on a rank, in order."""
        ranks = self.rank_of_layer or (0,) * len(self.layers)
        return tuple(layer for layer, own in enumerate(ranks) if own == rank)

    def to_dict(self) -> dict:
        """Nested dicts, JSON-ready; `from_dict` reads it back."""
        found = super().to_dict() | {
            "layers": [layer.to_dict() for layer in self.layers],
            "updates": [None if update is None else _rule_to_dict(update) for update in self.updates],
        }
        lists = {"rank_of_layer": list(self.rank_of_layer)} if self.rank_of_layer is not None else {}
        return found | lists | ({} if self.balance is None else {"balance": self.balance.to_dict()})

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """Reads what `to_dict` wrote; an unknown name at any level is a ValueError."""
        found: dict[str, Any] = dict(values)
        found["layers"] = tuple(LayerSpec.from_dict(layer) for layer in values.get("layers", ()))
        updates = values.get("updates", ())
        found["updates"] = tuple(None if each is None else _rule_of_dict(each) for each in updates)
        if values.get("balance") is not None:
            found["balance"] = BalanceSpec.from_dict(values["balance"])
        if values.get("rank_of_layer") is not None:
            found["rank_of_layer"] = tuple(values["rank_of_layer"])
        return super().from_dict(found)


def _rule_to_dict(update: BiasUpdateSpec | QuantileSpec) -> dict:
    return update.to_dict() | ({"rule": "quantile"} if isinstance(update, QuantileSpec) else {})


def _rule_of_dict(values: dict) -> BiasUpdateSpec | QuantileSpec:
    if values.get("rule") != "quantile":
        return BiasUpdateSpec.from_dict(values)
    return QuantileSpec.from_dict({name: value for name, value in values.items() if name != "rule"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """One thing that happens to a stack.

    Raises:
        ValueError: a field is out of its range, or does not go with the kind.
    """

    kind: str
    """build: the layers are made anew, with the parameters of the script; train: a micro-batch runs forward and
    backward; evaluate: one runs forward, and its gradient is not asked for; step: the optimizer steps."""
    x_LTD: np.ndarray | None = None
    """The tokens that each layer sees; none of them depends on what another layer returns."""
    token_mask_T: np.ndarray | None = None
    """Bools; False is padding, in every layer. None: all are valid."""
    records: tuple[RoutingRecord, ...] | None = None
    """The choice that is forced on each layer; None: each router chooses."""
    recomputed: bool = False
    """Whether the backward pass of every layer runs its forward pass again (activation checkpointing)."""

    def __post_init__(self):
        one_of("kind", self.kind, EVENTS)
        runs = self.kind in FORWARD
        require(runs == (self.x_LTD is not None), f"x_LTD goes with {FORWARD}, and kind is {self.kind!r}")
        require(runs or self.token_mask_T is None, f"token_mask_T is given, but kind is {self.kind!r}")
        require(runs or self.records is None, f"records is given, but kind is {self.kind!r}")
        require(
            self.kind == "train" or not self.recomputed, f"recomputed is {self.recomputed!r}, but kind is {self.kind!r}"
        )
        if self.x_LTD is None:
            return
        L, T, _ = array("x_LTD", self.x_LTD, (None, None, None)).shape
        if self.token_mask_T is not None:
            array("token_mask_T", self.token_mask_T, (T,), kind="bool")
        if self.records is not None:
            sizes = [len(record.expert_ids_TK) for record in self.records]
            require(sizes == [T] * L, f"records have {sizes} tokens; each of the {L} layers has {T}")
