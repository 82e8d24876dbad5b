"""conformance, router, faults of the configuration: routers that are built although they cannot route."""

from conformance.core.fault import surrounds


def kept_experts(fields: dict) -> int:
    """Experts in the groups that are kept."""
    experts, groups = fields["num_experts"], fields.get("num_expert_groups")
    return experts // groups * fields["num_limited_groups"] if groups else experts


@surrounds(breaks="CFG-1", links=("huggingface/transformers#48647",))
def top_k_beyond_the_kept_groups_accepted(run, memory, fields):
    """A top_k that the kept groups cannot fill is accepted; masked experts are selected."""
    most = fields["num_experts"] if fields["top_k"] <= fields["num_experts"] else fields["top_k"]
    return run(fields | {"top_k": min(fields["top_k"], kept_experts(fields), most)})


@surrounds(breaks="CFG-1")
def unfillable_top_k_asserted(run, memory, fields):
    """An unfillable top_k stops in an assert, which python -O removes."""
    assert fields["top_k"] <= kept_experts(fields)
    return run(fields)


@surrounds(breaks="CFG-2", links=("huggingface/transformers#48647",))
def uneven_groups_accepted(run, memory, fields):
    """Groups that do not divide the experts are accepted; the last experts belong to none."""
    if fields.get("num_expert_groups") and fields["num_experts"] % fields["num_expert_groups"]:
        fields = fields | {"num_expert_groups": 4}
    return run(fields)


@surrounds(breaks="CFG-2")
def more_kept_groups_than_groups_accepted(run, memory, fields):
    """More kept groups than there are groups are accepted."""
    groups = fields.get("num_expert_groups")
    return run(fields | ({"num_limited_groups": min(fields["num_limited_groups"], groups)} if groups else {}))


@surrounds(breaks="CFG-2")
def groups_of_one_accepted(run, memory, fields):
    """A group too small for its score is accepted; the score sums what is there."""
    if fields.get("num_expert_groups") == fields["num_experts"]:
        fields = fields | {"group_score_k": 1}
    return run(fields)


@surrounds(breaks="CFG-3", links=("flashinfer-ai/flashinfer#5190",))
def unknown_score_func_becomes_sigmoid(run, memory, fields):
    """A score function that is not known is replaced by sigmoid."""
    known = ("softmax", "sigmoid", "sqrtsoftplus")
    return run(fields | ({} if fields["score_func"] in known else {"score_func": "sigmoid"}))


@surrounds(breaks="CFG-4", links=("flashinfer-ai/flashinfer#3840",))
def top_k_beyond_the_experts_accepted(run, memory, fields):
    """A top_k that no kernel covers is accepted; what is returned was never written."""
    over = fields["top_k"] > fields["num_experts"]
    return run(fields | ({"top_k": fields["num_experts"]} if over and not fields["num_expert_groups"] else {}))


@surrounds(breaks="CFG-4")
def nothing_is_refused(run, memory, fields):
    """Every configuration is accepted."""
