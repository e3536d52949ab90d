"""Check the kernels against their eager twins, time them on a GPU, or compile them for one that is not there: what
`python kernels.py` does.
"""

import argparse
import copy
import math
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch._functorch.config
import triton
from torch import Tensor
from triton import cdiv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import kernels
import zaya


def cases(config, B, T, device, dtype):
    """{name: (arguments of the function of that name, bytes and operations of its forward, of its backward pass)}.

    Bytes: what must be read and written once. What is learned or comes from a layer before requires a gradient.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def random(*shape, dtype=dtype, scale=1.0, grad=True):
        tensor = torch.randn(*shape, device=device, generator=generator) * scale
        return tensor.to(dtype).requires_grad_(grad)

    c, N, P = config, B * T, config.past_tokens
    D, E, F, R, h = c.hidden_size, c.num_experts, c.moe_intermediate_size, c.router_hidden_size, c.head_dim
    Hq, Hk, V, fp32, eps = c.num_attention_heads, c.num_key_value_heads, c.vocab_size, torch.float32, 1e-3
    C, size = (Hq + Hk) * h, torch.empty((), dtype=dtype).element_size()
    angles = torch.rand(T, 1, c.rotary_dim // 2, device=device)
    choice = torch.randint(E, (N,), device=device)
    convolutions = (random(C, 1, c.cca_time0), random(C)), (random(C, h, c.cca_time1, scale=h**-0.5), random(C))
    temp = random(Hk, dtype=fp32)
    qkv, past, v_before = random(B, T, C + Hk * h), random(B, P, C, grad=False), random(B, 1, Hk * h // 2, grad=False)
    W1, W2, W3 = (random(units, R, scale=R**-0.5) for units in (R, R, E + 1))
    gate_up, down = random(E, 2 * F, D, scale=D**-0.5), random(E, D, F, scale=F**-0.5)
    rows, scales = random(N, D), [random(D, dtype=fp32) for _ in range(5)]
    ends = (torch.arange(1, E + 1, device=device, dtype=torch.int32) * N // E).to(torch.int32)
    length = torch.full((), 8 * T, dtype=torch.int32, device=device)
    buffers = (torch.zeros(1, *shape, device=device, dtype=dtype) for shape in zaya.LayerCache.shapes(c, 8 * T))
    cache = zaya.LayerCache(c, *buffers, length)
    for tensor in (cache.recent, cache.k, cache.v):
        tensor.normal_()
    cache.newest = zaya.Newest(torch.tensor([8 * T - 1], device=device), 8 * T, cache.recent.shape[1])
    weights = 3 * E * F * D * size
    return {
        "cca": (
            (qkv, past, v_before, *convolutions, temp, angles.cos(), angles.sin()),
            2 * qkv.numel() * size, 2 * N * C * h * c.cca_time1, 3 * qkv.numel() * size, 4 * N * C * h * c.cca_time1,
        ),
        "route": (
            (random(N, R), random(N, R, dtype=fp32), random(R, dtype=fp32), random(R, dtype=fp32), eps,
             (W1, random(R)), (W2, random(R)), W3, random(E + 1, dtype=fp32, scale=0.01, grad=False)),
            N * R * (size + 8), 2 * N * R * (2 * R + E + 1), N * R * (size + 16), 4 * N * R * (2 * R + E + 1),
        ),
        "dispatch": ((rows, choice, E), 2 * N * D * size, 0, 2 * N * D * size, 0),
        "experts": (
            (rows, gate_up, down, ends),
            2 * N * D * size + weights, 6 * N * D * F, 3 * N * D * size + 2 * weights, 12 * N * D * F,
        ),
        "combine": (
            (rows, choice.argsort(stable=True), random(N, dtype=fp32)), 2 * N * D * size, 0, 3 * N * D * size, 0
        ),
        "merge": (
            (random(1, N, D, dtype=fp32), random(1, N, D), *scales, eps),
            N * D * (8 + 2 * size), 0, N * D * (12 + 3 * size), 0,
        ),
        "cross_entropy": (
            (random(cdiv(N, 16), V, grad=False), torch.randint(V, (cdiv(N, 16),), device=device), V, True),
            2 * cdiv(N, 16) * V * size, 0, 0, 0,
        ),
        "product": (
            (random(1, Hq * h, grad=False), random(D, Hq * h, grad=False)), D * Hq * h * size, 2 * D * Hq * h, 0, 0
        ),
        "merged_product": (
            (random(1, D, dtype=fp32, grad=False), random(1, D, grad=False), *(scale.detach() for scale in scales),
             eps, random(C + Hk * h, D, scale=D**-0.5, grad=False), random(C + Hk * h, grad=False)),
            (C + Hk * h) * D * size, 2 * (C + Hk * h) * D, 0, 0,
        ),
        "cca_step": (
            (qkv[:1, :1].detach(), cache, *(tuple(t.detach() for t in pair) for pair in convolutions), temp.detach(),
             angles[:1].cos(), angles[:1].sin()),
            C * h * c.cca_time1 * size, 2 * C * h * c.cca_time1, 0, 0,
        ),
        "experts_of_few": (
            (rows[:1].detach(), random(1, dtype=fp32, grad=False), choice[:1], gate_up.detach(), down.detach()),
            weights // E, 6 * D * F, 0, 0,
        ),
        "attend_past": (
            (random(1, 1, Hq, h, grad=False), cache.k, cache.v, length), 2 * cache.k.numel() * size,
            4 * cache.k.numel() * Hq // Hk, 0, 0
        ),
    }  # fmt: skip


def tensors_in(args):
    return [t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, Tensor)]


def evaluate(function, args):
    """A function's results, and a function that takes the gradients of those that have one (random ones, if none are
    given) and returns those of the arguments."""
    results = function(*args)
    results = results if isinstance(results, tuple) else (results,)
    outputs, leaves = [r for r in results if r.requires_grad], [t for t in tensors_in(args) if t.requires_grad]
    drawn = [torch.randn_like(r) for r in outputs]

    def backward(grads=drawn):
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True) if outputs else []

    return results, backward


def in_fp32(args):
    """Copies of arguments, for a reference."""

    def in_fp32_too(x):
        if isinstance(x, tuple):
            return in_fp32(x)
        if isinstance(x, zaya.LayerCache):
            x = copy.copy(x)
            x.recent, x.k, x.v = x.recent.float(), x.k.float(), x.v.float()
            return x
        floats = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().float().requires_grad_(x.requires_grad) if floats else x

    return tuple(in_fp32_too(x) for x in args)


def errors(eager, kernel, args):
    """|result - reference| / |reference| in the worst result and the worst gradient: of the eager twin, of the kernel.

    The reference is the eager twin in fp32. Tokens whose expert differs between the three are left out.
    """
    runs = [evaluate(eager, in_fp32(args)), evaluate(eager, args), evaluate(kernel, args)]
    same = 1
    for a, b, c in zip(*(results for results, _ in runs)):
        if not a.is_floating_point() and len(a) == len(args[0]):
            same = same * ((a == b) & (a == c)).float()
    grads = [torch.randn_like(r) * (same if r.dim() == 1 else 1) for r in runs[0][0] if r.requires_grad]
    found = []
    for results, backward in runs:
        outputs = [r for r in results if r.is_floating_point()]
        typed = [g.to(r.dtype) for g, r in zip(grads, [r for r in outputs if r.requires_grad])]
        found.append(([r * same if r.dim() == 1 else r for r in outputs], backward(typed)))

    def worst(values, true):
        return max([((v.float() - t).norm() / t.norm().clamp_min(1e-20)).item() for v, t in zip(values, true)] or [0.0])

    return [(worst(outputs, found[0][0]), worst(grads, found[0][1])) for outputs, grads in found[1:]]


def milliseconds(function, waits=False):
    """Median time that a call takes on the GPU when the L2 holds nothing of its arguments, nor what is still to be
    written to memory.

    As part of a graph, for a decoding kernel is shorter than what Python needs to launch it. What waits for the GPU
    cannot be captured: there the host's time counts, too.
    """
    if not waits:
        try:
            return milliseconds_in_a_graph(function)
        except RuntimeError as error:
            print(f"not captured, so timed with the host's part: {str(error).splitlines()[0]}")
    return triton.testing.do_bench(function, return_mode="median")


def milliseconds_in_a_graph(function, calls=10):
    """The time of a graph of some calls, with the L2 emptied before each, less that of the emptying alone."""
    graphs, cache = [], triton.runtime.driver.active.get_empty_cache_for_benchmark()
    for work in (function, lambda: None):
        work()  # compiles
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=torch.cuda.current_stream()):
            for _ in range(calls):
                torch.sum(cache)
                work()

    def replay(graph):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return statistics.median((replay(graphs[0]) - replay(graphs[1])) / calls for _ in range(25))


def ceilings():
    """This machine's bandwidth (bytes/s read and written by a copy of 2 GiB, by a kernel: what a graph copies by itself
    is slower) and bf16 rate (of an 8192-cubed product)."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    bandwidth = 4 * x.numel() / milliseconds(lambda: torch.neg(x, out=y)) * 1e3
    a, b = x[: 2**26].view(8192, 8192), y[: 2**26].view(8192, 8192)
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


# What, in eager PyTorch, asks the GPU for a number: these, and AMD's grouped product.
WAITING = ["experts_of_few", "attend_past", *(["experts"] if torch.version.hip else [])]


def report():
    """Check every kernel; on a GPU, time it, too, at ZAYA1-8B's shapes and 16,384 tokens."""
    gpu = torch.cuda.is_available() and not kernels.INTERPRETED
    if not gpu and not kernels.INTERPRETED:
        raise ValueError("no GPU here: set TRITON_INTERPRET=1 to check the kernels, or give --compile_for gfx942")
    if gpu:
        torch._functorch.config.donated_buffer = False  # a compiled backward pass is timed more than once
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
        bandwidth, rate = ceilings()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}: "
              f"copy {bandwidth / 1e9:,.0f} GB/s, product {rate / 1e12:,.0f} TFLOP/s")  # fmt: skip
        device, dtype, shape = "cuda", torch.bfloat16, (zaya.PRESETS["zaya1-8b"], 4, 4096)
        print(f"{'kernel':26}{'error':>9}{'eager':>9}{'ms eager':>10}{'compile':>9}{'Triton':>9}{'ratio':>7}   rate")
    else:
        device, dtype, shape = "cpu", torch.float32, (zaya.replica(64, 2, 8), 2, 40)
        print(f"Triton {triton.__version__}'s interpreter, fp32\n{'kernel':26}{'error':>9}{'eager':>9}")
    print(f"{'':26}{'against fp32':>18}")
    wrong = []
    for name, (args, *costs) in cases(*shape, device, dtype).items():
        kernel, eager = getattr(kernels, name), getattr(zaya, name).__wrapped__
        zaya.use_kernels("eager")
        theirs, ours = errors(eager, kernel, args)
        for i, suffix in enumerate(["", " backward"] if costs[2] else [""]):
            line = f"{name + suffix:26}{ours[i]:9.1e}{theirs[i]:9.1e}"
            if not ours[i] <= max(1e-4, (2 + i) * theirs[i]):  # twice eager's, for gradients three times; nor a NaN
                wrong.append(name + suffix)
            if gpu:
                times = []
                for function in (eager, torch.compile(eager, dynamic=False), kernel):
                    try:
                        backward = evaluate(function, args)[1]
                        work = backward if suffix else lambda: function(*args)
                        times.append(milliseconds(work, waits=name in WAITING and function is not kernel))
                    except Exception as error:  # one number less, and not all that come after
                        print(
                            f"{name + suffix}, column {len(times) + 1}: {(str(error) or repr(error)).splitlines()[0]}"
                        )
                        times.append(math.nan)
                bytes_, operations = costs[2 * i : 2 * i + 2]
                achieved = bytes_ / times[2] * 1e3, operations / times[2] * 1e3
                line += f"{times[0]:10.3f}{times[1]:9.3f}{times[2]:9.3f}{times[0] / times[2]:7.2f}   "
                if name == "experts":
                    line += f"{achieved[1] / 1e12:,.0f} TFLOP/s, {achieved[1] / rate:.0%} of the product's"
                else:
                    line += f"{achieved[0] / 1e9:,.0f} GB/s, {achieved[0] / bandwidth:.0%} of the copy's"
            print(line, flush=True)
    if wrong:
        raise ValueError(f"further from fp32 than a kernel may be: {', '.join(wrong)}")


# ---------------------------------------------------------------------------------------------------------------------
# Compiling for a GPU that is not there

TARGETS = {name: ("hip", name, 64) for name in ("gfx942", "gfx950", "gfx90a")} | {"sm_90": ("cuda", 90, 32)}


def compile_kernel(kernel, args, constants, target):
    """The kernel as it would be compiled for these arguments: sizes that are multiples of 16 are known to be such."""
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    of_launch = "num_warps", "num_stages", "launch_pdl", "matrix_instr_nonkdim"
    options = {name: constants.pop(name) for name in of_launch if name in constants}
    signature, known, attributes = dict.fromkeys(constants, "constexpr"), dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], known[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if isinstance(value, int) else names.get(value.dtype, "*i64")
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
            if isinstance(value, Tensor) and target.backend == "hip" and value.untyped_storage().nbytes() < 2**31:
                attributes[(i,)] += [["tt.pointer_range", 32]]  # as at a launch
    signature = {name: signature[name] for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, known, attributes)
    return triton.compile(source, target=target, options=options), options["num_warps"]


def resources_on_amd(compiled, warps):
    """Registers, spilled registers, bytes of LDS, MFMA instructions and waves per SIMD, read from the assembly."""
    text = compiled.asm["amdgcn"]
    if "s_setprio" in text:
        raise ValueError("Triton has made this ping-pong: unset TRITON_HIP_USE_BLOCK_PINGPONG (see kernels.py)")
    registers, spills = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
    shared = compiled.metadata.shared
    # 512 registers a lane, handed out by eights; a workgroup's waves are spread over four SIMDs, which share LDS
    lds = 163840 if compiled.metadata.target.arch == "gfx950" else 65536
    workgroups = min(8, 512 // (cdiv(registers, 8) * 8)) * 4 // warps
    waves = min(workgroups, lds // shared if shared else 32) * warps // 4
    return registers, spills, shared, len(re.findall(r"v_mfma", text)), waves


def resources_on_nvidia(compiled, warps):
    """The same of a CUDA kernel, for spills the bytes of stack that it takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spills = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    shared = compiled.metadata.shared
    programs = min(64 // warps, 65536 // (cdiv(registers, 8) * 8 * 32 * warps))
    waves = min(programs, 233472 // shared if shared else 32) * warps // 4
    ptx = compiled.asm["ptx"]
    if compiled.metadata.launch_pdl:  # see kernels.pdl
        assert waits_before_it_writes(ptx), "starts early, and writes before it waits"
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))
    return registers, spills, shared, products, waves


def waits_before_it_writes(ptx):
    """Whether on every path through a kernel griddepcontrol.wait stands before the first store and before the end."""
    pieces = re.split(r"^(\$L__BB\w+):", ptx, flags=re.MULTILINE)  # what has no label, a label, its code, a label, ...
    labels = ["", *pieces[1::2]]
    code, next_label = dict(zip(labels, pieces[::2])), dict(zip(labels, labels[1:]))
    todo, seen = [""], set()
    while todo:
        seen.add(label := todo.pop())
        for line in code[label].splitlines():
            jump = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
            todo += [jump[1]] if jump and jump[1] not in seen else []
            if "griddepcontrol.wait" in line or re.match(r"\s*bra", line):
                break
            if "st.global" in line or re.match(r"\s*ret;", line):
                return False
        else:
            todo += [next_label[label]]
    return True


def compile_for(architecture, dtype, head_dim):
    """Compile every kernel, forward and backward, as configured for an architecture, at ZAYA1-8B's shapes but for
    the size of a head, and print what it needs. No GPU is needed."""
    if kernels.INTERPRETED:
        raise ValueError("--compile_for cannot work with TRITON_INTERPRET=1")
    target = TARGETS[architecture]
    resources = resources_on_amd if target[0] == "hip" else resources_on_nvidia
    seen = set()
    units = ("VGPRs", "spilled", "LDS bytes", "MFMA", "waves/SIMD") if target[0] == "hip" else (
        "registers", "stack bytes", "shared", "MMA", "warps/SMSP")  # fmt: skip
    print(
        f"{architecture}, Triton {triton.__version__}, {str(dtype)[6:]}, ZAYA1-8B, head_dim {head_dim}\n{'kernel':32}"
        + "".join(f"{u:>12}" for u in units)
    )

    def compile_and_print(kernel, grid, *args, **constants):
        variants = {"GELU": " (GELU)", "SWIGLU": " (SwiGLU)", "MERGE": " (merge)"}
        label = kernel.__name__ + "".join(text for name, text in variants.items() if constants.get(name))
        if label not in seen:
            seen.add(label)
            numbers = resources(*compile_kernel(kernel, args, constants, triton.backends.compiler.GPUTarget(*target)))
            print(f"{label:32}" + "".join(f"{n:12,}" for n in numbers), flush=True)

    kernels.launch, kernels.architecture = compile_and_print, lambda: architecture
    config = replace(zaya.PRESETS["zaya1-8b"], head_dim=head_dim)
    for B, T in ((4, 4096), (1, 1)):
        with torch.set_grad_enabled(T > 1):
            for name, (args, *_) in cases(config, B, T, "meta", dtype).items():
                evaluate(getattr(kernels, name), args)[1]()


def main():
    parser = zaya.OneLineParser(
        description=kernels.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--compile_for", choices=TARGETS, help="compile for this architecture (default: none)")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="compile for this (default: bfloat16)")
    parser.add_argument("--head_dim", type=int, default=128, help="and for heads of this size (default: 128)")
    flags = parser.parse_args()
    if flags.compile_for:
        return compile_for(flags.compile_for, getattr(torch, flags.dtype), flags.head_dim)
    report()


if __name__ == "__main__":
    with zaya.stop_in_one_line():
        main()
