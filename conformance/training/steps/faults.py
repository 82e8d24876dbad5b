"""conformance, training, faults of steps: wrong counts, and biases that move wrongly."""

from dataclasses import replace

import numpy as np

from conformance.core.fault import replaces, surrounds
from moe_ref.balance import bias_update, tokens_per_expert
from moe_ref.training import TrainingState, after, built, counted, pooled_loss, route_layer, stepped

# states and builds


@surrounds(breaks="STP-1", links=("NVIDIA/Megatron-LM#5573", "NVIDIA-NeMo/RL#3523"))
def the_counts_of_layers_are_stacked(run, memory, events, stack, params):
    """All layers have one array of counts, so that layers with other numbers of experts are an error."""
    states = run(events, stack, params)
    if any(event.kind == "step" for event in events):
        np.stack(states[0]["counts_by_layer"])
    return states


@surrounds(breaks="STP-1")
def counts_of_training_are_fractions(run, memory, events, stack, params):
    """Counts are kept in floating point."""
    states = run(events, stack, params)
    return [state | {"counts_by_layer": [c.astype(np.float32) for c in state["counts_by_layer"]]} for state in states]


@replaces("training.after", breaks="STP-2", links=("PrimeIntellect-ai/prime-rl#2953",))
def counts_begin_with_what_the_memory_held(event, before, stack, params, *, dtype=np.float64):
    """New layers have the counts that were in their memory."""
    found = after(event, before, stack, params, dtype=dtype)
    if event.kind != "build" or before is None:
        return found
    return replace(found, counts_by_layer=before.counts_by_layer)


@replaces("training.after", breaks="STP-2")
def biases_begin_with_what_the_memory_held(event, before, stack, params, *, dtype=np.float64):
    """New layers have the biases that were in their memory."""
    found = after(event, before, stack, params, dtype=dtype)
    if event.kind != "build" or before is None:
        return found
    return replace(found, bias_by_layer=before.bias_by_layer)


@replaces("training.built", breaks="STP-2", links=("pytorch/torchtitan#1403",))
def the_bias_of_the_parameters_is_lost(stack, params, dtype):
    """Biases begin at 0, whatever the parameters have."""
    return built(stack, [replace(own, expert_bias_E=None) for own in params], dtype)


# passes


@replaces("training.counted", breaks="STP-3", links=("deepspeedai/DeepSpeed#2559",))
def only_the_first_slot_of_a_pass_is_counted(event, counts_by_layer, choices, stack):
    """Later slots are not counted."""
    first = [replace(choice, expert_ids_TK=choice.expert_ids_TK[:, :1]) for choice in choices]
    return counted(event, counts_by_layer, first, stack)


@replaces("training.counted", breaks="STP-3")
def all_layers_share_one_counter(event, counts_by_layer, choices, stack):
    """A pass adds the slots of all layers of a size to each of them."""
    found = counted(event, counts_by_layer, choices, stack)
    added = [new_E - old_E for new_E, old_E in zip(found, counts_by_layer, strict=True)]
    return [
        old_E + sum(each_E for each_E in added if len(each_E) == len(old_E))
        for old_E in counts_by_layer
    ]  # fmt: skip


@replaces("training.counted", breaks="STP-3")
def layers_are_counted_in_reverse(event, counts_by_layer, choices, stack):
    """The first layer has the counts of the last one, where they have one size."""
    found = counted(event, counts_by_layer, choices, stack)
    return found[::-1] if [len(each) for each in found] == [len(each) for each in found[::-1]] else found


@surrounds(breaks="STP-4", links=("NVIDIA/Megatron-LM#6114", "vllm-project/vllm#38128"))
def padding_is_counted_in_training(run, memory, events, stack, params):
    """The mask does not reach the counters."""
    return run([event if event.recomputed else replace(event, token_mask_T=None) for event in events], stack, params)


@replaces("training.counted", breaks="STP-4", links=("NVIDIA-NeMo/RL#2590",))
def padding_is_counted_for_expert_0(event, counts_by_layer, choices, stack):
    """A padding token takes part with expert 0."""
    found = counted(event, counts_by_layer, choices, stack)
    if event.kind == "train" and event.token_mask_T is not None:
        padding = int((~event.token_mask_T).sum())
        found = [counts_E + padding * (np.arange(len(counts_E)) == 0) for counts_E in found]
    return found


@replaces("training.counted", breaks="STP-5", links=("pytorch/torchtitan#4148", "databricks/megablocks#69"))
def evaluation_is_counted(event, counts_by_layer, choices, stack):
    """A pass counts whether it is one of training or of evaluation."""
    return counted(replace(event, kind="train"), counts_by_layer, choices, stack)


@replaces("training.counted", breaks="STP-5")
def evaluation_clears_the_counts(event, counts_by_layer, choices, stack):
    """A pass in evaluation sets the counts to 0."""
    found = counted(event, counts_by_layer, choices, stack)
    return [0 * counts_E for counts_E in found] if event.kind == "evaluate" else found


@replaces("training.after", breaks="STP-5", links=("pytorch/torchtitan#4412",))
def evaluation_moves_the_bias(event, before, stack, params, *, dtype=np.float64):
    """A pass in evaluation moves the biases by the counts so far, and leaves these."""
    found = after(event, before, stack, params, dtype=dtype)
    moved = event.kind == "evaluate"
    return replace(found, bias_by_layer=stepped(before, stack, dtype).bias_by_layer) if moved else found


@replaces("training.counted", breaks="STP-6", links=("pytorch/torchtitan#1593",))
def a_recomputed_pass_is_counted_again(event, counts_by_layer, choices, stack):
    """The forward pass that the backward pass runs again counts its tokens again."""
    found = counted(event, counts_by_layer, choices, stack)
    return counted(event, found, choices, stack) if event.recomputed else found


@replaces("training.counted", breaks="STP-6", links=("pytorch/torchtitan#1593",))
def counts_of_a_recomputed_pass_are_halved(event, counts_by_layer, choices, stack):
    """Counts are divided by 2 with recomputation, though it counts nothing again."""
    found = counted(event, counts_by_layer, choices, stack)
    return [counts_E // 2 for counts_E in found] if event.recomputed else found


@replaces("training.counted", breaks="STP-7")
def the_last_micro_batch_alone_is_counted(event, counts_by_layer, choices, stack):
    """A training pass replaces the counts of the one before."""
    zeros = [np.zeros_like(counts_E) for counts_E in counts_by_layer]
    return counted(event, zeros if event.kind == "train" else counts_by_layer, choices, stack)


@replaces("training.after", breaks="STP-7", links=("pytorch/torchtitan#1304",))
def the_bias_moves_at_every_micro_batch(event, before, stack, params, *, dtype=np.float64):
    """A training pass moves the biases by the counts so far, besides the step."""
    found = after(event, before, stack, params, dtype=dtype)
    moved = event.kind == "train"
    return replace(found, bias_by_layer=stepped(found, stack, dtype).bias_by_layer) if moved else found


# steps


def moved_as(before: TrainingState, stack, dtype, layers, counts_by_layer=None, updates=None) -> TrainingState:
    """A step that moves these layers alone, by other counts or rules where they are given."""
    updates = stack.updates if updates is None else updates
    found = stepped(
        replace(before, counts_by_layer=counts_by_layer or before.counts_by_layer),
        stack.replace(updates=tuple(updates)),
        dtype,
    )
    biases = [
        new_E if layer in layers else old_E
        for layer, (new_E, old_E) in enumerate(zip(found.bias_by_layer, before.bias_by_layer, strict=True))
    ]
    return replace(found, bias_by_layer=biases)


@replaces("training.stepped", breaks="STP-8", links=("pytorch/torchtitan#4494",))
def the_hook_misses_the_last_layer(before, stack, dtype):
    """The last of several layers, as that of multi-token prediction, is no layer of the hook."""
    return moved_as(before, stack, dtype, range(max(1, len(stack.layers) - 1)))


@replaces("training.stepped", breaks="STP-8")
def one_layer_moves_all(before, stack, dtype):
    """The counts of the first layer move every layer of its size."""
    counts = before.counts_by_layer
    own = [counts[0] if len(counts_E) == len(counts[0]) else counts_E for counts_E in counts]
    return moved_as(before, stack, dtype, range(len(counts)), own)


@replaces("training.stepped", breaks="STP-8")
def layers_move_by_the_sum_of_their_counts(before, stack, dtype):
    """The counts of all layers of a size are summed before the biases move."""
    counts = before.counts_by_layer
    sums = [sum(each_E for each_E in counts if len(each_E) == len(counts_E)) for counts_E in counts]
    return moved_as(before, stack, dtype, range(len(counts)), sums)


@replaces("training.stepped", breaks="STP-8")
def the_rule_of_the_first_layer_is_that_of_all(before, stack, dtype):
    """Every layer moves by the rule of the first one."""
    rules = [None if rule is None else stack.updates[0] for rule in stack.updates]
    return moved_as(before, stack, dtype, range(len(rules)), updates=rules)


@replaces("training.stepped", breaks="STP-9", links=("pytorch/torchtitan#3686",))
def the_hook_ends_at_a_layer_without_an_update(before, stack, dtype):
    """The first layer without an update ends the loop: those after it neither move nor are set to 0."""
    end = stack.updates.index(None) if None in stack.updates else len(stack.updates)
    found = moved_as(before, stack, dtype, range(end))
    return replace(found, counts_by_layer=found.counts_by_layer[:end] + before.counts_by_layer[end:])


@replaces("training.stepped", breaks="STP-9")
def a_layer_without_an_update_moves_too(before, stack, dtype):
    """A layer without an update has that of another one."""
    other = next((rule for rule in stack.updates if rule is not None), None)
    rules = [rule or other for rule in stack.updates]
    return moved_as(before, stack, dtype, range(len(rules)), updates=rules)


@replaces("training.reset", breaks="STP-10", links=("PrimeIntellect-ai/prime-rl#2267",))
def counts_are_never_cleared(counts_by_layer):
    """The counts of all steps add up."""
    return counts_by_layer


@replaces("training.stepped", breaks="STP-10", links=("pytorch/torchtitan#3686",))
def a_layer_without_an_update_counts_on(before, stack, dtype):
    """A step leaves the counts of a layer without an update."""
    found = stepped(before, stack, dtype)
    pairs = zip(stack.updates, found.counts_by_layer, before.counts_by_layer, strict=True)
    return replace(found, counts_by_layer=[old if rule is None else new for rule, new, old in pairs])


@replaces("training.route_layer", breaks="STP-11")
def the_router_keeps_the_first_bias(event, layer, stack, params, expert_bias_E, dtype):
    """The router chooses with a copy of the bias that it was built with, as a compiled constant is."""
    first_E = params[layer].expert_bias_E
    return route_layer(event, layer, stack, params, 0 * expert_bias_E if first_E is None else first_E, dtype)


@replaces("training.stepped", breaks="STP-12")
def a_step_without_tokens_divides_by_0(before, stack, dtype):
    """A relative step divides by the tokens of its layer, also where there are none."""
    found = stepped(before, stack, dtype)
    triples = zip(found.bias_by_layer, stack.updates, before.counts_by_layer, strict=True)
    return replace(
        found,
        bias_by_layer=[
            bias_E * np.nan if rule is not None and not counts_E.any() else bias_E for bias_E, rule, counts_E in triples
        ],
    )


@replaces("training.stepped", breaks="STP-12")
def an_empty_layer_is_below_the_mean_of_all(before, stack, dtype):
    """The mean is over all layers, so that every expert of a layer without a token is below it."""
    found = stepped(before, stack, dtype)
    some = any(counts_E.any() for counts_E in before.counts_by_layer)
    triples = zip(found.bias_by_layer, stack.updates, before.counts_by_layer, strict=True)
    return replace(
        found,
        bias_by_layer=[
            bias_E + rule.rate if some and rule is not None and not counts_E.any() else bias_E
            for bias_E, rule, counts_E in triples
        ],
    )


# layers and ranks


@surrounds(breaks="STP-13")
def the_counts_of_no_layer_are_joined(run, memory, events, stack, params):
    """All counts are joined in one array, which there is none of without a layer."""
    states = run(events, stack, params)
    if len({event.kind for event in events} & {"step"}):
        np.concatenate(states[0]["counts_by_layer"])
    return states


@replaces("training.stepped", breaks="STP-14")
def the_first_rank_alone_has_a_hook(before, stack, dtype):
    """Layers of the other pipeline ranks neither move nor are set to 0."""
    own, found = stack.layers_of(0), moved_as(before, stack, dtype, stack.layers_of(0))
    pairs = enumerate(zip(found.counts_by_layer, before.counts_by_layer, strict=True))
    return replace(found, counts_by_layer=[new if layer in own else old for layer, (new, old) in pairs])


@surrounds(breaks="STP-14", links=("pytorch/torchtitan#1593",))
def a_rank_without_layers_raises(run, memory, events, stack, params):
    """The hook of a rank without a layer stacks the counts of none."""
    found = run(events, stack, params)
    for rank in range(stack.num_ranks if stack.layers and any(event.kind == "step" for event in events) else 0):
        np.concatenate([found[0]["counts_by_layer"][layer] for layer in stack.layers_of(rank)])
    return found


@surrounds(breaks="STP-14")
def layers_come_back_in_the_order_of_ranks(run, memory, events, stack, params):
    """The states of the layers of rank 0 come first, whatever the order of the model."""
    order = [layer for rank in range(stack.num_ranks) for layer in stack.layers_of(rank)]
    sizes = [spec.router.num_choices for spec in stack.layers]
    if [sizes[layer] for layer in order] != sizes:
        return run(events, stack, params)
    names = ("counts_by_layer", "bias_by_layer")
    return [
        state | {name: [state[name][layer] for layer in order] for name in names}
        for state in run(events, stack, params)
    ]


# the loss


def one_size(stack) -> bool:
    """Whether the layers can be pooled."""
    return len({(spec.router.num_choices, spec.router.top_k) for spec in stack.layers}) == 1


@replaces("training.pooled_loss", breaks="STP-15", links=("huggingface/transformers#28255",))
def layers_are_always_pooled(event, choices, stack, dtype):
    """The tokens of all layers are one batch, also where each has a loss of its own."""
    if stack.balance is None or not one_size(stack):
        return pooled_loss(event, choices, stack, dtype)
    return pooled_loss(event, choices, stack.replace(balance=stack.balance.replace(over_layers="pooled")), dtype)


@replaces("training.pooled_loss", breaks="STP-15")
def layers_are_never_pooled(event, choices, stack, dtype):
    """Each layer has a loss of its own, also where the tokens of all are one batch."""
    balance = None if stack.balance is None else stack.balance.replace(over_layers="separate")
    return pooled_loss(event, choices, stack.replace(balance=balance), dtype)


@replaces("training.pooled_loss", breaks="STP-15")
def losses_of_layers_are_averaged(event, choices, stack, dtype):
    """The sum over layers is divided by their number."""
    loss = pooled_loss(event, choices, stack, dtype)
    if loss is None or stack.balance.over_layers == "pooled":
        return loss
    return loss / max(1, len(stack.layers))


@replaces("training.pooled_loss", breaks="STP-15")
def evaluation_has_no_loss(event, choices, stack, dtype):
    """The loss of a pass in evaluation is 0."""
    loss = pooled_loss(event, choices, stack, dtype)
    return 0.0 if loss is not None and event.kind == "evaluate" else loss


# replay


@surrounds(breaks="STP-16")
def the_routers_own_choice_is_counted(run, memory, events, stack, params):
    """Where a choice is forced the counters see the one that the router would have made."""
    return run([replace(event, records=None) for event in events], stack, params)


@replaces("training.counted", breaks="STP-16")
def forced_choices_are_not_counted(event, counts_by_layer, choices, stack):
    """A pass with a forced choice counts nothing."""
    return counts_by_layer if event.records is not None else counted(event, counts_by_layer, choices, stack)


@replaces("training.counted", breaks="STP-16", links=("NVIDIA-NeMo/RL#2590", "verl-project/verl#7524"))
def an_unused_slot_of_a_record_counts_for_expert_0(event, counts_by_layer, choices, stack):
    """An id of -1 in a record is read as 0."""
    found = counted(event, counts_by_layer, choices, stack)
    if event.kind != "train" or event.records is None:
        return found
    unused = [np.where(choice.expert_ids_TK < 0, 0, -1) for choice in choices]
    return [c + tokens_per_expert(ids, len(c), event.token_mask_T) for c, ids in zip(found, unused, strict=True)]


@surrounds(breaks="STP-16")
def a_recomputed_pass_forgets_the_record(run, memory, events, stack, params):
    """The pass that the backward pass runs again asks the router, and that one is counted."""
    return run([replace(event, records=None) if event.recomputed else event for event in events], stack, params)


@replaces("training.train", breaks="STP-17", links=("PrimeIntellect-ai/prime-rl#2953",))
def no_bias_moves_under_replay(events, stack, params, *, dtype=np.float64):
    """A step after a forced choice moves no bias, since the choice did not ask it."""
    states, forced = [], False
    for event in events:
        frozen = event.kind == "step" and forced
        how = stack.replace(updates=(None,) * len(stack.layers)) if frozen else stack
        states.append(after(event, states[-1] if states else None, how, params, dtype=dtype))
        if event.kind != "evaluate":
            forced = event.kind == "train" and (forced or event.records is not None)
    return states


@replaces("training.stepped", breaks="STP-17")
def biases_move_by_signs_of_whole_batches(before, stack, dtype):
    """A layer of which not every token has all its slots, as under replay, is taken for one without tokens."""
    biases = [
        bias_E
        if rule is None or counts_E.sum() % spec.router.top_k
        else bias_update(counts_E, rule, bias_E).astype(dtype)
        for bias_E, rule, counts_E, spec in zip(
            before.bias_by_layer, stack.updates, before.counts_by_layer, stack.layers, strict=True
        )
    ]
    return replace(stepped(before, stack, dtype), bias_by_layer=biases)


# together


@surrounds(breaks="STP-18")
def a_recomputed_pass_forgets_the_mask(run, memory, events, stack, params):
    """The pass that the backward pass runs again sees padding tokens as valid, and that one is counted."""
    return run([replace(event, token_mask_T=None) if event.recomputed else event for event in events], stack, params)
