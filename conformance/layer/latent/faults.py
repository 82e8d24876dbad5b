"""conformance, layer, faults of the latent.

Legend: T tokens, D model dim, H latent dim.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import patched, replaces, surrounds
from moe_ref import gate
from moe_ref.backward.latent import compress_backward, expand_backward
from moe_ref.experts import combine, run_shared
from moe_ref.latent import compress, expand, rms_norm


def there_and_back(x_TD, params):
    """What is left of the tokens in the latent, in their own width; the tokens where there is none."""
    return x_TD if params.latent_w_down_DH is None else x_TD @ params.latent_w_down_DH @ params.latent_w_up_HD


@replaces("compress", breaks="LAT-1")
def the_token_is_cut_to_the_latent(x_TD, params):
    """The experts see the first columns of the token, and not its projection."""
    if params.latent_w_down_DH is None:
        return x_TD
    H = params.latent_w_down_DH.shape[1]
    return np.pad(x_TD, ((0, 0), (0, max(0, H - x_TD.shape[1]))))[:, :H]


@replaces("expand", breaks="LAT-1")
def projected_up_for_each_rank(input_TH, combined_TH, params, spec):
    """The up projection is summed over two ranks that both have all of it."""
    found = expand(input_TH, combined_TH, params, spec)
    return found if spec.latent is None else replace(found, routed_TD=2 * found.routed_TD)


@replaces("combine", breaks="LAT-1", also=("combine", "layer"))
def the_latent_is_added_to_its_experts(slot_outputs_TKD, weights_TK, spec):
    """A residual stands around the experts, inside the latent."""
    return combine(slot_outputs_TKD, weights_TK, spec) + slot_outputs_TKD[:, 0]


@surrounds(breaks="LAT-2")
def the_router_reads_the_latent(run, memory, x_TD, params, spec, **inputs):
    """The router sees what the experts see, projected back."""

    def blurred(x_TD, gate_ED, gate_bias_E=None, **how):
        return gate(there_and_back(x_TD, params), gate_ED, gate_bias_E, **how)

    with patched({"gate": blurred}):
        return run(x_TD, params, spec, **inputs)


@replaces("run_shared", breaks="LAT-2", links=("PaddlePaddle/PaddleFleet#868",))
def the_shared_experts_read_the_latent(x_TD, params, spec):
    """The shared experts see what the routed experts see, projected back."""
    return run_shared(there_and_back(x_TD, params), params, spec)


@replaces("expand", breaks="LAT-3")
def the_latent_is_not_normed(input_TH, combined_TH, params, spec):
    """The weighted sum is projected up as it is."""
    return expand(input_TH, combined_TH, replace(params, latent_norm_H=None), spec)


@replaces("expand", breaks="LAT-3")
def the_norm_follows_the_up_projection(input_TH, combined_TH, params, spec):
    """The routed output is normed, in the width of the tokens, and not what is projected up."""
    if params.latent_norm_H is None:
        return expand(input_TH, combined_TH, params, spec)
    found = expand(input_TH, combined_TH * params.latent_norm_H, replace(params, latent_norm_H=None), spec)
    return replace(found, routed_TD=rms_norm(found.routed_TD, np.float32(1), spec.latent.norm_eps))


@surrounds(breaks="LAT-3")
def the_norm_is_before_the_experts(run, memory, x_TD, params, spec, **inputs):
    """What the experts see is normed, and not what they return."""
    if params.latent_norm_H is None:
        return run(x_TD, params, spec, **inputs)
    scale_H, eps = params.latent_norm_H, spec.latent.norm_eps

    def normed(x_TD, params):
        return rms_norm(compress(x_TD, params), scale_H, eps)

    latent = spec.latent.replace(norm_eps=None)
    with patched({"compress": normed}):
        return run(x_TD, replace(params, latent_norm_H=None), spec.replace(latent=latent), **inputs)


@surrounds(breaks="LAT-3")
def each_expert_is_normed(run, memory, x_TD, params, spec, **inputs):
    """Each expert's output is normed, and not their weighted sum."""
    if params.latent_norm_H is None:
        return run(x_TD, params, spec, **inputs)

    def of_each(slot_outputs_TKD, weights_TK, router):
        return combine(rms_norm(slot_outputs_TKD, np.float32(1), spec.latent.norm_eps), weights_TK, router)

    def scaled(input_TH, combined_TH, params, spec):
        return expand(input_TH, combined_TH * params.latent_norm_H, replace(params, latent_norm_H=None), spec)

    with patched({"combine": of_each, "expand": scaled}):
        return run(x_TD, params, spec, **inputs)


@replaces("root_mean_square", breaks="LAT-3")
def the_eps_of_the_norm_is_forgotten(rows, eps):
    """A common eps takes the place of the layer's own."""
    return np.sqrt((rows**2).mean(axis=-1, keepdims=True) + np.asarray(1e-6, rows.dtype))


@replaces("root_mean_square", breaks="LAT-3")
def the_eps_of_the_norm_is_outside_the_root(rows, eps):
    """eps is added to the root, and not to the mean below it."""
    return np.sqrt((rows**2).mean(axis=-1, keepdims=True)) + np.asarray(eps, rows.dtype)


@replaces("rms_norm", breaks="LAT-3")
def the_scale_of_the_norm_is_forgotten(rows, scale, eps):
    """The norm has no learned scale."""
    return rms_norm(rows, np.ones_like(scale), eps)


@replaces("rms_norm", breaks="LAT-3")
def the_norm_subtracts_the_mean(rows, scale, eps):
    """A layer norm takes the place of the root mean square."""
    return rms_norm(rows - rows.mean(axis=-1, keepdims=True), scale, eps)


@replaces("expand_backward", breaks="LAT-4")
def the_scale_of_the_norm_gets_no_gradient(d_routed_TD, trace, params, spec):
    """The scale of the norm is a constant."""
    d_combined_TH, grads = expand_backward(d_routed_TD, trace, params, spec)
    return d_combined_TH, {name: 0 * g if name == "latent_norm_H" else g for name, g in grads.items()}


@replaces("expand_backward", breaks="LAT-4")
def the_up_projection_sees_the_sum_before_the_norm(d_routed_TD, trace, params, spec):
    """The gradient of the up projection is that of an input that is not normed."""
    d_combined_TH, grads = expand_backward(d_routed_TD, trace, params, spec)
    return d_combined_TH, grads | ({"latent_w_up_HD": trace.combined_TH.T @ d_routed_TD} if grads else {})


@replaces("compress_backward", breaks="LAT-4")
def the_down_projection_sums_over_half_the_tokens(d_input_TH, x_TD, params):
    """The gradient of the down projection misses the last tokens."""
    d_x_TD, grads = compress_backward(d_input_TH, x_TD, params)
    first = slice(0, len(x_TD) // 2)
    return d_x_TD, dict.fromkeys(grads, x_TD[first].T @ d_input_TH[first])


@replaces("rms_norm_backward", breaks="BWD-2", links=("NVIDIA-NeMo/Automodel#1260",), also=("latent",))
def the_root_of_the_norm_is_a_constant(d_normed, rows, scale, eps):
    """The gradient of the weighted sum passes the norm as if its root were a constant."""
    root = np.sqrt((rows**2).mean(axis=-1, keepdims=True) + np.asarray(eps, rows.dtype))
    return d_normed * scale / root, (d_normed * rows / root).sum(axis=0)
