"""conformance, layer, faults of experts that show at real sizes alone.

Legend: R rows, D model dim, F expert hidden dim, E experts.
"""

from dataclasses import replace

import numpy as np

from conformance.core.fault import surrounds


@surrounds(breaks="EXP-2")
def features_past_a_tile_are_left_out(run, memory, rows_RD, tokens_per_expert_E, params, spec):
    """The sum over the hidden features ends with the last whole tile of 64."""
    F = spec.experts.hidden_dim
    inside_F = np.arange(F) < (F if F < 64 else F // 64 * 64)
    return run(rows_RD, tokens_per_expert_E, replace(params, w_down_EFD=params.w_down_EFD * inside_F[:, None]), spec)


@surrounds(breaks="EXP-2")
def an_expert_has_256_rows(run, memory, rows_RD, tokens_per_expert_E, params, spec):
    """The rows of an expert past its 256th are not written."""
    found_RD = run(rows_RD, tokens_per_expert_E, params, spec)
    begins_E = np.cumsum(tokens_per_expert_E) - tokens_per_expert_E
    place_N = np.arange(tokens_per_expert_E.sum()) - np.repeat(begins_E, tokens_per_expert_E)
    found_RD[: len(place_N)][place_N >= 256] = 0
    return found_RD
