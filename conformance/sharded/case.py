"""conformance, sharded: its case. A layer, its tokens, and how they and the experts lie over devices.

It is a case of the layer as well: the tokens are those of all shards, one shard after the other, and the reference of
its outputs and gradients is the one-rank layer.

Legend: T tokens, D model dim, K top_k.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from typing import Any, Self

import numpy as np

from conformance.core.case import Case
from conformance.core.subject import Subject
from conformance.layer.case import ROW_INPUTS, LayerCase
from moe_ref import LayerSpec
from moe_ref.dispatch import plan
from moe_ref.specs.layout import AXES, STRATEGY_FACTS, ShardLayout
from moe_ref.strategies.base import RankPlan

METHODS = ("dispatch", "sharded_layer", "sharded_gradients")
"""Methods of a subject that get a layout."""


@dataclass(frozen=True, kw_only=True)
class ShardedCase(LayerCase):
    """A layer on a layout. x_TD, d_output_TD and the inputs are those of all shards, one after the other."""

    KEYS = LayerCase.KEYS | {"layout"}

    layout: ShardLayout
    tokens_per_shard: tuple[int, ...]
    """Tokens of each token shard of the layout."""

    def __post_init__(self):
        if len(self.tokens_per_shard) != self.layout.num_token_shards:
            raise ValueError(
                f"tokens_per_shard has {len(self.tokens_per_shard)} entries; the layout has "
                f"{self.layout.num_token_shards} token shards"
            )

    # its parts

    @cached_property
    def layer_case(self) -> LayerCase:
        """The same tokens on one rank."""
        return LayerCase(**{f.name: getattr(self, f.name) for f in fields(LayerCase)})

    def part(self, kind: type[Case]) -> Case | None:
        """Its one-rank layer, and the router of that, besides."""
        return self.layer_case if kind is LayerCase else super().part(kind)

    @property
    def place(self) -> str:
        """Eight hex digits that name the layout and the tokens of its shards."""
        return hashlib.sha256(json.dumps(self.laid_out, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def laid_out(self) -> dict[str, Any]:
        """The layout as plain data, with the tokens of its shards."""
        return {"tokens_per_shard": self.tokens_per_shard, **self.layout.to_dict()}

    # shard by shard

    def by_shard(self, values: np.ndarray) -> list[np.ndarray]:
        """The part of each shard of what has an entry for each token; copies, which the subject may overwrite."""
        return [part.copy() for part in np.split(values, np.cumsum(self.tokens_per_shard)[:-1])]

    @property
    def inputs_by_shard(self) -> dict[str, Any]:
        """The further inputs as a sharded layer gets them: token_mask_T is token_mask_by_shard, a list of parts."""
        found: dict[str, Any] = {}
        for name, value in self.inputs.items():
            if name in ROW_INPUTS:
                found[f"{name.rpartition('_')[0]}_by_shard"] = self.by_shard(value)
            else:
                found[name] = value
        return found

    @cached_property
    def ids_by_shard(self) -> list[np.ndarray]:
        """The reference's choice of experts, shard by shard."""
        return self.by_shard(self.reference.routing.expert_ids_TK)

    @cached_property
    def plans(self) -> list[RankPlan]:
        """The oracle's plan for each rank of each group of expert ranks."""
        return plan(self.ids_by_shard, self.layout, self.spec)

    @cached_property
    def shard_of_T(self) -> np.ndarray:
        """(T,) the shard of each token."""
        return np.repeat(np.arange(len(self.tokens_per_shard)), self.tokens_per_shard)

    # other cases

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, which stay in their order and on their shards."""
        rows = np.sort(rows)
        left_S = np.bincount(self.shard_of_T[rows], minlength=len(self.tokens_per_shard))
        return super().tokens(rows).with_(tokens_per_shard=tuple(left_S.tolist()))

    def relaid(self, **changes: Any) -> Self:
        """The same tokens on a layout with other fields, and as many shards."""
        return self.with_(layout=self.layout.replace(**changes))

    def simpler(self) -> Iterator[Self]:
        """On fewer ranks, with the tokens of some; without an option of the layout; then as a layer."""
        layout, shards = self.layout, np.arange(self.layout.num_token_shards)
        d_of_shard, f_of_shard = np.divmod(shards // layout.shards_per_group, layout.fsdp)
        for axis, index_of_shard in (("data", d_of_shard), ("fsdp", f_of_shard)):
            for index in range(getattr(layout, axis) if getattr(layout, axis) > 1 else 0):
                yield from self._only(shards[index_of_shard == index], **{axis: 1})
        if layout.expert % 2 == 0:
            tokens_S = np.array(self.tokens_per_shard)
            halved_S = tokens_S if layout.shards_per_group == 1 else tokens_S.reshape(-1, 2).sum(axis=1)
            yield from self._where_it_fits(tuple(halved_S.tolist()), expert=layout.expert // 2)
        plain = {f.name: f.default for f in fields(layout) if f.default is not MISSING and f.name not in AXES}
        for name, value in ({"tensor": 1} | plain).items():
            if getattr(layout, name) != value:
                yield from self._where_it_fits(self.tokens_per_shard, **{name: value})
        yield from super().simpler()

    def _only(self, shards: np.ndarray, **changes: Any) -> Iterator[Self]:
        """The tokens of these shards alone, on a layout that has no others."""
        rows = np.flatnonzero(np.isin(self.shard_of_T, shards))
        tokens_per_shard = tuple(np.array(self.tokens_per_shard)[shards].tolist())
        yield from self.tokens(rows)._where_it_fits(tokens_per_shard, **changes)

    def _where_it_fits(self, tokens_per_shard: tuple[int, ...], **changes: Any) -> Iterator[Self]:
        """The case with other fields of its layout, where that is a layout of the layer and of its shards."""
        try:
            layout = self.layout.replace(**changes)
            layout.check(self.spec)
            relaid = self.with_(layout=layout, tokens_per_shard=tokens_per_shard)
        except ValueError:
            return
        yield relaid

    def why_not(self, subject: Subject, method: str) -> str | None:
        """By its spec, and its layout where the method gets one."""
        if method not in METHODS:
            return super().why_not(subject, method)
        return why_not(subject, self.spec, self.layout, self.tokens_per_shard)

    def to_json(self) -> dict:
        """Plain data, with the layout."""
        return super().to_json() | {"layout": self.laid_out}

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads what `to_json` wrote."""
        fields_of_layout = dict(data["layout"])
        if "tokens_per_shard" not in fields_of_layout:
            raise ValueError("the layout of a case needs tokens_per_shard")
        tokens_per_shard = tuple(int(tokens) for tokens in fields_of_layout.pop("tokens_per_shard"))
        layout = ShardLayout.from_dict(fields_of_layout)
        layer = LayerCase.from_json({name: value for name, value in data.items() if name != "layout"})
        layout.check(layer.spec)
        if sum(tokens_per_shard) != layer.num_tokens:
            raise ValueError(
                f"layout.tokens_per_shard sums to {sum(tokens_per_shard)}, but x_TD has {layer.num_tokens} tokens"
            )
        given = {f.name: getattr(layer, f.name) for f in fields(LayerCase)}
        return cls(layout=layout, tokens_per_shard=tokens_per_shard, **given)


def why_not(subject: Subject, spec: LayerSpec, layout: ShardLayout, tokens_per_shard: tuple[int, ...]) -> str | None:
    """None, or a sentence that says why a subject cannot run a layer on this layout with these tokens."""
    if subject.equal_shards and len(set(tokens_per_shard)) > 1:
        return "its token shards have equal numbers of tokens"
    return subject.supports_layer(spec, layout)


def _has_strategy(name: str, case: ShardedCase) -> bool:
    return case.layout.strategy == name


ShardedCase.TAGS = {
    **LayerCase.TAGS,
    "one_rank": lambda c: c.layout.num_ranks == 1,
    "data_parallel": lambda c: c.layout.data > 1,
    "fsdp": lambda c: c.layout.fsdp > 1,
    "expert_parallel": lambda c: c.layout.expert > 1,
    "tensor_parallel": lambda c: c.layout.tensor > 1,
    **{name: partial(_has_strategy, name) for name in STRATEGY_FACTS},
    "several_nodes": lambda c: c.layout.num_nodes > 1,
    "placed": lambda c: c.layout.placement is not None,
    "token_chunks": lambda c: c.layout.num_token_chunks > 1,
    "emb_chunks": lambda c: c.layout.num_emb_chunks > 1,
    "buffer_factor": lambda c: c.layout.buffer_factor is not None,
    "uneven_tokens": lambda c: len(set(c.tokens_per_shard)) > 1,
    "empty_shard": lambda c: 0 in c.tokens_per_shard,
}
"""Those of its layer and router, and its own."""
