"""conformance, the families: a table of how public models route, and what each row was verified against."""

from conformance.subjects.transformers.blocks import BLOCKS, NO_BLOCK
from conformance.subjects.transformers.families import ROUTERS
from moe_ref import RouterSpec
from moe_ref.specs.families import CHECKPOINTS, FAMILIES, Family
from moe_ref.specs.readers.hf_row import Row, Shared
from moe_ref.specs.readers.hf_rows import ROWS

COLUMNS = (
    "family", "experts", "top k", "score", "groups", "bias", "norm", "scale", "weight on", "expert", "shared",
    "capacity",
    "checkpoint", "verified against",
)  # fmt: skip
RELEASE = "transformers 5.23"


def rows() -> list[tuple[str, ...]]:
    """One row for each family, then for each further checkpoint."""
    return [_row(each) for each in (*FAMILIES.values(), *CHECKPOINTS.values())]


def markdown() -> str:
    """The table as Markdown, with what it leaves out below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows()]
    notes = [f"- `{each.name}`: {each.unverified}." for each in CHECKPOINTS.values() if each.unverified]
    blocks = [f"- `{name}`: {why}." for name, why in NO_BLOCK.items()]
    return "\n".join([
        *lines, "", "Not verified:", "", *notes, "", "Families whose block is not judged, and why:", "", *blocks,
    ])  # fmt: skip


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
    block = f"router and block of {RELEASE}" if family.name in BLOCKS else f"router of {RELEASE}"
    return block if family.name in ROUTERS else "-"
