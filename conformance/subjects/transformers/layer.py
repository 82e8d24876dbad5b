"""conformance, subject transformers: the MoE blocks of huggingface/transformers, as they are.

A block is built from a small config, the parameters are written into it in its own layout, and it is called as its
decoder layer calls it. Gradients come from autograd and are brought back into the canonical layout. Which block
computes what is data, in `blocks.py`.
"""

import importlib
from collections.abc import Callable, Hashable
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch

from conformance.core.subject import Subject, Unsupported
from conformance.subjects.torch.arrays import to_numpy, to_torch
from conformance.subjects.transformers.arrays import load_params, prefix, to_canonical, to_native
from conformance.subjects.transformers.blocks import BLOCKS, NO_BLOCK, RealBlock
from conformance.subjects.transformers.router import NOT_INSTALLED, installed, keep_in_float32, turn
from moe_ref import LayerParams, LayerSpec, ShardLayout

GROUPED_MM = "grouped_mm"
IMPLEMENTATIONS = ("eager", GROUPED_MM, "batched_mm")
"""The loop of the model file, and what the library swaps in; a model has grouped_mm unless it is told otherwise."""


class TransformersLayer(Subject):
    """The block of transformers that computes a layer; with `family`, only that family's."""

    family: str = ""
    last_family: str = ""
    """The one that was called last."""
    last_implementation: str = ""
    experts_implementation: str = ""
    """One of IMPLEMENTATIONS; empty: they take turns."""

    def supports_layer(self, spec: LayerSpec, layout: ShardLayout | None = None) -> str | None:
        if layout is not None:
            return "transformers shards no layer here"
        return find_block(spec, self.family, False, self.experts_implementation)[1] or None

    def layer(self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec) -> np.ndarray:
        tokens_TD = to_torch(x_TD)
        module = self._loaded(params, spec, len(x_TD), dtype=tokens_TD.dtype)[1]
        with torch.no_grad():
            return to_numpy(run(module, tokens_TD))

    def layer_gradients(
        self, x_TD: np.ndarray, params: LayerParams, spec: LayerSpec, d_output_TD: np.ndarray
    ) -> dict[str, np.ndarray]:
        block, module = self._loaded(params, spec, len(x_TD))
        tokens_TD = to_torch(x_TD).requires_grad_()
        natives = to_native(block, params)
        weights = {path: module.get_parameter(path) for path in natives}
        for weight in weights.values():
            weight.requires_grad_()
        output_TD = run(module, tokens_TD)
        gradients = gradients_of(output_TD, to_torch(d_output_TD), [tokens_TD, *weights.values()])
        by_path = {
            path: prefix(gradient, natives[path])
            for path, gradient in zip(weights, gradients[1:], strict=True)
        }  # fmt: skip
        return {"x_TD": gradients[0]} | to_canonical(block, by_path, params)

    def experts(
        self, rows_RD: np.ndarray, tokens_per_expert_E: np.ndarray, params: LayerParams, spec: LayerSpec
    ) -> np.ndarray:
        """The experts alone; rows that belong to nobody are not given to them, and come back as 0."""
        # Whose turn it is does not depend on the rows: what is refused is refused in every check of a case.
        block, module = self._loaded(params, spec, None, refused=True)
        if block.interface == "none":
            raise Unsupported(f"the experts of {block.name} take no token that has a single expert")
        counts_E = np.asarray(tokens_per_expert_E)
        outputs_RD = np.zeros(np.shape(rows_RD), np.float32)
        rows = to_torch(rows_RD)[: counts_E.sum()]
        call = {"usual": call_usual, "sequences": call_with_sequences, "padded": call_padded}[block.interface]
        with torch.no_grad():
            outputs_RD[: counts_E.sum()] = to_numpy(call(module.get_submodule("experts"), rows, counts_E))
        return outputs_RD

    def _loaded(
        self,
        params: LayerParams,
        spec: LayerSpec,
        num_tokens: int | None,
        *,
        refused: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[RealBlock, torch.nn.Module]:
        """The block of a spec with these parameters; the number of tokens decides whose turn it is."""
        with_bias = params.expert_bias_E is not None
        found, why = find_block(spec, self.family, with_bias, self.experts_implementation, num_tokens, refused=refused)
        if found is None:
            raise Unsupported(why)
        block, self.last_implementation = found
        self.last_family = block.name
        module = build_block(block, spec, self.last_implementation, dtype).requires_grad_(False)
        load_params(module, block, params)
        return block, module


@lru_cache(maxsize=4096)
def find_block(
    spec: LayerSpec, family: str, with_bias: bool, implementation: str, key: Hashable = None, *, refused: bool = False
) -> tuple[tuple[RealBlock, str] | None, str]:
    """The block that computes the layer, and how its experts do, or a sentence that says why none does.

    Where several blocks or implementations do, the spec and the key say whose turn it is, as for a router. With
    `refused` it is that of grouped_mm too where this refuses the widths.
    """
    if family in NO_BLOCK:
        return None, f"the layer of {family} is not judged: {NO_BLOCK[family]}"
    blocks = [BLOCKS[family]] if family else list(BLOCKS.values())
    missing = {block: block.mismatches(spec) for block in blocks}
    fitting = [block for block in blocks if not missing[block]]
    runnable = [(block, each) for block in fitting for each in block.implementations if implementation in ("", each)]
    if not refused and is_unaligned(spec):
        # What it refuses is told by EXP-1, and leaves the layers to the others.
        if implementation == GROUPED_MM and runnable:
            return (
                None,
                f"experts are {spec.routed_experts.dim} and {spec.experts.hidden_dim} wide; grouped_mm takes "
                "float32 rows of a multiple of 4",
            )
        runnable = [(block, each) for block, each in runnable if each != GROUPED_MM]
    able = [(block, each) for block, each in runnable if block.row.bias or not with_bias]
    if able:
        found = installed(able, turn((spec, key), len(able)), lambda made: made[0].row.module)
        return found, "" if found else NOT_INSTALLED.format(able[0][0].name)
    if runnable:
        return None, f"{runnable[0][0].name} computes this layer, but without an expert bias"
    if fitting:
        return None, f"{fitting[0].name} computes this layer, but its experts have no {implementation}"
    closest = min(blocks, key=lambda block: len(missing[block]))
    who = closest.name if family else f"no transformers block computes this; the nearest, {closest.name},"
    return None, f"{who} differs in {', '.join(missing[closest])}"


def is_unaligned(spec: LayerSpec) -> bool:
    """Whether grouped_mm refuses the widths: its kernel wants strides of 16 bytes (huggingface/transformers#48644)."""
    return bool(spec.routed_experts.dim % 4 or spec.experts.hidden_dim % 4)


@lru_cache(maxsize=256)
def build_block(
    block: RealBlock, spec: LayerSpec, implementation: str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The block from its own config, as from_pretrained(dtype=...) makes it.

    Its parameters are NaN, so that one that is forgotten does not go unseen.
    """
    row = block.row
    modeling = importlib.import_module(f"transformers.models.{row.module}.modeling_{row.module}")
    configuration = importlib.import_module(f"transformers.models.{row.module}.configuration_{row.module}")
    config = getattr(configuration, row.config)(**block.config_entries(asdict(spec.router), spec))
    config._experts_implementation = implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = getattr(modeling, block.block)(config, *block.arguments).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if dtype != torch.float32:
        keep_in_float32(module, modeling, "mlp.", block.router)
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    return module


def run(module: torch.nn.Module, tokens_TD: torch.Tensor) -> torch.Tensor:
    """The block's output for one sequence; some return the router's output too."""
    found = module(tokens_TD[None])
    return (found[0] if isinstance(found, tuple) else found).reshape(tokens_TD.shape)


def gradients_of(output_TD: torch.Tensor, d_output_TD: torch.Tensor, inputs: list[torch.Tensor]) -> list[np.ndarray]:
    """Gradients of sum(output * d_output); 0 for what takes no part, as everything where there is no token."""
    if not output_TD.requires_grad:
        return [np.zeros(each.shape, np.float32) for each in inputs]
    found = torch.autograd.grad(output_TD, inputs, d_output_TD, allow_unused=True, materialize_grads=True)
    return [to_numpy(each) for each in found]


def call_usual(experts: Callable, rows_RD: torch.Tensor, counts_E: np.ndarray) -> torch.Tensor:
    """Each row is a token that has chosen its expert with weight 1."""
    ids_R1 = torch.from_numpy(np.repeat(np.arange(len(counts_E)), counts_E))[:, None]
    return experts(rows_RD, ids_R1, torch.ones_like(ids_R1, dtype=rows_RD.dtype)).reshape(rows_RD.shape)


def call_with_sequences(experts: torch.nn.Module, rows_RD: torch.Tensor, counts_E: np.ndarray) -> torch.Tensor:
    """The rows are the tokens of one sequence."""
    return call_usual(lambda rows_RD, *choices: experts(rows_RD[None], *choices), rows_RD, counts_E)


def call_padded(experts: torch.nn.Module, rows_RD: torch.Tensor, counts_E: np.ndarray) -> torch.Tensor:
    """Every expert is given as many rows as the fullest has; the further ones are 0."""
    ids_R = np.repeat(np.arange(len(counts_E)), counts_E)
    place_R = np.arange(len(ids_R)) - np.repeat(np.cumsum(counts_E) - counts_E, counts_E)
    padded = rows_RD.new_zeros(len(counts_E), max(counts_E), rows_RD.shape[1])
    padded[ids_R, place_R] = rows_RD
    return experts(padded.flatten(0, 1)).reshape(padded.shape)[ids_R, place_R]
