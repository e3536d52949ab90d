"""kernels.py: every kernel against its eager twin in Triton's interpreter, and compiled for GPUs that are not there."""

import ast
import math
import re
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, command
from torch._dynamo.testing import CompileCounterWithBackend

import zaya
from zaya import PRESETS, Zaya, ZayaConfig

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

import bench_kernels  # noqa: E402
import kernels  # noqa: E402
from bench_kernels import cases, in_fp32, tensors_in  # noqa: E402

SMALL = ZayaConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8, num_experts=5,
    moe_intermediate_size=40, router_hidden_size=24, vocab_size=50,
)  # fmt: skip
HEADS = ["cca", "product", "merged_product", "cca_step", "attend_past"]  # functions that see the shape of heads
MIXTURE = ["route", "dispatch", "experts", "combine", "experts_of_few"]  # and of experts
WIDTH = ["merge", "product", "merged_product", *MIXTURE]  # and the width of the stream
FUNCTIONS = [*HEADS, *MIXTURE, "merge", "cross_entropy"]
SHAPES = {  # batch, tokens, what differs from SMALL, and for which functions
    "tails": (2, 37, {}, FUNCTIONS),
    "one token": (1, 1, {}, FUNCTIONS),
    "one expert": (1, 20, dict(num_experts=1), MIXTURE),
    "many experts, most of them idle": (
        1, 33, dict(num_experts=256, moe_intermediate_size=8, hidden_size=16), WIDTH
    ),
    "two key heads of 40": (1, 20, dict(num_attention_heads=6, num_key_value_heads=2, head_dim=40), HEADS),
    "a key head a query head": (2, 5, dict(num_attention_heads=3, num_key_value_heads=3), HEADS),
    "head of 32": (1, 40, dict(head_dim=32), HEADS),
    "head of 96, whole head rotated": (1, 9, dict(head_dim=96, partial_rotary_factor=1.0), HEADS),
    "head of 256": (1, 3, dict(head_dim=256, num_attention_heads=1), HEADS),
    "taps 1 and 3": (1, 20, dict(cca_time0=1, cca_time1=3), ["cca", "cca_step"]),
    "taps 3 and 1": (1, 20, dict(cca_time0=3, cca_time1=1), ["cca", "cca_step"]),
    "two taps": (2, 3, dict(cca_time0=1, cca_time1=2), ["cca", "cca_step"]),
    "no convolution at all": (2, 3, dict(cca_time0=1, cca_time1=1), ["cca", "cca_step"]),
    "odd widths": (1, 21, dict(hidden_size=51, moe_intermediate_size=17, router_hidden_size=9), FUNCTIONS),
    "wide rows": (1, 9, dict(hidden_size=520, moe_intermediate_size=140), WIDTH),
    "wide router": (1, 18, dict(router_hidden_size=130, num_experts=40), MIXTURE),
}  # fmt: skip
COMBINATIONS = [(shape, name) for shape, (*_, names) in SHAPES.items() for name in names]
COMPILED = [
    ("gfx942", "bfloat16", 128), ("gfx950", "bfloat16", 128), ("sm_90", "bfloat16", 128), ("sm_90", "bfloat16", 256),
    ("gfx942", "float32", 256),
]  # fmt: skip
NOT_INTERPRETED = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So few that one has several tiles, or tokens, to loop over, as on a GPU at shapes that are no test's."""
    monkeypatch.setattr(kernels, "PROGRAMS", (3,))
    monkeypatch.setattr(kernels, "EXPERT_PROGRAMS", (3,))


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Three errors that results need not show, here where programs run one after another: what lies outside a kernel's
    tensors is read or written; what one program writes, another reads or writes, too; a result is not written."""
    spans, touched, written = [], defaultdict(list), []

    def span(t):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
        return t.data_ptr(), t.data_ptr() + elements * t.element_size()

    def launch(kernel, grid, *args, launch=kernels.launch, **constants):
        if isinstance(args[0], kernels.FakeTensor):
            return
        spans[:] = [span(t) for t in args if isinstance(t, torch.Tensor)]
        touched.clear()
        written.clear()
        launch(kernel, grid, *args, **constants)
        if written:
            each = [np.unique(np.concatenate(pointers)) for pointers in touched.values()]
            at, programs = np.unique(np.concatenate(each), return_counts=True)
            assert not np.isin(at[programs > 1], np.concatenate(written)).any(), "programs race"

    def watched(access, writes):
        def watch(self, pointers, *args, **kwargs):
            mask = args[1 if writes else 0]
            first = pointers.data[mask.data]
            end = first + pointers.get_element_ty().primitive_bitwidth // 8
            assert np.any([(low <= first) & (end <= high) for low, high in spans], axis=0).all(), "outside all tensors"
            touched[self.grid_idx].append(first)
            written.extend([first] if writes else [])
            return access(self, pointers, *args, **kwargs)

        return watch

    monkeypatch.setattr(kernels, "launch", launch)
    for name, writes in dict(create_masked_load=False, create_masked_store=True).items():
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name), writes))
    torch.use_deterministic_algorithms(True)  # by which new memory is NaN, and not an earlier result, the right one say
    yield
    torch.use_deterministic_algorithms(False)


def results_and_gradients(choice, name, args):
    """What zaya's function returns by eager PyTorch or Triton, and the gradients of all arguments that have one. (Those
    of the results are not contiguous.)"""
    zaya.use_kernels(choice)
    results = getattr(zaya, name)(*args)
    results = results if isinstance(results, tuple) else (results,)
    outputs, leaves = [r for r in results if r.requires_grad], [t for t in tensors_in(args) if t.requires_grad]
    if not outputs:
        return results, ()
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(*r.shape, 2, generator=generator).to(r.dtype)[..., 0] for r in outputs]
    return results, torch.autograd.grad(outputs, leaves, grads)


def arguments(shape, name, dtype):
    B, T, changes, _ = SHAPES[shape]
    torch.manual_seed(0)
    return cases(replace(SMALL, **changes), B, T, "cpu", dtype)[name][0]


@pytest.mark.parametrize("shape, name", COMBINATIONS)
def test_float32(shape, name):
    args = arguments(shape, name, torch.float32)
    assert kernels.unsupported(name, *args) is None
    eager, twin = (results_and_gradients(choice, name, args) for choice in ("eager", "triton"))
    for theirs, ours in zip(eager[0] + eager[1], twin[0] + twin[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, check_dtype=theirs.dtype != torch.int64)
    for leaf, gradient in zip([t for t in tensors_in(args) if t.requires_grad], twin[1]):
        assert gradient.stride() == leaf.stride()  # or DistributedDataParallel warns


@pytest.mark.parametrize("shape, name", [c for c in COMBINATIONS if c[0] in ("tails", "head of 32", "odd widths")])
def test_float16(shape, name):
    """No further from the truth than twice eager PyTorch's own error. (That of a few numbers can be small by luck:
    there it counts as no less than one rounding.)"""
    args = arguments(shape, name, torch.float16)
    exact = results_and_gradients("eager", name, in_fp32(args))
    eager, twin = (results_and_gradients(choice, name, args) for choice in ("eager", "triton"))
    for true, theirs, ours in zip(exact[0] + exact[1], eager[0] + eager[1], twin[0] + twin[1], strict=True):
        if true.is_floating_point():
            assert ours.dtype == theirs.dtype
            error, allowed = ((x.float() - true).norm() / (true.norm() + 1e-3) for x in (ours, theirs))
            assert error <= 2 * max(allowed, 2**-11 if true.numel() < 16 else 1e-7)
        else:
            assert ours.equal(theirs.to(ours.dtype))


@pytest.mark.parametrize("scale", [1, 1000])  # of the logits
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("gradient", [True, False])  # without one, nine tokens are few
def test_route_in_all_its_ways(gradient, deep, scale):
    """...with biases that are all negative; and with a gradient for the state alone."""
    r, *depth_averaging, norm, _, fc1, fc2, W3, biases = arguments("wide rows", "route", torch.float32)
    depth_averaging = depth_averaging if deep else (None, None)
    args = r.requires_grad_(gradient), *depth_averaging, norm, 0.1, fc1, fc2, scale * W3.detach(), biases - 2
    with torch.set_grad_enabled(gradient):
        theirs, ours = (results_and_gradients(way, "route", args) for way in ("eager", "triton"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * max(100, scale), check_dtype=False)
        if gradient:
            assert torch.autograd.grad(zaya.route(*args)[3].sum(), r)[0].eq(1).all()


@pytest.mark.parametrize("name", ["cca", "cca_step"])
def test_heads_almost_zero(name):
    """...are divided by eps instead of their norm, which then has no gradient."""
    args = arguments("a key head a query head", name, torch.float32)
    qkv, past, *_ = args
    (_, w_bias), (_, W_bias) = args[-5:-3]
    with torch.no_grad():
        for tensor in (qkv, past if name == "cca" else past.recent, w_bias, W_bias):
            tensor.mul_(1e-8)
    eager, twin = (results_and_gradients(way, name, args) for way in ("eager", "triton"))
    for theirs, ours in zip(eager[0] + eager[1], twin[0] + twin[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("name, count", dict(cca=3, cross_entropy=2, product=1, cca_step=1, attend_past=1).items())
@torch.no_grad()
def test_arguments_that_are_not_contiguous(name, count):
    args = arguments("tails", name, torch.float32)
    strided = *(torch.stack([t, t], dim=-1)[..., 0] for t in args[:count]), *args[count:]
    theirs, ours = (results_and_gradients("triton", name, given)[0] for given in (args, strided))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_text_in_several_parts():
    """Above 1,024 tokens the gradient of CCA's filters is added up part by part."""
    changes = dict(num_attention_heads=1, head_dim=4, hidden_size=16)
    args = cases(replace(SMALL, **changes), 1, 1030, "cpu", torch.float32)["cca"][0]
    theirs, ours = (results_and_gradients(way, "cca", args) for way in ("eager", "triton"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[0, 40, 0], [40], [1, 0, 33, 6], [0, 0, 0, 1], [130, 6, 60]])
def test_experts_that_are_idle_or_take_all(rows):
    E, N, generator = len(rows), sum(rows), torch.Generator().manual_seed(0)
    choice = torch.repeat_interleave(torch.arange(E), torch.tensor(rows))[torch.randperm(N, generator=generator)]
    shapes = (N, 24), (E, 2 * 18, 24), (E, 24, 18), (N,)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    found = []
    for way in ("eager", "triton"):
        zaya.use_kernels(way)
        x, gate_up, down, probability = inputs
        x, place, offsets = zaya.dispatch(x, choice, E)
        offsets = torch.cat([offsets[-1:], offsets])[1:]  # so that what lies before them in memory is no 0
        y = zaya.combine(zaya.experts(x, gate_up, down, offsets), place, probability)
        found.append([y, *torch.autograd.grad(y, inputs, torch.ones_like(y))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "B, S, length, window",
    [(2, 300, *rest) for rest in ((1, None), (2, 1), (129, None), (161, None), (300, 40), (300, None))]
    + [(1, 9000, 8900, None)],
)
def test_attention_sees_the_true_length(B, S, length, window):
    """...and nothing beyond: what the cache still holds there is poison. In four parts, and in 128."""
    torch.manual_seed(0)
    q, k, v = torch.randn(B, 1, 4, 16), torch.randn(B, S, 2, 16), torch.randn(B, S, 2, 16)
    k[:, length:], v[:, length:] = float("nan"), float("nan")
    found = []
    for way in ("eager", "triton"):
        zaya.use_kernels(way)
        found.append(zaya.attend_past(q, k, v, torch.tensor(length, dtype=torch.int32), window))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("V", [100, 4096, 5001])
def test_a_vocabulary_with_padding(V):
    logits, targets = 5 * torch.randn(4, 5056), torch.tensor([[0, 9], [1, 9], [V // 2, 9], [V - 1, 9]])[:, 0]
    (losses, grad), (true_losses, true_grad) = (
        function(logits.clone(), targets, V, True)
        for function in (kernels.cross_entropy, zaya.cross_entropy.__wrapped__)
    )
    torch.testing.assert_close(losses, true_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, true_grad, rtol=1e-5, atol=1e-6)
    assert kernels.cross_entropy(logits, targets, V, False)[1] is None


@pytest.mark.parametrize("shift", [1e4, -2e30])
def test_cross_entropy_of_large_logits(shift):
    logits = torch.full((1, 7), -math.inf)
    logits[0, :2] = shift
    loss, grad = kernels.cross_entropy(logits, torch.tensor([0]), 7, True)
    torch.testing.assert_close(loss, torch.tensor([math.log(2)]))
    torch.testing.assert_close(grad[0, :3], torch.tensor([-0.5, 0.5, 0]))


@pytest.mark.parametrize("M", [1, 40, 513])  # 1, 1 and 8 of which are a program's
def test_several_rows_times_a_matrix(M):
    torch.manual_seed(0)
    stream, out, vectors, weight = torch.randn(3, 24), torch.randn(3, 24), torch.randn(5, 24), torch.randn(M, 24)
    bias = torch.randn(M) if M > 40 else None
    for name, args in {"product": (out, weight), "merged_product": (stream, out, *vectors, 1e-5, weight, bias)}.items():
        theirs, ours = (results_and_gradients(way, name, args)[0] for way in ("eager", "triton"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [(2, 2), (3, 2), (1, 1)])
@pytest.mark.parametrize("position", [0, 1, 2, 7])
def test_a_new_token_enters_the_cache(position, taps):
    """...at its own place and nowhere else, in two texts."""
    shape = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=12, cca_time0=taps[0], cca_time1=taps[1])
    config, found = replace(SMALL, **shape), []
    args, end = cases(config, 2, 1, "cpu", torch.float32)["cca"][0], torch.tensor(position + 1, dtype=torch.int32)
    for way in ("eager", "triton"):
        cache = zaya.LayerCache(config, *(torch.zeros(2, *shape) for shape in zaya.LayerCache.shapes(config, 9)), end)
        cache.newest = zaya.Newest(torch.tensor([position]), position + 1, cache.recent.shape[1])
        buffers = cache.recent, cache.k, cache.v
        torch.manual_seed(0)
        for buffer in buffers:
            buffer.normal_()
        zaya.use_kernels(way)
        with torch.no_grad():
            found.append([zaya.cca_step(args[0], cache, *args[3:]), *buffers])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    schema = torch.ops.nanozaya.cca_step_forward.default._schema
    assert [a.name for a in schema.arguments if a.is_write] == ["recent_", "k_", "v_"]  # as torch.compile must know


# ---------------------------------------------------------------------------------------------------------------------
# The whole model

TINY = ZayaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=3,
    moe_intermediate_size=24, router_hidden_size=16, vocab_size=50, initializer_range=0.15, max_position_embeddings=64,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def tiny_model(kernels, **changes):
    torch.manual_seed(0)
    return Zaya(replace(TINY, **changes), kernels)


def test_some_tokens_skipped():
    """Where the skip class wins, the token's experts add nothing, and nothing else changes."""
    tokens, found = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0)), []
    for way in ("eager", "triton"):
        model = tiny_model(way)
        for router in model.routers:
            router.balancing_biases[-1] = 0.1
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        skipped = [router.counts[-1].item() for router in model.routers]
        assert 0 < max(skipped) < 32
        found.append([loss, *[p.grad for p in model.parameters()]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_skipped_token_reads_no_expert():
    """...such as the one that would come after the last."""
    gate_up, down, x, choice = torch.randn(4, 14, 9), torch.randn(4, 9, 7), torch.randn(3, 9), torch.tensor([0, 3, 2])
    gate_up[3] = down[3] = float("nan")
    args = x, torch.rand(3), choice, gate_up[:3], down[:3]
    ours, theirs = kernels.experts_of_few(*args), zaya.experts_of_few.__wrapped__(*args)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[1].eq(0).all()


@pytest.mark.parametrize("prompt", [[[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]])
def test_text_from_a_cache(prompt):
    texts = []
    for way in ("eager", "triton"):
        model = tiny_model(way, layer_types=["hybrid", "hybrid_sliding"], sliding_window=4)
        texts.append(model.generate(torch.tensor(prompt), 3, temperature=0))
    assert texts[0].equal(texts[1])


@torch.inference_mode()
@pytest.mark.parametrize("attention, launches", [("cca", 11), ("mha", 10)])  # a layer; mha mixes nothing, but by torch
def test_one_text_takes_fewer_launches(attention, launches, monkeypatch):
    model, tokens = tiny_model("eager", attention=attention), torch.tensor([[3, 1, 4, 1]])
    expected, counted, launch = model.hidden_states(tokens)[:, -1], [], kernels.launch
    cache = model.new_cache(1, 4)
    model.hidden_states(tokens[:, :3], cache)
    model.kernels = "triton"  # from here on
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, *args, **kwargs: counted.append(kernel) or launch(kernel, *args, **kwargs)
    )
    found = model.decoder(cache, lambda hidden: hidden)(tokens[:, -1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(counted) == launches * len(model.layers) + 1


def test_twenty_steps():
    """Losses agree while all tokens meet the same experts; one that rounding sends elsewhere parts them a little."""
    runs = []
    for way in ("eager", "triton"):
        model = tiny_model(way, num_attention_heads=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, losses, counts = torch.Generator().manual_seed(0), [], []
        for _ in range(20):
            tokens = torch.randint(50, (1, 11), generator=generator).cumsum(dim=1) % 50
            loss = model(tokens[:, :-1], tokens[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            counts.append(torch.stack([router.counts for router in model.routers]).tolist())
        runs.append((losses, counts))
    (theirs, their_counts), (ours, our_counts) = runs
    flip = next((i for i, (a, b) in enumerate(zip(their_counts, our_counts)) if a != b), 20)
    print(f"first token routed otherwise: {'none' if flip == 20 else f'step {flip}'}")
    assert flip > 0 and theirs[0] != theirs[-1]
    assert max(abs(a - b) for a, b in zip(theirs[:flip], ours[:flip])) < 1e-4
    assert max(abs(a - b) for a, b in zip(theirs, ours)) < 5e-2


def test_one_graph_and_the_same_bits():
    """Forward and backward compile without a graph break, once for a length and once for all others; and the same run
    gives the same bits."""
    grads = []
    for compiled in (False, False, True):
        model = tiny_model("triton", num_hidden_layers=1)
        graphs = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=graphs, fullgraph=True) if compiled else model
        for length in (19, 40, 51):
            tokens = torch.arange(length)[None] % 50
            run(tokens[:, :-1], tokens[:, 1:])[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(grads[0], grads[1]))
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("way", ["eager", "triton"])
def test_a_batch_may_be_empty(way):
    model, nothing = tiny_model(way, num_hidden_layers=1), torch.zeros(0, 5, dtype=torch.int64)
    loss = model(nothing, nothing)[1]
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())  # NaN would be any


# ---------------------------------------------------------------------------------------------------------------------
# Which way is taken


def test_falls_back_and_says_so_once(capsys, monkeypatch):
    monkeypatch.setattr(zaya.warn_once, "__defaults__", (set(),))
    x, choice = torch.randn(6, 4).bfloat16(), torch.zeros(6, dtype=torch.int64)
    for way, said in {"eager": "", "auto": "", "triton": "no kernel for dispatch: torch.bfloat16"}.items():
        zaya.use_kernels(way)
        for _ in range(2):
            assert zaya.dispatch(x, choice, 1)[0].equal(x)
        err = capsys.readouterr().err
        assert err.count("\n") == bool(said) and said in err
    wide = tiny_model("triton", head_dim=512, num_hidden_layers=1)
    assert wide(torch.tensor([[1, 2]]))[0].isfinite().all()
    assert "no kernel for cca: head_dim 512 is above 256" in capsys.readouterr().err
    wide, long = torch.empty(1, 520), torch.empty(1, 16385)

    def unsupported_route(r, matrix):
        return kernels.unsupported("route", r, None, None, None, None, (matrix, None))

    assert unsupported_route(wide, torch.empty(520, 520)) == "router_hidden_size 520 is above 512"
    assert unsupported_route(wide[:, :512], torch.empty(512, 512)) is None
    assert "bfloat16" in unsupported_route(wide, torch.empty(520, 520).bfloat16())
    assert "bfloat16" in kernels.unsupported("merge", wide, wide.bfloat16())
    for name in ("merge", "merged_product", "product"):
        assert "rows of 16385 numbers" in kernels.unsupported(name, long, long)
        assert kernels.unsupported(name, long[:, :-1], long[:, :-1]) is None
    step = kernels.unsupported("cca_step", wide, None, None, (torch.empty(512, 512, 2), None))
    assert step == "head_dim 512 is above 256"
    for architecture, reason in {"gfx1100": "rows of 1024 bytes are more than", "sm_90": "None"}.items():
        monkeypatch.setattr(kernels, "architecture", lambda: architecture)
        assert reason in str(unsupported_route(wide[:, :256], torch.empty(256, 256)))
    monkeypatch.setattr(zaya, "triton_kernels", None)
    zaya.dispatch(x, choice, 1)
    assert "Triton is not installed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="auto, triton, eager, not cuda"):
        Zaya(TINY, "cuda")


def test_experts_are_left_to_torch_where_that_is_faster(monkeypatch):
    asked = []
    monkeypatch.setattr(zaya, "takes_grouped_mm", lambda x, weight: True)
    monkeypatch.setattr(zaya, "on_hopper", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(zaya, "on_kernels", lambda x: True)
    for choice, faster in (("auto", True), ("triton", False)):
        zaya.use_kernels(choice)
        assert zaya.torch_is_faster(torch.zeros(2, 8), torch.zeros(1, 16, 8)) == faster
    for name in ("experts", "combine"):
        monkeypatch.setattr(kernels, name, lambda *args, name=name: asked.append(name))
    monkeypatch.setattr(zaya, "torch_is_faster", lambda x, gate_up: True)
    monkeypatch.setattr(zaya, "grouped_linear", lambda x, weight, offsets: x)
    zaya.experts(torch.zeros(2, 8), torch.zeros(1, 16, 8), torch.zeros(1, 8, 8), torch.tensor([2]))
    zaya.combine(torch.zeros(2, 8), torch.tensor([0, 1]), torch.zeros(2))
    assert asked == ["combine"]


def test_prepared_filters_follow_the_weights():
    """In inference mode the one convolution is kept, until one of its weights changes. .data does not tell, but then
    there was a forward pass with gradients."""
    depthwise, grouped = arguments("tails", "cca", torch.float32)[3:5]
    with torch.inference_mode():
        first = kernels.prepared(depthwise, grouped, torch.float32)
        assert kernels.prepared(depthwise, grouped, torch.float32)[0] is first[0]
        assert kernels.prepared(depthwise, grouped, torch.float16)[0].dtype == torch.float16
    with torch.no_grad():
        grouped[0].mul_(2)
    with torch.inference_mode():
        second = kernels.prepared(depthwise, grouped, torch.float32)
    torch.testing.assert_close(second[0], 2 * first[0])
    with torch.no_grad():
        grouped[1].add_(1)
    with torch.inference_mode():
        torch.testing.assert_close(kernels.prepared(depthwise, grouped, torch.float32)[1], second[1] + 1)
    grouped[0].data = grouped[0].detach() / 2  # as .to(device) does
    with torch.inference_mode():
        torch.testing.assert_close(kernels.prepared(depthwise, grouped, torch.float32)[0], first[0])
    kernels.prepared(depthwise, grouped, torch.float32)
    grouped[0].data.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(kernels.prepared(depthwise, grouped, torch.float32)[0], 2 * first[0])


def test_interpreted_whatever_gpu_there_is(monkeypatch):
    """Beside a GPU, too, what is interpreted is not configured for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert kernels.architecture.__wrapped__() == "none" and kernels.pdl() == {"PDL": False}


def test_every_marked_function_has_its_twin():
    marked = re.findall(r"^@has_kernel\ndef (\w+)\(([^)]*)\)", (ROOT / "zaya.py").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in marked) == sorted(FUNCTIONS)
    assert all(callable(getattr(kernels, name)) for name, _ in marked)


@pytest.mark.parametrize("architecture, dtype, head_dim", COMPILED)
def test_compiles_without_that_gpu(architecture, dtype, head_dim):
    """As configured, at ZAYA1-8B's shapes, in bf16 none spills; and with the largest heads and numbers, too, none needs
    more LDS than there is."""
    words = f"--compile_for {architecture} --dtype {dtype} --head_dim {head_dim}".split()
    done = command("kernels.py", *words, env=NOT_INTERPRETED, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(\w+_kernel)(?: \(\w+\))* +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+)$", done.stdout, re.M
    )
    table = [(name, *(int(n.replace(",", "")) for n in numbers)) for name, *numbers in rows]
    tree = ast.parse((ROOT / "kernels.py").read_text())
    uses = {  # what a jitted function calls, with what that calls
        f.name: {node.func.id for node in ast.walk(f) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for f in tree.body if isinstance(f, ast.FunctionDef) and f.decorator_list
    }  # fmt: skip
    for _ in range(3):
        uses = {name: called.union(*(uses.get(c, set()) for c in called)) for name, called in uses.items()}
    assert {name for name, *_ in table} == {name for name in uses if name.endswith("_kernel")}
    for name, registers, spilled, shared, matrix_instructions, waves in table:
        assert shared <= {"gfx942": 65536, "gfx950": 163840, "sm_90": 232448}[architecture], name
        if dtype == "bfloat16":
            assert spilled == 0 and waves >= 1 and registers > 0, name
            assert (matrix_instructions > 0) == ("dot" in uses[name]), name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    of_this_version = f"triton=={triton.__version__} " in readme  # its table is of gfx942 in bf16
    if of_this_version and (architecture, dtype) == ("gfx942", "bfloat16"):
        shown = re.findall(r"^\| (\w+_kernel) \| ([\d,]+) \| ([\d,]+) \| (\d+) \| (\d+) \|$", readme, re.MULTILINE)
        printed = {(name, registers, shared, *rest) for name, registers, _, shared, *rest in rows}
        assert shown and set(shown) <= printed


@pytest.mark.parametrize("waits", [True, False])
def test_a_branch_that_writes_before_it_waits_is_found(waits):
    """In PTX, with two branches, of which the first waits."""
    wait, write = "\tgriddepcontrol.wait;\n", "\tst.global.b32 [%rd1], %r1;\n"
    first = f"\t@%p1 bra $L__BB0_2;\n$L__BB0_1:\n{wait}{write}\tbra.uni $L__BB0_3;\n"
    second = f"$L__BB0_2:\n{wait if waits else ''}{write}$L__BB0_3:\n\tret;\n"
    assert bench_kernels.waits_before_it_writes(first + second) == waits


@triton.jit
def touch_kernel(x, read, write):
    tl.store(x + tl.program_id(0) * write, tl.load(x + read))


@pytest.mark.parametrize("read, write, error", [
    (3, 1, None), (4, 1, "outside all tensors"), (3, 4, "outside all tensors"),
    (3, 0, "programs race"), (0, 1, "programs race"),
])  # fmt: skip
def test_errors_of_memory_are_found(read, write, error):
    """Of two programs, each of which writes to a tensor of four numbers."""
    assert torch.empty(2).isnan().all()
    with pytest.raises(Exception, match=error) if error else nullcontext():
        kernels.launch(touch_kernel, (2,), torch.zeros(4), read, write)


def test_a_wrong_kernel_is_found(monkeypatch):
    right = kernels.merge
    monkeypatch.setattr(bench_kernels, "cases", lambda *shape: {"merge": cases(*shape)["merge"]})
    bench_kernels.report()
    monkeypatch.setattr(kernels, "merge", lambda stream, *rest: right(1.01 * stream, *rest))
    with pytest.raises(ValueError, match="further from fp32 than a kernel may be: merge, merge backward"):
        bench_kernels.report()


def test_one_line_without_a_gpu():
    done = command("kernels.py", env=NOT_INTERPRETED | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "TRITON_INTERPRET=1" in done.stderr


def test_presets_have_kernels():
    """No preset has a shape that would fall back."""
    for config in PRESETS.values():
        assert config.head_dim <= 256 and config.router_hidden_size <= 512 and config.hidden_size <= 16384
