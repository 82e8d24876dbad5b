"""conformance, layer, faults of whole layers: routing that ordinary logits do not betray.

Legend: T tokens, E experts, K top_k, G groups.
"""

import numpy as np

from conformance.core.fault import replaces, rounded
from moe_ref.routing import limit_groups, normalise, route, score


@replaces("limit_groups", breaks="LAY-17", links=("huggingface/transformers#45440",))
def the_layer_fills_dropped_groups_with_0(biased_scores_TE, spec):
    """Experts of dropped groups rank as 0 in the layer, above every negative choice score."""
    choice_TE, group_scores_TG, group_ids_TL = limit_groups(biased_scores_TE, spec)
    return np.where(np.isneginf(choice_TE), 0, choice_TE), group_scores_TG, group_ids_TL


@replaces("normalise", breaks="LAY-17", links=("NVIDIA/Megatron-LM#1545",))
def the_layer_norms_with_its_own_eps(raw_weights_TK, shared_scores_TS, spec):
    """The layer has an eps of 1e-6 of its own, which small scores are small against."""
    own = spec.replace(norm_eps=1e-6) if spec.norm_form == "add_eps" and spec.norm_eps < 1e-6 else spec
    return normalise(raw_weights_TK, shared_scores_TS, own)


@replaces("score", breaks="LAY-17")
def the_layer_clips_its_logits(scaled_logits_TE, spec):
    """Logits are cut at 20 before the exponential."""
    return score(np.clip(scaled_logits_TE, -20, 20), spec)


@replaces("route", breaks="LAY-2", links=("vllm-project/vllm#14027",))
def the_layer_rounds_its_logits(logits_TE, spec, **inputs):
    """The layer keeps its logits in bfloat16, which cannot tell close ones apart."""
    return route(rounded(logits_TE, 8), spec, **inputs)
