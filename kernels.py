"""The Triton twins of zaya.py's hot functions: same names, same arguments, same results, and but for decoding's, same
gradients.

    python kernels.py                          check and time every kernel against its eager twin on this machine's GPU
    TRITON_INTERPRET=1 python kernels.py       check them without a GPU, in Triton's interpreter
    python kernels.py --compile_for gfx942     compile them for an MI300X that need not be there

(All three are in tests/bench_kernels.py.) Read zaya.py first: what a function computes is said there, how it is made
fast is said here. Each part below has the same order: the idea as pseudo-code, the kernels, the torch operators that
launch them and, where it is not one of those, the function that zaya.py calls. (Part 7, of many small kernels, takes
them one by one.)

Shapes are zaya.py's: B, T, N = B * T, D, H = Hq + Hk, h, C = H * h, E, F, R, V; S is what a cache has room for. A
dimension X is covered by blocks of BX, and tokens always by BT; but in a product, whichever dimensions those are, rows
by BM or BT, columns by BN, and what is summed by BK. Where one block must hold all of X, BX is X rounded up to a power
of two, at least 16, block_of(X). What lies beyond an edge is masked. BH holds a head, BP half of one.
Index arrays:
  choice     (N)  the expert of token n (or E, where a token may skip the experts)
  place      (N)  the row of token n when tokens are sorted by expert
  offsets    (E)  where each expert's rows end; expert e has rows offsets[e - 1], or 0, to offsets[e] - 1

Rules that all kernels keep: sums in fp32; no atomic addition of floats, so the same run gives the same bits; what a
program adds up over its tokens goes to a row of its own in a `partial` tensor, and one torch sum finishes the work;
nothing waits for the GPU.
"""

import math
import os
import sys
from functools import lru_cache, wraps
from inspect import signature

import torch

# On gfx942 Triton 3.6 and 3.7 would let half of a large product's waves load while the others multiply (ping-pong), and
# overwrite LDS before all of it has been read (triton-lang/triton issue 11696; in the assembly of `experts`, too).
os.environ.setdefault("TRITON_HIP_USE_BLOCK_PINGPONG", "0")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c in one instruction, as up to Triton 3.9

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if __name__ == "__main__" and error.name == "triton":
        print("kernels.py: error: Triton is not installed (a GPU's PyTorch brings it along)", file=sys.stderr)
        sys.exit(2)
    raise
from torch import Tensor
from torch._subclasses import FakeTensor

sys.modules.setdefault("kernels", sys.modules[__name__])  # zaya.py's `import kernels` finds a running script, too

# ---------------------------------------------------------------------------------------------------------------------
# Configurations. One a kernel and architecture, fixed: no search at run time.

# BT, BM: tokens of a program, or of one of its steps; BN, BF, BD: columns of its result, or hidden units at a time; BK:
# how deep one step of a product goes (in cca_filters BT is that, and BK rows of the result); BS, BV: positions of the
# past, logits at a time; AHEAD: stages of a loop without a product.
# gfx942: 4 SIMDs a CU share 64 KB of LDS, a wave is 64 threads, MFMA works on tiles of 16 or 32 (16 is mostly the
#   faster, says AMD, and CCA takes a third fewer registers). Two stages (one step ahead) for the large products; one
#   for the rest: LDS and registers are better spent on more waves. The experts' tiles are 128 x 256: a wave's part of
#   them, 64 x 64, reads a third less from LDS for each product than 64 x 32 would. The router's 16 tokens, and its
#   tiles of 64 x 64, make 1,024 programs of 16,384 tokens, and leave room for 4 waves a SIMD.
# sm_90, but for the router the best of several on an H200: 228 KB of shared memory take two to four stages. CCA, with
#   two programs of 4 warps on an SM, each with 64 tokens, waits less than with one of 8 (forward, 65,536 tokens of
#   preset small, 251 us instead of 356, and 207 since a head is held in two halves for RoPE). The experts' tiles are as
#   large as 255 registers a thread allow (128 x 256; grouped products 732 us, by 128 x 128 898), and fill an SM: one
#   program each. The router's, still to be measured, leave room for 16 warps an SM (by Triton 3.6).
# other: small enough for every GPU, and for the interpreter.
# `python kernels.py --compile_for` prints what each needs; at ZAYA1-8B's shapes none spills in bf16.
# gfx950 (MI350X, MI355X) and gfx90a (MI250X) have gfx942's waves and kinds of product, and no less LDS.
COLUMNS = {"gfx942": 0, "gfx950": 0, "gfx90a": 0, "sm_90": 1}  # of TABLE; the last for all others
TABLE = {  # the names of a kernel's sizes; for gfx942, sm_90 and others their values, num_warps and num_stages
    "cca": ("BT BK", (64, 32, 8, 1), (64, 64, 4, 3), (32, 32, 4, 1)),
    "cca_large": ("BT BK", (64, 32, 8, 1), (32, 64, 4, 3), (32, 32, 4, 1)),
    "cca_filters": ("BT BK", (64, 64, 8, 2), (64, 64, 4, 3), (32, 32, 4, 1)),
    "router_first": ("BT BN", (16, 32, 4, 1), (32, 64, 8, 2), (32, 32, 4, 1)),
    "router_tiles": ("BT BN BK", (64, 64, 64, 4, 1), (64, 64, 64, 4, 3), (32, 32, 32, 4, 1)),
    "router_first_backward": ("BT BK", (16, 32, 4, 1), (32, 64, 8, 2), (16, 32, 8, 1)),
    "choose": ("BT", (16, 4, 1), (16, 4, 1), (16, 4, 1)),
    "dispatch": ("BT BD", (32, 256, 4, 1), (32, 256, 4, 1), (32, 256, 4, 1)),
    "combine_backward": ("BT BD", (16, 128, 4, 1), (16, 128, 4, 1), (16, 128, 4, 1)),
    "swiglu": ("BM BN BK", (128, 256, 64, 8, 2), (128, 256, 64, 8, 4), (64, 64, 32, 4, 2)),
    "swiglu_backward": ("BT BF", (16, 128, 4, 1), (16, 128, 4, 1), (16, 128, 4, 1)),
    "grouped": ("BM BN BK", (128, 256, 64, 8, 2), (128, 256, 64, 8, 3), (64, 64, 32, 4, 2)),
    "merge": ("", (8, 1), (8, 1), (4, 1)),
    "merge_backward": ("AHEAD", (1, 8, 1), (4, 8, 1), (1, 4, 1)),
    "cross_entropy": ("BV", (2048, 4, 1), (4096, 8, 1), (2048, 4, 1)),
    "gemv": ("", (4, 1), (8, 1), (4, 1)),
    "cca_step": ("BK", (256, 8, 1), (256, 8, 1), (32, 4, 1)),
    "expert_gemv_one": ("BF BK", (4, 2048, 4, 1), (2, 2048, 4, 1), (4, 512, 4, 1)),
    "expert_gemv": ("BF BK", (4, 2048, 4, 1), (4, 2048, 4, 1), (4, 512, 4, 1)),
    "flash_decoding": ("BS", (64, 4, 1), (32, 4, 2), (32, 4, 1)),
}
# How many programs share the work of a kernel that loops over it, for the same three: 4 for each of an MI300X's 304
# CUs, and of an H200's 132 SMs; for others as many as for an MI300X. Of the experts' kernels an SM holds one.
PROGRAMS = 1216, 528, 1216
EXPERT_PROGRAMS = 1216, 132, 1216
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, by numpy
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def architecture():
    """The GPU's, as its compiler names it."""
    if INTERPRETED or not torch.cuda.is_available():
        return "none"
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_%d%d" % torch.cuda.get_device_capability()


def for_this_gpu(columns):
    """The one of several values, for gfx942, sm_90 and others, that is meant for the GPU at hand."""
    return columns[COLUMNS.get(architecture(), -1)]


@lru_cache
def launch_config(kernel, **most):
    """The constants and launch options of a kernel on the GPU at hand; most: for some of them a bound, or None."""
    names, *columns = TABLE[kernel]
    values = zip([*names.split(), "num_warps", "num_stages"], for_this_gpu(columns))
    tiles_of_16 = for_this_gpu((True, False, False)) and kernel != "swiglu"  # which would spill
    mfma = {"matrix_instr_nonkdim": 16} if tiles_of_16 else {}
    return mfma | {name: min(value, most.get(name) or value) for name, value in values}


# ---------------------------------------------------------------------------------------------------------------------
# Launching, and torch operators

if torch.__version__ < "2.13":
    # Else Inductor writes out where an operator's arguments come from, through all layers, each many times over, for a
    # log that nobody reads: for an operator that is first met at the model's end it takes hours.
    import torch._inductor.exc

    torch._inductor.exc.OperatorIssue.operator_str = staticmethod(lambda target, args, kwargs: str(target))


def launch(kernel, grid, *args, **constants):
    """What every operator calls. The first argument is a tensor; its GPU need not be the current one. Where
    torch.compile asks for the shapes of an operator's results alone, it is a fake one, and nothing is launched."""
    if not isinstance(args[0], FakeTensor):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **constants)


def operator(function):
    """Make a function that allocates its results and launches kernels a torch operator: torch.compile neither looks
    into it nor breaks its graph there. An argument without a type is a Tensor; one whose name ends in _ is written to.

    In inference mode the function itself is called: an operator's bookkeeping takes Python more time than the kernels
    of a short prompt take the GPU.
    """
    names = signature(function).parameters
    function.__annotations__ = dict.fromkeys(names, Tensor) | function.__annotations__
    written = [name for name in names if name.endswith("_")]
    op = torch.library.custom_op(f"nanozaya::{function.__name__}", function, mutates_args=written)
    op.register_fake(function)

    @wraps(function)
    def call(*args):
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return (function if inference else op)(*args)

    call.register_autograd = op.register_autograd
    return call


def pdl():
    """For the kernels of decoding, which are so short that a launch counts: Hopper can start a kernel while the one
    before still runs, or waits itself (programmatic dependent launch)."""
    return {"PDL": True, "launch_pdl": True} if architecture() == "sm_90" else {"PDL": False}


@triton.jit
def let_the_next_start(PDL: tl.constexpr):
    """The kernel after this one may start as soon as all programs of this one have come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_the_kernel_before(PDL: tl.constexpr):
    """Wait until it, and so all before it, has ended and what it wrote can be read. Every program of a kernel with
    pdl() calls this before it writes anything, and before it reads what this decoding step has made. It may read
    before: weights, and what was there when the step's first such kernel started, or when torch's last kernel had ended
    (old tokens' parts of the cache, end, cos, sin). (expert_gemv_kernel's second launch reads choice and probability
    early, too: see there.)"""
    if PDL:
        tl.extra.cuda.gdc_wait()


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def without_gradient(ctx, *outputs):
    """Say so of some of an operator's results: backward gets None for them, and no tensor full of zeros."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


# (Triton's own two serve kernels, too, and cost more than they look: a tenth of the host's time of a prompt.)
def cdiv(a, b):
    return -(-a // b)


def next_power_of_2(n):
    return 1 << (n - 1).bit_length()


def block(size):
    """The power of two that holds a whole dimension, at least what a product needs."""
    return max(16, 1 << (size - 1).bit_length())


block_of = triton.constexpr_function(block)  # the same, for kernels to call (for which it may call no other function)


@triton.jit
def load_vector(vector, at, size, instead=0.0):
    """vector[at] in fp32, 0 beyond its end; where there is no vector (None), `instead`."""
    return instead if vector is None else tl.load(vector + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def load_matrix(matrix, row, rows, column, columns, TRANSPOSED: tl.constexpr = False):
    """matrix[row, column] of a contiguous (rows, columns) one, 0 beyond its edges. TRANSPOSED: it lies there as
    (columns, rows)."""
    row, column = row[:, None], column[None, :]
    if TRANSPOSED:
        return tl.load(matrix + column * rows + row, mask=(column < columns) & (row < rows), other=0.0)
    else:
        return tl.load(matrix + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def store_matrix(matrix, row, rows, column, columns, x):
    """matrix[row, column] = x within its edges, in its dtype."""
    row, column = row[:, None], column[None, :]
    tl.store(matrix + row * columns + column, x, mask=(row < rows) & (column < columns))


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32; fp32 stays fp32, without which tensor cores would round it to 10 bits."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_product(x, stride, m, rows, w, column, inside, K, stride_m, stride_k, BM: tl.constexpr, BN: tl.constexpr,
                 BK: tl.constexpr):  # fmt: skip
    """Rows m (BM) of x (rows, stride), of which K columns count, times rows `column` (BN) of w (M, K), by its
    strides, where inside (BN) says so -> (BM, BN) fp32."""
    acc, m = tl.zeros((BM, BN), tl.float32), m[:, None]
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + m * stride + k[None, :], mask=(m < rows) & (k[None, :] < K), other=0.0)
        at = w + column[None, :] * stride_m + k[:, None] * stride_k
        acc = dot(a, tl.load(at, mask=inside[None, :] & (k < K)[:, None], other=0.0), acc)
    return acc


# ---------------------------------------------------------------------------------------------------------------------
# 1. CCA: everything between the projections and the attention, in one pass
#
# Two convolutions with nothing between them are one. The first scales channel i by w[i, a] at tap a, the second mixes
# by W[b, i, o]; together tap a + b mixes by w[i, a] * W[b, i, o], and the first one's bias becomes a constant, for the
# text is padded once before both. With the released 2 and 2 taps that is 3 taps of h x h for a head: half as much again
# to multiply, but plain matrix products, which is what tensor cores and MFMA do. So, for a head and BT tokens:
#
#     acc = bias                                         (BT, h) fp32
#     for tap, for BK channels:
#         acc += rows[t - P + tap, channels] @ filters[tap, channels, :]     P = taps - 1 tokens of the past
#     acc += q-k mean; acc *= length / |acc|; rotate; store
#
# acc is held in two halves, so that the two channels that RoPE turns together are at one place of each.
#
# The backward pass computes acc again (cheaper than 4 bytes a number stored and read), goes back through rotation and
# norm to the gradient of acc, and then: that of the rows is the same loop with taps and filters transposed; that of the
# filters a product over all tokens.


EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # the smallest norm that a head is divided by


@triton.jit
def at_least_eps(norm):
    return tl.where(norm < EPS, EPS, norm)  # unlike a maximum, leaves NaN as it is


@triton.jit
def load_rows(rows, stride, b, t, T, column, columns):
    """rows[b, t, column], 0 beyond the edges. rows (B, T, stride), t (BT), column (BX) -> (BT, BX)."""
    at = rows + (b * T + t)[:, None] * stride + column[None, :]
    return tl.load(at, mask=((t >= 0) & (t < T))[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store_rows(rows, stride, b, t, T, column, columns, x):
    """rows[b, t, column] = x within the edges, in its dtype."""
    at = rows + (b * T + t)[:, None] * stride + column[None, :]
    tl.store(at, x, mask=(t < T)[:, None] & (column < columns)[None, :])


@triton.jit
def pairs(HALF: tl.constexpr, h: tl.constexpr):
    """A head in two halves, so that what RoPE turns together has one place: channels i and i + HALF, i < HALF; then
    those that do not turn. -> the channels of each half (BP), h for what is none."""
    i = tl.arange(0, block_of(h // 2))
    first, second = tl.where(i < HALF, i, i + HALF), tl.where(i < HALF, i + HALF, i + h // 2)
    first, second = tl.where(i < h // 2, first, h), tl.where(i < h // 2, second, h)
    RUN: tl.constexpr = (HALF | (h // 2)) & -(HALF | (h // 2))  # of so many channels, Triton is told
    return tl.max_contiguous(tl.multiple_of(first, RUN), RUN), tl.max_contiguous(tl.multiple_of(second, RUN), RUN)


@triton.jit
def convolve(rows, past, filters, b, t, head, T, stride, c1, c2, H: tl.constexpr, h: tl.constexpr, TAPS: tl.constexpr,
             BK: tl.constexpr, BACKWARD: tl.constexpr = False):  # fmt: skip
    """One head's sum over taps of rows[t - P + tap] @ filters[tap], P = TAPS - 1, at its channels c1 and c2, (BT, BP)
    fp32 each. BACKWARD: what leads gradients back, the sum of rows[t + P - tap] @ filters[tap].T."""
    STEPS: tl.constexpr = (h + BK - 1) // BK
    acc1, acc2 = tl.zeros((t.shape[0], c1.shape[0]), tl.float32), tl.zeros((t.shape[0], c2.shape[0]), tl.float32)
    for step in range(TAPS * STEPS):  # one loop, so that loads run ahead across taps
        tap, k = step // STEPS, step % STEPS * BK + tl.arange(0, BK)
        row = t + (TAPS - 1 - tap) if BACKWARD else t - (TAPS - 1) + tap
        x = load_rows(rows, stride, b, row, T, head * h + k, (head + 1) * h)
        w = filters + (tap * H + head) * h * h
        acc1 = dot(x, load_matrix(w, k, h, c1, h, TRANSPOSED=BACKWARD), acc1)
        acc2 = dot(x, load_matrix(w, k, h, c2, h, TRANSPOSED=BACKWARD), acc2)
    if not BACKWARD:  # and what the cache remembers of before the first token, or zeros: seldom, so not in that loop
        for step in range(tl.where(tl.min(t) < TAPS - 1, (TAPS - 1) * STEPS, 0)):
            tap, k = step // STEPS, step % STEPS * BK + tl.arange(0, BK)
            x = load_rows(past, H * h, b, t + tap, TAPS - 1, head * h + k, (head + 1) * h)
            w = filters + (tap * H + head) * h * h
            acc1 = dot(x, load_matrix(w, k, h, c1, h), acc1)
            acc2 = dot(x, load_matrix(w, k, h, c2, h), acc2)
    return acc1, acc2


@triton.jit
def mean_with_partners(rows, b, t, head, T, stride, c, Hq: tl.constexpr, Hk: tl.constexpr, h: tl.constexpr,
                       BACKWARD: tl.constexpr = False):  # fmt: skip
    """The q-k mean of channels c of a head: half of itself, and half of its key or of its queries' mean. BACKWARD, each
    query gets 1 / GROUP of its key's gradient, and the key all of its queries'."""
    GROUP: tl.constexpr = Hq // Hk
    is_key = head >= Hq
    partner = tl.where(is_key, (head - Hq) * GROUP, Hq + head // GROUP)
    acc = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    for i in tl.range(GROUP, loop_unroll_factor=4):  # four loads at a time; a query has only one partner
        end = tl.where(is_key | (i == 0), (partner + i + 1) * h, 0)  # 0: loads nothing
        acc += load_rows(rows, stride, b, t, T, (partner + i) * h + c, end).to(tl.float32)
    acc *= tl.where(is_key != BACKWARD, 1.0 / GROUP, 1.0)
    return 0.5 * (acc + load_rows(rows, stride, b, t, T, head * h + c, (head + 1) * h).to(tl.float32))


@triton.jit
def head_sum(qkv, past, filters, bias, b, t, head, T, stride, c1, c2, Hq: tl.constexpr, Hk: tl.constexpr,
             h: tl.constexpr, TAPS: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A head before its norm, in its halves: convolution, bias and q-k mean -> (BT, BP) fp32 each."""
    x1, x2 = convolve(qkv, past, filters, b, t, head, T, stride, c1, c2, Hq + Hk, h, TAPS, BK)
    x1 += load_vector(bias + head * h, c1, h)[None, :] + mean_with_partners(qkv, b, t, head, T, stride, c1, Hq, Hk, h)
    x2 += load_vector(bias + head * h, c2, h)[None, :] + mean_with_partners(qkv, b, t, head, T, stride, c2, Hq, Hk, h)
    return x1, x2


@triton.jit
def load_angles(cos, sin, t, T, pair, HALF: tl.constexpr):
    """From cos and sin (T, HALF), what `pair` turns by at tokens t, (BT, BP): those from HALF on do not turn."""
    at, mask = t[:, None] * HALF + pair[None, :], (t < T)[:, None] & (pair < HALF)[None, :]
    return tl.load(cos + at, mask=mask, other=1.0), tl.load(sin + at, mask=mask, other=0.0)


@triton.jit
def load_length(temp, head, Hq: tl.constexpr, h: tl.constexpr):
    """What a query or a key is normalised to."""
    return tl.sqrt(h * 1.0) * tl.load(temp + head - Hq, mask=head >= Hq, other=1.0)


@triton.jit
def cca_forward_kernel(qkv, past, v_before, filters, bias, temp, cos, sin, q, k, v, T, stride, Hq: tl.constexpr,
                       Hk: tl.constexpr, h: tl.constexpr, HALF: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
                       BK: tl.constexpr):  # fmt: skip
    """Grid (T / BT, H + 1, B). A program owns BT tokens of one head; the last of the H + 1, those of the values."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    H: tl.constexpr = Hq + Hk
    if head == H:  # values: the second half of their channels comes from the token before
        HALF_V: tl.constexpr = Hk * h // 2
        for c0 in range(0, Hk * h, block_of(h)):
            column = c0 + tl.arange(0, block_of(h))
            late = column >= HALF_V
            row = t[:, None] - late[None, :].to(tl.int32)
            inside = (t < T)[:, None] & (column < Hk * h)[None, :]
            x = tl.load(qkv + (b * T + row) * stride + H * h + column[None, :], mask=inside & (row >= 0), other=0.0)
            before = tl.load(v_before + b * HALF_V + column - HALF_V, mask=late & (column < Hk * h), other=0.0)
            x = tl.where(row < 0, before[None, :], x)
            store_rows(v, Hk * h, b, t, T, column, Hk * h, x)
    else:
        c1, c2 = pairs(HALF, h)
        x1, x2 = head_sum(qkv, past, filters, bias, b, t, head, T, stride, c1, c2, Hq, Hk, h, TAPS, BK)
        norm = at_least_eps(tl.sqrt(tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)))
        scale = (load_length(temp, head, Hq, h) / norm)[:, None]
        x1, x2 = x1 * scale, x2 * scale
        cosine, sine = load_angles(cos, sin, t, T, tl.arange(0, block_of(h // 2)), HALF)
        if head < Hq:
            out, width, first, end = q, Hq * h, head * h, (head + 1) * h
        else:
            out, width, first, end = k, Hk * h, (head - Hq) * h, (head - Hq + 1) * h
        store_rows(out, width, b, t, T, first + c1, end, x1 * cosine - x2 * sine)
        store_rows(out, width, b, t, T, first + c2, end, x2 * cosine + x1 * sine)


@triton.jit
def cca_norm_backward_kernel(grad_q, grad_k, qkv, past, filters, bias, temp, cos, sin, grad, partial, T, stride,
                             Hq: tl.constexpr, Hk: tl.constexpr, h: tl.constexpr, HALF: tl.constexpr,
                             TAPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (T / BT, H, B): from the gradients of q and k to that of the convolutions' and the mean's sum, (B, T, C).

    partial (B * T / BT, H, h + 1): a program's sums over its tokens for the bias, and in the last column for temp (of
    which the keys' are used).
    """
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c1, c2 = pairs(HALF, h)
    H: tl.constexpr = Hq + Hk
    # The forward pass again, to the direction of x (a unit vector a token) and its norm
    x1, x2 = head_sum(qkv, past, filters, bias, b, t, head, T, stride, c1, c2, Hq, Hk, h, TAPS, BK)
    raw_norm = tl.sqrt(tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1))
    norm = at_least_eps(raw_norm)
    x1, x2 = x1 / norm[:, None], x2 / norm[:, None]
    # Back through rotation and norm: what is along x changes no direction
    if head < Hq:
        given, width, first, end = grad_q, Hq * h, head * h, (head + 1) * h
    else:
        given, width, first, end = grad_k, Hk * h, (head - Hq) * h, (head - Hq + 1) * h
    y1 = load_rows(given, width, b, t, T, first + c1, end).to(tl.float32)
    y2 = load_rows(given, width, b, t, T, first + c2, end).to(tl.float32)
    cosine, sine = load_angles(cos, sin, t, T, tl.arange(0, block_of(h // 2)), HALF)
    g1, g2 = y1 * cosine + y2 * sine, y2 * cosine - y1 * sine
    along, length = tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1), load_length(temp, head, Hq, h)
    lost, scale = tl.where(raw_norm > EPS, along, 0.0)[:, None], (length / norm)[:, None]
    g1, g2 = (g1 - x1 * lost) * scale, (g2 - x2 * lost) * scale
    store_rows(grad, H * h, b, t, T, head * h + c1, (head + 1) * h, g1)
    store_rows(grad, H * h, b, t, T, head * h + c2, (head + 1) * h, g2)
    own = partial + ((b * tl.num_programs(0) + tl.program_id(0)) * H + head) * (h + 1)
    tl.store(own + c1, tl.sum(tl.where((t < T)[:, None], g1, 0.0), axis=0), mask=c1 < h)
    tl.store(own + c2, tl.sum(tl.where((t < T)[:, None], g2, 0.0), axis=0), mask=c2 < h)
    tl.store(own + h, tl.sum(tl.where(t < T, along, 0.0), axis=0) * tl.sqrt(h * 1.0))


@triton.jit
def cca_rows_backward_kernel(grad, grad_v, filters, grad_qkv, T, stride, Hq: tl.constexpr, Hk: tl.constexpr,
                             h: tl.constexpr, HALF: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr,
                             BK: tl.constexpr):  # fmt: skip
    """Grid (T / BT, H + 1, B), as forward: the gradient of [q0 | k0 | v_current | v_delayed]."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    H: tl.constexpr = Hq + Hk
    if head == H:
        for c0 in range(0, Hk * h, block_of(h)):
            column = c0 + tl.arange(0, block_of(h))
            row = t[:, None] + (column >= Hk * h // 2)[None, :].to(tl.int64)
            at = grad_v + b * T * Hk * h + row * (Hk * h) + column[None, :]
            x = tl.load(at, mask=(row < T) & (column[None, :] < Hk * h), other=0.0)
            store_rows(grad_qkv, stride, b, t, T, H * h + column, stride, x)
    else:
        c1, c2 = pairs(HALF, h)
        x1, x2 = convolve(grad, grad, filters, b, t, head, T, H * h, c1, c2, H, h, TAPS, BK, BACKWARD=True)
        x1 += mean_with_partners(grad, b, t, head, T, H * h, c1, Hq, Hk, h, BACKWARD=True)
        x2 += mean_with_partners(grad, b, t, head, T, H * h, c2, Hq, Hk, h, BACKWARD=True)
        store_rows(grad_qkv, stride, b, t, T, head * h + c1, (head + 1) * h, x1)
        store_rows(grad_qkv, stride, b, t, T, head * h + c2, (head + 1) * h, x2)


@triton.jit
def cca_filters_backward_kernel(grad, qkv, past, partial, N, T, stride, tokens, H: tl.constexpr, h: tl.constexpr,
                                TAPS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (parts, TAPS * H, h / BK): a program owns BK rows of a filter's gradient and adds up its part of the tokens.

    partial (parts, TAPS, H, h, h) fp32.
    """
    part, tap, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    in_, out = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, block_of(h))
    acc = tl.zeros((BK, out.shape[0]), tl.float32)
    for first in range(part * tokens, tl.minimum((part + 1) * tokens, N), BT):
        n = first + tl.arange(0, BT)
        ago = TAPS - 1 - tap
        column, inside = (head * h + in_)[None, :], (n < N)[:, None] & (in_ < h)[None, :]
        t = (n % T)[:, None]  # before position `ago` of a text, what comes `ago` tokens earlier is of its past
        x = tl.load(qkv + (n - ago).to(tl.int64)[:, None] * stride + column, mask=inside & (t >= ago), other=0.0)
        x += tl.load(past + ((n // T * (TAPS - 1))[:, None] + t + tap).to(tl.int64) * (H * h) + column,
                     mask=inside & (t < ago), other=0.0)  # fmt: skip
        g = load_matrix(grad, n.to(tl.int64), N, head * h + out, H * h)
        acc = dot(tl.trans(x), g, acc)
    own = partial + ((part.to(tl.int64) * TAPS + tap) * H + head) * h * h
    store_matrix(own, in_, h, out, h, acc)


def cca_constants(qkv, filters, temp, cos):
    """Those of all kernels but the filters'. Large heads, and all in fp32, need so many registers that on sm_90 the
    tokens of a program are fewer; and of fp32's stages shared memory holds fewer."""
    (TAPS, H, h, _), Hk, fp32 = filters.shape, len(temp), qkv.dtype == torch.float32
    c = launch_config("cca_large" if fp32 or h > 128 else "cca", num_stages=2 if fp32 else None)
    return dict(Hq=H - Hk, Hk=Hk, h=h, HALF=cos.shape[-1], TAPS=TAPS) | c


@operator
def cca_forward(qkv, past, v_before, filters, bias, temp, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    """filters (TAPS, H, h, h) in qkv's dtype, bias (C) fp32; the rest, and the results, as in zaya.cca."""
    (B, T, width), c = qkv.shape, cca_constants(qkv, filters, temp, cos)
    q, k, v = (qkv.new_empty(B, T, heads, c["h"]) for heads in (c["Hq"], c["Hk"], c["Hk"]))
    launch(
        cca_forward_kernel, (cdiv(T, c["BT"]), filters.shape[1] + 1, B), qkv, past, v_before, filters, bias, temp, cos,
        sin, q, k, v, T, width, **c,
    )  # fmt: skip
    return q, k, v


@operator
def cca_backward(grad_q, grad_k, grad_v, qkv, past, filters, bias, temp, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and filters, and the sums (H, h + 1) of cca_norm_backward_kernel."""
    (B, T, width), (TAPS, H, h, _), c = qkv.shape, filters.shape, cca_constants(qkv, filters, temp, cos)
    blocks = cdiv(T, c["BT"])
    grad, partial = qkv.new_empty(B, T, H * h), qkv.new_empty(B * blocks, H, h + 1, dtype=torch.float32)
    launch(
        cca_norm_backward_kernel, (blocks, H, B), grad_q, grad_k, qkv, past, filters, bias, temp, cos, sin, grad,
        partial, T, width, **c,
    )  # fmt: skip
    grad_qkv = torch.empty_like(qkv)
    launch(cca_rows_backward_kernel, (blocks, H + 1, B), grad, grad_v, filters, grad_qkv, T, width, **c)
    c = launch_config("cca_filters", num_stages=1 if qkv.dtype == torch.float32 else None)
    tokens = max(1024, cdiv(B * T, 32 * c["BT"]) * c["BT"])  # a part: at most 32, for each costs a write of all filters
    by_part = filters.new_empty(cdiv(B * T, tokens), TAPS, H, h, h, dtype=torch.float32)
    grid = (by_part.shape[0], TAPS * H, cdiv(h, c["BK"]))
    launch(
        cca_filters_backward_kernel, grid, grad, qkv, past, by_part, B * T, T, width, tokens, H=H, h=h, TAPS=TAPS, **c
    )
    return grad_qkv, by_part.sum(dim=0).to(filters.dtype), partial.sum(dim=0)


def cca_gradient(ctx, grad_q, grad_k, grad_v):
    qkv, past, _, *rest = ctx.saved_tensors
    grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
    grad_qkv, grad_filters, sums = cca_backward(*grads, qkv, past, *rest)
    grad_bias = sums[:, :-1].flatten()
    # (Of a single key head, contiguous() would keep the stride, and DistributedDataParallel frown at that.)
    grad_temp = sums[-grad_k.shape[2] :, -1].clone(memory_format=torch.contiguous_format)
    return grad_qkv, None, None, grad_filters, grad_bias, grad_temp, None, None


cca_forward.register_autograd(cca_gradient, setup_context=save_inputs)


def one_convolution(depthwise, grouped, dtype):
    """The two convolutions as one -> filters (TAPS, H, in, out) in dtype, and bias (C) in fp32."""
    (w, w_bias), (W, W_bias) = depthwise, grouped
    C, h, taps = W.shape
    W = W.float().view(C // h, h, h, taps).permute(3, 0, 2, 1)  # (H, out, in, tap) -> (tap, H, in, out)
    w = w.float().view(C // h, h, 1, -1)
    last = w.shape[-1] - 1
    shifted = [torch.nn.functional.pad(W, (0, 0) * 3 + (a, last - a)) for a in range(last + 1)]  # tap b at a + b
    filters = sum(w[..., a] * W_a for a, W_a in enumerate(shifted))
    bias = (w_bias.float().view(C // h, h, 1) * W).sum(dim=(0, 2)).flatten() + W_bias
    return filters.to(dtype).contiguous(), bias


def prepared(depthwise, grouped, dtype):
    """What one_convolution makes. In inference mode it is kept with the weights until one of them changes, for its many
    small launches are a fifth of what reading a short prompt takes. (A weight counts its changes, but not those through
    .data or by PyTorch's fused optimizers: so a forward pass with gradients, too, ends it, unless that is compiled.)"""
    weights = *depthwise, *grouped
    if torch.compiler.is_compiling():
        return one_convolution(depthwise, grouped, dtype)
    if torch.is_grad_enabled():
        weights[0].prepared = (None,)
    if not torch.is_inference_mode_enabled() or weights[0].is_inference():
        return one_convolution(depthwise, grouped, dtype)
    key = dtype, *((weight.data_ptr(), weight._version) for weight in weights)
    if getattr(weights[0], "prepared", (None,))[0] != key:
        weights[0].prepared = key, one_convolution(depthwise, grouped, dtype)
    return weights[0].prepared[1]


def cca(qkv, past, v_before, depthwise, grouped, temp, cos, sin):
    filters, bias = prepared(depthwise, grouped, qkv.dtype)
    return cca_forward(qkv.contiguous(), past.contiguous(), v_before.contiguous(), filters, bias, temp, cos, sin)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Router: from its input to the choice (for the few tokens of a decoding step see 7)
#
# Forward, a layer is a kernel, which takes BT tokens a program:
#
#     state = r + gamma * previous;  normed = norm(state)                        (BT, R)
#     for BN units of the first layer:   first = normed @ W1[units].T + b1[units];  hidden[units] = gelu(first)
#
#     second = hidden @ W2[units].T + b2[units];  thought = gelu(second)         (BT, BN)
#
#     p = softmax(thought @ W3.T);  choose the class with the largest p + bias   (BT, BE), all classes
#
# Backward starts at the chosen probability. Forward has kept how that changes with each logit (slopes) and all that has
# a name above but p. One kernel takes the gradient through the third layer's matrix and the GELU before it, and then
# through the second's:
#
#     grad = (grad @ W[:, units]) * slope of GELU at what it was given           (BT, BN)
#
# and another, with W1, through norm and depth averaging. The gradients of the three matrices are sums over all tokens,
# products that torch does well.
#
# (One kernel forward and one backward would read the least, but hold so much that an H200's SM has room for two
# programs, which mostly wait: 16,384 tokens took 51 and 114 us, where issuing all their instructions takes 17 and 35.)


@triton.jit
def normal_pdf_and_cdf(x):
    """The normal distribution's density at x and its integral up to x, which is Abramowitz and Stegun's 26.2.17: off by
    at most 7.5e-8, in fp32 by 3e-7. With erf the backward kernels would have half as many instructions again."""
    density = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361592)  # exp(-x^2 / 2) / sqrt(2 pi)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    series = 0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429)))
    tail = density * t * series
    return density, tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def gelu(x):
    _, integral = normal_pdf_and_cdf(x)
    return x * integral


@triton.jit
def gelu_slope(x):
    density, integral = normal_pdf_and_cdf(x)
    return integral + x * density


@triton.jit
def hits(choice, n, N, e):
    """How many of the tokens n below N chose each of the classes e."""
    return tl.sum(((choice[:, None] == e[None, :]) & (n < N)[:, None]).to(tl.int32), axis=0)


@triton.jit
def router_first_kernel(r, previous, gamma, norm, eps, W1, b1, state, normed, first, hidden, N, R: tl.constexpr,
                        BT: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Grid (N / BT): depth averaging, norm and the first layer -> state, normed, first and hidden (N, R)."""
    n, c = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, block_of(R))
    x = load_matrix(r, n, N, c, R).to(tl.float32)
    if previous is not None:
        x += load_matrix(previous, n, N, c, R) * load_vector(gamma, c, R)[None, :]
    store_matrix(state, n, N, c, R, x)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / R + eps)
    x = (x * inverse[:, None] * load_vector(norm, c, R)[None, :]).to(W1.dtype.element_ty)
    store_matrix(normed, n, N, c, R, x)
    for u0 in range(0, R, BN):
        u = u0 + tl.arange(0, BN)
        y = dot(x, load_matrix(W1, c, R, u, R, TRANSPOSED=True)) + load_vector(b1, u, R)[None, :]
        store_matrix(first, n, N, u, R, y)
        store_matrix(hidden, n, N, u, R, gelu(y))


@triton.jit
def router_second_kernel(hidden, W2, b2, second, thought, N, R: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
                         BK: tl.constexpr):  # fmt: skip
    """Grid (N / BT, R / BN): the second layer, from hidden to second and thought (N, R)."""
    n, u = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    y = tile_product(hidden, R, n, N, W2, u, u < R, R, R, 1, BT, BN, BK) + load_vector(b2, u, R)[None, :]
    store_matrix(second, n, N, u, R, y)
    store_matrix(thought, n, N, u, R, gelu(y))


@triton.jit
def choose_kernel(thought, W3, balancing, probability, choice, counts, slopes, N, R: tl.constexpr,
                  CLASSES: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr, BK: tl.constexpr,
                  BT: tl.constexpr):  # fmt: skip
    """Grid (N / BT): the third layer, the softmax, the choice. counts (N / BT, CLASSES) int32: how many of a program's
    tokens chose each class. slopes (N, WIDTH): d p[choice] / d logit[e] = p[choice] * ((e = choice) - p[e]), and zeros
    from CLASSES on."""
    n, e, k = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, block_of(CLASSES)), tl.arange(0, BK)
    let_the_next_start(PDL)
    w3 = load_matrix(W3, k, R, e, CLASSES, TRANSPOSED=True)  # a step ahead of its use
    bias = tl.load(balancing + e, mask=e < CLASSES, other=float("-inf"))
    wait_for_the_kernel_before(PDL)
    z = tl.zeros((BT, e.shape[0]), tl.float32)
    for k0 in range(0, R, BK):
        z = dot(load_matrix(thought, n, N, k0 + k, R), w3, z)
        w3 = load_matrix(W3, k0 + BK + k, R, e, CLASSES, TRANSPOSED=True)
    z = tl.where((e < CLASSES)[None, :], z, float("-inf"))
    p = tl.exp(z - tl.max(z, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    chosen = tl.argmax(tl.where(p == p, p + bias[None, :], float("-inf")), axis=1)  # among NaNs, 0
    is_chosen = e[None, :] == chosen[:, None]
    p_chosen = tl.sum(tl.where(is_chosen, p, 0.0), axis=1)
    store_matrix(slopes, n, N, e, WIDTH, p_chosen[:, None] * (tl.where(is_chosen, 1.0, 0.0) - p))
    tl.store(probability + n, p_chosen, mask=n < N)
    tl.store(choice + n, chosen, mask=n < N)
    tl.store(counts + tl.program_id(0) * CLASSES + e, hits(chosen, n, N, e), mask=e < CLASSES)


@triton.jit
def router_layer_backward_kernel(grad, W, given, grad_given, sums, N, R: tl.constexpr, K: tl.constexpr,
                                 STRIDE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
                                 BK: tl.constexpr):  # fmt: skip
    """Grid (N / BT, R / BN): from the gradient of a layer's K results (N, STRIDE), through its matrix W (K, R), to that
    of what the GELU before it was given (N, R). sums (N / BT, R): this one's, for the bias added there."""
    n, u = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1) * BN + tl.arange(0, BN)
    g = tile_product(grad, STRIDE, n, N, W, u, u < R, K, 1, R, BT, BN, BK)
    g *= gelu_slope(load_matrix(given, n, N, u, R).to(tl.float32))
    store_matrix(grad_given, n, N, u, R, g)
    tl.store(sums + tl.program_id(0) * R + u, tl.sum(g, axis=0), mask=u < R)


@triton.jit
def router_first_backward_kernel(grad_first, W1, grad_state, state, previous, gamma, norm, eps, grad_r, grad_previous,
                                 norms, N, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (N / BT): from the gradients of `first` and of the state (or None) to those of r and, if any, of the
    previous state. norms (N / BT, 1 + DEEP, R): sums for norm and gamma."""
    DEEP: tl.constexpr = previous is not None
    n, c = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, block_of(R))
    own, weight = norms + (1 + DEEP) * tl.program_id(0) * R + c, load_vector(norm, c, R)
    x = load_matrix(state, n, N, c, R)  # on its way during the product
    g = tile_product(grad_first, R, n, N, W1, c, c < R, R, 1, R, BT, c.shape[0], BK)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / R + eps)
    x *= inverse[:, None]
    tl.store(own, tl.sum(g * x, axis=0), mask=c < R)
    g *= weight[None, :]
    g = (g - x * (tl.sum(g * x, axis=1) / R)[:, None]) * inverse[:, None]
    if grad_state is not None:
        g += load_matrix(grad_state, n, N, c, R)
    store_matrix(grad_r, n, N, c, R, g)
    if DEEP:
        x = load_matrix(previous, n, N, c, R)
        tl.store(own + R, tl.sum(g * x, axis=0), mask=c < R)
        store_matrix(grad_previous, n, N, c, R, g * load_vector(gamma, c, R)[None, :])


@operator
def router_forward(
    r, previous: Tensor | None, gamma: Tensor | None, norm, eps: float, W1, b1, W2, b2, W3, balancing
) -> tuple[(Tensor,) * 10]:
    """As zaya.route; and, for the backward pass, normed, first, hidden, second, thought (N, R) and slopes."""
    (N, R), state = r.shape, torch.empty_like(r, dtype=torch.float32)
    normed, first, hidden, second, thought = (W1.new_empty(N, R) for _ in range(5))
    c = launch_config("router_first")
    launch(
        router_first_kernel, (cdiv(N, c["BT"]),), r, previous, gamma, norm, eps, W1, b1, state, normed, first, hidden,
        N, R=R, **c,
    )  # fmt: skip
    c = launch_config("router_tiles")
    grid = cdiv(N, c["BT"]), cdiv(R, c["BN"])
    launch(router_second_kernel, grid, hidden, W2, b2, second, thought, N, R=R, **c)
    probability, choice, counts, slopes = last_layer_and_choice(thought, W3, balancing)
    return probability, choice, counts, state, normed, first, hidden, second, thought, slopes


def last_layer_and_choice(thought, W3, balancing):
    """What choose_kernel makes of thought (N, R) -> probability, choice, counts (classes), slopes."""
    (N, R), CLASSES, c = thought.shape, len(W3), launch_config("choose")
    programs = cdiv(N, c["BT"])
    probability, choice = thought.new_empty(N, dtype=torch.float32), thought.new_empty(N, dtype=torch.int64)
    counts = thought.new_empty(programs, CLASSES, dtype=torch.int32)
    width = cdiv(CLASSES, 16) * 16  # rows of 17 numbers would make the product for W3's gradient a slow one
    slopes = thought.new_empty(N, width, dtype=torch.float32)
    size = 2**15 if W3.element_size() < 4 else 2**13  # of the matrix 32 KB at a time; 8 in fp32, or sm_90 would spill
    BK = min(block(R), max(16, size // (block(CLASSES) * W3.element_size())))
    launch(
        choose_kernel, (programs,), thought, W3, balancing, probability, choice, counts, slopes, N, R=R,
        CLASSES=CLASSES, WIDTH=width, BK=BK, **pdl(), **c,
    )  # fmt: skip
    return probability, choice, counts[0] if programs == 1 else counts.sum(dim=0, dtype=torch.int32), slopes


@operator
def router_backward(
    grad_p, grad_state: Tensor | None, eps: float, dtype: torch.dtype, state, normed, first, hidden, second, thought,
    slopes, previous: Tensor | None, gamma: Tensor | None, norm, W1, W2, W3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of r (in dtype), of the previous state (empty for None), and of W1, W2 and W3; those of b1 and b2
    (2, R), and of norm and gamma (2, R), or norm alone (1, R)."""
    (N, R), deep = state.shape, previous is not None
    grad_logits = torch.mul(grad_p[:, None], slopes, out=torch.empty_like(slopes, dtype=W3.dtype))
    grad_first, grad_second, c = torch.empty_like(first), torch.empty_like(first), launch_config("router_tiles")
    grid = cdiv(N, c["BT"]), cdiv(R, c["BN"])
    biases = state.new_empty(2, grid[0], R)
    launch(
        router_layer_backward_kernel, grid, grad_logits, W3, second, grad_second, biases[1], N, R=R, K=len(W3),
        STRIDE=slopes.shape[1], **launch_config("router_tiles", BK=block(len(W3))),
    )  # fmt: skip
    launch(
        router_layer_backward_kernel, grid, grad_second, W2, first, grad_first, biases[0], N, R=R, K=R, STRIDE=R, **c
    )
    c = launch_config("router_first_backward")
    grad_r, grad_previous = torch.empty_like(state, dtype=dtype), state.new_empty(N if deep else 0, R)
    norms = state.new_empty(cdiv(N, c["BT"]), 1 + deep, R)
    launch(
        router_first_backward_kernel, norms.shape[:1], grad_first, W1, grad_state, state, previous, gamma, norm, eps,
        grad_r, grad_previous, norms, N, R=R, **c,
    )  # fmt: skip
    d_W3 = (grad_logits.t() @ thought)[: len(W3)]
    d_W1, d_W2 = grad_first.t() @ normed, grad_second.t() @ hidden
    return grad_r, grad_previous, d_W1, d_W2, d_W3, biases.sum(dim=1), norms.sum(dim=0)


def save_for_router(ctx, inputs, output):
    r, previous, gamma, norm, eps, W1, _, W2, _, W3, *_ = inputs
    _, choice, counts, *kept = output
    ctx.save_for_backward(*kept, previous, gamma, norm, W1, W2, W3)
    ctx.eps, ctx.dtype = eps, r.dtype
    without_gradient(ctx, choice, counts, *kept[1:])


def router_gradient(ctx, grad_p, _choice, _counts, grad_state, *_kept):
    state = ctx.saved_tensors[0]
    grad_p = state.new_zeros(state.shape[0]) if grad_p is None else grad_p
    grad_state = None if grad_state is None else grad_state.contiguous()  # nobody takes the last layer's state
    grad_r, d_previous, d_W1, d_W2, d_W3, biases, norms = router_backward(
        grad_p, grad_state, ctx.eps, ctx.dtype, *ctx.saved_tensors
    )
    d_b1, d_b2 = biases.to(d_W1.dtype)
    d_previous, d_gamma = (d_previous, norms[1]) if len(norms) == 2 else (None, None)
    return grad_r, d_previous, d_gamma, norms[0], None, d_W1, d_b1, d_W2, d_b2, d_W3, None


router_forward.register_autograd(router_gradient, setup_context=save_for_router)


def route(r, previous, gamma, norm, eps, fc1, fc2, out, balancing):
    if len(r) <= 16 and not torch.is_grad_enabled():
        return router_of_few(r, previous, gamma, norm, eps, *fc1, *fc2, out, balancing)
    return router_forward(r, previous, gamma, norm, eps, *fc1, *fc2, out, balancing)[:4]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Dispatch: the tokens of each expert together, without a sort
#
#     counts[e, block] = how many of the block's BT tokens chose e
#     ends = running sum of counts, read expert by expert
#     place of a token = (ends - counts)[its expert, its block] + how many before it in its block chose the same
#
# The order is that of a stable sort. Rows move once; on the way back each token fetches its row, so no two programs
# ever write to one place.


@triton.jit
def count_kernel(choice, counts, N, E: tl.constexpr, BT: tl.constexpr):
    """Grid (N / BT). counts (E, N / BT) int32."""
    n, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, block_of(E))
    expert = tl.load(choice + n, mask=n < N, other=0).to(tl.int32)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), hits(expert, n, N, e), mask=e < E)


@triton.jit
def dispatch_kernel(x, choice, counts, ends, sorted_x, place, N, D, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (N / BT, D / BD): BT tokens' places, and BD columns of their rows."""
    i = tl.arange(0, BT)
    n, d = tl.program_id(0) * BT + i, tl.program_id(1) * BD + tl.arange(0, BD)
    expert = tl.load(choice + n, mask=n < N, other=0).to(tl.int32)
    rank = tl.sum(((expert[None, :] == expert[:, None]) & (i[None, :] < i[:, None])).to(tl.int64), axis=1)
    at = expert * tl.num_programs(0) + tl.program_id(0)
    row = tl.load(ends + at) - tl.load(counts + at) + rank
    if tl.program_id(1) == 0:
        tl.store(place + n, row, mask=n < N)
    rows = load_matrix(x, n.to(tl.int64), N, d, D)
    tl.store(sorted_x + row[:, None] * D + d[None, :], rows, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def combine_kernel(y, place, probability, out, N, D, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (N / BT, D / BD): out[n] = y[place[n]], times probability[n] (or not, for None)."""
    n, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(place + n, mask=n < N, other=N)
    rows = load_matrix(y, row, N, d, D)
    if probability is not None:
        rows = rows * load_vector(probability, n, N)[:, None]
    store_matrix(out, n.to(tl.int64), N, d, D, rows)


@triton.jit
def combine_backward_kernel(grad, y, place, probability, grad_y, grad_p, N, D, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (N / BT): grad_y[place[n]] = probability[n] * grad[n], grad_p[n] = grad[n] . y[place[n]]."""
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    row, p = tl.load(place + n, mask=n < N, other=N), load_vector(probability, n, N)
    dp = tl.zeros((BT,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        g = load_matrix(grad, n.to(tl.int64), N, d, D).to(tl.float32)
        dp += tl.sum(g * load_matrix(y, row, N, d, D).to(tl.float32), axis=1)
        store_matrix(grad_y, row, N, d, D, g * p[:, None])
    tl.store(grad_p + n, dp, mask=n < N)


@operator
def dispatch(x, choice, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """As zaya.dispatch."""
    (N, D), c = x.shape, launch_config("dispatch")
    BT, BD = c["BT"], c["BD"]
    blocks = max(1, cdiv(N, BT))
    counts = choice.new_empty(E, blocks, dtype=torch.int32)
    launch(count_kernel, (blocks,), choice, counts, N, E=E, BT=BT, num_warps=4, num_stages=1)
    ends = counts.flatten().cumsum(dim=0, dtype=torch.int64)
    sorted_x, place = torch.empty_like(x), torch.empty_like(choice)
    launch(dispatch_kernel, (blocks, cdiv(D, BD)), x, choice, counts, ends, sorted_x, place, N, D, **c)
    return sorted_x, place, ends.view(E, blocks)[:, -1].to(torch.int32)


@operator
def combine(y, place, probability: Tensor | None) -> Tensor:
    """As zaya.combine; without probabilities only the rows move."""
    (N, D), c, out = y.shape, launch_config("dispatch"), torch.empty_like(y)
    grid = (cdiv(N, c["BT"]), cdiv(D, c["BD"]))
    launch(combine_kernel, grid, y, place, probability, out, N, D, **c)
    return out


@operator
def combine_backward(grad, y, place, probability) -> tuple[Tensor, Tensor]:
    (N, D), c = y.shape, launch_config("combine_backward")
    grad_y, grad_p = torch.empty_like(y), torch.empty_like(probability)
    launch(combine_backward_kernel, (cdiv(N, c["BT"]),), grad, y, place, probability, grad_y, grad_p, N, D, **c)
    return grad_y, grad_p


def save_for_dispatch(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    without_gradient(ctx, *output[1:])


def dispatch_gradient(ctx, grad, _place, _offsets):
    return combine(grad.contiguous(), *ctx.saved_tensors, None), None, None


def combine_gradient(ctx, grad):
    grad_y, grad_p = combine_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_y, None, grad_p


dispatch.register_autograd(dispatch_gradient, setup_context=save_for_dispatch)
combine.register_autograd(combine_gradient, setup_context=save_inputs)

# ---------------------------------------------------------------------------------------------------------------------
# 4. Experts: products of sorted rows, each with its own expert's matrices
#
# Rows are cut into tiles of BM that belong to one expert; how many tiles that makes, only the GPU knows. So a fixed
# number of programs share the tiles out among themselves:
#
#     for tile in (my number, my number + programs, ...) while there are tiles:
#         expert, rows = look the tile up in offsets
#         acc = x[rows] @ weight[expert].T          BK columns at a time
#         write acc
#
# Forward, the gate's and the up's columns are made in one program, which can then apply SwiGLU before it writes.
# Backward, SwiGLU is a pass of its own: after the product with `down` it would need so many registers that only small
# tiles would be left for the product. A matrix's gradient is a product over its expert's rows.
#
# Here M and K are a weight's outputs and inputs, and a tile has a product's usual names, whichever dimensions those
# are: BM rows, BN columns, BK of what is summed.


@triton.jit
def tiles_by_expert(offsets, E: tl.constexpr, BM: tl.constexpr):
    """Where each expert's rows start and end, and how many tiles they make, (BE) each."""
    e = tl.arange(0, block_of(E))
    end = tl.load(offsets + e, mask=e < E, other=0)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    return start, end, tl.cdiv(end - start, BM)


@triton.jit
def find_tile(start, end, tiles, tile, columns, BM: tl.constexpr):
    """A tile's expert, its first row, how many rows that expert has from there on, and the number of its column tile.

    Tiles are numbered down BAND row tiles of one column, then of the next, and only then come the next BAND: programs
    that run at one time share weights and rows.
    """
    BAND: tl.constexpr = 8
    last = tl.cumsum(tiles, axis=0)
    band = tile // (BAND * columns)
    height = tl.minimum(tl.sum(tiles, axis=0) - band * BAND, BAND)
    row_tile = band * BAND + (tile % (BAND * columns)) % height
    column_tile = (tile % (BAND * columns)) // height
    expert = tl.sum((last <= row_tile).to(tl.int32), axis=0)
    mine = tl.arange(0, tiles.shape[0]) == expert
    row = tl.sum(tl.where(mine, start + (row_tile - last + tiles) * BM, 0), axis=0)
    rows = tl.sum(tl.where(mine, end, 0), axis=0) - row
    return expert.to(tl.int64), row.to(tl.int64), rows, column_tile


@triton.jit
def swiglu_kernel(x, weight, offsets, hidden, act, D, F, E: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """act = silu(gate) * up with [gate | up] = x @ weight[expert].T. KEEP: `hidden` (N, F, 2) gets each unit's gate and
    up, side by side.

    Grid (EXPERT_PROGRAMS or fewer). A tile is BM rows of one expert and BN / 2 of its F units, by a single product: its
    column 2 i is unit i's gate (row i of the weight), 2 i + 1 the same unit's up (row F + i). weight (E, 2F, D).
    """
    UNITS: tl.constexpr = BN // 2
    columns, m, c = tl.cdiv(F, UNITS), tl.arange(0, BM), tl.arange(0, BN)
    starts, ends, tiles = tiles_by_expert(offsets, E, BM)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * columns, tl.num_programs(0)):
        expert, row, rows, column_tile = find_tile(starts, ends, tiles, tile, columns, BM)
        unit = column_tile * UNITS + c // 2
        w = weight + expert * 2 * F * D
        acc = tile_product(x + row * D, D, m, rows, w, c % 2 * F + unit, unit < F, D, D, 1, BM, BN, BK)
        gate, up = tl.split(tl.reshape(acc, (BM, UNITS, 2)))
        u = column_tile * UNITS + tl.arange(0, UNITS)
        store_matrix(act + row * F, m, rows, u, F, gate * (tl.sigmoid(gate) * up))  # in another order gfx942 spills
        if KEEP:
            store_matrix(hidden + row * 2 * F, m, rows, column_tile * BN + c, 2 * F, acc)


@triton.jit
def swiglu_backward_kernel(grad, hidden, act, grad_hidden, N, F, BT: tl.constexpr, BF: tl.constexpr):
    """Grid (N / BT, F / BF): from the gradient of act (N, F) to that of [gate | up] (N, 2F); act is computed again."""
    n, f0 = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1) * BF
    f, pair = f0 + tl.arange(0, BF), 2 * f0 + tl.arange(0, 2 * BF)
    gate, up = tl.split(tl.reshape(load_matrix(hidden, n, N, pair, 2 * F), (BT, BF, 2)))
    gate, up, g = gate.to(tl.float32), up.to(tl.float32), load_matrix(grad, n, N, f, F).to(tl.float32)
    share = tl.sigmoid(gate)
    store_matrix(act, n, N, f, F, gate * share * up)
    grad_gate = g * up * share * (1 + gate * (1 - share))
    inside, at = (n < N)[:, None] & (f < F)[None, :], n[:, None] * 2 * F + f[None, :]
    tl.store(grad_hidden + at, grad_gate, mask=inside)
    tl.store(grad_hidden + at + F, g * gate * share, mask=inside)


@triton.jit
def grouped_kernel(x, weight, offsets, out, K, M, stride_e, stride_m, stride_k, E: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out (N, M) = x (N, K) @ weight[expert].T, weight (E, M, K) by its strides.

    Grid (EXPERT_PROGRAMS or fewer). A tile is BM rows of one expert and BN columns.
    """
    columns, m = tl.cdiv(M, BN), tl.arange(0, BM)
    starts, ends, tiles = tiles_by_expert(offsets, E, BM)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * columns, tl.num_programs(0)):
        expert, row, rows, column_tile = find_tile(starts, ends, tiles, tile, columns, BM)
        c = column_tile * BN + tl.arange(0, BN)
        w = weight + expert * stride_e
        acc = tile_product(x + row * K, K, m, rows, w, c, c < M, K, stride_m, stride_k, BM, BN, BK)
        store_matrix(out + row * M, m, rows, c, M, acc)


@triton.jit
def grouped_weight_kernel(grad, x, offsets, out, M, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out (E, M, K): out[e] = grad[rows of e].T @ x[rows of e]; zeros for an expert without rows.

    Grid (M / BM * K / BN, E). A program owns one tile of one expert's matrix; its rows go by BK at a time.
    """
    expert, tile, tiles = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.cdiv(K, BN)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    end = tl.load(offsets + expert).to(tl.int64)
    m, c = tile // tiles * BM + tl.arange(0, BM), tile % tiles * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for n0 in range(start, end, BK):
        n = n0 + tl.arange(0, BK)
        g = load_matrix(grad, m, M, n, end, TRANSPOSED=True)
        acc = dot(g, load_matrix(x, n, end, c, K), acc)
    store_matrix(out + expert * M * K, m.to(tl.int64), M, c, K, acc)


def grouped_config(kernel, x):
    """In fp32 a tile is smaller: a wider or a deeper one would spill on sm_90."""
    return launch_config(kernel, BN=128, BK=32) if x.dtype == torch.float32 else launch_config(kernel)


def tiles_of(kernel, x, M, E):
    """The grid of a kernel that shares its tiles out, no more programs than there can be tiles, and its constants."""
    N, c = x.shape[0], grouped_config(kernel, x)  # len(x) would be a constant to torch.compile
    most = (cdiv(N, c["BM"]) + E) * cdiv(M, c["BN"])
    return (min(for_this_gpu(EXPERT_PROGRAMS), most),), dict(E=E) | c


def grouped_linear(x, weight, offsets):
    """x (N, K), sorted by expert, times weight (E, M, K) -> (N, M)."""
    E, M, K = weight.shape
    out = x.new_empty(x.shape[0], M)
    grid, shape = tiles_of("grouped", x, M, E)
    launch(grouped_kernel, grid, x, weight, offsets, out, K, M, *weight.stride(), **shape)
    return out


def grouped_weight_product(grad, x, offsets):
    """The weight's gradient of grouped_linear -> (E, M, K)."""
    E, M, K, c = len(offsets), grad.shape[1], x.shape[1], grouped_config("grouped", x)
    out = x.new_empty(E, M, K)
    launch(grouped_weight_kernel, (cdiv(M, c["BM"]) * cdiv(K, c["BN"]), E), grad, x, offsets, out, M, K, **c)
    return out


@operator
def experts_forward(x, gate_up, down, offsets, keep: bool) -> tuple[Tensor, Tensor]:
    """As zaya.experts; and, to keep for the backward pass, each unit's gate and up (N, F, 2)."""
    (N, D), (E, _, F) = x.shape, down.shape
    act, hidden = x.new_empty(N, F), x.new_empty(N if keep else 0, F, 2)
    grid, shape = tiles_of("swiglu", x, 2 * F, E)
    launch(swiglu_kernel, grid, x, gate_up, offsets, hidden, act, D, F, KEEP=keep, **shape)
    return grouped_linear(act, down, offsets), hidden


@operator
def experts_backward(grad, x, gate_up, down, offsets, hidden) -> tuple[Tensor, Tensor, Tensor]:
    (N, F, _), c = hidden.shape, launch_config("swiglu_backward")
    grad_act, act, grad_hidden = grouped_linear(grad, down.mT, offsets), x.new_empty(N, F), x.new_empty(N, 2 * F)
    grid = (cdiv(N, c["BT"]), cdiv(F, c["BF"]))
    launch(swiglu_backward_kernel, grid, grad_act, hidden, act, grad_hidden, N, F, **c)
    grad_gate_up, grad_down = (grouped_weight_product(g, a, offsets) for g, a in ((grad_hidden, x), (grad, act)))
    return grouped_linear(grad_hidden, gate_up.mT, offsets), grad_gate_up, grad_down


def save_for_experts(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[1])
    without_gradient(ctx, output[1])


def experts_gradient(ctx, grad, _hidden):
    return *experts_backward(grad.contiguous(), *ctx.saved_tensors), None, None


experts_forward.register_autograd(experts_gradient, setup_context=save_for_experts)


def experts(x, gate_up, down, offsets):
    return experts_forward(x, gate_up, down, offsets, torch.is_grad_enabled())[0]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Merge: residual scaling and the next RMSNorm, one read and one write of the stream
#
#     new = (stream + b_r) * s_r + (out + b_o) * s_o
#     normed = new / sqrt(mean(new^2) + eps) * weight
#
# Forward, a program owns a token. Backward it owns every PROGRAMS-th token, so that the sums for the five vectors stay
# in its registers until the end; `new` is computed again. An SM of sm_90 then has registers for one or two programs, so
# the rows of the next AHEAD - 1 tokens are loaded while they work on one.


@triton.jit
def normed_by(x, weight, D, eps):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight


@triton.jit
def merge_forward_kernel(stream, out, s_r, b_r, s_o, b_o, weight, new, normed, D, eps, BD: tl.constexpr):
    """Grid (N)."""
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    sr, br = load_vector(s_r, d, D), load_vector(b_r, d, D)
    so, bo = load_vector(s_o, d, D), load_vector(b_o, d, D)
    w = load_vector(weight, d, D)  # before the sum, for which threads wait for each other
    x = (load_vector(stream + n * D, d, D) + br) * sr + (load_vector(out + n * D, d, D) + bo) * so
    y = normed_by(x, w, D, eps)
    tl.store(new + n * D + d, x, mask=d < D)
    tl.store(normed + n * D + d, y, mask=d < D)


@triton.jit
def merge_backward_kernel(grad_new, grad_normed, stream, out, s_r, b_r, s_o, b_o, weight, grad_stream, grad_out,
                          partial, N, D, eps, BD: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Grid (PROGRAMS or fewer). partial (programs, 4, D): sums of the gradient of new, of it times stream + b_r, of it
    times out + b_o, and of the gradient of normed times new / its root mean square."""
    d = tl.arange(0, BD)
    inside = d < D
    sr, br, w = load_vector(s_r, d, D), load_vector(b_r, d, D), load_vector(weight, d, D)
    so, bo = load_vector(s_o, d, D), load_vector(b_o, d, D)
    sum_g, sum_gx = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    sum_go, sum_gn = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    first = tl.program_id(0).to(tl.int64)  # 64 bits: n * D may be large
    for n in tl.range(first, N, tl.num_programs(0), num_stages=AHEAD):
        x, o = load_vector(stream + n * D, d, D) + br, load_vector(out + n * D, d, D) + bo
        new = x * sr + o * so
        inverse = tl.rsqrt(tl.sum(new * new, axis=0) / D + eps)
        new *= inverse
        gn = load_vector(grad_normed + n * D, d, D)
        g = (gn * w - new * (tl.sum(gn * w * new, axis=0) / D)) * inverse
        g += load_vector(grad_new + n * D, d, D)
        tl.store(grad_stream + n * D + d, g * sr, mask=inside)
        tl.store(grad_out + n * D + d, g * so, mask=inside)
        sum_g, sum_gx, sum_go, sum_gn = sum_g + g, sum_gx + g * x, sum_go + g * o, sum_gn + gn * new
    own = partial + tl.program_id(0) * 4 * D + d
    tl.store(own, sum_g, mask=inside)
    tl.store(own + D, sum_gx, mask=inside)
    tl.store(own + 2 * D, sum_go, mask=inside)
    tl.store(own + 3 * D, sum_gn, mask=inside)


@operator
def merge(stream, out, s_r, b_r, s_o, b_o, weight, eps: float) -> tuple[Tensor, Tensor]:
    """As zaya.merge."""
    D, new, normed = stream.shape[-1], torch.empty_like(stream), torch.empty_like(out)
    N = stream.numel() // D
    launch(
        merge_forward_kernel, (N,), stream, out, s_r, b_r, s_o, b_o, weight, new, normed, D, eps, BD=block(D),
        **launch_config("merge"),
    )  # fmt: skip
    return new, normed


@operator
def merge_backward(
    grad_new, grad_normed, stream, out, s_r, b_r, s_o, b_o, weight, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of stream and out, and the four sums (4, D) of the kernel."""
    D, grad_stream, grad_out = stream.shape[-1], torch.empty_like(stream), torch.empty_like(out)
    N = stream.numel() // D
    partial = stream.new_empty(min(N, for_this_gpu(PROGRAMS)), 4, D)
    c = launch_config("merge_backward", AHEAD=1 if D > 4096 else None)  # or shared memory would not hold the rows
    launch(
        merge_backward_kernel, partial.shape[:1], grad_new, grad_normed, stream, out, s_r, b_r, s_o, b_o, weight,
        grad_stream, grad_out, partial, N, D, eps, BD=block(D), **c,
    )  # fmt: skip
    return grad_stream, grad_out, partial.sum(dim=0)


def save_for_merge(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1])
    ctx.eps = inputs[-1]


def merge_gradient(ctx, grad_new, grad_normed):
    _, _, s_r, _, s_o, *_ = ctx.saved_tensors
    grads = grad_new.contiguous(), grad_normed.contiguous()
    grad_stream, grad_out, (g, gx, go, gn) = merge_backward(*grads, *ctx.saved_tensors, ctx.eps)
    return grad_stream, grad_out, gx, g * s_r, go, g * s_o, gn, None


merge.register_autograd(merge_gradient, setup_context=save_for_merge)

# ---------------------------------------------------------------------------------------------------------------------
# 6. Cross-entropy: the logits once for their softmax's denominator, and once for the gradient
#
#     for BV logits: total = total + exp(logit - largest), or total * exp(largest - logit) + 1 with a new largest
#     for BV logits: write exp(logit - largest - log(total)), less 1 at the target
#
# Each of the BV places has a running maximum and sum of its own, so that threads need not wait for each other; the
# exponential is the same one in both cases, of -|logit - largest|.


@triton.jit
def cross_entropy_kernel(logits, targets, losses, grad, stride, V, KEEP: tl.constexpr, BV: tl.constexpr):
    """Grid (n). logits and grad (n, stride), of which V columns count. KEEP: the gradient is asked for."""
    n, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    logits += n * stride
    target = tl.load(targets + n)
    wanted = tl.load(logits + target).to(tl.float32)
    # The first maximum is finite: what is masked is -infinity, and infinity less infinity would be NaN
    largest, total = tl.full((BV,), -3.4e38, tl.float32), tl.zeros((BV,), tl.float32)
    for v0 in range(0, V, BV):
        z = tl.load(logits + v0 + lanes, mask=v0 + lanes < V, other=float("-inf")).to(tl.float32)
        share = tl.exp(-tl.abs(z - largest))
        total = tl.where(z > largest, total * share + 1.0, total + share)
        largest = tl.maximum(largest, z)
    most = tl.max(largest, axis=0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - most), axis=0))  # above `most`, which may be too large to add to
    tl.store(losses + n, most - wanted + log_total)
    if KEEP:
        for v0 in range(0, stride, BV):
            v = v0 + lanes
            z = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(z - most - log_total) - tl.where(v == target, 1.0, 0.0)
            tl.store(grad + n * stride + v, p, mask=v < stride)


@operator
def cross_entropy_forward(logits, targets, V: int, keep: bool) -> tuple[Tensor, Tensor]:
    """As zaya.cross_entropy; without keep the gradient is empty."""
    n, stride = logits.shape
    losses, grad = logits.new_empty(n, dtype=torch.float32), logits.new_empty(n if keep else 0, stride)
    c = launch_config("cross_entropy")
    launch(cross_entropy_kernel, (n,), logits, targets, losses, grad, stride, V, KEEP=keep, **c)
    return losses, grad


def cross_entropy(logits, targets, V, with_gradient):
    losses, grad = cross_entropy_forward(logits.contiguous(), targets.contiguous(), V, with_gradient)
    return losses, grad if with_gradient else None


# ---------------------------------------------------------------------------------------------------------------------
# 7. Decoding: one new token's products, its CCA, its attention over the cache, and a few tokens through their experts
#
# All are bound by memory, the matrices, the keys and values, and by the number of launches. So a product takes the
# merge before it along: every program does that for the whole row again, while its part of the matrix is on the way;
# and CCA takes the token into the cache. A token reads its own expert's rows and no other's: a program owns BF units
# and streams their rows through. Attention is split along time (flash-decoding), SPLITS programs a key head, each with
# its own running softmax; a second kernel joins them. How long the cache is, the kernels read from the GPU: the launch
# is always the same, so it can be captured, and the work is what the context needs.
#
# A layer's launches depend on each other, and so each would wait for memory in turn. Where kernels can start early
# (PDL) they first let the next one start, then ask for all that does not depend on those before: weights, old keys and
# values. So matrices are on their way several kernels ahead: 714 tokens/s in place of 476 (H200, ZAYA1-8B).


@triton.jit
def gemv_kernel(x, weight, bias, out, stream, s_r, b_r, s_o, b_o, norm, eps, new, normed, M, K, MERGE: tl.constexpr,
                GELU: tl.constexpr, PDL: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (M / BF, N): BF of the M numbers that the matrix (M, K) makes of a row of x (N, K) -> out (N, M). MERGE: x
    first joins the stream (or None), and the matrix gets that, normed; the first program of a row also writes new and
    normed (unless that is None), as merge does. GELU: out is gelu of the product."""
    n, m, k = tl.program_id(1), tl.program_id(0).to(tl.int64) * BF + tl.arange(0, BF), tl.arange(0, BK)
    let_the_next_start(PDL)
    matrix = load_matrix(weight, m, M, k, K)  # the first to be asked for: it takes the longest
    y = load_vector(bias, m, M)
    if MERGE:
        sr, br = load_vector(s_r, k, K, 1.0), load_vector(b_r, k, K)
        so, bo = load_vector(s_o, k, K, 1.0), load_vector(b_o, k, K)
        w = load_vector(norm, k, K)
    wait_for_the_kernel_before(PDL)
    row = load_vector(x + n * K, k, K)
    if MERGE:
        row = (row + bo) * so
        if stream is not None:
            row += (load_vector(stream + n * K, k, K) + br) * sr
        if tl.program_id(0) == 0:
            tl.store(new + n * K + k, row, mask=k < K)
        row = normed_by(row, w, K, eps)
        if normed is not None:
            if tl.program_id(0) == 0:
                tl.store(normed + n * K + k, row, mask=k < K)
    y += tl.sum(matrix.to(tl.float32) * row[None, :], axis=1)
    if GELU:
        y = gelu(y)
    tl.store(out + n * M + m, y, mask=m < M)


def gemv(x, weight, bias=None, merging=None, activate=False):
    """What gemv_kernel makes of x (N, K) -> (N, M). merging: its arguments from stream to normed, or None; activate: by
    GELU."""
    (N, K), M = x.shape, len(weight)
    BK, out = block(K), weight.new_empty(N, M)
    # The largest power of two that leaves 64 programs (if M is that large), and at most 16,384 numbers for one to hold
    BF = max(1, min(next_power_of_2(M // 64 + 1) // 2, 16384 // BK))
    launch(
        gemv_kernel, (cdiv(M, BF), N), x, weight, bias, out, *(merging or [None] * 9), M, K, MERGE=merging is not None,
        GELU=activate, BF=BF, BK=BK, **pdl(), **launch_config("gemv"),
    )  # fmt: skip
    return out


@operator
def product(x, weight) -> Tensor:
    """As zaya.product."""
    return gemv(x.contiguous(), weight)


@operator
def merged_product(
    stream, out, s_r, b_r, s_o, b_o, norm, eps: float, weight, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As zaya.merged_product."""
    new, normed = torch.empty_like(stream), torch.empty_like(out)
    y = gemv(out, weight, bias, (stream, s_r, b_r, s_o, b_o, norm, eps, new, normed))
    return new, normed, y


@operator
def router_of_few(
    r, previous: Tensor | None, gamma: Tensor | None, norm, eps: float, W1, b1, W2, b2, W3, balancing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As zaya.route, of at most 16 tokens: a layer a launch, for a single program would have to read all matrices.
    Depth averaging and norm are a merge, of the previous state, times gamma, and r."""
    state = torch.empty_like(r, dtype=torch.float32)
    averaging = previous, gamma, None, None, None, norm, eps, state, None
    thought = gemv(gemv(r, W1, b1, averaging, activate=True), W2, b2, activate=True)
    return *last_layer_and_choice(thought, W3, balancing)[:3], state


@triton.jit
def of_the_past(recent, w, w_bias, position, head, j0, SIZE: tl.constexpr, WIDTH: tl.constexpr, h: tl.constexpr,
                TAPS0: tl.constexpr, TAPS1: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """What the first convolution makes of the tokens before the newest, for inputs j0 to j0 + BK of the second: number
    j is channel j // TAPS1 at its tap j % TAPS1 -> (BK) fp32."""
    j = j0 + tl.arange(0, BK)
    tap, inside, column = j % TAPS1, j < h * TAPS1, head * h + j // TAPS1
    x = tl.load(w_bias + column, mask=inside, other=0.0).to(tl.float32)
    for a in tl.static_range(TAPS0):
        ago = TAPS0 + TAPS1 - 2 - tap - a
        row = (position + SIZE - ago) % SIZE
        value = tl.load(recent + row * WIDTH + column, mask=inside & (ago > 0), other=0.0).to(tl.float32)
        x += value * tl.load(w + column * TAPS0 + a, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def turn(x, cosine, sine, HALF: tl.constexpr):
    """RoPE of x (1, BH): channels c and c + HALF turn in their plane, those from 2 * HALF on, by no angle, stay."""
    c = tl.arange(0, x.shape[1])
    partner = tl.where(c < HALF, c + HALF, c - HALF)
    return x * cosine + tl.gather(x, partner[None, :], axis=1) * sine * tl.where(c < HALF, -1, 1)[None, :]


@triton.jit
def cca_step_kernel(qkv, recent, cache_k, cache_v, end, w, w_bias, W, W_bias, temp, cos, sin, q, S, SIZE: tl.constexpr,
                    Hq: tl.constexpr, Hk: tl.constexpr, h: tl.constexpr, HALF: tl.constexpr, TAPS0: tl.constexpr,
                    TAPS1: tl.constexpr, PDL: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (H + 1, B): one head of one text's new token; the last of the H + 1, its values. recent (B, SIZE, width)."""
    head, b, c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, block_of(h))
    H: tl.constexpr = Hq + Hk
    WIDTH: tl.constexpr = (H + Hk) * h
    let_the_next_start(PDL)
    position = tl.load(end).to(tl.int64) - 1
    qkv, recent = qkv + b * WIDTH, recent + b * SIZE * WIDTH
    if head == H:
        wait_for_the_kernel_before(PDL)
        newest, before = recent + position % SIZE * WIDTH, recent + (position + SIZE - 1) % SIZE * WIDTH
        for c0 in range(0, Hk * h, block_of(h)):
            column = c0 + c
            late, inside = column >= Hk * h // 2, column < Hk * h
            x = tl.load(qkv + H * h + column, mask=inside, other=0.0)
            tl.store(newest + H * h + column, x, mask=inside)
            x = tl.load(before + H * h + column, mask=inside & late, other=x)
            tl.store(cache_v + (b * S + position) * Hk * h + column, x, mask=inside)
    else:
        # First what need not wait for the new token. acc[o] = sum over j of W[o, j] * x[j]; a row of W (H, h, h, TAPS1)
        # is (h, TAPS1) laid flat. BK of the j are asked for at a time, a step ahead of their use
        W += head * h * h * TAPS1
        matrix = load_matrix(W, c, h, tl.arange(0, BK), h * TAPS1)
        x = of_the_past(recent, w, w_bias, position, head, 0, SIZE, WIDTH, h, TAPS0, TAPS1, BK)
        cosine, sine = load_angles(cos, sin, tl.arange(0, 1), 1, tl.where(c < 2 * HALF, c % HALF, HALF), HALF)
        bias, length = load_vector(W_bias + head * h, c, h), load_length(temp, head, Hq, h)
        wait_for_the_kernel_before(PDL)
        # The heads of the q-k mean (those of mean_with_partners)
        GROUP: tl.constexpr = Hq // Hk
        own = tl.load(qkv + head * h + c, mask=c < h, other=0.0)
        first, sharers = tl.where(head < Hq, Hq + head // GROUP, (head - Hq) * GROUP), tl.where(head < Hq, 1, GROUP)
        g = tl.arange(0, triton.next_power_of_2(GROUP))
        partners = load_matrix(qkv + first * h, g, sharers, c, h).to(tl.float32)
        acc = tl.zeros((c.shape[0],), tl.float32)
        for j0 in range(0, h * TAPS1, BK):
            j = j0 + tl.arange(0, BK)
            column, newest = head * h + j // TAPS1, (j < h * TAPS1) & (j % TAPS1 == TAPS1 - 1)
            value = tl.load(qkv + column, mask=newest, other=0.0).to(tl.float32)
            x += value * tl.load(w + column * TAPS0 + TAPS0 - 1, mask=newest, other=0.0).to(tl.float32)
            acc += tl.sum(matrix.to(tl.float32) * x[None, :], axis=1)
            matrix = load_matrix(W, c, h, BK + j, h * TAPS1)
            x = of_the_past(recent, w, w_bias, position, head, j0 + BK, SIZE, WIDTH, h, TAPS0, TAPS1, BK)
        acc += bias + 0.5 * (own.to(tl.float32) + tl.sum(partners, axis=0) / sharers)
        norm = at_least_eps(tl.sqrt(tl.sum(acc * acc, axis=0)))
        x, t = turn((acc * (length / norm))[None, :], cosine, sine, HALF), tl.arange(0, 1)
        if head < Hq:
            store_rows(q, Hq * h, b, t, 1, head * h + c, (head + 1) * h, x)
        else:
            store_rows(cache_k, Hk * h, b * S + position, t, 1, (head - Hq) * h + c, (head - Hq + 1) * h, x)
        tl.store(recent + position % SIZE * WIDTH + head * h + c, own, mask=c < h)


@operator
def cca_step_forward(qkv, recent_, k_, v_, end, w, w_bias, W, W_bias, temp, cos, sin) -> Tensor:
    """As zaya.cca_step, with what its cache holds."""
    B, (S, Hk, h), H, c = len(qkv), k_.shape[1:], len(W) // W.shape[1], launch_config("cca_step")
    q = qkv.new_empty(B, 1, H - Hk, h)
    launch(
        cca_step_kernel, (H + 1, B), qkv, recent_, k_, v_, end, w, w_bias, W, W_bias, temp, cos, sin, q, S,
        SIZE=recent_.shape[1], Hq=H - Hk, Hk=Hk, h=h, HALF=cos.shape[-1], TAPS0=w.shape[2], TAPS1=W.shape[2],
        **pdl(), **c,
    )  # fmt: skip
    return q


def cca_step(qkv, cache, depthwise, grouped, temp, cos, sin):
    buffers = cache.recent, cache.k, cache.v, cache.end
    return cca_step_forward(qkv.contiguous(), *buffers, *depthwise, *grouped, temp, cos, sin)


@triton.jit
def expert_gemv_kernel(x, choice, weight, probability, out, E, M, K: tl.constexpr, SWIGLU: tl.constexpr,
                       PDL: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Grid (M / BF, N): BF of the M numbers that one token's expert makes of its row of x (N, K) -> out (N, M).

    SWIGLU: weight (E, 2M, K) is [gate | up]. Otherwise weight is (E, M, K), and the result is weighted."""
    n, m, k = tl.program_id(1), tl.program_id(0) * BF + tl.arange(0, BF), tl.arange(0, BK)
    if SWIGLU:
        wait_for_the_kernel_before(PDL)
    let_the_next_start(PDL)  # the second kernel starts after the first has waited: it can read the choice
    # (.cg: from the L2, where they are written. What a multiprocessor has in its L1 may be the last token's.)
    expert = tl.load(choice + n, cache_modifier=".cg")
    if not SWIGLU:
        p = tl.load(probability + n, cache_modifier=".cg")  # here, not where it is used, so that nothing waits for it
    w, rows = weight + expert * (2 * M if SWIGLU else M) * K, tl.where(expert < E, M, 0)  # a skipped token's stay zeros
    matrix = load_matrix(w, m, rows, k, K)  # a step ahead of its use
    if SWIGLU:
        matrix_up = load_matrix(w + M * K, m, rows, k, K)
    else:
        wait_for_the_kernel_before(PDL)
    acc, up = tl.zeros((BF,), tl.float32), tl.zeros((BF,), tl.float32)
    for k0 in range(0, K, BK):
        row = load_vector(x + n * K, k0 + k, K)[None, :]
        acc += tl.sum(matrix.to(tl.float32) * row, axis=1)
        matrix = load_matrix(w, m, rows, k0 + BK + k, K)
        if SWIGLU:
            up += tl.sum(matrix_up.to(tl.float32) * row, axis=1)
            matrix_up = load_matrix(w + M * K, m, rows, k0 + BK + k, K)
    tl.store(out + n * M + m, acc * tl.sigmoid(acc) * up if SWIGLU else acc * p, mask=m < M)


@operator
def experts_of_few(x, probability, choice, gate_up, down) -> Tensor:
    """As zaya.experts_of_few."""
    (N, D), (E, _, F) = x.shape, down.shape
    c = launch_config("expert_gemv" if N > 1 else "expert_gemv_one") | pdl()
    act, out = x.new_empty(N, F, dtype=torch.float32), torch.empty_like(x)
    launch(expert_gemv_kernel, (cdiv(F, c["BF"]), N), x, choice, gate_up, None, act, E, F, K=D, SWIGLU=True, **c)
    launch(expert_gemv_kernel, (cdiv(D, c["BF"]), N), act, choice, down, probability, out, E, D, K=F, SWIGLU=False, **c)
    return out


@triton.jit
def load_keys_values(k, v, s0, end, Hk: tl.constexpr, h: tl.constexpr, BS: tl.constexpr):
    """Keys and values (BS, BH) of positions s0 to end."""
    s, c = s0 + tl.arange(0, BS), tl.arange(0, block_of(h))
    at, inside = s.to(tl.int64)[:, None] * (Hk * h) + c[None, :], (s < end)[:, None] & (c < h)[None, :]
    return tl.load(k + at, mask=inside, other=0.0), tl.load(v + at, mask=inside, other=0.0)


@triton.jit
def attend_block(acc, total, largest, queries, keys, values, s, stop, scale):
    """The running softmax (sum of values, sum of weights, largest score) with positions s (BS) below stop taken in."""
    scores = tl.where((s < stop)[None, :], dot(queries, tl.trans(keys)) * scale, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1))
    weights, shrink = tl.exp(scores - new[:, None]), tl.exp(largest - new)
    acc = dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(weights, axis=1), new


@triton.jit
def flash_decoding_kernel(q, k, v, end, partial, S, scale, window, Hq: tl.constexpr, Hk: tl.constexpr, h: tl.constexpr,
                          SPLITS: tl.constexpr, PDL: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """Grid (SPLITS, B * Hk): one part of the past for the queries that share a key head.

    partial (B, Hq, SPLITS, h + 2) fp32: the sum of values, the largest score, the sum of exp(score - largest).
    """
    split, b, head = tl.program_id(0), tl.program_id(1) // Hk, tl.program_id(1) % Hk
    GROUP: tl.constexpr = Hq // Hk
    g, c = tl.arange(0, block_of(GROUP)), tl.arange(0, block_of(h))
    let_the_next_start(PDL)
    now = tl.load(end).to(tl.int32)
    first = tl.maximum(now - window, 0)
    share = tl.cdiv(tl.cdiv(now - first, SPLITS), BS) * BS
    start = first + split * share
    stop = tl.minimum(start + share, now)
    query = b * Hq + head * GROUP + g
    mine = (g < GROUP)[:, None] & (c < h)[None, :]
    k, v = k + b.to(tl.int64) * S * Hk * h + head * h, v + b.to(tl.int64) * S * Hk * h + head * h
    # The first block but for the newest position, which the kernel before still writes
    s = start + tl.arange(0, BS)
    keys, values = load_keys_values(k, v, start, tl.minimum(stop, now - 1), Hk, h, BS)
    wait_for_the_kernel_before(PDL)
    newest, is_newest = (now - 1).to(tl.int64) * Hk * h + c, (s == now - 1)[:, None]
    queries = tl.load(q + query[:, None] * h + c[None, :], mask=mine, other=0.0)
    key, value = tl.load(k + newest, mask=c < h, other=0.0), tl.load(v + newest, mask=c < h, other=0.0)
    acc, total = tl.zeros((g.shape[0], c.shape[0]), tl.float32), tl.zeros((g.shape[0],), tl.float32)
    largest = tl.full((g.shape[0],), float("-inf"), tl.float32)
    if start < stop:
        keys, values = tl.where(is_newest, key[None, :], keys), tl.where(is_newest, value[None, :], values)
        acc, total, largest = attend_block(acc, total, largest, queries, keys, values, s, stop, scale)
    for s0 in range(start + BS, stop, BS):
        keys, values = load_keys_values(k, v, s0, stop, Hk, h, BS)
        s = s0 + tl.arange(0, BS)
        acc, total, largest = attend_block(acc, total, largest, queries, keys, values, s, stop, scale)
    own = partial + (query * SPLITS + split) * (h + 2)
    tl.store(own[:, None] + c[None, :], acc, mask=mine)
    tl.store(own + h, largest, mask=g < GROUP)
    tl.store(own + h + 1, total, mask=g < GROUP)


@triton.jit
def join_splits_kernel(partial, out, h: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """Grid (B * Hq): the parts of a query's attention, each by its weight, 0 for an empty one (its largest is -inf)."""
    s, c = tl.arange(0, SPLITS), tl.arange(0, block_of(h))
    let_the_next_start(PDL)
    wait_for_the_kernel_before(PDL)
    own = partial + (tl.program_id(0) * SPLITS + s) * (h + 2)
    largest, total = tl.load(own + h), tl.load(own + h + 1)
    values = tl.load(own[:, None] + c[None, :], mask=(c < h)[None, :], other=0.0)
    weight = tl.exp(largest - tl.max(largest, axis=0))
    result = tl.sum(values * weight[:, None], axis=0) / tl.sum(weight * total, axis=0)
    tl.store(out + tl.program_id(0) * h + c, result, mask=c < h)


@operator
def attend_past(q, k, v, end, window: int | None = None) -> Tensor:
    """As zaya.attend_past."""
    (B, _, Hq, h), (S, Hk) = q.shape, k.shape[1:3]
    # About 512 programs in all, no more parts than join_splits_kernel holds, none below 128 positions of a full cache
    splits = min(2**15 // block(h), next_power_of_2(max(1, 512 // (B * Hk))), next_power_of_2(cdiv(S, 128)))
    partial, out = q.new_empty(B, Hq, splits, h + 2, dtype=torch.float32), q.new_empty(B, 1, Hq * h)
    shape = dict(h=h, SPLITS=splits) | pdl()
    c = launch_config("flash_decoding", BS=max(16, 2**15 // (block(h) * k.element_size())))  # 32 KB of each
    launch(
        flash_decoding_kernel, (splits, B * Hk), q.contiguous(), k, v, end, partial, S, 1 / math.sqrt(h), window or S,
        Hq=Hq, Hk=Hk, **shape, **c,
    )  # fmt: skip
    warps = 8 if splits * block(h) > 2**13 else 4
    launch(join_splits_kernel, (B * Hq,), partial, out, **shape, num_warps=warps, num_stages=1)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels cannot do, for zaya.py's choice between them and its own functions


def can_run_on(device):
    """Whether Triton runs there: a GPU, or in the interpreter the CPU."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def unsupported(name, *args):
    """Why a kernel cannot take these arguments; None if it can."""
    # The dtype that counts: of route's matrices, and of what a merge adds to the stream
    merges = name in ("merge", "merged_product")
    dtype = args[5][0].dtype if name == "route" else args[1 if merges else 0].dtype
    if dtype not in DTYPES:
        return f"{dtype} is not supported" + (" by Triton's interpreter" if INTERPRETED else "")
    if name in ("cca", "cca_step") and (h := args[4 if name == "cca" else 3][0].shape[1]) > 256:
        return f"head_dim {h} is above 256"
    if name == "cca" and torch.is_grad_enabled() and (args[1].requires_grad or args[2].requires_grad):
        return "there is no gradient for what a cache remembers"
    if name == "route" and args[0].shape[1] > 512:
        return f"router_hidden_size {args[0].shape[1]} is above 512"
    if name == "route" and (row := args[5][0][0].nbytes) > 512 and architecture() not in (*COLUMNS, "none"):
        return f"rows of {row} bytes are more than an unknown GPU may have room for"
    if (merges or name == "product") and args[0].shape[-1] > 16384:
        return f"rows of {args[0].shape[-1]} numbers are longer than 16384"
    return None


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
    from bench_kernels import main

    from zaya import stop_in_one_line

    with stop_in_one_line():
        main()
