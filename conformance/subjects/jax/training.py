"""conformance, subject jax: layers of moe_jax over several steps. Counts and biases are arguments and results."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

import jax
import numpy as np

from conformance.core.subject import Subject
from conformance.subjects.jax.arrays import narrow, narrow_params, on_host
from moe_jax.balance import bias_step, bias_update, tokens_per_expert
from moe_jax.losses import balance_sums, loss_of_sums
from moe_jax.quantile import bias_of_total, total_of
from moe_jax.routing import scale_logits
from moe_jax.sparse_matmul import sparse_matmul
from moe_ref import (
    NO_INPUTS,
    BalanceSpec,
    Event,
    LayerParams,
    LayerSpec,
    QuantileSpec,
    RouterInputs,
    RouterSpec,
    StackSpec,
)

_bias_update = jax.jit(bias_update, static_argnames="spec")
_bias_step = jax.jit(bias_step, static_argnames="spec")
_total_of = jax.jit(total_of, static_argnames=("router", "update"))
_bias_of_total = jax.jit(bias_of_total, static_argnames=("update", "top_k"))


class JaxTraining(Subject):
    """The scripts of training, for the subject of moe_jax."""

    def train(self, events: Sequence[Event], stack: StackSpec, params: list[LayerParams]) -> list[dict]:
        """Pure functions: what a state holds is handed from event to event. There is nothing that a rank has alone."""
        counts, biases, states = [], [], []
        last_steps, totals = [], []
        for event in events:
            loss = None
            if event.kind == "build":
                sizes = [spec.router.num_choices for spec in stack.layers]
                counts = [np.zeros(E, np.int32) for E in sizes]
                given = [own.expert_bias_E for own in params]
                biases = [np.zeros(E) if b is None else b for E, b in zip(sizes, given, strict=True)]
                biases = [on_host(bias_E) for bias_E in biases]
                last_steps, totals = [None] * len(sizes), [0] * len(sizes)
            elif event.kind == "step":
                for layer, (rule, spec) in enumerate(zip(stack.updates, stack.layers, strict=True)):
                    if isinstance(rule, QuantileSpec):
                        if not isinstance(totals[layer], int):
                            bias_E = _bias_of_total(totals[layer], rule, biases[layer], top_k=spec.router.top_k)
                            biases[layer] = np.asarray(bias_E)
                    elif rule is not None:
                        last_E = last_steps[layer]
                        biases[layer] = np.asarray(_bias_update(counts[layer], rule, biases[layer], last_E))
                        last_steps[layer] = _bias_step(counts[layer], rule, last_E) if rule.momentum else None
                totals = [0] * len(totals)
                counts = [np.zeros_like(counts_E) for counts_E in counts]
            else:
                passes = [
                    run_layer(event, layer, stack, replace(params[layer], expert_bias_E=biases[layer]))
                    for layer in range(len(stack.layers))
                ]
                if event.kind == "train":
                    counts = [counts_E + np.asarray(each[0]) for counts_E, each in zip(counts, passes, strict=True)]
                if event.kind == "train" and event.records is None:
                    totals = [
                        total + total_of_pass(each[1], event, spec.router, rule, bias_E)
                        if isinstance(rule, QuantileSpec)
                        else total
                        for total, each, spec, rule, bias_E in zip(
                            totals, passes, stack.layers, stack.updates, biases, strict=True
                        )
                    ]
                if stack.balance is not None:
                    loss = loss_of(passes, event, stack, stack.balance)
            states.append({"counts_by_layer": list(counts), "bias_by_layer": list(biases), "loss": loss})
        return states


def total_of_pass(logits_TE, event: Event, router: RouterSpec, rule: QuantileSpec, expert_bias_E):
    """What a pass adds to the total of a step; its logits are scaled already."""
    unscaled = router.replace(logit_scale=1.0, logit_softcap=None)
    mask_T = np.ones(len(logits_TE), bool) if event.token_mask_T is None else event.token_mask_T
    return _total_of(logits_TE, unscaled, rule, expert_bias_E, mask_T)


def run_layer(event: Event, layer: int, stack: StackSpec, params: LayerParams):
    """Counts, scored logits and ids of a layer, with the choice that the event forces, if any."""
    assert event.x_LTD is not None
    spec, inputs = stack.layers[layer], NO_INPUTS
    if event.records is not None:
        inputs, _ = event.records[layer].inputs(spec.router)
        inputs, spec = inputs.map(narrow), spec.replace(router=spec.router.given())
        params = replace(params, expert_bias_E=None)
    # A mask where none is given: one program less to compile.
    mask_T = np.ones(event.x_LTD.shape[1], bool) if event.token_mask_T is None else event.token_mask_T
    return _pass(
        narrow(event.x_LTD[layer]), narrow_params(params), mask_T, inputs, spec=spec, recomputed=event.recomputed
    )


@partial(jax.jit, static_argnames=("spec", "recomputed"))
def _pass(x_TD, params: LayerParams, token_mask_T, inputs: RouterInputs, *, spec: LayerSpec, recomputed: bool):
    """One program for training and evaluation: a gradient is computed, and the counts are a result beside it."""

    def forward(x_TD):
        output_TD, decided = sparse_matmul(x_TD, params, spec, token_mask_T=token_mask_T, inputs=inputs)
        counts_E = tokens_per_expert(decided.expert_ids_TK, spec.router.num_choices, token_mask_T)
        assert decided.logits_TE is not None
        logits_TE = scale_logits(decided.logits_TE, spec.router)[:, : spec.router.num_choices]
        return output_TD.sum(), (counts_E, logits_TE, decided.expert_ids_TK)

    run = jax.checkpoint(forward) if recomputed else forward
    (_, seen), d_x_TD = jax.value_and_grad(run, has_aux=True)(x_TD)
    return *seen, d_x_TD


def loss_of(passes, event: Event, stack: StackSpec, balance: BalanceSpec) -> float:
    """The sum of the losses of the layers, or that of all their tokens together."""
    sums = [_sums(logits_TE, ids_TK, event.token_mask_T, spec=balance) for _, logits_TE, ids_TK, _ in passes]
    if balance.over_layers == "pooled" and sums:
        sums = [reduce(add, sums)]
    return float(sum(loss_of_sums(each, balance) for each in sums))


@partial(jax.jit, static_argnames="spec")
def _sums(logits_TE, ids_TK, token_mask_T, *, spec: BalanceSpec):
    return balance_sums(logits_TE, ids_TK, spec, token_mask_T=token_mask_T)
