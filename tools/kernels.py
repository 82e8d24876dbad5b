"""tools, the kernels of moe_torch compiled for a GPU that is not there: registers, shared memory, and what spills.

    python -m tools.kernels                      # for an H100, at the sizes of Qwen3-30B, in bfloat16
    python -m tools.kernels --arch 80 --dtype float32 --size 8192 7168 2048 256 8

Launches are made on meta tensors, which hold nothing: what would wait for the host would raise an error here.
A kernel that spills is slow; the tile sizes in `moe_torch/kernels/launch.py` are such that next to none does on
an H100.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_ref.specs.router import RouterSpec
from moe_torch.kernels import launch, router_ops, sort_ops

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
TYPES = {int: "i32", float: "fp32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROOM = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory of a program, by architecture."""


def compiled(kernel: JITFunction, arguments: tuple, named: dict, arch: int) -> dict:
    """What the compiler says of a kernel, launched with these arguments."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_array = isinstance(value, torch.Tensor)
        signature[parameter.name] = POINTERS[value.dtype] if is_array else TYPES[type(value)]
        if is_array or (isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = str(found.asm["ptx"])
    return {
        "kernel": kernel.__name__, "shared": found.metadata.shared, **options, **usage(found.asm["cubin"]),
        "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"), "cp.async": ptx.count("cp.async.c"),
        "redux": ptx.count("redux.sync"), "division of 64 bits": len(re.findall(r"(?:div|rem)\.[su]64", ptx)),
        "loads ahead": max([0, *map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx))]),
    }  # fmt: skip


def usage(cubin: bytes) -> dict[str, int | None]:
    """Registers of a thread, and the bytes of its stack, which is where it spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{word}:(\d+)", said) for name, word in (("registers", "REG"), ("stack", "STACK"))}
    return {name: None if match is None else int(match[1]) for name, match in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=sorted(ROOM), default=90)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "tf32"), default="bfloat16")
    parser.add_argument("--size", type=int, nargs=5, metavar="N", default=(16384, 2048, 768, 128, 8), help="T D F E K")
    parser.add_argument("--bias", action="store_true", help="experts of the form of gpt-oss, with biases and clamps")
    parser.add_argument("--json", action="store_true", help="a list of the kernels")
    args = parser.parse_args()
    found, seen = [], set()

    def run(kernel, *arguments, grid, warmup, **named):
        key = (
            kernel.__name__,
            repr([a if isinstance(a, int) else getattr(a, "dtype", a) for a in arguments]),
            repr(named),
        )
        if key not in seen:
            seen.add(key)
            found.append(compiled(kernel, arguments, named, args.arch) | {"programs": grid[0]})
            if not args.json:
                print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)

    setattr(JITFunction, "run", run)  # noqa: B010  # its types say self
    launch.device_of = lambda device: launch.Device(room=ROOM[args.arch], wide=args.arch in (90, 100))
    launch.takes_tf32 = lambda: args.dtype == "tf32"
    launch_all(tuple(args.size), torch.float32 if args.dtype == "tf32" else getattr(torch, args.dtype), args.bias)
    if args.json:
        print(json.dumps(found))


def launch_all(size: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    """A forward and a backward pass of everything."""
    T, D, F, E, K = size

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    spec = RouterSpec(
        num_experts=E, top_k=K, num_expert_groups=4, num_limited_groups=2, score_func="sigmoid", route_norm=True,
        norm_eps=1e-20, route_scale=2.5,
    )  # fmt: skip
    for router in (spec, spec.without_groups().replace(score_func="softmax")):
        logits_TE, how = new(T, E, dtype=torch.float32), router_ops.arguments_of(router)
        weights_TK, ids_TK, _ = body(router_ops.route_tokens)(logits_TE, new(E, dtype=torch.float32), None, *how)
        body(router_ops.route_tokens_backward)(weights_TK, logits_TE, ids_TK, *how[5:7], *how[8:])
        order_R, _, counts_E = body(sort_ops.sort_slots)(ids_TK, E)
    weights = [new(E, F, D), new(E, D, F), new(E, F, D), *((new(E, F), new(E, D), new(E, F)) if bias else [None] * 3)]
    act = (("silu", 1.702, 1.0, 7.0, "before") if bias else ("silu", 1.0, 0.0, None, "before")) + (1.0, None)
    p = launch.Pass(x_TD=new(T, D), order_R=order_R, counts_E=counts_E, top_k=K, hidden_dim=F, act=act)
    out_TD, gate_RF, up_RF = launch.forward(p, weights_TK, weights, keep=True)
    assert gate_RF is not None
    launch.backward(p, out_TD, gate_RF, up_RF, weights_TK, weights, train=True)


def body(operator):
    """The Python function of an operator; on meta tensors PyTorch would take its fake one."""
    return operator._init_fn


if __name__ == "__main__":
    main()
