"""What zaya.py promises by itself: router, gradients, loss, generation, configurations, files."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, rewrite
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import zaya
from zaya import PRESETS, Zaya, ZayaConfig, config_from_json, config_to_json, load_safetensors, save_safetensors

SMALL = ZayaConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    moe_intermediate_size=24, num_experts=4, router_hidden_size=16, max_position_embeddings=64,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def random_model(seed=0, **changes):
    """A small model whose tokens differ in their expert; without a tie its greedy text is varied, too."""
    torch.manual_seed(seed)
    model = Zaya(replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.embed_tokens.weight *= 4
        for router in model.routers:
            router.balancing_biases[:-1].normal_(std=0.1)
    return model


def random_tokens(*shape, vocab_size=SMALL.vocab_size, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.T


# ---------------------------------------------------------------------------------------------------------------------
# Router and experts


@pytest.fixture
def moe():
    """One layer's mixture of experts, with weights that spread the tokens."""
    layer = random_model().layers[1].mlp
    with torch.no_grad():
        for part in ("fc1", "fc2", "out_proj"):
            layer.gate.router_mlp[part].weight *= 2
    return layer


@pytest.fixture
def x():
    return torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1))


STATE = torch.randn(60, 16, generator=torch.Generator().manual_seed(2))  # the layer before's


def probabilities(router, x):
    """s of every class by the formula of the report, (N, E + 1)."""
    mlp, state = router.router_mlp, router.down_proj(x.flatten(0, 1)) + STATE * router.router_states_scale
    thought = F.rms_norm(state, state.shape[-1:], mlp["norm"].weight, mlp["norm"].eps)
    return mlp["out_proj"](F.gelu(mlp["fc2"](F.gelu(mlp["fc1"](thought))))).softmax(dim=-1)


def routed(router, x):
    """(probability, choice, tokens a class) of x alone."""
    router.counts.zero_()
    probability, choice, _ = router(x.flatten(0, 1), STATE)
    return probability, choice, router.counts.clone()


def test_output_is_the_chosen_experts_times_its_probability(moe, x):
    s = probabilities(moe.gate, x)
    choice = (s + moe.gate.balancing_biases).argmax(dim=-1)
    assert len(choice.unique()) >= 3
    experts = moe.experts
    rows = zip(x.flatten(0, 1), choice, s)
    expected = torch.stack(
        [s_n[e] * swiglu(x_n, experts.gate_up_proj[e], experts.down_proj[e]) for x_n, e, s_n in rows]
    )
    torch.testing.assert_close(moe(x, STATE)[0].flatten(0, 1), expected)


def test_equal_experts_are_one_dense_swiglu(moe, x):
    with torch.no_grad():
        for weight in moe.experts.parameters():
            weight[:] = weight[0].clone()
    probability = moe.gate(x.flatten(0, 1), STATE)[0].view(3, 20, 1)
    dense = swiglu(x, moe.experts.gate_up_proj[0], moe.experts.down_proj[0])
    torch.testing.assert_close(moe(x, STATE)[0], dense * probability)


def test_experts_have_no_order(moe, x):
    """Permuting them, with the router's rows and biases, changes nothing but their numbers."""
    before, (_, choice, counts) = moe(x, STATE)[0], routed(moe.gate, x)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in (*moe.experts.parameters(), moe.gate.router_mlp["out_proj"].weight, moe.gate.balancing_biases):
            tensor[:4] = tensor[order]
    _, new_choice, new_counts = routed(moe.gate, x)
    assert order[new_choice].equal(choice) and new_counts[:4].equal(counts[order])
    torch.testing.assert_close(moe(x, STATE)[0], before)


def test_balancing_bias_steers_the_choice_and_nothing_else(moe, x):
    s = probabilities(moe.gate, x)
    for favourite in range(4):
        moe.gate.balancing_biases[:4] = 10 * F.one_hot(torch.tensor(favourite), 4)
        probability, choice, counts = routed(moe.gate, x)
        assert (choice == favourite).all() and counts[favourite] == 60
        torch.testing.assert_close(probability, s[:, favourite])  # neither biased nor renormalised


def test_balancing_bias_gets_no_gradient(moe, x):
    assert "balancing_biases" not in dict(moe.gate.named_parameters())
    moe.gate.balancing_biases.requires_grad_()
    moe(x, STATE)[0].sum().backward()
    assert moe.gate.balancing_biases.grad is None
    assert moe.gate.router_mlp["out_proj"].weight.grad.norm() > 0


def test_skipped_tokens_add_nothing_and_learn_nothing(moe, x):
    """Nor do the experts learn from them: their gradients are those of the other tokens alone."""
    moe.gate.balancing_biases[-1] = probabilities(moe.gate, x).max(dim=-1).values.median().item() / 2
    x.requires_grad_()
    out, _ = moe(x, STATE)
    skipped = moe.gate(x.flatten(0, 1), STATE)[1].view(3, 20) == 4
    assert 5 < skipped.sum() < 55
    assert (out[skipped] == 0).all() and (out[~skipped] != 0).any(dim=-1).all()
    out.square().sum().backward()
    assert (x.grad[skipped] == 0).all() and (x.grad[~skipped] != 0).any(dim=-1).all()
    gradients = [weight.grad.clone() for weight in moe.experts.parameters()]
    moe.zero_grad()
    moe(x[~skipped][None], STATE[~skipped.flatten()])[0].square().sum().backward()
    for weight, gradient in zip(moe.experts.parameters(), gradients):
        torch.testing.assert_close(weight.grad, gradient)


def test_all_skipped(moe, x):
    moe.gate.balancing_biases[-1] = 10.0
    out, _ = moe(x, STATE)
    out.sum().backward()
    assert (out == 0).all()
    assert all((parameter.grad == 0).all() for parameter in moe.parameters() if parameter.grad is not None)


def test_counts_add_up_to_the_tokens(moe, x):
    _, choice, counts = routed(moe.gate, x)
    assert counts.sum() == 60 and counts.equal(choice.bincount(minlength=5))
    moe.gate(x.flatten(0, 1), STATE)
    assert moe.gate.counts.equal(2 * counts)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients written by hand, against autograd's


def test_gradient_of_experts():
    torch.manual_seed(0)
    choice = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 3), 7, (2, 4, 3), (2, 3, 2))]
    assert torch.autograd.gradcheck(lambda x, p, *weights: zaya.experts_on_cpu(x, p, choice, *weights), inputs)


@pytest.mark.parametrize("tied", [True, False])
def test_no_gradient_of_a_gradient(tied):
    """What a penalty on gradients asks for is refused, not left out."""
    model, tokens = random_model(tie_word_embeddings=tied), random_tokens(2, 5)
    losses = model(tokens, tokens)[1], F.cross_entropy(model(tokens)[0].flatten(0, 1), tokens.flatten())
    for loss in losses:
        with pytest.raises(RuntimeError, match="no gradient of this model's gradients"):
            torch.autograd.grad(loss, [model.embed_tokens.weight], create_graph=True)


def assert_same_gradients(function, formula, *inputs):
    """Values and gradients of both, in float32, for a random gradient of the output."""
    inputs = [x.requires_grad_() for x in inputs]
    out, expected = function(*inputs), formula(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mkl_is_slow", [False, True])
@pytest.mark.parametrize("rows", [[7, 0, 20, 1], [70, 0, 201, 17], [281], [0, 0, 28], [0, 0]])
def test_experts_in_float32(rows, mkl_is_slow, monkeypatch):
    """By either library, with experts that have no token: the three steps that a GPU takes."""
    monkeypatch.setattr(zaya, "mkl_is_slow", lambda: mkl_is_slow)
    monkeypatch.setattr(zaya, "ONEDNN", torch.backends.mkldnn.is_available())
    torch.manual_seed(0)
    N, E = sum(rows), len(rows)
    choice = torch.repeat_interleave(torch.arange(E), torch.tensor(rows))[torch.randperm(N)]

    def three_steps(x, p, gate_up, down):
        x, place, offsets = zaya.dispatch(x, choice, E)
        return zaya.combine(zaya.experts(x, gate_up, down, offsets), place, p)

    inputs = torch.randn(N, 9), torch.rand(N), torch.randn(E, 10, 9), torch.randn(E, 9, 5)
    assert_same_gradients(lambda x, p, *w: zaya.experts_on_cpu(x, p, choice, *w), three_steps, *inputs)
    few = zaya.experts_of_few(inputs[0], inputs[1], choice, *inputs[2:])
    torch.testing.assert_close(few, three_steps(*inputs))


@pytest.mark.parametrize("intel, pieces", [(True, 1), (False, 16)])
def test_a_row_times_a_matrix_by_the_library_that_this_cpu_likes(intel, pieces, monkeypatch):
    monkeypatch.setattr(zaya, "INTEL", intel)
    x, weight = torch.randn(1, 256), torch.randn(512, 256)
    prepared = zaya.PreparedProduct(weight)
    assert prepared.pieces == pieces
    torch.testing.assert_close(prepared(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("onednn", [True, False])
def test_rows_of_experts_come_in_few_sizes(onednn, monkeypatch):
    """For oneDNN, however the tokens fall; and each has a place of its own among those of its expert."""
    monkeypatch.setattr(zaya, "ONEDNN", onednn)
    sizes = set()
    for seed in range(20):
        choice = torch.randint(8, (512,), generator=torch.Generator().manual_seed(seed))
        place, rows = zaya.places(choice, 8)
        ends = torch.tensor(rows).cumsum(dim=0)
        assert len(place.unique()) == 512 and torch.bucketize(place, ends, right=True).equal(choice)
        sizes |= set(rows)
    assert len(sizes) < 5 if onednn else sum(rows) == 512


def test_products_and_norm_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 16), torch.randn(16)
    assert_same_gradients(
        lambda x, w: zaya.Normalize.apply(x, w, 1e-5), lambda x, w: F.rms_norm(x, (16,), w, 1e-5), x, weight
    )
    assert_same_gradients(zaya.LinearByOneDNN.apply, F.linear, torch.randn(7, 16), torch.randn(9, 16))


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolutions_are_conv1d(taps):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 10, 24), torch.randn(24)
    for groups, weight in ((24, torch.randn(24, 1, taps)), (3, torch.randn(24, 8, taps))):
        ours = zaya.depthwise_conv if groups == 24 else lambda *args: zaya.grouped_conv(*args, H=3)
        assert_same_gradients(ours, lambda x, w, b: F.conv1d(x.mT, w, b, groups=groups).mT, x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, S", [(1, 1), (6, 6), (1, 6), (3, 6)])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_attention_is_its_formula(T, S, window, dtype):
    """2 query heads for each of 3 key heads; the queries are the last T of S positions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 8).to(dtype) for length, heads in ((T, 6), (S, 3), (S, 3)))

    def formula(q, k, v):
        k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 8**0.5
        past = torch.arange(S - T, S)[:, None] - torch.arange(S)  # (T, S): how long ago
        scores = scores.masked_fill((past < 0) | (past >= (window or S)), float("-inf"))
        return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v).flatten(2)

    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        zaya.attend(q, k, v, window).float(), formula(q.float(), k.float(), v.float()), **tolerance
    )


@torch.no_grad()
def test_scores_of_bf16_are_fp32_when_text_is_written():
    """At scores of 100, where bf16 knows whole numbers only, no more is lost than one rounding of what goes in."""
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 40, heads, 64) for heads, scale in ((4, 4), (1, 4), (1, 1)))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    exact = zaya.attend(q.float(), k.float(), v.float())
    assert (zaya.attend(q, k, v) - exact).norm() < 0.003 * exact.norm()


@pytest.mark.parametrize("twin", [{}, {"mlp": "dense"}, {"attention": "gqa"}, {"tie_word_embeddings": False}])
def test_every_parameter_learns_from_the_first_step(twin):
    """From our own initialisation, no exception; and with these 512 tokens every expert, too."""
    torch.manual_seed(0)
    model = Zaya(replace(SMALL, **twin))
    tokens = random_tokens(8, 65)
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.norm() > 0, name
        if ".experts." in name:
            assert (parameter.grad.flatten(1).norm(dim=1) > 0).all(), name


def test_fresh_weights_have_their_spread():
    model = Zaya(replace(SMALL, hidden_size=128, router_hidden_size=64))
    router, experts = model.layers[1].mlp.gate, model.layers[1].mlp.experts
    spread = {model.embed_tokens.weight: 0.02, experts.gate_up_proj: 0.02, experts.down_proj: 0.02}
    spread |= {router.down_proj.weight: 128**-0.5, router.router_mlp["fc1"].weight: 64**-0.5}
    for weight, std in spread.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert not router.router_mlp["fc1"].bias.any() and router.balancing_biases.tolist() == [0, 0, 0, 0, -1]


# ---------------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("rows, multiple", [(1, 1), (70, 1), (60, 1), (1000, 1), (60, 64)])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_is_cross_entropy(rows, multiple, tied, monkeypatch):
    """In chunks as small as can be, in equal and unequal ones, at once, with the vocabulary filled up: value, and the
    gradient of every parameter."""
    monkeypatch.setattr(zaya, "VOCABULARY_MULTIPLE", {False: multiple})
    monkeypatch.setattr(zaya, "LOGITS_AT_ONCE", {False: rows * SMALL.vocab_size})
    monkeypatch.setattr(zaya, "FEWEST_ROWS", 1)
    model, tokens = random_model(tie_word_embeddings=tied), random_tokens(10, 22)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    parameters = list(model.parameters())
    loss = model(inputs, targets)[1]
    expected = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    pairs = zip(torch.autograd.grad(3 * loss, parameters), torch.autograd.grad(3 * expected, parameters))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs, targets)[1], expected)


@pytest.mark.parametrize("of", [lambda y: y[:, 1:], lambda y: y[0], lambda y: y.t(), lambda y: y[..., None]])
def test_a_target_for_each_token(of):
    """Fewer would be taken for the first tokens' own, whichever text they are of."""
    tokens = random_tokens(2, 5)
    with pytest.raises(ValueError, match=r"targets .* are not one for each of tokens \(2, 5\)"):
        random_model()(tokens, of(tokens))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loss_holds_no_table_of_logits():
    """At Gemma's vocabulary the logits of these 1,024 tokens, their softmax and its gradient would take 3.2 GB. (Not by
    getrusage: its ru_maxrss begins at what pytest itself has taken.)"""
    script = """if True:
        import torch, zaya
        most = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        hidden, weight = torch.randn(1024, 16, requires_grad=True), torch.zeros(262272, 16, requires_grad=True)
        before = most()
        zaya.LinearCrossEntropy.apply(hidden, weight, torch.arange(1024), True).backward()
        print(most() - before)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_zaya1_8b_has_the_official_size():
    with torch.device("meta"):
        assert Zaya(PRESETS["zaya1-8b"]).parameter_counts() == (8_840_488_784, 753_608_528)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_keep_the_official_proportions(name):
    c, D = PRESETS[name], PRESETS[name].hidden_size
    assert (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim) == (D // 2, D // 8)
    assert (c.moe_intermediate_size, c.router_hidden_size, c.num_experts) == (D, D // 8, 16)
    assert (c.cca_time0, c.cca_time1, c.partial_rotary_factor, c.tie_word_embeddings) == (2, 2, 0.5, True)
    assert (c.attention, c.mlp, set(c.layer_types)) == ("cca", "moe", {"hybrid"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["to", "cast"])
def test_any_dtype_learns(how, dtype):
    """Also norms that Module.to took along."""
    model, tokens = random_model(), random_tokens(2, 9)
    (expected,) = torch.autograd.grad(model(tokens, tokens)[1], [model.norm.weight])
    getattr(model, how)(dtype)
    model(tokens, tokens)[1].backward()
    assert (model.norm.weight.grad - expected).norm() < 0.1 * expected.norm()


def test_bf16_spares_what_is_small_and_sensitive():
    """Norms, scales, temperatures and balancing biases stay fp32; all that takes part in a product is bf16."""
    model = random_model().cast(torch.bfloat16)
    fp32 = (
        "norm.weight",
        "_scale",
        "_hidden_states_bias",
        "residual_bias",
        ".hidden_states_bias",
        "temp",
        "balancing_biases",
    )
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(fp32) else torch.bfloat16), name
    logits, _ = model(random_tokens(2, 9))
    assert logits.dtype == torch.float32
    model(random_tokens(2, 9), random_tokens(2, 9, seed=1))[1].backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def argmax_loop(model, tokens, new):
    """Greedy decoding without a cache. Past the context it goes on from the text's last half context."""
    context = model.config.max_position_embeddings
    begin = max(0, tokens.shape[1] - context)
    for _ in range(new):
        if tokens.shape[1] - begin > context:
            begin = tokens.shape[1] - max(1, context // 2)
        tokens = torch.cat([tokens, model(tokens[:, begin:])[0][:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.parametrize(
    "prompt, new, context", [(5, 30, 64), (5, 11, 16), (5, 12, 16), (5, 50, 16), (40, 30, 16), (3, 5, 1)]
)
def test_greedy_is_an_argmax_loop(prompt, new, context):
    """Also if the prompt is longer than the context (40 of 16 tokens) or the text runs past it, once or often."""
    model, tokens = random_model(max_position_embeddings=context), random_tokens(3, prompt)
    text = model.generate(tokens, new, temperature=0)
    assert text.equal(argmax_loop(model, tokens, new))
    assert len(text[:, prompt:].unique()) > 2


@pytest.mark.parametrize(
    "flags", [{"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-50}, {"temperature": 1e-5}, {"top_k": 5, "top_p": 1e-6}]
)
def test_narrow_sampling_is_greedy(flags):
    model, tokens = random_model(), random_tokens(3, 5)
    assert model.generate(tokens, 20, **flags).equal(model.generate(tokens, 20, temperature=0))


@pytest.mark.parametrize(
    "flags",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0), dict(top_k=-1), dict(top_p=-0.1),
     dict(top_p=1.1), dict(top_p=float("nan"))],
    ids=str,
)  # fmt: skip
def test_sampling_that_means_nothing_is_refused(flags):
    with pytest.raises(ValueError, match=f"{next(iter(flags))} must be"):
        random_model().generate(random_tokens(1, 5), 3, **flags)


def test_end_of_text_stops_a_row_and_fills_it():
    model, tokens = random_model(), random_tokens(3, 5)
    free = model.generate(tokens, 20, temperature=0)
    eos = free[0, 9].item()
    text = model.generate(tokens, 20, temperature=0, eos_token_id=eos)
    lengths = []
    for row, free_row in zip(text, free):
        ends = (free_row[5:] == eos).nonzero().flatten() + 5
        lengths.append(int(ends[0]) + 1 if len(ends) else 25)
        assert row[: lengths[-1]].equal(free_row[: lengths[-1]]) and (row[lengths[-1] :] == eos).all()
    assert text.shape[1] == max(lengths) and min(lengths) < max(lengths)


def test_any_of_several_ends_ends_a_text():
    model, tokens = random_model(tie_word_embeddings=False), random_tokens(2, 5)
    free = model.generate(tokens, 20, temperature=0)[:, 5:].tolist()
    ends = [free[0][1], free[1][5]]
    at = [min(row.index(end) for end in ends if end in row) for row in free]
    texts = model.generate(tokens, 20, temperature=0, eos_token_id=ends)[:, 5:].tolist()
    assert at[0] < at[1] and free[1][at[1]] == ends[1]
    assert texts == [row[: i + 1] + [ends[0]] * (max(at) - i) for row, i in zip(free, at)]


def test_what_comes_after_the_last_end_is_cut(monkeypatch):
    """On a GPU generation goes on for some steps when all texts have ended."""
    columns = [[5, 6], [9, 6], [8, 6], [8, 9], [8, 8], [8, 8]]
    monkeypatch.setattr(Zaya, "next_tokens", lambda self, *rest: (torch.tensor(column) for column in columns))
    text = random_model().generate(random_tokens(2, 3), 20, eos_token_id=[8, 9])
    assert text[:, 3:].tolist() == [[5, 9, 8, 8], [6, 6, 6, 9]]


@pytest.mark.parametrize("router", ["zaya", "no_eda"])
def test_a_prompt_that_fills_the_context(router):
    """The first new token comes from a full cache; the second from the second half, read again. By Decoder, and, as
    what is no ZAYA1, without."""
    model, tokens = random_model(max_position_embeddings=8, router=router), random_tokens(2, 8)
    text = model.generate(tokens, 3, temperature=0)
    assert text[:, 8].equal(model(tokens)[0][:, -1].argmax(dim=-1))
    assert text[:, 9].equal(model(text[:, 5:9])[0][:, -1].argmax(dim=-1))


def test_what_decodes_is_made_when_it_is_needed(monkeypatch):
    """Not before the first token, and not for a text of one token."""
    model, tokens, made = random_model(), random_tokens(1, 5), []
    original = Zaya.decoder
    monkeypatch.setattr(Zaya, "decoder", lambda *args: made.append(1) or original(*args))
    stream = model.next_tokens(tokens, 3)
    next(stream)
    assert not made
    next(stream)
    assert made == [1]
    model.generate(tokens, 1)
    assert made == [1]


def test_no_new_tokens():
    tokens = random_tokens(2, 5)
    assert random_model().generate(tokens, 0).equal(tokens)


@pytest.mark.parametrize(
    "flags, kept",
    [
        (dict(temperature=1.0, top_k=None, top_p=None), 6),
        (dict(temperature=0.5, top_k=None, top_p=None), 6),
        (dict(temperature=1.0, top_k=3, top_p=None), 3),
        (dict(temperature=1.0, top_k=99, top_p=None), 6),
        (dict(temperature=1.0, top_k=None, top_p=0.7), 2),  # 0.5 + 0.25 is the first sum to reach 0.7
        (dict(temperature=1.0, top_k=2, top_p=0.99), 2),
    ],
)
def test_sampled_frequencies_follow_the_softmax(flags, kept):
    """Chi-square of 20,000 draws, at odds of one in a million; of the `kept` likeliest tokens alone."""
    torch.manual_seed(0)
    share = torch.tensor([0.05, 0.5, 0.1, 0.25, 0.02, 0.08])
    drawn = zaya.sample(share.log().expand(20000, 6), **flags).bincount(minlength=6)
    expected = share ** (1 / flags["temperature"])
    expected = expected.masked_fill(expected < expected.topk(kept).values[-1], 0)
    expected *= 20000 / expected.sum()
    assert (drawn[expected == 0] == 0).all()
    assert ((drawn - expected) ** 2 / expected)[expected > 0].sum() < 36


def test_full_cache_says_so():
    model = random_model()
    cache = model.new_cache(2, 8)
    model(random_tokens(2, 6), cache=cache)
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8"):
        model(random_tokens(2, 3), cache=cache)


@pytest.mark.parametrize("wrong, error", [((1, 1), ValueError), ((3, 2), ValueError), ((2, 1), IndexError)])
def test_a_cache_outlives_tokens_that_it_cannot_take(wrong, error):
    """Other than two texts' or, of two, one that is no id."""
    model, tokens = random_model(), random_tokens(2, 8)
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        with pytest.raises(error):
            model(random_tokens(*wrong) + (SMALL.vocab_size if error is IndexError else 0), cache=cache)
        torch.testing.assert_close(model(tokens[:, 5:], cache=cache)[0], model(tokens)[0][:, 5:], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Twins and configurations

TWINS = {
    "dense": dict(mlp="dense"),
    "gqa": dict(attention="gqa"),
    "mha": dict(attention="mha"),
    "conventional": dict(attention="mha", mlp="dense"),
    "sliding gqa": dict(attention="gqa", layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=4),
    "no depthwise convolution": dict(cca_without=["depthwise"]),
    "no grouped convolution": dict(cca_without=["grouped"]),
    "no value shift": dict(cca_without=["value_shift"]),
    "no q-k mean": dict(cca_without=["qk_mean"]),
    "bare cca": dict(cca_without=list(zaya.CCA_PARTS)),
    "no depth averaging": dict(router="no_eda"),
    "linear router": dict(router="linear"),
    "plain sums": dict(residual_scaling=False),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_train_decode_and_come_back(name, tmp_path):
    """Forward, backward, a cache equal to the full forward, and a config.json that is not taken for a ZAYA1."""
    model, tokens = random_model(**TWINS[name]), random_tokens(2, 13)
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    assert all(p.grad.norm() > 0 for p in model.parameters())
    full, _ = model(tokens)
    for lengths in [[5, 8], [1, 3, 2, 7], [1] * 13]:
        cache = model.new_cache(2, 13)
        pieces = [model(piece, cache=cache)[0] for piece in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert zaya.read_json(tmp_path / "config.json")["model_type"] == "nanozaya"
    again = Zaya.from_pretrained(tmp_path)
    assert again.config == model.config and again(tokens)[0].equal(full)


@pytest.mark.parametrize(
    "changes, gone",
    [
        (dict(cca_without=["depthwise"]), "conv_qk_depthwise"),
        (dict(cca_without=["grouped"]), "conv_qk_grouped"),
        (dict(router="no_eda"), "router_states_scale"),
        (dict(router="linear"), "router_mlp|gate.down_proj|router_states_scale"),
        (dict(residual_scaling=False), "residual_scale|input_hidden_states"),
        (dict(mlp="dense"), "gate\\.|experts"),
    ],
    ids=str,
)
def test_what_is_switched_off_leaves_no_parameters(changes, gone):
    whole, less = Zaya(SMALL), Zaya(replace(SMALL, **changes))
    assert any(re.search(gone, name) for name, _ in whole.named_parameters())
    assert not any(re.search(gone, name) for name, _ in less.named_parameters())


@pytest.mark.parametrize("part", zaya.CCA_PARTS)
def test_each_part_of_cca_counts(part):
    """Left out, the logits change; q-k mean and value shift have no weights, so nothing else can tell."""
    whole = random_model()
    less = random_model(cca_without=[part])
    less.load_state_dict({n: t for n, t in whole.state_dict().items() if n in less.state_dict()})
    tokens = random_tokens(2, 13)
    assert not torch.allclose(whole(tokens)[0], less(tokens)[0], atol=1e-3)


def test_cca_without_shift_does_not_look_back_for_its_values():
    """With neither convolution nor shift, the attention of a first token is its own value alone."""
    config = replace(SMALL, cca_without=["depthwise", "grouped", "value_shift"])
    torch.manual_seed(0)
    part, x = zaya.PartialCCA(config), torch.randn(1, 5, config.hidden_size)
    cos, sin = zaya.rotary_table(torch.arange(5), config.rotary_dim, 1e4)
    _, _, v = part(x, torch.ones(config.num_key_value_heads), cos, sin, None)
    own = torch.cat([part.v_proj_current(x), part.v_proj_delayed(x)], dim=-1)
    torch.testing.assert_close(v.flatten(2), own)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_a_cache_keeps_no_gradient_back(kernels):
    """A prompt read without a gradient, and then a token with one: the projections get theirs."""
    model, tokens = random_model(num_hidden_layers=1), random_tokens(1, 5)
    cache = model.new_cache(1, 5)
    with torch.no_grad():
        model(tokens[:, :-1], cache=cache)
    model.kernels = kernels
    model(tokens[:, -1:], cache=cache)[0].sum().backward()
    for name, parameter in model.named_parameters():
        if "qkv_proj" in name:
            assert parameter.grad is not None, name


class NoQuestions(TorchDispatchMode):
    """Fails where Python asks the device for a number, for which it would have to wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        assert function is not torch.ops.aten.nonzero.default, "a step waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes, texts",
    [({}, 1), ({}, 2), (dict(mlp="dense"), 2), (dict(attention="gqa"), 1), (dict(cca_time0=1, cca_time1=1), 2)],
    ids=str,
)
def test_a_step_with_kernels_can_be_captured(changes, texts):
    """It never waits for the device, and its state stays in place: what a CUDA graph needs."""
    pytest.importorskip("triton")
    model, tokens = random_model(num_hidden_layers=2, **changes), random_tokens(texts, 5)
    with torch.no_grad():
        cache = model.new_cache(texts, 9)
        model.hidden_states(tokens, cache)
        model.kernels = "triton"  # from here on
        buffers = [cache.end, *(t for layer in cache.layers for t in (layer.k, layer.v, layer.recent))]
        places = [tensor.data_ptr() for tensor in buffers]
        step = model.decoder(cache, lambda hidden: zaya.sample(model.logits(hidden), 0.8, 5, 0.9))
        with NoQuestions():
            token = step(tokens[:, -1])
            step(token)
    assert [tensor.data_ptr() for tensor in buffers] == places
    assert cache.end.item() == cache.length == 7


class Calls(TorchDispatchMode):
    """Counts what would be launched on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or "empty" in function.name() or function.namespace == "prim")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("texts, calls_a_layer", [(1, 11), (2, 13)])
def test_a_layer_with_kernels_is_few_calls_a_token(texts, calls_a_layer, monkeypatch):
    """Projection, cca_step, attend_past (2), projection, merge, projection, route (3), experts_of_few (2), merge. For
    one text the merges are part of the projections that follow."""
    kernels, counts = pytest.importorskip("kernels"), []

    def launch(*args, launch=kernels.launch, **constants):
        calls.count += 1
        with _disable_current_modes():  # what the interpreter itself calls
            launch(*args, **constants)

    monkeypatch.setattr(kernels, "launch", launch)
    for layers in (1, 2):
        model = random_model(num_hidden_layers=layers).cast(torch.float16)
        with torch.inference_mode():
            cache = model.new_cache(texts, 9)
            token = model.hidden_states(random_tokens(texts, 5), cache)[:, -1].argmax(dim=-1)
            model.kernels = "triton"  # from here on
            step = model.decoder(cache, lambda hidden: hidden)
            with Calls() as calls:
                step(token)
        counts.append(calls.count)
    assert counts[1] - counts[0] == calls_a_layer


def test_a_captured_step_writes_the_same_text(monkeypatch):
    """With a graph that does what CUDA's does: what is captured is not run; replayed, it runs in the same buffers."""
    model, tokens = random_model(), random_tokens(2, 5)
    with torch.no_grad():
        cache = model.new_cache(2, 20)
        first = model.hidden_states(tokens, cache)[:, -1]
        calls = []

        def step(token):
            out = model.logits(model.hidden_states(token[:, None], cache)[:, -1]).argmax(dim=-1)
            calls.append((token, out))
            return out

        class Graph:
            def replay(self):
                token, out = calls[-1]  # the captured call's buffers
                out.copy_(step(token))
                calls.pop()
                cache.length -= 1  # a replay runs no Python

        @contextmanager
        def capturing(graph, stream):
            yield
            cache.end.sub_(1)

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext()}
        for name, fake in (fakes | {"CUDAGraph": Graph, "graph": capturing}).items():
            monkeypatch.setattr(torch.cuda, name, fake)
        after = zaya.captured(step, cache)
        token, text = model.logits(first).argmax(dim=-1), []
        for _ in range(12):
            text.append(token)
            token = after(token)
    assert cache.length == cache.end.item() == 5 + 12
    assert torch.stack(text, dim=1).equal(model.generate(tokens, 12, temperature=0)[:, 5:])


@pytest.mark.parametrize("graph", [True, False])
def test_a_step_is_captured_unless_asked_not_to(graph, monkeypatch):
    """As if the cache lay on a GPU."""
    monkeypatch.setattr(zaya, "on_kernels", lambda tensor: True)
    monkeypatch.setattr(zaya, "captured", lambda step, cache: "captured")
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    model = random_model().to(torch.bfloat16)
    cache = SimpleNamespace(end=SimpleNamespace(is_cuda=True), layers=model.new_cache(2, 8).layers)
    model.graph = graph
    assert (model.decoder(cache, pick=None) == "captured") == graph


def test_conventional_twin_has_a_key_head_for_every_query_head():
    c = replace(SMALL, attention="mha")
    assert c.num_attention_heads == c.num_key_value_heads == 4 and not Zaya(replace(c, mlp="dense")).routers


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), replace(SMALL, rope_theta=7.0, sliding_rope_theta=9.0, partial_rotary_factor=1.0)]
)
def test_config_comes_back_from_json(config):
    values = json.loads(json.dumps(config_to_json(config, "float32")))
    assert values["model_type"] == "zaya" and config_from_json(values) == config


BAD = [
    {"vocab_size": 0},
    {"hidden_size": -1},
    {"num_experts": 0},
    {"num_key_value_heads": 0},
    {"num_attention_heads": 3},
    {"head_dim": 6},
    {"head_dim": 0, "attention": "mha"},
    {"partial_rotary_factor": 0.0},
    {"partial_rotary_factor": 1.5},
    {"partial_rotary_factor": 0.4},
    {"rope_theta": 0.0},
    {"rms_norm_eps": -1e-5},
    {"initializer_range": 0.0},
    {"layer_types": ["hybrid_sliding"], "sliding_window": 4},
    {"layer_types": ["hybrid", "mamba", "hybrid"]},
    {"layer_types": ["hybrid_sliding"] * 3},
    {"layer_types": ["hybrid_sliding"] * 3, "sliding_window": 0},
    {"attention": "mla"},
    {"mlp": "relu"},
    {"cca_without": ["qk_mean"], "attention": "gqa"},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_impossible_configurations_say_so_in_one_line(bad):
    with pytest.raises(ValueError) as error:
        ZayaConfig(**asdict(SMALL) | bad)
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "foreign",
    [
        {"model_type": "llama"},
        {"eos_token_id": "1"},
        {"hidden_size": None},
        {"vocab_size": "many"},
        {"cca_time0": 2.5},
        {"num_experts_per_tok": 2},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_parameters": {"hybrid": {"rope_type": "yarn", "rope_theta": 1e4}}},
        {"rope_parameters": {"hybrid": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"rope_parameters": {"hybrid": {"rope_type": "longrope", "factor": 1.0, "rope_theta": 1e4}}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"bos_token_id": -1},
        {"eos_token_id": [True]},
        {"eos_token_id": [[1]]},
        {"rms_norm_eps": "1e-5"},
        {"tie_word_embeddings": "false"},
        {"hidden_size": True},
    ],
    ids=str,
)
def test_models_that_we_cannot_compute_are_refused(foreign):
    with pytest.raises(ValueError):
        config_from_json(config_to_json(SMALL, "float32") | foreign)


@pytest.mark.parametrize("name, value", zaya.FIXED.items())
def test_what_config_json_may_say_in_one_way_alone(name, value):
    known = config_to_json(SMALL, "float32")
    assert config_from_json(known | {name: value}) == config_from_json(known | {name: None}) == SMALL
    with pytest.raises(ValueError, match=name):
        config_from_json(known | {name: not value if isinstance(value, bool) else "another"})


def test_the_device_is_a_macs_gpu_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for gpu in False, True:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert zaya.choose_device("auto") == ("cuda" if gpu else "cpu")
    assert zaya.choose_device("mps") == "mps"


def test_what_a_gpu_draws_is_in_watts(monkeypatch):
    """AMD's library says watts, or as NVIDIA's milliwatts; 0 is no reading, and nor is an error."""
    for hip, draw, watts in ((None, 500_000, 500), ("7.0", 500, 500), ("7.2", 500_000, 500), (None, 0, None)):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "power_draw", lambda device, draw=draw: draw)
        assert zaya.watts("cuda:0") == watts and zaya.watts("cpu") is None
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 1 / 0)
    assert zaya.watts("cuda") is None


def test_free_memory_is_in_bytes(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:   7 kB\n")
    assert zaya.free_memory() == 7 * 1024
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert zaya.free_memory() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_safetensors_are_everyones(tmp_path):
    """The `safetensors` package reads our file and we read its, in every dtype and shape."""
    package = pytest.importorskip("safetensors.torch")
    dtypes = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"{dtype}": torch.randn(3, 5).mul(9).to(dtype) for dtype in dtypes}
    tensors |= {"nothing": torch.empty(0, 4), "a number": torch.tensor(1.5), "transposed": torch.randn(4, 3).T}
    save_safetensors(tmp_path / "ours", tensors)
    package.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", metadata={"note": "hello"}
    )
    for read in (
        package.load_file(tmp_path / "ours"),
        load_safetensors(tmp_path / "theirs"),
        load_safetensors(tmp_path / "ours"),
    ):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].equal(tensor), name


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a model of one layer, and the tensors in its file."""
    random_model(num_hidden_layers=1).save_pretrained(tmp_path)
    return tmp_path, {name: t.clone() for name, t in load_safetensors(tmp_path / "model.safetensors").items()}


def refused(path):
    """The one line with which from_pretrained refuses a directory."""
    with pytest.raises(ValueError) as error:
        Zaya.from_pretrained(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_may_be_saved_over_itself(tmp_path):
    """Its tensors are mapped: to begin to write there would be to lose them."""
    model, file = random_model(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    mapped = {name.removeprefix("model."): tensor for name, tensor in load_safetensors(file).items()}
    model.save_pretrained(tmp_path, mapped)
    for name, tensor in Zaya.from_pretrained(tmp_path).state_dict().items():
        assert tensor.equal(model.state_dict()[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("left", [0, 5, 8, 100, -4, -1])
def test_truncated_file(checkpoint, left):
    path, _ = checkpoint
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert "model.safetensors" in refused(path)


@pytest.mark.parametrize(
    "garbled",
    [{"rope_parameters": [1]}, {"layer_types": 5}, {"model_type": "zaya", "zaya_layers": [16]}],
    ids=str,
)
def test_a_garbled_config_is_named(checkpoint, garbled):
    path, _ = checkpoint
    if "model_type" in garbled:
        (path / "config.json").unlink()
    rewrite(path / "config.json", **garbled)
    assert "config.json" in refused(path)


def test_file_with_bytes_too_many(checkpoint):
    path, _ = checkpoint
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert "model.safetensors" in refused(path)


def test_damaged_header(checkpoint):
    """Whatever of a byte is flipped: the file or a tensor is named, or nothing that matters was hit."""
    path, tensors = checkpoint
    file = path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places, silent = range(0, header, 7), 0
    for at in places:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (0x01, 0x10, 0xFF)[at % 3]]) + whole[at + 1 :])
        try:
            model = Zaya.from_pretrained(path)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and ("model.safetensors" in message or "model." in message), (at, message)
        else:
            silent += 1
            assert all(t.equal(tensors[name]) for name, t in zaya.official_names(model.state_dict()).items()), at
    assert silent < len(places) / 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, name: tensors.pop(name),
        lambda tensors, name: tensors.update({name + "_new": tensors[name]}),
        lambda tensors, name: tensors.update({name: tensors[name][:-1]}),
        lambda tensors, name: tensors.update({name: tensors[name].mT}),
        lambda tensors, name: tensors[name][1, 1].fill_(float("nan")),
        lambda tensors, name: tensors[name][1, 1].fill_(float("-inf")),
    ],
    ids=["missing", "surplus", "a row short", "transposed", "NaN", "infinite"],
)
def test_wrong_tensor_is_named(checkpoint, damage):
    path, tensors = checkpoint
    name = "model.embed_tokens.weight"
    damage(tensors, name)
    save_safetensors(path / "model.safetensors", tensors)
    assert name in refused(path)


def test_rope_counts_where_transformers_reads_it(checkpoint):
    """In rope_parameters, not beside them; and of layer types that the model has."""
    path, _ = checkpoint
    before = zaya.read_config(path)
    ropes = config_to_json(before, "float32")["rope_parameters"]
    ropes["hybrid_sliding"]["partial_rotary_factor"] = 1.0
    rewrite(path / "config.json", rope_theta=3.0, partial_rotary_factor=0.25, rope_parameters=ropes)
    assert zaya.read_config(path) == before
    for rope in ropes.values():
        del rope["partial_rotary_factor"]
    rewrite(path / "config.json", rope_parameters=ropes)
    assert zaya.read_config(path).partial_rotary_factor == 1.0  # transformers' default there
    ropes["hybrid"]["partial_rotary_factor"] = 0.5
    rewrite(path / "config.json", rope_parameters=ropes)
    rewrite(path / "config.json", num_hidden_layers=2, layer_types=["hybrid_sliding", "hybrid"], sliding_window=4)
    with pytest.raises(ValueError, match="two partial_rotary_factors"):
        zaya.read_config(path)


def test_names_of_both_forms(checkpoint):
    """...as some programs write them: the native ones count, whole layers too."""
    path, _ = checkpoint
    before = zaya.read_config(path)
    rewrite(path / "config.json", moe_router_topk=1, zaya_mlp_expansion=before.router_hidden_size)
    assert zaya.read_config(path) == before


def test_the_last_word_on_the_end_of_a_text(checkpoint):
    """...has generation_config.json, as in transformers; a list of ends comes through."""
    path, _ = checkpoint
    rewrite(path / "config.json", eos_token_id=[3, 4])
    assert zaya.read_config(path).eos_token_id == [3, 4]
    rewrite(path / "generation_config.json", eos_token_id=None)
    assert zaya.read_config(path).eos_token_id == [3, 4]
    rewrite(path / "generation_config.json", eos_token_id=[5, 6, 7])
    Zaya.from_pretrained(path).save_pretrained(path / "again")
    assert zaya.read_config(path / "again").eos_token_id == [5, 6, 7]


def test_a_tied_head_may_be_stored(checkpoint):
    path, tensors = checkpoint
    save_safetensors(path / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert Zaya.from_pretrained(path).head.equal(tensors["model.embed_tokens.weight"])


def test_shards_by_their_index(checkpoint):
    """A missing one is named; once a whole file lies beside them, that counts."""
    path, tensors = checkpoint
    names, whole = sorted(tensors), path / "model.safetensors"
    whole.unlink()
    save_safetensors(path / "model-1.safetensors", {name: tensors[name] for name in names[::2]})
    rewrite(
        path / "model.safetensors.index.json",
        weight_map={n: f"model-{1 + i % 2}.safetensors" for i, n in enumerate(names)},
    )
    with pytest.raises(FileNotFoundError, match="model-2.safetensors"):
        Zaya.from_pretrained(path)
    save_safetensors(path / "model-2.safetensors", {name: tensors[name] for name in names[1::2]})
    model = Zaya.from_pretrained(path)
    assert model.embed_tokens.weight.equal(tensors["model.embed_tokens.weight"])
    torch.nn.init.constant_(model.norm.weight, 7)
    model.save_pretrained(path)
    assert all(a.equal(b) for a, b in zip(Zaya.from_pretrained(path).parameters(), model.parameters()))


def test_a_pointer_is_not_the_file(checkpoint):
    path, _ = checkpoint
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refused(path)


def test_missing_and_damaged_files_are_named(checkpoint):
    path, _ = checkpoint
    (path / "config.json").write_text("{")
    assert "config.json" in refused(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Zaya.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Zaya.from_pretrained(path / "nowhere")


def test_newest_checkpoint_of_a_run_is_opened(tmp_path):
    for step in (9, 100):
        random_model(seed=step).save_pretrained(tmp_path / f"step-{step}")
    assert zaya.find_checkpoint(tmp_path) == tmp_path / "step-100"
    assert Zaya.from_pretrained(tmp_path).norm.weight.equal(random_model(seed=100).norm.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding on a CPU


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"], sliding_window=5),
        dict(num_attention_heads=2, num_key_value_heads=1, partial_rotary_factor=1.0),
        dict(cca_time0=3, cca_time1=1, head_dim=12),
        dict(cca_time0=1, cca_time1=1, num_experts=1),
        dict(tie_word_embeddings=False, num_hidden_layers=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch, skipping", [(1, False), (3, True)])
def test_the_decoder_computes_what_the_model_does(changes, batch, skipping):
    model, tokens = random_model(**changes), random_tokens(batch, 20)
    for router in model.routers:
        router.balancing_biases[-1] = 0.1 if skipping else -1.0
    with torch.no_grad():
        plain, fast = model.new_cache(batch, 20), model.new_cache(batch, 20)
        for cache in (plain, fast):
            model.hidden_states(tokens[:, :3], cache)
        decoder = zaya.Decoder(model, fast)
        for position in range(3, 20):
            expected = model.hidden_states(tokens[:, position : position + 1], plain)[:, 0]
            torch.testing.assert_close(decoder.step(tokens[:, position]), expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(fast.layers, plain.layers):  # and fills the cache as the model would
            for name in ("k", "v"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


class Negated(zaya.MixtureOfExperts):
    def forward(self, x, router_state):
        out, router_state = super().forward(x, router_state)
        return -out, router_state


def change_class(model):
    model.layers[1].mlp.__class__ = Negated


def change_mlp(model):
    model.layers[1].mlp = zaya.DenseMLP(model.config)


def change_what_attention_returns(model):
    model.layers[1].self_attn.register_forward_hook(lambda module, args, out: -out)


def change_what_router_gets(model):
    model.layers[1].mlp.gate.register_forward_pre_hook(lambda module, args: (-args[0], args[1]))


def change_dtype(model):
    model.layers[1].mlp.experts.double()


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize(
    "change", [change_class, change_mlp, change_what_attention_returns, change_what_router_gets, change_dtype]
)
def test_a_changed_module_counts_when_text_is_written(change, texts):
    model, tokens = random_model(tie_word_embeddings=False), random_tokens(texts, 5)
    change(model)
    written = model.generate(tokens, 10, temperature=0)
    for length in range(5, 15):
        with torch.no_grad():
            assert model(written[:, :length])[0][:, -1].argmax(dim=-1).equal(written[:, length])


def test_a_models_own_hidden_states_count_when_text_is_written():
    class Late(Zaya):
        def hidden_states(self, tokens, cache=None):
            return super().hidden_states(tokens, cache).roll(1, dims=-1)

    model, tokens = random_model(tie_word_embeddings=False), random_tokens(1, 5)
    model.__class__ = Late
    written = model.generate(tokens, 10, temperature=0)
    with torch.no_grad():
        assert model(written)[0][:, 4:-1].argmax(dim=-1).equal(written[:, 5:])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of Zyphra's original code


def as_legacy(model):
    """A model's tensors under the legacy names, an expert's matrices each on its own, and such a config.json."""
    c, tensors = model.config, {}
    for name, tensor in zaya.official_names(model.state_dict()).items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if not match:
            name = name.replace("model.norm.", "model.final_norm.").replace(
                "model.input_h", "model.layers.0.res_scale.h"
            )
            tensors[name] = tensor
            continue
        layer, rest = int(match[1]), match[2]
        if "residual_scale." in rest and not rest.startswith("mlp."):
            merge, _, scale = rest.partition("_residual_scale.")
            half = 2 * layer + (1 if merge == "post_attention" else 2)
            before = f"model.layers.{half}." if half < 2 * c.num_hidden_layers else "model."
            tensors[f"{before}res_scale.{scale}"] = tensor
            continue
        half = 2 * layer + (rest.startswith(("mlp.", "post_attention_layernorm")))
        if ".experts." in rest:
            part = "linear_fc1" if "gate_up" in rest else "linear_fc2"
            for expert, matrix in enumerate(tensor):
                tensors[f"model.layers.{half}.zaya_block.experts.local_experts.{expert}.{part}.weight"] = matrix
            continue
        for new, old in {
            "input_layernorm": "input_norm", "post_attention_layernorm": "input_norm",
            "self_attn.qkv_proj.q_proj": "self_attn.qkv.linear_q",
            "self_attn.qkv_proj.k_proj": "self_attn.qkv.linear_k",
            "self_attn.qkv_proj.v_proj_current": "self_attn.qkv.val_proj1",
            "self_attn.qkv_proj.v_proj_delayed": "self_attn.qkv.val_proj2",
            "self_attn.qkv_proj.conv_qk_depthwise": "self_attn.qkv.conv_qk.0",
            "self_attn.qkv_proj.conv_qk_grouped": "self_attn.qkv.conv_qk.1",
            "self_attn.qk_norm.temp": "self_attn.qkv.temp", "mlp.gate.router_mlp.norm": "zaya_block.router.rmsnorm_eda",
            "mlp.gate.router_mlp.fc1": "zaya_block.router.router_mlp.0",
            "mlp.gate.router_mlp.fc2": "zaya_block.router.router_mlp.2",
            "mlp.gate.router_mlp.out_proj": "zaya_block.router.router_mlp.4", "mlp.gate": "zaya_block.router",
        }.items():  # fmt: skip
            if rest.startswith(new):
                rest = old + rest[len(new) :]
                break
        tensors[f"model.layers.{half}.{rest}"] = tensor
    values = dict(
        model_type="zaya", vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        num_hidden_layers=2 * c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_query_groups=c.num_key_value_heads, head_dim=c.head_dim,
        ffn_hidden_size=2 * c.moe_intermediate_size, num_experts=c.num_experts, moe_router_topk=1,
        zaya_mlp_expansion=c.router_hidden_size, norm_epsilon=c.rms_norm_eps, rope_theta=c.rope_theta,
        partial_rotary_factor=c.partial_rotary_factor,
        bos_token_id=2, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True, rope_scaling=False,
    )  # fmt: skip
    return tensors, values


@pytest.mark.parametrize("to_json", [config_to_json, zaya.config_to_legacy])
def test_a_zaya1_is_read_as_one_whatever_the_defaults_are(to_json, monkeypatch):
    monkeypatch.setitem(zaya.ZAYA1, "router", "linear")
    config = ZayaConfig(router="linear", rope_theta=1e4)
    assert config.is_zaya1 and config_from_json(to_json(config, "float32")) == config


@pytest.mark.parametrize("changes", [{}, {"layer_types": ["hybrid", "hybrid_sliding", "hybrid"], "sliding_window": 4}])
def test_a_model_saved_in_the_legacy_form_is_the_same_again(changes, tmp_path):
    numbers = dict(rms_norm_eps=1e-4, rope_theta=7e3, sliding_rope_theta=8e3, partial_rotary_factor=1.0)
    model = random_model(tie_word_embeddings=False, eos_token_id=[3, 4], **numbers, **changes)
    model.save_pretrained(tmp_path, legacy=True)
    stored, (expected, _) = load_safetensors(tmp_path / "model.safetensors"), as_legacy(model)
    assert stored.keys() == expected.keys() and all(stored[name].equal(expected[name]) for name in expected)
    again = Zaya.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(a.equal(b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("changes", [{"mlp": "dense"}, {"layer_types": ["hybrid_sliding"] * 3, "sliding_window": 1}])
def test_what_the_legacy_form_cannot_say_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="the original code's form"):
        Zaya(replace(SMALL, **changes)).save_pretrained(tmp_path / "new", legacy=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "foreign, named",
    [
        ({"moe_router_topk": [0, 2] * 3}, "moe_router_topk"),
        ({"zaya_use_eda": False}, "zaya_use_eda"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}}, "linear"),
        ({"rope_parameters": {"hybrid": {"rope_type": "yarn"}}}, "yarn"),
        ({"layer_types": ["hybrid", "hybrid_sliding", "hybrid"]}, "swa_layers"),
    ],
    ids=str,
)
def test_legacy_models_that_we_cannot_compute_are_refused(foreign, named):
    _, values = as_legacy(Zaya(SMALL))
    assert config_from_json(values | {"rope_scaling": {"type": "linear", "factor": 1.0}})  # which does nothing
    with pytest.raises(ValueError, match=named):
        config_from_json(values | foreign)


@pytest.mark.parametrize(
    "form",
    [
        "plain",
        "lists and a stale count",
        "one list",
        "other names",
        "two files",
        "sliding",
        "sliding, a number a layer",
    ],
)
def test_legacy_checkpoints_give_the_same_logits(form, tmp_path):
    sliding = dict(layer_types=["hybrid", "hybrid_sliding", "hybrid"], sliding_window=4) if "sliding" in form else {}
    model = random_model(rope_theta=1e6, partial_rotary_factor=0.25, eos_token_id=1, **sliding)
    tensors, values = as_legacy(model)
    if form == "lists and a stale count":
        values |= dict(
            num_hidden_layers=120, zaya_layers=["a", 4] * 3, cca_num_q_heads=[4, 0] * 3,
            num_query_groups_list=[2, 0] * 3, ffn_hidden_size_list=[0, 48] * 5, zaya_mlp_expansion=[0, 16] * 3,
        )  # fmt: skip
        del values["num_attention_heads"], values["num_query_groups"], values["ffn_hidden_size"], values["num_experts"]
    if sliding:
        values |= dict(swa_layers=[0, 3, 0] if "a layer" in form else [0, 0, 3, 0, 0, 0, 3, 0], swa_rotary_base=1e4)
    if form == "one list":
        values |= dict(num_hidden_layers=120, zaya_layers=[], num_query_groups_list=[2, 0] * 3)
    if form == "other names":
        rope = {name: values.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
        values |= dict(kv_channels=values.pop("head_dim"), rope_parameters={"hybrid": rope | {"rope_type": "default"}})
    (tmp_path / "config.json").write_text(json.dumps(values))
    names = sorted(tensors)
    halves = [names[::2], names[1::2]] if form == "two files" else [names]
    for i, part in enumerate(halves):
        save_safetensors(tmp_path / f"model-{i}.safetensors", {name: tensors[name] for name in part})
    again, tokens = Zaya.from_pretrained(tmp_path), random_tokens(2, 9)
    assert again(tokens)[0].equal(model(tokens)[0])
    assert (again.config.eos_token_id, again.config.rope_theta) == (1, 1e6)

    name = "model.layers.1.zaya_block.experts.local_experts.2.linear_fc1.weight"
    save_safetensors(tmp_path / "model-0.safetensors", {n: tensors[n] for n in halves[0] if n != name})
    if name in halves[0]:
        with pytest.raises(ValueError, match=re.escape("gate_up_proj[2]")):
            Zaya.from_pretrained(tmp_path)
