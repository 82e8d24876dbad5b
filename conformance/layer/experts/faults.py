"""conformance, layer, faults of the experts: wrong rows from right rows.

Legend: R rows, N of them used, D model dim, F expert hidden dim, E experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, rounded, surrounds
from conformance.layer.faulty import with_experts
from moe_ref import WeightLayout
from moe_ref.experts import activated, activation, clamped_up, feed_forward, hide, project


@surrounds(breaks="EXP-1")
def outputs_of_the_hidden_width(run, memory, rows_RD, counts_E, params, spec):
    """One output column is missing."""
    return run(rows_RD, counts_E, params, spec)[:, 1:]


@surrounds(breaks="EXP-2", links=("vllm-project/vllm#29273",))
def halves_read_as_interleaved(run, memory, rows_RD, counts_E, params, spec):
    """Gate and up are fused as halves and read as interleaved columns."""
    if params.w_gate_EDF is None:
        return run(rows_RD, counts_E, params, spec)
    fused, w_down = WeightLayout(fused="halves").from_canonical(params.w_gate_EDF, params.w_up_EDF, params.w_down_EFD)
    w_gate, w_up, w_down = WeightLayout(fused="interleaved").to_canonical(fused, w_down)
    return run(rows_RD, counts_E, replace(params, w_gate_EDF=w_gate, w_up_EDF=w_up, w_down_EFD=w_down), spec)


@surrounds(breaks="EXP-2")
def gate_and_up_swapped(run, memory, rows_RD, counts_E, params, spec):
    """The up projection is activated, and the gate is not."""
    if params.w_gate_EDF is None:
        return run(rows_RD, counts_E, params, spec)
    return run(rows_RD, counts_E, replace(params, w_gate_EDF=params.w_up_EDF, w_up_EDF=params.w_gate_EDF), spec)


@surrounds(breaks="EXP-2")
def weights_of_the_next_expert(run, memory, rows_RD, counts_E, params, spec):
    """Every row meets the down projection of the next expert."""
    return run(rows_RD, counts_E, replace(params, w_down_EFD=np.roll(params.w_down_EFD, -1, axis=0)), spec)


@replaces("hide", breaks="EXP-2")
def up_is_activated_too(gate_RF, up_RF, spec):
    """The activation applies to the up half as well."""
    return hide(gate_RF, up_RF if gate_RF is None else activation(up_RF, spec), spec)


@replaces("activation", breaks="EXP-2")
def the_other_gelu(z_RF, spec):
    """gelu is computed by its tanh form, and the tanh form exactly."""
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}.get(spec.activation, spec.activation)
    return activation(z_RF, spec.replace(activation=other))


@replaces("activation", breaks="EXP-2")
def relu_is_not_squared(z_RF, spec):
    """relu2 is computed as relu."""
    return activation(z_RF, spec.replace(activation="relu") if spec.activation == "relu2" else spec)


@replaces("hide", breaks="EXP-2", links=("Dao-AILab/sonic-moe#63",))
def a_tile_of_the_activation_is_off(gate_RF, up_RF, spec):
    """One column of the activation in four is off by a thousandth."""
    hidden_RF = hide(gate_RF, up_RF, spec)
    return hidden_RF * np.where(np.arange(hidden_RF.shape[1]) % 4 == 3, 1.001, 1).astype(hidden_RF.dtype)


@surrounds(breaks="EXP-2", links=("axolotl-ai-cloud/axolotl#3410",))
def trailing_columns_not_written(run, memory, rows_RD, counts_E, params, spec):
    """The columns past the last whole block of 4 are not written."""
    found_RD = run(rows_RD, counts_E, params, spec)
    found_RD[:, found_RD.shape[1] // 4 * 4 :] = 0
    return found_RD


@surrounds(breaks="EXP-2", links=("NVIDIA/cutlass#3497",))
def the_last_tile_is_skipped(run, memory, rows_RD, counts_E, params, spec):
    """The last row of all is not computed where an earlier expert has an odd number of rows."""
    found_RD, N = run(rows_RD, counts_E, params, spec), int(counts_E.sum())
    if N and (counts_E[:-1] % 2).any():
        found_RD[N - 1] = 0
    return found_RD


@surrounds(breaks="EXP-2")
def experts_in_bfloat16(run, memory, rows_RD, counts_E, params, spec):
    """The rows are rounded to bfloat16, though the subject says float32."""
    return run(rounded(rows_RD, 8), counts_E, params, spec)


@surrounds(breaks="EXP-3", links=("deepseek-ai/DeepGEMM#87",))
def alpha_ignored(run, memory, rows_RD, counts_E, params, spec):
    """The activation is plain silu, whatever alpha is."""
    return run(rows_RD, counts_E, params, with_experts(spec, alpha=1.0))


@surrounds(breaks="EXP-3", links=("deepseek-ai/DeepGEMM#87",))
def up_offset_ignored(run, memory, rows_RD, counts_E, params, spec):
    """Nothing is added to the up half."""
    return run(rows_RD, counts_E, params, with_experts(spec, up_offset=0.0))


@surrounds(breaks="EXP-3", links=("sgl-project/sglang#39939",))
def clamp_ignored(run, memory, rows_RD, counts_E, params, spec):
    """Nothing is clamped."""
    return run(rows_RD, counts_E, params, with_experts(spec, clamp=None, clamp_at="before"))


@replaces("activated", breaks="EXP-3")
def the_gate_is_clamped_on_both_sides(z_RF, spec):
    """The gate half is clamped from below as well."""
    limit = np.inf if spec.clamp is None else spec.clamp
    return activated(np.maximum(z_RF, -limit), spec)


@replaces("clamped_up", breaks="EXP-3")
def the_up_half_is_clamped_on_one_side(up_RF, spec):
    """The up half is clamped from above alone."""
    limit = np.inf if spec.clamp is None else spec.clamp
    return np.minimum(up_RF, limit) + spec.up_offset


@replaces("clamped_up", breaks="EXP-3")
def the_offset_comes_before_the_clamp(up_RF, spec):
    """The up half is offset, then clamped."""
    limit = np.inf if spec.clamp is None else spec.clamp
    return np.clip(up_RF + spec.up_offset, -limit, limit)


@replaces("activated", breaks="EXP-3")
def the_clamp_is_on_the_other_side_of_the_activation(z_RF, spec):
    """A clamp before the activation is applied after it, and the other way round."""
    if spec.clamp is None:
        return activated(z_RF, spec)
    return activated(z_RF, spec.replace(clamp_at="after" if spec.clamp_at == "before" else "before"))


@surrounds(breaks="EXP-3", links=("sgl-project/sglang#16972",))
def a_single_row_is_plain(run, memory, rows_RD, counts_E, params, spec):
    """A single row takes a path that knows neither alpha nor clamp."""
    if len(rows_RD) == 1:
        spec = with_experts(spec, alpha=1.0, clamp=None, clamp_at="before")
    return run(rows_RD, counts_E, params, spec)


def with_biases(params, **changes):
    """Parameters with changed biases, where there are any: each of `changes` makes a bias of the one that is there."""
    if params.b_down_ED is None:
        return params
    return replace(params, **{name: change(getattr(params, name)) for name, change in changes.items()})


@surrounds(breaks="EXP-4")
def down_bias_missing(run, memory, rows_RD, counts_E, params, spec):
    """The down projection has no bias."""
    return run(rows_RD, counts_E, with_biases(params, b_down_ED=np.zeros_like), spec)


@surrounds(breaks="EXP-4")
def down_bias_twice(run, memory, rows_RD, counts_E, params, spec):
    """The bias of the down projection is added on each of two ranks."""
    return run(rows_RD, counts_E, with_biases(params, b_down_ED=lambda b_ED: 2 * b_ED), spec)


@surrounds(breaks="EXP-4")
def biases_of_the_next_expert(run, memory, rows_RD, counts_E, params, spec):
    """Every row gets the up bias of the next expert."""
    return run(rows_RD, counts_E, with_biases(params, b_up_EF=lambda b_EF: np.roll(b_EF, -1, axis=0)), spec)


@surrounds(breaks="EXP-4")
def one_bias_for_all_experts(run, memory, rows_RD, counts_E, params, spec):
    """The down bias of the first expert is broadcast to all."""
    return run(rows_RD, counts_E, with_biases(params, b_down_ED=lambda b_ED: 0 * b_ED + b_ED[0]), spec)


@surrounds(breaks="EXP-5", links=("huggingface/transformers#47031", "vllm-project/tpu-inference#2683"))
def square_matrices_transposed(run, memory, rows_RD, counts_E, params, spec):
    """A matrix is transposed unless its shape says that it must not be."""
    return run(rows_RD, counts_E, replace(params, w_down_EFD=turned_if_square(params.w_down_EFD)), spec)


@surrounds(breaks="EXP-5", links=("huggingface/transformers#47031", "vllm-project/vllm#47874"))
def square_fused_matrix_transposed(run, memory, rows_RD, counts_E, params, spec):
    """The fused gate and up matrix is transposed where it is square, 2F == D."""
    if params.w_gate_EDF is None:
        return run(rows_RD, counts_E, params, spec)
    layout = WeightLayout(fused="halves")
    fused, w_down = layout.from_canonical(params.w_gate_EDF, params.w_up_EDF, params.w_down_EFD)
    w_gate, w_up, w_down = layout.to_canonical(turned_if_square(fused), w_down)
    return run(rows_RD, counts_E, replace(params, w_gate_EDF=w_gate, w_up_EDF=w_up), spec)


def turned_if_square(w: np.ndarray) -> np.ndarray:
    return np.swapaxes(w, 1, 2) if w.shape[1] == w.shape[2] else w


@surrounds(breaks="EXP-6", links=("openxla/tokamax#1016",))
def experts_after_an_idle_one_move_up(run, memory, rows_RD, counts_E, params, spec):
    """Idle experts are left out of the list of groups, but not of the weights."""
    busy = counts_E > 0
    moved_E = np.concatenate([counts_E[busy], counts_E[~busy]])
    return run(rows_RD, moved_E, params, spec)


@surrounds(breaks="EXP-6")
def the_last_expert_is_never_idle(run, memory, rows_RD, counts_E, params, spec):
    """An idle last expert takes a row of the one before it."""
    moved_E = counts_E.copy()
    if moved_E[-1] == 0 and moved_E[-2] > 0:
        moved_E[-2:] += (-1, 1)
    return run(rows_RD, moved_E, params, spec)


@surrounds(breaks="EXP-7", links=("pytorch/torchtitan#1237", "huggingface/transformers#45621"))
def rows_past_the_counts_weigh_0(run, memory, rows_RD, counts_E, params, spec):
    """Rows past the counts are added to the first row with weight 0."""
    found_RD, N = run(rows_RD, counts_E, params, spec), int(counts_E.sum())
    found_RD[:1] += 0 * rows_RD[N:].sum(axis=0)
    return found_RD


@surrounds(breaks="EXP-7", links=("pytorch/pytorch#193633", "huggingface/transformers#48205"))
def memory_of_the_last_call_is_read(run, memory, rows_RD, counts_E, params, spec):
    """What the last call left past its counts is added with weight 0."""
    found_RD = run(rows_RD, counts_E, params, spec)
    found_RD[:1] += 0 * memory.get("tail", np.zeros_like(rows_RD[:1]))
    if len(rows_RD) > counts_E.sum():
        memory["tail"] = rows_RD[-1:].copy()
    return found_RD


@surrounds(breaks="EXP-7")
def rows_past_the_counts_scale_all(run, memory, rows_RD, counts_E, params, spec):
    """All rows are quantised by one scale, of which those past the counts are a part."""
    largest = np.nanmax(np.abs(rows_RD), initial=1e-30)
    step = largest / 2**24 if len(rows_RD) == counts_E.sum() else largest / 127
    return run(np.round(rows_RD / step) * step, counts_E, params, spec)


@surrounds(breaks="EXP-8")
def a_nan_spreads_over_its_expert(run, memory, rows_RD, counts_E, params, spec):
    """Rows are summed with weight 0, which NaN survives."""
    return run(rows_RD, counts_E, params, spec) + 0 * rows_RD.sum()


@surrounds(breaks="EXP-8")
def rows_share_a_scale(run, memory, rows_RD, counts_E, params, spec):
    """Rows are quantised by the largest of all rows; few rows are too like one another to show it."""
    step = np.nanmax(np.abs(rows_RD), initial=1e-30) / 2**24
    return run(np.round(rows_RD / step) * step, counts_E, params, spec)


@surrounds(breaks="EXP-9", links=("vllm-project/vllm#57471",))
def zero_rows_are_refused(run, memory, rows_RD, counts_E, params, spec):
    """A grouped matmul of nothing is an error."""
    if not len(rows_RD):
        raise RuntimeError("cannot reshape tensor of 0 elements")
    return run(rows_RD, counts_E, params, spec)


@surrounds(breaks="EXP-10", links=("vllm-project/vllm-ascend#16806", "aws-neuron/neuronx-distributed-inference#35"))
def large_experts_saturate(run, memory, rows_RD, counts_E, params, spec):
    """Weights past the range of the common scale saturate."""
    return run(rows_RD, counts_E, replace(params, w_up_EDF=np.clip(params.w_up_EDF, -6, 6)), spec)


@surrounds(breaks="EXP-10", links=("vllm-project/vllm-ascend#16806",))
def small_experts_vanish(run, memory, rows_RD, counts_E, params, spec):
    """Weights below the smallest step of the common scale are 0."""
    w_up_EDF = np.where(np.abs(params.w_up_EDF) < 2.0**-8, 0, params.w_up_EDF)
    return run(rows_RD, counts_E, replace(params, w_up_EDF=w_up_EDF), spec)


@replaces("feed_forward", breaks="EXP-2")
def experts_without_a_gate_are_not_activated(input_RD, weights, spec):
    """An expert without a gate is linear."""
    found = feed_forward(input_RD, weights, spec)
    if spec.gated:
        return found
    return replace(found, output_RD=project(found.up_RF, weights.w_down_FD, weights.b_down_D))


@replaces("clamped_up", breaks="EXP-3")
def the_offset_is_added_twice(up_RF, spec):
    """The up half is offset before and after."""
    return clamped_up(up_RF, spec) + spec.up_offset


@replaces("activation", breaks="EXP-11", links=("ai-dynamo/aiconfigurator#1435", "tenstorrent/tt-metal#53602"))
def silu_for_situ(z_RF, spec):
    """silu stands in the place of situ."""
    return activation(z_RF, spec.replace(activation="silu", beta=1.0, linear_beta=None) if is_situ(spec) else spec)


@replaces("activation", breaks="EXP-11")
def the_sigmoid_sees_the_capped_gate(z_RF, spec):
    """The gate is capped before the sigmoid as well."""
    if not is_situ(spec):
        return activation(z_RF, spec)
    capped_RF = spec.beta * np.tanh(z_RF / spec.beta)
    return capped_RF / (1 + np.exp(-capped_RF))


@replaces("clamped_up", breaks="EXP-11")
def the_up_half_is_not_capped(up_RF, spec):
    """linear_beta is ignored."""
    return clamped_up(up_RF, spec.replace(linear_beta=None))


@surrounds(breaks="EXP-11")
def one_beta_for_both_halves(run, memory, rows_RD, counts_E, params, spec):
    """The up half is capped at beta."""
    if spec.experts.linear_beta is None:
        return run(rows_RD, counts_E, params, spec)
    return run(rows_RD, counts_E, params, with_experts(spec, linear_beta=spec.experts.beta))


def is_situ(spec):
    """Experts whose activation is capped softly."""
    return spec.activation == "situ"


@surrounds(breaks="EXP-12")
def a_full_last_tile_is_left_out(run, memory, rows_RD, tokens_per_expert_E, params, spec):
    """Where every expert has whole tiles, the last one of each is taken for the empty rest."""
    found_RD = run(rows_RD, tokens_per_expert_E, params, spec)
    tile = 8
    if (tokens_per_expert_E % tile).any():
        return found_RD
    past_R = np.arange(len(found_RD))[:, None] - np.cumsum(tokens_per_expert_E)
    return np.where(((past_R < 0) & (past_R >= -tile)).any(axis=1, keepdims=True), 0, found_RD)
