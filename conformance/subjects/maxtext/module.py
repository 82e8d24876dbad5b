"""conformance, subject maxtext: its modules RoutedMoE and RoutedAndSharedMoE, built without a trainer or a decoder.

The config is a real one, `pyconfig.initialize` on base.yml, over which the entries of a spec are laid (`Settings`): its
validation refuses small layers for reasons that are not theirs, such as an expert axis of a mesh that is not its own.
Buffers that MaxText leaves uninitialised (`jax.lax.empty`) hold NaN, or another number that is asked for.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from conformance.core.subject import Unsupported
from conformance.subjects.maxtext.settings import Block, settings_of
from moe_ref import LayerParams, LayerSpec

MOST_RANKS = 8
"""Devices of a mesh."""
if not jax.distributed.is_initialized() and jax.config.jax_num_cpu_devices < MOST_RANKS:  # type: ignore[attr-defined]
    jax.config.update("jax_num_cpu_devices", MOST_RANKS)
logging.getLogger("transformers").setLevel(logging.ERROR)  # which MaxText imports, and which warns of its own files

# By name: neither is in the environment in which types are checked.
_load: Callable[[str], Any] = importlib.import_module
nnx, partitioning = _load("flax.nnx"), _load("flax.linen.partitioning")
pyconfig, moe = _load("maxtext.configs.pyconfig"), _load("maxtext.layers.moe")
DecoderBlockType = _load("maxtext.common.common_types").DecoderBlockType

FLOAT32 = {
    "dtype": jnp.dtype("float32"), "weight_dtype": jnp.dtype("float32"), "matmul_precision": "highest",
    "float32_gate_logits": True,
}  # fmt: skip
"""Everything in float32."""
PARAMETERS = {
    ("gate", "kernel"): "gate_ED",
    ("wi_0",): "w_gate_EDF",
    ("wi_1",): "w_up_EDF",
    ("wo",): "w_down_EFD",
    ("wi_0_bias",): "b_gate_EF",
    ("wi_1_bias",): "b_up_EF",
    ("wo_bias",): "b_down_ED",
    ("gate", "bias"): "gate_bias_E",
    ("per_expert_scale",): "learned_scale",
    ("shared_experts", "wi_0", "kernel"): "shared_w_gate_SDF",
    ("shared_experts", "wi_1", "kernel"): "shared_w_up_SDF",
    ("shared_experts", "wo", "kernel"): "shared_w_down_SFD",
}
"""Path in the module, without that of the routed part -> field of LayerParams."""


BIAS, TABLE = ("gate", "bias"), ("tid2eid",)


class Settings:
    """A config of MaxText with other values for some entries."""

    def __init__(self, base: Any, entries: dict[str, Any]):
        self._base, self._entries = base, entries
        self._entries["decoder_block"] = DecoderBlockType(entries["decoder_block"])

    def __getattr__(self, name: str) -> Any:
        entries = self.__dict__["_entries"]
        return entries[name] if name in entries else getattr(self.__dict__["_base"], name)


def initialize(**entries: Any) -> Any:
    """A config as a training would have it, of a model with one tiny layer."""
    base_yml = Path(str(pyconfig.__file__)).with_name("base.yml")
    sizes = {
        "base_emb_dim": 8, "base_mlp_dim": 8, "base_moe_mlp_dim": 8, "base_num_decoder_layers": 1,
        "base_num_query_heads": 2, "base_num_kv_heads": 2, "head_dim": 16, "vocab_size": 64, "max_target_length": 16,
        "per_device_batch_size": 1, "num_experts": 4, "num_experts_per_tok": 2, "decoder_block": "mixtral",
    }  # fmt: skip
    return pyconfig.initialize(
        [None, str(base_yml)], run_name="conformance", enable_checkpointing=False, skip_jax_distributed_system=True,
        **sizes | entries,
    )  # fmt: skip


@lru_cache(maxsize=1)
def base() -> Any:
    """The defaults, with the grouped matmul that a CPU has."""
    with _quiet():
        return initialize(megablox=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of a config, which is one line for each of its 1,200 entries."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def mesh_of(axes: dict[str, int]) -> Mesh:
    """A mesh of its axes, of size 1 where they are not named."""
    names = base().mesh_axes
    sizes = [axes.get(name, 1) for name in names]
    return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names)


@contextmanager
def scope(mesh: Mesh, *, identity_gate: bool = False, fill: float = np.nan) -> Iterator[None]:
    """Where its layers are built and traced: the mesh, its logical axes, and poison in buffers without values.

    Without the logical axes every array would be replicated.

    Args:
        mesh: of the module.
        identity_gate: the gate returns its input as logits. The product with an identity matrix is not computed, so
            that -inf and NaN arrive unharmed.
        fill: what `jax.lax.empty` holds.
    """

    def poisoned(shape, dtype=jnp.float32, **_):
        return jnp.full(shape, fill, dtype)

    def same(inputs, kernel, *_, **__):
        return inputs

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(partitioning.axis_rules(base().logical_axis_rules))
        stack.enter_context(mock.patch.object(jax.lax, "empty", poisoned))
        if identity_gate:
            stack.enter_context(mock.patch.object(moe.linears, "_compute_dot_general_nnx", same))
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class Built:
    """A module with parameters of 0, and its mesh."""

    definition: Any
    state: Any
    mesh: Mesh
    block: Block

    @classmethod
    def of(cls, spec: LayerSpec, entries: dict[str, Any], *, expert_bias: bool, axes: dict[str, int] | None = None):
        """That of a spec, with further entries of its config.

        Raises:
            Unsupported: MaxText has no such layer; a sentence that says why.
        """
        try:
            block, own = settings_of(spec, expert_bias=expert_bias)
        except ValueError as sentence:
            raise Unsupported(str(sentence)) from None
        config, mesh = Settings(base(), own | entries), mesh_of(axes or {})

        def zeros(_, shape, dtype, *__):
            return jnp.zeros(shape, dtype)

        how: dict[str, Any] = {
            "config": config, "mesh": mesh, "kernel_init": zeros, "kernel_axes": ("embed_moe", None),
            "rngs": nnx.Rngs(params=0), "weight_dtype": config.weight_dtype, "dtype": config.dtype,
            "is_hash_routing": spec.router.selector == "table",
        }  # fmt: skip
        with scope(mesh):
            if spec.shared is not None:
                width = spec.shared.hidden_dim
                with mock.patch.object(moe.maxtext_utils, "get_shared_expert_mlp_dim", lambda _, width=width: width):
                    module = moe.RoutedAndSharedMoE(**how)
            else:
                module = moe.RoutedMoE(
                    num_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
                    intermediate_dim=config.moe_mlp_dim, **how,
                )  # fmt: skip
        definition, state = nnx.split(module)
        return cls(definition=definition, state=state, mesh=mesh, block=block)

    def module(self, leaves: dict[tuple[str, ...], Any]) -> Any:
        """With these values of its parameters, by `name_of`."""

        def leaf(path: tuple, old: Any) -> Any:
            return leaves.get(name_of(path), old)

        return nnx.merge(self.definition, jax.tree.map_with_path(leaf, self.state))

    def leaves(self, params: LayerParams, table_VK: np.ndarray | None = None) -> dict[tuple[str, ...], Any]:
        """The values of its parameters; its one bias of the gate is the balancing bias, or the learned one."""
        found = {}
        for path, old in jax.tree.leaves_with_path(self.state):
            name = name_of(path)
            value = None if name not in PARAMETERS else getattr(params, PARAMETERS[name])
            if name == BIAS:
                value = params.expert_bias_E if self.block.expert_bias else params.gate_bias_E
                value = np.zeros(old.shape) if value is None else value
            elif name == TABLE and table_VK is not None:
                value = table_VK
            if value is not None:
                found[name] = jnp.asarray(to_native(name, value), old.dtype)
        return found


def name_of(path: tuple) -> tuple[str, ...]:
    """The path of a leaf, without that of the routed part and of the value of a variable."""
    names = [getattr(each, "key", getattr(each, "name", None)) for each in path]
    return tuple(str(name) for name in names if name not in ("MoeBlock_0", "value", None))


def to_native(name: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """A parameter as the module keeps it: its gate is [in, out], and there is one shared expert."""
    value = np.asarray(value)
    if name == ("gate", "kernel"):
        return value.T
    return value[0] if name[0] == "shared_experts" else value


def gradients_of(d_leaves: dict[tuple[str, ...], Any], params: LayerParams) -> dict[str, np.ndarray]:
    """Gradients by field of LayerParams, in the shapes of the parameters; that of a balancing bias is left out."""
    found = {}
    for name, leaf in d_leaves.items():
        field = PARAMETERS.get(name)
        if field is None or getattr(params, field) is None:
            continue
        value = np.asarray(leaf, np.float32)
        found[field] = value.T if field == "gate_ED" else value.reshape(np.shape(getattr(params, field)))
    return found


def routed(module: Any) -> Any:
    """The RoutedMoE of either module."""
    return module.MoeBlock_0 if isinstance(module, moe.RoutedAndSharedMoE) else module
