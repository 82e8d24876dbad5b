"""conformance, router, sizes: cases past every tile, warp, dtype and table limit, and public models at full size.

Real code breaks at sizes that a toy never reaches: a 33rd expert, a 257th, a top-k of 9, a 1,025th token, row 65,536.
"""

import zlib
from collections.abc import Iterator
from math import comb
from typing import NamedTuple

from conformance.core.judge import Judge
from conformance.core.kind import settings_of
from conformance.router.case import RouterCase
from conformance.router.check import RouterCheck
from conformance.router.draw import dtypes_of, make_case
from moe_ref import RouterSpec
from moe_ref.specs.families import preset


class Size(NamedTuple):
    """How large a case is; no groups where num_expert_groups is 0."""

    tokens: int
    num_experts: int
    top_k: int
    num_expert_groups: int = 0
    num_limited_groups: int = 0


TOKENS = (17, 33, 65, 129, 257, 1025)
EXPERTS = (*range(1, 34), 64, 127, 128, 129, 255, 256, 257, 384, 512)
TOP_K = (6, 7, 9, 16, 22, 8)


def _plain() -> list[Size]:
    found = [Size(tokens, experts, 5) for tokens, experts in zip(TOKENS, (33, 12, 40, 9, 16, 24), strict=True)]
    for i, E in enumerate(EXPERTS):
        K = TOP_K[i % len(TOP_K)]
        found.append(Size(5, E, K if K <= E else 1 + i % min(E, 3)))
    found += [Size(3, 512, 22), Size(3, 257, 9), Size(3, 128, 7), Size(3, 64, 6), Size(3, 33, 16), Size(3, 32, 22)]
    return found


PLAIN = _plain()
MANY_ROWS = Size(4099, 32, 16)
"""T * K is past 65,535, the most blocks that a grid of a GPU has in its second direction."""
GROUPED = (
    Size(5, 256, 8, 8, 4), Size(3, 512, 8, 8, 4), Size(5, 160, 6, 8, 3), Size(3, 384, 9, 1, 1), Size(1025, 16, 4, 4, 2),
    Size(17, 8, 2, 8, 3), Size(5, 64, 7, 32, 7), Size(5, 34, 3, 17, 2), Size(5, 33, 5, 11, 3), Size(3, 129, 6, 43, 2),
    Size(9, 24, 6, 8, 4), Size(33, 64, 16, 8, 4), Size(3, 128, 22, 8, 3), Size(3, 257, 6, 257, 6), Size(5, 40, 9, 4, 4),
    Size(65, 32, 6, 2, 1), Size(129, 96, 7, 6, 2), Size(257, 30, 4, 5, 2), Size(5, 36, 8, 6, 6),
)  # fmt: skip
PUBLISHED = (
    Size(16, 128, 8), Size(64, 64, 8), Size(128, 64, 6), Size(256, 60, 4), Size(8, 32, 4), Size(1, 128, 4),
    Size(4, 512, 10), Size(32, 16, 1), Size(1, 128, 1), Size(1, 256, 8), Size(512, 16, 2), Size(1024, 8, 2),
    Size(2049, 8, 2), Size(2, 8, 2), Size(1, 64, 8), Size(3, 72, 6), Size(3, 1024, 8), Size(5, 96, 8),
    Size(1, 256, 8, 8, 4), Size(4, 256, 8, 8, 4), Size(16, 160, 6, 8, 3), Size(1, 384, 8, 1, 1), Size(64, 128, 8, 8, 4),
)  # fmt: skip
"""Experts of public models, for which a kernel has its own path; tokens that fill a tile to its end, or are one."""
PLAINLY = ("separated", "normal")
"""Logits under which any weight that is wrong shows."""
COMPILED = (
    (RouterSpec(num_experts=33, top_k=22, score_func="sigmoid", route_norm=True), 1025),
    (RouterSpec(num_experts=257, top_k=9), 129),
    (RouterSpec(num_experts=32, top_k=16, route_norm=True), MANY_ROWS.tokens),
)
"""(spec, tokens) on which a subject is tried for which each is a compilation, besides the public models."""
DRAWN = ((RouterSpec(num_experts=16, top_k=4, selector="random"), 17),)
"""The same: slots enough that an expert drawn twice is no matter of luck."""
MOST_SETS = 3000
"""Sets of groups that can be kept where dropped groups are filled with 0: there each one is looked at."""
SHARE = 8
"""A requirement that does not sweep is tried at every so-manieth size."""
MOST_TRIES = 30
"""Specs of the pool that are looked at for one that has a size."""

KIMI_K2 = {"num_experts": 384, "num_expert_groups": 1, "num_limited_groups": 1, "route_scale": 2.827}
"""https://huggingface.co/moonshotai/Kimi-K2-Instruct: DeepSeek-V3 with more experts, and one group."""
MODELS: tuple[RouterSpec, ...] = (
    preset("deepseek_v3"),
    preset("deepseek_v3", **KIMI_K2),
    preset("qwen3_next"),
    preset("gpt_oss"),
)
"""Public models at their published size."""
TOKENS_OF_MODEL = 17


def resized(spec: RouterSpec, size: Size, check: RouterCheck, judge: Judge) -> RouterSpec | None:
    """The spec at a size, or at one with fewer experts for each token; None where there is none for the check."""
    groups = {"num_expert_groups": size.num_expert_groups, "num_limited_groups": size.num_limited_groups}
    for top_k in dict.fromkeys((size.top_k, min(spec.top_k, size.num_experts), 1)):
        sizes = {"num_experts": size.num_experts, "top_k": top_k} | (groups if size.num_expert_groups else {})
        if size.num_expert_groups:
            most = size.num_experts // size.num_expert_groups
            sizes["group_score_k"] = min(spec.group_score_k, most)
        try:
            found = spec.replace(**sizes)
        except ValueError:  # the kept groups hold fewer
            continue
        if found.mask_fill == 0 and comb(size.num_expert_groups, size.num_limited_groups) > MOST_SETS:
            return None
        if check.spec(found) and judge.subject.supports(found) is None:
            return found
    return None


def one_resized(
    specs: list[RouterSpec], number: int, size: Size, check: RouterCheck, judge: Judge
) -> RouterSpec | None:
    """The first of some specs that can have the size; those tried depend on the number of the size."""
    candidates = (specs[(5 * number + i) % len(specs)] for i in range(min(len(specs), MOST_TRIES)))
    return next((found for spec in candidates if (found := resized(spec, size, check, judge))), None)


def sizes_of(check: RouterCheck) -> list[Size]:
    """The sizes at which a requirement is tried; the largest number of tokens is among them."""
    if check.sweeps:
        return [*PLAIN, *GROUPED, MANY_ROWS]
    first = zlib.crc32(check.requirement.encode()) % SHARE
    longest = [PLAIN[TOKENS.index(1025)], GROUPED[4]]
    return list(dict.fromkeys([*longest, *PLAIN[first::SHARE], *GROUPED[first % 4 :: 4]]))


def specs_of(judge: Judge, check: RouterCheck) -> Iterator[tuple[RouterSpec, int]]:
    """(spec, tokens): each size with a spec of the pool in turn, then the public models."""
    pool, _ = settings_of(judge, check)
    of_groups = {grouped: [spec for spec in pool if (spec.num_expert_groups is not None) == grouped]
                 for grouped in (False, True)}  # fmt: skip
    for number, size in enumerate(() if judge.subject.compiles else sizes_of(check)):
        found = one_resized(of_groups[size.num_expert_groups > 0], number, size, check, judge)
        if found is not None:
            yield found, size.tokens
    models = [(spec, TOKENS_OF_MODEL) for spec in MODELS]
    compiled, drawn = (COMPILED, DRAWN) if judge.subject.compiles else ((), ())
    for spec, tokens in [*compiled, *models, *drawn]:
        if check.spec(spec) and judge.subject.supports(spec) is None:
            yield spec, tokens


def cases(judge: Judge, check: RouterCheck) -> Iterator[RouterCase]:
    """A case of each size, with the check's kinds of logits, bias and dtype in turn."""
    if check.method != "route" or (judge.subject.compiles and "float32" not in check.dtypes):
        return
    if judge.subject.compiles and (check.inputs or check.tokens == (0,)):
        return  # a further input, or no token, is another program
    dtypes = dtypes_of(judge, check)
    for number, (spec, tokens) in enumerate(specs_of(judge, check)):
        tokens = 0 if check.tokens == (0,) else tokens
        yield make_case(
            spec,
            check,
            logits=check.logits[number % len(check.logits)],
            bias=check.bias[number // 2 % len(check.bias)],
            dtype=dtypes[number // 3 % len(dtypes)],
            tokens=tokens,
            seed=number,
        )
    if check.published and not judge.subject.compiles:
        yield from _published(judge, check)


def _published(judge: Judge, check: RouterCheck) -> Iterator[RouterCase]:
    """Each published size with a spec that norms and one that does not, both without a bias; then one with a bias."""
    pool, _ = settings_of(judge, check)
    for number, size in enumerate(PUBLISHED):
        for normed, bias in ((False, "none"), (True, "none"), (number % 2 == 0, "mixed")):
            specs = [
                spec
                for spec in pool
                if spec.route_norm == normed and (spec.num_expert_groups is not None) == (size.num_expert_groups > 0)
            ]
            found = one_resized(specs, number, size, check, judge)
            if found is not None:
                logits = PLAINLY[number % len(PLAINLY)]
                yield make_case(found, check, logits=logits, bias=bias, tokens=size.tokens, seed=number)
