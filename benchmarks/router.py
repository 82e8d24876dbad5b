"""benchmarks, the router: DeepSeek-V3's node-limited routing from logits, beside the routers people use.

    python -m benchmarks.router        # a table, and benchmarks/results/router.json
    python -m benchmarks.router --busy # while another process has one of the two cores; a table alone

The gate is left out everywhere: an identity takes its place, so that what is timed begins with the logits. Candidates
choose the same experts with the same weights, which is checked before the clock starts.
"""

import argparse
import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.harness import RESULTS, Timing, busy_core, machine, paired, table, use_cores, write_json
from moe_ref import RouterSpec

TOKENS, CORES = 16384, 2
SPEC = RouterSpec(
    num_experts=256, top_k=8, num_expert_groups=8, num_limited_groups=4, score_func="sigmoid",
    route_norm=True, norm_eps=1e-20, route_scale=2.5,
)  # fmt: skip


def data() -> tuple[np.ndarray, np.ndarray]:
    """(T, E) logits and an (E,) balancing bias, float32."""
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(TOKENS, SPEC.num_experts))
    return logits_TE.astype(np.float32), (0.05 * rng.normal(size=SPEC.num_experts)).astype(np.float32)


def dense_weights(expert_ids_TK, weights_TK) -> np.ndarray:
    """(T, E) weights, 0 where an expert is not chosen: the order of the slots is free."""
    weights_TE = np.zeros((TOKENS, SPEC.num_experts))
    np.put_along_axis(weights_TE, np.asarray(expert_ids_TK), np.asarray(weights_TK), axis=-1)
    return weights_TE


def check_agreement(found: dict) -> None:
    """Every candidate gives the weights of the first; {name: (ids, weights)}."""
    (first, expected), *others = ((name, dense_weights(*pair)) for name, pair in found.items())
    for name, weights_TE in others:
        # float32: a near-tie within rounding may swap an expert in a few of 16384 tokens.
        differing = (np.abs(weights_TE - expected).max(axis=-1) > 1e-5).mean()
        if differing > 1e-3:
            raise RuntimeError(f"{name} and {first} differ in {differing:.1%} of the tokens; there is nothing to time")


class InputGate(torch.Tensor):
    """A gate weight whose linear map returns its input: no product is timed, and no copy."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def torchtitan_router():
    """torchtitan's router from its own Config; its gate is an identity."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    router = TokenChoiceTopKRouter.Config(
        num_experts=SPEC.num_experts, top_k=SPEC.top_k, score_func="sigmoid", route_norm=True,
        num_expert_groups=SPEC.num_expert_groups, num_limited_groups=SPEC.num_limited_groups,
        route_scale=SPEC.route_scale, gate=Linear.Config(in_features=1, out_features=SPEC.num_experts, bias=False),
    ).build()  # fmt: skip
    router.gate = torch.nn.Identity()
    return router


def transformers_router(bias_E):
    """The DeepSeek-V3 router of transformers; its weight returns the input."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=SPEC.num_experts, n_routed_experts=SPEC.num_experts, num_experts_per_tok=SPEC.top_k,
            n_group=SPEC.num_expert_groups, topk_group=SPEC.num_limited_groups, norm_topk_prob=True,
            routed_scaling_factor=SPEC.route_scale,
        )
    )  # fmt: skip
    weight = torch.empty(SPEC.num_experts, SPEC.num_experts).as_subclass(InputGate)
    router.weight = torch.nn.Parameter(weight, requires_grad=False)
    router.e_score_correction_bias.copy_(bias_E)
    return router


def time_torch(rounds: int) -> list[Timing]:
    """moe_torch, eager and compiled, beside torchtitan and transformers; each returns weights, ids and scores."""
    from moe_torch.router import route

    torch.set_num_threads(CORES)
    # torchtitan asks for a float32 autocast, which CPU builds answer with a warning; the tokens are float32 anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast")
    logits_TE, bias_E = map(torch.from_numpy, data())

    def ours(logits_TE):
        found = route(logits_TE, SPEC, expert_bias_E=bias_E)
        return found.weights_TK, found.expert_ids_TK, found.scores_TE

    titan, compiled = torchtitan_router(), torch.compile(ours, fullgraph=True)
    titan_compiled = torch.compile(titan)
    with torch.no_grad():
        hf = transformers_router(bias_E)
        candidates = {
            "torchtitan": lambda: titan(logits_TE[None], bias_E),
            "torchtitan, compiled": lambda: titan_compiled(logits_TE[None], bias_E),
            "transformers": lambda: hf(logits_TE),
            "moe_torch": lambda: ours(logits_TE),
            "moe_torch, compiled": lambda: compiled(logits_TE),
        }
        found = {name: call() for name, call in candidates.items()}
        # transformers returns (logits, weights, ids), the others (weights, ids, scores); torchtitan's T is (1, T).
        pairs = {name: (f[2], f[1]) if name == "transformers" else (f[1], f[0]) for name, f in found.items()}
        flat = {name: [t.reshape(TOKENS, SPEC.top_k).numpy() for t in pair] for name, pair in pairs.items()}
        check_agreement(flat)
        return paired(candidates, baselines=("torchtitan", "transformers"), rounds=rounds)


def time_jax(rounds: int) -> list[Timing]:
    """moe_jax beside a router in MaxText's manner: groups by two top_k, dropped experts -inf, top_k over all."""
    import jax
    import jax.numpy as jnp

    from moe_jax.routing import route

    E, K, G, L = SPEC.num_experts, SPEC.top_k, SPEC.num_expert_groups, SPEC.num_limited_groups
    assert G is not None
    assert L is not None

    def maxtext_manner(logits_TE, bias_E):
        scores_TE = jax.nn.sigmoid(logits_TE)
        biased_TGP = (scores_TE + bias_E).reshape(-1, G, E // G)
        group_scores_TG = jax.lax.top_k(biased_TGP, 2)[0].sum(-1)
        group_ids_TL = jax.lax.top_k(group_scores_TG, L)[1]
        kept_TG = jax.nn.one_hot(group_ids_TL, G).sum(axis=1)
        choice_TE = jnp.where(kept_TG[:, :, None] > 0, biased_TGP, -jnp.inf).reshape(-1, E)
        ids_TK = jax.lax.top_k(choice_TE, K)[1]
        weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
        return ids_TK, weights_TK / (weights_TK.sum(-1, keepdims=True) + SPEC.norm_eps) * SPEC.route_scale

    def ours(logits_TE, bias_E):
        found = route(logits_TE, SPEC, expert_bias_E=bias_E)
        return found.expert_ids_TK, found.weights_TK

    logits_TE, bias_E = map(jnp.asarray, data())
    jitted = {"MaxText's manner": jax.jit(maxtext_manner), "moe_jax": jax.jit(ours)}
    candidates = {name: partial(_blocked, call, logits_TE, bias_E) for name, call in jitted.items()}
    check_agreement({name: call() for name, call in candidates.items()})
    return paired(candidates, baselines=("MaxText's manner",), rounds=rounds)


def _blocked(call, *args):
    import jax

    return jax.block_until_ready(call(*args))


PARTS = {"torch": time_torch, "jax": time_jax}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--part", choices=PARTS, help="one framework, as JSON on the last line")
    parser.add_argument("--busy", action="store_true", help="another process spins on one of the cores")
    args = parser.parse_args()
    use_cores(CORES)
    if args.part:
        with busy_core(args.busy):
            print(json.dumps([asdict(timing) for timing in PARTS[args.part](args.rounds)]))
        return
    results = {"spec": SPEC.to_dict(), "tokens": TOKENS}
    for part in PARTS:
        # A process for each framework: both keep threads of their own.
        command = [sys.executable, "-m", "benchmarks.router", "--part", part, "--rounds", str(args.rounds)]
        command += ["--busy"] if args.busy else []
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        timings = [Timing(**fields) for fields in json.loads(lines[-1])]
        print(f"\n{part}: {TOKENS} tokens, {CORES} threads\n\n{table(timings)}")
        results[part] = timings
    if args.busy:
        return
    packages = ("torch", "torchtitan", "transformers", "jax", "numpy")
    write_json(RESULTS / "router.json", {"machine": machine(packages), **results})


if __name__ == "__main__":
    main()
