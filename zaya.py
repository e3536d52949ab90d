"""ZAYA1, whole: a mixture-of-experts language model in plain PyTorch, to be read from top to bottom.

    tokens -> embedding -> L x (CCA attention, top-1 mixture of experts) -> norm -> logits

Its three ideas, in the order in which you meet them below:
  1. Compressed Convolutional Attention: attention in a space half as wide, its queries and keys mixed with
     the previous tokens' by two short convolutions. The KV cache is 8 times smaller than multi-head attention's.
  2. A router that thinks before it routes: a small MLP on a state that flows from layer to layer picks one
     expert a token, and a bias outside autograd keeps the experts evenly busy, with no auxiliary loss.
  3. Residual scaling: at every merge four learned vectors weigh the stream against what is added to it.

Sources: [R] ZAYA1-8B Technical Report, arXiv 2605.05365. [C] Compressed Convolutional Attention, arXiv 2510.04476.
[T] ZayaForCausalLM of `transformers`, to which this file is numerically equal (tests/test_parity.py).
[Z] Zyphra's original code, which wrote the legacy checkpoints. Where they differ, a comment says which one we follow.

Shapes, one letter each:
  B batch         T time (tokens)          S time with the cache's past    N = B * T
  D width         H heads = Hq + Hk        h head size                     C = H * h channels of queries and keys
  L layers        E experts                F expert width                  R router width      V vocabulary
  P past tokens: how many before the current one CCA's two convolutions see

linear, product, normalize, grouped_linear and move_rows do what they say; how they do it fast stands after the model.
Where the configuration offers a choice, CCA, Router, MixtureOfExperts and ResidualScaling are ZAYA1's own; the
alternatives, for comparison, stand after the model, too.
"""

import argparse
import inspect
import json
import math
import operator
import mmap
import os
import re
import struct
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import kernels as triton_kernels
except ModuleNotFoundError as error:  # PyTorch's builds for a CPU come without Triton
    if error.name != "triton":
        raise
    triton_kernels = None
    sys.modules["kernels"] = None  # `transformers` looks for a package of this name, and would trip over our file


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

# The fields that are ours alone, with the values that make a model a ZAYA1.
ZAYA1 = {"attention": "cca", "mlp": "moe", "cca_without": None, "router": "zaya", "residual_scaling": True}
CCA_PARTS = ("depthwise", "grouped", "value_shift", "qk_mean")  # which cca_without may name


@dataclass
class ZayaConfig:
    """The shape of a model. The defaults are ZAYA1-8B; the names are those of its config.json.

    Raises ValueError, in one line, for a value that no model can have.
    """

    vocab_size: int = 262272  # number of token ids (Gemma 3's tokenizer); train.py takes it from the data
    hidden_size: int = 2048  # D, width of the residual stream
    num_hidden_layers: int = 40  # L, each is attention and then experts
    num_attention_heads: int = 8  # Hq, query heads: Hq * h = D / 2 is the "compressed" of CCA
    num_key_value_heads: int = 2  # Hk, key and value heads: an 8 times smaller cache than D / h heads need
    head_dim: int = 128  # h, size of a head, divisible by 4
    moe_intermediate_size: int = 2048  # F, width of one expert
    num_experts: int = 16  # E, of which each token meets one
    router_hidden_size: int = 256  # R, width of the router's MLP
    cca_time0: int = 2  # taps of the first (depthwise) convolution of CCA
    cca_time1: int = 2  # taps of the second (grouped) convolution of CCA
    rope_theta: float = 5e6  # base of the rotary embedding; 1e4 while pretraining at 4,096 tokens [R]
    sliding_rope_theta: float = 1e4  # the same for sliding-window layers
    partial_rotary_factor: float = 0.5  # share of a head's channels that is rotated
    layer_types: list[str] | None = None  # a layer's attention: "hybrid" is full, "hybrid_sliding" a window; None: full
    sliding_window: int | None = None  # tokens that a sliding layer sees, the current one included
    max_position_embeddings: int = 131072  # context length; nothing is stored for it
    rms_norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    initializer_range: float = 0.02  # standard deviation of fresh weights
    tie_word_embeddings: bool = True  # the LM head is the embedding
    bos_token_id: int | None = 2  # first token of a text, if any; train.py takes it, too, from the data
    eos_token_id: int | list[int] | None = 106  # ends a text, if any; some models have several; from the data, too
    pad_token_id: int | None = 0  # fills short rows of a batch, if any; not used here; from the data, too
    attention: str = "cca"  # "cca", or a conventional "gqa" or "mha" (Hq = Hk = D / h) to compare with
    mlp: str = "moe"  # "moe", or "dense": one SwiGLU of width F and no router, to compare with
    cca_without: list[str] | None = None  # parts that cca shall lack: depthwise, grouped, value_shift, qk_mean
    router: str = "zaya"  # "zaya", "no_eda" (each layer's router on its own), or "linear" (one matrix)
    residual_scaling: bool = True  # or plain sums where attention and experts join the stream

    def __post_init__(self):
        complete(self)  # far below: fills in layer_types, refuses what no model can have

    @property
    def is_zaya1(self):  # and not something that it is compared with
        return all(getattr(self, name) == value for name, value in ZAYA1.items())

    @property
    def rotary_dim(self):
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def past_tokens(self):  # P
        return (self.cca_time0 - 1) + (self.cca_time1 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# All maths of this file is eager PyTorch. A function marked @has_kernel has a twin in Triton, of the same name, in
# kernels.py.


def has_kernel(eager):
    """Decorate a function: its twin in kernels.py is called instead, where that can run."""
    name = eager.__name__

    @wraps(eager)
    def either(*args):
        # (The one kernel that is not the fastest everywhere is experts: see torch_is_faster.)
        if not on_kernels(args[0]) or (name == "experts" and torch_is_faster(*args[:2])):
            return eager(*args)
        if reason := triton_kernels.unsupported(name, *args):
            warn_once(f"no kernel for {name}: {reason}; eager PyTorch is used")
            return eager(*args)
        return getattr(triton_kernels, name)(*args)

    return either


# ---------------------------------------------------------------------------------------------------------------------
# Norms and rotary embedding. All of it in fp32, whatever the weights are [R].


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed and returned in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return normalize(x.float(), self.weight, self.eps)


def rotary_table(positions, rotary_dim, theta):
    """cos and sin, (T, 1, rotary_dim / 2) each: pair i turns by position * theta^(-2i / rotary_dim)."""
    powers = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    frequencies = 1 / theta**powers  # as [T]: theta**-powers has other last bits, which position 4,096 shows
    angles = positions[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the first channels of every head of x (B, T, H, h); channel i pairs with i + rotary_dim / 2 (NeoX):
    x1, x2 -> x1 cos - x2 sin, x2 cos + x1 sin."""
    half = cos.shape[-1]
    x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin), rest], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Idea 1: Compressed Convolutional Attention [C]


def qk_mean(qk, Hq, Hk):
    """The plain part of q and k, to which the convolutions add: each query averaged with its key, each key with the
    mean of its queries.

    qk: [q0 | k0] (B, T, C), all heads of the queries, then all of the keys, as projected, before the convolutions
    ([C] II-B) -> the same shape.
    """
    B, T, C = qk.shape
    h, group = C // (Hq + Hk), Hq // Hk
    q, k = qk.split([Hq * h, Hk * h], dim=-1)
    mean_q = (q.view(B, T, Hk, group, h) + k.view(B, T, Hk, 1, h)) * 0.5
    mean_k = mean_q.mean(dim=3)
    return torch.cat([mean_q.view(B, T, Hq * h), mean_k.view(B, T, Hk * h)], dim=-1)


def depthwise_conv(x, weight, bias):
    """A short causal filter for every channel. x (B, T + taps - 1, C), weight (C, 1, taps) -> (B, T, C)."""
    taps = weight.shape[-1]
    T = x.shape[1] - taps + 1
    y = bias
    for tap in range(taps):
        y = torch.addcmul(y, x[:, tap : tap + T], weight[:, 0, tap])
    return y


def grouped_conv(x, weight, bias, H):
    """A short causal filter that also mixes the channels of a head: for every head and tap an h x h matrix.

    x (B, T + taps - 1, C), weight (C, h, taps) -> (B, T, C). The taps lie side by side, so each head is one
    product: 4 times faster than F.conv1d(groups=H) forward and backward on a CPU, and no transposed copies.
    """
    B, C, taps = x.shape[0], x.shape[2], weight.shape[2]
    T, h = x.shape[1] - taps + 1, C // H
    x = torch.cat([x[:, tap : tap + T].view(B, T, H, h) for tap in range(taps)], dim=-1)
    x = x.view(B * T, H, taps * h).transpose(0, 1)  # (H, N, taps * h)
    weight = weight.view(H, h, h, taps).permute(0, 3, 2, 1)  # (H, out, in, tap) -> (H, tap, in, out)
    weight = weight.reshape(H, taps * h, h)
    return torch.baddbmm(bias.view(H, 1, h), x, weight).transpose(0, 1).reshape(B, T, C)


def normalize_heads(qk, temp):
    """Scale every head of qk (B, T, H, h) to the length sqrt(h), that of key head j to sqrt(h) * temp[j], temp (Hk).
    [T] clamps the norm at its dtype's eps; we, at fp32's."""
    H, h = qk.shape[2:]
    length = math.sqrt(h) * torch.cat([temp.new_ones(H - len(temp)), temp])[:, None]  # (H, 1)
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).eps)
    return qk * (length / norm)


@has_kernel
def cca(qkv, past, v_before, depthwise, grouped, temp, cos, sin):
    """Everything between the projections and the attention ([C] II-B and its listing 1).

    qkv        [q0 | k0 | v_current | v_delayed] (B, T, C + Hk * h), each half of the values Hk * h / 2 wide
    past       [q0 | k0] of the P tokens before these (B, P, C), zeros at the start of a text
    v_before   the v_delayed of the token before these (B, 1, Hk * h / 2), zeros at the start of a text
    depthwise  (weight (C, 1, taps), bias (C)), the first convolution
    grouped    (weight (C, h, taps), bias (C)), the second
    temp       (Hk), a factor for a key's length, used raw ([R] appendix C: exp(temp), as [C] has, grew too large)
    cos, sin   (T, 1, rotary_dim / 2)
    Returns q (B, T, Hq, h), k and v (B, T, Hk, h), in qkv's dtype.
    """
    B, T, _ = qkv.shape
    C, h, Hk, late = past.shape[2], grouped[0].shape[1], len(temp), v_before.shape[2]  # late: channels of v_delayed
    H, Hq = C // h, C // h - Hk
    qk, v_current, v_delayed = qkv.split([C, Hk * h - late, late], dim=-1)
    # The text is padded once, before both convolutions, not before each: so at position -1 the second one sees what the
    # first makes of zeros, its bias, and not 0.
    mixed = torch.cat([past, qk], dim=1)
    mixed = depthwise_conv(mixed, *depthwise)
    mixed = grouped_conv(mixed, *grouped, H)
    mixed = mixed.float() + qk_mean(qk.float(), Hq, Hk)  # fp32 from here [R]
    mixed = normalize_heads(mixed.view(B, T, H, h), temp)
    q, k = rotate(mixed, cos, sin).to(qkv.dtype).split([Hq, Hk], dim=2)
    # Value shift: half of the value is the previous token's, so a query also learns what came just before.
    v_shifted = torch.cat([v_before, v_delayed[:, :-1]], dim=1)
    return q, k, torch.cat([v_current, v_shifted], dim=-1).view(B, T, Hk, h)


def attend(q, k, v, window=None):
    """Causal grouped-query attention, scale 1 / sqrt(h): the T queries are the last T of the S positions.

    q (B, T, Hq, h), k and v (B, S, Hk, h); window: how many positions a query sees, its own included;
    None: all. Returns (B, T, Hq * h).
    """
    T, S = q.shape[1], k.shape[1]
    window = window or S
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend_in_blocks(q, k, v, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # Without a mask, is_causal aligns the first query with the first key, which is wrong where S > T.
    mask = visible(S - T, 0, S, window, q.device) if window < S or T not in (1, S) else None
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The fused kernel that takes a mask, or on ROCm fp32, does not know grouped heads: one key head a query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    # A lone query sees all keys. (A branch, for where torch.compile varies T, the comparison alone is no bool.)
    causal = False if T == 1 else mask is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def visible(first_query, first_key, end, window, device):
    """Queries and keys, each from its first to end - 1 -> (queries, keys) bool: a query sees its own position and
    earlier ones, `window` in all."""
    ago = torch.arange(first_query, end, device=device)[:, None] - torch.arange(first_key, end, device=device)
    return (ago >= 0) & (ago < window)


def decodes(x, cache):
    """Whether x (B, T, ...) is one new token for each text of a cache, and no gradient is wanted."""
    return cache is not None and x.shape[1] == 1 and not torch.is_grad_enabled()


class CCA(nn.Module):
    """The projections of Compressed Convolutional Attention and its two convolutions [C] II-B."""

    def __init__(self, config):
        super().__init__()
        D, h = config.hidden_size, config.head_dim
        q_size, k_size = config.num_attention_heads * h, config.num_key_value_heads * h
        C = q_size + k_size
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, k_size, bias=False)
        self.v_proj_current = nn.Linear(D, k_size // 2, bias=False)
        self.v_proj_delayed = nn.Linear(D, k_size // 2, bias=False)
        self.past_tokens = config.past_tokens
        self.conv_qk_depthwise = nn.Conv1d(C, C, config.cca_time0, groups=C)
        self.conv_qk_grouped = nn.Conv1d(C, C, config.cca_time1, groups=C // h)

    def projection(self, cache=None):
        """The matrices as one (C + Hk * h, D), in __init__'s order. A cache has it ready, but without a gradient."""
        if cache is not None and not torch.is_grad_enabled():
            return cache.projection
        return torch.cat([part.weight for part in self.children() if isinstance(part, nn.Linear)])

    def take_past(self, qkv, cache):
        """past and v_before, as cca takes them; a cache then remembers qkv."""
        if cache is not None:
            return cache.remember(qkv)
        B, C = len(qkv), self.q_proj.out_features + self.k_proj.out_features
        return qkv.new_zeros(B, self.past_tokens, C), qkv.new_zeros(B, 1, self.v_proj_delayed.out_features)

    def forward(self, x, temp, cos, sin, cache):
        """x (B, T, D) -> q (B, T, Hq, h), k and v (B, T, Hk, h), or None where cca_step has put them into the cache."""
        return self.mix(linear(x, self.projection(cache)), temp, cos, sin, cache)

    def mix(self, qkv, temp, cos, sin, cache):
        """qkv (B, T, C + Hk * h), the projection's result -> what forward returns. (hidden_of_one, far below, makes the
        projections itself, and calls this, weighted_values, think and weighted_experts in the place of forward.)"""
        convolutions = [(conv.weight, conv.bias) for conv in (self.conv_qk_depthwise, self.conv_qk_grouped)]
        if decodes(qkv, cache):
            return cca_step(qkv, cache, *convolutions, temp, cos, sin), None, None
        return cca(qkv, *self.take_past(qkv, cache), *convolutions, temp, cos, sin)


class Attention(nn.Module):
    """CCA's queries, keys and values, then ordinary causal attention in the compressed space."""

    def __init__(self, config, layer_type):
        super().__init__()
        self.window = config.sliding_window if layer_type == "hybrid_sliding" else None
        projections = PlainProjection if config.attention != "cca" else PartialCCA if config.cca_without else CCA
        self.qkv_proj = projections(config)
        # From scratch the temperature starts at 1. [T] and [Z] start at 0: every key is zero, and attention a mean.
        self.qk_norm = nn.ParameterDict(
            {"temp": torch.ones(config.num_key_value_heads)} if config.attention == "cca" else {}
        )
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary, cache):
        """x (B, T, D), rotary (cos, sin), cache: this layer's LayerCache or None -> (B, T, D)."""
        q, k, v = self.qkv_proj(x, self.qk_norm.get("temp"), *rotary, cache)
        return linear(self.weighted_values(q, k, v, cache), self.o_proj.weight)

    def weighted_values(self, q, k, v, cache):
        """What qkv_proj returns -> what o_proj takes (B, T, Hq * h). k and v are None where cca_step has put them into
        the cache already."""
        if cache is not None and k is not None:
            k, v = cache.append(k, v)
        if decodes(q, cache):
            return attend_past(q, cache.k, cache.v, cache.end, self.window)
        return attend(q, k, v, self.window)


# ---------------------------------------------------------------------------------------------------------------------
# Idea 2: a router that thinks, and the experts it chooses from [R] II-A


class Router(nn.Module):
    """Gives each token one of E experts, or the skip class: then no expert adds anything to it."""

    def __init__(self, config, layer):
        super().__init__()
        D, R, classes = config.hidden_size, config.router_hidden_size, config.num_experts + 1
        self.down_proj = nn.Linear(D, R)
        if layer > 0 and config.router != "no_eda":
            self.router_states_scale = nn.Parameter(torch.ones(R))  # gamma
        self.router_mlp = nn.ModuleDict(
            {
                "norm": RMSNorm(R, config.rms_norm_eps),
                "fc1": nn.Linear(R, R),
                "fc2": nn.Linear(R, R),
                "out_proj": nn.Linear(R, classes, bias=False),
            }
        )
        # Added to the probabilities for the choice alone. The optimizer of train.py moves the experts' entries until
        # all are equally busy; the skip entry stays at -1, as in the released weights: skip never wins in practice.
        bias = torch.zeros(classes)
        bias[-1] = -1.0
        self.register_buffer("balancing_biases", bias)
        # Tokens that each class has been given since the trainer last set this to zero. (DistributedDataParallel must
        # not broadcast_buffers, or rank 0's take the place of the others'. What is recomputed counts twice.)
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64), persistent=False)

    def forward(self, x, previous):
        """x (N, D), previous: the previous layer's state (N, R) or None -> probability and number (N) of the class
        chosen, state (N, R) for the next layer."""
        return self.think(linear(x, self.down_proj.weight, self.down_proj.bias), previous)

    def think(self, r, previous):
        """r (N, R), x projected down -> what forward returns."""
        mlp = self.router_mlp
        gamma = getattr(self, "router_states_scale", None)  # none in the first layer, and none for no_eda
        previous = None if gamma is None else previous
        norm, fc1, fc2 = mlp["norm"], (mlp["fc1"].weight, mlp["fc1"].bias), (mlp["fc2"].weight, mlp["fc2"].bias)
        probability, choice, counts, state = route(
            r, previous, gamma, norm.weight, norm.eps, fc1, fc2, mlp["out_proj"].weight, self.balancing_biases
        )
        self.count(counts)
        return probability, choice, state

    def count(self, counts):
        """Add to the load counts, except during generation. (torch.compile cannot trace that: compiled, all count.)"""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            self.counts += counts


@has_kernel
def route(r, previous, gamma, norm, eps, fc1, fc2, out, balancing_biases):
    """The router's thinking [R] II-A2. r (N, R): the tokens projected down; previous (N, R): the state of the layer
    before, and gamma (R) its weight, or None both; norm (R); fc1 and fc2: (weight (R, R), bias (R)); out (E + 1, R)
    -> probability (N) and number (N) of the class chosen, tokens a class (E + 1), state (N, R) for the next layer."""
    state = r.float()
    if previous is not None:  # Exponential Depth Averaging: earlier layers' thoughts, fading as gamma learns
        state = state + previous * gamma
    thought = F.gelu(linear(normalize(state, norm, eps), *fc1))
    thought = F.gelu(linear(thought, *fc2))
    # fp32: in bf16 a tenth of the tokens would have two equally likely experts.
    return *choose(linear(thought, out).float().softmax(dim=-1), balancing_biases), state


def choose(probabilities, balancing_biases):
    """The class of each token: (N, E + 1) -> its probability (N), its number (N), tokens a class (E + 1).

    The bias steers the choice and nothing else: the output is weighted by the unbiased probability, one of E + 1 that
    add up to 1, and through that one number alone the gradient reaches the router.
    """
    choice = (probabilities.detach() + balancing_biases).argmax(dim=-1)
    return probabilities.gather(-1, choice[:, None]).squeeze(-1), choice, tally(choice, len(balancing_biases))


def tally(choice, classes):
    """How many tokens chose each class. (For bincount the host would wait for the GPU.)"""
    return (choice[:, None] == torch.arange(classes, device=choice.device)).sum(dim=0)


class Experts(nn.Module):
    """The weights of E SwiGLU networks, stacked; experts() applies them."""

    def __init__(self, config):
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size  # F is torch's functional
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))


class MixtureOfExperts(nn.Module):
    """Top-1 routing without a capacity factor (others cap the tokens that an expert may get, and drop the rest): every
    token is served. With the kernels no shape depends on the routing, so a GPU need not wait for the host."""

    def __init__(self, config, layer):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = LinearRouter(config) if config.router == "linear" else Router(config, layer)
        self.experts = Experts(config)

    def forward(self, x, router_state):
        """x (B, T, D), router_state (N, R) or None -> (B, T, D), router_state."""
        shape, x = x.shape, x.flatten(0, 1)
        probability, choice, router_state = self.gate(x, router_state)
        return self.weighted_experts(x, probability, choice).view(shape), router_state

    def weighted_experts(self, x, probability, choice):
        """Each token of x (N, D) through the expert of its choice (N), times its probability (N) -> (N, D). Zeros for
        choice E, the skip class."""
        # The zeros for skipped tokens, then dispatch, experts and combine in the last two lines: that is all of it.
        # What returns before does the same, faster, for few tokens and on CPUs.
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        x = x.to(down.dtype)
        if len(x) <= FEW_TOKENS[x.is_cuda] and not torch.is_grad_enabled():
            return experts_of_few(x, probability, choice, gate_up, down)
        # A skipped token goes to the last expert, whose result is then multiplied by 0 ([T]; [Z] adds probability * x).
        probability = probability.masked_fill(choice == self.num_experts, 0.0)
        choice = choice.clamp_max(self.num_experts - 1)
        if x.device.type == "cpu" and not on_kernels(x):
            return experts_on_cpu(x, probability, choice, gate_up, down)
        x, place, offsets = dispatch(x, choice, self.num_experts)
        return combine(experts(x, gate_up, down, offsets), place, probability)


@has_kernel
def dispatch(x, choice, num_experts):
    """Bring the tokens of each expert together: x (N, D) and choice (N), each below num_experts
    -> x sorted by expert (N, D), place: the row that each token has there (N), where each expert's rows end (E)."""
    place = inverse_permutation(choice.argsort(stable=True))
    offsets = tally(choice, num_experts).cumsum(dim=0, dtype=torch.int32)
    return move_rows(x, place), place, offsets


@has_kernel
def experts(x, gate_up, down, offsets):
    """E SwiGLU networks, gate_up (E, 2F, D) and down (E, D, F), each on its own rows of x (N, D) -> (N, D)."""
    gate, up = grouped_linear(x, gate_up, offsets).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up, down, offsets)


@has_kernel
def combine(y, place, probability):
    """Every token's result back from its row, y[place], times its probability (N). y (N, D) -> (N, D)."""
    return move_rows(y, inverse_permutation(place)) * probability[:, None].to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Idea 3: residual scaling [R] II-A3, and the block that all three make


class ResidualScaling(nn.Module):
    """stream <- (stream + b_r) * s_r + (out + b_o) * s_o, in fp32, with four learned D-vectors: r is for residual, o
    for out, which the weights' names call hidden states."""

    def __init__(self, size):
        super().__init__()
        self.hidden_states_scale = nn.Parameter(torch.ones(size))
        self.hidden_states_bias = nn.Parameter(torch.zeros(size))
        self.residual_scale = nn.Parameter(torch.ones(size))
        self.residual_bias = nn.Parameter(torch.zeros(size))

    def forward(self, stream, out, norm):
        """stream (B, T, D) fp32, out (B, T, D), norm: the next RMSNorm -> what merge returns."""
        return merge(stream, out, *self.vectors, norm.weight, norm.eps)

    @property
    def vectors(self):
        return self.residual_scale, self.residual_bias, self.hidden_states_scale, self.hidden_states_bias


@has_kernel
def merge(stream, out, s_r, b_r, s_o, b_o, weight, eps):
    """The new stream (B, T, D), as ResidualScaling says, in fp32; and the same through RMSNorm, in out's dtype. The
    four vectors and the norm's weight are (D)."""
    stream = torch.addcmul(torch.addcmul(b_r * s_r + b_o * s_o, stream, s_r), out, s_o)  # both biases at once
    return stream, normalize(stream, weight, eps).to(out.dtype)


class Block(nn.Module):
    """One layer: attention, merge, experts, merge. Each merge normalises the stream for what comes next."""

    def __init__(self, config, layer):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(config, config.layer_types[layer])
        self.post_attention_residual_scale = ResidualScaling(D) if config.residual_scaling else PlainSum()
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MixtureOfExperts(config, layer) if config.mlp == "moe" else DenseMLP(config)
        self.post_mlp_residual_scale = ResidualScaling(D) if config.residual_scaling else PlainSum()

    def forward(self, stream, normed, router_state, rotary, cache, next_norm):
        """stream (B, T, D) fp32, the same normalised, router_state (N, R) or None -> all three, after this layer.
        rotary, cache: as in Attention; next_norm: the RMSNorm of what comes next."""
        out = self.self_attn(normed, rotary, cache)
        stream, normed = self.post_attention_residual_scale(stream, out, self.post_attention_layernorm)
        out, router_state = self.mlp(normed, router_state)
        stream, normed = self.post_mlp_residual_scale(stream, out, next_norm)
        return stream, normed, router_state


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Zaya(nn.Module):
    """The language model. The names of its weights are the official checkpoint's, less the leading "model.".

    Linear layers, convolutions, experts and all norms but the first are read for their weights and never called: a hook
    on one of them, or a module with a forward of its own in its place (as LoRA has), does nothing. A parametrization of
    its weight does (torch.nn.utils.parametrize).
    """

    def __init__(self, config, kernels="auto"):
        """kernels: "auto" (Triton's on a GPU, where they are the fastest), "triton" (all of them) or "eager" (none)."""
        super().__init__()
        use_kernels(kernels)
        self.config, self.kernels = config, kernels
        # How text is generated: shortcuts lets Decoder and hidden_of_one take the place of hidden_states, graph lets a
        # GPU record a step and replay it (captured). To compare without, set them to False.
        self.shortcuts = self.graph = True
        D, L = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, D)
        if config.residual_scaling:
            self.input_hidden_states_scale = nn.Parameter(torch.ones(D))
            self.input_hidden_states_bias = nn.Parameter(torch.zeros(D))
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(L)])
        self.norm = RMSNorm(D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.apply(self.init_weights)

    def init_weights(self, module):
        """Matrices are normal with the standard deviation initializer_range, the router's with fan-in^-0.5; biases 0;
        norms, scales, temperatures 1; the convolutions as nn.Conv1d has them.

        If the router's were at initializer_range, too, its probabilities would be nearly equal and the balancing bias
        alone would decide: a loss of 2.00 instead of 1.80 (tiny Shakespeare, 8 experts, 120 steps, equal balancing).
        """
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
        elif isinstance(module, Router):  # comes after its own parts
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    nn.init.normal_(part.weight, std=part.in_features**-0.5)

    def cast(self, dtype):
        """Put everything that takes part in a matrix product in dtype; norms, scales, temperatures and balancing biases
        stay fp32 [R]. Returns self."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, Experts)):
                module.to(dtype)
        return self

    @property
    def head(self):
        """The LM head's matrix (V, D)."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden_states(self, tokens, cache=None):
        """tokens (B, T) -> what the LM head sees (B, T, D), in its dtype. A cache is read and moved on by T tokens."""
        use_kernels(self.kernels)  # which is global, for the functions marked @has_kernel know no model
        config, T = self.config, tokens.shape[1]
        if cache and len(tokens) != (texts := len(cache.layers[0].k)):
            raise ValueError(f"{len(tokens)} texts do not fit a cache of {texts}")
        stream = self.embed_tokens(tokens).float()  # before the cache moves: here it shows if a token is no id
        rotary = cache.advance(T) if cache else self.rotary(torch.arange(T, device=tokens.device))
        if config.residual_scaling:
            stream = (stream + self.input_hidden_states_bias) * self.input_hidden_states_scale
        first_norm, *next_norms = [layer.input_layernorm for layer in self.layers] + [self.norm]
        normed, router_state = first_norm(stream), None
        caches = cache.layers if cache else [None] * len(self.layers)
        for layer, kind, layer_cache, next_norm in zip(self.layers, config.layer_types, caches, next_norms):
            stream, normed, router_state = layer(stream, normed, router_state, rotary[kind], layer_cache, next_norm)
        return normed.to(self.head.dtype)

    def rotary(self, positions):
        """{layer type: (cos, sin)} for positions (T), of the types that the model has."""
        config = self.config
        thetas = {"hybrid": config.rope_theta, "hybrid_sliding": config.sliding_rope_theta}
        present = {name: thetas[name] for name in thetas if name in config.layer_types}
        return {name: rotary_table(positions, config.rotary_dim, theta) for name, theta in present.items()}

    def logits(self, hidden):
        """hidden (..., D) -> (..., V) in fp32."""
        if torch.is_grad_enabled():
            return linear(hidden.float(), self.head.float())
        # The same without a gradient, faster: no fp32 copy of a head in bf16 on a GPU; product, for a single row.
        rows, head = hidden.flatten(0, -2), self.head
        if head.is_cuda and head.dtype != torch.float32:
            logits = torch.mm(rows, head.t(), out_dtype=torch.float32)
        else:
            multiply = product if len(rows) == 1 else linear
            logits = multiply(rows.float(), head.float())
        return logits.unflatten(0, hidden.shape[:-1])

    def forward(self, tokens, targets=None, cache=None):
        """tokens (B, T) int64 -> (logits (B, T, V) fp32, None), or with targets (B, T) -> (None, mean loss in nats).
        Every target is a token id and counts: there is no label to ignore.

        With cache = model.new_cache(...) the tokens continue those that it holds. Raises ValueError if they do not fit,
        or if there is not a target for each token.
        """
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets {tuple(targets.shape)} are not one for each of tokens {tuple(tokens.shape)}")
        hidden = self.hidden_states(tokens, cache)
        if targets is None:
            return self.logits(hidden), None
        with_gradient = torch.is_grad_enabled()  # asked here, for inside a Function it is always off
        return None, LinearCrossEntropy.apply(hidden.flatten(0, 1), self.head, targets.flatten(), with_gradient)

    # -----------------------------------------------------------------------------------------------------------------
    # Generation

    def new_cache(self, batch_size, max_len):
        """Static buffers for batch_size texts of up to max_len tokens. They hold what follows from the weights, which
        must not change as long as the cache is used; copy.deepcopy branches it, but nothing takes tokens back."""
        return Cache(self, batch_size, max_len)

    @torch.inference_mode()
    def next_tokens(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_token_id=None):
        """Yield the next token (B) of every text, max_new_tokens times or until all have ended. See generate."""
        if not temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, not {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more, not {top_k}")
        if top_p is not None and not 0 <= top_p <= 1:
            raise ValueError(f"top_p must be from 0 to 1, not {top_p}")

        def pick(hidden):
            return sample(self.logits(hidden), temperature, top_k, top_p)

        context, cache, new = self.config.max_position_embeddings, None, []
        end_ids = as_list(eos_token_id)
        ends = torch.tensor(end_ids, dtype=torch.int64, device=tokens.device)
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for count in range(max_new_tokens):
            if cache is None or cache.length == cache.max_len:
                # Read the prompt; or, when the context is full, its second half again as the beginning of a new one.
                read = max(1, context // 2) if cache else context
                tokens = torch.cat([tokens, *new], dim=1)[:, -read:]
                cache, new = self.new_cache(len(tokens), min(context, tokens.shape[1] + max_new_tokens - count)), []
                token, step = pick(self.hidden_states(tokens, cache)[:, -1]), None
            else:
                step = step or self.decoder(cache, pick)
                token = step(token)
            if len(ends):
                token = token.masked_fill(ended, end_ids[0])  # for ends[0] a GPU's host would wait
                ended |= torch.isin(token, ends)
            new.append(token[:, None])
            yield token
            # Asking a GPU means waiting for it: there every 16th token is often enough.
            if len(ends) and (not token.is_cuda or count % 16 == 15) and ended.all():
                return

    def decoder(self, cache, pick):
        """A function from a token (B) to the next, the fastest for this model; pick chooses it from what the LM head
        sees."""
        use_kernels(self.kernels)
        in_fp32 = all(map(on_cpu_in_fp32, self.parameters()))
        if self.shortcuts and in_fp32 and self.kernels != "triton" and self.config.is_zaya1 and as_written(self):
            decoder = Decoder(self, cache)
            return lambda token: pick(decoder.step(token))

        by_kernels = on_kernels(cache.end)
        # A text alone is hidden_of_one's, which takes any attention, but of the rest ZAYA1's own only
        alone = self.shortcuts and by_kernels and len(cache.layers[0].k) == 1
        alone = alone and as_written(self, PartialCCA, PlainProjection)

        def step(token):
            hidden = hidden_of_one(self, token, cache) if alone else self.hidden_states(token[:, None], cache)[:, -1]
            return pick(hidden)

        if not (self.graph and by_kernels and cache.end.is_cuda):
            return step
        with torch.cuda.device_of(cache.end):
            return captured(step, cache)

    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_token_id=None):
        """Continue tokens (B, T), T >= 1, by up to max_new_tokens -> (B, T + n).

        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the fewest that hold that much probability.
        A text that has met eos_token_id, or one of a list of them, is filled with the first; when all have, generation
        ends. Of a prompt longer than max_position_embeddings only the end is read. Uses PyTorch's global random state.
        ValueError for a temperature, top_k or top_p that means nothing.
        """
        T = tokens.shape[1]
        new = self.next_tokens(tokens, max_new_tokens, temperature, top_k, top_p, eos_token_id)
        tokens = torch.cat([tokens, *[token[:, None] for token in new]], dim=1)
        ends = torch.tensor(as_list(eos_token_id), dtype=torch.int64, device=tokens.device)
        if len(ends):  # on a GPU some tokens may have come after the last text's end
            unended = int((~torch.isin(tokens[:, T:], ends)).any(dim=0).sum())  # steps in which some text had not ended
            tokens = tokens[:, : T + unended + 1]
        return tokens

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save_pretrained(self, path, state=None, legacy=False):
        """Write config.json and model.safetensors to a directory, which `transformers` opens if the model is a ZAYA1.

        state: other tensors than this model's own state_dict(), fp32 masters say, under the same names. legacy: in the
        form of [Z], which SGLang opens; ValueError if the model is no ZAYA1, or has a sliding window of one token.
        """
        path, tensors = Path(path), official_names(state or self.state_dict())
        dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
        values = (config_to_legacy if legacy else config_to_json)(self.config, dtype)
        if legacy:
            tensors = {legacy_name(name, self.config): tensor for name, tensor in one_by_one(tensors).items()}
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        save_safetensors(path / "model.safetensors", tensors)

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, kernels="auto"):
        """Read a checkpoint, or a run directory's newest one, straight to a device; dtype None keeps the stored one.

        Raises FileNotFoundError or ValueError, in one line, for what is missing, damaged or of another shape.
        """
        path = find_checkpoint(path)
        config = read_config(path)
        headers = {file: safetensors_header(file) for file in weight_files(path)}
        dtypes = {name.removeprefix("model."): kind for h in headers.values() for name, (kind, *_) in h.items()}
        with torch.device("meta"):
            model = cls(config, kernels)
        model.cast(dtype or dtypes.get("embed_tokens.weight", torch.float32))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if torch.device(device).type == "cpu" and 0 < (free := free_memory()) < size:
            warn_once(f"{path} takes {size / 1e9:.3g} GB in {model.head.dtype}, {free / 1e9:.3g} GB are free")
        model.to_empty(device=device)
        for router in model.routers:
            router.counts.zero_()  # no checkpoint holds it
        model.load_official(headers)
        return model

    @torch.no_grad()
    def load_official(self, headers):
        """Read this model's tensors from official files, native or legacy, {path: its header}, each straight to its
        place: no second copy in memory. ValueError, naming one, if a tensor is missing, unknown, of another shape, or
        not finite."""
        unread, native_names = official_names(self.state_dict()), {}
        if any(".zaya_block." in name for header in headers.values() for name in header):
            unread = one_by_one(unread)
            native_names = {legacy_name(name, self.config): name for name in unread}
        for path, header in headers.items():
            with open(path, "rb") as file:
                for name, (dtype, shape, start, _) in header.items():
                    place = native_names.get(name, name)
                    if f"model.{place}" in unread:  # [T]'s ZayaModel, which has no LM head, leaves "model." out
                        place = f"model.{place}"
                    if place == "lm_head.weight" and self.config.tie_word_embeddings:
                        continue  # the embedding once more
                    if place not in unread:
                        raise ValueError(f"{path} holds a tensor that this model does not have, {name}")
                    target = unread.pop(place)
                    if shape != list(target.shape):
                        raise ValueError(f"{path}: {name} is {shape}, this model's is {list(target.shape)}")
                    file.seek(start)
                    read_tensor(file, dtype, target)
                    # Unlike isfinite of the whole, the two extremes take no memory.
                    if target.numel() and not torch.stack(target.aminmax()).isfinite().all():
                        raise ValueError(f"{path}: {name} holds numbers that are not finite")
        if unread:
            raise ValueError(f"{path.parent} lacks {len(unread)} tensors of this model, {min(unread)} first")

    @property
    def routers(self):
        return [layer.mlp.gate for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def parameter_counts(self):
        """(all parameters, those active for a token without the embedding), as [R] counts."""
        total = sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return total, total - self.embed_tokens.weight.numel() - experts + experts // self.config.num_experts


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: the cache, how a token is chosen, and what is done another way for one new token a text


class LayerCache:
    """What one layer remembers of the past: all keys and values; and, in `recent`, the last few tokens' qkv, for CCA's
    convolutions and value shift. `recent` is a ring: the token at position t has row t % size. It has one row more than
    cca looks at, so that a step which captured() tries and takes back overwrites nothing that is still needed."""

    def __init__(self, config, k, v, recent, end):
        self.k, self.v, self.recent, self.end = k, v, recent, end
        Hq, Hk, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.past_tokens, self.C, self.late = config.past_tokens, (Hq + Hk) * h, Hk * h // 2
        self.newest = None  # Cache.advance sets it
        self.projection = None  # CCA.projection's result: while a cache lives, no weight changes

    @staticmethod
    def shapes(config, max_len):
        """Of k, v and recent, for one text."""
        Hq, Hk, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return (max_len, Hk, h), (max_len, Hk, h), (max(config.past_tokens, 1) + 1, (Hq + 2 * Hk) * h)

    def past(self, rows):
        """What cca calls past and v_before. rows: those of `recent` that hold the tokens before the newest, oldest
        first: Newest.rows_before."""
        recent = self.recent[:, rows]
        return recent[:, len(rows) - self.past_tokens :, : self.C], recent[:, -1:, -self.late :]

    def remember(self, qkv):
        """Take in qkv (B, T, C + Hk * h) of the newest tokens; return past and v_before."""
        past = self.past(self.newest.rows_before)
        self.recent.index_copy_(1, self.newest.rows, qkv[:, -self.recent.shape[1] :])
        return past

    def append(self, k, v):
        """Take in the keys and values (B, T, Hk, h) of the newest tokens; return all, (B, S, Hk, h) each."""
        self.k.index_copy_(1, self.newest.positions, k)
        self.v.index_copy_(1, self.newest.positions, v)
        return self.k[:, : self.newest.end], self.v[:, : self.newest.end]


class Newest:
    """Where the newest tokens lie in a cache: at positions (T), of which the last is end - 1, and in rows of `recent`,
    which has `size` of them. Asked for by each layer, computed once."""

    def __init__(self, positions, end, size):
        self.positions, self.end, self.size = positions, end, size

    @cached_property
    def rows(self):
        return self.positions[-self.size :] % self.size

    @cached_property
    def rows_before(self):
        return (self.positions[0] - torch.arange(self.size - 1, 0, -1, device=self.positions.device)) % self.size


class Cache:
    """The decoding state of a batch of texts: for each layer 2 * Hk * h numbers a token, and a few rows of qkv.

    Buffers are allocated once, and positions are read on the device: so a step can be captured in a graph.
    """

    def __init__(self, model, batch_size, max_len):
        self.max_len, self.length = max_len, 0
        device, dtype = model.embed_tokens.weight.device, model.layers[0].self_attn.o_proj.weight.dtype
        self.end = torch.zeros((), dtype=torch.int32, device=device)  # length, where a kernel can read it
        self.rotary = model.rotary(torch.arange(max_len, device=device))
        self.nothing = torch.zeros(model.config.hidden_size, device=device)  # for hidden_of_one
        sizes = [(len(model.layers), batch_size, *shape) for shape in LayerCache.shapes(model.config, max_len)]
        buffers = [torch.zeros(size, device=device, dtype=dtype) for size in sizes]  # one call for all layers
        # To autograd (.data) each layer's is a tensor of its own, which may be written to.
        self.layers = [LayerCache(model.config, *(part.data for part in parts), self.end) for parts in zip(*buffers)]
        for layer, block in zip(self.layers, model.layers):
            layer.projection = block.self_attn.qkv_proj.projection().detach()

    def advance(self, T):
        """Make room for T new tokens of each text -> what Zaya.rotary says of their positions. Raises ValueError if
        there is none."""
        if self.length + T > self.max_len:
            raise ValueError(f"{self.length + T} tokens do not fit a cache of {self.max_len}")
        positions = torch.arange(T, device=self.end.device) + self.end
        self.length += T
        self.end += T
        newest = Newest(positions, self.length, self.layers[0].recent.shape[1])
        for layer in self.layers:
            layer.newest = newest
        return {name: (cos[positions], sin[positions]) for name, (cos, sin) in self.rotary.items()}


def as_written(model, *more):
    """Whether a model is made of ZAYA1's own modules (and `more`), none of them replaced, subclassed or hooked: what
    takes the place of hidden_states calls none of them, so it would pass over what somebody put there."""
    own = {nn.Embedding, nn.Linear, nn.Conv1d, nn.ModuleList, nn.ModuleDict, nn.ParameterDict, RMSNorm, CCA, Attention}
    own |= {Router, Experts, MixtureOfExperts, ResidualScaling, Block, *more}
    parts = [part for part in model.modules() if part is not model]
    changed = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    own_way = type(model).hidden_states is Zaya.hidden_states and {type(part) for part in parts} <= own
    return own_way and not changed


def sample(logits, temperature, top_k, top_p):
    """One token a row of logits (B, V), as Zaya.generate says -> (B)."""
    if temperature < 1e-37:  # to divide by less overflows fp32
        return logits.argmax(dim=-1)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # so that no temperature overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:  # else rounding would cut the tail of a large vocabulary
        probabilities, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what stands before it is enough already
        beyond[:, 0] = False  # the likeliest stays, even for a top_p that is 0 in fp32
        logits = logits.masked_fill(beyond.scatter(-1, tokens, beyond), float("-inf"))  # back in order of token ids
    probabilities = logits.softmax(dim=-1)  # torch.multinomial's way to draw one, less its checks
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def captured(step, cache):
    """step (token (B) -> next token), which moves cache on, as one launch: a graph of CUDA's or HIP's, replayed."""
    token = torch.zeros(len(cache.layers[0].k), dtype=torch.int64, device=cache.end.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, and sets aside what they need
        for _ in range(2):
            step(token)
            cache.length -= 1  # and back; for this `recent` has a row to spare
            cache.end -= 1
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # the same: libraries keep a handle, made beforehand, for each stream
        after = step(token)
    cache.length -= 1  # capturing ran no kernel; only the CPU's count has moved

    def replay(new):
        token.copy_(new)
        graph.replay()
        cache.length += 1
        return after.clone()

    return replay


@has_kernel
def cca_step(qkv, cache, depthwise, grouped, temp, cos, sin):
    """cca of one new token a text, qkv (B, 1, C + Hk * h), whose past a LayerCache holds -> q (B, 1, Hq, h). The cache
    takes the token in."""
    q, k, v = cca(qkv, *cache.remember(qkv), depthwise, grouped, temp, cos, sin)
    cache.append(k, v)
    return q


@has_kernel
def attend_past(q, k, v, end, window=None):
    """The attention of one new token a text, q (B, 1, Hq, h), over a cache's k and v (B, max_len, Hk, h), of which the
    first `end` positions are filled (an int32 tensor that lies where q does), its own the last -> (B, 1, Hq * h)."""
    return attend(q, k[:, : int(end)], v[:, : int(end)], window)


# Up to so many, on a CPU (False) and on a GPU, each token's expert is read for it alone, if no gradient is wanted. (A
# CPU takes 22.4 ms for a prompt of 16 by experts_on_cpu, 25.7 token by token; for 8 the same.)
FEW_TOKENS = {False: 8, True: 16}


@has_kernel
def experts_of_few(x, probability, choice, gate_up, down):
    """dispatch, experts and combine for a few tokens, without a gradient: reads no expert that nobody chose."""
    out = torch.zeros_like(x)  # which is what a skipped token adds
    for n, expert in enumerate(choice.tolist()):
        if expert < len(down):
            row = slice(n, n + 1)
            gate, up = product(x[row], gate_up[expert]).chunk(2, dim=1)
            out[row] = product(F.silu(gate) * up, down[expert]) * probability[n]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Not ZAYA1: what it is compared with. Skip this section on a first reading.


class PartialCCA(CCA):
    """CCA without some of its parts."""

    def __init__(self, config):
        super().__init__(config)
        self.without, self.heads = config.cca_without, (config.num_attention_heads, config.num_key_value_heads)
        for convolution in {"depthwise", "grouped"} & set(self.without):
            delattr(self, f"conv_qk_{convolution}")

    def mix(self, qkv, temp, cos, sin, cache):
        past, v_before = self.take_past(qkv, cache)
        (B, T, width), (Hq, Hk), C, late = qkv.shape, self.heads, past.shape[2], v_before.shape[2]
        qk, v_current, v_delayed = qkv.split([C, width - C - late, late], dim=-1)
        mixed = torch.cat([past, qk], dim=1)
        if "depthwise" not in self.without:
            mixed = depthwise_conv(mixed, self.conv_qk_depthwise.weight, self.conv_qk_depthwise.bias)
        if "grouped" not in self.without:
            mixed = grouped_conv(mixed, self.conv_qk_grouped.weight, self.conv_qk_grouped.bias, Hq + Hk)
        mixed = mixed.float()
        if "qk_mean" not in self.without:
            mixed = mixed + qk_mean(qk.float(), Hq, Hk)
        if "value_shift" not in self.without:
            v_delayed = torch.cat([v_before, v_delayed[:, :-1]], dim=1)
        mixed = rotate(normalize_heads(mixed.view(B, T, Hq + Hk, -1), temp), cos, sin).to(qkv.dtype)
        q, k = mixed.split([Hq, Hk], dim=2)
        return q, k, torch.cat([v_current, v_delayed], dim=-1).view(B, T, Hk, -1)


class PlainProjection(nn.Module):
    """The queries, keys and values of conventional attention, in the place of CCA."""

    def __init__(self, config):
        super().__init__()
        D, self.h = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * self.h, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * self.h, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * self.h, bias=False)

    projection, forward = CCA.projection, CCA.forward

    def mix(self, qkv, temp, cos, sin, cache):
        sizes = [part.out_features for part in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (part.unflatten(-1, (-1, self.h)) for part in qkv.split(sizes, dim=-1))
        return rotate(q, cos, sin).to(q.dtype), rotate(k, cos, sin).to(k.dtype), v


class LinearRouter(Router):
    """The usual router: one matrix from a token to its classes."""

    def __init__(self, config):
        super().__init__(config, layer=0)
        del self.down_proj, self.router_mlp
        self.out_proj = nn.Linear(config.hidden_size, config.num_experts + 1, bias=False)

    def forward(self, x, previous):
        probabilities = linear(x, self.out_proj.weight).float().softmax(dim=-1)
        probability, choice, counts = choose(probabilities, self.balancing_biases)
        self.count(counts)
        return probability, choice, None


class PlainSum(nn.Module):
    """stream <- stream + out, in the place of ResidualScaling."""

    def forward(self, stream, out, norm):
        stream = stream + out
        return stream, norm(stream).to(out.dtype)


class DenseMLP(nn.Module):
    """One SwiGLU of width F, in the place of router and experts."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, router_state):
        gate, up = linear(x, self.gate_up_proj.weight).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, self.down_proj.weight), router_state


# ---------------------------------------------------------------------------------------------------------------------
# Products and gradients: what the architecture above calls, written so that it takes little time and memory.
# linear takes any shape and has a gradient; times takes two matrices, without one, and product a few rows and a matrix;
# grouped_linear has a matrix for each expert, grouped_product the same without a gradient. Skip this section on a first
# reading: each docstring begins with what is computed, the rest is how to be quick.


def first_derivative(backward):
    """Decorate a Function's backward that autograd cannot differentiate again: RuntimeError if asked to, by
    create_graph=True, where it would leave out parts of the second derivative without a word."""

    @wraps(backward)
    def once(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # (which says so itself)
            raise RuntimeError("there is no gradient of this model's gradients (create_graph=True)")
        return backward(ctx, grad)

    return once


def linear(x, weight, bias=None):
    """x (..., in) times weight (out, in), plus bias, in the weight's dtype: here fp32 becomes the compute dtype."""
    x = x.to(weight.dtype)
    if takes_onednn(x):
        by = LinearByOneDNN.apply if torch.is_grad_enabled() else times
        y = by(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def grouped_linear(x, weight, offsets):
    """Rows of x (N, in), sorted by expert, times their own expert's weight (E, out, in) -> (N, out).

    offsets (E): where each expert's rows end. In bf16 on an NVIDIA GPU the host need not wait for them; in
    GroupedLinear (other dtypes, widths that are no multiple of 16 bytes) and in grouped_mm's own loop on ROCm it must.
    """
    if takes_grouped_mm(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    rows = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    return GroupedLinear.apply(x, weight, rows)


def takes_grouped_mm(x, weight):
    return x.is_cuda and x.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape[1:])


def inverse_permutation(order):
    """The permutation that undoes another (N)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def move_rows(x, place):
    """Row n of x (N, D) to row place[n]. Its gradient is one copy back; that of an index, as in y[place], would add
    rows one by one."""
    return torch.empty_like(x).index_copy_(0, place, x)


def experts_on_cpu(x, probability, choice, gate_up, down):
    """dispatch, experts and combine on a CPU, with each expert's rows padded for oneDNN, as places says."""
    if torch.compiler.is_compiling():  # how many tokens each expert gets, and so the shapes, only the run will tell
        return torch.compiler.disable(experts_on_cpu)(x, probability, choice, gate_up, down)
    place, rows = places(choice, len(down))
    x = x.new_zeros(sum(rows), x.shape[1]).index_copy_(0, place, x)
    gate, up = GroupedLinear.apply(x, gate_up, rows).chunk(2, dim=-1)
    y = GroupedLinear.apply(F.silu(gate) * up, down, rows)
    return y.index_select(0, place) * probability[:, None].to(y.dtype)


def places(choice, E):
    """Where each token goes when they are sorted by expert (N), and how many rows each expert has there (E).

    For oneDNN each expert's rows are filled up with zeros to a multiple of a quarter of an even share, so that few
    shapes occur: for one that it has not seen it compiles a product, which takes 0.6 ms where the product takes 0.2. A
    step of nano takes 400 ms this way, 464 to 501 without. (By MKL a step is 3 % faster without.)
    """
    counts = choice.bincount(minlength=E)
    fill = -counts % max(1, len(choice) // (4 * E) if ONEDNN else 1)
    place = inverse_permutation(choice.argsort(stable=True))
    return place + (fill.cumsum(dim=0) - fill)[choice], (counts + fill).tolist()


class GroupedLinear(torch.autograd.Function):
    """x (sum(rows), in), cut into E pieces of rows[e] rows, each times its own weight[e].T, weight (E, out, in)
    -> (sum(rows), out)."""

    @staticmethod
    def forward(ctx, x, weight, rows):
        ctx.save_for_backward(x, weight)
        ctx.rows = rows
        return grouped_product(x, weight, rows)

    @staticmethod
    @first_derivative
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        for grad_e, x_e, out_e in zip(grad.split(ctx.rows), x.split(ctx.rows), grad_weight):
            times(grad_e.t(), x_e.t(), out=out_e)
        return grouped_product(grad, weight.mT, ctx.rows), grad_weight, None


def grouped_product(x, weight, rows):
    """What GroupedLinear computes, without a gradient."""
    out = x.new_empty(len(x), weight.shape[1])
    for x_e, w_e, out_e in zip(x.split(rows), weight, out.split(rows)):
        times(x_e, w_e, out=out_e)
    return out


def attend_in_blocks(q, k, v, window, size=128):
    """attend for bf16 on a CPU, a block of queries at a time: one product for all heads that share a key head, and none
    with keys that the whole block must not see.

    Forward and backward of 8 x 256 tokens, 4 query heads of 32, take 4.3 ms; the CPU's fused kernel takes 10.3. In fp32
    it is 6.7 and 7.4, and in a whole step no gain, for the blocks keep their scores and the fused kernel does not.
    Without a gradient scores are fp32. With one they are bf16: the larger the temperatures, the coarser.
    """
    (B, T, Hq, h), S, Hk = q.shape, k.shape[1], k.shape[2]
    group, cached = Hq // Hk, S - T
    q = q.view(B, T, Hk, group, h).permute(0, 2, 3, 1, 4).reshape(B * Hk, group, T, h)
    k, v = k.transpose(1, 2).reshape(B * Hk, S, h), v.transpose(1, 2).reshape(B * Hk, S, h)
    if not torch.is_grad_enabled():
        q, k = q.float(), k.float()
    out = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first, stop = max(0, cached + start + 1 - window), cached + end  # the keys that some query sees
        seen = visible(cached + start, first, stop, window, q.device)
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf")).repeat(group, 1)
        queries = q[:, :, start:end].reshape(B * Hk, -1, h)
        scores = torch.baddbmm(bias, queries, k[:, first:stop].mT, alpha=1 / math.sqrt(h))
        out.append((scores.softmax(dim=-1).to(v.dtype) @ v[:, first:stop]).view(B, Hq, end - start, h))
    return torch.cat(out, dim=2).transpose(1, 2).flatten(2)


def normalize(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if torch.is_grad_enabled():
        return Normalize.apply(x, weight.to(x.dtype), eps)
    return (x * inverse_rms(x, eps)).mul_(weight)


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays. 2,048 rows of 256 take two cores 0.2 ms by their
    lengths, 0.6 by the mean of their squares."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(length.square() / x.shape[-1] + eps)


class Normalize(torch.autograd.Function):
    """normalize, with its gradient in four passes (autograd's own takes a dozen)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        # Not in place: of what a Function changes in place and returns, PyTorch 2.11 compiles a gradient of zero.
        return x * inverse * weight

    @staticmethod
    @first_derivative
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        grad_x = grad * x
        grad_weight = inverse.flatten() @ grad_x.flatten(0, -2)
        along_x = (grad_x @ weight)[..., None] * inverse**3 / x.shape[-1]
        grad_x = torch.mul(grad, weight, out=grad_x).mul_(inverse).addcmul_(x, along_x, value=-1)
        return grad_x, grad_weight, None


# Of logits, on a CPU (False) and on a GPU: numbers in a chunk (4 MB of fp32 stay in a cache, 1 GB of bf16 keeps a GPU
# busy); and of what the vocabulary is made a multiple (a GPU's fast products want rows that begin at multiples of 16
# bytes).
LOGITS_AT_ONCE = {False: 2**20, True: 2**29}
VOCABULARY_MULTIPLE = {False: 1, True: 64}
FEWEST_ROWS = 128  # no fewer, for each chunk reads the whole head three times


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(hidden @ weight.T) without ever holding the N x V logits.

    A chunk of tokens at a time: logits, loss and, already in the forward pass, their gradient. What is kept for the
    backward pass are the two gradients alone, which it changes: it runs once, and retain_graph=True is of no use. Loss
    and softmax are fp32, logits in the compute dtype, as [T] has them; [R] says fp32, with which a bf16 nano of an
    earlier recipe was no better: 1.453 and 1.605 bits a byte with two seeds, 1.453 and 1.594 with bf16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_gradient):
        N, V, on_gpu = max(1, len(hidden)), len(weight), hidden.is_cuda  # of nothing the loss is 0
        if padding := -V % VOCABULARY_MULTIPLE[on_gpu]:  # classes without a token, and so without a probability
            weight = F.pad(weight, (0, 0, 0, padding))
        loss = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if with_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        chunks = math.ceil(N / max(FEWEST_ROWS, LOGITS_AT_ONCE[on_gpu] // V))
        rows = math.ceil(N / chunks)
        for i, (x, y) in enumerate(zip(hidden.split(rows), targets.split(rows))):
            losses, grad = cross_entropy(times(x, weight), y, V, with_gradient)
            loss = loss + losses.sum() / N  # not in place, as in Normalize
            if with_gradient:
                grad_hidden[i * rows : (i + 1) * rows] = times(grad, weight.t())
                grad_weight += times(grad.t(), x.t())
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:V])
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @first_derivative
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / max(1, len(grad_hidden))
        return grad_hidden * grad, grad_weight.mul_(grad).to(ctx.weight_dtype), None, None


@has_kernel
def cross_entropy(logits, targets, V, with_gradient):
    """Of logits (n, V or more, of which only V count) and targets (n) the loss of each row (n), fp32, and the gradient
    of their sum, softmax - one_hot, in logits' dtype and shape; or None. What does not count may be overwritten."""
    if logits.shape[1] > V:
        logits[:, V:] = float("-inf")
    log_p = logits.log_softmax(dim=1, dtype=torch.float32)
    losses = -log_p.gather(1, targets[:, None]).squeeze(1)
    return losses, minus_one_hot(log_p.exp_(), targets).to(logits.dtype) if with_gradient else None


def minus_one_hot(p, y):
    """p (n, V) - one_hot(y). torch.compile fuses the comparison with its neighbours; a scatter it would not."""
    if torch.compiler.is_compiling():
        return p - (torch.arange(p.shape[1], device=y.device) == y[:, None]).float()
    return p.scatter_add_(1, y[:, None], p.new_full((len(p), 1), -1.0))


def times(a, b, out=None):
    """a @ b.T of two matrices. In fp32 on a CPU oneDNN is a little faster than MKL, PyTorch's own choice, but it copies
    an a that is transposed."""
    if takes_onednn(a) and a.numel() > 0 and (a.is_contiguous() or mkl_is_slow()):
        y = by_onednn(a, b)
        return y if out is None else out.copy_(y)
    return torch.mm(a, b.t(), out=out)


@lru_cache
def cpu_has(line):
    """Whether Linux says so of this CPU, by a line of /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and re.search(rf"^{line}$", cpuinfo.read_text(), re.MULTILINE) is not None


# On Intel's own CPUs MKL is the faster one, for a single row, too (Ice Lake, two cores: a step of
# tests/bench_transformers.py takes 581 ms with it, 646 with oneDNN).
INTEL = cpu_has(r"vendor_id\s*: GenuineIntel")
ONEDNN = torch.backends.mkldnn.is_available() and not INTEL


def on_cpu_in_fp32(x):
    return x.device.type == "cpu" and x.dtype == torch.float32


def takes_onednn(x):
    """Whether products of x may go to oneDNN. torch.compile makes its own choice."""
    return ONEDNN and on_cpu_in_fp32(x) and not torch.compiler.is_compiling()


def by_onednn(a, b):
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def mkl_is_slow():
    """Whether MKL leaves half of this CPU unused: on Zen 5 (AMD's family 26) oneDNN is twice as fast, elsewhere hardly
    faster. Not timed: the two round differently, and a run that is resumed must choose the same again."""
    return cpu_has(r"cpu family\s*: 26")


class LinearByOneDNN(torch.autograd.Function):
    """x (N, in) times weight (out, in)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return times(x, weight)

    @staticmethod
    @first_derivative
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return times(grad, weight.t()), times(grad.t(), x.t())


class PreparedProduct:
    """x (B, in) times a weight (out, in), as fast as the weight can be read from memory.

    One row, the weight read from memory: for 512 x 256 MKL's product of a matrix and a vector (one core) takes 79 us,
    oneDNN's 49, a batch of 16 pieces of the weight (two cores) 29; for 4096 x 256: 544, 283 and 124 us. Below 2^15
    numbers the plain product is the fastest. Several rows: the plain product below 2^17 numbers, then oneDNN's.
    On Intel's CPUs it always is the plain product: 26 us for that one row, where the pieces take 89. (By torch.mm: with
    F.linear, which transposes the weight each time, a whole token takes 2 % longer.) out (B, out): where to write it.
    """

    def __init__(self, weight):
        self.weight, self.weight_t, (self.out, self.size) = weight, weight.t(), weight.shape
        self.pieces = math.gcd(self.out, 16) if weight.numel() >= 2**15 and not INTEL else 1
        self.in_pieces = weight.view(self.pieces, -1, self.size)
        self.by_onednn = ONEDNN and weight.numel() >= 2**17

    def __call__(self, x, out=None):
        if self.pieces > 1 and len(x) == 1:
            column = x.as_strided((self.pieces, self.size, 1), (0, 1, self.size))  # x.t(), as often as there are pieces
            out = None if out is None else out.view(self.pieces, -1, 1)
            return torch.bmm(self.in_pieces, column, out=out).view(1, self.out)
        if not self.by_onednn:
            return torch.mm(x, self.weight_t, out=out)
        y = by_onednn(x, self.weight)
        return y if out is None else out.copy_(y)


@has_kernel
def product(x, weight):
    """x (B, in), few rows, times weight (out, in) -> (B, out), without a gradient: on a CPU one PreparedProduct."""
    return PreparedProduct(weight)(x) if on_cpu_in_fp32(weight) else F.linear(x, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Eager PyTorch or Triton: which of them a function marked @has_kernel is to be

KERNELS = ("auto", "triton", "eager")
_kernels = "auto"


def use_kernels(choice):
    """From now on: "auto" (kernels on a GPU, unless torch_is_faster), "triton" (all of them; says so where they cannot
    run, and takes Triton's interpreter on a CPU if TRITON_INTERPRET=1), or "eager". Every forward of a model calls this
    with its own choice."""
    global _kernels
    if choice not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {choice}")
    _kernels = choice


def on_kernels(x):
    """Whether kernels are wanted, and can run where x lies."""
    if _kernels == "eager" or (_kernels == "auto" and not x.is_cuda):
        return False
    if triton_kernels is not None and triton_kernels.can_run_on(x.device):
        return True
    reason = "Triton is not installed" if triton_kernels is None else f"no kernels on {x.device}"
    warn_once(f"{reason}: eager PyTorch is used")
    return False


def torch_is_faster(x, gate_up):
    """Whether `experts` is better left to torch.compile, which fuses SwiGLU between torch's grouped products. An H200
    then takes 0.627 ms for kernels.py's 0.678, and backward 1.382 for 1.478 (ZAYA1-8B's shapes, 16,384 tokens)."""
    return _kernels == "auto" and torch.compiler.is_compiling() and takes_grouped_mm(x, gate_up) and on_hopper()


def on_hopper():
    return triton_kernels.architecture() == "sm_90"


def warn_once(message, said=set()):  # noqa: B006 the set is to live on
    """Print a message to stderr, the first time only."""
    if message not in said:
        said.add(message)
        print(f"zaya.py: {message}", file=sys.stderr)


# torch.compile then runs these two while tracing, and need not break the graph there. It is the flag that
# torch.compiler.assume_constant_result sets, but that imports the whole compiler: every start would take a second more.
warn_once._dynamo_marked_constant = on_hopper._dynamo_marked_constant = True


# ---------------------------------------------------------------------------------------------------------------------
# Which configurations there are, and which there can be


def complete(config):
    """Fill in what follows from other fields of a ZayaConfig, and check them all: ValueError, in one line."""
    if config.num_hidden_layers > 10_000:  # merely to build more would take hours
        raise ValueError(f"num_hidden_layers must be at most 10,000, not {config.num_hidden_layers}")
    if set(config.layer_types or ["hybrid"]) == {"hybrid"}:  # however many: replace() may have changed their number
        config.layer_types = ["hybrid"] * config.num_hidden_layers
    if config.attention == "mha" and config.head_dim:  # the conventional twin: no compression, a key head a query head
        config.num_attention_heads = config.num_key_value_heads = config.hidden_size // config.head_dim
    for name in [f.name for f in fields(config) if f.type is int]:
        if not 1 <= getattr(config, name) < 2**31:
            raise ValueError(f"{name} must be at least 1 and below 2^31, not {getattr(config, name)}")
    if not 0 <= (config.bos_token_id or 0) < 2**31:
        raise ValueError(f"bos_token_id must be 0 or more and below 2^31, not {config.bos_token_id}")
    if not all(type(i) is int and abs(i) < 2**31 for i in as_list(config.eos_token_id)):
        raise ValueError(f"eos_token_id must be an id or a list of ids, not {config.eos_token_id}")
    Hq, Hk = config.num_attention_heads, config.num_key_value_heads
    if Hq % Hk:
        raise ValueError(f"num_attention_heads {Hq} is no multiple of num_key_value_heads {Hk}")
    if config.head_dim % 4:
        raise ValueError(f"head_dim {config.head_dim} is not divisible by 4")
    if not 0 < config.partial_rotary_factor <= 1 or config.rotary_dim % 2:
        raise ValueError(
            f"partial_rotary_factor {config.partial_rotary_factor} does not rotate an even number of channels"
        )
    positive = config.rope_theta, config.sliding_rope_theta, config.rms_norm_eps, config.initializer_range
    if not all(0 < x < math.inf for x in positive):
        raise ValueError("rope_theta, sliding_rope_theta, rms_norm_eps and initializer_range must be positive")
    if len(config.layer_types) != config.num_hidden_layers or set(config.layer_types) - {"hybrid", "hybrid_sliding"}:
        raise ValueError(f'layer_types must name {config.num_hidden_layers} layers, each "hybrid" or "hybrid_sliding"')
    if "hybrid_sliding" in config.layer_types and not 1 <= (config.sliding_window or 0) < 2**31:
        raise ValueError("sliding_window must be at least 1, and below 2^31, where layer_types has hybrid_sliding")
    choices = {"attention": ("cca", "gqa", "mha"), "mlp": ("moe", "dense"), "router": ("zaya", "no_eda", "linear")}
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f'{name} "{getattr(config, name)}" is none of {", ".join(known)}')
    without = set(config.cca_without or [])
    config.cca_without = sorted(without) or None
    if without and (config.attention != "cca" or without - set(CCA_PARTS)):
        raise ValueError(f"cca_without names parts of attention cca, of {', '.join(CCA_PARTS)}")
    if "depthwise" in without:
        config.cca_time0 = 1
    if "grouped" in without:
        config.cca_time1 = 1


def as_list(ids):
    """The ids that a config's *_token_id stands for: none, one or several."""
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def replica(hidden_size, num_hidden_layers, head_dim, vocab_size=50257, max_position_embeddings=4096):
    """A ZAYA1 of another size in the official proportions: queries D / 2, keys D / 8, F = D, R = D / 8, 16 experts.

    Fresh weights have the standard deviation D^-0.5, which at ZAYA1's width is its 0.02. For nano after 60 steps the
    validation loss was 4.58 this way and 4.66 with 0.02; for tiny Shakespeare (D = 128, 250 steps) 1.604 and 1.625.
    """
    return ZayaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, head_dim=head_dim,
        num_attention_heads=hidden_size // 2 // head_dim, num_key_value_heads=hidden_size // 8 // head_dim,
        moe_intermediate_size=hidden_size, router_hidden_size=hidden_size // 8, rope_theta=1e4,
        max_position_embeddings=max_position_embeddings, initializer_range=hidden_size**-0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


PRESETS = {
    # A laptop's CPU, minutes. In equal time two layers reach 1.43 bits a byte, three 1.53: more tokens beat more depth.
    "nano": replica(256, 2, 32, vocab_size=2048, max_position_embeddings=256),
    "mini": replica(512, 12, 64, max_position_embeddings=1024),  # one GPU
    "small": replica(1024, 20, 128),  # one GPU or one node
    "medium": replica(2048, 20, 128),  # one node
    "zaya1-8b": ZayaConfig(),
}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding on a CPU in fp32: Zaya.hidden_states for one new token a text. Each call of PyTorch costs microseconds there,
# whatever it does, so a layer makes do with some fifty. Skip this section on a first reading.


class Decoder:
    """Takes over from a cache that has read the prompt."""

    def __init__(self, model, cache):
        config, self.cache = model.config, cache
        self.embedding, self.scale = model.embed_tokens.weight, model.input_hidden_states_scale
        self.bias = model.input_hidden_states_bias * self.scale
        self.unit_vectors = torch.eye(config.head_dim)
        norms = [DecoderNorm(layer.input_layernorm) for layer in model.layers] + [DecoderNorm(model.norm, whole=True)]
        self.first_norm = norms[0]
        parts = zip(model.layers, cache.layers, norms, norms[1:], config.layer_types)
        self.layers = [DecoderLayer(config, *part) for part in parts]

    def step(self, tokens):
        """tokens (B) -> what the LM head sees (B, D). next_tokens, which calls it, has turned gradients off."""
        position = self.cache.length
        self.cache.length += 1
        stream = torch.addcmul(self.bias, F.embedding(tokens, self.embedding), self.scale)
        normed, state = self.first_norm(stream), None
        # (h, h) each: a head times such a matrix is the head rotated
        rotary = self.cache.rotary.items()
        turns = {name: rotate(self.unit_vectors, cos[position], sin[position]) for name, (cos, sin) in rotary}
        for layer in self.layers:
            out = layer.attention(normed, turns[layer.layer_type], position)
            stream, normed = layer.merge(stream, out, *layer.after_attention)
            out, state = layer.experts(normed, state)
            stream, normed = layer.merge(stream, out, *layer.after_experts)
        return normed


class DecoderNorm:
    """RMSNorm of (B, D) in three calls: x / hypot(|x|, sqrt(D * eps)), as sqrt(D) is in the weight. That is for the
    product that follows; `whole`: a fourth call multiplies by it."""

    def __init__(self, norm, whole=False):
        size = len(norm.weight)
        self.weight, self.root, self.whole = norm.weight * math.sqrt(size), torch.tensor(size * norm.eps).sqrt(), whole

    def __call__(self, x):
        x = x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.root)
        return x.mul_(self.weight) if self.whole else x


class DecoderLayer:
    """A Block with all that does not depend on the token computed beforehand.

    cca's two convolutions are one here, of P + 1 taps: the first scales channel i by w[i, a], the second mixes by
    W[b, i, o], tap a + b by their product; and qk_mean a product with a fixed H x H matrix. GELU(x), which is
    x / 2 (1 + erf(x / sqrt 2)), is (u + u erf u) / sqrt 2 with u = x / sqrt 2: the roots are in the weights around it.
    """

    def __init__(self, config, block, cache, norm, next_norm, layer_type):
        self.layer_type = layer_type
        self.prepare_attention(config, block.self_attn, cache, norm)
        self.prepare_experts(block.mlp.gate, block.mlp.experts)
        after = DecoderNorm(block.post_attention_layernorm, whole=True)
        self.after_attention = self.merging(block.post_attention_residual_scale, after)
        self.after_experts = self.merging(block.post_mlp_residual_scale, next_norm)

    def prepare_attention(self, config, attention, cache, norm):
        self.window, part = attention.window, attention.qkv_proj
        Hq, Hk, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        B, H, taps, self.eps = len(cache.k), Hq + Hk, config.past_tokens + 1, torch.finfo(torch.float32).eps
        end = cache.newest.end  # of the prompt; as if the next token, at that position, were the newest:
        past, v_before = cache.past(Newest(torch.tensor([end]), end + 1, cache.recent.shape[1]).rows_before)
        self.v_delayed = v_before[:, 0]
        # The convolution sees `taps` tokens. The one at position p has its row in slot p % taps, so that no row moves;
        # instead there are filters for each slot that the newest may be in, put in the order of the slots.
        past = past.reshape(B, -1, H, h).permute(2, 0, 1, 3)  # (H, B, P, h)
        seen = past.new_zeros(H, B, taps, h)
        seen[:, :, torch.arange(end - taps + 1, end) % taps] = past
        self.rows_seen = seen.view(H, B, taps * h)
        self.k, self.v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)  # (B, Hk, max_len, h)
        self.v_rows = cache.v.flatten(2)  # (B, max_len, Hk * h), the same memory
        self.project = PreparedProduct(part.projection(cache) * norm.weight)
        self.o_proj = PreparedProduct(attention.o_proj.weight)
        w = part.conv_qk_depthwise.weight.view(H, h, 1, -1)
        W = part.conv_qk_grouped.weight.view(H, h, h, -1).transpose(1, 2)  # (H, in, out, tap)
        filters = w.new_zeros(H, taps, h, h)
        for a in range(w.shape[3]):
            for b in range(W.shape[3]):
                filters[:, a + b] += w[..., a] * W[..., b]
        bias = (part.conv_qk_depthwise.bias.view(H, 1, h) @ W.sum(dim=3)).view(H, h)
        self.bias = (bias + part.conv_qk_grouped.bias.view(H, h)).expand(B, H, h)
        mean = qk_mean(torch.eye(H)[None], Hq, Hk)  # of one channel: what each head gives to each
        self.mean_of_heads = mean.mT.expand(B, H, H)
        # A query's length is sqrt(h) times attention's scale 1 / sqrt(h), which is 1; a key's is sqrt(h) * temp.
        self.lengths = torch.cat([torch.ones(Hq), math.sqrt(h) * attention.qk_norm["temp"]])[:, None, None]
        # A result that is looked at in parts has a buffer, whose views are made here, once. The projection's has one
        # for each slot, and at least two: the delayed values are used a token later.
        parts, slots, self.slots = (H * h, Hk * h - cache.late, cache.late), torch.arange(taps), []
        for slot in range(max(2, taps)):
            qkv, newest = past.new_empty(B, sum(parts)), slot % taps
            qk, *values = qkv.split(parts, dim=1)
            qk = qk.view(B, H, h)
            filters_of_slot = filters[:, (slots - 1 - newest) % taps].flatten(1, 2)
            self.slots.append((qkv, qk, qk.transpose(0, 1), seen[:, :, newest], *values, filters_of_slot))
        self.mean, self.scaled, turned = past.new_empty(B, H, h), past.new_empty(H, B, h), past.new_empty(H, B, h)
        self.mean_by_head, self.scaled_rows = self.mean.transpose(0, 1), self.scaled.view(H * B, h)
        self.turned_rows, (q, self.new_k) = turned.view(H * B, h), turned.transpose(0, 1).split([Hq, Hk], dim=1)
        self.q = q.unflatten(1, (Hk, -1))  # the queries of a key head as rows

    def prepare_experts(self, gate, experts):
        mlp, root = gate.router_mlp, math.sqrt(0.5)
        self.router_down, self.router_norm = (gate.down_proj.bias, gate.down_proj.weight.t()), DecoderNorm(mlp["norm"])
        self.gamma, self.biases = getattr(gate, "router_states_scale", None), gate.balancing_biases.tolist()
        self.fc1 = mlp["fc1"].bias * root, (mlp["fc1"].weight * self.router_norm.weight).t() * root
        self.fc2 = mlp["fc2"].bias * root, mlp["fc2"].weight.t() * 0.5
        self.classes = mlp["out_proj"].weight.t() * root
        self.gate_up = [PreparedProduct(weight) for weight in experts.gate_up_proj]
        self.down = [PreparedProduct(weight) for weight in experts.down_proj]
        self.hidden = experts.gate_up_proj.new_empty(1, experts.gate_up_proj.shape[1])
        self.gate, self.up = self.hidden.chunk(2, dim=1)
        self.zeros = torch.zeros_like(self.up)  # addcmul takes a number along, but also wants something to add to

    @staticmethod
    def merging(scale, norm):
        s_r, b_r, s_o, b_o = scale.vectors
        return b_r * s_r + b_o * s_o, s_r, s_o, norm

    @staticmethod
    def merge(stream, out, bias, s_r, s_o, norm):
        stream = torch.addcmul(bias, stream, s_r).addcmul_(out, s_o)
        return stream, norm(stream)

    def attention(self, normed, turn, position):
        """normed (B, D), turn (h, h): the rotation at this position -> (B, D)."""
        qkv, qk, qk_by_head, seen, v_current, v_delayed, filters = self.slots[position % len(self.slots)]
        self.project(normed, out=qkv)
        seen.copy_(qk_by_head)
        torch.baddbmm(self.bias, self.mean_of_heads, qk, out=self.mean)
        x = torch.baddbmm(self.mean_by_head, self.rows_seen, filters)  # (H, B, h)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(self.eps)
        torch.mul(x, self.lengths / norm, out=self.scaled)
        torch.mm(self.scaled_rows, turn, out=self.turned_rows)
        self.k.select(2, position).copy_(self.new_k)
        torch.cat([v_current, self.v_delayed], dim=1, out=self.v_rows.select(1, position))
        self.v_delayed = v_delayed
        first = max(0, position + 1 - self.window) if self.window else 0
        count = position + 1 - first
        k, v = self.k.narrow(2, first, count), self.v.narrow(2, first, count)
        out = F.scaled_dot_product_attention(self.q, k, v, scale=1.0)
        return self.o_proj(out.reshape(len(normed), -1))

    def experts(self, normed, previous):
        """normed (B, D), previous: the last layer's router state (B, R) or None -> (B, D), state."""
        bias, weight = self.router_down
        state = torch.addmm(bias, normed, weight)
        state = state if previous is None else torch.addcmul(state, previous, self.gamma)
        (bias1, weight1), (bias2, weight2) = self.fc1, self.fc2
        u = torch.addmm(bias1, self.router_norm(state), weight1)
        u = torch.addmm(bias2, torch.addcmul(u, u, u.erf()), weight2)
        probabilities = torch.mm(torch.addcmul(u, u, u.erf()), self.classes).softmax(dim=-1).tolist()
        if len(probabilities) == 1:
            return self.expert(normed, probabilities[0]), state
        return torch.cat([self.expert(*row) for row in zip(normed.split(1), probabilities)]), state

    def expert(self, x, probabilities):
        """x (1, D) through the expert that these (E + 1), numbers, and the balancing biases choose, times its own."""
        scores = list(map(operator.add, probabilities, self.biases))
        expert = scores.index(max(scores))
        if expert == len(self.down):  # the skip class adds zero
            return torch.zeros_like(x)
        self.gate_up[expert](x, out=self.hidden)
        return self.down[expert](torch.addcmul(self.zeros, F.silu(self.gate), self.up, value=probabilities[expert]))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding one text by kernels: Zaya.hidden_states for its new token. A launch costs microseconds, so each merge is
# computed inside the product that follows it. (For several texts these products would read the matrix once for each
# text, where torch's read it once for all.) Skip this section on a first reading.


def hidden_of_one(model, token, cache):
    """token (1), cache of one text -> what the LM head sees (1, D), without a gradient."""
    use_kernels(model.kernels)
    rotary = cache.advance(1)
    out, state = model.embed_tokens(token), None
    stream, s_r, b_r = out.float(), model.input_hidden_states_scale, model.input_hidden_states_bias
    scaling = s_r, b_r, cache.nothing, cache.nothing  # the input affine is a merge that `out` has no part in
    for block, layer_type, layer_cache in zip(model.layers, model.config.layer_types, cache.layers):
        attention, gate = block.self_attn, block.mlp.gate
        norm, projection = block.input_layernorm, attention.qkv_proj.projection(layer_cache)
        stream, _, qkv = merged_product(stream, out, *scaling, norm.weight, norm.eps, projection, None)
        q, k, v = attention.qkv_proj.mix(qkv[None], attention.qk_norm.get("temp"), *rotary[layer_type], layer_cache)
        out = product(attention.weighted_values(q, k, v, layer_cache)[0], attention.o_proj.weight)
        scaling, norm = block.post_attention_residual_scale.vectors, block.post_attention_layernorm
        down = gate.down_proj.weight, gate.down_proj.bias
        stream, normed, r = merged_product(stream, out, *scaling, norm.weight, norm.eps, *down)
        probability, choice, state = gate.think(r, state)
        out, scaling = block.mlp.weighted_experts(normed, probability, choice), block.post_mlp_residual_scale.vectors
    return merge(stream, out, *scaling, model.norm.weight, model.norm.eps)[1].to(model.head.dtype)


@has_kernel
def merged_product(stream, out, s_r, b_r, s_o, b_o, norm, eps, weight, bias):
    """merge for a few tokens, (B, D), and the product of what that normalises with weight (M, D), plus bias (M) or None
    -> the new stream, normed, (B, M). Without a gradient."""
    stream, normed = merge(stream, out, s_r, b_r, s_o, b_o, norm, eps)
    return stream, normed, linear(normed, weight, bias)


# ---------------------------------------------------------------------------------------------------------------------
# Files: config.json and safetensors, the formats of the official checkpoints


def official_names(state):
    """A state dict of Zaya under the names that the official checkpoints use."""
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in state.items()}


IN_ROPE_PARAMETERS = "rope_theta", "sliding_rope_theta", "partial_rotary_factor"  # where config.json has these fields


def config_to_json(config, dtype):
    """The official config.json. What is not a ZAYA1 says so, lest `transformers` misread it."""
    values = asdict(config)
    full, sliding, factor = (values.pop(name) for name in IN_ROPE_PARAMETERS)
    if config.is_zaya1:
        values = {name: value for name, value in values.items() if name not in ZAYA1}
    return {
        "architectures": ["ZayaForCausalLM"] if config.is_zaya1 else ["Zaya"],
        "model_type": "zaya" if config.is_zaya1 else "nanozaya",
        "dtype": dtype,
        "hidden_act": "silu",
        "num_experts_per_tok": 1,
        **values,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
            for name, theta in (("hybrid", full), ("hybrid_sliding", sliding))
        },
    }


def read_config(checkpoint):
    """The ZayaConfig of a checkpoint's folder. Raises FileNotFoundError if it has no config.json, and ValueError, in
    one line, if that is damaged or no ZAYA1's."""
    values, generation = read_json(checkpoint / "config.json"), checkpoint / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        values["eos_token_id"] = eos  # as in transformers, where this file has the last word
    try:
        return config_from_json(values)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:  # what must be there is not, or is a word
        raise ValueError(f"{checkpoint / 'config.json'} is no ZAYA1's: {error!r}") from None


FIXED = {  # what config.json may say in one way alone; from the second line on, the original code's
    "hidden_act": "silu", "num_experts_per_tok": 1, "attention_bias": False, "lm_head_bias": False,
    "activation_func": "swiglu", "add_bias_linear": False, "cca": True, "clamp_temp": False, "gated_linear_unit": True,
    "normalization": "RMSNorm", "scale_residual_merge": True, "zaya_use_eda": True, "zaya_use_mod": True,
}  # fmt: skip


def config_from_json(values):
    """A ZayaConfig from config.json. Raises ValueError for a model that this file cannot compute."""
    if values.get("model_type") not in ("zaya", "nanozaya"):
        raise ValueError(f'config.json describes a model of type "{values.get("model_type")}", not "zaya"')
    for name, value in FIXED.items():
        if values.get(name) not in (None, value):
            raise ValueError(f"config.json has {name} = {values[name]}; only {value} is known here")
    if values.get("quantization_config"):
        raise ValueError("config.json speaks of quantized weights, which are not known here")
    if ("moe_router_topk" in values or "zaya_layers" in values) and "router_hidden_size" not in values:
        return legacy_config(values)  # (Other programs write both forms' names; then the native ones count.)
    names = {field.name for field in fields(ZayaConfig)} - set(IN_ROPE_PARAMETERS)
    known = (ZAYA1 if values["model_type"] == "zaya" else {}) | {name: values[name] for name in names & values.keys()}
    # As in transformers, rope_scaling goes before rope_parameters, and a rope_theta beside them does not count.
    ropes = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if ropes and not ropes.keys() & {"hybrid", "hybrid_sliding"}:
        raise ValueError("config.json has one RoPE for all types of layer, not an entry for each, as ZAYA1's have")
    for layer_type, name in (("hybrid", "rope_theta"), ("hybrid_sliding", "sliding_rope_theta")):
        rope = ropes.get(layer_type) or {}
        refuse_scaled(rope)
        if "rope_theta" in rope:
            known[name] = rope["rope_theta"]
        if rope and layer_type in (values.get("layer_types") or ["hybrid"]):
            factor = rope.get("partial_rotary_factor", 1.0)  # as in transformers, where an entry does not say
            if known.setdefault("partial_rotary_factor", factor) != factor:
                raise ValueError("config.json has two partial_rotary_factors; only one for all layers is known here")
    for field in fields(ZayaConfig):
        kinds = [get_origin(kind) or kind for kind in get_args(field.type) or (field.type,)]
        kinds += [int] if float in kinds else []
        if field.name in known and type(known[field.name]) not in kinds:
            wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"config.json has {field.name} = {known[field.name]}, which is no {wanted}")
    return ZayaConfig(**known)


def refuse_scaled(rope):
    """ValueError if rotary embeddings are not the plain ones."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and (kind, rope.get("factor")) != ("linear", 1):
        raise ValueError(f'config.json has rope_type {kind}; only "default" is known here')


IN_BOTH_FORMS = (  # what both forms of config.json call the same
    "vocab_size", "hidden_size", "cca_time0", "cca_time1", "max_position_embeddings", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def legacy_config(values):
    """A ZayaConfig from a config.json of Zyphra's original code, which counts half-layers: an attention and its experts
    are two. Some files have lists, a number for each half-layer; these are right where a single number is stale, but
    ffn_hidden_size_list may be longer than the model."""

    def first(*names, default=None):
        for value in (values[name] for name in names if values.get(name) is not None):
            if not isinstance(value, list):
                return value
            if numbers := [number for number in value if isinstance(number, (int, float)) and number > 0]:
                return numbers[0]  # the other half-layers have 0
        return default

    counting = (values.get(name) for name in ("zaya_layers", "cca_num_q_heads", "num_query_groups_list"))
    half_layers = next((len(value) for value in counting if value and isinstance(value, list)), None)
    layers = (half_layers or values["num_hidden_layers"]) // 2
    if first("moe_router_topk", default=1) != 1:
        raise ValueError(f"config.json has moe_router_topk {values['moe_router_topk']}; only 1 is known here")
    windows = values.get("swa_layers") or [0]  # how many earlier tokens each attention sees; 0: all
    if len(windows) > layers:  # here, too, a number for each half-layer
        windows = windows[: 2 * layers : 2]
    sliding = any(windows)
    if not sliding and any("sliding" in kind for kind in values.get("layer_types") or []):
        raise ValueError("config.json has sliding layers, but swa_layers does not say how far they see")
    rope = values.get("rope_parameters") or {}
    rope = rope.get("hybrid") or rope  # some have an entry for each type of layer, as the native form
    refuse_scaled(rope)
    refuse_scaled(values.get("rope_scaling") or {})
    said = [name for name in IN_BOTH_FORMS if values.get(name) is not None or name in values and "_token_" in name]
    return ZayaConfig(
        num_hidden_layers=layers,
        num_attention_heads=first("cca_num_q_heads", "num_attention_heads"),
        num_key_value_heads=first("num_query_groups_list", "num_query_groups", "num_key_value_heads"),
        head_dim=first("head_dim", "kv_channels", default=128),
        moe_intermediate_size=first("ffn_hidden_size_list", "intermediate_size", "ffn_hidden_size") // 2,
        num_experts=first("zaya_layers", "num_experts", default=16),
        router_hidden_size=first("zaya_mlp_expansion", default=256),
        rms_norm_eps=first("norm_epsilon", default=1e-5),
        layer_types=["hybrid_sliding" if window else "hybrid" for window in windows] if sliding else None,
        sliding_window=max(windows) + 1 if sliding else None,  # theirs leaves the current token out
        rope_theta=first("rope_theta", default=rope.get("rope_theta", 5e6)),
        partial_rotary_factor=first("partial_rotary_factor", default=rope.get("partial_rotary_factor", 0.5)),
        sliding_rope_theta=first("swa_rotary_base", default=1e4),
        **ZAYA1,
        **{name: values[name] for name in said},
    )


def config_to_legacy(config, dtype):
    """The config.json that legacy_config reads."""
    sliding = "hybrid_sliding" in config.layer_types
    if not config.is_zaya1 or (sliding and config.sliding_window == 1):
        raise ValueError("the original code's form is for a ZAYA1, and for sliding windows of two tokens or more")
    windows = [config.sliding_window - 1 if kind == "hybrid_sliding" else 0 for kind in config.layer_types]
    return {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "dtype": dtype,
        **{name: value for name, value in FIXED.items() if name not in ("hidden_act", "num_experts_per_tok")},
        **{name: getattr(config, name) for name in IN_BOTH_FORMS},
        "num_hidden_layers": 2 * config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "ffn_hidden_size": 2 * config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "moe_router_topk": 1,
        "zaya_mlp_expansion": config.router_hidden_size,
        "norm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
        "swa_layers": [half for window in windows for half in (window, 0)] if sliding else None,
        "swa_rotary_base": config.sliding_rope_theta,
    }


LEGACY_NAMES = {  # how the rest of a name begins behind the layer's number: here, and in [Z]
    r"(input|post_attention)_layernorm\.": "input_norm.",
    r"self_attn\.qkv_proj\.(q|k)_proj\.": r"self_attn.qkv.linear_\1.",
    r"self_attn\.qkv_proj\.v_proj_current\.": "self_attn.qkv.val_proj1.",
    r"self_attn\.qkv_proj\.v_proj_delayed\.": "self_attn.qkv.val_proj2.",
    r"self_attn\.qkv_proj\.conv_qk_depthwise\.": "self_attn.qkv.conv_qk.0.",
    r"self_attn\.qkv_proj\.conv_qk_grouped\.": "self_attn.qkv.conv_qk.1.",
    r"self_attn\.qk_norm\.temp": "self_attn.qkv.temp",
    r"mlp\.gate\.router_mlp\.norm\.": "zaya_block.router.rmsnorm_eda.",
    r"mlp\.gate\.router_mlp\.fc1\.": "zaya_block.router.router_mlp.0.",
    r"mlp\.gate\.router_mlp\.fc2\.": "zaya_block.router.router_mlp.2.",
    r"mlp\.gate\.router_mlp\.out_proj\.": "zaya_block.router.router_mlp.4.",
    r"mlp\.gate\.": "zaya_block.router.",
    r"mlp\.experts\.gate_up_proj\[(\d+)\]": r"zaya_block.experts.local_experts.\1.linear_fc1.weight",
    r"mlp\.experts\.down_proj\[(\d+)\]": r"zaya_block.experts.local_experts.\1.linear_fc2.weight",
}


def legacy_name(name, config):
    """An official tensor's name in [Z]'s files. Half-layer 2 I is layer I's attention, 2 I + 1 its experts, and a
    residual scale stands before the half-layer that comes after the merge."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if not match:
        return name.replace("model.norm.", "model.final_norm.").replace("model.input_", "model.layers.0.res_scale.")
    half, rest = 2 * int(match[1]), match[2]
    if scale := re.fullmatch(r"post_(attention|mlp)_residual_scale\.(.*)", rest):
        half += 1 if scale[1] == "attention" else 2
        before = f"model.layers.{half}." if half < 2 * config.num_hidden_layers else "model."
        return f"{before}res_scale.{scale[2]}"
    half += rest.startswith(("mlp.", "post_attention_layernorm."))
    for pattern, legacy in LEGACY_NAMES.items():
        rest = re.sub(f"^{pattern}", legacy, rest)
    return f"model.layers.{half}.{rest}"


def one_by_one(tensors):
    """{official name: tensor} with each expert's matrix for itself, its number behind the name in brackets."""
    alone = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            alone |= {f"{name}[{expert}]": matrix for expert, matrix in enumerate(tensor)}
        else:
            alone[name] = tensor
    return alone


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError or ValueError, naming the file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return values


def checkpoints_in(run):
    """A run directory's checkpoints, the newest last."""
    saved = [path for path in Path(run).glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(saved, key=lambda path: int(path.name.removeprefix("step-")))


def newest_first(run):
    """A run directory's checkpoints in the order in which to try them: from the newest on, and last of all the best."""
    best = Path(run) / "best"
    return checkpoints_in(run)[::-1] + ([best] if best.is_dir() else [])


def first_whole(checkpoints, check, say=True):
    """The first of several checkpoints that check (which raises an error or does not) lets pass; with say those before
    it are named. Raises ValueError if there is none."""
    damage = None
    for checkpoint, after in zip(checkpoints, [*checkpoints[1:], None]):
        try:
            check(checkpoint)
            return checkpoint
        except (ValueError, OSError) as error:
            damage = damage or error
            if after and say:
                warn_once(f"{error}; trying {after}")
    raise ValueError(f"no checkpoint of {checkpoints[0].parent} is whole; the newest: {damage}")


def find_checkpoint(path):
    """The checkpoint at path: path itself, or a run directory's newest whole one, by the sizes of its files. Raises
    FileNotFoundError, or ValueError if none is whole."""
    path = Path(path).expanduser()
    if (path / "config.json").exists():
        return path
    checkpoints = newest_first(path)
    if not checkpoints:
        raise FileNotFoundError(f"{path} holds no checkpoint" if path.exists() else f"{path} does not exist")

    def check(checkpoint):
        read_config(checkpoint)
        for file in weight_files(checkpoint):
            safetensors_header(file)

    return first_whole(checkpoints, check)


def weight_files(checkpoint):
    """A checkpoint's safetensors files: one, or its index's, or all. They may be missing: opening them will tell."""
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    weights = read_json(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise ValueError(f"{index} is damaged: its weight_map names no files")
    files = [checkpoint / name for name in sorted(set(weights.values()))]
    return files or sorted(checkpoint.glob("model*.safetensors")) or [single]


DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save_safetensors(path, tensors):
    """Write {name: tensor}: 8 bytes of header length, a JSON header {name: dtype, shape, offsets}, then the numbers."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    aside = path.with_name(f".{path.name}.partial")  # the file that is there may be the one that t is mapped from
    try:
        with open(aside, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for t in tensors.values():
                file.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def safetensors_header(path):
    """{name: (dtype, shape, where in the file its numbers start, and stop)}. Raises ValueError if it is not whole."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            first = file.read(8)
            if first == b"version ":
                raise ValueError("this is Git LFS's pointer to it; git lfs pull brings the file itself")
            (length,) = struct.unpack("<Q", first)
            header = json.loads(file.read(min(length, size)))
            header.pop("__metadata__", None)
            begin = end = 8 + length
            for name, e in header.items():
                dtype, shape, (start, stop) = DTYPES[e["dtype"]], list(e["shape"]), e["data_offsets"]
                if start < 0 or min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != stop - start:
                    raise ValueError("a tensor's shape and place disagree")
                header[name], end = (dtype, shape, begin + start, begin + stop), max(end, begin + stop)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError,
                RecursionError) as error:  # fmt: skip
            raise ValueError(f"{path} is damaged, or holds what is not known here: {error!r}") from None
        if size != end:
            raise ValueError(f"{path} is damaged: it has {size} bytes, its header speaks of {end}")
    return header


def load_safetensors(path):
    """{name: tensor} of a safetensors file, mapped and not read: only what is touched takes memory."""
    header = safetensors_header(path)
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, (dtype, shape, start, stop) in header.items():
        if stop > start:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=stop - start, offset=start)
            tensors[name] = raw.view(dtype).view(shape)
        else:  # which frombuffer refuses
            tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors


def read_tensor(file, dtype, target):
    """Read the numbers that come next in a file, of this dtype, into a tensor of any dtype on any device."""
    straight = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    numbers = target if straight else torch.empty(target.shape, dtype=dtype)
    file.readinto(numbers.view(-1).view(torch.uint8).numpy())
    if not straight:
        target.copy_(numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_flags(description, *defaults):
    """Read sys.argv: a --flag for every field of some dataclasses, with the comment on its line as its help. defaults:
    these classes, or instances of them that have other defaults.

    Returns {name: value} of the flags given. An unknown flag or a malformed value ends in one line and exit status 2.
    """
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for default in defaults:
        cls = default if isinstance(default, type) else type(default)
        group, source = parser.add_argument_group(cls.__name__), inspect.getsource(cls)
        for field in fields(cls):
            comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)[1].replace("%", "%%")
            kinds = get_args(field.type) or (field.type,)
            flag = {"nargs": "?", "const": True} if bool in kinds else {"nargs": "+"} if list[str] in kinds else {}
            group.add_argument(
                f"--{field.name}", type=partial(read_flag, kinds), metavar=field.name.split("_")[-1].upper(),
                help=f"{comment} (default: {getattr(default, field.name)})", default=argparse.SUPPRESS, **flag,
            )  # fmt: skip
    given = vars(parser.parse_args())
    for name, value in given.items():
        if isinstance(value, list):  # of what read_flag makes of each word
            given[name] = None if value == [None] else [word for words in value for word in words or []]
    return given


def read_flag(kinds, text):
    """What the text after a flag stands for, as one of its field's types."""
    if NoneType in kinds and text.lower() == "none":
        return None
    try:
        if bool in kinds:
            return {"0": False, "false": False, "1": True, "true": True}[text.lower()]
        if int in kinds and not text.isdecimal() and float(text).is_integer():  # 1e9, say
            return int(float(text))
        if int in kinds:
            return int(text)
        if float in kinds:
            return float(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"invalid {kinds[0].__name__} value: {text!r}") from None
    if str in kinds:
        return text
    # One word of a list, or several with commas between, which a file's name may have, too
    return [text] if Path(text).exists() else text.split(",")


@contextmanager
def stop_in_one_line():
    """Turn what a user can get wrong into one line on stderr and exit status 2."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get its number, and be written our messages
            os.open(os.devnull, os.O_RDWR)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not, nor has None
        sys.stdout.reconfigure(errors="replace")  # by a question mark what the terminal has no character for
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # here, where it can still be told that nobody reads it
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|overflow|home directory", str(error)):
            raise  # a bug; too little memory, on whatever device, is none, nor is ~NAME for a user who is not there
        line = f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split()) or 'no memory'}\n"
        print(line, end="", file=sys.stderr)  # in one piece, for other ranks may print, too
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def choose_device(name):
    """The device type for --device: auto is a GPU (AMD's is called cuda, too), else the CPU. (A Mac's GPU only if it is
    asked for: nobody has tried it yet.)"""
    usable = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in usable if usable[device])
    if name not in usable:
        raise ValueError(f"--device {name} is none of auto, {', '.join(usable)}")
    if not usable[name]:
        raise ValueError(f"--device {name} is not available on this machine")
    return name


def has_bf16(device):
    """Whether a device type is a GPU that multiplies bf16 as such: NVIDIA's from Ampere on, AMD's. (Others imitate it,
    slower than fp32.)"""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def watts(device):
    """What a GPU draws (the mean of its last second or so), None where torch cannot read it."""
    if torch.device(device).type != "cuda":
        return None
    try:
        power = torch.cuda.power_draw(device)
    except Exception:  # the vendors' libraries for it, if they are installed at all, have errors of their own
        return None
    in_watts = torch.version.hip and power < 10_000  # as AMD's is up to PyTorch 2.15; others are milliwatts
    return (power if in_watts else power / 1000) or None


def free_memory():
    """Bytes of a host's memory that are to be had, the disk's cache included; 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return 1024 * int(found[1]) if found else 0


def token_costs(config, context):
    """(parameters, active ones without the embedding, operations of a token's forward pass, bytes of KV cache a token
    in bf16), with attention over `context` tokens."""
    with torch.device("meta"):
        total, active = Zaya(config).parameter_counts()
    kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return total, active, forward_flops(config, active, context), kv_bytes


def forward_flops(config, active, context, mean=False):
    """Operations of a token's forward pass: 2 for each active weight and each of the LM head (an untied one is active
    already); and in attention, for every key and channel of the queries, 2 for the score and 2 for the values' sum.
    mean: of all tokens up to `context`."""
    head = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    attention = 4 * positions_seen(config, context, mean) * config.num_attention_heads * config.head_dim
    return 2 * (active + head) + attention


def training_flops(config, active, context):
    """Operations of a token forward and, twice as many, backward: the mean of a text of `context` tokens."""
    return 3 * forward_flops(config, active, context, mean=True)


def positions_seen(config, context, mean=False):
    """How many positions the last of `context` tokens attends to, summed over the layers; mean: of all of them."""
    sliding = config.layer_types.count("hybrid_sliding")
    full, window = context, min(context, config.sliding_window or context)
    if mean:  # the first `window` tokens see half as many
        full, window = context / 2, window - window / 2 * (window / context)
    return (config.num_hidden_layers - sliding) * full + sliding * window


def pyplot():
    """matplotlib.pyplot, imported where it is needed, drawing to files."""
    os.environ["MPLBACKEND"] = "Agg"  # and not a notebook's
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it then draws a box
    import matplotlib.pyplot as plt

    return plt


def literal(text):
    """text for a picture, where a dollar would begin a formula, and what is no UTF-8 is an error."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


@dataclass
class TableConfig:
    preset: str | None = None  # only this preset; none: all of them
    checkpoint: str | None = None  # this checkpoint instead
    context: int = 4096  # tokens of context at which attention is counted
    gpu_hour: float = 2.0  # price of a GPU for an hour, in dollars
    peak_tflops: float = 1307.0  # what the GPU can do at best; an MI300X in dense bf16 by its datasheet
    mfu: float = 0.35  # the share of it that one hopes to use


def cost_table():
    """Print what a token costs in each preset, beside its dense and its conventional twin."""
    flags = TableConfig(**parse_flags(cost_table.__doc__, TableConfig))
    if flags.preset is not None and flags.preset not in PRESETS:
        raise ValueError(f"--preset {flags.preset} is none of {', '.join(PRESETS)}")
    if not all(0 < x < math.inf for x in (flags.context, flags.gpu_hour, flags.peak_tflops, flags.mfu)):
        raise ValueError("--context, --gpu_hour, --peak_tflops and --mfu must be positive")
    if flags.mfu > 1:
        raise ValueError(f"--mfu is a share, 0.35 say, and at most 1, not {flags.mfu}")
    if flags.preset is not None and flags.checkpoint is not None:
        raise ValueError("--preset or --checkpoint, not both")
    configs = {name: config for name, config in PRESETS.items() if flags.preset in (None, name)}
    if flags.checkpoint is not None:
        path = find_checkpoint(flags.checkpoint)
        configs = {path.name: read_config(path)}
    print(f"{'':26}{'parameters':>15}{'active':>14}{'GFLOP':>9}{'KV bytes':>10}{'$ / 1M tokens':>15}")
    print(f"{'':26}{'':>15}{'a token':>14}{'a token':>9}{'a token':>10}{'to train on':>15}")
    for name, config in configs.items():
        twins = {name: config, "  dense twin": replace(config, mlp="dense")}
        twins["  conventional twin"] = replace(config, mlp="dense", attention="mha", cca_without=None)
        for label, twin in twins.items():
            total, active, flops, kv_bytes = token_costs(twin, flags.context)
            seconds = 1e6 * training_flops(twin, active, flags.context) / (flags.peak_tflops * 1e12 * flags.mfu)
            dollars = seconds / 3600 * flags.gpu_hour
            print(f"{label:26}{total:15,}{active:14,}{flops / 1e9:9.3f}{kv_bytes:10,}{dollars:15.6f}")
    print(
        f"active: without the embedding. GFLOP: forward, LM head included, {flags.context:,} tokens of context.\n"
        "KV bytes: bf16. $: three forwards' worth, with half of that context, at "
        f"{flags.mfu:.0%} of {flags.peak_tflops:,.0f} TFLOP/s and ${flags.gpu_hour} an hour."
    )


if __name__ == "__main__":
    with stop_in_one_line():
        cost_table()
