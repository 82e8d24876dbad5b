"""moe_ref, checkpoints of huggingface: under which names, and how, each family stores the weights of a layer, as data.

A form is one naming. The first of a family is that of its modules in transformers 5.24, the others are those of
published files. Names are relative to a decoder layer (model.layers.3.), and {e} is the number of an expert.
"""

from dataclasses import dataclass, replace

from moe_ref.specs.params import WeightLayout

HALVES = WeightLayout(fused="halves", order="out_in")
LINEARS = WeightLayout(fused="separate", order="out_in")


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Where the projections of experts are, and how they are stored."""

    gate_up: tuple[str, ...]
    """One name where fused or not gated, else gate and up. With {e}: one tensor for each expert."""
    down: str
    layout: WeightLayout = LINEARS
    down_order: str = ""
    """Order of the down projection where it is not that of the layout."""
    biases: tuple[str, ...] = ()
    """Of gate_up and down."""
    is_flat: bool = False
    """Whether the experts follow each other in the first axis of a matrix (dbrx)."""
    unused_rows: bool = False
    """Whether gate_up has rows for the null experts too, which nothing reads (longcat_flash)."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (*self.gate_up, self.down, *self.biases)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One naming of the weights of a layer."""

    gate: str
    experts: Projections
    shared: Projections | None = None
    token_gate: str = ""
    """Of the shared expert."""
    expert_bias: str = ""
    gate_bias: str = ""
    learned_scale: str = ""
    latent: tuple[str, ...] = ()
    """Of the projections before and after the routed experts, nn.Linear each, and of the norm before the second."""
    bias_is_optional: bool = False
    """Whether files without a balancing bias exist."""
    ignored: tuple[str, ...] = ()
    """Names below the block that are no weights of the layer."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of the layer begin with: every key with one of these is its own."""
        names = [self.gate, *self.experts.names, *(self.shared.names if self.shared else ())]
        names += [name for name in (self.token_gate, self.expert_bias, *self.latent) if name]
        return tuple(dict.fromkeys(name.partition(".")[0] + "." for name in names))


def stacked(block: str = "mlp", layout: WeightLayout = HALVES, **others) -> Projections:
    """Three axes, gate and up fused."""
    return Projections(
        gate_up=(f"{block}.experts.gate_up_proj",), down=f"{block}.experts.down_proj", layout=layout, **others
    )


def linears(path: str) -> Projections:
    """nn.Linear each: gate_proj, up_proj, down_proj."""
    return Projections(gate_up=(f"{path}.gate_proj.weight", f"{path}.up_proj.weight"), down=f"{path}.down_proj.weight")


def w123(path: str) -> Projections:
    """nn.Linear each: w1 is the gate, w3 the up, w2 the down projection."""
    return Projections(gate_up=(f"{path}.w1.weight", f"{path}.w3.weight"), down=f"{path}.w2.weight")


def module(block: str = "mlp", gate: str = "gate.weight", shared: str = "", bias: str = "", token_gate: str = "",
           experts: Projections | None = None, **others) -> Form:  # fmt: skip
    """A form of transformers' own modules."""
    return Form(
        gate=f"{block}.{gate}", experts=experts or stacked(block),
        shared=linears(f"{block}.{shared}") if shared else None, expert_bias=f"{block}.{bias}" if bias else "",
        token_gate=f"{block}.{token_gate}" if token_gate else "", **others,
    )  # fmt: skip


def listed(form: Form, **changes) -> Form:
    """The published form of most: the same names, one nn.Linear for each projection of each expert."""
    return replace(form, experts=linears(f"{form.experts.down.split('.')[0]}.experts.{{e}}"), **changes)


def _in(block: str, form: Form) -> Form:
    """The same names in another block."""

    def moved(name: str) -> str:
        return f"{block}.{name.partition('.')[2]}" if name else ""

    def projections(own: Projections) -> Projections:
        return replace(own, gate_up=tuple(map(moved, own.gate_up)), down=moved(own.down),
                       biases=tuple(map(moved, own.biases)))  # fmt: skip

    return replace(
        form, gate=moved(form.gate), experts=projections(form.experts), expert_bias=moved(form.expert_bias),
        shared=projections(form.shared) if form.shared else None, token_gate=moved(form.token_gate),
        gate_bias=moved(form.gate_bias), latent=tuple(map(moved, form.latent)), learned_scale=moved(form.learned_scale),
    )  # fmt: skip


CORRECTION = "gate.e_score_correction_bias"
PLAIN = module()
BIASED = module(bias=CORRECTION)
DEEPSEEK = module(bias=CORRECTION, shared="shared_experts")
KIMI = replace(DEEPSEEK, latent=tuple(f"mlp.routed_expert_{name}.weight" for name in ("down_proj", "up_proj", "norm")))
SHARED = module(shared="shared_experts")
QWEN2 = module(shared="shared_expert", token_gate="shared_expert_gate.weight")
ROUTER = module(gate="router.weight")
MIXTRAL = replace(_in("block_sparse_moe", PLAIN), experts=w123("block_sparse_moe.experts.{e}"))
GPT_OSS = module(
    gate="router.weight",
    gate_bias="mlp.router.bias",
    experts=stacked(
        layout=WeightLayout(fused="interleaved"), biases=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias")
    ),
)
JAMBA = module("feed_forward", "router.weight")
LLAMA4 = module(
    "feed_forward", "router.weight", "shared_expert", experts=stacked("feed_forward", WeightLayout(fused="halves"))
)
GRANITE = module("block_sparse_moe", "router.weight")
GRANITE_SHARED = Projections(gate_up=("shared_mlp.input_linear.weight",), down="shared_mlp.output_linear.weight",
                             layout=HALVES)  # fmt: skip
GRANITE_FILE = replace(
    GRANITE,
    gate="block_sparse_moe.router.layer.weight",
    experts=Projections(
        gate_up=("block_sparse_moe.input_linear.weight",), down="block_sparse_moe.output_linear.weight", layout=HALVES
    ),
)
ARIA = module(gate="router.weight", shared="shared_experts", experts=stacked(layout=WeightLayout(fused="halves")))
NEMOTRON = Form(
    gate="mixer.gate.weight", expert_bias=f"mixer.{CORRECTION}",
    latent=("mixer.fc1_latent_proj.weight", "mixer.fc2_latent_proj.weight"),
    experts=Projections(gate_up=("mixer.experts.up_proj",), down="mixer.experts.down_proj"), shared=Projections(
        gate_up=("mixer.shared_experts.up_proj.weight",), down="mixer.shared_experts.down_proj.weight"))  # fmt: skip
MINIMAX_M3 = replace(
    BIASED,
    shared=Projections(
        gate_up=("mlp.shared_experts.gate_up_proj.weight",), down="mlp.shared_experts.down_proj.weight", layout=HALVES
    ),
)
AFMOE = module(gate="router.gate.weight", shared="shared_experts", bias="expert_bias")
HY_V3 = module(shared="shared_experts", bias="e_score_correction_bias")
STEP = module(shared="shared_experts", bias=CORRECTION)
DEEPSEEK_V4 = replace(DEEPSEEK, bias_is_optional=True, ignored=("mlp.gate.tid2eid",))
LONGCAT = module(
    gate="router.classifier.weight", bias="router.e_score_correction_bias", experts=stacked(unused_rows=True)
)
ERNIE = module(shared="shared_experts", bias="gate.moe_statics.e_score_correction_bias")

FORMS: dict[str, tuple[Form, ...]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "dots1",
                     "dots3_note", "solar_open", "axk1", "axk2", "glm5_next"), (DEEPSEEK, listed(DEEPSEEK))),
    **dict.fromkeys(("hy_v4", "hy_v4_vl"), (DEEPSEEK, replace(DEEPSEEK, shared=Projections(
        gate_up=("mlp.shared_experts.linear_gate.weight", "mlp.shared_experts.up_proj.weight"),
        down="mlp.shared_experts.down_proj.weight")), listed(DEEPSEEK))),
    **dict.fromkeys(("mimo_v2_flash", "beam"), (BIASED, listed(BIASED))),
    "exaone_moe": (DEEPSEEK, listed(DEEPSEEK, expert_bias="mlp.e_score_correction_bias")),
    "kimi_linear": (KIMI, replace(_in("block_sparse_moe", KIMI), experts=w123("block_sparse_moe.experts.{e}"))),
    "bailing_hybrid": (DEEPSEEK, listed(DEEPSEEK, expert_bias="mlp.gate.expert_bias")),
    "nemotron_h": (NEMOTRON, replace(NEMOTRON, experts=Projections(
        gate_up=("mixer.experts.{e}.up_proj.weight",), down="mixer.experts.{e}.down_proj.weight"))),
    **dict.fromkeys(("deepseek_v2", "deepseek_ocr2", "unlimited_ocr", "mistral4", "cohere2_moe"),
                    (SHARED, listed(SHARED))),
    "mistral_large4": (SHARED, Form(gate="gate.weight", experts=w123("experts.{e}"), shared=linears("shared_experts"))),
    "flint": (module(shared="shared_expert"), listed(module(shared="shared_expert"))),
    "lara_mini": (module(shared="shared_expert"),),
    "minimax_m2": (module(bias="e_score_correction_bias"), replace(
        MIXTRAL, expert_bias="block_sparse_moe.e_score_correction_bias")),
    "hy_v3": (HY_V3, replace(listed(HY_V3), gate="mlp.router.gate.weight", expert_bias="mlp.expert_bias",
                             shared=linears("mlp.shared_mlp"))),
    "afmoe": (AFMOE, listed(AFMOE)),
    "minimax_m3_vl": (MINIMAX_M3, replace(
        MIXTRAL, expert_bias="block_sparse_moe.e_score_correction_bias",
        shared=linears("block_sparse_moe.shared_experts"))),
    "step3p7": (STEP, Form(gate="moe.gate.weight", expert_bias="moe.router_bias", shared=linears("share_expert"),
        experts=Projections(gate_up=("moe.gate_proj.weight", "moe.up_proj.weight"), down="moe.down_proj.weight"))),
    "laguna": (module(bias=CORRECTION, shared="shared_experts"), listed(
        module(shared="shared_expert"), expert_bias="mlp.experts.e_score_correction_bias")),
    "lfm2_moe": (module("feed_forward", bias="expert_bias", bias_is_optional=True), replace(
        module("feed_forward", bias="expert_bias", bias_is_optional=True), experts=w123("feed_forward.experts.{e}"))),
    "kolibri1": (DEEPSEEK, listed(DEEPSEEK, expert_bias="moe.router.expert_bias")),
    "inkling": (replace(BIASED, learned_scale="mlp.gate.global_scale", shared=Projections(
        gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), down="mlp.shared_experts.down_proj")),),
    "deepseek_v4": (DEEPSEEK_V4, replace(
        _in("ffn", DEEPSEEK_V4), experts=w123("ffn.experts.{e}"), shared=w123("ffn.shared_experts"),
        expert_bias="ffn.gate.bias", ignored=("ffn.gate.tid2eid",))),
    "llama4": (LLAMA4,),
    **dict.fromkeys(("mixtral", "minimax"), (PLAIN, MIXTRAL)),
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe", "mellum"), (PLAIN,
    listed(PLAIN))),
    **dict.fromkeys(("qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_omni_moe_talker", "qwen4_exp"), (QWEN2,
    listed(QWEN2))),
    "jamba": (JAMBA, listed(JAMBA)),
    "hunyuan_v1_moe": (module(gate="gate.wg.weight", shared="shared_mlp"), listed(
        module(gate="gate.wg.weight", shared="shared_mlp"))),
    "dbrx": (Form(gate="ffn.router.layer.weight", experts=Projections(
        gate_up=("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"), down="ffn.experts.mlp.w2", down_order="in_out",
        is_flat=True)),),
    "ernie4_5_moe": (ERNIE, listed(ERNIE, expert_bias="mlp.moe_statics.e_score_correction_bias")),
    "longcat_flash": (LONGCAT, listed(LONGCAT)),
    "gpt_oss": (GPT_OSS,),
    "openai_privacy_filter": (replace(GPT_OSS, experts=replace(GPT_OSS.experts, layout=WeightLayout(fused="halves"))),),
    "granitemoe": (GRANITE, GRANITE_FILE),
    **dict.fromkeys(("granitemoeshared", "granitemoe_swa", "granitemoehybrid"), (
        replace(GRANITE, shared=GRANITE_SHARED), replace(GRANITE_FILE, shared=GRANITE_SHARED))),
    "aria": (ARIA, replace(ARIA, experts=Projections(
        gate_up=("mlp.experts.fc1.weight",), down="mlp.experts.fc2.weight", layout=WeightLayout(fused="halves")))),
    "phimoe": (ROUTER, MIXTRAL),
}  # fmt: skip
"""Forms by family, that of transformers' modules first."""
