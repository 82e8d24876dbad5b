"""conformance, training: what a page of a failure and a replay show of a case."""

from conformance.core.judge import Judge, NotRun, Violation
from conformance.core.show import numbers, shortened, spec_fields
from conformance.training.case import TrainingCase
from conformance.training.verdicts import name_of, script_of, states_of_subject
from moe_ref import TrainingState


def rows_of_page(case: TrainingCase, token: int | None) -> list[tuple[str, str]]:
    """The layers with their rules and ranks, the script, and the reference's state after each event."""
    stack = case.spec
    rows = []
    for layer, (spec, update) in enumerate(zip(stack.layers, stack.updates, strict=True)):
        router = spec.router
        sizes = f"num_experts={router.num_experts} top_k={router.top_k} score_func={router.score_func}"
        rule = "no update" if update is None else f"update {spec_fields(update)}".rstrip()
        rank = "" if stack.num_ranks == 1 else f", rank {stack.rank_of_layer[layer] if stack.rank_of_layer else 0}"
        rows.append((f"layer {layer}", f"{sizes}, {rule}{rank}"))
    rows += [("layers", "none")] if not stack.layers else []
    rows += [("ranks", str(stack.num_ranks))] if stack.num_ranks > 1 else []
    rows += [("loss", spec_fields(stack.balance))] if stack.balance is not None else []
    rows.append(("script", shortened(script_of(case.events))))
    rows += [(f"wanted {number}", state_text(state)) for number, state in enumerate(case.states)]
    return rows


def state_text(state: TrainingState) -> str:
    """A state on one line."""
    counts, biases = numbers(state.counts_by_layer), numbers(state.bias_by_layer)
    return shortened(f"counts {counts} bias {biases}" + ("" if state.loss is None else f" loss {state.loss:.9g}"))


def side_by_side(judge: Judge, case: TrainingCase, most_tokens: int) -> str:
    """The state after each event, of the reference and of the subject."""
    lines = [f"      {name:<21} {text}" for name, text in rows_of_page(case, None) if not name.startswith("wanted")]
    found: list[TrainingState] = []
    try:
        found = states_of_subject(judge, case)
    except (NotRun, Violation) as error:
        lines.append(f"    {judge.name}: train() returned nothing that can be shown: {error}")
    for number, (event, wanted) in enumerate(zip(case.events, case.states, strict=True)):
        lines.append(f"      {number} {name_of(event)}")
        lines.append(f"      {'':<21} reference {state_text(wanted)}")
        if found:
            lines.append(f"      {'':<21} {judge.name:<9} {state_text(found[number])}")
    return "\n".join(lines)
