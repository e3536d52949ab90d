"""Train a ZAYA1: on a laptop, on one GPU, or on a node with torchrun.

    python train.py                                            nano on the embedded dataset: minutes, any machine
    python train.py --resume                                   go on after a stop or a crash
    torchrun --nproc_per_node=8 train.py --preset small ...    RCCL on AMD, NCCL on NVIDIA, gloo on CPU

In reading order: flags, ranks, speed and memory, data, optimizer (Muon, AdamW, balancing), checkpoints, log and
pictures, the loop. [R] is ZAYA1's report, arXiv 2605.05365.
"""

import atexit
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: else it keeps that, whose threads then may abort the exit
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as run_again
from tqdm import tqdm

from data.tokenizer import load_tokenizer, sha256, write_aside
from zaya import (
    KERNELS, LOGITS_AT_ONCE, PRESETS, MixtureOfExperts, Zaya, ZayaConfig, checkpoints_in, choose_device,
    find_checkpoint, first_whole, free_memory, has_bf16, literal, load_safetensors, newest_first, official_names,
    parse_flags, pyplot, read_config, read_json, save_safetensors, stop_in_one_line, training_flops, warn_once, watts,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class TrainConfig:
    preset: str = "nano"  # nano, mini, small, medium or zaya1-8b: shape and recipe; other flags change parts of them
    data: str = "stdlib"  # a name under data/, or a folder that a prepare.py has written
    out: str = "out"  # run directory: checkpoints, log, pictures
    steps: int = 400  # optimizer steps
    batch_size: int = 16  # sequences a step, over all ranks and micro-batches
    micro_batch_size: int | None = None  # sequences a rank and forward pass; None: up to 16 and 32,768 tokens
    block_size: int | None = None  # tokens a sequence; None: the preset's context
    lr: float = 0.016  # peak learning rate, for Muon and AdamW alike
    final_lr: float = 0.05  # where the cosine ends, as a share of lr
    warmup: int = 60  # steps from 0 to lr
    weight_decay: float = 0.05  # of the matrices alone: a step multiplies them by 1 - lr * weight_decay
    momentum: float = 0.95  # Muon's
    grad_clip: float = 1.0  # largest norm of the whole gradient
    balancing: str = "pid"  # of the experts: pid (AdamW, ZAYA1's), sign (a fixed step, DeepSeek's) or none
    balance_lr: float = 0.02  # learning rate of the balancing biases: no warm-up, then it falls as lr does
    seed: int = 1  # of the weights and the order of the data
    device: str = "auto"  # auto (a GPU, else the CPU), cpu, cuda (AMD's too) or mps (not tried yet)
    dtype: str = "auto"  # of the matrix products: auto, float32 or bfloat16
    kernels: str = "auto"  # auto: the fastest, on a GPU mostly Triton's; triton: all of those; eager: PyTorch alone
    recompute: bool = False  # keep less for the backward pass: attention and experts are computed again there
    compile: bool | None = None  # torch.compile; None: on a GPU
    eval_every: int = 100  # steps between evaluations
    eval_batches: int = 16  # of up to 16 sequences and 32,768 tokens, spread over the validation text; 0: all of it
    eval_only: bool = False  # evaluate the checkpoint of --init_from or --resume, and exit
    log_every: int = 1  # steps between lines of the log; evaluations are always logged
    save_every: int = 100  # steps between checkpoints; there is one at the end, too
    keep: int = 2  # checkpoints to keep, beside the best
    resume: bool = False  # go on with the run in --out, with its flags
    init_from: str | None = None  # start from this checkpoint's weights (fine-tuning)
    plot: list[str] | None = None  # train nothing; compare these run directories: a table, and compare.png in --out

    def __post_init__(self):
        for name in "steps batch_size micro_batch_size block_size eval_every save_every log_every keep".split():
            if getattr(self, name) is not None and not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"--{name} must be at least 1 and below 2^31, not {getattr(self, name)}")
        for name in ("warmup", "eval_batches", "seed", "weight_decay", "balance_lr"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"--{name} must be 0 or more and below 2^63, not {getattr(self, name)}")
        if not 0 < self.lr <= 1e30 or not self.grad_clip > 0:
            raise ValueError("--lr and --grad_clip must be positive, --lr at most 1e30")
        if not 0 <= self.final_lr <= 1 or not 0 <= self.momentum < 1:
            raise ValueError("--final_lr must be in [0, 1] and --momentum in [0, 1)")
        dtypes = ("auto", "float32", "bfloat16")
        choices = {"preset": PRESETS, "dtype": dtypes, "balancing": BALANCING, "kernels": KERNELS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)} is none of {', '.join(known)}")


# What a preset trains with where no flag says otherwise; TrainConfig's own defaults are nano's. The rates: zaya1-8b's
# is phase 1 of [R] (16.8M tokens a step, 8 trillion in all), nano's was measured, the others' lie between, by width.
# (Nano, mean bits a byte of four seeds. Warm-up 60: 1.468 for lr 0.012, 1.444 for 0.016, 1.437 for 0.02, where eight
# layers of width 128 leave experts idle, 1.468 for 0.028. Warm-up 20: 1.573 for 0.008, 1.504 for 0.012.)
RECIPES = {
    "mini": dict(steps=4000, batch_size=256, lr=4e-3, warmup=100, eval_every=500),  # 1 billion tokens
    "small": dict(steps=5700, batch_size=128, lr=1.6e-3, warmup=200, eval_every=500),  # 3 billion
    "medium": dict(steps=9500, batch_size=256, lr=6e-4, warmup=500, eval_every=500),  # 10 billion
    "zaya1-8b": dict(
        steps=480_000, batch_size=4096, block_size=4096, rope_theta=1e4, lr=6e-4, final_lr=1 / 3, warmup=2000,
        eval_every=1000,
    ),
}  # fmt: skip


def recipe(given):
    """What a new run does differently from TrainConfig's defaults, before the flags given: its preset's recipe; or, for
    a model to tune that no preset was named for, the learning rate of the widest preset that is no wider."""
    if not given.get("init_from"):
        return RECIPES.get(given.get("preset"), {})
    if "preset" in given:
        return flags_of(TrainConfig, RECIPES.get(given["preset"], {}))
    width = read_config(find_checkpoint(given["init_from"])).hidden_size
    narrower = [name for name in RECIPES if PRESETS[name].hidden_size <= width]
    return {"lr": RECIPES[narrower[-1]]["lr"]} if narrower else {}


def flags_of(cls, given):
    """{name: value} of the flags given that are fields of cls."""
    return {name: value for name, value in given.items() if name in {f.name for f in fields(cls)}}


def model_config(config, given, vocab_size, eot):
    """The ZayaConfig of a new run: the preset, changed by the flags given, with the data's vocabulary."""
    start = PRESETS[config.preset]
    changes = flags_of(ZayaConfig, given)
    if told := {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"} & changes.keys():
        raise ValueError(f"--{min(told)} cannot be chosen: it follows from the data")
    if "sliding_window" in changes and "hybrid_sliding" not in (changes.get("layer_types") or []):
        raise ValueError("--sliding_window is for what --layer_types calls hybrid_sliding, and there is no such layer")
    changes |= {"vocab_size": vocab_size, "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    changes.setdefault("max_position_embeddings", config.block_size or start.max_position_embeddings)
    return replace(start, **changes)


def sequences_at_once(share, block_size):
    """The sequences of a forward pass: a power of two that divides a rank's share, up to 16 and 32,768 tokens."""
    most = 2 ** int(math.log2(max(1, min(16, 2**15 / block_size))))
    return math.gcd(share, most)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and devices. One process a GPU; torch.cuda is the API on AMD, too, and "nccl" there is RCCL.


class Ranks:
    """Who we are among the processes that torchrun started; alone, rank 0 of 1."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        if not 0 <= self.rank < self.world or (self.world > 1 and "RANK" not in os.environ):
            raise ValueError(f"RANK {os.environ.get('RANK')} is no rank of WORLD_SIZE {self.world}")
        device = choose_device(device)
        if device == "cuda":
            local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= count:
                raise ValueError(f"rank {self.rank} would take GPU {local} of this machine, which shows it {count}")
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        if device == "mps" and self.world > 1:
            raise ValueError("a Mac's GPU is for one process alone (--device cpu is for several)")
        self.device, self.store, self.meeting = torch.device(device), None, None
        if "RANK" in os.environ:
            store, *_ = next(dist.rendezvous("env://"))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                self.store = store  # torchrun's own, the same before and after a crash
            # After a crash torchrun starts all ranks again: the last try's addresses must not count.
            self.meeting = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.meet()
            backend, own = ("nccl", self.device) if self.device.type == "cuda" else ("gloo", None)
            dist.init_process_group(
                backend, store=self.meeting, rank=self.rank, world_size=self.world, device_id=own,
                timeout=timedelta(minutes=30),  # NCCL's own 10 may not do while rank 0 writes a large checkpoint
            )  # fmt: skip
            if backend == "gloo":
                # Its threads, left alone, may abort the exit. They end with the last reference to the group, which must
                # not be DistributedDataParallel's: that would wait for them with Python's lock, and they for the lock.
                atexit.register(dist.destroy_process_group)  # when main's variables are gone

    def meet(self):
        """Wait for all ranks, ten minutes at most: one that was refused, on another node, never comes."""
        self.meeting.set(f"rank {self.rank}", self.device.type)
        start, told = time.monotonic(), not self.first
        while missing := [rank for rank in range(self.world) if not self.meeting.check([f"rank {rank}"])]:
            waited, who = time.monotonic() - start, f"rank {self.rank} waits for {', '.join(map(str, missing))}"
            if waited > 600:
                raise ConnectionError(f"{who} in vain; its own node may have said why")
            if waited > 60 and not told:
                print(f"{who}; its own node may have said why", flush=True)
                told = True
            time.sleep(0.1)
        kinds = [self.meeting.get(f"rank {rank}").decode() for rank in range(self.world)]
        if others := [rank for rank in range(self.world) if kinds[rank] != self.device.type]:  # a GPU is out of order
            raise ValueError(f"rank {self.rank} is on {self.device.type}, rank {others[0]} on {kinds[others[0]]}")

    def sum(self, tensor):
        """tensor, summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def follow_the_first(self):
        """Wait until rank 0 comes here, too, be it in hours: a barrier would fail after the group's timeout."""
        if self.world > 1 and self.first:
            self.meeting.set("rank 0 is here", "")
        while self.world > 1 and not self.meeting.check(["rank 0 is here"]):
            time.sleep(0.1)

    def leave(self):
        """The end of what ranks do together. NCCL's group ends here, on all at once; gloo's with the process."""
        if self.world > 1:
            dist.barrier()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()


def faster_dtype(ranks):
    """bfloat16 on a GPU that has it; on a CPU whichever multiplies faster: native bf16 has 2 to 4 times fp32's rate. As
    the first rank has it, for all."""

    def seconds(dtype):
        a = torch.randn(1024, 256).to(dtype)
        return min(timeit.repeat(lambda: a @ a.t(), repeat=5, number=1))

    if ranks.device.type == "cpu":
        faster = ranks.first and 1.5 * seconds(torch.bfloat16) < seconds(torch.float32)
    else:
        faster = ranks.first and has_bf16(ranks.device.type)
    return "bfloat16" if ranks.sum(torch.tensor(float(faster), device=ranks.device)) else "float32"


def tune_memory():
    """Let glibc keep what is freed: it would hand tensors back to the kernel, only to fault their pages in again, which
    took a tenth of a step on a CPU."""
    libc, TRIM_THRESHOLD, MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
    if hasattr(libc, "mallopt"):  # neither musl nor a Mac has it
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, 1 << 30)


# ---------------------------------------------------------------------------------------------------------------------
# What the hardware can do, and what a step takes of it

PEAK_FLOPS = {  # dense bf16 by datasheet, by the first part that a device's name has
    "MI300X": 1307e12, "MI300A": 981e12, "MI325X": 1307e12, "MI350X": 2300e12, "MI355X": 2500e12,
    "MI250": 383e12 / 2,  # an MI250X is two devices; an MI250, 5 % slower, has "MI250X / MI250" for a name
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12,
}  # fmt: skip


def rates(device, dtype):
    """(peak by datasheet, or None where the device is not known; the rate of a large product here and now), FLOP/s."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, getattr(torch, dtype))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), repeat=5, number=1))  # item() waits
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None), 2 * size**3 / seconds


class Speed:
    """What the log says of a step's speed. flops: operations a token, forward and backward, divided by the ranks.
    In the log, of_product is the rate beside that of a large matrix product."""

    def __init__(self, flops, device, dtype):
        self.flops, self.device, self.asked = flops, device, -math.inf
        self.peak, self.product = rates(device, dtype)

    def __call__(self, tokens, seconds):
        rate, power, now = self.flops * tokens / seconds, None, time.perf_counter()
        if now - self.asked > 2:  # seconds; each time the driver's library is opened anew
            power, self.asked = watts(self.device), now
        said = {"tokens_per_s": tokens / seconds, "step_ms": 1e3 * seconds}
        said |= {"tflops": rate / 1e12, "of_product": rate / self.product}
        said |= {"mfu": rate / self.peak} if self.peak else {}
        return said | ({"watts": power} if power else {})


def memory_plan(model, optimizer, sequences, length):
    """{what: bytes} that training holds on this rank, with micro-batches of so many sequences of `length` tokens.

    Activations are what the backward pass needs of every layer: the stream and what is added to it at both merges,
    inputs and results of the products (eager PyTorch keeps up to a third more), in bf16 on a CPU attention's scores;
    and the gradient and a chunk of logits.
    """
    c, size = model.config, next(p.element_size() for name, p in model.named_parameters() if "o_proj" in name)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = [*optimizer.muon.buffer.values(), optimizer.adamw.flat, optimizer.adamw.mean, optimizer.adamw.square]
    kept += optimizer.muon.master.values() if size < 4 else []
    attention = (2 * c.num_attention_heads + 4 * c.num_key_value_heads) * c.head_dim * 2
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and size == 2:  # in blocks of 128 queries: see zaya.attend_in_blocks
        attention += c.num_attention_heads * (length + 128) // 2
    experts = 3 * c.moe_intermediate_size + 4 * c.hidden_size
    layer = 2 * c.hidden_size * (4 + size) + (2 * c.hidden_size + 7 * c.router_hidden_size) * size
    layer += 0 if optimizer.config.recompute else (attention + experts) * size
    head = 2 * c.vocab_size * c.hidden_size * 4 + (4 + 2 * size) * LOGITS_AT_ONCE[not on_cpu]
    return {
        "weights": weights,
        "gradients": weights * min(2, optimizer.muon.ranks.world),  # several ranks': added up, and DDP's buckets
        "optimizer": sum(t.numel() * t.element_size() for t in kept),
        "activations": sequences * length * c.num_hidden_layers * layer + head,
    }  # fmt: skip


def recompute(model):
    """Let attention and experts keep nothing but their inputs, and run again in the backward pass. The router is not
    among them: it would count its tokens twice."""
    for layer in model.layers:
        experts = "weighted_experts" if isinstance(layer.mlp, MixtureOfExperts) else "forward"
        for module, method in ((layer.self_attn, "forward"), (layer.mlp, experts)):
            # Nothing in there is random; and to ask a GPU for its random state would end a capture.
            again = partial(run_again, getattr(module, method), use_reentrant=False, preserve_rng_state=False)
            setattr(module, method, again)


def say_memory(plan, ranks):
    """Print a rank's plan beside what its GPU has."""
    line = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in plan.items())
    line = f"rank {ranks.rank}: {line}; {sum(plan.values()) / 1e9:.2f} GB in all"
    if ranks.device.type == "cuda":
        line += f" of {torch.cuda.get_device_properties(ranks.device).total_memory / 1e9:.0f} GB"
    else:
        line += ", beside PyTorch itself"
    print(line + "\n", end="", flush=True)  # in one piece, for the other ranks print, too


@contextmanager
def timed(spent, what):
    """Add the seconds that a block takes to spent[what]."""
    start = time.perf_counter()
    yield
    spent[what] += time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Tokens:
    """One of a data folder's two files, cut into blocks. Their order follows from the seed alone, so neither the number
    of ranks nor accumulation nor a resume changes what a step learns from."""

    def __init__(self, folder, split, block_size, seed, meta):
        path = folder / f"{split}.bin"
        if meta.get("dtype") not in ("uint16", "uint32"):
            raise ValueError(f"{folder / 'meta.json'}: dtype must be uint16 or uint32, not {meta.get('dtype')!r}")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise ValueError(f"{path} has {size} bytes, no multiple of {meta['dtype']}'s {dtype.itemsize}")
        count = size // dtype.itemsize
        if count < block_size + 1:
            raise ValueError(f"{path} has {count} tokens, a block of {block_size} and the token after it need more")
        self.ids = np.memmap(path, dtype, mode="r")
        if (largest := max(int(self.ids[i : i + 2**24].max()) for i in range(0, count, 2**24))) >= meta["vocab_size"]:
            raise ValueError(f"{path} holds the token id {largest}, the vocabulary ends at {meta['vocab_size'] - 1}")
        self.block_size, self.seed, self.meta = block_size, seed, meta
        self.blocks = (count - 1) // block_size
        self.per_epoch = max(1, self.blocks - 1)  # one less, so that every epoch can cut the text at other places

    @lru_cache(maxsize=2)
    def epoch(self, number):
        """Where the blocks of an epoch begin, in its order."""
        random = np.random.default_rng([self.seed, number])
        shift = random.integers(0, len(self.ids) - self.per_epoch * self.block_size)
        return shift + self.block_size * random.permutation(self.per_epoch)

    def batch(self, starts, device):
        """(inputs, targets), each (len(starts), block_size) int64, targets one token later."""
        rows = np.stack([self.ids[start : start + self.block_size + 1] for start in starts]).astype(np.int64)
        rows = torch.from_numpy(rows)
        if device.type == "cuda":
            rows = rows.pin_memory().to(device, non_blocking=True)
        return rows[:, :-1].to(device), rows[:, 1:].to(device)

    def training_batch(self, first, last, device):
        """Sequences first to last - 1 of all that a run trains on."""
        places = [divmod(i, self.per_epoch) for i in range(first, last)]
        return self.batch([self.epoch(epoch)[place] for epoch, place in places], device)

    def validation_starts(self, sequences):
        """Where that many blocks, spread evenly over the text, begin; all of them for 0."""
        count = min(sequences or self.blocks, self.blocks)
        return [i * self.blocks // count * self.block_size for i in range(count)]


def open_data(name, ranks):
    """The data folder of a name or path, and its meta.json. A dataset under data/ that is not there is prepared."""
    folder = ROOT / "data" / name if (ROOT / "data" / name / "prepare.py").exists() else Path(name).expanduser()
    if not (folder / "meta.json").exists() and (folder / "prepare.py").exists() and ranks.first:
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise ValueError(f"{folder / 'prepare.py'} failed, see above; if it asks for arguments, run it by hand")
    ranks.follow_the_first()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {name}: no such name under data/ and no such folder")
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"--data {name}: {folder} has no meta.json; prepare it with one of data/*/prepare.py")
    meta = read_json(folder / "meta.json")
    for key, kind in {"vocab_size": int, "bytes_per_token": (int, float)}.items():
        if not isinstance(meta.get(key), kind) or not 0 < meta[key] < math.inf:
            raise ValueError(f"{folder / 'meta.json'} has no valid {key}")
    return folder, meta


def refuse_other_tokens(folder, other):
    """Raises ValueError unless two folders, a data folder or a checkpoint each, have the same vocabulary."""
    vocabulary, others = (read_json(path / "tokenizer.json").get("model", {}).get("vocab") for path in (folder, other))
    if vocabulary != others:
        raise ValueError(f"{folder} has other tokens than {other}: prepare it with --tokenizer {other}")


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def newton_schulz(g, steps=5):
    """Replace the singular values of every matrix of g (M, rows, cols) by numbers near 1, keeping the singular vectors.

    Keller Jordan's quintic iteration: x <- a x + b (x x^T) x + c (x x^T)^2 x, in g's dtype. (a joins b and c before the
    last product; added after it, x would have to be copied each time.)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        square.diagonal(dim1=-2, dim2=-1).add_(a)
        x = square @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def nesterov(grad, momentum_buffer, momentum):
    """Take a gradient into the momentum -> Nesterov's step."""
    grad, dtype = grad.float(), grad.dtype
    momentum_buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(momentum_buffer, momentum).to(dtype)


def apply_update(master, update, keep, scale, copy):
    """master <- keep * master - scale * update; and the same to its copy in another dtype, unless that is None."""
    master.mul_(keep).sub_(update.float() * scale)
    if copy is not None:
        copy.copy_(master)


class Muon:
    """Momentum, made orthogonal: every direction of a weight matrix is moved by the same amount [R].

    One matrix is one unit: a SwiGLU's gate, up and down each on its own. Those of a shape go through Newton-Schulz
    in batches. The update has the root mean square 0.2, as AdamW's has, so that both take one learning rate (Liu et
    al., arXiv 2502.16982).

    Sharded over the ranks (ZeRO-1): a parameter's fp32 master and momentum lie on its owner alone, which updates it and
    sends it to all, while the next batch is being made orthogonal.
    """

    BATCH = 2**22  # numbers in a batch: larger ones leave a CPU's cache

    def __init__(self, parameters, dtype, momentum, weight_decay, ranks, compiled=False):
        """compiled: nesterov and apply_update go through torch.compile, and so over memory once each."""
        self.parameters, self.momentum, self.weight_decay, self.ranks = parameters, momentum, weight_decay, ranks
        self.nesterov, self.apply_update = (
            torch.compile(function, dynamic=True) if compiled else function for function in (nesterov, apply_update)
        )
        self.owner = self.assign_owners()
        self.rounds = list(zip_longest(*(self.batches(rank) for rank in range(ranks.world)), fillvalue=[]))
        own = [name for name in parameters if self.owner[name] == ranks.rank]
        # The fp32 weights: the parameters themselves, or copies of them where the model is to be cast to bf16.
        copy = dtype != torch.float32
        self.master = {name: parameters[name].detach().to(torch.float32, copy=copy) for name in own}
        self.buffer = {name: torch.zeros_like(self.master[name]) for name in own}

    @staticmethod
    def matrices(name, tensor):
        """tensor as (M, rows, cols)."""
        if "gate_up_proj" in name:  # (E, 2F, D), or a dense twin's (2F, D): gate and up are two matrices
            return tensor.view(-1, tensor.shape[-2] // 2, tensor.shape[-1])
        return tensor.view(-1, *tensor.shape[-2:])

    def assign_owners(self):
        """{name: rank}. The costliest parameter first, each to the rank that has least to do so far."""
        cost = {name: p.numel() * min(self.matrices(name, p).shape[1:]) for name, p in self.parameters.items()}
        busy, owner = [0] * self.ranks.world, {}
        for name in sorted(cost, key=cost.get, reverse=True):
            owner[name] = busy.index(min(busy))
            busy[owner[name]] += cost[name]
        return owner

    def batches(self, rank):
        """Lists of a rank's names whose matrices have one shape, of about BATCH numbers each."""
        by_shape = {}
        for name, p in self.parameters.items():
            if self.owner[name] == rank:
                lists = by_shape.setdefault(self.matrices(name, p).shape[1:], [[]])
                if sum(self.parameters[n].numel() for n in lists[-1]) >= self.BATCH:
                    lists.append([])
                lists[-1].append(name)
        return [names for lists in by_shape.values() for names in lists]

    @torch.no_grad()
    def step(self, lr):
        on_their_way = []
        for batches in self.rounds:  # in the same order on every rank, as what they send each other must be
            if batches[self.ranks.rank]:
                self.update(batches[self.ranks.rank], lr)
            if self.ranks.world > 1:
                for owner, names in enumerate(batches):
                    on_their_way += [dist.broadcast(self.parameters[n].detach(), owner, async_op=True) for n in names]
        for work in on_their_way:
            work.wait()

    def update(self, names, lr):
        """Move the parameters of one batch."""
        steps = []
        for name in names:
            grad = self.parameters[name].grad
            step = self.nesterov(grad.view(-1), self.buffer[name].view(-1), self.momentum)
            steps.append(self.matrices(name, step.view(grad.shape)))
        # In the weights' dtype: bf16 is exact enough where they are bf16.
        updates = newton_schulz(torch.cat(steps)).split([len(step) for step in steps])
        # On the device: for a new Python number torch.compile would compile anew.
        numbers = 1 - lr * self.weight_decay, lr * 0.2 * math.sqrt(max(steps[0].shape[1:]))
        keep, scale = (torch.full((), number, device=steps[0].device) for number in numbers)
        for name, update in zip(names, updates):
            copy = None if self.parameters[name].dtype == torch.float32 else self.parameters[name].view(-1)
            self.apply_update(self.master[name].view(-1), update.reshape(-1), keep, scale, copy)

    def collect(self, own):
        """{name: tensor} of all parameters, from every rank's own, in rank 0's CPU memory; nothing on the others."""
        found = {}
        for name, owner in self.owner.items():
            mine = owner == self.ranks.rank
            tensor = own[name] if mine else torch.empty_like(self.parameters[name], dtype=torch.float32)
            if owner > 0:
                dist.broadcast(tensor, owner)  # NCCL's send would first make new connections, for which memory may lack
            if self.ranks.first:
                found[name] = tensor.cpu()
        return found

    def state(self):
        return {f"muon.{name}": buffer for name, buffer in self.collect(self.buffer).items()}

    def load_state(self, tensors):
        for name, buffer in self.buffer.items():
            buffer.copy_(tensors[f"muon.{name}"])


class AdamW:
    """AdamW without weight decay for everything that is not a matrix, on one flat vector (size); each rank keeps and
    updates its slice of it (part)."""

    def __init__(self, parameters, ranks=None, betas=(0.9, 0.95), eps=1e-10, prefix="adamw"):
        self.parameters, self.betas, self.eps, self.prefix = list(parameters), betas, eps, prefix
        self.size = sum(p.numel() for p in self.parameters)
        self.world, rank = (ranks.world, ranks.rank) if ranks else (1, 0)
        self.part = -(-self.size // self.world)  # numbers a rank; the last one's are filled up with zeros
        self.own = slice(rank * self.part, (rank + 1) * self.part)
        self.flat = self.shard([p.detach() for p in self.parameters])  # the fp32 masters
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.count = 0

    def shard(self, tensors):
        """This rank's part of all tensors, flattened one after the other, in fp32."""
        flat = torch.cat([t.float().flatten() for t in tensors])
        return nn.functional.pad(flat, (0, self.part * self.world - self.size))[self.own].clone()

    def gather(self, part):
        """The whole vector from every rank's part of it."""
        if self.world == 1:
            return part
        whole = part.new_empty(self.part * self.world)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before PyTorch 2.13
        gather(whole, part)
        return whole[: self.size]

    @torch.no_grad()
    def step(self, lr, grads=None):
        grad = self.shard(grads or [p.grad for p in self.parameters])
        self.count += 1
        (beta1, beta2), n = self.betas, self.count
        self.mean.lerp_(grad, 1 - beta1)
        self.square.lerp_(grad.square_(), 1 - beta2)
        denominator = (self.square / (1 - beta2**n)).sqrt_().add_(self.eps)
        self.flat.addcdiv_(self.mean, denominator, value=-lr / (1 - beta1**n))
        for p, new in zip(self.parameters, self.gather(self.flat).split([p.numel() for p in self.parameters])):
            p.copy_(new.view(p.shape))

    def state(self):
        vectors = {f"{self.prefix}.{name}": self.gather(getattr(self, name)) for name in ("mean", "square")}
        return vectors | {f"{self.prefix}.count": torch.tensor(self.count)}

    def load_state(self, tensors):
        self.mean.copy_(self.shard([tensors[f"{self.prefix}.mean"]]))
        self.square.copy_(self.shard([tensors[f"{self.prefix}.square"]]))
        self.count = tensors[f"{self.prefix}.count"].item()


# The betas of the AdamW loop on the balancing biases. Without a memory of the past it moves each of them by the sign of
# its expert's error alone, which is DeepSeek-V3's way. ("none" leaves them alone.)
BALANCING = {"pid": (0.5, 0.9), "sign": (0.0, 0.0), "none": (0.0, 0.0)}


class Optimizer:
    """Muon for the matrices, AdamW for the rest, and a second AdamW that keeps the experts evenly busy.

    Takes the fp32 model as it is, keeps the masters, and leaves the model cast to dtype.
    """

    def __init__(self, model, config, dtype, ranks):
        self.model, self.config = model, config
        named = dict(model.named_parameters())
        matrices = {name: p for name, p in named.items() if p.ndim >= 2 and not re.search("embed|lm_head|conv", name)}
        self.rest = {name: p for name, p in named.items() if name not in matrices}
        self.muon = Muon(matrices, dtype, config.momentum, config.weight_decay, ranks, config.compile)
        self.adamw = AdamW(self.rest.values(), ranks)
        model.cast(dtype)
        # [R] eq. 5: AdamW gets, in place of a bias's gradient, its expert's share of the tokens less 1 / E, and makes a
        # PID-like loop of that. The last bias, that of skip, is left alone.
        biases = [router.balancing_biases[:-1] for router in model.routers]
        # Its betas and rate are not published. With (0.9, 0.999) at a constant rate the load oscillates for long; with
        # these, at a rate that falls with lr, it does not. (Nano, 200 steps, two seeds, bits a byte: 1.857 and 1.858 at
        # a rate of 0.01, 1.838 and 1.853 at 0.02, 1.849 and 1.860 at 0.04. With a warm-up like lr's 1.827 and 1.849:
        # two seeds do not tell these from none.)
        self.balance = AdamW(biases, betas=BALANCING[config.balancing], prefix="balance") if biases else None
        self.parts = [part for part in (self.muon, self.adamw, self.balance) if part]

    def step(self, step, counts):
        """Update everything. counts: how the whole batch was spread over the experts, from collect_counts."""
        config, lr = self.config, learning_rate(step, self.config)
        self.muon.step(lr)
        self.adamw.step(lr)
        if self.balance and config.balancing != "none":
            balance_lr = config.balance_lr * learning_rate(max(step, config.warmup), config) / config.lr
            load = counts[:, :-1] / counts.sum(dim=1, keepdim=True)  # (L, E): each expert's share of the tokens
            self.balance.step(balance_lr, list(load - 1 / load.shape[1]))

    def masters(self):
        """The model's state dict with fp32 masters in the place of bf16 weights: on rank 0, with all ranks' help."""
        flat = self.adamw.gather(self.adamw.flat).split([p.numel() for p in self.rest.values()])
        rest = {name: master.view(p.shape) for (name, p), master in zip(self.rest.items(), flat)}
        return self.model.state_dict() | self.muon.collect(self.muon.master) | rest

    def state(self):
        """{name: tensor}, the same for any number of ranks: on rank 0, with all ranks' help."""
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def load_state(self, tensors):
        """Put back what state() gave."""
        for part in self.parts:
            part.load_state(tensors)


def learning_rate(step, config):
    """Linear warm-up, then a cosine that would reach final_lr * lr one step after the last."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def load_entropy(load):
    """How evenly the experts are used: H(p) / ln E of load (L, E), averaged over layers; 1 is perfectly even."""
    p = load / load.sum(dim=1, keepdim=True).clamp_min(1)
    return (torch.special.entr(p).sum(dim=1) / math.log(max(2, load.shape[1]))).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: written aside, synced, renamed. Whatever moment the power goes, a whole one is there.


def sync(path):
    """Ask the disk to keep a file or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing, for directories say
            raise
    finally:
        os.close(descriptor)


def replace_folder(new, final):
    """Put the finished folder new in the place of final, which may exist."""
    for path in [*new.iterdir(), new]:
        sync(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():  # NFS keeps a file that somebody on this machine still reads
        old.rename(f"{old}.{time.time_ns()}")
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def last_good(out):
    """What a message says of a run's newest checkpoint."""
    saved = newest_first(out)
    return f"{saved[0]} is the last good checkpoint" if saved else "there is no checkpoint yet"


class Saver:
    """Saves checkpoints while training goes on; on a CPU only where twice the memory of what is to be saved is free."""

    def __init__(self, out, optimizer, tokenizer, keep, ranks):
        self.out, self.optimizer, self.tokenizer, self.keep, self.ranks = out, optimizer, tokenizer, keep, ranks
        self.thread, self.last = ThreadPoolExecutor(1), None  # the Future of the last save in the background
        self.on_cpu = ranks.device.type == "cpu"

    def save(self, step, record, best):
        """Save a step, as out/best, too, if it is the best. All ranks call this and give what they own; rank 0 writes,
        once the save before is done."""
        self.check(wait=True)
        masters, state = self.optimizer.masters(), self.optimizer.state()
        if not self.ranks.first:
            return
        size = sum(t.numel() * t.element_size() for tensors in (masters, state) for t in tensors.values())
        if self.on_cpu and free_memory() < 2 * size:
            return self.write(step, masters, state, dict(record), best)
        # On a CPU these are what the next step will change; from a GPU most of them have been copied already.
        masters, state = (
            {name: t.detach().to("cpu", copy=self.on_cpu) for name, t in tensors.items()}
            for tensors in (masters, state)
        )
        self.last = self.thread.submit(self.write, step, masters, state, dict(record), best)

    def write(self, step, masters, state, record, best):
        """Write out/step-NNNNNNN; forget all but the newest `keep`. If it cannot: OSError, and the older ones stay."""
        final = self.out / f"step-{step:07d}"
        new = self.out / f".{final.name}.partial"
        shutil.rmtree(new, ignore_errors=True)
        try:
            self.optimizer.model.save_pretrained(new, masters)
            self.tokenizer.save(new)
            # Without it vLLM and SGLang would take trainer.safetensors for weights, too.
            index = {"metadata": {}, "weight_map": dict.fromkeys(official_names(masters), "model.safetensors")}
            (new / "model.safetensors.index.json").write_text(json.dumps(index))
            save_safetensors(new / "trainer.safetensors", state)
            files = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(new.iterdir())}
            record = {**record, "step": step, "files": files}
            record["sha256"] = record_sha256(record)
            (new / "trainer.json").write_text(json.dumps(record, indent=2) + "\n")
            if best:
                mark_best(new)  # first, for once the step is there nobody would do it any more
            replace_folder(new, final)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise OSError(f"could not save step {step}: {error.strerror or error}; {last_good(self.out)}") from None
        saved = checkpoints_in(self.out)
        newest = saved.index(final) + 1  # what is beyond was damaged when the run was resumed
        for old in saved[:newest][: -self.keep] + saved[newest:]:
            try:
                shutil.rmtree(old)
            except OSError as error:
                warn_once(f"{old} stays, it could not be deleted: {error.strerror or error}")

    def check(self, wait=False):
        """Raise what went wrong in the last save, if it is written already; wait: until it is."""
        if self.last and (wait or self.last.done()):
            self.last.result()


def record_sha256(record):
    """Of what trainer.json or args.json holds beside this number itself."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def check(checkpoint):
    """Raises ValueError or OSError, naming the file, unless every file of a checkpoint is as it was written."""
    record = read_json(checkpoint / "trainer.json")
    if record.get("sha256") != record_sha256(record):
        raise ValueError(f"{checkpoint / 'trainer.json'} is damaged: another SHA-256 than when it was written")
    for name, (size, digest) in record["files"].items():
        path = checkpoint / name
        if path.stat().st_size != size or sha256(path) != digest:
            raise ValueError(f"{path} is damaged: another size or SHA-256 than when it was written")


def mark_best(checkpoint):
    """Make out/best a checkpoint of the same files (hard links where the file system has them)."""
    new = checkpoint.with_name(".best.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for file in checkpoint.iterdir():
        try:
            os.link(file, new / file.name)
        except OSError:
            shutil.copyfile(file, new / file.name)
    replace_folder(new, checkpoint.with_name("best"))


# ---------------------------------------------------------------------------------------------------------------------
# Log and pictures


def whole_lines(out):
    """Yield the object of each line of out/log.jsonl, and where the line ends; nothing for one that is damaged or that
    the power cut short."""
    path, end = out / "log.jsonl", 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        end += len(line)
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int and line.endswith(b"\n"):
                yield entry, end


def write_line(log, entry):
    """Add an object to a run's log. If it cannot: OSError, naming the file."""
    try:
        log.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(f"could not write {log.name}: {error.strerror}; {last_good(Path(log.name).parent)}") from None


def read_log(out):
    """The objects of out/log.jsonl."""
    return [entry for entry, _ in whole_lines(out)]


def plot(out):
    """Draw out/loss.png and, for a mixture of experts, out/experts.png from the log."""
    plt, name = pyplot(), literal(out.resolve().name)
    log = [entry for entry in read_log(out) if "loss" in entry]
    if not log:
        return
    steps, losses = [e["step"] for e in log], np.array([e["loss"] for e in log], dtype=float)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    width = max(1, len(log) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    label = f"training (mean of {width} steps)" if width > 1 else "training"
    axis.plot(steps[width - 1 :], smooth, "." if len(log) == 1 else "-", color="tab:blue", label=label)
    seen = [e for e in log if e.get("val_loss") is not None]
    if seen:
        label = f"validation, at last {seen[-1]['val_loss']:.3f} nats a token = {seen[-1]['val_bpb']:.3f} bits a byte"
        when, values = [e["step"] for e in seen], [e["val_loss"] for e in seen]
        axis.plot(when, values, "o-", markersize=4, color="tab:orange", label=label)
    axis.set(xlabel="step", ylabel="loss (nats a token)", title=f"{name}: loss")
    if np.isfinite(losses).any():
        axis.set_ylim(0.95 * np.nanmin(losses), 1.05 * np.nanpercentile(losses, 99))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)

    loads = [e for e in log if "load" in e]
    if not loads:
        return
    share = np.array([e["load"] for e in loads], dtype=float)  # (time, L, E)
    share = share / share.sum(axis=2, keepdims=True) * share.shape[2]
    layers = sorted(set(np.linspace(0, share.shape[1] - 1, 8).astype(int)))  # at most 8 panels
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(8, 1.5 + 1.3 * len(layers)), sharex=True, layout="constrained", squeeze=False
    )
    when = [e["step"] for e in loads]  # a column ends at its step, and begins at the one before
    start = max(0, 2 * when[0] - when[1]) if len(when) > 1 else when[0] - 1
    edges = [start, *when], np.arange(share.shape[2] + 1) - 0.5
    for axis, layer in zip(axes[:, 0], layers):
        image = axis.pcolormesh(*edges, share[:, layer].T, cmap="RdBu_r", vmin=0, vmax=2)
        axis.set_ylabel(f"layer {layer}\nexpert")
    axes[-1, 0].set_xlabel("step")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="tokens (1: an even share)", shrink=0.8)
    figure.suptitle(f"{name}: load of the experts (load entropy of the last step: {loads[-1]['load_entropy']:.3f})")
    figure.savefig(out / "experts.png", dpi=110)
    plt.close(figure)


class Trials:
    """Runs that differ in their seeds alone, as one line of a table and one curve of a picture."""

    def __init__(self, runs):
        self.name = os.path.commonprefix([run.resolve().name for run in runs]).rstrip("-_.") or runs[0].resolve().name
        logs, flags = [read_log(run) for run in runs], read_json(runs[0] / "args.json")
        self.runs, self.active = len(runs), flags.get("active_parameters")
        common = set.intersection(*({e["step"] for e in log} for log in logs))
        # A row a step, a run a column.
        self.rows = list(zip(*([e for e in log if e["step"] in common] for log in logs)))
        if not self.rows:
            raise ValueError(
                f"--plot: {', '.join(map(str, runs))} differ in --seed alone, but their logs share no step"
            )
        self.ms_a_step = float(np.median(self.curve("step_ms")[1]))
        self.last_loads = [loads[-1] for log in logs if (loads := [e["load"] for e in log if "load" in e])]

    def curve(self, what, along="step"):
        """(steps, or tokens, (n), values (n, runs)) where every run has logged `what`."""
        rows = [row for row in self.rows if all(e.get(what) is not None for e in row)]
        values = np.array([[e[what] for e in row] for row in rows], float).reshape(len(rows), self.runs)
        return np.array([row[0][along] for row in rows]), values

    def at_end(self, what, digits, spread=False):
        """The mean of the last values, and their standard deviation; nothing for what was not logged."""
        _, values = self.curve(what)
        if not len(values):
            return ""
        more = f" ± {values[-1].std(ddof=1):.{digits}f}" if spread and self.runs > 1 else ""
        return f"{values[-1].mean():.{digits}f}{more}"


def group_runs(runs):
    """Trials of run directories, in their order. Raises FileNotFoundError for what is no run."""
    groups = []  # (flags, {seed: run})
    for run in runs:
        if not (run / "args.json").is_file() or not read_log(run):
            raise FileNotFoundError(f"--plot: {run} holds no run with a log")
        flags = read_json(run / "args.json") | {"out": None, "sha256": None}
        seed = flags.pop("seed", None)
        # Runs of the same seed, too, are no group: something else must differ, the code say
        group = next((seeds for others, seeds in groups if others == flags and seed not in seeds), None)
        if group is None:
            groups.append((flags, group := {}))
        group[seed] = run
    return [Trials([*seeds.values()]) for _, seeds in groups]


def compare(runs, out):
    """Print a table of runs, and draw them over each other in out/compare.png. Runs that differ in --seed alone are
    one line and one curve: their mean, and the range of all."""
    trials = group_runs(runs)
    width = max(len(t.name) for t in trials)
    print(f"| {'run':{width}} | seeds | active | Mtokens | ms a step | validation loss | bits a byte | load entropy |")
    print("|---" * 8 + "|")
    for t in trials:
        active = f"{t.active:,}" if t.active else ""
        print(
            f"| {t.name:{width}} | {t.runs} | {active} | {t.rows[-1][0]['tokens'] / 1e6:.2f} "
            f"| {t.ms_a_step:.0f} | {t.at_end('val_loss', 4, spread=True)} | {t.at_end('val_bpb', 4)} "
            f"| {t.at_end('val_load_entropy', 3)} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    draw_together(trials, out / "compare.png")
    print(f"picture: {out}/compare.png")


def draw_together(trials, path, change=None):
    """Validation loss against tokens and against time, load entropy, and the load of the experts at the end. change:
    after how many tokens the text became another, if it did."""
    plt = pyplot()
    figure, ((by_tokens, by_time), (entropies, loads)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    colors = plt.get_cmap("tab10" if len(trials) <= 10 else "tab20").colors
    dashes = ["-", "--", "-.", ":"]  # some of these colours look alike to the colour-blind
    for t, color, dash in zip(trials, colors * len(trials), dashes * len(trials)):
        for axis, what, along, scale in (
            (by_tokens, "val_loss", "tokens", 1e-6),
            (by_time, "val_loss", "step", t.ms_a_step / 1e3),
            (entropies, "val_load_entropy", "tokens", 1e-6),
        ):
            x, values = t.curve(what, along)
            if len(x):
                line = "o" if len(x) == 1 else dash
                axis.plot(x * scale, values.mean(axis=1), line, color=color, label=literal(t.name), linewidth=1.4)
                axis.fill_between(x * scale, values.min(axis=1), values.max(axis=1), color=color, alpha=0.15)
        if t.last_loads:
            share = np.array(t.last_loads, float)  # (runs, L, E)
            share = np.sort(share / share.sum(axis=2, keepdims=True) * share.shape[2])[..., ::-1].mean(axis=(0, 1))
            loads.plot((np.arange(len(share)) + 0.5) / len(share), share, f".{dash}", color=color, linewidth=1.2)
    losses = [t.curve("val_loss")[1] for t in trials if len(t.curve("val_loss")[1])]
    if losses:  # what matters is the end, not the first fall
        low, high = min(v.min() for v in losses), max(v[len(v) // 4 :].max() for v in losses)
        margin = 0.05 * (high - low + 0.01)
        for axis in (by_tokens, by_time):
            axis.set_ylim(low - margin, high + margin)
    if change:
        for axis in (by_tokens, entropies):
            axis.axvline(change / 1e6, color="gray", linestyle=":")
    by_tokens.set(xlabel="million tokens", ylabel="validation loss (nats a token)", title="loss against tokens")
    by_time.set(xlabel="seconds of steps", ylabel="validation loss (nats a token)", title="loss against time")
    entropies.set(xlabel="million tokens", ylabel="load entropy (1: even)", title="load of the experts")
    loads.set(
        xlabel="experts of a layer, busiest first (share of them)", ylabel="tokens, as a multiple of an even share",
        title="load at the end, mean of the layers",
    )  # fmt: skip
    for axis in (by_tokens, by_time, entropies, loads):
        axis.grid(alpha=0.3)
    if losses:
        by_tokens.legend(fontsize="small")
    figure.savefig(path, dpi=72)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def collect_counts(routers, ranks):
    """How many tokens each layer sent to each expert and to skip since the last call, over all ranks: (L, E + 1). None
    without routers."""
    if not routers:
        return None
    counts = ranks.sum(torch.stack([router.counts for router in routers]))
    for router in routers:
        router.counts.zero_()
    return counts


@torch.no_grad()
def evaluate(model, text, config, ranks):
    """What the log says of an evaluation: val_loss (nats a token, None if not finite), val_bpb (bits a byte) and,
    unless the model is dense, val_load_entropy."""
    # As many on any number of ranks, so that what they find can be compared.
    starts = text.validation_starts(config.eval_batches * sequences_at_once(16, config.block_size))
    own = starts[ranks.rank :: ranks.world]
    total = torch.zeros((), dtype=torch.float64 if ranks.device.type != "mps" else torch.float32, device=ranks.device)
    for i in range(0, len(own), config.micro_batch_size):
        inputs, targets = text.batch(own[i : i + config.micro_batch_size], ranks.device)
        _, loss = model(inputs, targets)
        total += loss * len(inputs)
    loss, counts = ranks.sum(total).item() / len(starts), collect_counts(model.routers, ranks)
    found = {"val_loss": finite(loss), "val_bpb": finite(loss / math.log(2) / text.meta["bytes_per_token"])}
    return found if counts is None else found | {"val_load_entropy": load_entropy(counts[:, :-1])}


def in_words(found):
    """What evaluate found, for people to read."""
    if found["val_loss"] is None:
        return "validation loss is not finite"
    entropy = f", load entropy {found['val_load_entropy']:.3f}" if "val_load_entropy" in found else ""
    return f"validation loss {found['val_loss']:.4f} nats a token, {found['val_bpb']:.4f} bits a byte{entropy}"


def finite(number):
    """number, or None: JSON has no NaN or infinity."""
    return number if math.isfinite(number) else None


HOLDS_RUN = "{out} holds a run already: continue it with --resume, or choose another --out"


def resolve_flags(given):
    """The flags of this run, and whether it goes on from a checkpoint: those given and the preset's recipe, or with
    --resume the run's own."""
    out = Path(given.get("out", TrainConfig.out)).expanduser()
    given = given | {"out": str(out)}
    data = Path(given.get("data", "")).expanduser().absolute()
    if "data" in given and any((data / file).exists() for file in ("meta.json", "prepare.py")):
        given["data"] = str(data)  # a folder here before a name under data/, and so that --resume finds it again
    if given.get("init_from"):
        given["init_from"] = str(Path(given["init_from"]).expanduser().absolute())
    files = [path for path in (out / "args.json", out / "log.jsonl") if path.exists() and path.stat().st_size]
    holds_run = bool(files) or any(out.glob("step-*"))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a crash
    goes_on = given.get("resume") or restarted
    if given.get("resume") and not holds_run:
        raise FileNotFoundError(f"--resume: {out} holds no run")
    if holds_run and not goes_on and not given.get("eval_only"):
        raise FileExistsError(HOLDS_RUN.format(out=out))
    if not (holds_run and goes_on):
        return recipe(given) | given, False
    saved = saved_flags(out)
    fixed = {f.name for f in fields(ZayaConfig)} | {"preset", "init_from"}
    own = TrainConfig(**flags_of(TrainConfig, saved))
    model = {} if own.init_from else asdict(model_config(own, saved, 1, None))
    for name in ("vocab_size", "max_position_embeddings"):  # these depend on the data and on --block_size
        model.pop(name, None)
    for name in sorted(fixed & given.keys()):
        if given.pop(name) != (model | saved).get(name):  # (an equal one need not be kept: a new run may refuse it)
            raise ValueError(f"--resume cannot change --{name}: that would be another model; start a run of its own")
    return saved | given, True  # with the given --out, for the folder may have been moved


def saved_flags(out):
    """The flags of the run in out: args.json's or, if that is damaged, those of its newest whole checkpoint."""
    path, checkpoints = out / "args.json", newest_first(out)
    try:
        flags = read_json(path)
        if flags.pop("sha256", None) not in (None, record_sha256(flags)):
            raise ValueError("another SHA-256 than when it was written")
        TrainConfig(**flags_of(TrainConfig, flags))
    except (ValueError, OSError, TypeError) as error:
        if not checkpoints:
            raise ValueError(f"{path} cannot be read, and there is no checkpoint yet: {error}") from None
        checkpoint = first_whole(checkpoints, check, say=False)
        warn_once(f"{path} cannot be read ({error}); the flags are those of {checkpoint}")
        flags = read_json(checkpoint / "trainer.json")["flags"]
    return flags


def model_to_tune(source, config, given):
    """A checkpoint's model, with the context length and RoPE bases that the flags give."""
    if (source / "trainer.json").exists():  # one of ours, with SHA-256s
        check(source)
    model = Zaya.from_pretrained(source, dtype=torch.float32)
    free = {"rope_theta", "sliding_rope_theta", "max_position_embeddings"}
    changes = flags_of(ZayaConfig, given)
    if fixed := sorted(changes.keys() - free):
        raise ValueError(f"--{fixed[0]} is {config.init_from}'s own and cannot be changed")
    model.config = replace(model.config, **changes)
    return model


def starting_point(checkpoint, config, given, folder, meta):
    """(model, tokenizer, record) to go on from: the checkpoint to resume, or a model to tune or a fresh one at step 0.
    The record is what checkpoints keep of a run beside its tensors. Raises ValueError if the data's tokens are not the
    model's."""
    source = checkpoint or (None if config.init_from is None else find_checkpoint(config.init_from))
    brings_its_own = source and (source / "tokenizer.json").is_file()
    if brings_its_own:
        refuse_other_tokens(folder, source)
    elif source:
        warn_once(f"{source} has no tokenizer.json: those of {folder} must be its tokens, which cannot be checked")
    tokenizer = load_tokenizer(source if brings_its_own else folder)  # the model's own may know how to chat
    record = {"step": 0, "sequences": 0, "tokens": 0, "skipped": 0, "best": None}
    if checkpoint:
        model, record = Zaya.from_pretrained(checkpoint, dtype=torch.float32), read_json(checkpoint / "trainer.json")
    elif source:
        model = model_to_tune(source, config, given)
    elif config.eval_only:
        raise ValueError("--eval_only needs a checkpoint: --init_from DIR, or --resume and a run's --out")
    else:
        torch.manual_seed(config.seed)
        model = Zaya(model_config(config, given, meta["vocab_size"], tokenizer.eot))
    if meta["vocab_size"] > model.config.vocab_size:
        raise ValueError(f"--data has {meta['vocab_size']} token ids, the model knows {model.config.vocab_size}")
    return model, tokenizer, record


def note_data(record, folder, training, config, ranks):
    """Record which data is used: say so if the training tokens changed. Forget the best if the loss would now be that
    of other validation tokens, or if out/best is no longer whole."""
    size = len(training.ids)
    if record.get("train_tokens", size) != size and ranks.first and not config.eval_only:
        print(f"--data has other training tokens than at step {record['step']}: they come in an order of their own")
    record["train_tokens"] = size
    best_of, best = [sha256(folder / "val.bin"), config.eval_batches, config.block_size], Path(config.out) / "best"
    if record.get("best_of") != best_of:
        if record["best"] is not None and ranks.first and not config.eval_only:
            print(f"validation is not what it was: the next evaluation's checkpoint takes the place of {best}")
        record |= {"best": None, "best_of": best_of}
    if record["best"] is not None and not config.eval_only:
        try:
            old = best.with_name(".best.old")  # where replace_folder may have left it
            check(old if old.exists() and not best.exists() else best)
        except (ValueError, OSError) as error:
            record["best"] = None
            ranks.first and warn_once(
                f"{best} is not whole ({error}); the next evaluation's checkpoint takes its place"
            )


def refuse_disagreement(record, training, config, model, ranks):
    """Raises ValueError unless all ranks, on several nodes say, are about to train the same."""
    if ranks.world == 1:
        return
    paths = dict.fromkeys(("out", "data", "init_from"))  # which a node may know by another name
    # A number of each tensor to be tuned. (Fresh ones another CPU may round differently.)
    start = [p.flatten()[0].item() for p in model.parameters()] if config.init_from else None
    parts = {
        "checkpoint": [record["step"], record["best"], start],
        "flags": [asdict(config) | paths, asdict(model.config)],
        "data": [record["best_of"], len(training.ids), training.ids[:: len(training.ids) // 1000 + 1].tolist()],
        "code": [torch.__version__, *(sha256(path) for path in sorted(ROOT.glob("*.py")))],
    }  # a number of 48 bits for each
    own = [int(hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12], 16) for part in parts.values()]
    sums = ranks.sum(torch.tensor(own, device=ranks.device)).tolist()
    if others := [name for name, mine, total in zip(parts, own, sums) if total != ranks.world * mine]:
        raise ValueError(
            f"not all ranks have the {' and the '.join(others)} of rank {ranks.rank}: all nodes must be given the same "
            "flags, and see one and the same folder"
        )


def resolve_defaults(config, model, ranks):
    """Fill in what config leaves to the model, to the number of ranks and to the device."""
    config.block_size = config.block_size or model.config.max_position_embeddings
    model.config.max_position_embeddings = max(config.block_size, model.config.max_position_embeddings)
    if config.batch_size % ranks.world:
        raise ValueError(f"--batch_size {config.batch_size} cannot be shared evenly by {ranks.world} ranks")
    share = config.batch_size // ranks.world
    config.micro_batch_size = config.micro_batch_size or sequences_at_once(share, config.block_size)
    if share % config.micro_batch_size:
        raise ValueError(
            f"--micro_batch_size {config.micro_batch_size} does not divide a rank's {share} sequences; none: what does"
        )
    config.compile = ranks.device.type == "cuda" if config.compile is None else config.compile


def checkpoint_to_resume(out, ranks):
    """A run's newest undamaged checkpoint, or else its best; None where there is none yet. Raises ValueError if all are
    damaged."""
    if candidates := newest_first(out):
        return first_whole(candidates, check, say=ranks.first)
    ranks.first and print(f"{out} has no whole checkpoint yet: starting at step 0")


def open_log(out):
    """The log of a run directory, for more lines; while it is open, open_log raises OSError in any other process."""
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a", buffering=1)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another process is training in {out}") from None
    except OSError:  # a file system without locks
        pass
    return log


def restore(out, log, record):
    """Make the run directory what it was at the record's step, and keep the flags in args.json."""
    if (out / ".best.old").exists() and not (out / "best").exists():  # power failed between replace_folder's two
        (out / ".best.old").rename(out / "best")
    for name in (".step-*", ".best.*", ".args.json.*"):  # what a save that the power cut short has left
        for leftover in out.glob(name):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
    flags = record["flags"] | {"sha256": record_sha256(record["flags"])}
    with write_aside(out / "args.json") as file:
        file.write(json.dumps(flags, indent=2).encode() + b"\n")
    log.truncate(max((end for entry, end in whole_lines(out) if entry["step"] <= record["step"]), default=0))


def averaging(model):
    """model, wrapped so that the backward pass averages its gradients over the ranks. Buffers are left alone: every
    rank counts its own tokens, and the balancing biases are equal on all ranks anyway."""
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # the argument of this name is deprecated from PyTorch 2.13 on
    return ddp


def prefetched(items):
    """The same items, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def micro_batches(training, step, seen, config, ranks):
    """A rank's (inputs, targets) from `step`, before which the run has seen that many sequences, to the end of the run,
    one forward pass after the other."""
    share, size = config.batch_size // ranks.world, config.micro_batch_size
    for _ in range(step, config.steps):
        own = seen + ranks.rank * share
        for start in range(own, own + share, size):
            yield training.training_batch(start, start + size, ranks.device)
        seen += config.batch_size


def add_up_gradients(ddp, batches, config, ranks, spent):
    """A rank's share of a step, micro-batch after micro-batch -> its mean loss. The gradients that are left behind are
    the mean over all ranks, taken while the last micro-batch's backward pass goes on."""
    passes = config.batch_size // ranks.world // config.micro_batch_size
    mean = torch.zeros((), device=ranks.device)
    for more_to_come in reversed(range(passes)):
        with timed(spent, "data"):
            inputs, targets = next(batches)
        with ddp.no_sync() if ranks.world > 1 and more_to_come else nullcontext():
            _, loss = ddp(inputs, targets)
            loss = loss / passes
            loss.backward()
        mean += loss.detach()
    return mean


def main():
    given = parse_flags(__doc__, TrainConfig, PRESETS[TrainConfig.preset])
    if given.get("plot"):
        runs = [Path(run).expanduser() for run in given["plot"]]
        return compare(runs, Path(given.get("out", TrainConfig.out)).expanduser())
    given, resuming = resolve_flags(given)
    config = TrainConfig(**flags_of(TrainConfig, given))
    tune_memory()
    ranks = Ranks(config.device)
    if resuming and not config.resume and ranks.store and not ranks.store.check(["run is ours"]):
        raise FileExistsError(HOLDS_RUN.format(out=config.out))  # what torchrun started again was a refusal
    out, device = Path(config.out), ranks.device
    log = open_log(out) if resuming and ranks.first and not config.eval_only else None

    # Data, model, optimizer
    folder, meta = open_data(config.data, ranks)
    checkpoint = checkpoint_to_resume(out, ranks) if resuming else None
    model, tokenizer, record = starting_point(checkpoint, config, given, folder, meta)
    resolve_defaults(config, model, ranks)
    training, validation = (Tokens(folder, name, config.block_size, config.seed, meta) for name in ("train", "val"))
    note_data(record, folder, training, config, ranks)
    refuse_disagreement(record, training, config, model, ranks)
    config.dtype = faster_dtype(ranks) if config.dtype == "auto" else config.dtype  # all ask, or none
    model.to(device)
    model.kernels = config.kernels
    if config.recompute:
        recompute(model)
    optimizer = Optimizer(model, config, getattr(torch, config.dtype), ranks)
    if checkpoint:
        optimizer.load_state(load_safetensors(checkpoint / "trainer.safetensors"))
    compiled = torch.compile(model, dynamic=False) if config.compile else model

    if config.eval_only:
        found = evaluate(compiled, validation, config, ranks)
        ranks.leave()
        if ranks.first:
            print(in_words(found))
        return

    if record["step"] > config.steps:
        raise ValueError(f"--steps {config.steps}: the run in {out} has made {record['step']} steps already")
    ddp = averaging(compiled) if ranks.world > 1 else compiled
    sys.stdout, sys.stderr = (stream and TolerantStream(stream) for stream in (sys.stdout, sys.stderr))
    say_memory(memory_plan(model, optimizer, config.micro_batch_size, config.block_size), ranks)
    tokens_a_step = config.batch_size * config.block_size
    if ranks.first:
        total, active = model.parameter_counts()
        log = log or open_log(out)
        if log.tell() and not resuming:  # another process was faster
            raise FileExistsError(HOLDS_RUN.format(out=out))
        if ranks.store:
            ranks.store.set("run is ours", "")
        record["flags"] = asdict(config) | flags_of(ZayaConfig, given) | {"resume": False, "active_parameters": active}
        for name in ("micro_batch_size", "compile"):  # what follows from this machine need not do for the next
            record["flags"][name] = given.get(name)
        restore(out, log, record)
        passes = (record["tokens"] + (config.steps - record["step"]) * tokens_a_step) / len(training.ids)
        print(
            f"{total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active a token; {len(training.ids) / 1e6:.1f}M "
            f"tokens of {config.data} ({tokenizer.name}), {passes:.2g} passes over them; "
            f"{ranks.world} x {device}, {config.dtype}" + (f"; going on from {checkpoint}" if checkpoint else "")
        )
        flops = training_flops(model.config, active, config.block_size) / ranks.world
        speed = Speed(flops, device, config.dtype)

    asked_to_stop = listen(ranks)
    step, bad_in_a_row = record["step"], 0
    spent = dict.fromkeys(("data", "evaluation", "checkpoints"), 0.0)  # seconds
    load_every = max(1, config.steps // 200)  # how often the log holds every expert's load
    saver = Saver(out, optimizer, tokenizer, config.keep, ranks)
    batches = micro_batches(training, step, record["sequences"], config, ranks)
    if device.type != "mps":  # which two threads crash: PyTorch's issue 197805
        batches = prefetched(batches)
    quiet = not ranks.first or sys.stderr is None
    with tqdm(total=config.steps, initial=step, unit="step", disable=quiet, dynamic_ncols=True) as bar:
        while step < config.steps:
            started = time.perf_counter()
            lr = learning_rate(step, config)

            loss = add_up_gradients(ddp, batches, config, ranks, spent)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)

            # What all ranks must agree on: the loss, and whether to stop.
            stop = torch.tensor(float(bool(asked_to_stop)), device=device)
            loss, stopping = ranks.sum(torch.stack([loss / ranks.world, stop])).tolist()
            norm = grad_norm.item()
            counts = collect_counts(model.routers, ranks)
            loads = None if counts is None else counts[:, :-1].cpu()
            # From here on nothing waits for the GPU: the next step is launched while it still updates the weights.
            # Equal on all ranks: the loss was summed, and the gradients were averaged before their norm was taken.
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step(step, counts)
                bad_in_a_row = 0
            else:  # skip the update; one bad batch must not spoil the weights
                record["skipped"] += 1
                bad_in_a_row += 1
            model.zero_grad(set_to_none=True)
            step += 1
            record["sequences"] += config.batch_size
            record["tokens"] += tokens_a_step

            # Evaluate, log, save.
            entry = {"step": step, "loss": finite(loss), "lr": lr, "grad_norm": finite(norm)}
            entry |= {name: record[name] for name in ("tokens", "skipped")}
            if loads is not None:
                entry["load_entropy"] = load_entropy(loads)
                if step % load_every == 0 or config.log_every > 1:
                    entry["load"] = loads.tolist()
            seconds = time.perf_counter() - started  # on a GPU with the last step's update in the place of this one's
            if ranks.first:
                entry |= speed(tokens_a_step, seconds)
            better = False
            if step % config.eval_every == 0 or step == config.steps:
                with timed(spent, "evaluation"):
                    entry |= evaluate(compiled, validation, config, ranks)
                new, best = entry["val_loss"], record["best"]
                better = new is not None and (best is None or new < best) and not bad_in_a_row
                record["best"] = new if better else best
            if ranks.first:
                if step % config.log_every == 0 or "val_loss" in entry:
                    write_line(log, entry)
                report(bar, entry)
            if bad_in_a_row == 10:
                saver.check(wait=True)
                raise ArithmeticError(
                    f"the loss or the gradient was not finite in ten steps up to step {step}; {last_good(out)}"
                )
            due = better or (step % config.save_every == 0 and not bad_in_a_row)  # not right after a skipped step
            if due or stopping or step == config.steps:
                with timed(spent, "checkpoints"):
                    if ranks.first:
                        os.fsync(log.fileno())
                    saver.save(step, record, best=better)
            saver.check()
            if stopping:
                break
    with timed(spent, "checkpoints"):
        saver.check(wait=True)
    if ranks.world > 1:
        report_ranks(ddp, ranks)
    if ranks.first:
        report_speed(out, record["step"], spent)
        if record["skipped"]:
            print(f"{record['skipped']} steps were skipped: their loss or gradient was not finite")
        try:
            plot(out)
        except (OSError, ImportError) as error:  # the run itself is whole
            warn_once(f"no pictures: {error}")
    ranks.leave()
    if ranks.first:
        farewell(model, tokenizer, config, step)


STOP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # a polite end, Ctrl-C, a closed terminal


def listen(ranks):
    """From here on a signal to stop ends nothing -> the list of those that have come. The loop asks it at each step: it
    finishes that, saves, and leaves with status 0."""
    heard = []

    def hear(number, frame):
        if ranks.first and not heard:
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, b"\nstopping after this step\n")
        heard.append(number)

    on_stop(hear)

    # A terminal and torchrun signal all processes of a group, and so the compilers that torch.compile starts, too. What
    # the thread that starts a process has blocked, the process has blocked: so one thread hears for all.
    def ear():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
        threading.Event().wait()

    threading.Thread(target=ear, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    return heard


def on_stop(action):
    """What a signal to stop does from here on. One that is ignored, as nohup has it, stays so."""
    for number in STOP:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, action)


class TolerantStream:
    """A stream to print to that does not mind when nobody reads it any more: a closed pipe or terminal shall not end a
    training before it has saved."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def report(bar, entry):
    """Move the progress bar on; a line of its own for an evaluation."""
    bar.update()
    loss = "skipped" if entry["loss"] is None else f"{entry['loss']:.3f}"
    shown = {"loss": loss, "tok/s": f"{entry['tokens_per_s']:,.0f}"}
    if "load_entropy" in entry:
        shown["entropy"] = f"{entry['load_entropy']:.3f}"
    bar.set_postfix(shown, refresh=False)
    if "val_loss" in entry:
        bar.write(f"step {entry['step']}: {in_words(entry)}")


def report_speed(out, start, spent):
    """Print where the time went, and how much of the machine was used, over the last nine tenths of what the log has of
    this process's steps, which came after step `start`."""
    entries = [e for e in read_log(out) if e["step"] > start]
    entries = entries[len(entries) // 10 :]
    if not entries:
        return
    middle = {name: np.median([e[name] for e in entries]) for name in ("tokens_per_s", "tflops", "of_product")}
    mfu = [e["mfu"] for e in entries if "mfu" in e]
    efficiency = [e["tflops"] / e["watts"] for e in entries if "watts" in e]  # of this rank's GPU
    known = f", MFU {np.median(mfu):.1%}" if mfu else ""
    known += f", {np.median(efficiency):.3g} TFLOP a joule" if efficiency else ""
    p50, p95, longest = np.percentile([e["step_ms"] for e in entries], (50, 95, 100))
    print(
        f"{middle['tokens_per_s']:,.0f} tokens/s, {middle['tflops']:.3g} TFLOP/s a device{known}, "
        f"{middle['of_product']:.0%} of a large product's rate; a step took {p50:.0f} ms (p50), {p95:.0f} (p95), "
        f"{longest:.0f} (max), waiting for data {spent['data']:.1f} s of all; besides: evaluation "
        f"{spent['evaluation']:.1f} s, checkpoints {spent['checkpoints']:.1f} s"
    )


def report_ranks(ddp, ranks):
    """Print which rank is the slowest, by what DistributedDataParallel timed: the first steps and every hundredth."""
    logged, ms = ddp._get_ddp_logging_data(), torch.zeros(ranks.world, 2, device=ranks.device)
    parts = "forward_compute", "backward_compute", "backward_comm", "backward_compute_comm_overlap"
    forward, backward, communication, hidden = (logged.get(f"avg_{part}_time", 0) / 1e6 for part in parts)  # were ns
    ms[ranks.rank] = torch.tensor([forward + backward, communication - hidden])
    own, waited = ranks.sum(ms).t().tolist()
    slowest = own.index(max(own))
    if ranks.first and own[slowest]:
        print(
            f"the slowest is rank {slowest}: {own[slowest]:.1f} ms for a forward and backward pass, the fastest takes "
            f"{min(own):.1f}; {waited[slowest]:.1f} ms of its communication come on top"
        )


SAMPLE_TOKENS = 200  # of the text after the last step


def farewell(model, tokenizer, config, step):
    """What to do next; after the last step, with a sample of text."""
    if step < config.steps:
        run = "torchrun ..." if "RANK" in os.environ else "python"
        go_on = f"{run} train.py --out {quote(config.out)} --resume"
        return print(f"stopped after step {step}, which is saved; go on with: {go_on}")
    on_stop(lambda number, frame: sys.exit(0))  # all is saved
    start = [tokenizer.eot] if tokenizer.eot is not None else tokenizer.beginning()
    tokens = torch.tensor([start], device=next(model.parameters()).device)
    torch.manual_seed(config.seed)
    # (Colder, a small model says one line over and over: nano's lines differ to 80 % at 0.8, 83 % at 0.9; of 12 texts.)
    sample = model.generate(tokens, SAMPLE_TOKENS, temperature=0.9, top_p=0.95)[0, len(start) :]
    text = tokenizer.decode(sample.tolist())
    print(f"a sample:\n{'-' * 80}\n{text}\n{'-' * 80}")
    prompt = ' --prompt "import "' if config.data == "stdlib" else ""
    drawn = [name for name in ("loss.png", "experts.png") if (Path(config.out) / name).is_file()]
    pictures = f"pictures: {' and '.join(drawn)} in {config.out}; " if drawn else ""
    print(f"{pictures}more text: python sample.py --checkpoint {quote(config.out)}{prompt}")


def run():
    """main; and whatever happens, this rank ends."""
    try:
        with stop_in_one_line():
            try:
                main()
            except RuntimeError as error:
                if "gloo/transport" in str(error):
                    what = "has lost another, which has ended"
                    if "connectFullMesh" in str(error) or "connecting" in str(error):
                        what = "cannot reach another: GLOO_SOCKET_IFNAME must name the network's interface"
                    elif "imed out" in str(error):
                        what = "has waited half an hour for another, which does not answer"
                    raise ConnectionError(f"rank {os.environ['RANK']} {what}") from None
                if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):  # the ranks have not come together
                    raise ConnectionError(str(error).splitlines()[0]) from None
                raise
    except BaseException as end:
        if dist.is_initialized():
            # Before the group's own end, which waits for what ranks were sending each other, and they for us
            atexit.register(os._exit, end.code if isinstance(end, SystemExit) else 1)
        raise


if __name__ == "__main__":
    run()
