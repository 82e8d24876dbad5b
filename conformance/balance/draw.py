"""conformance, balance: what is generated. Rules from a pool, routed batches, counts, sequences, shards and padding.

Scores and weights stand clear of each other, so that what is counted and what is dropped is beyond doubt.

Legend: T tokens, E experts, K top_k, S ranks or micro-batches of one step, Z null experts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from conformance.balance.case import RULES, BalanceCase, BatchSpec
from conformance.balance.check import BalanceCheck
from conformance.core.case import float32
from conformance.core.chosen import pool_of
from conformance.core.drawing import one_of
from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from moe_ref import (
    BALANCE_FORMS,
    SMEBU,
    UNUSED,
    BalanceSpec,
    BiasUpdateSpec,
    CapacitySpec,
    QuantileSpec,
    RouterSpec,
    SparsitySpec,
)
from moe_ref.specs.balance import RUNNING_SCOPES

SIGMOID = {"score_func": "sigmoid", "norm_scores": True}
BALANCES = (
    *(BalanceSpec.of(form) for form in BALANCE_FORMS),
    BalanceSpec(coeff=0.01, **SIGMOID, score_eps=1e-20),
    BalanceSpec(score_func="sigmoid"),
    BalanceSpec(score_func="sqrtsoftplus", counts_over="tokens"),
    BalanceSpec(score_func="sqrtsoftplus", norm_scores=True, score_eps=1e-20, counts="unbiased", coeff=0.5),
    BalanceSpec(counts="unbiased", **SIGMOID, scope="local"),
    BalanceSpec(per="sequence", scope="local", coeff=0.25),
    BalanceSpec(expert_power=0, coeff=2.0),
    BalanceSpec(counted_slots=2, counts="unbiased"),
    BalanceSpec.of("megatron_global_aux", **SIGMOID, score_eps=1e-20),
    BalanceSpec.of("remoe", target_top_k=1, scope="global", coeff=0.5),
)
UPDATES = (
    BiasUpdateSpec(),
    BiasUpdateSpec(centred=True),
    BiasUpdateSpec(rate=0.01, frozen_E=(True, False, False, True, False)),
    BiasUpdateSpec(rule="proportional", rate=1e-4),
    BiasUpdateSpec(rule="relative", rate=0.01),
    BiasUpdateSpec(rule="relative", rate=0.01, centred=True),
    BiasUpdateSpec(rule="proportional", rate=1e-4, centred=True, frozen_E=(False, True, False, False, False)),
    BiasUpdateSpec(centred=True, frozen_E=(False, False, False, False, True)),
    BiasUpdateSpec(**SMEBU),
    BiasUpdateSpec(rule="tanh", rate=0.25, steepness=0.5),
    BiasUpdateSpec(rule="share", rate=0.5, wanted_share=0.75, frozen_E=(False, False, False, True, True)),
    BiasUpdateSpec(rule="share", rate=0.5),
)
CAPACITIES = (
    CapacitySpec(factor=1.0),
    CapacitySpec(factor=1.25, rounding="floor"),
    CapacitySpec(factor=1.1, rounding="ceil_then_floor"),
    CapacitySpec(factor=0.5),
    CapacitySpec(factor=16.0),
    CapacitySpec(slots=2),
    CapacitySpec(factor=0.1, min_slots=2),
    CapacitySpec(factor=1.0, scope="sequence"),
    CapacitySpec(factor=1.0, scope="rank", rounding="floor"),
    CapacitySpec(factor=0.75, drop_order="slot_major"),
    CapacitySpec(factor=0.75, drop_order="by_weight"),
    CapacitySpec(factor=0.75, drop_order="by_weight", renormalise="after"),
    CapacitySpec(factor=0.5, drop_order="by_best_weight", renormalise="before"),
    CapacitySpec(factor=0.75, drop_order="by_best_weight", scope="sequence"),
    CapacitySpec(factor=0.75, renormalise="before"),
    CapacitySpec(factor=0.5, renormalise="after", weight_sum=2.5),
    CapacitySpec(factor=0.75, drop_order="slot_major", scope="sequence", renormalise="after"),
    CapacitySpec(factor=1.0, pad_to_capacity=True),
    CapacitySpec(factor=16.0, pad_to_capacity=True),
    CapacitySpec(factor=0.75, pad_to_capacity=True, drop_order="slot_major"),
    CapacitySpec(factor=0.75, pad_to_capacity=True, drop_order="by_weight", scope="rank"),
    CapacitySpec(factor=1.5, scope="rank", then=CapacitySpec(factor=0.75)),
    CapacitySpec(factor=1.0, scope="sequence", then=CapacitySpec(factor=0.75, renormalise="after")),
)
ROUTED = (
    (BalanceSpec(), RouterSpec(num_experts=5, top_k=2, logit_scale=0.5, logit_softcap=1.5, score_func="sigmoid")),
    (BalanceSpec(), RouterSpec(num_experts=6, top_k=3, score_over="selected", select_by="logit", route_scale=2.5)),
    (
        BalanceSpec(**SIGMOID, score_eps=1e-20),
        RouterSpec(num_experts=8, top_k=3, score_func="sigmoid", num_expert_groups=4, num_limited_groups=2,
                   route_norm=True, route_scale=2.5),
    ),
    (BalanceSpec.of("transformers"), RouterSpec(num_experts=6, top_k=2, num_expert_groups=3, num_limited_groups=2)),
    (BalanceSpec(score_func="sigmoid"), RouterSpec(num_experts=5, top_k=2, route_norm=True, logit_scale=1.5)),
    (BalanceSpec(), RouterSpec(num_experts=5, top_k=2, route_scale=2.5)),
)  # fmt: skip
"""Losses of routers that group, scale, cap, norm, or score as the loss does not."""
KIMI_K3, MEGATRON = QuantileSpec.of("kimi_k3"), QuantileSpec.of("megatron")
QUANTILES = (
    (QuantileSpec(), RouterSpec(num_experts=5, top_k=2, score_func="sigmoid")),
    (KIMI_K3, RouterSpec(num_experts=5, top_k=2, score_func="sigmoid")),
    (MEGATRON, RouterSpec(num_experts=5, top_k=2, select_by="logit")),
    (QuantileSpec(), RouterSpec(num_experts=7, top_k=3, route_norm=True, route_scale=2.5)),
    (QuantileSpec(centred=False), RouterSpec(num_experts=5, top_k=1, score_func="sigmoid", select_by="logit")),
    (QuantileSpec(keep=0.25), RouterSpec(num_experts=7, top_k=3, score_func="sqrtsoftplus")),
    (QuantileSpec(bins=16, keep=0.25), RouterSpec(num_experts=7, top_k=3, logit_scale=0.5)),
    (MEGATRON.replace(keep=0.75), RouterSpec(num_experts=5, top_k=2, select_by="logit")),
    (KIMI_K3, RouterSpec(num_experts=64, top_k=8, score_func="sigmoid")),
    (
        QuantileSpec.of("dynamic", target_top_k=2),
        RouterSpec(num_experts=5, top_k=5, score_func="sigmoid", selector="threshold"),
    ),
    (
        QuantileSpec(over="batches", centred=False, target_top_k=1),
        RouterSpec(num_experts=7, top_k=3, select_by="logit", selector="threshold", threshold=0.25),
    ),
)
"""Quantile balancing, each with a router of a size; a pool, bins and batches first."""
SPARSITIES = (SparsitySpec(target_top_k=1), SparsitySpec(target_top_k=2), SparsitySpec(target_top_k=3, factor=2.5))
WIDE = {(33, 6): 257, (64, 8): 1025, (129, 9): 257, (257, 8): 257}
"""(E, K), and how many tokens a case of it has: past the tables, bytes and tiles of small sizes."""
SIZES = ((5, 2), (7, 3), (5, 1), (8, 4))
"""(E, K); mostly primes, so that no axis fits another."""


def _pool() -> list[BatchSpec]:
    """Rules on batches of several sizes; the plainest first."""
    found = [
        BatchSpec(num_experts=E, top_k=K, coeff=coeff) for (E, K), coeff in zip(SIZES, (1, 0.1, 0.5, 2), strict=True)
    ]
    found += [BatchSpec(num_experts=E, top_k=K, num_null_experts=Z) for E, K, Z in ((3, 3, 3), (5, 2, 1))]
    for number, rule in enumerate(BALANCES):
        E, K = SIZES[number % 2]
        found += [BatchSpec(num_experts=E, top_k=K, balance=rule)]
        found += [BatchSpec(num_experts=5, top_k=1, balance=rule)] if rule.counted_slots is None else []
    found += [BatchSpec(num_experts=5, top_k=2, update=rule) for rule in UPDATES]
    for number, rule in enumerate(CAPACITIES):
        E, K = SIZES[number % 4]
        found += [BatchSpec(num_experts=E, top_k=K, capacity=rule), BatchSpec(num_experts=5, top_k=3, capacity=rule)]
    found += [BatchSpec(num_experts=3, top_k=3, num_null_experts=2, capacity=rule) for rule in CAPACITIES[:4]]
    found += [
        BatchSpec(num_experts=router.num_experts, top_k=router.top_k, balance=rule, router=router)
        for rule, router in ROUTED
    ]
    found += [
        BatchSpec(num_experts=router.num_experts, top_k=router.top_k, quantile=rule, router=router)
        for rule, router in QUANTILES
    ]
    found += [BatchSpec(num_experts=5, top_k=2, sparsity=rule) for rule in SPARSITIES]
    wide = [BatchSpec(num_experts=E, top_k=K) for E, K in WIDE]
    found += wide
    found += [replace(size, update=rule) for size, rule in zip(wide, UPDATES[:2], strict=False)]
    # Each third rule is enough: what breaks at size does so whatever the rule.
    found += [replace(wide[number % len(wide)], balance=rule) for number, rule in enumerate(BALANCES[::3])]
    found += [replace(wide[number % len(wide)], capacity=rule) for number, rule in enumerate(CAPACITIES[::3])]
    return list(dict.fromkeys(found))


BATCH_SPECS: list[BatchSpec] = _pool()


def is_wide(spec: BatchSpec) -> bool:
    """Whether a batch is of one of the large sizes, which are tried once each."""
    return (spec.num_experts, spec.top_k) in WIDE


def _thin() -> list[BatchSpec]:
    """Every small batch without a rule, each rule on the first of its batches, one loss of normed scores with K = 1,
    one of a router that caps its logits and one of a plain router with a scale, and a loss and a capacity of many
    experts."""
    first = {}
    for spec in BATCH_SPECS:
        first.setdefault(spec.rule, spec)
    ends = (ROUTED[0][1], ROUTED[-1][1])
    routed = [spec for spec in BATCH_SPECS if spec.router in ends and spec.quantile is None]
    wide = [next(s for s in BATCH_SPECS if is_wide(s) and getattr(s, name)) for name in ("balance", "capacity")]
    one_slot = BatchSpec(num_experts=5, top_k=1, balance=BalanceSpec(coeff=0.01, **SIGMOID, score_eps=1e-20))
    assert one_slot in BATCH_SPECS
    return [
        spec
        for spec in BATCH_SPECS
        if (spec.rule is None and not is_wide(spec)) or spec in (first[spec.rule], one_slot, *routed, *wide)
    ]


THIN_BATCH_SPECS: list[BatchSpec] = _thin()
"""For subjects that compile: a loss or a capacity takes a second for each rule and size."""


def logits_of_kind(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(T, E) logits of which no two of a token are near each other."""
    T, E = shape
    steps_TE = np.argsort(rng.random((T, E)), axis=-1) - (E - 1) / 2
    step = min(0.5, 8 / E)  # so that the scores of many experts do not saturate
    logits_TE = step * (steps_TE + rng.uniform(-0.2, 0.2, (T, E))) + rng.normal(0, 0.5, (T, 1))
    if kind == "large":
        # The largest is at least 0: where all scores underflow there is nothing to compare.
        logits_TE = 40 * (logits_TE - logits_TE.max(axis=-1, keepdims=True, initial=-np.inf))
        logits_TE = logits_TE + rng.uniform(0, 200, (T, 1))
    if kind == "saturated":
        logits_TE = np.where(steps_TE == steps_TE.max(axis=-1, keepdims=True, initial=-np.inf), 1e4, -1e4) + logits_TE
    if kind == "negative":
        logits_TE = logits_TE - rng.uniform(60, 80, (T, 1))
    if kind == "barred":
        # At least one stays, and of the first token no other one.
        barred_TE = (rng.random((T, E)) < 0.4) & (steps_TE < (E - 1) / 2)
        barred_TE[:1] = steps_TE[:1] < steps_TE[:1].max(initial=-np.inf)
        logits_TE = np.where(barred_TE, -np.inf, logits_TE)
    return float32(logits_TE)


def ids_of_kind(kind: str, logits_TE: np.ndarray, spec: BatchSpec, rng: np.random.Generator) -> np.ndarray:
    """(T, K) distinct choices: of biased scores, the same for every token, with unused slots, or of one hot expert.

    With a hot expert the last token alone begins with another one; the first token, at least, has no expert of 'idle',
    and its first slot, at least, none of 'unused'.
    """
    T, K = len(logits_TE), spec.top_k
    null_TZ = rng.normal(0, 1.5, (T, spec.num_null_experts))
    ranked_TE = np.concatenate([np.clip(logits_TE, -3, 3), null_TZ], axis=1) + rng.normal(0, 1.5, spec.num_choices)
    if kind == "collapsed":
        ranked_TE = np.broadcast_to(rng.random(spec.num_choices), ranked_TE.shape)
    if kind == "hot":
        ranked_TE = np.tile(rng.random(spec.num_choices), (T, 1))
        ranked_TE[-1:] = np.roll(ranked_TE[-1:], 1, axis=-1)
    ids_TK = np.argsort(-ranked_TE, axis=-1, kind="stable")[:, :K]
    if kind == "idle":
        return np.where((rng.random(T) < 0.3) | (np.arange(T) == 0), UNUSED, ids_TK.T).T
    if kind == "unused":
        unused_TK = rng.random((T, K)) < 0.3
        unused_TK[:1, :1] = True
        return np.where(unused_TK, UNUSED, ids_TK)
    return ids_TK


def counts_of_kind(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(S, E) counts of the ranks or micro-batches of one step."""
    counts_SE = rng.integers(0, 30, shape)
    num_experts = shape[1]
    if kind == "large":
        counts_SE[:] = 0
        counts_SE[0] = 2**25 + rng.permutation(num_experts) - num_experts // 2
    if kind == "many_ranks":
        # So many that their sum is not one of bfloat16 (NVIDIA/Megatron-LM#7081).
        counts_SE = rng.integers(608, 677, shape)
    if kind == "edges":
        # Neighbours of the limits of bytes, bfloat16, float16 and 16 bits, and of a total of 2 ** 24.
        sums_E = rng.choice([256, 2048, 65_536, 2**24 // num_experts - num_experts]) + rng.permutation(num_experts)
        sums_E = sums_E - num_experts // 2
        counts_SE[:] = sums_E // len(counts_SE)
        counts_SE[rng.integers(len(counts_SE))] += sums_E - counts_SE.sum(axis=0)
    if kind in ("equal", "one_at_mean"):
        # The ranks differ; their sums do not, or one of them is the mean of the others.
        counts_SE[0] += counts_SE.sum(axis=0).max() - counts_SE.sum(axis=0)
    if kind == "one_at_mean":
        low, high = rng.permutation(num_experts)[:2]
        move = int(rng.integers(1, counts_SE[0, low] + 2))
        counts_SE[0] += move
        counts_SE[0, low] -= move
        counts_SE[0, high] += move
    return np.zeros_like(counts_SE) if kind == "zero" else counts_SE


def cut(
    num_tokens: int,
    rng: np.random.Generator,
    *,
    evenly: bool,
    parts: int = 2,
) -> tuple[int, ...]:
    """Lengths of consecutive parts of T tokens; sometimes one is empty.

    Args:
        num_tokens: T.
        rng: of the places where it is cut.
        evenly: into one part, or into `parts` that are equal, or but for a token of the first; each other number is
            one more program to compile.
        parts: where it is cut evenly.
    """
    if evenly:
        number, longer = ((1, 0), (parts, 0), (parts, 1))[rng.integers(3)]
        ends = np.arange(1, number) * (num_tokens // number) + longer
        ends = np.minimum(ends, num_tokens)
    else:
        ends = np.sort(rng.integers(0, num_tokens + 1, int(rng.integers(0, 4))))
    return tuple(np.diff(np.concatenate([[0], ends, [num_tokens]])).astype(int).tolist())


def lengths_of(
    spec: BatchSpec, num_tokens: int, wanted: tuple[str, ...], rng: np.random.Generator, *, evenly: bool
) -> dict[str, tuple[int, ...]]:
    """Sequences and shards, where the rule asks for them and the check allows it; a shard may end inside a sequence."""
    rules = [rule for rule in (spec.balance, spec.capacity, spec.capacity and spec.capacity.then) if rule]
    of_sequences = any("sequence" in (getattr(rule, "per", ""), rule.scope) for rule in rules)
    of_shards = any(rule.scope in ("local", *RUNNING_SCOPES, "rank") for rule in rules) or spec.quantile is not None
    if spec.quantile is not None:  # half of the batches are equal, of which code may ask for a whole number of wins
        evenly = evenly or rng.random() < 0.5
    found = {}
    if of_sequences and "sequence_lengths" in wanted:
        found["sequence_lengths"] = cut(num_tokens, rng, evenly=evenly, parts=3)
    if of_shards and "tokens_per_shard" in wanted:
        found["tokens_per_shard"] = cut(num_tokens, rng, evenly=evenly)
    # One part is what there is without lengths; it takes no parameter of that name.
    return {name: lengths for name, lengths in found.items() if len(lengths) > 1}


def weights_of_kind(kind: str, ids_TK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(T, K) weights of the used slots: no two of them equal, or all of them."""
    weights_TK = (1 + rng.permutation(ids_TK.size).reshape(ids_TK.shape)) / 64
    return np.where(ids_TK == UNUSED, 0, 0.5 if kind == "equal" else weights_TK)


def mask_of_kind(kind: str, case: BalanceCase, rng: np.random.Generator) -> np.ndarray:
    """(T,) which tokens are valid: some, none, or some but none of one sequence or shard that has its own mean."""
    T = case.num_tokens
    if kind == "all":
        return np.zeros(T, dtype=bool)
    valid_T = rng.random(T) < 0.6
    if kind == "unit":
        unit_of_T = case.balance_trace.unit_of_T
        valid_T &= unit_of_T != unit_of_T[rng.integers(T)]
    return valid_T


def make_case(
    spec: BatchSpec,
    check: BalanceCheck,
    *,
    logits: str,
    ids: str,
    weights: str,
    counts: str,
    num_counts: int,
    masks: str,
    tokens: int,
    seed: int,
    evenly: bool = False,
) -> BalanceCase:
    """The case of these choices; a choice is named like the field of the check that it is of."""
    rng = np.random.default_rng(seed)
    T, E, K = tokens, spec.num_experts, spec.top_k
    inputs = lengths_of(spec, T, check.inputs, rng, evenly=evenly)
    logits_TE = logits_of_kind(logits, (T, E), rng)
    ids_TK = ids_of_kind(ids, logits_TE, spec, rng)
    case = BalanceCase(
        spec=spec,
        logits_TE=logits_TE,
        expert_ids_TK=ids_TK,
        weights_TK=weights_of_kind(weights, ids_TK, rng),
        d_weights_TK=rng.integers(-16, 17, (T, K)) / 8.0,
        counts_SE=counts_of_kind(counts, (num_counts, E), rng),
        expert_bias_E=rng.integers(-64, 65, E) / 64.0,
        inputs=inputs,
        seed=seed,
    )
    return case.with_inputs(token_mask_T=mask_of_kind(masks, case, rng)) if "token_mask_T" in check.inputs else case


def sized_case(spec: BatchSpec, tokens: int) -> BalanceCase:
    """So many tokens that all have the same experts, in no more memory than one of them takes."""
    E, K = spec.num_experts, spec.top_k

    def rows(row) -> np.ndarray:
        return np.broadcast_to(np.asarray(row), (tokens, len(row)))

    return BalanceCase(
        spec=spec, logits_TE=rows(np.zeros(E)), expert_ids_TK=rows(np.arange(K)), weights_TK=rows(np.zeros(K)),
        d_weights_TK=rows(np.zeros(K)), counts_SE=np.zeros((1, E), np.int64), expert_bias_E=np.zeros(E),
    )  # fmt: skip


def settings(judge: Judge, check: BalanceCheck) -> tuple[list[BatchSpec], Counter]:
    """The specs that the check wants and the subject supports, and why the others are not run."""
    pool = pool_of(judge, BatchSpec, THIN_BATCH_SPECS if judge.subject.compiles else BATCH_SPECS)
    wanted = [spec for spec in pool if check.wants_spec(spec)]
    if RULES[check.method] is None:
        return wanted, Counter()
    reasons = [None if spec.rule is None else judge.subject.supports_load(spec.rule) for spec in wanted]
    supported = [spec for spec, why in zip(wanted, reasons, strict=True) if why is None]
    return supported, Counter(why for why in reasons if why)


DRAWN = ("logits", "ids", "weights", "counts", "num_counts", "masks", "tokens")
"""Fields of a check with the choices for a case."""


def draw(judge: Judge, check: BalanceCheck, seed: int) -> BalanceCase:
    """The case of a seed."""
    rng, (specs, _), compiles = np.random.default_rng(seed), settings_of(judge, check), judge.subject.compiles
    specs = [spec for spec in specs if not is_wide(spec)] or specs
    spec, choices = one_of(rng, specs), {name: one_of(rng, getattr(check, name)) for name in DRAWN}
    if compiles:
        choices["tokens"] = check.tokens[0]
    return make_case(spec, check, **choices, seed=int(rng.integers(2**32)), evenly=compiles)


def fixed(judge: Judge, check: BalanceCheck) -> Iterator[BalanceCase]:
    """A case of each spec, so that no rare rule is left to luck; the choices take turns. Then the sizes."""
    specs, compiles = settings_of(judge, check)[0], judge.subject.compiles
    for number, spec in enumerate(specs):
        choices = {name: getattr(check, name)[number % len(getattr(check, name))] for name in DRAWN}
        if is_wide(spec):
            choices["tokens"] = WIDE[spec.num_experts, spec.top_k] if check.tokens[0] > 1 else check.tokens[0]
        else:
            choices |= {"ids": check.ids[0], "tokens": check.tokens[0]}
        yield make_case(spec, check, **choices, seed=number, evenly=compiles)
    for tokens in check.sizes[:1] if compiles else check.sizes:
        yield from (sized_case(spec, tokens) for spec in specs)
