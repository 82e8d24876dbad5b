"""conformance, subject transformers: the routers of huggingface/transformers, as they are.

For each spec the router class that computes it is built from a small config, its gate is replaced by an identity
(`identity_gate`), and it is called as its block calls it. Which class computes what is data, in
`families.py`. Nothing is downloaded.
"""

import importlib
import sys
import zlib
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch

from conformance.core.subject import Routing, Subject, Unsupported
from conformance.subjects.identity_gate import give_identity_gate
from conformance.subjects.torch.arrays import numpy_if_any, to_numpy, to_torch
from conformance.subjects.transformers.families import DEFAULTS, ROUTERS, RealRouter
from moe_ref import RouterSpec, ShardLayout
from moe_ref.specs.base import Spec

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What a router module returned, under our names; torch tensors."""

    logits_TE: torch.Tensor
    weights_TK: torch.Tensor
    expert_ids_TK: torch.Tensor
    scores_TE: torch.Tensor | None = None
    shared_weights_TS: torch.Tensor | None = None


class TransformersRouter(Subject):
    """The router or block of transformers that computes a spec; with `family`, only that family's."""

    family: str = ""
    last_family: str = ""
    """The one that was called last."""

    def supports(self, spec: RouterSpec, layout: ShardLayout | None = None) -> str | None:
        if layout is not None:
            return "transformers shards no router"
        return find(spec, self.family, False)[1] or None

    def route(
        self,
        logits_TE: np.ndarray,
        spec: RouterSpec,
        expert_bias_E: np.ndarray | None,
        *,
        learned_scale: np.ndarray | None = None,
        token_ids_T: np.ndarray | None = None,
        table_VK: np.ndarray | None = None,
    ) -> Routing:
        row, why = find(spec, self.family, expert_bias_E is not None)
        if row is None:
            raise Unsupported(why)
        self.last_family = row.name
        tokens_TE = to_torch(logits_TE)
        router = build_for_logits(row, spec, tokens_TE.dtype)
        inputs = {"learned_scale": learned_scale, "token_ids_T": token_ids_T, "table_VK": table_VK}
        with torch.no_grad():
            bias_E = set_bias(router, row, expert_bias_E, spec.num_choices, tokens_TE.dtype)
            found = getattr(self, f"_call_{row.call}")(router, tokens_TE, bias_E, inputs)
        return Routing(
            expert_ids_TK=to_numpy(found.expert_ids_TK),
            weights_TK=to_numpy(found.weights_TK),
            scores_TE=numpy_if_any(found.scores_TE),
            shared_weights_TS=numpy_if_any(found.shared_weights_TS),
        )

    def gate(self, x_TD: np.ndarray, gate_ED: np.ndarray, gate_bias_E: np.ndarray | None) -> np.ndarray:
        row = ROUTERS[self.family or ("mixtral" if gate_bias_E is None else "gpt_oss")]
        if not row.plain_gate:
            raise Unsupported(f"the logits of {row.name} are not the product of tokens and gate alone")
        if gate_bias_E is not None and not row.gate_bias:
            raise Unsupported(f"the gate of {row.name} has no learned bias")
        self.last_family = row.name
        num_experts, hidden_size = gate_ED.shape
        tokens_TD = to_torch(x_TD)
        spec = row.example(num_experts)
        router = build(row, asdict(spec), hidden_size, tokens_TD.dtype)
        with torch.no_grad():
            router.get_parameter(row.gate).copy_(to_torch(gate_ED))
            if gate_bias_E is not None:
                router.get_parameter(row.gate_bias).copy_(to_torch(gate_bias_E))
            bias_E = set_bias(router, row, None, num_experts, tokens_TD.dtype)
            found = getattr(self, f"_call_{row.call}")(router, tokens_TD, bias_E, no_inputs(len(x_TD), spec.top_k))
        return to_numpy(found.logits_TE)

    def configure(self, fields: dict[str, Any]) -> None:
        """Config, router and a forward pass of two tokens; whatever the library raises passes through."""
        row, why = find_config(fields, self.family)
        if row is None:
            raise Unsupported(why)
        self.last_family = row.name
        values = asdict(row.example(8)) | fields
        num_experts, top_k = (
            n if isinstance(n, int) and n > 0 else 1 for n in (values["num_experts"], values["top_k"])
        )
        router = build(row, values, num_experts, torch.float32)
        with torch.no_grad():
            bias_E = set_bias(router, row, None, num_experts, torch.float32)
            getattr(self, f"_call_{row.call}")(router, torch.zeros(2, num_experts), bias_E, no_inputs(2, top_k))

    # How each kind of router is called by its block, and what it returns.

    def _call_usual(self, router, tokens_TE, bias_E, inputs) -> Returned:
        logits_TE, weights_TK, ids_TK = router(tokens_TE) if bias_E is None else router(tokens_TE, bias_E)
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK)

    def _call_rank_3(self, router, tokens_TE, bias_E, inputs) -> Returned:
        return self._call_usual(router, tokens_TE[None], bias_E, inputs)

    def _call_inkling(self, router, tokens_TE, bias_E, inputs) -> Returned:
        if inputs["learned_scale"] is not None:
            router.global_scale.copy_(to_torch(np.reshape(inputs["learned_scale"], 1)))
        logits_TE, weights_TK, ids_TK, shared_TS = router(tokens_TE)
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK, shared_weights_TS=shared_TS)

    def _call_deepseek_v4_hash(self, router, tokens_TE, bias_E, inputs) -> Returned:
        router.tid2eid = torch.as_tensor(inputs["table_VK"], dtype=torch.long)
        token_ids_T = torch.as_tensor(inputs["token_ids_T"], dtype=torch.long)
        logits_TE, weights_TK, ids_TK = router(tokens_TE, token_ids_T)
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK)

    def _call_dbrx(self, block, tokens_TE, bias_E, inputs) -> Returned:
        logits_TE = block.router(tokens_TE)
        weights_TK, ids_TK = block.route_tokens_to_experts(logits_TE)
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK)

    def _call_gemma4(self, router, tokens_TE, bias_E, inputs) -> Returned:
        # Before its gate this router normalises the token; given logits, that part is taken out.
        router.norm = torch.nn.Identity()
        router.scalar_root_size = 1.0
        if inputs["learned_scale"] is not None:
            router.per_expert_scale.copy_(to_torch(inputs["learned_scale"]))
        scores_TE, weights_TK, ids_TK = router(tokens_TE)
        return Returned(logits_TE=tokens_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK, scores_TE=scores_TE)

    def _call_zaya(self, router, tokens_TE, bias_E, inputs) -> Returned:
        # Its gate is a small network; given logits, that part is taken out.
        router.down_proj = router.router_mlp = torch.nn.Identity()
        logits_TE, weights_TK, ids_TK, _ = router(tokens_TE[None])
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK)

    def _call_llama4(self, router, tokens_TE, bias_E, inputs) -> Returned:
        scores_TE, logits_TE = router(tokens_TE)
        # It returns no ids: an expert is selected where its weight is not 0.
        selected_TE = scores_TE != 0
        if (selected_TE.sum(dim=-1) != router.top_k).any():
            raise Unsupported("llama4 returns no ids, and here a selected expert has weight 0 like the others")
        ids_TK = selected_TE.nonzero()[:, 1].reshape(-1, router.top_k)
        return Returned(logits_TE=logits_TE, weights_TK=scores_TE.gather(1, ids_TK), expert_ids_TK=ids_TK)

    def _call_jetmoe(self, router, tokens_TE, bias_E, inputs) -> Returned:
        slot_N, _, weight_N, size_E, logits_TE = router(tokens_TE)
        # Rows come sorted by expert; slot_N says which slot of which token each row was.
        expert_N = torch.repeat_interleave(torch.arange(len(size_E)), torch.tensor(size_E))
        ids_TK = torch.empty_like(slot_N).scatter_(0, slot_N, expert_N).reshape(-1, router.top_k)
        weights_TK = torch.empty_like(weight_N).scatter_(0, slot_N, weight_N).reshape(ids_TK.shape)
        return Returned(logits_TE=logits_TE, weights_TK=weights_TK, expert_ids_TK=ids_TK)


@lru_cache(maxsize=4096)
def find(spec: RouterSpec, family: str, with_bias: bool) -> tuple[RealRouter | None, str]:
    """The router that computes the spec, or a sentence that says why none does.

    Where several do, the spec says whose turn it is: a run judges all of them, and a case that replays the same one.
    """
    rows = [ROUTERS[family]] if family else list(ROUTERS.values())
    missing = {row: row.mismatches(spec) for row in rows}
    fitting = [row for row in rows if not missing[row]]
    able = [row for row in fitting if row.bias or not with_bias]
    if able:
        found = installed(able, turn(spec, len(able)), lambda row: row.module)
        return found, "" if found else NOT_INSTALLED.format(able[0].name)
    if fitting:
        return None, f"{fitting[0].name} computes this spec, but without an expert bias"
    closest = min(rows, key=lambda row: len(missing[row]))
    who = closest.name if family else f"no transformers router computes this; the nearest, {closest.name},"
    return None, f"{who} differs in {', '.join(missing[closest])}"


def turn(of: Hashable, several: int) -> int:
    """Which of several it is for this spec, or for a tuple with one; the same in every process.

    A field that is as by default has no say, so that a further one of a spec leaves all turns as they are.
    """
    return zlib.crc32(repr(told(of)).encode()) % several


NOT_INSTALLED = "the installed release of transformers does not have {}"


def installed(able: list[Made], first: int, module: Callable[[Made], str]) -> Made | None:
    """The one whose turn it is, or the next that the installed release of transformers has."""
    in_turn = (able[(first + later) % len(able)] for later in range(len(able)))
    return next((each for each in in_turn if has_module(module(each))), None)


@cache
def has_module(name: str) -> bool:
    """Whether the installed release has the models of that name."""
    return find_spec(f"transformers.models.{name}") is not None


def told(of: Any) -> Any:
    """A spec as the fields that differ from their default, also inside a tuple."""
    if isinstance(of, tuple):
        return tuple(told(each) for each in of)
    return of.to_dict() if isinstance(of, Spec) else of


def find_config(fields: dict, family: str) -> tuple[RealRouter | None, str]:
    """The first router whose config takes these raw fields, valid or not."""
    for row in [ROUTERS[family]] if family else ROUTERS.values():
        if all(name in row.free or value in row.has(name, DEFAULTS.get(name)) for name, value in fields.items()):
            return row, ""
    return None, f"no config of {family or 'transformers'} takes {', '.join(sorted(fields))} together"


@lru_cache(maxsize=1024)
def build_for_logits(row: RealRouter, spec: RouterSpec, dtype: torch.dtype) -> torch.nn.Module:
    """A router that takes logits: its gate is an identity."""
    router = build(row, asdict(spec), spec.num_logits, dtype)
    if row.gate:
        give_identity_gate(router, row.gate)
    return router


def build(row: RealRouter, values: dict, hidden_size: int, dtype: torch.dtype) -> torch.nn.Module:
    """The router module for the fields of a spec, as from_pretrained(dtype=...) makes it, with untrained weights."""
    if not has_module(row.module):
        raise Unsupported(NOT_INSTALLED.format(row.name))
    modeling = importlib.import_module(f"transformers.models.{row.module}.modeling_{row.module}")
    configuration = importlib.import_module(f"transformers.models.{row.module}.configuration_{row.module}")
    config = getattr(configuration, row.config)(**row.config_entries(values, hidden_size))
    arguments = {"jetmoe": (hidden_size, values["num_experts"], values["top_k"]), "zaya": (config, 0)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so does from_pretrained: a parameter with a dtype of its own keeps it
    try:
        router = getattr(modeling, row.router)(*arguments.get(row.call, (config,)))
    finally:
        torch.set_default_dtype(before)
    if dtype != torch.float32:
        keep_in_float32(router, modeling, "mlp.gate.")
    return router.eval().requires_grad_(False)


def keep_in_float32(module: torch.nn.Module, modeling, path: str, own_router: str = "") -> None:
    """Parameters and buffers on the strict keep-list of the model class are float32 in a bfloat16 model too.

    `path` is that of the module in its decoder layer, `own_router` what a block calls its router.
    Families differ in whether their balancing bias is on it (huggingface/transformers#39058, #42580).
    """
    kept = keep_list(modeling)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # Blocks call their router mlp.gate or mlp.router; the lists only ever name the former.
        if own_router and name.startswith(f"{own_router}."):
            name = "gate" + name.removeprefix(own_router)
        if any(pattern in path + name for pattern in kept):
            tensor.data = tensor.data.float()


def keep_list(modeling) -> set[str]:
    """What stays float32 in a bfloat16 model, in part of a name, by the model classes of a module."""
    return {
        pattern
        for each in vars(modeling).values()
        if isinstance(each, type) and each.__module__ == modeling.__name__
        for pattern in getattr(each, "_keep_in_fp32_modules_strict", None) or ()
    }


def set_bias(router: torch.nn.Module, row: RealRouter, expert_bias_E, num_choices: int, dtype: torch.dtype):
    """The balancing bias is written where the class keeps it (None: zeros), or returned where it is an argument."""
    if not row.bias:
        return None
    bias_E = torch.zeros(num_choices) if expert_bias_E is None else to_torch(expert_bias_E)
    if row.bias == "argument":
        # A list names one bias, the balancing one: that of afmoe since transformers 5.24.
        listed = any("bias" in pattern for pattern in keep_list(sys.modules[type(router).__module__]))
        return bias_E if row.bias_is_float32 or listed else bias_E.to(dtype)
    owner, _, name = row.bias.rpartition(".")
    kept = getattr(router.get_submodule(owner), name)
    kept.copy_(bias_E.reshape(kept.shape))
    return None


def no_inputs(num_tokens: int, top_k: int) -> dict:
    """The further inputs of a call where they do not matter."""
    table_VK = np.arange(top_k)[None]
    return {"learned_scale": None, "token_ids_T": np.zeros(num_tokens, np.int64), "table_VK": table_VK}
