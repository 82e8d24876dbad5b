"""conformance, training, faults of steps: what quantile balancing observes, and what momentum goes on from."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.training import TrainingState, after, observed, stepped


@replaces("training.observed", breaks="STP-19", links=("pytorch/torchtitan#4412",))
def evaluation_is_observed(event, before, choices, stack):
    """A pass in evaluation adds what its tokens need."""
    return observed(replace(event, kind="train"), before, choices, stack)


@replaces("training.observed", breaks="STP-19")
def a_recomputed_pass_is_observed_again(event, before, choices, stack):
    """The pass that the backward pass runs again adds its needs again."""
    found = observed(event, before, choices, stack)
    return observed(event, replace(before, needs_by_layer=found), choices, stack) if event.recomputed else found


@replaces("training.observed", breaks="STP-19")
def the_last_micro_batch_alone_is_observed(event, before, choices, stack):
    """A training pass replaces what the one before needed."""
    return [each[-1:] for each in observed(event, before, choices, stack)]


@replaces("training.observed", breaks="STP-19")
def padding_is_observed(event, before, choices, stack):
    """The mask does not reach the needs."""
    return observed(replace(event, token_mask_T=None), before, choices, stack)


@replaces("training.observed", breaks="STP-19")
def forced_choices_are_observed(event, before, choices, stack):
    """A pass with a forced choice adds what its tokens would have needed."""
    return observed(replace(event, records=None), before, choices, stack)


@replaces("training.after", breaks="STP-19")
def needs_are_kept_after_a_step(event, before, stack, params, *, dtype=np.float64):
    """A step does not begin to observe anew."""
    found = after(event, before, stack, params, dtype=dtype)
    return replace(found, needs_by_layer=before.needs_by_layer) if event.kind == "step" and before else found


@surrounds(breaks="STP-19", links=("NVIDIA/Megatron-LM#5349",))
def quantiles_of_micro_batches_are_averaged(run, memory, events, stack, params):
    """Each micro-batch has a quantile of its own, and a step takes their mean."""
    rules = [
        rule.replace(bins=None, over="batches") if hasattr(rule, "bins") and rule.bins else rule
        for rule in stack.updates
    ]
    return run(events, stack.replace(updates=tuple(rules)), params)


@replaces("training.stepped", breaks="STP-20")
def a_step_forgets_the_last_one(before: TrainingState, stack, dtype):
    """Every step is the first one for momentum."""
    zeros = [np.zeros_like(last_E) for last_E in before.last_step_by_layer]
    return stepped(replace(before, last_step_by_layer=zeros), stack, dtype)


@replaces("training.after", breaks="STP-20")
def momentum_survives_a_build(event, before, stack, params, *, dtype=np.float64):
    """New layers go on from the last step of the old ones."""
    found = after(event, before, stack, params, dtype=dtype)
    return replace(found, last_step_by_layer=before.last_step_by_layer) if event.kind == "build" and before else found
