"""conformance, layer, faults of whole layers: what goes wrong between right stages.

Legend: T tokens, K top_k, D model dim, S shared experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import patched, replaces, surrounds
from conformance.layer.faulty import with_experts, with_router
from moe_ref import LayerSpec, RoutingTrace
from moe_ref.experts import combine, fill_slots, join, run_shared, share_weights, weigh_inputs
from moe_ref.routing import gate, route


@surrounds(breaks="LAY-1", links=("vllm-project/vllm#27316",))
def a_pair_without_shared_experts(run, memory, x_TD, params, spec, **inputs):
    """Without shared experts a pair of nothing and the output is returned."""
    found_TD = run(x_TD, params, spec, **inputs)
    return found_TD if spec.shared is not None else (None, found_TD)


@replaces("combine", breaks="LAY-2", links=("tjake/Jlama#201",))
def bare_outputs_added(slot_outputs_TKD, weights_TK, spec):
    """The outputs of the experts are added without their weights."""
    used_TK = (weights_TK != 0).astype(weights_TK.dtype)
    return combine(slot_outputs_TKD, used_TK, spec)


@surrounds(breaks="LAY-2")
def a_full_tile_loses_its_last_token(run, memory, x_TD, params, spec, **inputs):
    """Where the tokens fill tiles of 64 to the end, the last one has no output."""
    found_TD = run(x_TD, params, spec, **inputs)
    return np.where(np.arange(len(x_TD))[:, None] < len(x_TD) - (len(x_TD) % 64 == 0), found_TD, 0)


@replaces("gate", breaks="LAY-2")
def gate_bias_forgotten(x_TD, gate_ED, gate_bias_E=None, *, dtype=np.float64):
    """The layer forgets the gate's bias."""
    return gate(x_TD, gate_ED, None, dtype=dtype)


@replaces("route", breaks="LAY-2")
def expert_bias_forgotten(logits_TE, spec, *, expert_bias_E=None, **inputs) -> RoutingTrace:
    """The layer forgets the selection bias."""
    return route(logits_TE, spec, **inputs)


@replaces("route", breaks="LAY-2")
def learned_scale_forgotten(logits_TE, spec, *, learned_scale=None, **inputs) -> RoutingTrace:
    """The layer forgets the learned scale."""
    ones = None if learned_scale is None else np.ones_like(learned_scale)
    return route(logits_TE, spec, learned_scale=ones, **inputs)


@replaces("route", breaks="LAY-2", links=("huggingface/transformers#39581",))
def the_biased_choice_weighs(logits_TE, spec, *, expert_bias_E=None, **inputs) -> RoutingTrace:
    """The weights are read from the choice scores."""
    found = route(logits_TE, spec, expert_bias_E=expert_bias_E, **inputs)
    if expert_bias_E is None or spec.select_by != "score":
        return found
    bias_TK = np.where(found.expert_ids_TK < 0, 0, expert_bias_E[found.expert_ids_TK])
    return replace(found, weights_TK=found.weights_TK + bias_TK.astype(found.weights_TK.dtype))


@replaces("route", breaks="LAY-2", links=("sgl-project/sglang#40672", "deepseek-ai/DeepEP#427"))
def a_full_expert_drops_tokens(logits_TE, spec, **inputs) -> RoutingTrace:
    """An expert takes its average load and drops the tokens that come later."""
    found = route(logits_TE, spec, **inputs)
    ids_TK, weights_TK = found.expert_ids_TK, found.weights_TK.copy()
    capacity = -(-ids_TK.size // spec.num_choices)
    for e in range(spec.num_choices):
        tokens, slots = np.nonzero(ids_TK == e)
        weights_TK[tokens[capacity:], slots[capacity:]] = 0
    return replace(found, weights_TK=weights_TK)


@surrounds(breaks="LAY-3", links=("vllm-project/vllm#57471",))
def a_layer_of_zero_tokens_is_refused(run, memory, x_TD, params, spec, **inputs):
    """Zero tokens are an error."""
    if not len(x_TD):
        raise RuntimeError("torch.cat(): expected a non-empty list of Tensors")
    return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-4", links=("sgl-project/sglang#16972",))
def a_single_token_takes_another_path(run, memory, x_TD, params, spec, **inputs):
    """A single token takes a path whose activation has another alpha."""
    if len(x_TD) == 1 and spec.experts.activation == "silu":
        spec = with_experts(spec, alpha=1.3)
    return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-4", links=("vllm-project/tpu-inference#2248",))
def a_token_gets_a_part_of_its_neighbour(run, memory, x_TD, params, spec, **inputs):
    """Rows are added by position before they return to their tokens."""
    found_TD = run(x_TD, params, spec, **inputs)
    return found_TD + 0.25 * np.roll(found_TD, 1, axis=0)


@surrounds(breaks="LAY-4")
def tokens_share_a_scale(run, memory, x_TD, params, spec, **inputs):
    """All tokens are quantised by the largest number of the batch."""
    step = np.nanmax(np.abs(x_TD), initial=1e-30) / 127
    return run(np.round(x_TD / step) * step, params, spec, **inputs)


@surrounds(breaks="LAY-5", links=("vllm-project/vllm#39391",))
def a_nan_spreads_over_the_batch(run, memory, x_TD, params, spec, **inputs):
    """A NaN in one token reaches all by a sum with weight 0."""
    return run(np.nan_to_num(x_TD), params, spec, **inputs) + 0 * x_TD.sum()


@surrounds(breaks="LAY-5")
def a_nan_reaches_the_next_token(run, memory, x_TD, params, spec, **inputs):
    """Rows are multiplied by a one-hot matrix of tokens, in which 0 * NaN is NaN."""
    found_TD = run(np.nan_to_num(x_TD), params, spec, **inputs)
    return found_TD + 0 * np.roll(x_TD.sum(axis=1, keepdims=True), 1, axis=0)


@surrounds(breaks="LAY-6", links=("marin-community/marin#8953",))
def padding_is_computed(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """Padding tokens are tokens as any."""
    return run(np.nan_to_num(x_TD), params, spec, **inputs)


@surrounds(breaks="LAY-6", links=("huggingface/transformers#45621",))
def padding_is_multiplied_by_0(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """The output of padding is multiplied by 0, which NaN survives."""
    found_TD = run(np.nan_to_num(x_TD), params, spec, **inputs)
    return found_TD if token_mask_T is None else (found_TD + 0 * x_TD) * token_mask_T[:, None]


@surrounds(breaks="LAY-6", links=("vllm-project/vllm#57471",))
def a_layer_of_padding_is_refused(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """A batch of padding alone is an error."""
    if token_mask_T is not None and len(token_mask_T) and not token_mask_T.any():
        raise RuntimeError("no tokens were routed")
    return run(x_TD, params, spec, token_mask_T=token_mask_T, **inputs)


@surrounds(breaks="LAY-7", links=("sgl-project/sglang#40672",))
def padding_is_taken_for_a_suffix(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """The first tokens are taken for the valid ones, as many as there are."""
    if token_mask_T is None:
        return run(x_TD, params, spec, **inputs)
    first_T = np.arange(len(x_TD)) < token_mask_T.sum()
    return run(x_TD, params, spec, token_mask_T=first_T & token_mask_T, **inputs)


@surrounds(breaks="LAY-7")
def padding_reaches_other_tokens(run, memory, x_TD, params, spec, *, token_mask_T=None, **inputs):
    """What padding holds is added to the other tokens with weight 0."""
    found_TD = run(x_TD, params, spec, token_mask_T=token_mask_T, **inputs)
    if token_mask_T is None:
        return found_TD
    return np.where(token_mask_T[:, None], found_TD + 0 * x_TD[~token_mask_T].sum(), 0)


@surrounds(breaks="LAY-8", links=("sgl-project/sglang#25974",))
def shared_experts_left_out(run, memory, x_TD, params, spec, **inputs):
    """The shared experts are not loaded."""
    zero = None if params.shared_w_down_SFD is None else 0 * params.shared_w_down_SFD
    return run(x_TD, replace(params, shared_w_down_SFD=zero), spec, **inputs)


@surrounds(breaks="LAY-8", links=("vllm-project/vllm#49366",))
def shared_experts_added_twice(run, memory, x_TD, params, spec, **inputs):
    """The shared output is summed over two ranks that both have all of it."""
    twice = None if params.shared_w_down_SFD is None else 2 * params.shared_w_down_SFD
    return run(x_TD, replace(params, shared_w_down_SFD=twice), spec, **inputs)


@replaces("run_shared", breaks="LAY-8")
def shared_experts_clamped_as_the_routed(x_TD, params, spec):
    """The shared experts have the clamp of the routed ones, and not their own."""
    if spec.shared is None:
        return run_shared(x_TD, params, spec)
    return run_shared(x_TD, params, spec.replace(shared=spec.shared.replace(clamp=spec.experts.clamp)))


@replaces("join", breaks="LAY-9", links=("vllm-project/vllm#29687", "sgl-project/sglang#28237"))
def the_whole_output_is_scaled(routed_TD, shared_TD, spec: LayerSpec):
    """The sum of routed and shared output is scaled, not the routed alone."""
    scale = spec.router.route_scale * spec.router.output_scale
    return join(routed_TD, shared_TD if spec.router.num_scored_shared_experts else shared_TD * scale, spec)


@replaces("join", breaks="LAY-9", links=("sgl-project/sglang#28237",))
def the_shared_output_is_divided_by_the_scale(routed_TD, shared_TD, spec: LayerSpec):
    """The shared output is scaled down, for a scale that comes later in another model."""
    return join(routed_TD, shared_TD / spec.router.route_scale / spec.router.output_scale, spec)


@replaces("share_weights", breaks="LAY-10")
def the_shared_gate_is_ignored(x_TD, shared_weights_TS, params, spec):
    """The factor of a shared expert is 1."""
    factors_TS = share_weights(x_TD, shared_weights_TS, params, spec)
    return factors_TS if params.shared_token_gate_D is None else np.ones_like(factors_TS)


@replaces("share_weights", breaks="LAY-10")
def the_shared_gate_has_no_sigmoid(x_TD, shared_weights_TS, params, spec):
    """The factor of a shared expert is its logit."""
    if params.shared_token_gate_D is None:
        return share_weights(x_TD, shared_weights_TS, params, spec)
    return (x_TD @ params.shared_token_gate_D)[:, None]


@surrounds(breaks="LAY-10")
def the_shared_gate_is_of_the_routed_too(run, memory, x_TD, params, spec, **inputs):
    """The sigmoid multiplies the whole output."""
    found_TD = run(x_TD, params, spec, **inputs)
    if params.shared_token_gate_D is None:
        return found_TD
    factor_T1 = share_weights(x_TD, None, params, spec)
    plain = spec.replace(shared=spec.shared.replace(gate="none"))
    return factor_T1 * run(x_TD, replace(params, shared_token_gate_D=None), plain, **inputs)


@replaces("join", breaks="LAY-11")
def an_average_is_not_halved(routed_TD, shared_TD, spec):
    """Routed and shared output are added where they are averaged."""
    return routed_TD + shared_TD


@replaces("join", breaks="LAY-11")
def the_routed_half_alone_is_halved(routed_TD, shared_TD, spec):
    """The routed output is halved, the shared one is not."""
    averaged = spec.shared is not None and spec.shared.combine == "average"
    return routed_TD / 2 + shared_TD if averaged else join(routed_TD, shared_TD, spec)


@surrounds(breaks="LAY-12", links=("NVIDIA/TensorRT-LLM#3492", "areal-project/AReaL#940"))
def the_weight_is_on_the_output(run, memory, x_TD, params, spec, **inputs):
    """Weights multiply the outputs, wherever they are to be."""
    return run(x_TD, params, with_router(spec, weight_on="output"), **inputs)


@surrounds(breaks="LAY-2", links=("areal-project/AReaL#940",))
def the_weight_is_on_the_input(run, memory, x_TD, params, spec, **inputs):
    """Weights multiply the inputs, wherever they are to be."""
    return run(x_TD, params, with_router(spec, weight_on="input"), **inputs)


@replaces("combine", breaks="LAY-12", links=("vllm-project/vllm#43694",))
def the_weight_is_on_both_sides(slot_outputs_TKD, weights_TK, spec):
    """Weights multiply the outputs once more, where they are on the input."""
    return combine(slot_outputs_TKD, weights_TK, spec.replace(weight_on="output"))


@replaces("weigh_inputs", breaks="LAY-12")
def the_weight_is_on_no_side(x_TD, weights_TK, spec):
    """Weights that are on the input are applied nowhere."""
    return weigh_inputs(x_TD, weights_TK, spec.replace(weight_on="output"))


@replaces("fill_slots", breaks="LAY-13")
def identity_experts_add_nothing(expert_rows_ND, order_N, slot_inputs_TKD, expert_ids_TK, spec):
    """A null expert returns 0 where it returns its input."""
    return fill_slots(expert_rows_ND, order_N, 0 * slot_inputs_TKD, expert_ids_TK, spec)


@surrounds(breaks="LAY-13")
def skipped_experts_return_their_input(run, memory, x_TD, params, spec, **inputs):
    """Null experts of any kind return their input."""
    return run(x_TD, params, with_router(spec, null_kind="identity"), **inputs)


@surrounds(breaks="LAY-13")
def a_null_expert_is_the_last_expert(run, memory, x_TD, params, spec, **inputs):
    """The id of a null expert is cut to that of the last expert."""

    def cut(logits_TE, router, **more) -> RoutingTrace:
        found = route(logits_TE, router, **more)
        return replace(found, expert_ids_TK=np.minimum(found.expert_ids_TK, router.num_experts - 1))

    with patched({"route": cut}):
        return run(x_TD, params, spec, **inputs)


@surrounds(breaks="LAY-14")
def the_token_is_added_to_its_output(run, memory, x_TD, params, spec, **inputs):
    """The residual that belongs around the layer is inside it."""
    found_TD = run(x_TD, params, spec, **inputs)
    return found_TD + np.where(inputs.get("token_mask_T", np.ones(len(x_TD), bool))[:, None], x_TD, 0)


@surrounds(breaks="LAY-15")
def the_first_expert_is_special(run, memory, x_TD, params, spec, **inputs):
    """The first expert's down projection is a little larger, as a shared slot of an older checkpoint was."""
    first = np.arange(spec.router.num_experts) == 0
    scaled = params.w_down_EFD * np.where(first, np.float32(1.01), np.float32(1))[:, None, None]
    return run(x_TD, replace(params, w_down_EFD=scaled), spec, **inputs)


@surrounds(breaks="LAY-16", links=("vllm-project/vllm#45683",))
def every_second_call_sums_otherwise(run, memory, x_TD, params, spec, **inputs):
    """The order of the sum depends on who arrives first: the last bit changes from call to call."""
    found_TD = run(x_TD, params, spec, **inputs)
    memory["calls"] = memory.get("calls", 0) + 1
    return np.nextafter(found_TD, np.float32(np.inf)) if memory["calls"] % 2 else found_TD
