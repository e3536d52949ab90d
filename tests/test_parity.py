"""zaya.py computes what transformers' ZayaForCausalLM computes: logits, loss, gradients, decoding, files.

Both models hold the same random weights, none of them at a neutral value, in float32. A configuration below names
what it differs in from a small ZAYA1; each is checked at 1 token, at 2 and at more than the sliding window.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from zaya import Zaya, ZayaConfig, load_safetensors, official_names

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.zaya")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BATCH, TIME, WINDOW = 2, 21, 5
MIXED = ["hybrid_sliding", "hybrid", "hybrid_sliding"]
CONFIGS = {
    "4 queries a key": {},
    "2 queries a key, 2 keys": dict(num_attention_heads=4, num_key_value_heads=2),
    "1 query a key, 2 keys": dict(num_attention_heads=2, num_key_value_heads=2),
    "4 queries a key, 2 keys": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=8),
    "2 queries a key, 3 keys": dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    "kernels 3, 2": dict(cca_time0=3),
    "kernels 2, 4": dict(cca_time1=4, num_attention_heads=3, num_key_value_heads=3),
    "sliding and full": dict(layer_types=MIXED, sliding_window=WINDOW, sliding_rope_theta=100.0),
    "sliding, kernels 3, 4": dict(layer_types=["hybrid_sliding"] * 3, sliding_window=3, cca_time0=3, cca_time1=4),
    "untied head": dict(tie_word_embeddings=False),
    "whole head rotated": dict(partial_rotary_factor=1.0, rope_theta=500.0, rms_norm_eps=1e-3),
    "odd widths": dict(
        hidden_size=45, moe_intermediate_size=23, router_hidden_size=13, head_dim=12, vocab_size=101, num_experts=3
    ),
    "one expert": dict(num_experts=1),
    "skip wins": dict(num_experts=3),
    "as the 74B preview": dict(  # 24 experts, sliding and full layers by turns
        num_experts=24, num_hidden_layers=4, layer_types=["hybrid_sliding", "hybrid"] * 2, sliding_window=WINDOW
    ),
}


def config_of(name):
    small = dict(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=48, num_experts=5, router_hidden_size=24, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return ZayaConfig(**small | CONFIGS[name])


def random_model(name, seed=0):
    """Our model with every parameter and balancing bias moved away from where it starts."""
    torch.manual_seed(seed)
    model = Zaya(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        model.embed_tokens.weight *= 4  # so that tokens differ, and with them their experts
        model.norm.weight /= 4  # and yet the loss is that of a fresh model, a few nats
        for router in model.routers:
            for part in ("fc1", "fc2", "out_proj"):
                router.router_mlp[part].weight *= 2
            router.balancing_biases.normal_(std=0.1)
            router.balancing_biases[-1] = 0.1 if name == "skip wins" else -1.0  # -1 as released
    return model


def open_in_transformers(ours, folder, dtype=torch.float32):
    """Save our model and open it with transformers, which resets the skip class's bias: give it back."""
    ours.save_pretrained(folder)
    theirs = transformers.ZayaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    theirs.set_experts_implementation("eager")
    for router, layer in zip(ours.routers, theirs.model.layers, strict=True):
        layer.mlp.gate.balancing_biases.copy_(router.balancing_biases)
    return theirs.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    ours = random_model(request.param)
    return ours, open_in_transformers(ours, tmp_path_factory.mktemp("model"))


def random_tokens(model, time, batch=BATCH):
    return torch.randint(model.config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(time))


def assert_close(ours, theirs, tolerance=1e-5):
    """The largest difference, as a share of the largest number."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward


@pytest.mark.parametrize("time", [1, 2, TIME])
def test_logits(models, time):
    ours, theirs = models
    tokens = random_tokens(ours, time)
    with torch.no_grad():
        assert_close(ours(tokens)[0], theirs(tokens).logits)


def test_tokens_differ_in_their_expert(models, request):
    """Else the other tests would show little. Skip wins somewhere in every layer, or nowhere."""
    ours, _ = models
    for router in ours.routers:
        router.counts.zero_()
    ours(random_tokens(ours, TIME))
    counts = torch.stack([router.counts for router in ours.routers])  # (L, E + 1)
    assert counts.sum(dim=1).tolist() == [BATCH * TIME] * len(ours.routers)
    if ours.config.num_experts > 1:
        assert ((counts > 0).sum(dim=1) >= 2).all()
    if ours.config.num_experts == 1:
        return  # skip wins here or there, as it happens
    skip = "skip wins" in request.node.name
    assert ((counts[:, -1] > 0) == skip).all()


@pytest.mark.parametrize("time", [1, 2, TIME])
def test_loss_and_every_gradient(models, time):
    """Every parameter of ours has its official counterpart in theirs, and the other way round.

    The floor, fp32's rounding of the largest gradient, is for small sums of large terms. At one token it hides all that
    only shapes the attention (the softmax over a single key is 1, whatever queries and keys are) and the delayed value
    (there is no token before): those gradients are zero. At the longest text nothing may hide behind it.
    """
    ours, theirs = models
    tokens = random_tokens(ours, time + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    ours.zero_grad()
    theirs.zero_grad()
    _, our_loss = ours(inputs, targets)
    their_loss = theirs(inputs, labels=targets, shift_labels=targets).loss
    assert abs(our_loss - their_loss) <= 1e-6 * their_loss
    our_loss.backward()
    their_loss.backward()

    our_parameters, their_parameters = official_names(dict(ours.named_parameters())), dict(theirs.named_parameters())
    assert our_parameters.keys() == their_parameters.keys()
    largest = max(p.grad.norm() for p in their_parameters.values())
    floor = 1e-6 * largest  # rounding: eps is 1.2e-7, and sums run over every token
    for name, parameter in our_parameters.items():
        difference, norm = (parameter.grad - their_parameters[name].grad).norm(), their_parameters[name].grad.norm()
        if time == TIME:
            assert norm > 1e-4 * largest, name
        assert difference <= max(1e-4 * norm, floor), name


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def in_pieces(model, tokens, *lengths):
    """The logits of tokens (B, T), fed to a cache in pieces of these lengths."""
    cache = model.new_cache(*tokens.shape)
    return torch.cat([model(piece, cache=cache)[0] for piece in tokens.split(lengths, dim=1)], dim=1)


@torch.no_grad()
def test_cache_equals_full_forward(models):
    """At every split into a prompt and a rest, in several pieces, and token by token."""
    ours, theirs = models
    tokens = random_tokens(ours, TIME)
    full = theirs(tokens).logits
    for prompt in range(1, TIME):
        assert_close(in_pieces(ours, tokens, prompt, TIME - prompt), full)
    assert_close(in_pieces(ours, tokens, 1, 2, 7, 1, 6, TIME - 17), full)
    assert_close(in_pieces(ours, tokens, *[1] * TIME), full)


@torch.no_grad()
def test_cache_equals_theirs(models):
    """A prompt of 8 tokens and then single ones, each model with its own cache."""
    ours, theirs = models
    tokens = random_tokens(ours, TIME)
    cache, their_cache = ours.new_cache(BATCH, TIME), transformers.DynamicCache(config=theirs.config)
    for piece in tokens.split([8] + [1] * (TIME - 8), dim=1):
        # Their fourth argument by position: it was past_key_values, and is cache from 5.24 on.
        out = theirs(piece, None, None, their_cache, use_cache=True)
        assert_close(ours(piece, cache=cache)[0], out.logits)


def test_greedy_text_is_theirs(models):
    ours, theirs = models
    tokens = random_tokens(ours, 6)
    text = ours.generate(tokens, 64, temperature=0)
    assert text.shape == (BATCH, 70)
    assert text.equal(
        theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, do_sample=False)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", ["4 queries a key", "untied head", "sliding and full"])
def test_our_checkpoint_opens_in_transformers(name, tmp_path):
    """As it is, through AutoModel, with nothing missing, nothing left over and nothing set by hand."""
    ours = random_model(name, seed=1)
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, transformers.ZayaForCausalLM)
    assert not any(report.values()), report
    tokens = random_tokens(ours, TIME)
    with torch.no_grad():
        assert_close(ours(tokens)[0], theirs(tokens).logits)


@pytest.mark.parametrize("shard", ["1GB", "50KB"])
@pytest.mark.parametrize("name", ["as the 74B preview", "untied head", "skip wins"])
def test_their_checkpoint_opens_here(name, shard, tmp_path):
    """In one file or in many; a bias of the skip class other than -1 is kept, too."""
    theirs = open_in_transformers(random_model(name, seed=2), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shard == "50KB")
    ours = Zaya.from_pretrained(tmp_path / "theirs")
    assert ours.config == config_of(name)
    tokens = random_tokens(ours, TIME)
    with torch.no_grad():
        assert_close(ours(tokens)[0], theirs(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_model_without_a_head_opens_here(dtype, tmp_path):
    theirs = open_in_transformers(random_model("4 queries a key", seed=5), tmp_path / "ours", dtype)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.model.save_pretrained(tmp_path / "headless")
    assert "embed_tokens.weight" in load_safetensors(tmp_path / "headless" / "model.safetensors")
    whole, headless = (Zaya.from_pretrained(tmp_path / name) for name in ("whole", "headless"))
    assert_same_tensors(headless.state_dict(), whole.state_dict())
    assert headless.embed_tokens.weight.dtype == dtype


def test_without_triton_transformers_finds_no_package_kernels():
    """Else it would take kernels.py for the one that it knows."""
    program = "import sys; sys.modules['triton'] = None; import zaya, transformers.models.zaya.modeling_zaya"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["4 queries a key", "untied head", "sliding, kernels 3, 4"])
def test_a_round_trip_loses_nothing(name, tmp_path):
    """Ours to transformers and back, and once more: every tensor bit for bit, and the same config.json."""
    ours = random_model(name, seed=3)
    for router in ours.routers:
        router.balancing_biases[-1] = -1  # transformers sets it to that when it saves or loads
    theirs = open_in_transformers(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = Zaya.from_pretrained(tmp_path / "theirs")
    again.save_pretrained(tmp_path / "again")
    third = open_in_transformers(again, tmp_path / "third")
    assert again.config == ours.config
    assert_same_tensors(again.state_dict(), ours.state_dict())
    assert_same_tensors(third.state_dict(), theirs.state_dict())


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.equal(expected[name]), name


@pytest.mark.parametrize("stray", ["within", "beside"])
def test_a_stray_rope_type_is_no_hindrance(stray, tmp_path):
    """ZAYA1-8B's config.json may have one beside the two layer types."""
    theirs = open_in_transformers(random_model("sliding and full", seed=4), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config["rope_parameters"] if stray == "within" else config)["rope_type"] = "default"
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = Zaya.from_pretrained(tmp_path)
    assert ours.config == config_of("sliding and full")
    tokens = random_tokens(ours, TIME)
    with torch.no_grad():
        assert_close(ours(tokens)[0], theirs(tokens).logits)


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16


@torch.no_grad()
@pytest.mark.parametrize("name", ["4 queries a key", "2 queries a key, 3 keys", "sliding and full", "untied head"])
def test_bf16_strays_no_further_than_theirs(name, tmp_path):
    """Against the float32 model, the median token's error over five models: routing flips are in the tail, for both."""
    errors = {"ours": [], "theirs": []}
    for seed in range(5):
        reference = random_model(name, seed)
        theirs = open_in_transformers(reference, tmp_path / str(seed), torch.bfloat16)
        ours = Zaya.from_pretrained(tmp_path / str(seed), dtype=torch.bfloat16)
        tokens = random_tokens(reference, 64, batch=4)
        exact = reference(tokens)[0]
        for who, logits in (("ours", ours(tokens)[0]), ("theirs", theirs(tokens).logits.float())):
            errors[who].append((logits - exact).norm(dim=-1) / exact.norm(dim=-1))
    ours, theirs = (torch.stack(each) for each in errors.values())
    assert ours.median() <= 2 * theirs.median() and ours.mean() <= 2 * theirs.mean()
    assert ours.median() < 0.05  # and that is what bf16's 8 bits make of three layers
