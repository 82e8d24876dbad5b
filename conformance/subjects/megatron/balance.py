"""conformance, subject megatron: counts, losses, the bias update and token dropping of megatron.core, as they are.

A loss is that of `TopKRouter.routing` in training: what it adds to its tracker, and the gradient that it gives to the
logits. A shard is a micro-batch, or the batch of a data-parallel rank: a call of its own, of which a trainer takes the
mean.
"""

from typing import Any

import numpy as np
import torch

from conformance.core.subject import LoadRule, Subject, Unsupported
from conformance.subjects.megatron.module import (
    built_router,
    finalize,
    groups_of_one,
    hold_slots,
    map_of,
    moe_utils,
    router_of,
    set_bias,
    tracker,
)
from conformance.subjects.megatron.settings import capacity_entries, router_entries
from conformance.subjects.torch.arrays import single, slices, to_numpy
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, QuantileSpec, RouterSpec, SparsitySpec

LOSSES = {
    "aux_loss": ("load_balancing_loss", "batch", ("local", "global")),
    "seq_aux_loss": ("seq_load_balancing_loss", "sequence", ("local", "global")),
    "global_aux_loss": ("global_load_balancing_loss", "batch", ("running", "running_mean")),
}
"""moe_router_load_balancing_type -> its name in the tracker, the unit, and the scopes that it is for."""
SCORES: tuple[dict[str, Any], ...] = (
    {"score_func": "softmax"},
    *({"score_func": name, "norm_scores": True, "score_eps": 1e-20} for name in ("sigmoid", "sqrtsoftplus")),
)
"""What its losses score with."""
MOST_TOKENS = 2**24


class MegatronBalance(Subject):
    """aux_loss, seq_aux_loss, global_aux_loss, the z-loss, expert_bias, quantile balancing and capacities."""

    def supports_load(self, spec: LoadRule) -> str | None:
        if isinstance(spec, QuantileSpec):
            own = QuantileSpec.of("megatron", keep=spec.keep)
            return None if spec == own else "Megatron takes the mean of the exact quantiles of batches, centred"
        if isinstance(spec, SparsitySpec):
            return "megatron-core has no routing whose numbers of experts vary"
        if isinstance(spec, CapacitySpec):
            capacity_entries(spec)  # a ValueError is the sentence
            return None
        if isinstance(spec, BiasUpdateSpec):
            plain = BiasUpdateSpec(rate=spec.rate)
            return None if spec == plain else "Megatron moves every bias by rate * sign(mean - count)"
        return None if loss_type(spec) else (
            "Megatron's losses are of unbiased counts over slots, with softmax scores, or with sigmoids or "
            "sqrtsoftplus that are divided by their sum + 1e-20"
        )  # fmt: skip

    def load(
        self, expert_ids_TK: np.ndarray, num_experts: int, *, token_mask_T: np.ndarray | None = None
    ) -> np.ndarray:
        """What `_apply_expert_bias` adds to its counter, which is float32."""
        if len(expert_ids_TK) > MOST_TOKENS:
            raise Unsupported(
                "a forward pass of Megatron is of fewer than 2 ** 24 tokens, of which float32 counts each"
            )
        router = router_of(tuple(router_entries(plain_sigmoids(num_experts), expert_bias=True).items()))
        router.local_tokens_per_expert.zero_()
        router._apply_expert_bias(map_of(expert_ids_TK, num_experts), padding_mask=padding(token_mask_T))
        return to_numpy(router.local_tokens_per_expert).astype(np.int64)

    def balance_loss(
        self,
        logits_TE: np.ndarray,
        expert_ids_TK: np.ndarray,
        balance: BalanceSpec,
        router: RouterSpec,
        *,
        expert_bias_E: np.ndarray | None = None,
        token_mask_T: np.ndarray | None = None,
        sequence_lengths: tuple[int, ...] | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> dict[str, Any]:
        """The mean over shards, each a forward pass of the router with a loss."""
        kind = loss_type(balance)
        assert kind is not None
        if balance.scope == "global" and tokens_per_shard is not None:
            raise Unsupported("a batch over ranks that share sequences is not judged")
        if balance.coeff == 0:
            raise Unsupported("Megatron has no loss whose coefficient is 0")
        if balance.per == "sequence" and tokens_per_shard is not None and sequence_lengths is not None:
            raise Unsupported("a shard of whole sequences alone is judged")
        sizes: dict[str, Any] = {"num_experts": router.num_experts, "top_k": router.top_k}
        if router == RouterSpec(**sizes, score_func=router.score_func):  # whose weights are not looked at
            normed = {"route_norm": True, "norm_eps": 1e-20} if balance.norm_scores and router.top_k > 1 else {}
            router = RouterSpec(**sizes, score_func=balance.score_func, **normed)
        elif balance.score_func != router.score_func:
            raise Unsupported("Megatron's losses score as the router does")
        more = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": balance.coeff}
        module = built_router(router, expert_bias=expert_bias_E is not None, more=tuple(more.items()))
        set_bias(module, expert_bias_E)
        module.reset_global_aux_loss_tracker()
        given_TE, padding_T, losses, pulls = single(logits_TE).requires_grad_(), padding(token_mask_T), [], []
        for own in micro_batches(tokens_per_shard, len(given_TE)):
            lengths = None if balance.per == "batch" else sequence_lengths
            place_SB, mask_SB = batch_of(own, lengths, padding_T)
            tracker().clear()
            probs_TE, _ = module.routing(given_TE[place_SB], padding_mask=mask_SB)
            losses.append(tracked(LOSSES[kind][0]) * balance.coeff)
            pulls.append(probs_TE)
        (d_logits_TE,) = torch.autograd.grad(pulls, given_TE, [torch.zeros_like(each) for each in pulls])
        return {"loss": float(np.mean(losses)), "d_logits_TE": to_numpy(d_logits_TE) / len(losses)}

    def z_loss(self, logits_TE: np.ndarray, coeff: float, *, token_mask_T: np.ndarray | None = None) -> dict[str, Any]:
        """`apply_z_loss` of the router."""
        more = {"moe_z_loss_coeff": coeff}
        if coeff == 0:
            raise Unsupported("Megatron's loss is logged over its coefficient, which is not 0")
        module = built_router(plain_sigmoids(logits_TE.shape[1]), expert_bias=False, more=tuple(more.items()))
        tracker().clear()
        given_TE = single(logits_TE).requires_grad_()
        found_TE = module.apply_z_loss(given_TE, padding_mask=padding(token_mask_T))
        (d_logits_TE,) = torch.autograd.grad(found_TE, given_TE, torch.zeros_like(found_TE))
        return {"loss": tracked("z_loss") * coeff, "d_logits_TE": to_numpy(d_logits_TE)}

    def bias_update(self, counts_SE: np.ndarray, update: BiasUpdateSpec, expert_bias_E: np.ndarray) -> np.ndarray:
        """`get_updated_expert_bias` of a counter to which each micro-batch is added, in float32."""
        groups_of_one()
        counter_E = torch.zeros(len(expert_bias_E))
        for counts_E in np.asarray(counts_SE):
            counter_E += torch.from_numpy(np.asarray(counts_E, np.int64))
        return to_numpy(moe_utils.get_updated_expert_bias(counter_E, single(expert_bias_E), update.rate))

    def quantile_update(
        self,
        logits_TE: np.ndarray,
        router: RouterSpec,
        update: QuantileSpec,
        expert_bias_E: np.ndarray,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Forward passes of the router in training, and `_update_router_qb_beta`, whose beta is the negative bias."""
        if token_mask_T is not None:
            raise Unsupported("Megatron's quantile balancing takes no padding mask")
        more = {"moe_router_quantile_balancing_ema": update.keep}
        module = built_router(router, expert_bias=True, more=tuple(more.items()))
        if module.qb_beta is None:
            raise Unsupported("Megatron's quantile balancing ranks logits")
        set_bias(module, expert_bias_E)
        finalize.reset_model_temporary_tensors(module.config, [module])
        for own in micro_batches(tokens_per_shard, len(logits_TE)):
            hold_slots(module, own.stop - own.start)
            module.routing(single(logits_TE[own])[:, None])
        finalize._update_router_qb_beta([module], module.config, dp_cp_group=groups_of_one().tp_dp_cp)
        return -to_numpy(module.qb_beta)

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *,
        token_mask_T: np.ndarray | None = None,
        tokens_per_shard: tuple[int, ...] | None = None,
        d_weights_TK: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """`apply_router_token_dropping`, which is told of no padding."""
        ids_TK = np.asarray(expert_ids_TK, np.int64)
        if (ids_TK >= num_experts).any():
            raise Unsupported("Megatron has no null experts")
        T, K, E = *ids_TK.shape, num_experts
        map_TE, used_TK = map_of(ids_TK, E), torch.from_numpy(ids_TK >= 0)
        places_TK = torch.where(used_TK, torch.from_numpy(ids_TK), E)
        given_TK = single(weights_TK).requires_grad_()
        probs_TE = torch.zeros(T, E + 1).scatter(1, places_TK, given_TK)[:, :E]
        config = capacity_entries(capacity)
        kept_probs, kept_map = [], []
        for own in slices(tokens_per_shard if capacity.scope == "rank" else None, T):
            probs, kept = moe_utils.apply_router_token_dropping(
                probs_TE[own], map_TE[own], router_topk=K, capacity_factor=config["moe_expert_capacity_factor"],
                drop_policy=config["moe_token_drop_policy"],
                pad_to_capacity=config["moe_pad_expert_input_to_capacity"],
            )  # fmt: skip
            kept_probs.append(probs)
            kept_map.append(kept)
        nowhere = torch.zeros(T, 1)
        kept_TE = torch.cat([torch.cat(kept_map), nowhere.bool()], dim=1)
        found_TK = torch.cat([torch.cat(kept_probs), nowhere], dim=1).gather(1, places_TK)
        kept_TK = to_numpy(kept_TE.gather(1, places_TK))
        found = {"expert_ids_TK": np.where(kept_TK, ids_TK, -1), "weights_TK": to_numpy(found_TK.detach())}
        if d_weights_TK is None:
            return found
        (d_given_TK,) = torch.autograd.grad(found_TK, given_TK, single(d_weights_TK))
        return found | {"d_weights_TK": to_numpy(d_given_TK)}


def loss_type(spec: BalanceSpec) -> str | None:
    """Which of its losses a spec is; None: none of them."""
    for kind, (_, per, scopes) in LOSSES.items():
        for scores in SCORES:
            if spec.scope in scopes and spec == BalanceSpec(
                coeff=spec.coeff, counts="unbiased", per=per, scope=spec.scope, **scores
            ):
                return kind
    return None


def micro_batches(tokens_per_shard: tuple[int, ...] | None, num_tokens: int) -> list[slice]:
    """The tokens of each forward pass.

    Raises:
        Unsupported: one has none.
    """
    found = slices(tokens_per_shard, num_tokens)
    if any(own.start == own.stop for own in found):
        raise Unsupported("a micro-batch of Megatron has a token")
    return found


def tracked(name: str) -> float:
    """What the one layer has added to the tracker: a loss over its coefficient."""
    return float(tracker().metrics[name].values[0])


def padding(token_mask_T: np.ndarray | None) -> torch.Tensor | None:
    """Its mask is True where a token is padding."""
    return None if token_mask_T is None else torch.from_numpy(~np.asarray(token_mask_T, bool))


def plain_sigmoids(num_experts: int) -> RouterSpec:
    """A router that counts."""
    return RouterSpec(num_experts=num_experts, top_k=1, score_func="sigmoid")


def batch_of(
    own: slice, lengths: tuple[int, ...] | None, padding_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The place of each token in a batch of sequences, and its mask: shorter ones are padded to the longest."""
    lengths = (own.stop - own.start,) if lengths is None else tuple(lengths)
    place_SB = torch.full((max(lengths), len(lengths)), -1)
    for b, (length, end) in enumerate(zip(lengths, np.cumsum(lengths).tolist(), strict=True)):
        place_SB[:length, b] = own.start + torch.arange(end - length, end)
    none_SB, place_SB = place_SB < 0, place_SB.clamp(min=0)
    if padding_T is None and not none_SB.any():
        return place_SB, None
    return place_SB, none_SB if padding_T is None else none_SB | padding_T[place_SB]
