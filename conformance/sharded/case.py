"""conformance, the case of a layout: a layer, its tokens, and how they and the experts lie over devices.

It is a case of the layer as well: the tokens are those of all shards, one shard after the other, and the reference of
its outputs and gradients is the one-rank layer. It has the interface of the other cases: id, tags, JSON, replay.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from typing import Self

import numpy as np

from conformance.layer.case import LAYER_TAGS, ROW_INPUTS, LayerCase
from moe_ref.dispatch import plan
from moe_ref.specs.layout import STRATEGY_FACTS, ShardLayout


@dataclass(frozen=True, kw_only=True)
class LayoutCase(LayerCase):
    """A layer on a layout. x_TD, d_output_TD and the inputs are those of all shards, one after the other."""

    layout: ShardLayout
    tokens_per_shard: tuple[int, ...]
    """Tokens of each token shard of the layout."""

    def __post_init__(self):
        if len(self.tokens_per_shard) != self.layout.num_token_shards:
            raise ValueError(
                f"tokens_per_shard has {len(self.tokens_per_shard)} entries; the layout has "
                f"{self.layout.num_token_shards} token shards"
            )

    @cached_property
    def tags(self) -> frozenset[str]:
        """What is special about this case, of its layer and router too."""
        layer = LayerCase(**{f.name: getattr(self, f.name) for f in fields(LayerCase)})
        return layer.tags | {tag for tag, holds in LAYOUT_TAGS.items() if holds(self)}

    @property
    def ends(self) -> np.ndarray:
        """Where each shard but the last ends."""
        return np.cumsum(self.tokens_per_shard)[:-1]

    def by_shard(self, values) -> list[np.ndarray]:
        """The part of each shard of what has an entry for each token; copies, which the subject may overwrite."""
        return [part.copy() for part in np.split(values, self.ends)]

    @property
    def inputs_by_shard(self) -> dict:
        """The further inputs as a sharded layer gets them: token_mask_T is token_mask_by_shard, a list of parts."""
        rows = {name: f"{name.rpartition('_')[0]}_by_shard" for name in ROW_INPUTS}
        return {rows.get(name, name): self.by_shard(v) if name in rows else v for name, v in self.inputs.items()}

    @cached_property
    def ids_by_shard(self) -> list[np.ndarray]:
        """The reference's choice of experts, shard by shard."""
        return self.by_shard(self.reference.routing.expert_ids_TK)

    @cached_property
    def plans(self) -> list:
        """The oracle's plan for each rank of each group of expert ranks."""
        return plan(self.ids_by_shard, self.layout, self.spec)

    def tokens(self, rows) -> Self:
        """The case of some of its tokens, which stay in their order and on their shards."""
        rows = np.sort(rows)
        shard_of_T = np.repeat(np.arange(len(self.tokens_per_shard)), self.tokens_per_shard)
        left = np.bincount(shard_of_T[rows], minlength=len(self.tokens_per_shard))
        inputs = {name: value[rows] if name in ROW_INPUTS else value for name, value in self.inputs.items()}
        return self.with_(
            x_TD=self.x_TD[rows],
            d_output_TD=self.d_output_TD[rows],
            inputs=inputs,
            tokens_per_shard=tuple(left.tolist()),
        )

    @property
    def laid_out(self) -> dict:
        """The layout as plain data, with the tokens of its shards."""
        return {"tokens_per_shard": self.tokens_per_shard, **self.layout.to_dict()}

    @cached_property
    def layout_digest(self) -> str:
        """Eight hex digits that name the layout and the tokens of its shards."""
        return hashlib.sha256(json.dumps(self.laid_out, sort_keys=True).encode()).hexdigest()[:8]

    def to_json(self) -> dict:
        """Plain data, with the layout."""
        return super().to_json() | {"layout": self.laid_out}

    @classmethod
    def from_json(cls, data: dict) -> "LayoutCase":
        """Reads what `to_json` wrote; an unknown or missing key is a ValueError."""
        fields_of_layout = dict(data["layout"])
        if "tokens_per_shard" not in fields_of_layout:
            raise ValueError("the layout of a case needs tokens_per_shard")
        tokens_per_shard = tuple(int(tokens) for tokens in fields_of_layout.pop("tokens_per_shard"))
        layout = ShardLayout.from_dict(fields_of_layout)
        layer = LayerCase.from_json({name: value for name, value in data.items() if name != "layout"})
        given = {f.name: getattr(layer, f.name) for f in fields(LayerCase)}
        made = cls(layout=layout, tokens_per_shard=tokens_per_shard, **given)
        layout.check(made.spec)
        tokens = sum(tokens_per_shard)
        if tokens != made.num_tokens:
            raise ValueError(f"layout.tokens_per_shard sums to {tokens}, but x_TD has {made.num_tokens} tokens")
        return made


LAYOUT_TAGS = {
    "one_rank": lambda c: c.layout.num_ranks == 1,
    "data_parallel": lambda c: c.layout.data > 1,
    "fsdp": lambda c: c.layout.fsdp > 1,
    "expert_parallel": lambda c: c.layout.expert > 1,
    "tensor_parallel": lambda c: c.layout.tensor > 1,
    **{name: partial(lambda name, c: c.layout.strategy == name, name) for name in STRATEGY_FACTS},
    "several_nodes": lambda c: c.layout.num_nodes > 1,
    "placed": lambda c: c.layout.placement is not None,
    "token_chunks": lambda c: c.layout.num_token_chunks > 1,
    "emb_chunks": lambda c: c.layout.num_emb_chunks > 1,
    "buffer_factor": lambda c: c.layout.buffer_factor is not None,
    "uneven_tokens": lambda c: len(set(c.tokens_per_shard)) > 1,
    "empty_shard": lambda c: 0 in c.tokens_per_shard,
}
"""name -> whether a case of a layout has it, besides what its layer has."""

assert not LAYOUT_TAGS.keys() & LAYER_TAGS.keys()


def simpler_layouts(case: LayoutCase) -> Iterator[LayoutCase]:
    """The case on simpler layouts: fewer ranks with the tokens of some, or without an option."""
    layout, shards = case.layout, np.arange(case.layout.num_token_shards)
    d_of_shard, f_of_shard = np.divmod(shards // layout.shards_per_group, layout.fsdp)
    for axis, index_of_shard in (("data", d_of_shard), ("fsdp", f_of_shard)):
        for index in range(getattr(layout, axis) if getattr(layout, axis) > 1 else 0):
            yield from _only(case, shards[index_of_shard == index], **{axis: 1})
    if layout.expert % 2 == 0:
        tokens = np.array(case.tokens_per_shard)
        halved = tokens if layout.shards_per_group == 1 else tokens.reshape(-1, 2).sum(axis=1)
        yield from _relaid(case, tuple(halved.tolist()), expert=layout.expert // 2)
    plain = {f.name: f.default for f in fields(layout) if f.default is not MISSING and f.name not in AXES}
    for name, value in ({"tensor": 1} | plain).items():
        if getattr(layout, name) != value:
            yield from _relaid(case, case.tokens_per_shard, **{name: value})


AXES = ("data", "fsdp", "expert", "tensor")


def _only(case: LayoutCase, shards, **changes) -> Iterator[LayoutCase]:
    """The tokens of these shards alone, on a layout that has no others."""
    tokens = np.array(case.tokens_per_shard)
    rows = np.flatnonzero(np.isin(np.repeat(np.arange(len(tokens)), tokens), shards))
    yield from _relaid(case.tokens(rows), tuple(tokens[shards].tolist()), **changes)


def _relaid(case: LayoutCase, tokens_per_shard: tuple[int, ...], **changes) -> Iterator[LayoutCase]:
    """The case with other fields of its layout, where that is a layout of the layer and of its shards."""
    try:
        layout = case.layout.replace(**changes)
        layout.check(case.spec)
        relaid = case.with_(layout=layout, tokens_per_shard=tokens_per_shard)
    except ValueError:
        return
    yield relaid
