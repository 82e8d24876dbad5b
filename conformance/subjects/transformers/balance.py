"""conformance, subject transformers: its balance loss, z-loss and token dropping, as they are.

`load_balancing_loss_func` is the same text in some thirty families, and its result is multiplied by the coefficient in
their models; the z-loss and the capacity are those of switch_transformers, which has no load loss of K > 1.
"""

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from conformance.core.subject import LoadRule, Subject, Unsupported
from conformance.subjects.identity_gate import give_identity_gate
from conformance.subjects.torch.arrays import to_torch, with_gradient
from moe_ref import BalanceSpec, BiasUpdateSpec, CapacitySpec, QuantileSpec, RouterSpec, SparsitySpec

SWITCH = BalanceSpec(per="sequence")
"""Of switch_transformers, for K = 1: a mean over the sequences of a batch, which are of one length."""
CLAIMED = BalanceSpec()
"""What `load_balancing_loss_func` says that it is: equations (4) to (6) of Switch Transformers, for any K."""


class TransformersBalance(Subject):
    """Losses and capacity; `family` names the module whose loss is called, mixtral's by default."""

    family: str = ""

    def supports_load(self, spec: LoadRule) -> str | None:
        if isinstance(spec, (BiasUpdateSpec, QuantileSpec)):
            return "transformers updates no expert bias"
        if isinstance(spec, SparsitySpec):
            return "transformers has no routing whose numbers of experts vary"
        if isinstance(spec, CapacitySpec):
            wanted = CapacitySpec(slots=spec.slots or 0, scope="sequence")
            return None if spec == wanted else f"switch_transformers has {wanted}, for any number of slots"
        forms = (BalanceSpec.of("transformers"), CLAIMED, SWITCH)
        if isinstance(spec, BalanceSpec) and spec.replace(coeff=1.0) not in forms:
            return (
                "transformers has the loss 'transformers', which it says is 'switch', and 'switch' of sequences in one"
            )
        return None

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
        num_layers: int = 1,
    ) -> dict[str, Any]:
        """The function of the family, which takes the logits of every layer, times the coefficient; its gradient."""
        if router.num_null_experts or router.scales_logits:
            raise Unsupported("the loss of transformers scores the logits as they come, one for each expert")
        logits = to_torch(logits_TE).requires_grad_()
        if balance.per == "sequence":
            if num_layers > 1:
                raise Unsupported("the loss of switch_transformers is of one layer")
            loss = _switch_loss(logits, to_torch(expert_ids_TK), token_mask_T, sequence_lengths)
        else:
            mask = None if token_mask_T is None else to_torch(token_mask_T)[None]
            loss = _module(self.family or "mixtral").load_balancing_loss_func(
                logits.chunk(num_layers), logits.shape[1], expert_ids_TK.shape[1], attention_mask=mask
            )
        return with_gradient(balance.coeff * loss, logits)

    def z_loss(self, logits_TE: np.ndarray, coeff: float) -> dict[str, Any]:
        """`router_z_loss_func` of switch_transformers, which takes no mask, times the coefficient."""
        logits = to_torch(logits_TE).requires_grad_()
        return with_gradient(coeff * _module("switch_transformers").router_z_loss_func(logits[None]), logits)

    def capacity(
        self,
        expert_ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        capacity: CapacitySpec,
        num_experts: int,
        *,
        sequence_lengths: tuple[int, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """The router of switch_transformers on logits that choose these experts with these weights."""
        ids_TK, length = np.asarray(expert_ids_TK), _equal_length(sequence_lengths, len(expert_ids_TK))
        _check_one_slot(ids_TK)
        E, weights_T = num_experts, np.asarray(weights_TK)[:, 0]
        if (ids_TK >= E).any() or E < 2 or not ((weights_T > 1 / E) & (weights_T < 1)).all():
            raise Unsupported("the router of switch_transformers chooses what has the largest softmax")
        router = _switch_router(E)
        router.expert_capacity = capacity.slots
        others_T = np.log((1 - weights_T) / (E - 1))
        logits_TE = np.where(np.arange(E) == ids_TK, np.log(weights_T)[:, None], others_T[:, None])
        with torch.no_grad():
            chosen, weights, _ = router(to_torch(logits_TE.reshape(-1, length, E)))
        chosen_TE = chosen.reshape(-1, E).numpy()
        kept_T = chosen_TE.any(axis=1)
        kept_weights_T = np.where(kept_T, weights.reshape(-1).numpy(), 0)
        return {
            "expert_ids_TK": np.where(kept_T, chosen_TE.argmax(axis=1), -1)[:, None],
            "weights_TK": kept_weights_T[:, None],
        }


def _switch_loss(logits: torch.Tensor, expert_ids_TK: torch.Tensor, token_mask_T, sequence_lengths) -> torch.Tensor:
    if token_mask_T is not None:
        raise Unsupported("the loss of switch_transformers takes no mask")
    length = _equal_length(sequence_lengths, len(logits))
    _check_one_slot(expert_ids_TK.numpy())
    probs = torch.softmax(logits, dim=-1).unflatten(0, (-1, length))
    ids = expert_ids_TK[:, 0].unflatten(0, (-1, length))
    return _module("switch_transformers").load_balancing_loss_func(probs, ids)


def _check_one_slot(expert_ids_TK: np.ndarray) -> None:
    if expert_ids_TK.shape[1] != 1 or (expert_ids_TK < 0).any():
        raise Unsupported("a token of switch_transformers has exactly one expert")


def _equal_length(lengths, num_tokens: int) -> int:
    """The length of every sequence of a batch."""
    if num_tokens == 0 or len(set(lengths or [num_tokens])) != 1:
        raise Unsupported("the sequences of a batch of transformers have one length, and some token")
    return num_tokens if lengths is None else lengths[0]


def _module(family: str):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if not hasattr(module, "load_balancing_loss_func"):
        raise Unsupported(f"transformers has no balance loss for {family}")
    return module


@lru_cache(maxsize=64)
def _switch_router(num_experts: int):
    """The router as its block builds it, with the tokens for logits."""
    from transformers.models.switch_transformers.configuration_switch_transformers import SwitchTransformersConfig

    config = SwitchTransformersConfig(d_model=num_experts, num_experts=num_experts, router_dtype="float32")
    router = _module("switch_transformers").SwitchTransformersTop1Router(config).eval()
    give_identity_gate(router, "classifier.weight")
    return router
