"""conformance, subject maxtext: the router of its RoutedMoE, which is its gate and `get_topk`, compiled."""

from functools import lru_cache
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from conformance.core.inputs import RouteInputs
from conformance.core.subject import Routing, Subject, Unsupported
from conformance.subjects.maxtext.module import BIAS, FLOAT32, TABLE, Built, initialize, routed, scope
from conformance.subjects.maxtext.settings import block_of
from moe_ref import ExpertSpec, LayerSpec, RouterSpec, ShardLayout


class MaxtextRouter(Subject):
    """GateLogit and get_topk of maxtext.layers.moe."""

    entries: ClassVar[dict[str, Any]] = FLOAT32
    """What its config has besides the entries of a spec."""

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        block_of(spec)  # a ValueError is the sentence
        return None if layout is None else "maxtext's router has no layout"

    def route(
        self, logits_TE: np.ndarray, spec: RouterSpec, expert_bias_E: np.ndarray | None, **inputs: Unpack[RouteInputs]
    ) -> Routing:
        """Its gate is an identity; llama4's weights are the sigmoids that its `permute` makes of them."""
        if inputs.get("token_mask_T") is not None:
            raise Unsupported("maxtext's router has no padding mask")
        if inputs.get("logit_factors_TE") is not None or inputs.get("logit_noise_TE") is not None:
            raise Unsupported("maxtext's router takes no noise from outside")
        built = built_for_logits(spec, expert_bias_E is not None, tuple(self.entries.items()))
        leaves = {}
        if expert_bias_E is not None:
            leaves[BIAS] = jnp.asarray(expert_bias_E, jnp.float32)
        if (table_VK := inputs.get("table_VK")) is not None:
            leaves[TABLE] = jnp.asarray(table_VK, jnp.float32)
        if (scale := inputs.get("learned_scale")) is not None:
            leaves["per_expert_scale",] = jnp.asarray(scale, jnp.float32)
        how = {name: _in_a_batch(inputs.get(name)) for name in ("token_ids_T", "given_ids_TK")}
        key = jax.random.key(inputs.get("seed") or 0)
        with scope(built.mesh, identity_gate=True):
            ids_TK, weights_TK, scores_TE = _route(built)(leaves, jnp.asarray(logits_TE), how, key)
        return Routing(
            expert_ids_TK=np.asarray(ids_TK),
            weights_TK=np.asarray(weights_TK, np.float32),
            scores_TE=None if scores_TE is None else np.asarray(scores_TE, np.float32),
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        """Its GateLogit without a score function, which is mixtral's."""
        built = built_for_gate(*gate_ED.shape, gate_bias_E is not None, tuple(self.entries.items()))
        leaves = {("gate", "kernel"): jnp.asarray(gate_ED.T, jnp.float32)}
        if gate_bias_E is not None:
            leaves[BIAS] = jnp.asarray(gate_bias_E, jnp.float32)
        with scope(built.mesh):
            return np.asarray(_gate(built)(leaves, jnp.asarray(x_TD)), np.float32)

    def configure(self, fields: dict[str, Any]) -> None:
        """Its own config with all its validation, then a run of two tokens."""
        values: dict[str, Any] = {"num_experts": 8, "top_k": 1, "score_func": "sigmoid"} | fields
        own = {"route_norm": True, "norm_eps": 1e-20}
        if unknown := [name for name in fields if name not in DEEPSEEK3.free and own.get(name) != fields[name]]:
            raise Unsupported(f"maxtext's block deepseek has another {', '.join(unknown)}")
        entries = DEEPSEEK3.entries(values)
        if error := _error_of(tuple(sorted(entries.items())), tuple(self.entries.items())):
            raise error


VALID = LayerSpec(
    router=RouterSpec(num_experts=8, top_k=1, score_func="sigmoid", route_norm=True, norm_eps=1e-20),
    experts=ExpertSpec(dim=8, hidden_dim=8),
)
DEEPSEEK3 = block_of(VALID.router, expert_bias=True)


@lru_cache(maxsize=64)
def _error_of(entries: tuple, more: tuple) -> Exception | None:
    """What its config, with all its validation, or a run of two tokens raises."""
    try:
        config = initialize(**dict(entries), routed_bias=True, override_model_config=True)
        read = {name: getattr(config, name) for name in (*dict(entries), "emb_dim", "moe_mlp_dim")}
        built = Built.of(VALID, dict(more) | read, expert_bias=True)
        with scope(built.mesh):
            module = routed(built.module({}))
            module.get_topk(*module.gate(jnp.zeros((1, 2, config.emb_dim))))
    except Exception as error:
        return error
    return None


@lru_cache(maxsize=512)
def built_for_logits(spec: RouterSpec, expert_bias: bool, entries: tuple) -> Built:
    """A router that takes logits: its tokens are as wide as it has experts."""
    layer = LayerSpec(router=spec, experts=ExpertSpec(dim=spec.num_experts, hidden_dim=1))
    return Built.of(layer, dict(entries), expert_bias=expert_bias)


@lru_cache(maxsize=64)
def built_for_gate(num_experts: int, dim: int, gate_bias: bool, entries: tuple) -> Built:
    """A router whose logits are no scores."""
    router = RouterSpec(num_experts=num_experts, top_k=1, score_over="selected", select_by="logit")
    layer = LayerSpec(router=router, experts=ExpertSpec(dim=dim, hidden_dim=1), gate_bias=gate_bias)
    return Built.of(layer, dict(entries), expert_bias=False)


@lru_cache(maxsize=512)
def _route(built: Built):
    @jax.jit
    def run(leaves, logits_TE, how, key):
        module = routed(built.module(leaves))
        x_1TE = logits_TE[None].astype(module.dtype)
        gate_logits_1TE, scores_1TE = module.gate(x_1TE)
        weights_1TK, ids_1TK = module.get_topk(
            gate_logits_1TE, scores_1TE, rngs=key, input_ids=how["token_ids_T"],
            forced_routed_experts=how["given_ids_TK"],
        )  # fmt: skip
        if built.block.name == "llama4":
            weights_1TK = jax.nn.sigmoid(weights_1TK.astype(jnp.float32))
        return ids_1TK[0], weights_1TK[0], None if scores_1TE is None else scores_1TE[0]

    return run


@lru_cache(maxsize=64)
def _gate(built: Built):
    return jax.jit(lambda leaves, x_TD: built.module(leaves).gate(x_TD[None])[0][0])


def _in_a_batch(array: np.ndarray | None) -> Any:
    return None if array is None else jnp.asarray(array, jnp.int32)[None]
