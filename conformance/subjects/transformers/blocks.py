"""conformance, subject transformers: which block computes which layer, one row for each, as data.

A block is a router of `families.py`, experts, and perhaps shared experts. A row says where they are, how
their weights are stored, and what they compute. Checked against transformers 5.24.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conformance.subjects.transformers.families import ROUTERS, RealRouter
from moe_ref import ExpertSpec, LatentSpec, LayerSpec, RouterSpec, SharedSpec, WeightLayout

ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
"""Activation of ExpertSpec -> its name in a config."""

HALVES = WeightLayout(fused="halves", order="out_in")
LINEARS = WeightLayout(fused="separate", order="out_in")


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Where the weights of experts are in a block, and how they are stored."""

    path: str
    layout: WeightLayout = HALVES
    gate_up: tuple[str, ...] = ("gate_up_proj",)
    """One name where fused or not gated, else gate and up."""
    down: str = "down_proj"
    down_order: str = ""
    """Order of the down projection where it is not that of the layout."""
    biases: tuple[str, ...] = ()
    """Names of the gate_up and the down bias."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared expert of a block."""

    projections: Projections
    width: str = ""
    """Config name of its width."""
    count: str = ""
    """Config name of what its width is a multiple of the experts' width by; neither: it is as wide as an expert."""
    is_optional: bool = False
    """Whether there are blocks without it: count 0."""
    is_scored: bool = False
    """Whether there are as many as the router scores."""
    gate: str = ""
    """Path of the weight of its sigmoid gate."""
    combine: str = ""
    """Config name of how it joins the routed output; else it is the sum."""
    clamp: str = "none"
    """none, same (as the routed experts), or the config name of a list with one clamp per layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RealBlock:
    """A block class of transformers, and the layers that it computes."""

    name: str
    """Of its row in ROUTERS."""
    block: str
    router: str = "gate"
    experts: Projections
    width: str = "moe_intermediate_size"
    """Config name of the experts' width."""
    shared: Shared | None = None
    latent: tuple[str, ...] = ()
    """Paths of the weights of the projections before and after the routed experts; none: they see the tokens."""
    latent_width: str = ""
    """Config name of the width between them; null: none."""
    bias: str = ""
    """Path of the balancing bias where it is the block's and not the router's."""
    activation: str = "hidden_act"
    """Config name of the activation; '': silu alone."""
    is_gated: bool = True
    alpha: str = ""
    """Config name of alpha; '': 1."""
    up_offset: float = 0.0
    clamp: str = ""
    """Config name of the clamp; '': none."""
    clamp_at: str = "before"
    clamp_is_per_layer: bool = False
    """Whether the config has a list with one clamp per layer."""
    extra: Callable[[LayerSpec, dict], dict] | None = None
    """Further config entries, from the spec and the entries so far."""
    arguments: tuple = ()
    """What its constructor takes after the config."""
    interface: str = "usual"
    """How its experts are called: usual (tokens, ids, weights), sequences (the same, with an axis for the batch),
    padded (as many rows for each expert), or none: they fail where a token has one expert (longcat_flash)."""
    implementations: tuple[str, ...] = ("eager", "grouped_mm", "batched_mm")

    @property
    def row(self) -> RealRouter:
        """Its router."""
        return ROUTERS[self.name]

    def example(self, router: RouterSpec, dim: int, hidden_dim: int) -> LayerSpec:
        """A layer of this router that the block computes, with everything that the block has."""
        activation = "silu"
        if self.activation:
            activation = "gelu_tanh" if self.is_gated else "relu2"
        experts = ExpertSpec(
            dim=dim,
            hidden_dim=hidden_dim,
            gated=self.is_gated,
            activation=activation,
            alpha=1.702 if self.alpha else 1.0,
            up_offset=self.up_offset,
            clamp=0.7 if self.clamp else None,
            clamp_at=self.clamp_at,
            bias=bool(self.experts.biases),
        )
        shared, own = None, self.shared
        if own is not None:
            shared = SharedSpec(
                hidden_dim=20 if own.width else 2 * hidden_dim if own.count else hidden_dim,
                gate="sigmoid" if own.gate else "none",
                combine="average" if own.combine else "sum",
                clamp={"none": None, "same": 0.7}.get(own.clamp, 0.4),
            )
        return LayerSpec(
            router=router,
            experts=experts,
            shared=shared,
            gate_bias=bool(self.row.gate_bias),
            latent=LatentSpec(dim=8) if self.latent else None,
        )

    def mismatches(self, spec: LayerSpec) -> list[str]:
        """What the block cannot do of this spec, as 'field (its value, not the wanted one)'; empty: it fits."""
        found = [f"router.{each}" for each in self.row.mismatches(spec.router)]
        if spec.gate_bias != bool(self.row.gate_bias):
            found.append(f"gate_bias ({bool(self.row.gate_bias)}, not {spec.gate_bias})")
        if spec.latent is not None and not self.latent:
            found.append(f"latent (none, not one of {spec.latent.dim})")
        elif spec.latent is not None and spec.latent.norm_eps is not None:
            found.append(f"latent.norm_eps (None, not {spec.latent.norm_eps})")
        if self.row.width_is_even and spec.experts.dim % 2:
            found.append(f"experts.dim (even, not {spec.experts.dim})")
        return found + self._expert_mismatches(spec.experts) + self._shared_mismatches(spec)

    def _expert_mismatches(self, experts: ExpertSpec) -> list[str]:
        has: dict[str, tuple] = {
            "gated": (self.is_gated,),
            "activation": tuple(ACTIVATION_NAMES) if self.activation else ("silu",),
            "alpha": (experts.alpha if self.alpha else 1.0,),
            "up_offset": (self.up_offset,),
            "clamp": (experts.clamp if self.clamp else None,),
            "clamp_at": (experts.clamp_at if experts.clamp is None else self.clamp_at,),
            "bias": (bool(self.experts.biases),),
        }
        wanted = {name: getattr(experts, name) for name in has}
        return [_mismatch(f"experts.{name}", has[name], wanted[name]) for name in has if wanted[name] not in has[name]]

    def _shared_mismatches(self, spec: LayerSpec) -> list[str]:
        shared, own = spec.shared, self.shared
        if shared is None:
            return [] if own is None or own.is_optional else ["shared (always one, not none)"]
        if own is None:
            return ["shared (none, not one)"]
        found = []
        width = spec.experts.hidden_dim
        if own.count and shared.hidden_dim % width:
            found.append(f"shared.hidden_dim (a multiple of {width}, not {shared.hidden_dim})")
        if not own.count and not own.width and shared.hidden_dim != width:
            found.append(f"shared.hidden_dim ({width}, not {shared.hidden_dim})")
        has = {
            "gate": ("sigmoid" if own.gate else "none",),
            "combine": ("sum", "average") if own.combine else ("sum",),
            "clamp": {"none": (None,), "same": (spec.experts.clamp,)}.get(own.clamp, (shared.clamp,)),
        }
        wanted = {name: getattr(shared, name) for name in has}
        return found + [
            _mismatch(f"shared.{name}", has[name], wanted[name]) for name in has if wanted[name] not in has[name]
        ]

    def config_entries(self, values: dict, spec: LayerSpec) -> dict:
        """Keyword arguments of the config class; `values` are the fields of the spec's router."""
        experts = spec.experts
        entries = self.row.config_entries(values, experts.dim) | {self.width: experts.hidden_dim}
        if self.activation:
            entries[self.activation] = ACTIVATION_NAMES[experts.activation]
        if self.alpha:
            entries[self.alpha] = experts.alpha
        if self.clamp:
            limit = float("inf") if experts.clamp is None else experts.clamp
            entries[self.clamp] = [experts.clamp] if self.clamp_is_per_layer else limit
        if self.shared is not None:
            entries |= _shared_entries(self.shared, spec.shared, experts.hidden_dim)
        if spec.latent is not None:
            entries[self.latent_width] = spec.latent.dim
        return entries | (self.extra(spec, entries) if self.extra else {})


def _shared_entries(own: Shared, shared: SharedSpec | None, expert_width: int) -> dict:
    """Config entries of the shared expert."""
    if shared is None:
        return {own.count: 0}
    entries: dict[str, Any] = {}
    if own.width:
        entries[own.width] = shared.hidden_dim
    if own.count:
        entries[own.count] = shared.hidden_dim // expert_width
    if own.combine:
        entries[own.combine] = shared.combine
    if own.clamp not in ("none", "same"):
        entries[own.clamp] = [shared.clamp]
    return entries


def _mismatch(field: str, has: tuple, wanted) -> str:
    return f"{field} ({' or '.join(map(str, has))}, not {wanted})"


EXPERTS = Projections(path="experts")
IN_OUT_BIASES = ("gate_up_proj_bias", "down_proj_bias")


def mlp(path: str) -> Projections:
    """A feed-forward of three nn.Linear."""
    return Projections(path=path, layout=LINEARS, gate_up=("gate_proj.weight", "up_proj.weight"),
                       down="down_proj.weight")  # fmt: skip


def block(name: str, block: str, **others) -> RealBlock:
    """A row; the experts are fused halves, [out, in], under `experts`."""
    merged: dict = {"experts": EXPERTS} | others
    return RealBlock(name=name, block=block, **merged)


def multiple(name: str, block_: str, count: str = "n_shared_experts", **others) -> RealBlock:
    """A row with one shared expert whose width is a multiple of the experts'."""
    return block(name, block_, **{"shared": Shared(projections=mlp("shared_experts"), count=count)} | others)


def own_width(name: str, block_: str, path: str, gate: str = "", **others) -> RealBlock:
    """A row with one shared expert of any width, perhaps with a sigmoid gate."""
    width = "shared_expert_intermediate_size"
    return block(name, block_, shared=Shared(projections=mlp(path), width=width, gate=gate), **others)


def _dbrx(spec: LayerSpec, entries: dict) -> dict:
    sizes = {"hidden_size": spec.experts.dim, "ffn_hidden_size": spec.experts.hidden_dim}
    return {"ffn_config": entries["ffn_config"] | sizes}


GPT_OSS: dict = {"router": "router", "width": "intermediate_size", "activation": "", "alpha": "swiglu_alpha",
                 "up_offset": 1.0, "clamp": "swiglu_limit"}  # fmt: skip
NARROW = {"width": "intermediate_size"}
COHERE2: dict = NARROW | {"shared": Shared(projections=mlp("shared_experts"), count="num_shared_experts",
                          is_optional=True, combine="shared_expert_combination_strategy")}  # fmt: skip

ROWS = (
    # Experts alone.
    block("mixtral", "MixtralSparseMoeBlock", **NARROW),
    block("olmoe", "OlmoeSparseMoeBlock", **NARROW),
    block("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    block("minimax_m2", "MiniMaxM2SparseMoeBlock", bias="e_score_correction_bias", **NARROW),
    block("minimax", "MiniMaxSparseMoeBlock", **NARROW),
    block("flex_olmo", "FlexOlmoSparseMoeBlock", **NARROW),
    block("phimoe", "PhimoeSparseMoeBlock", router="router", **NARROW),
    block("jamba", "JambaSparseMoeBlock", router="router", **NARROW),
    *(block(name, f"{prefix}MoE", router="router", **NARROW) for name, prefix in (
        ("granitemoe", "GraniteMoe"), ("granitemoeshared", "GraniteMoeShared"), ("granitemoe_swa", "GraniteMoeSWA"),
        ("granitemoehybrid", "GraniteMoeHybrid"))),
    block("mellum", "MellumSparseMoeBlock"),
    block("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock"),
    block("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock"),
    block("mimo_v2_flash", "MiMoV2FlashMoE"),
    block("beam", "BeamMoE"),
    block("lfm2_moe", "Lfm2MoeSparseMoeBlock", bias="expert_bias", activation=""),
    block("longcat_flash", "LongcatFlashMoE", router="router", width="expert_ffn_hidden_size",
          interface="none", implementations=("eager",)),
    block("dbrx", "DbrxFFN", router="", width="", activation="", extra=_dbrx, interface="sequences",
          implementations=("eager",), experts=Projections(
              path="experts.mlp", layout=LINEARS, gate_up=("w1", "v1"), down="w2", down_order="in_out")),
    block("gpt_oss", "GptOssMLP", **GPT_OSS, experts=Projections(
        path="experts", layout=WeightLayout(fused="interleaved"), biases=IN_OUT_BIASES)),
    # A shared expert whose width is a multiple.
    multiple("deepseek_v3", "DeepseekV3MoE"),
    multiple("deepseek_v2", "DeepseekV2Moe"),
    *(multiple(name, f"{prefix}MoE") for name, prefix in (
        ("glm4_moe", "Glm4Moe"), ("axk2", "AXK2"), ("mistral4", "Mistral4"), ("mistral_large4", "MistralLarge4Text"),
        ("deepseek_v32", "DeepseekV32"), ("glm4_moe_lite", "Glm4MoeLite"), ("glm_moe_dsa", "GlmMoeDsa"),
        ("dots1", "Dots1"), ("solar_open", "SolarOpen"), ("glm4v_moe", "Glm4vMoeText"), ("kimi_linear", "KimiLinear"),
        ("bailing_hybrid", "BailingHybrid"))),
    multiple("deepseek_ocr2", "DeepseekOcr2TextMoe"),
    multiple("unlimited_ocr", "UnlimitedOcrTextMoe"),
    multiple("exaone_moe", "ExaoneMoeSparseMoEBlock", "num_shared_experts"),
    multiple("hy_v3", "HYV3MoE", "num_shared_experts", bias="e_score_correction_bias"),
    multiple("afmoe", "AfmoeSparseMoeBlock", "num_shared_experts", router="router", bias="expert_bias"),
    multiple("hy_v4", "HYV4MoE", activation="", clamp="swiglu_limit"),
    multiple("hy_v4_vl", "HYV4VLMoE", activation="", clamp="swiglu_limit"),
    multiple("glm5_next", "Glm5NextTextMoE", activation="", clamp="swiglu_limit", shared=Shared(
        projections=mlp("shared_experts"), count="n_shared_experts", clamp="same")),
    multiple("aria", "AriaTextMoELayer", "moe_num_shared_experts", router="router", activation="", **NARROW,
             experts=Projections(path="experts", layout=WeightLayout(fused="halves"))),
    multiple("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", shared=Shared(
        projections=mlp("shared_experts"), count="moe_num_shared_experts", is_optional=True)),
    block("cohere2_moe", "Cohere2MoeSparseMoeBlock", **COHERE2),
    block("cohere2_moe_sigmoid", "Cohere2MoeSparseMoeBlock", **COHERE2),
    # A shared expert of its own width.
    *(own_width(name, f"{prefix}SparseMoeBlock", "shared_expert", gate="shared_expert_gate.weight")
      for name, prefix in (
        ("qwen2_moe", "Qwen2Moe"), ("qwen3_next", "Qwen3Next"), ("qwen3_5_moe", "Qwen3_5Moe"),
        ("qwen3_omni_moe_talker", "Qwen3OmniMoeTalkerText"))),
    own_width("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", "shared_expert", gate="shared_expert_gate.weight",
              activation=""),
    own_width("lara_mini", "LaraMiniSparseMoeBlock", "shared_expert"),
    own_width("flint", "FlintSparseMoeBlock", "shared_expert"),
    own_width("laguna", "LagunaSparseMoeBlock", "shared_experts"),
    own_width("kolibri1", "Kolibri1SparseMoeBlock", "shared_experts"),
    block("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", **GPT_OSS | {"router": "gate"}, shared=Shared(
        projections=Projections(path="shared_experts", gate_up=("gate_up_proj.weight",), down="down_proj.weight"),
        width="shared_intermediate_size", clamp="same")),
    block("step3p7", "Step3p7SparseMoeBlock", clamp="swiglu_limits", clamp_at="after", clamp_is_per_layer=True,
          activation="", arguments=(0,), implementations=("eager",), shared=Shared(
        projections=mlp("shared_experts"), width="share_expert_dim", clamp="swiglu_limits_shared")),
    block("nemotron_h", "NemotronHMoE", activation="mlp_hidden_act", is_gated=False, latent_width="moe_latent_size",
          latent=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
          experts=Projections(path="experts", layout=LINEARS, gate_up=("up_proj",)), shared=Shared(
        projections=Projections(path="shared_experts", layout=LINEARS, gate_up=("up_proj.weight",),
                                down="down_proj.weight"), width="moe_shared_expert_intermediate_size")),
    # One as wide as an expert.
    block("llama4", "Llama4TextMoe", router="router", **NARROW, interface="padded", implementations=("eager",),
          experts=Projections(path="experts", layout=WeightLayout(fused="halves")),
          shared=Shared(projections=mlp("shared_expert"))),
    block("hunyuan_v1_moe", "HunYuanMoEV1Moe", **NARROW, shared=Shared(projections=mlp("shared_mlp"))),
    block("deepseek_v4", "DeepseekV4SparseMoeBlock", **NARROW, clamp="swiglu_limit", arguments=(0,),
          extra=lambda spec, entries: {"mlp_layer_types": ["moe"] * entries["num_hidden_layers"]},
          shared=Shared(projections=mlp("shared_experts"), clamp="same")),
    # As many as the router scores.
    block("inkling", "InklingMoE", shared=Shared(is_scored=True, projections=Projections(
        path="shared_experts", layout=LINEARS, gate_up=("gate_proj", "up_proj")))),
    # Last: K times weights divided by K.
    block("openai_privacy_filter", "OpenAIPrivacyFilterMLP", **GPT_OSS, experts=Projections(
        path="experts", layout=WeightLayout(fused="halves"), biases=IN_OUT_BIASES)),
)  # fmt: skip

BLOCKS: dict[str, RealBlock] = {each.name: each for each in ROWS}
"""Every block by the name of its family, in the order in which a spec looks for one."""

NO_BLOCK = {
    "axk1": "its block ends in a norm",
    "deepseek_v4_hash": "its block takes token ids beside the tokens",
    "diffusion_gemma": "it has no block of its own, and its router normalises the tokens",
    "dots3_note": "the width of its shared expert is a product of two config entries",
    "ernie4_5_vl_moe": "its block mixes two kinds of tokens",
    "gemma4": "it has no block of its own, and its router normalises the tokens",
    "inkling2": "its activation is capped",
    "inkling2_loop": "its activation is capped",
    "jetmoe": "its block adds a bias to the output",
    "muse_spark": "its block has projections and norms around the experts",
    "zaya": "its gate is a network",
}
"""Families whose block no LayerSpec describes, or that are left out, and why."""
