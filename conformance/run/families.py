"""conformance, the families: how public models route, and what of each row was verified against what, as two tables."""

import re
from collections.abc import Iterable, Sequence
from textwrap import fill

from conformance.run.verified import DTYPES, OUTPUT_BOUND, TOKENS, WEIGHT_BOUND, stored
from conformance.subjects.transformers.blocks import NO_BLOCK
from conformance.subjects.transformers.families import findings
from moe_ref import RouterSpec
from moe_ref.specs.families import CHECKPOINTS, FAMILIES, Family
from moe_ref.specs.readers.hf_row import Row, Shared
from moe_ref.specs.readers.hf_rows import ROWS

COLUMNS = (
    "family", "experts", "top k", "score", "groups", "bias", "norm", "scale", "weight on", "expert", "shared",
    "capacity",
    "checkpoint", "verified against",
)  # fmt: skip
VERIFIED_COLUMNS = (
    "family", *(f"{of}, {dtype}" for dtype in DTYPES for of in ("other experts", "weight", "output")),
    "declared deviations",
)  # fmt: skip
HOW = """\
Measured by `python -m tools.families` with {libraries}, on CPUs, at tiny size (at most 16 experts),
against `moe_ref` in float64 on the same numbers: {tokens} drawn tokens, a balancing bias where the family has one.

- *Other experts*: tokens whose set of experts is another one. The router class itself, its gate an identity, on logits
  that bfloat16 holds, no two of a token equal.
- *Weight*: the largest error of a weight, relative to this weight, where the experts are the same.
- *Output*: the largest error of the output of the block class, relative to the largest output; with its own gate, eager
  experts and shared experts. Tokens whose experts a rounding of the logits to bfloat16 decides are left out.

A row is verified where float32 reaches {weight:.0e} of a weight and {output:.0e} of the output, without another expert.
In bfloat16 a weight of 4e-03 is its own rounding. Deviations are those of
[transformers.toml](../conformance/deviations_of/transformers.toml), with a page each; those of all families are in
[transformers.md](transformers.md)."""


def rows() -> list[tuple[str, ...]]:
    """One row for each family, then for each further checkpoint."""
    return [_row(each) for each in (*FAMILIES.values(), *CHECKPOINTS.values())]


def verified_rows() -> list[tuple[str, ...]]:
    """One row for each family: what was measured of its real router and block, and where they deviate."""
    return [(f"`{name}`", *_errors(name), ", ".join(_deviations(name)) or "-") for name in FAMILIES]


def release() -> str:
    """What was measured."""
    return f"transformers {'.'.join(stored()[0]['transformers'].split('.')[:2])}"


def markdown() -> str:
    """The tables as Markdown, with what they leave out below."""
    return "\n\n".join([
        "\n".join(_table(COLUMNS, rows())), f"## The real routers and blocks of {release()}", _how(),
        "\n".join(_table(VERIFIED_COLUMNS, verified_rows())), "## Not verified",
        "\n".join(f"- `{each.name}`: {each.unverified}." for each in CHECKPOINTS.values() if each.unverified),
        "Families whose block is not judged, and why:",
        "\n".join(f"- `{name}`: {why}." for name, why in NO_BLOCK.items()),
    ])  # fmt: skip


def text(width: int) -> str:
    """The same for a terminal: columns that do not fit beside the others follow below them."""
    shown = [_plain(row) for row in rows()]
    measured = [_plain(row) for row in verified_rows()]
    notes = [f"{each.name}: {each.unverified}" for each in CHECKPOINTS.values() if each.unverified]
    notes += [f"{name}: its block is not judged: {why}" for name, why in NO_BLOCK.items()]
    return "\n\n".join([
        *_columns(COLUMNS, shown, width), f"The real routers and blocks of {release()}:",
        *_columns(VERIFIED_COLUMNS, measured, width), *(fill(note, width) for note in notes),
    ])  # fmt: skip


def _how() -> str:
    libraries = " and ".join(f"{name} {version}" for name, version in stored()[0].items())
    return HOW.format(libraries=libraries, tokens=TOKENS, weight=WEIGHT_BOUND, output=OUTPUT_BOUND)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _plain(row: Iterable[str]) -> list[str]:
    """Cells without links and backquotes."""
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "") for cell in row]


def _columns(names: Sequence[str], rows: list[list[str]], width: int) -> list[str]:
    """Tables of at most that width, if a column allows it, each with the families in front."""
    split = [name.partition(", ") for name in names]
    heads = [[of for of, _, _ in split], [dtype for _, _, dtype in split]]
    lines = [*heads[: 1 + any(heads[1])], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    parts: list[list[int]] = []
    for column in range(1, len(names)):
        if not parts or widths[0] + sum(2 + widths[each] for each in (*parts[-1], column)) > width:
            parts.append([])
        parts[-1].append(column)
    return [
        "\n".join("  ".join(row[each].ljust(widths[each]) for each in (0, *part)).rstrip() for row in lines)
        for part in parts
    ]


def _errors(name: str) -> list[str]:
    found = [stored()[1][name][dtype] for dtype in DTYPES]
    return [
        cell
        for each in found
        for cell in (str(each.others), f"{each.weight:.0e}", "-" if each.output is None else f"{each.output:.0e}")
    ]


def _deviations(name: str) -> list[str]:
    found = [f"[{page.removeprefix('transformers-').replace('-', ' ')}](findings/{page}.md)" for page in findings(name)]
    coarse = stored()[1][name]["bfloat16"].others > stored()[1][name]["float32"].others
    return found + ["SCR-8: scores or bias in bfloat16"] * coarse


def _row(family: Family) -> tuple[str, ...]:
    router, name = family.router, family.of or family.name
    return (
        f"`{family.name}`", _experts(router), str(router.top_k), _score(router), _groups(router),
        _bias(family), _norm(router), _scale(router), router.weight_on, _expert(name), _shared(name), "none",
        f"[{family.checkpoint}]({family.source})", _verified(family),
    )  # fmt: skip


def _experts(router: RouterSpec) -> str:
    extra = f" + {router.num_null_experts} {router.null_kind}" if router.num_null_experts else ""
    return f"{router.num_experts}{extra}"


def _score(router: RouterSpec) -> str:
    if router.selector == "sparsemixer":
        return "sparsemixer"
    over = {"selected": " over the selected", "all": ""}[router.score_over]
    by = " by logit" if router.select_by == "logit" and router.score_over == "all" else ""
    table = " by a table" if router.selector == "table" else ""
    more = f", logits x {router.logit_scale:.4g}" if router.logit_scale != 1 else ""
    more += f", capped at {router.logit_softcap:g}" if router.logit_softcap is not None else ""
    return f"{router.score_func}{over}{by}{table}{more}"


def _groups(router: RouterSpec) -> str:
    if router.quota_groups is not None:
        return f"{router.top_k // router.quota_groups} of each of {router.quota_groups}"
    if router.num_expert_groups is None:
        return "-"
    if router.num_expert_groups == 1:
        return "1"
    fill = "" if router.mask_fill else ", fill 0"
    return f"{router.num_limited_groups} of {router.num_expert_groups} by {router.group_score_k} best{fill}"


def _bias(family: Family) -> str:
    both = ["choice"] * family.expert_bias + ["gate"] * family.gate_bias
    return ", ".join(both) or "-"


def _norm(router: RouterSpec) -> str:
    if not router.route_norm:
        return "-"
    if router.norm_form == "clamp":
        return f"max(sum, {router.norm_eps:g})"
    shared = " with shared" if router.norm_with_shared else ""
    return f"sum + {router.norm_eps:g}{shared}" if router.norm_eps else f"sum{shared}"


def _scale(router: RouterSpec) -> str:
    parts = [f"{router.route_scale:g} weights" if router.route_scale != 1 else "",
             f"{router.output_scale:g} output" if router.output_scale != 1 else "",
             f"learned {router.learned_scale}" if router.learned_scale != "none" else ""]  # fmt: skip
    return ", ".join(filter(None, parts)) or "-"


def _reader(name: str) -> Row | None:
    stem = name.removesuffix("_hash").removesuffix("_sigmoid")
    return next((row for row in ROWS if row.family == stem and not row.source), None)


def _expert(name: str) -> str:
    row = _reader(name)
    if row is None:
        return "-"
    gated = "gated" if row.experts.get("gated", True) else "not gated"
    clamp = f", clamped {row.experts.get('clamp_at', 'before')}" if row.clamp else ""
    bias = ", bias" if row.experts.get("bias") else ""
    latent = f", in {row.latent} if any{', with a norm' if row.latent_norm else ''}" if row.latent else ""
    situ = ", silu or situ" if row.beta else ""
    return gated + clamp + bias + situ + latent


def _shared(name: str) -> str:
    row = _reader(name)
    shared: Shared | None = row.shared if row is not None else None
    if shared is None:
        return "-"
    if row is not None and "num_scored_shared_experts" in row.router:
        return "scored by the router"
    width = shared.width or (f"{shared.count} x width" if shared.count else "as an expert")
    return width + (", sigmoid gate" if shared.gate == "sigmoid" else "")


def _verified(family: Family) -> str:
    if family.unverified:
        return "not: see below"
    if family.of:
        return f"its config; semantics as `{family.of}`"
    found = stored()[1][family.name]["float32"]
    block = " and block" if found.block_agrees else ""
    return f"router{block} of {release()}" + ("" if found.router_agrees else ", which deviates: see below")
