"""conformance, layer: experts. Rows sorted by expert become rows.

Legend: N used rows, R rows, those past the counts too, D model dim, E experts.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from conformance.core.case import float32
from conformance.core.check import given
from conformance.core.holding import hold
from conformance.core.judge import Judge
from conformance.core.show import spec_fields
from conformance.layer.case import LayerCase
from conformance.layer.draw import ALIGNS
from conformance.layer.kind import requires
from conformance.layer.verdicts import hold_experts, radius_of_experts, rows_of_subject
from moe_ref import LayerSpec, align_rows, pad_rows, run_experts, unpad_rows

PLAIN = ("EXP-1", "EXP-2")
FORMS = (*PLAIN, "EXP-3", "EXP-4", "EXP-5", "EXP-11")
"""Where one of these fails on the same case, its formula, biases or layout are wrong, not what a check varies."""
NUM_ROWS = 9
TAIL = 3
"""Rows past the counts."""


def has_a_formula(spec: LayerSpec) -> bool:
    """Experts with an alpha, an offset or a clamp."""
    e = spec.experts
    return e.alpha != 1 or e.up_offset != 0 or e.clamp is not None


def is_plain(spec: LayerSpec) -> bool:
    """Experts without these, without biases, and with an activation of one argument."""
    return not has_a_formula(spec) and not spec.experts.bias and not is_situ(spec)


def is_situ(spec: LayerSpec) -> bool:
    """Experts whose activation is capped softly."""
    return spec.experts.activation == "situ"


def is_square(spec: LayerSpec) -> bool:
    """Experts whose matrices fit in another layout as well."""
    return spec.experts.hidden_dim in (spec.routed_experts.dim, spec.routed_experts.dim / 2)


HAS_ROWS = given("judged with rows", lambda case: len(case.reference.experts.input_RD) > 0)


def rows_of(case: LayerCase) -> tuple[np.ndarray, np.ndarray]:
    """The rows (N, D) that the experts of this layer see, and their counts (E,)."""
    trace = case.reference
    return float32(trace.experts.input_RD), trace.permutation.tokens_per_expert_E


def any_rows(case: LayerCase, counts_E: np.ndarray) -> np.ndarray:
    """(N, D) random rows for these counts."""
    return float32(case.rng().normal(size=(int(np.sum(counts_E)), case.spec.routed_experts.dim)))


def without_biases(case: LayerCase) -> LayerCase:
    """The same experts without biases."""
    params = replace(case.params, b_up_EF=None, b_gate_EF=None, b_down_ED=None)
    return case.with_(spec=case.spec.replace(experts=case.spec.experts.replace(bias=False)), params=params)


def without_a_formula(case: LayerCase) -> LayerCase:
    """The same experts without alpha, offset and clamp."""
    plainer = {"alpha": 1.0, "up_offset": 0.0, "clamp": None, "clamp_at": "before"}
    return case.with_(spec=case.spec.replace(experts=case.spec.experts.replace(**plainer)))


def plainest(case: LayerCase) -> LayerCase:
    """The same experts without any of this."""
    return without_biases(without_a_formula(case))


def where_supported(judge: Judge, case: LayerCase, simplify: Callable[[LayerCase], LayerCase]) -> LayerCase:
    """The simplified case, where the subject supports it; else the case as it is."""
    found = simplify(case)
    return found if judge.subject.supports_layer(found.spec) is None else case


@requires("EXP-1", method="experts")
def experts_run_and_return_one_output_for_each_row(judge, case):
    rows_of_subject(judge, case, *rows_of(case))


@requires(
    "EXP-2",
    large=1,
    method="experts",
    spec=lambda s: is_plain(s) and not is_square(s),
    after=("EXP-1",),
    tokens=(7, 1, 11),
)
def a_row_is_the_feed_forward_of_its_expert(judge, case):
    hold_experts(judge, case, *rows_of(case), "not down(act(gate) * up)")


@requires(
    "EXP-3",
    large=1,
    method="experts",
    spec=has_a_formula,
    x=("normal", "large", "small"),
    after=(*PLAIN, "EXP-11"),
    simpler=((plainest, ("EXP-2",)),),
)
def alpha_offset_and_clamp_apply_to_every_row(judge, case):
    e, unbiased = case.spec.experts, where_supported(judge, case, without_biases)
    title = f"not alpha={e.alpha:g}, up_offset={e.up_offset:g}, clamp={e.clamp} {e.clamp_at} the activation"
    rows_ND, counts_E = rows_of(unbiased)
    hold_experts(judge, unbiased, rows_ND, counts_E, title)
    if len(rows_ND):
        first = np.flatnonzero(counts_E)[0]
        only = (np.arange(len(counts_E)) == first).astype(counts_E.dtype)
        hold_experts(judge, unbiased, rows_ND[:1], only, f"{title}, a single row")


@requires(
    "EXP-4",
    large=1,
    method="experts",
    spec=lambda s: s.experts.bias,
    after=(*PLAIN, "EXP-3", "EXP-5", "EXP-11"),
    simpler=((plainest, ("EXP-2",)),),
)
def each_row_gets_the_biases_of_its_expert_once(judge, case):
    biased = where_supported(judge, case, without_a_formula)
    hold_experts(judge, biased, *rows_of(biased), "not with its expert's biases")


@requires("EXP-5", large=1, method="experts", spec=is_square, after=PLAIN)
def square_matrices_are_read_in_their_own_layout(judge, case):
    e, unbiased = case.spec.experts, where_supported(judge, case, without_biases)
    hold_experts(judge, unbiased, *rows_of(unbiased), f"dim {case.spec.routed_experts.dim}, hidden_dim {e.hidden_dim}")


@requires("EXP-6", method="experts", after=FORMS, bias=("none",), tokens=(1,))
def an_expert_without_rows_changes_nothing(judge, case):
    rng, E = case.rng(), case.spec.router.num_experts
    first, last, odd = (np.arange(E) > 0, np.arange(E) < E - 1, np.arange(E) % 2 == 1)
    for busy_E in (np.arange(E) == rng.integers(E), first, last, odd):
        counts_E = rng.multinomial(NUM_ROWS, busy_E / busy_E.sum())
        rows_ND, plainer = any_rows(case, counts_E), where_supported(judge, case, plainest)
        hold_experts(judge, plainer, rows_ND, counts_E, f"with counts {counts_E.tolist()}")


@requires("EXP-7", large=2, method="experts", after=FORMS, bias=("none", "crowded"))
def rows_past_the_counts_belong_to_nobody(judge, case):
    rows_ND, counts_E = rows_of(case)
    for poison in (np.nan, 1e30, np.nan):
        rows_RD = np.concatenate([rows_ND, np.full((TAIL, rows_ND.shape[1]), poison)])
        hold_experts(judge, case, rows_RD, counts_E, f"with {poison:g} past the counts")


@requires("EXP-8", method="experts", given=(HAS_ROWS,), after=FORMS, bias=("none",), tokens=(7,))
def a_row_depends_on_that_row_alone(judge, case):
    rows_ND, counts_E = rows_of(case)
    radius_ND = radius_of_experts(judge, case, rows_ND, counts_E)
    alone_ND = rows_of_subject(judge, case, rows_ND, counts_E)
    row = int(case.rng().integers(len(rows_ND)))
    others = np.arange(len(rows_ND)) != row
    for poison in (np.nan, 1e30, -3.0):
        changed_ND = np.where(others[:, None], rows_ND, poison)
        found_ND = rows_of_subject(judge, case, changed_ND, counts_E)
        title = f"changed by {poison:g} in row {row}"
        hold(title, found_ND, alone_ND, 2 * radius_ND, rows=others, label=lambda row: f"row {row}")


@requires("EXP-9", method="experts", tokens=(1,), bias=("none",))
def zero_rows_give_zero_outputs(judge, case):
    counts_E = np.zeros(case.spec.router.num_experts, dtype=np.int64)
    # Without any row, and with rows that all are past the counts.
    for rows in (0, TAIL):
        rows_of_subject(judge, case, np.full((rows, case.spec.routed_experts.dim), np.nan), counts_E)


@requires("EXP-10", method="experts", after=FORMS)
def experts_of_any_size_are_exact(judge, case):
    sizes_E = 10.0 ** case.rng().integers(-2, 3, case.spec.router.num_experts)
    scaled = {
        name: float32(value * sizes_E.reshape(-1, *[1] * (value.ndim - 1)))
        for name, value in case.params.by_name().items()
        if name.startswith(("w_", "b_"))
    }
    changed = case.with_params(**scaled)
    hold_experts(judge, changed, *rows_of(changed), f"with experts of sizes {sizes_E.tolist()}")


@requires("EXP-11", method="experts", spec=is_situ, x=("normal", "large", "small"), after=PLAIN)
def situ_caps_both_halves_softly(judge, case):
    e, plainer = case.spec.experts, where_supported(judge, case, plainest)
    title = f"not beta * tanh(gate / beta) * sigmoid(gate) with beta={e.beta:g}, linear_beta={e.linear_beta}"
    hold_experts(judge, plainer, *rows_of(plainer), title)


@requires("EXP-12", method="experts", after=FORMS, bias=("none", "crowded"), few=True)
def rows_of_zeros_that_align_change_nothing(judge, case):
    rows_ND, counts_E = rows_of(case)
    owner_N, radius_ND = (
        np.repeat(np.arange(len(counts_E)), counts_E),
        radius_of_experts(judge, case, rows_ND, counts_E),
    )
    wanted_ND = run_experts(rows_ND, counts_E, case.params, case.spec.experts).output_RD
    for align in ALIGNS[: 1 if judge.subject.compiles else None]:
        rows = align_rows(case.reference.permutation, align)
        padded_AD = rows_of_subject(judge, case, pad_rows(rows_ND, rows), rows.rows_per_expert_E)
        title = f"changed by padding with {spec_fields(align)}"
        found_ND = unpad_rows(padded_AD, rows)
        hold(title, found_ND, wanted_ND, radius_ND, label=lambda row: f"row {row}, of expert {owner_N[row]}")
