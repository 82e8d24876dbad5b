"""conformance, precision: the tables, of one family or subject and of all."""

from collections.abc import Callable, Iterable, Iterator

from conformance.core.rounding import PACKED
from conformance.core.subject import Subject
from conformance.precision.audit import STAGES, Effect, batch, effects
from conformance.precision.subject import UNEXPLAINED, classes, measured
from moe_ref.specs.families import CHECKPOINTS, FAMILIES, Family

DTYPES = ("bfloat16", "float16", PACKED)
BOUND = 1e-3
"""Share of tokens with other experts, and mean error of a weight, that a contract keeps under."""
PUBLIC = FAMILIES | CHECKPOINTS


def of_family(family: Family, *, tokens: int, seed: int, bound: float) -> str:
    """Every stage in every dtype, and the contract that keeps the family under the bound."""
    own = batch(family.router, tokens=tokens, seed=seed, expert_bias=family.expert_bias)
    found = {dtype: effects(own, dtype) for dtype in DTYPES}
    lines = [f"{'stage':<12} {'dtype':<13} {'other experts':>13}  {'largest error':>13}  {'rms error':>9}"]
    for stage in STAGES:
        for dtype in DTYPES:
            if stage in found[dtype]:
                each = found[dtype][stage]
                lines.append(f"{stage:<12} {dtype:<13} {each.changed:>13.2%}  {each.largest:>13.1e}  {each.rms:>9.1e}")
    lines += ["", f"each stage alone, {tokens} tokens, seed {seed}; an error is relative to the token's largest weight"]
    return "\n".join([*lines, f"under {bound:g}: {contract(found, bound)}"])


def contract(found: dict[str, dict[str, Effect]], bound: float) -> str:
    """Which dtype each stage can be in, so that it alone keeps tokens and weights under the bound."""
    narrowest = {stage: _narrowest(found, stage, bound) for stage in STAGES}
    by_dtype: dict[str, list[str]] = {}
    for stage, dtype in narrowest.items():
        by_dtype.setdefault(dtype, []).append(stage)
    order = ("float32", "float16", "bfloat16")
    return "; ".join(f"{', '.join(by_dtype[dtype])} in {dtype}" for dtype in order if dtype in by_dtype)


def _narrowest(found: dict[str, dict[str, Effect]], stage: str, bound: float) -> str:
    for dtype in ("bfloat16", "float16"):
        each = found[dtype][stage]
        if each.changed <= bound and each.rms <= bound:
            return dtype
    return "float32"


def distinct() -> Iterator[tuple[list[str], Family]]:
    """Families whose routers are one, with the first of them."""
    alike: dict[object, list[str]] = {}
    for name, family in PUBLIC.items():
        if family.router.selector == "top_k":  # the others rank nothing that could be rounded
            alike.setdefault((family.router, family.expert_bias), []).append(name)
    for names in alike.values():
        yield names, PUBLIC[names[0]]


def families_table(*, tokens: int, seed: int) -> str:
    """A row for each router: tokens with other experts in bfloat16 stage by stage, and packed; then the contract."""
    head = ("family", *STAGES[:-2], f"{PACKED}", "rms of weights", "rms of combine", f"under {BOUND:g}")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for names, family in distinct():
        own = batch(family.router, tokens=tokens, seed=seed, expert_bias=family.expert_bias)
        found = {dtype: effects(own, dtype) for dtype in DTYPES}
        cells = [f"{found['bfloat16'][stage].changed:.2%}" for stage in STAGES[:-2]]
        cells.append(f"{found[PACKED]['selection'].changed:.2%}")
        cells += [f"{found['bfloat16'][stage].rms:.1e}" for stage in STAGES[-2:]]
        shown = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {shown} | " + " | ".join(cells) + f" | {contract(found, BOUND)} |")
    return "\n".join(lines)


def of_subject(subject: Subject, *, tokens: int, seed: int) -> Iterator[tuple[str, Effect, str]]:
    """(router, effect, the class that explains it) of each public router that a subject runs.

    At published size, or else with few experts, as a subject does that builds the router of a config.
    """
    for names, family in distinct():
        for router, size in ((family.router, ""), (family.tiny, " (tiny)")):
            if subject.supports(router) is None:
                own = batch(router, tokens=tokens, seed=seed, expert_bias=family.expert_bias)
                found = measured(subject, own)
                if found is not None:
                    yield names[0] + size, found.effect, found.explained_by
                    break


def subject_lines(subject: Subject, *, tokens: int, seed: int) -> list[str]:
    """A line for each router."""
    lines = [f"{'router':<32} {'other experts':>13}  {'largest error':>13}  {'rms error':>9}  class"]
    for name, effect, explained in of_subject(subject, tokens=tokens, seed=seed):
        lines.append(f"{name:<32} {effect.changed:>13.2%}  {effect.largest:>13.1e}  {effect.rms:>9.1e}  {explained}")
    return [*lines, "", f"{tokens} tokens each, seed {seed}, against float64 on the same float32 logits"]


def subjects_table(subjects: Iterable[tuple[str, Callable[[], Subject]]], *, tokens: int, seed: int) -> str:
    """A row for each subject: over all routers that it runs, the worst of each, and the classes that explain them."""
    head = ("subject", "routers", "other experts", "largest error", "rms error", "class")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    order = [found.words for found in classes()] + [UNEXPLAINED]
    for name, made in subjects:
        rows = list(of_subject(made(), tokens=tokens, seed=seed))
        if rows:
            worst = [max(getattr(effect, field) for _, effect, _ in rows) for field in ("changed", "largest", "rms")]
            counts = {words: sum(each == words for _, _, each in rows) for words in order}
            shown = "; ".join(f"{words} ({count})" for words, count in counts.items() if count)
            lines.append(f"| `{name}` | {len(rows)} | {worst[0]:.2%} | {worst[1]:.1e} | {worst[2]:.1e} | {shown} |")
    return "\n".join(lines)
