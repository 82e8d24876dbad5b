"""conformance, the protocol: what a third party writes to have an implementation judged.

A subject is one class. The methods it defines are its capabilities; `route` is enough to start. NumPy goes in and
comes out; a framework lives inside the subject alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ref import LayerParams, LayerSpec, RouterSpec


class Unsupported(Exception):
    """Raised by a subject with a sentence that says why it cannot run a case. Never counts as a pass."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router returns. The two optional arrays let the judge find the stage of a fault sooner."""

    expert_ids_TK: np.ndarray
    """(T, K) integers; the order of the slots is free."""
    weights_TK: np.ndarray
    """(T, K) the weight of each slot."""
    scores_TE: np.ndarray | None = None
    """(T, E) scores without bias."""
    group_ids_TL: np.ndarray | None = None
    """(T, L) kept groups, in any order."""
    shared_weights_TS: np.ndarray | None = None
    """(T, S) weights of router-scored shared experts; needed where a spec has them."""


class Subject:
    """An implementation to be judged. Subclass it, define `route`, and point the suite at the class."""

    name: str = ""
    """Shown in reports; empty: the class name in lower case."""
    version: str = ""
    url: str = ""
    logit_dtypes: tuple[str, ...] = ("float32",)
    """dtypes in which `route` takes logits: float32, float64, bfloat16 (as ml_dtypes arrays)."""
    compute_dtype: str = "float32"
    """dtype in which it computes; the bounds of the comparison follow from it."""

    expert_dtype: str = "float32"
    """dtype of the experts' arithmetic, where it is narrower than compute_dtype (torchtitan: bfloat16)."""
    compiles: bool = False
    """Whether each new spec and number of tokens costs a compilation; then fewer sizes are tried."""

    equal_shards: bool = False
    """Whether the token shards of a layout have as many tokens each; then no others are tried."""

    def supports(self, spec: RouterSpec, layout=None) -> str | None:
        """None, or a sentence that says why this spec cannot be run."""
        return None

    def route(self, *arguments: Any, **inputs: Any) -> Routing:
        """Write it as route(self, logits_TE, spec, expert_bias_E): (T, num_logits) logits, a RouterSpec, (E,) or None.

        `inputs` are those of `moe_ref.route` that the spec needs.
        A parameter that this method does not name (learned_scale, token_ids_T and table_VK, given_ids_TK,
        token_mask_T, seed) makes the cases that need it unsupported.
        """
        raise NotImplementedError

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """Optional: the (T, E) logits of (T, D) tokens."""
        raise NotImplementedError

    def configure(self, fields: dict) -> None:
        """Optional: build the router for raw RouterSpec fields and run it once; an invalid set is an error."""
        raise NotImplementedError

    # whole layers; parameters are moe_ref.LayerParams, in the canonical [in, out] layout

    def supports_layer(self, spec: LayerSpec, layout=None) -> str | None:
        """None, or a sentence that says why this layer cannot be run; by default as for its router."""
        return self.supports(spec.router, layout)

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Optional: (N,) flat slots t * K + k in the order of their experts, and (E,) rows of each expert."""
        raise NotImplementedError

    def experts(self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec):
        """Optional: (R, D) outputs for rows sorted by expert; rows past the sum of the counts belong to nobody."""
        raise NotImplementedError

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec):
        """Optional: (T, D) weighted sums of the expert outputs, given in the order that `permute` returns."""
        raise NotImplementedError

    def layer(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Any) -> np.ndarray:
        """Optional: (T, D) output of the whole layer. `inputs` are those of `moe_ref.moe_layer` that the case has.

        May get token_mask_T; capacity, a CapacitySpec, with sequence_lengths or tokens_per_shard where its scope needs
        them; and what the selector reads: token_ids_T and table_VK, given_ids_TK and given_weights_TK. A parameter that
        this method does not name makes the cases that have it unsupported, as for `route`; so does a capacity that
        `supports_load` refuses. The arrays are the judge's: a method that writes to them changes its caller's.
        """
        raise NotImplementedError

    def layer_gradients(self, x_TD, params: LayerParams, spec: LayerSpec, d_output_TD, **inputs: Any) -> dict:
        """Optional: gradients of sum(output * d_output): 'x_TD', and each parameter that the layer has, by name.

        `inputs` are those of `layer`.
        """
        raise NotImplementedError

    # layouts (moe_ref.ShardLayout). What is "by shard" is a list of one array for each token shard, in rank order.

    def dispatch(self, expert_ids_by_shard: list[np.ndarray], layout, spec: LayerSpec) -> list[dict]:
        """Optional: the plan of every rank, tensor ranks counted once, as moe_ref.dispatch.plan: integers by name.

        send_sizes_S and recv_sizes_S: rows to and from each rank of the expert axis; group_sizes_e: rows of each local
        expert, in the order of their places; order_R2: (source rank of the expert axis, flat slot t * K + k of that
        rank's shard) of each row, in the order of the local experts. Where the layout has a buffer_factor, also
        overflow: how many rows this rank had no room for.
        """
        raise NotImplementedError

    def sharded_layer(self, x_by_shard, params: LayerParams, spec: LayerSpec, layout, **inputs: Any) -> list:
        """Optional: the (T, D) output of the shard of each rank of the mesh, tensor ranks included, in rank order.

        `inputs` are those of `moe_ref.sharded_layer` that the case has: token_mask_by_shard, token_ids_by_shard and
        table_VK, given_ids_by_shard. A method that names `buffer_fill` gets NaN and large numbers there, and has buffer
        rows that nobody sent start with it.
        """
        raise NotImplementedError

    def sharded_gradients(
        self, x_by_shard, params: LayerParams, spec: LayerSpec, layout, d_output_by_shard, **inputs: Any
    ) -> list[dict]:
        """Optional: for each rank of the mesh what `layer_gradients` returns, x_TD of its own shard.

        The loss is sum(output * d_output) over all shards, each counted once; parameters have their full shape.
        """
        raise NotImplementedError

    # load, capacity and replay. The specs and the record are data types of moe_ref. `inputs` hold what a case has of
    # token_mask_T (T,) bools, sequence_lengths and tokens_per_shard (each a tuple that sums to T; absent: one of T).
    # A parameter that a method does not name makes the cases that have it unsupported, as for `route`.

    def supports_load(self, spec) -> str | None:
        """None, or a sentence that says why this BalanceSpec, BiasUpdateSpec or CapacitySpec cannot be run."""
        return None

    def load(self, expert_ids_TK: np.ndarray, num_experts: int, **inputs: Any) -> np.ndarray:
        """Optional: (E,) integers, the used slots of each expert; -1 and null ids are none. May get token_mask_T."""
        raise NotImplementedError

    def balance_loss(self, logits_TE: np.ndarray, expert_ids_TK: np.ndarray, balance, router: RouterSpec, **inputs):
        """Optional: {'loss': a number, 'd_logits_TE': (T, E) its gradient} for a BalanceSpec, coeff included.

        `router` says how the logits are scored. May get expert_bias_E, token_mask_T, sequence_lengths and
        tokens_per_shard; then it is the loss of all ranks together, and the logits are those of all ranks in order.
        """
        raise NotImplementedError

    def z_loss(self, logits_TE: np.ndarray, coeff: float, **inputs: Any) -> dict:
        """Optional: {'loss', 'd_logits_TE'} of coeff * mean over tokens of logsumexp(logits) ** 2. token_mask_T."""
        raise NotImplementedError

    def bias_update(self, counts_SE: np.ndarray, update, expert_bias_E: np.ndarray) -> np.ndarray:
        """Optional: the (E,) new bias by a BiasUpdateSpec; counts of S ranks or micro-batches of one step, unsummed."""
        raise NotImplementedError

    def capacity(self, expert_ids_TK: np.ndarray, weights_TK: np.ndarray, capacity, num_experts: int, **inputs) -> dict:
        """Optional: {'expert_ids_TK': -1 in dropped slots, 'weights_TK': 0 there} under a CapacitySpec.

        May get token_mask_T, sequence_lengths, tokens_per_shard; and d_weights_TK, the gradient of the weights that it
        returns: then the dict has 'd_weights_TK' too, the gradient of the weights that it was given.
        """
        raise NotImplementedError

    def record(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, **inputs: Any):
        """Optional: the moe_ref.RoutingRecord of a layer's run on these tokens. May get token_mask_T."""
        raise NotImplementedError

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record) -> np.ndarray:
        """Optional: (T, D) output of a layer that takes its expert ids, and weights if there are any, from a record."""
        raise NotImplementedError


METHODS = (
    "route", "gate", "configure", "permute", "experts", "combine", "layer", "layer_gradients",
    "dispatch", "sharded_layer", "sharded_gradients",
    "load", "balance_loss", "z_loss", "bias_update", "capacity", "record", "replay",
)  # fmt: skip


def capabilities(subject: Subject) -> set[str]:
    """Names of the optional methods that the subject defines."""
    return {name for name in METHODS if getattr(type(subject), name) is not getattr(Subject, name)}
