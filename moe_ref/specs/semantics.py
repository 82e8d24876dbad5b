"""moe_ref, the semantics: how model families route, before any size, as fields of RouterSpec.

The names are those of the model that brought it. `families.py` gives them sizes, `readers/` reads the sizes from files.
"""

from typing import Any

Fields = dict[str, Any]

SIGMOID: Fields = {"score_func": "sigmoid"}
NORMED: Fields = {"route_norm": True}
EPS_20: Fields = {"norm_eps": 1e-20}
FILL_0: Fields = {"mask_fill": 0.0}
BY_LOGIT: Fields = {"select_by": "logit"}
DEEPSEEK_V3: Fields = SIGMOID | NORMED | EPS_20
DEEPSEEK_V2: Fields = {"group_score_k": 1, "mask_fill": 0.0, "weights_from": "masked_scores"}
MISTRAL4: Fields = FILL_0 | NORMED | EPS_20
MIXTRAL: Fields = NORMED
SELECTED: Fields = {"score_over": "selected", "select_by": "logit"}
MINIMAX_M2: Fields = SIGMOID | NORMED
ERNIE: Fields = {"route_norm": True, "norm_form": "clamp", "norm_eps": 1e-12}
LLAMA4: Fields = SIGMOID | BY_LOGIT | {"weight_on": "input"}
PHIMOE: Fields = {"selector": "sparsemixer", "select_by": "logit"}
ONE_GROUP: Fields = {"num_expert_groups": 1, "num_limited_groups": 1}
