"""moe_torch, the layer: start reading here. One Mixture-of-Experts layer, every stage in order.

    route (-> capacity) -> permute -> dispatch -> experts -> combine (+ shared experts)

A latent is made before dispatch, and left after combine (`latent.py`).

Legend: T tokens, D model dim, F expert hidden dim, E experts, K top_k, S shared experts. What is computed is
`moe_ref.moe_layer`; it names and explains every stage.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import CapacitySpec, check_capacity
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.invariant import check_batch_invariant
from moe_ref.specs.layer import ExpertSpec, LayerSpec
from moe_ref.specs.params import LayerParams
from moe_ref.specs.router import RouterSpec
from moe_torch import flops  # noqa: F401  (registers what is counted)
from moe_torch.activation import Activation, hide
from moe_torch.balance import add_counts, tokens_per_expert
from moe_torch.capacity import apply_capacity
from moe_torch.constants import ConstantExperts
from moe_torch.dispatcher import LocalTokenDispatcher, TokenDispatcher
from moe_torch.experts import GroupedExperts, run_experts
from moe_torch.invariant import of_each_token
from moe_torch.latent import Latent
from moe_torch.parts import Linear
from moe_torch.quantile import NeedCounts
from moe_torch.router import Gate, NodeLimitedRouter
from moe_torch.routing import Routing


class SharedExperts(nn.Module):
    """Feed-forward networks that see every token, side by side in one of width S * F.

    The factor of a shared expert multiplies its hidden values; without biases that is the same as its output.
    """

    w3: Linear | None
    token_gate: Gate | None

    def __init__(self, spec: ExpertSpec, num_experts: int, *, token_gate: bool, device=None, dtype=None):
        super().__init__()
        width = num_experts * spec.hidden_dim
        self.num_experts = num_experts
        self.activation = Activation.of(spec)
        self.w1 = Linear(spec.dim, width, bias=False, device=device, dtype=dtype)
        self.w2 = Linear(width, spec.dim, bias=False, device=device, dtype=dtype)
        self.w3 = Linear(spec.dim, width, bias=False, device=device, dtype=dtype) if spec.gated else None
        self.token_gate = Gate(spec.dim, 1, bias=False, device=device, dtype=dtype) if token_gate else None

    def reset_parameters(self) -> None:
        """Each map as nn.Linear."""
        for linear in (self.w1, self.w2, self.w3, self.token_gate):
            if linear is not None:
                linear.reset_parameters()

    def forward(self, x_TD: Tensor, weights_TS: Tensor | None = None) -> Tensor:
        """The sum over the shared experts of factor * output; the factor is 1 where nothing gives one."""
        hidden_TF = hide(self.w1(x_TD), None if self.w3 is None else self.w3(x_TD), self.activation)
        factors_TS = weights_TS if self.token_gate is None else torch.sigmoid(self.token_gate(x_TD))
        if factors_TS is not None:
            hidden_TSF = hidden_TF.unflatten(1, (self.num_experts, -1))
            hidden_TF = (hidden_TSF * factors_TS[:, :, None]).to(hidden_TF.dtype).flatten(1)
        return self.w2(hidden_TF)


class MoE(nn.Module):
    """Router, routed experts, and shared experts.

    `tokens_per_expert` counts the tokens of each choice, before any capacity, over the training steps since it was last
    set to zero; the balancing step (`bias_hook.py`) reads it and moves `router.expert_bias`. A forward pass that
    activation checkpointing repeats counts once. No state dict has it, and `load_state_dict` sets it to zero.

    A layer from the meta device is filled by `to_empty` and then `reset_parameters` or `load_state_dict`, or by
    `load_state_dict(..., assign=True)`.

    Args:
        spec: what is computed.
        capacity: how many slots an expert takes; None: all.
        align: the experts see their rows padded up to a multiple; None: as they are. No value depends on it.
        batch_invariant: the output of a token has the same bits whatever else is in the batch: each is computed alone,
            one after the other, many times slower (docs/invariant.md). It may be set at any time.
        capacity_group: the ranks over which a batch is spread, for a capacity of scope 'global'; None: this process.
    """

    tokens_per_expert: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        capacity: CapacitySpec | None = None,
        capacity_group: dist.ProcessGroup | None = None,
        align: AlignSpec | None = None,
        batch_invariant: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        router, experts = spec.router, spec.experts
        check_capacity(router, capacity)
        self.spec = spec
        self.capacity = capacity
        self.capacity_group = capacity_group
        self.batch_invariant = batch_invariant
        self.router = NodeLimitedRouter(experts.dim, router, gate_bias=spec.gate_bias, device=device, dtype=dtype)
        self.dispatcher: TokenDispatcher = LocalTokenDispatcher(router.num_experts, router.num_choices, align)
        self.experts = GroupedExperts(router.num_experts, spec.routed_experts, device=device, dtype=dtype)
        self.constant_experts = None
        if router.num_constant_experts:
            width = spec.routed_experts.dim
            self.constant_experts = ConstantExperts(router.num_constant_experts, width, device=device, dtype=dtype)
        self.latent = None
        if spec.latent is not None:
            self.latent = Latent(experts.dim, spec.latent, device=device, dtype=dtype)
        self.shared_experts = None
        if spec.shared is not None and spec.shared_experts is not None:
            self.shared_experts = SharedExperts(
                spec.shared_experts,
                spec.num_shared_experts,
                token_gate=spec.shared.gate == "sigmoid",
                device=device,
                dtype=dtype,
            )
        # Integers, which .to(torch.bfloat16) leaves alone: bfloat16 cannot count past 256.
        counts_E = torch.zeros(router.num_choices, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts_E, persistent=False)
        self.needs: NeedCounts | None = None  # given by a BiasHook that balances by quantiles
        self.register_load_state_dict_post_hook(_forget_counts)

    def reset_parameters(self) -> None:
        """New parameters, no balancing bias, and nothing counted."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared_experts is not None:
            self.shared_experts.reset_parameters()
        for module in (self.latent, self.constant_experts):
            if module is not None:
                module.reset_parameters()
        self.tokens_per_expert.zero_()
        if self.needs is not None:
            self.needs.total.zero_()

    def __deepcopy__(self, memo: dict) -> "MoE":
        # Groups of processes cannot be copied. A copy, as an average of weights keeps one, runs over the same.
        for shared in (self.capacity_group, self.dispatcher):
            if shared is not None:
                memo[id(shared)] = shared
        own = memo[id(self)] = self.__class__.__new__(self.__class__)
        own.__dict__.update(deepcopy(self.__dict__, memo))
        return own

    def _apply(self, fn, recurse=True):
        was_meta = self.tokens_per_expert.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.tokens_per_expert.is_meta:
            # to_empty leaves what the memory held, and a state dict has no counts.
            self.tokens_per_expert.zero_()
        return self

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        *,
        inputs: RouterInputs = NO_INPUTS,
        sequence_lengths: Sequence[int] | None = None,
        router_spec: RouterSpec | None = None,
    ) -> Tensor:
        """The layer's output, of the shape of x.

        Args:
            x: (..., D) tokens.
            token_mask: (...) bools; a padding token (False) is not read, and its output is 0, shared experts included.
            inputs: what the selector reads; T counts the tokens of x in order.
            sequence_lengths: of consecutive sequences, for a capacity of that scope; None: (..., L, D) is sequences of
                length L, and (L, D) is one.
            router_spec: as in `NodeLimitedRouter.route`; with it no capacity applies again.
        """
        return self.forward_and_routing(
            x, token_mask, inputs=inputs, sequence_lengths=sequence_lengths, router_spec=router_spec
        )[0]

    def forward_and_routing(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        *,
        inputs: RouterInputs = NO_INPUTS,
        sequence_lengths: Sequence[int] | None = None,
        router_spec: RouterSpec | None = None,
    ) -> tuple[Tensor, Routing]:
        """The output, and what the router decided, for losses, counts and records; arguments as in `forward`.

        Raises:
            ValueError: x is not floats of the spec's width, or token_mask not a bool for each token.
        """
        _check(x, token_mask, self.spec.experts.dim)
        if self.batch_invariant:
            return self._each_alone(x, token_mask, inputs, router_spec)
        return self._of_batch(x, token_mask, inputs, sequence_lengths, router_spec)

    def _each_alone(
        self, x: Tensor, token_mask: Tensor | None, inputs: RouterInputs, router_spec: RouterSpec | None
    ) -> tuple[Tensor, Routing]:
        """The layer on each token alone."""
        spec, x_TD = router_spec or self.spec.router, x.reshape(-1, x.shape[-1])
        check_batch_invariant(spec, None if router_spec else self.capacity)
        T = len(x_TD)
        if T == 0:
            return self._of_batch(x, token_mask, inputs, None, router_spec)
        inputs.check(spec, T)
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        layer = partial(self._of_batch, sequence_lengths=None, router_spec=router_spec)
        output_TD, routing = of_each_token(layer, x_TD, mask_T, inputs, spec)
        return output_TD.view(x.shape), routing

    def _of_batch(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        inputs: RouterInputs,
        sequence_lengths: Sequence[int] | None,
        router_spec: RouterSpec | None,
    ) -> tuple[Tensor, Routing]:
        """The layer on all tokens together."""
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = None if token_mask is None else token_mask.reshape(-1)
        if mask_T is not None:
            # 0 * NaN is NaN: a padding row is replaced, not multiplied by a mask.
            x_TD = x_TD.masked_fill(~mask_T[:, None], 0)

        routing = self.router.route(x_TD, token_mask_T=mask_T, inputs=inputs, router_spec=router_spec)
        if self.capacity is not None and router_spec is None:
            lengths = _lengths(x) if sequence_lengths is None else sequence_lengths
            routing = self.limit(routing, self.capacity, mask_T, lengths)
        permutation = self.dispatcher.permute(routing.expert_ids_TK)
        if self.training:
            counts_E = permutation.tokens_per_expert_E
            if self.capacity is not None and routing.chosen_ids_TK is not None:
                # What was dropped is a part of the load that the bias is to even out.
                counts_E = tokens_per_expert(routing.chosen_ids_TK, self.spec.router.num_choices)
            add_counts(self.tokens_per_expert, counts_E)
            if self.needs is not None and router_spec is None and self.router.expert_bias is not None:
                self.needs.observe(routing, self.router.expert_bias, mask_T)
        expert_input_TD = x_TD if self.latent is None else self.latent.down(x_TD)
        routed_TD = self.run_experts(expert_input_TD, permutation, routing.weights_TK)
        routed_TD = self.add_null_experts(routed_TD, expert_input_TD, routing.expert_ids_TK, routing.weights_TK)
        if self.spec.router.output_scale != 1:
            routed_TD = routed_TD * self.spec.router.output_scale
        if self.latent is not None:
            routed_TD = self.latent.expand(routed_TD)
        output_TD = self.join(routed_TD, x_TD, routing.shared_weights_TS)

        if mask_T is not None:
            output_TD = output_TD.masked_fill(~mask_T[:, None], 0)
        # No view: what is done to a view in place takes FSDP2's hook away.
        return torch.ops.aten._unsafe_view(output_TD.contiguous(), x.shape), routing

    def limit(
        self, routing: Routing, capacity: CapacitySpec, token_mask_T: Tensor | None, sequence_lengths: Sequence[int]
    ) -> Routing:
        """What is left of a choice."""
        ids_TK = routing.expert_ids_TK
        kept = apply_capacity(
            ids_TK,
            routing.weights_TK,
            capacity,
            self.spec.router.num_experts,
            token_mask_T=token_mask_T,
            sequence_of_T=_sequence_of_T(sequence_lengths, ids_TK.device),
            num_sequences=len(sequence_lengths),
            group=self.capacity_group,
        )
        return replace(routing, expert_ids_TK=kept.expert_ids_TK, weights_TK=kept.weights_TK)

    def run_experts(self, x_TD: Tensor, permutation: Any, weights_TK: Tensor) -> Tensor:
        """dispatch, experts and combine; the weight is on the output, or on the input."""
        on_input = self.spec.router.weight_on == "input"
        if isinstance(self.dispatcher, LocalTokenDispatcher):
            return run_experts(self.experts, self.dispatcher, x_TD, permutation, weights_TK, on_input=on_input)
        return self.dispatcher.run(self.experts, x_TD, permutation, weights_TK, on_input=on_input)

    def add_null_experts(self, routed_TD: Tensor, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Identity slots add (sum of their weights) * token, a slot of a constant expert its weighted mixture."""
        router = self.spec.router
        ids, dtype = router.identity_ids, routed_TD.dtype
        if len(ids):
            is_identity_TK = (expert_ids_TK >= ids.start) & (expert_ids_TK < ids.stop)
            null_weight_T = torch.where(is_identity_TK, weights_TK, 0).sum(-1)
            routed_TD = (routed_TD + null_weight_T[:, None] * x_TD).to(dtype)
        if self.constant_experts is None:
            return routed_TD
        ids_TK, on_input = expert_ids_TK - router.num_experts, router.weight_on == "input"
        return (routed_TD + self.constant_experts(x_TD, ids_TK, weights_TK, on_input=on_input)).to(dtype)

    def join(self, routed_TD: Tensor, x_TD: Tensor, shared_weights_TS: Tensor | None) -> Tensor:
        """The output is the sum, or the average, of routed and shared output."""
        if self.shared_experts is None or self.spec.shared is None:
            return routed_TD
        joined_TD = routed_TD + self.shared_experts(x_TD, shared_weights_TS)
        return joined_TD / 2 if self.spec.shared.combine == "average" else joined_TD

    @torch.no_grad()
    def load_params(self, params: LayerParams) -> None:
        """Takes over the parameters of moe_ref, in its canonical layout; the dtype stays this layer's.

        Over ranks every rank makes this call, with the whole layer's parameters.

        Raises:
            ValueError: a parameter is missing, or has another shape than the spec asks for.
        """
        params.check(self.spec)
        if self.router.part is not None:
            # Over ranks: each takes its part of a whole layer's state.
            whole = MoE(self.spec, device="cpu", dtype=torch.float64)
            whole.load_params(params)
            self.load_state_dict(whole.state_dict())
            return
        gated = self.spec.experts.gated
        # Without a gate the activation stands on the up projection, and that is w1.
        w1_EDF, b1_EF = (params.w_gate_EDF, params.b_gate_EF) if gated else (params.w_up_EDF, params.b_up_EF)
        router, experts, shared = self.router, self.experts, self.shared_experts
        _copy(router.gate.weight, params.gate_ED)
        _copy(router.gate.bias, params.gate_bias_E)
        if router.expert_bias is not None and params.expert_bias_E is None:
            router.expert_bias.zero_()
        else:
            _copy(router.expert_bias, params.expert_bias_E)
        _copy(router.learned_scale, params.learned_scale)
        _copy(experts.w1_EFD, _turned(w1_EDF))
        _copy(experts.w2_EDF, _turned(params.w_down_EFD))
        _copy(experts.w3_EFD, _turned(params.w_up_EDF))
        _copy(experts.b1_EF, b1_EF)
        _copy(experts.b2_ED, params.b_down_ED)
        _copy(experts.b3_EF, params.b_up_EF)
        if self.constant_experts is not None:
            _copy(self.constant_experts.w_Z2D, _turned(params.constant_w_ZD2))
            _copy(self.constant_experts.v_ZD, params.constant_ZD)
        if self.latent is not None:
            _copy(self.latent.down.weight, _turned(params.latent_w_down_DH))
            _copy(self.latent.up.weight, _turned(params.latent_w_up_HD))
            _copy(None if self.latent.norm is None else self.latent.norm.weight, params.latent_norm_H)
        if shared is None or params.shared_w_up_SDF is None or params.shared_w_down_SFD is None:
            return
        w1_SDF = params.shared_w_gate_SDF if gated else params.shared_w_up_SDF
        _copy(shared.w1.weight, _turned(w1_SDF))
        _copy(shared.w2.weight, _turned(params.shared_w_down_SFD.reshape(-1, self.spec.experts.dim)))
        _copy(None if shared.w3 is None else shared.w3.weight, _turned(params.shared_w_up_SDF))
        _copy(None if shared.token_gate is None else shared.token_gate.weight, params.shared_token_gate_D)


def _check(x: Tensor, token_mask: Tensor | None, D: int) -> None:
    if x.ndim == 0 or x.shape[-1] != D or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it is floats of shape (..., {D})")
    if token_mask is None:
        return
    lead = x.shape[:-1]
    is_of_tokens = token_mask.shape == lead or (token_mask.ndim == 1 and token_mask.numel() == lead.numel())
    if token_mask.dtype != torch.bool or not is_of_tokens:
        # A mask of one token would be broadcast to all.
        raise ValueError(f"token_mask is {token_mask.dtype}{list(token_mask.shape)}; it is bools of {list(lead)}")


def _forget_counts(moe: nn.Module, _keys: Any) -> None:
    """A state dict has no counts: those of a layer that takes one are of other numbers, or whatever memory held."""
    assert isinstance(moe, MoE)
    if moe.tokens_per_expert.is_meta:
        device = moe.router.gate.weight.device  # not meta any more where the tensors were assigned
        moe.tokens_per_expert = torch.zeros_like(moe.tokens_per_expert, device=device)
    else:
        moe.tokens_per_expert.zero_()
    if moe.needs is not None:
        moe.needs.total.zero_()


def _lengths(x: Tensor) -> list[int]:
    """(..., L, D) is sequences of length L."""
    length = x.shape[-2] if x.ndim > 1 else 1
    return [length] * (x[..., 0].numel() // max(length, 1))


def _sequence_of_T(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The number of each token's sequence; of equal lengths it is computed on the device, and nothing waits."""
    if len(set(lengths)) == 1 and lengths[0] > 0:
        return torch.arange(sum(lengths), device=device) // lengths[0]
    numbers_B = torch.arange(len(lengths))
    return numbers_B.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(device)


def _turned(w):
    """[in, out] and [out, in] of each expert, either way."""
    return None if w is None else np.swapaxes(w, -1, -2)


def _copy(own: Tensor | None, values) -> None:
    """Own parameter := values, which may hold the same numbers in a shape with fewer axes or more."""
    if own is not None:
        own.copy_(torch.from_numpy(np.array(values, dtype=np.float64)).reshape(own.shape))
