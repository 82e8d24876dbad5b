"""conformance, the protocol: what a third party writes to have an implementation judged.

A subject is one class. The methods it defines are its capabilities; `route` is enough to start. NumPy goes in and
comes out; a framework lives inside the subject alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np

from moe_ref import (
    AlignSpec,
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    Event,
    LayerParams,
    LayerSpec,
    QuantileSpec,
    ReplicaSpec,
    RouterSpec,
    RoutingRecord,
    ShardLayout,
    SparsitySpec,
    StackSpec,
)

LoadRule = BalanceSpec | BiasUpdateSpec | CapacitySpec | QuantileSpec | SparsitySpec
"""What a rule of the load is: how it is evened, limited or held sparse."""


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
    """An implementation to be judged. Subclass it, define `route`, and point the suite at the class.

    A method gets the arguments that stand here by position, and by keyword those further inputs that its docstring
    lists and that a case has. Your method names those that it takes, with a default of None: that is how it says what
    it can do. An input that it does not name makes the cases that have it unsupported, with or without `**inputs`; a
    method that overrides that of another subject and has `**inputs` takes what the other one names too.
    """

    name: str = ""
    """Shown in reports; empty: the class name in lower case."""
    version: str = ""
    """Shown beside it."""
    logit_dtypes: tuple[str, ...] = ("float32",)
    """dtypes in which `route` takes logits: float32, float64, float16, bfloat16 (as ml_dtypes arrays)."""
    compute_dtype: str = "float32"
    """dtype in which it computes; the bounds of the comparison follow from it. 'tf32': float32, but for the operands of
    matrix products. A `Precision` of conformance.core.rounding: the same with a coarser stage of the router."""
    expert_dtype: str = "float32"
    """dtype of the experts' arithmetic, where it is narrower than compute_dtype (torchtitan: bfloat16)."""
    compiles: bool = False
    """Whether each new spec and number of tokens costs a compilation; then fewer sizes are tried."""
    equal_shards: bool = False
    """Whether the token shards of a layout have as many tokens each; then no others are tried."""

    device: str = ""
    """What --device says; empty: nothing."""

    def to_device(self, device: str) -> None:
        """Optional: compute on this device from now on, which `--device` names: 'cuda', 'cuda:1' or what you like.

        Called once, before any other method. Arrays are NumPy's as ever: move them there and back. Where the device
        changes the arithmetic or the costs, set compute_dtype, expert_dtype ('tf32' where float32 products are rounded
        to TF32) and compiles on self: the bounds, and the sizes that are tried, follow them.

        Raises:
            ValueError: a sentence that says why not, such as that there is no such device.
        """
        raise ValueError(f"{type(self).__name__} has no to_device()")

    def __init_subclass__(cls, **how: Any):
        """A ValueError in `supports` or its like is the sentence that says no.

        It comes from a spec that the method makes of some fields of another one, to compare with it.
        """
        super().__init_subclass__(**how)
        for name in ("supports", "supports_layer", "supports_load", "supports_training"):
            if name in vars(cls):
                setattr(cls, name, _refusing(vars(cls)[name]))

    # routers

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        """None, or a sentence that says why this spec cannot be run."""
        return None

    def route(self, *arguments: Any, **inputs: Any) -> Routing:
        """Write it as route(self, logits_TE, spec, expert_bias_E): (T, num_logits) logits, a RouterSpec, (E,) or None.

        Inputs:
            learned_scale: a number, or (E,) one for each expert, for specs that have one.
            token_ids_T, table_VK: (T,) rows of the (V, K) table of expert ids, for selector 'table'.
            given_ids_TK: (T, K) expert ids, -1 in unused slots, for selector 'given'.
            seed: an integer, for selector 'random'.
            logit_factors_TE, logit_noise_TE: (T, num_logits) the noise of training: factors, then a noise to add.
            token_mask_T: (T,) bools; a padding token (False) gets ids -1 and weights 0.

        Returns:
            The ids, (T, K) integers, and the weights, (T, K) numbers, of each token; the rest of `Routing` is optional.
        """
        raise NotImplementedError

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """Optional: the (T, E) logits of (T, D) tokens, which are x_TD @ gate_ED.T, plus the learned bias if any."""
        raise NotImplementedError

    def configure(self, fields: dict[str, Any]) -> None:
        """Optional: build the router for raw RouterSpec fields and run it once; an invalid set is an error."""
        raise NotImplementedError

    # whole layers; parameters are moe_ref.LayerParams, in the canonical [in, out] layout

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        """None, or a sentence that says why this layer cannot be run; by default as for its router."""
        return self.supports(spec.router, layout)

    def permute(self, expert_ids_TK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
        """Optional: the used slots in the order of their experts.

        Returns:
            (N,) integers, the flat slots t * K + k, in any order inside an expert, best in that of the tokens; and (E,)
            integers, how many each expert has. -1 and null ids (num_experts and above) are no rows: N is their sum.
        """
        raise NotImplementedError

    def align(self, expert_ids_TK: np.ndarray, num_experts: int, align: AlignSpec) -> tuple[np.ndarray, np.ndarray]:
        """Optional: the same where each expert has its rows rounded up to a multiple, as `align` says.

        Returns:
            (A,) integers, the slot of each row, as `permute` returns them, and a sentinel in every row that pads: any
            number that is no slot, such as -1 or T * K; and (E,) integers, the multiples. A may exceed their sum.
        """
        raise NotImplementedError

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """Optional: the (R, D) outputs of the routed experts for rows that are sorted by expert.

        Rows past the sum of the counts belong to nobody: they may hold anything, and so may their outputs.
        """
        raise NotImplementedError

    def combine(self, rows_ND: np.ndarray, order_N: np.ndarray, weights_TK: np.ndarray, spec: LayerSpec) -> np.ndarray:
        """Optional: the (T, D) weighted sums of the expert outputs, which stand in the order that `permute` returns.

        The sums are times output_scale; with weight_on 'input' the weights are in the rows already.
        """
        raise NotImplementedError

    def layer(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, *_: Any, **inputs: Any) -> np.ndarray:
        """Optional: the (T, D) output of the whole layer.

        Inputs:
            token_mask_T: (T,) bools; the output of a padding token (False) is 0.
            capacity: a CapacitySpec, whose dropped slots add nothing. One that `supports_load` refuses is unsupported.
            align: an AlignSpec: the experts see padded rows, and the output is the same.
            sequence_lengths, tokens_per_shard: the consecutive parts of the tokens that a scope of the capacity needs.
            token_ids_T, table_VK, given_ids_TK, given_weights_TK, seed: as `route` gets them.
            batch_invariant: True, where the bits of a token's output are to be the same in any batch; of `layer` alone.
                To name it is to declare that they then are.

        The arrays are the judge's: a method that writes to one changes what its caller computes with.
        """
        raise NotImplementedError

    def fused_layer(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, *_: Any, **inputs: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Optional: the layer with its shared experts inside the slots of the routed ones, ids num_experts and on.

        Inputs are those of `layer`, but for a capacity.

        Returns:
            (T, D) output, and (E,) integers, the slots of each routed expert.
        """
        raise NotImplementedError

    def upcycled_layer(self, x_TD: np.ndarray, dense: Mapping[str, np.ndarray], spec: LayerSpec) -> np.ndarray:
        """Optional: the layer whose experts are copies or parts of a dense feed-forward, before any training.

        Args:
            dense: the weights by their names in `FeedForward`, of G times the width of an expert, with G a divisor of
                num_experts and top_k. The rows of the gate are the subject's own; no expert_bias is given.

        Returns:
            (T, D) output.
        """
        raise NotImplementedError

    def layer_gradients(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, d_output_TD: np.ndarray, *_: Any, **inputs: Any
    ) -> dict[str, np.ndarray]:
        """Optional: the gradients of sum(output * d_output); the inputs are those of `layer`.

        Returns:
            'x_TD', and each parameter that the layer has under its name in LayerParams, in the shape of that parameter.
            That of expert_bias_E is optional, and 0.
        """
        raise NotImplementedError

    # redundant experts (moe_ref.ReplicaSpec): P places, each with a copy of one of the E experts

    def place_slots(self, expert_ids_TK: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """Optional: the (T, K) place of each slot; unused slots stay -1, null ids are numbered on past the places."""
        raise NotImplementedError

    def home(self, values_P: np.ndarray, replicas: ReplicaSpec) -> np.ndarray:
        """Optional: of (P, ...) counts or gradients of places the (E, ...) ones of experts."""
        raise NotImplementedError

    # layouts (moe_ref.ShardLayout). What is "by shard" is a list of one array for each token shard, in rank order.

    def dispatch(
        self, expert_ids_by_shard: list[np.ndarray], layout: ShardLayout, spec: LayerSpec
    ) -> list[dict[str, Any]]:
        """Optional: the plan of every rank, tensor ranks counted once, as moe_ref.dispatch.plan.

        Returns:
            For each rank integers by name:
            send_sizes_S, recv_sizes_S: rows to and from each rank of the expert axis.
            group_sizes_e: rows of each local expert, in the order of their places.
            order_R2: (source rank of the expert axis, flat slot t * K + k of that rank's shard) of each row, in the
                order of the local experts.
            overflow: where the layout has a buffer_factor, how many rows this rank had no room for.
        """
        raise NotImplementedError

    def sharded_layer(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        *_: Any,
        **inputs: Any,
    ) -> list[np.ndarray]:
        """Optional: the (T, D) output of the shard of each rank of the mesh, tensor ranks included, in rank order.

        Inputs:
            token_mask_by_shard, token_ids_by_shard, given_ids_by_shard: lists of what `layer` gets as one array.
            table_VK, seed: as `layer` gets them.
            buffer_fill: NaN or a large number, which every buffer row that nobody sent starts with.
        """
        raise NotImplementedError

    def sharded_gradients(
        self,
        x_by_shard: list[np.ndarray],
        params: LayerParams,
        spec: LayerSpec,
        layout: ShardLayout,
        d_output_by_shard: list[np.ndarray],
        *_: Any,
        **inputs: Any,
    ) -> list[dict[str, np.ndarray]]:
        """Optional: for each rank of the mesh what `layer_gradients` returns, x_TD of its own shard.

        The loss is sum(output * d_output) over all shards, each counted once; parameters have their full shape. The
        inputs are those of `sharded_layer`.
        """
        raise NotImplementedError

    # load, capacity and replay; the specs and the record are data types of moe_ref

    def supports_load(self, spec: LoadRule) -> str | None:
        """None, or a sentence that says why this rule cannot be run."""
        return None

    def load(self, expert_ids_TK: np.ndarray, num_experts: int, *_: Any, **inputs: Any) -> np.ndarray:
        """Optional: (E,) integers, the used slots of each expert; -1 and null ids (num_experts and above) are none.

        Inputs:
            token_mask_T: (T,) bools; the slots of a padding token (False) are not counted.
        """
        raise NotImplementedError

    def balance_loss(
        self,
        logits_TE: np.ndarray,
        expert_ids_TK: np.ndarray,
        balance: BalanceSpec,
        router: RouterSpec,
        *_: Any,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Optional: the balance loss of a batch, its coefficient included; `router` says how the logits are scored.

        Inputs:
            expert_bias_E: (E,) the balancing bias of the router.
            token_mask_T: (T,) bools, False where a token is padding.
            sequence_lengths: of the consecutive sequences, a tuple that sums to T; absent: one of T.
            tokens_per_shard: of the consecutive shards, likewise. Then the loss is that of all ranks together, and the
                logits are those of all ranks in order.
            num_layers: the rows are those of so many layers, one after the other, each with the same tokens; the loss
                is that of all of them together.

        Returns:
            'loss': a number. 'd_logits_TE': its gradient, in the shape of the logits.
        """
        raise NotImplementedError

    def z_loss(self, logits_TE: np.ndarray, coeff: float, *_: Any, **inputs: Any) -> dict[str, Any]:
        """Optional: coeff * mean over tokens of logsumexp(logits) ** 2.

        Inputs:
            token_mask_T: (T,) bools, False where a token is padding.
            tokens_per_shard: of the consecutive shards, a tuple that sums to T; the mean is over the tokens of all.

        Returns:
            'loss': a number. 'd_logits_TE': its gradient, in the shape of the logits.
        """
        raise NotImplementedError

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """Optional: the (E,) new bias; counts_SE are of S ranks or micro-batches of one step, unsummed.

        A rule with momentum had no step before.
        """
        raise NotImplementedError

    def quantile_update(
        self,
        logits_TE: np.ndarray,
        router: RouterSpec,
        update: QuantileSpec,
        expert_bias_E: np.ndarray,
        *_: Any,
        **inputs: Any,
    ) -> np.ndarray:
        """Optional: the (E,) new bias under quantile balancing, after a step on these tokens with that bias.

        Inputs:
            token_mask_T: (T,) bools, False where a token is padding.
            tokens_per_shard: of the consecutive ranks and micro-batches, a tuple that sums to T; absent: one.
        """
        raise NotImplementedError

    def next_coefficient(self, coeff: float, counts_LE: np.ndarray, num_tokens: int, sparsity: SparsitySpec) -> float:
        """Optional: the coefficient of an L1 loss after a step whose num_tokens tokens had these slots in L layers."""
        raise NotImplementedError

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *_: Any,
        **inputs: Any,
    ) -> dict[str, np.ndarray]:
        """Optional: which slots an expert keeps, and their weights.

        Inputs:
            token_mask_T, sequence_lengths, tokens_per_shard: as `balance_loss` gets them.
            d_weights_TK: (T, K) the gradient of the weights that it returns.

        Returns:
            expert_ids_TK: (T, K) the given ids, -1 in dropped slots.
            weights_TK: (T, K) after the drop, 0 in dropped slots.
            d_weights_TK: (T, K) the gradient of the given weights, where it got that of its own.
            slot_table_UEC: optional, for a spec with pad_to_capacity: (U, E, C) the flat slot t * K + k at each place
                of each expert in each unit (the batch, a rank or a sequence, by the scope of the last limit), -1 where
                the place is empty.
        """
        raise NotImplementedError

    def record(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, *_: Any, **inputs: Any) -> RoutingRecord:
        """Optional: the record of what a layer's run on these tokens chose, with weights; inputs as for `layer`."""
        raise NotImplementedError

    def replay(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, record: RoutingRecord) -> np.ndarray:
        """Optional: the (T, D) output of a layer that takes its expert ids, and weights if any, from a record.

        Without weights in the record they are those of the layer's own logits for these ids.
        """
        raise NotImplementedError

    # training: several layers over several steps, as data (moe_ref.StackSpec, moe_ref.Event). Weights stay as they are.

    def supports_training(self, stack: StackSpec) -> str | None:
        """None, or a sentence that says why this stack cannot be trained; by default as for its layers and rules."""
        layers = [self.supports_layer(layer) for layer in stack.layers]
        rules = [self.supports_load(rule) for rule in (*stack.updates, stack.balance) if rule is not None]
        return next((sentence for sentence in layers + rules if sentence), None)

    def train(self, events: Sequence[Event], stack: StackSpec, params: list[LayerParams]) -> list[dict[str, Any]]:
        """Optional: what can be seen of a stack of L layers after each event of a script, in the order of time.

        The first event builds the layers, with `params`, the parameters of each, where a bias of None is 0. A later one
        builds them again; trains on a micro-batch, forward and backward, whose layer l sees event.x_LTD[l]; evaluates
        one; or is a step of the optimizer. What else an event says is in `moe_ref.Event`; one that cannot be run
        raises `Unsupported`. Layers of different pipeline ranks (stack.layers_of(rank)) are model parts of their own,
        each with its hook, where the implementation has such parts.

        Returns:
            A dict for each event. counts_by_layer: L times (E,) integers, the slots that training passes gave to each
            choice since the last step. bias_by_layer: L times (E,) expert_bias. loss: for a pass, where the stack has a
            balance: its loss over all layers, coeff included.
        """
        raise NotImplementedError


def _refusing(supports: Callable) -> Callable:
    @wraps(supports)
    def asked(self, *arguments: Any, **more: Any) -> str | None:
        try:
            return supports(self, *arguments, **more)
        except ValueError as error:
            return f"{supports.__name__}() raises a ValueError: {error}"

    return asked
