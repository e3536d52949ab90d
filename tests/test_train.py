"""train.py: the optimizer against plain references, the order of the data, a run's files, stopping and going on."""

import errno
import gc
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ENVIRONMENT, ROOT, RUN, SHAPE, assert_same_run, command, flags, log_of, rewrite, what_was_learned
from matplotlib.axes import Axes

import data.text.prepare
import train
import zaya
from data.tokenizer import load_tokenizer
from train import Muon, Optimizer, Tokens, TrainConfig, learning_rate, load_entropy, newton_schulz
from zaya import PRESETS, Zaya, ZayaConfig, load_safetensors, read_json, replica

CPU = torch.device("cpu")

ALONE = SimpleNamespace(rank=0, world=1, first=True)


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {name: value for name, value in SHAPE.items() if name != "block_size"}
    return Zaya(ZayaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, **shape | changes))


def loss_of(model, seed=0):
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return model(tokens[:, :-1], tokens[:, 1:])[1]


def run_ranks(*commands):
    """A process for each rank, as torchrun would start them -> their statuses, and what they said on stdout and on
    stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [
        subprocess.Popen(list(map(str, command)), env=ENVIRONMENT | group | {"RANK": str(rank)}, **pipes)
        for rank, command in enumerate(commands)
    ]
    try:
        said = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], *zip(*said)


def train_on_ranks(world, *args):
    """train.py on so many ranks, which end well -> what all of them said on stdout, and on stderr."""
    statuses, stdout, stderr = run_ranks(*[[sys.executable, ROOT / "train.py", *args]] * world)
    assert statuses == [0] * world, stderr
    return "".join(stdout), "".join(stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 32), (3, 32, 96), (5, 8, 40)], ids=str)
def test_newton_schulz_keeps_the_singular_vectors_and_evens_out_the_values(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    g = u @ torch.diag_embed(s.clamp_min(0.05 * s.max())) @ vt  # five steps cannot lift what is nearly nothing
    inside = u.mT @ newton_schulz(g) @ vt.mT  # the result in the basis of g's singular vectors: diagonal
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.3
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-4


def test_newton_schulz_of_no_gradient_is_no_update():
    assert newton_schulz(torch.zeros(2, 8, 16)).eq(0).all()  # an expert that met no token


def plain_muon(weight, grad, momentum_buffer, lr, momentum, weight_decay):
    """One matrix, one step, as a textbook has it -> weight, buffer."""
    buffer = momentum * momentum_buffer + (1 - momentum) * grad
    x = momentum * buffer + (1 - momentum) * grad  # Nesterov: looks one step ahead
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    scale = 0.2 * math.sqrt(max(weight.shape))  # root mean square 0.2, an AdamW update's
    return (1 - lr * weight_decay) * weight - lr * scale * x, buffer


def test_muon_is_the_textbook_one_matrix_by_matrix(monkeypatch):
    monkeypatch.setattr(Muon, "BATCH", 300)  # the matrices of a shape fall into more than one batch, too
    torch.manual_seed(0)
    E, F, D = 3, 12, 20
    parameters = {
        "o_proj.weight": torch.randn(D, 8),
        "q_proj.weight": torch.randn(8, D),
        "experts.gate_up_proj": torch.randn(E, 2 * F, D),
        "experts.down_proj": torch.randn(E, D, F),
        "mlp.gate_up_proj.weight": torch.randn(2 * F, D),
    }

    def pieces(tensors):
        """Every matrix on its own: an expert's gate, up and down are three, and so are a dense model's."""
        gate, up = tensors["experts.gate_up_proj"].split(F, dim=1)
        plain = tensors["o_proj.weight"], tensors["q_proj.weight"], *tensors["mlp.gate_up_proj.weight"].split(F)
        return [*plain, *gate, *up, *tensors["experts.down_proj"]]

    expected = [weight.clone() for weight in pieces(parameters)]
    buffers = [torch.zeros_like(weight) for weight in expected]
    muon = Muon(parameters, torch.float32, momentum=0.9, weight_decay=0.1, ranks=ALONE)
    assert len(muon.rounds) > len({tuple(weight.shape) for weight in expected})
    for step in range(3):
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        grads = pieces({name: p.grad for name, p in parameters.items()})
        for i, grad in enumerate(grads):
            expected[i], buffers[i] = plain_muon(expected[i], grad, buffers[i], 0.02, 0.9, 0.1)
        muon.step(0.02)
        for own, plain in zip(pieces(parameters), expected):
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_adamw_is_torchs_without_decay():
    torch.manual_seed(0)
    own = [torch.randn(5), torch.randn(3, 4), torch.randn(())]
    plain = [p.clone().requires_grad_() for p in own]
    adamw = train.AdamW(own)
    reference = torch.optim.AdamW(plain, lr=1.0, betas=adamw.betas, eps=adamw.eps, weight_decay=0)
    for step in range(5):
        lr = 0.1 / (step + 1)
        for p, q in zip(own, plain):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        adamw.step(lr)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        for p, q in zip(own, plain):
            torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)


def test_balancing_is_adamw_on_the_share_less_an_even_one():
    model = tiny_model()
    optimizer = Optimizer(model, TrainConfig(balance_lr=0.01), torch.float32, ALONE)
    plain = torch.zeros(2, 4, requires_grad=True)
    reference = torch.optim.AdamW(
        [plain], lr=0.01, betas=optimizer.balance.betas, eps=optimizer.balance.eps, weight_decay=0
    )
    for seed in range(4):
        loss_of(model, seed).backward()
        counts = train.collect_counts(model.routers, train.Ranks("cpu"))
        optimizer.step(0, counts)  # the balancing's rate is at its peak: it has no warm-up
        plain.grad = counts[:, :-1] / counts.sum(dim=1, keepdim=True) - 1 / 4
        reference.step()
        biases = torch.stack([router.balancing_biases for router in model.routers])
        torch.testing.assert_close(biases[:, :-1], plain.detach(), rtol=1e-5, atol=1e-6)
        assert biases[:, -1].eq(-1).all()  # the skip entry


def test_the_rate_of_balancing_falls_as_the_learning_rate_does():
    config = TrainConfig(steps=10, warmup=4, lr=0.5, balance_lr=0.03)
    optimizer, rates = Optimizer(tiny_model(), config, torch.float32, ALONE), []
    optimizer.muon.step = optimizer.adamw.step = lambda lr: None
    optimizer.balance.step = lambda lr, grads: rates.append(lr)
    for step in range(10):
        optimizer.step(step, torch.ones(2, 5))
    assert rates[:5] == pytest.approx([0.03] * 5)  # no warm-up
    assert rates[5:] == pytest.approx([0.06 * learning_rate(step, config) for step in range(5, 10)])


def test_balancing_evens_out_a_forced_imbalance():
    model = tiny_model()
    with torch.no_grad():
        for router in model.routers:
            for part in ("fc1", "fc2", "out_proj"):
                router.router_mlp[part].weight.mul_(4)  # a router that has learned to tell tokens apart
            router.balancing_biases[0] = 1.5  # everything goes to expert 0
    optimizer = Optimizer(model, TrainConfig(), torch.float32, ALONE)

    def load():
        with torch.no_grad():
            loss_of(model)
        counts = torch.stack([router.counts for router in model.routers]).float()
        for router in model.routers:
            router.counts.zero_()
        return counts[:, :-1] / counts.sum(dim=1, keepdim=True)

    assert load()[:, 0].eq(1).all() and load_entropy(load()) == 0
    entropies = []
    for step in range(300):
        share = load()
        entropies.append(load_entropy(share))
        optimizer.balance.step(0.02 * (1 - step / 300), list(share - 1 / 4))
    assert np.mean(entropies[-20:]) > 0.75  # of a few dozen tokens; it began at 0


def test_balancing_by_sign_moves_every_bias_by_its_rate():
    """DeepSeek's way: up if the expert has too few tokens, down if too many, whatever came before."""
    model, config = tiny_model(), TrainConfig(balancing="sign", balance_lr=0.01, warmup=0)
    optimizer = Optimizer(model, config, torch.float32, ALONE)
    load_of_model = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.24, 0.26, 0.25, 0.25]])
    expected = torch.zeros(2, 4)
    for _ in range(3):
        optimizer.balance.step(0.01, list(load_of_model - 1 / 4))
        expected -= 0.01 * (load_of_model - 1 / 4).sign()
    found = torch.stack([router.balancing_biases[:-1] for router in model.routers])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_no_balancing_leaves_the_biases_alone(finished, call, tmp_path):
    """Here from the last checkpoint on: the run before it balanced."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    assert call(train, *flags(out=out, resume=True, steps=8, balancing="none")).status == 0
    before, after = (load_safetensors(path / "model.safetensors") for path in sorted(out.glob("step-*"))[-2:])
    biases = [name for name in before if name.endswith("balancing_biases")]
    assert biases and all(before[name][:-1].any() and before[name].equal(after[name]) for name in biases)


def test_what_muon_and_what_adamw_moves():
    model = tiny_model(tie_word_embeddings=False)
    optimizer = Optimizer(model, TrainConfig(), torch.float32, ALONE)
    muon, rest = set(optimizer.muon.parameters), set(optimizer.rest)
    assert muon | rest == {name for name, _ in model.named_parameters()} and not muon & rest
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= rest
    assert all("conv" not in name and model.get_parameter(name).ndim >= 2 for name in muon)
    assert {
        "layers.0.self_attn.o_proj.weight",
        "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.gate.down_proj.weight",
    } <= muon


def test_bf16_has_fp32_masters_and_they_are_what_is_saved(tmp_path):
    model = tiny_model()
    tiny_lr = 1e-6  # far below bf16's resolution: weights of bf16 alone would not move
    optimizer = Optimizer(model, TrainConfig(weight_decay=0.0, lr=tiny_lr, warmup=0), torch.bfloat16, ALONE)
    before = {name: tensor.clone() for name, tensor in optimizer.masters().items()}
    for seed in range(2):
        loss_of(model, seed).backward()
        optimizer.step(0, torch.ones(2, 5))
    masters = optimizer.masters()
    for name, tensor in model.state_dict().items():
        fp32 = re.search(r"norm|scale|temp|input_hidden|balancing|residual", name)
        assert tensor.dtype == (torch.float32 if fp32 else torch.bfloat16), name
        assert masters[name].dtype == torch.float32
        assert torch.equal(tensor, masters[name].to(tensor.dtype)), name
    for name in ("embed_tokens.weight", "layers.0.mlp.experts.down_proj"):
        moved = (masters[name] - before[name]).abs().max()
        assert 0 < moved < 1e-4
    model.save_pretrained(tmp_path, masters)
    saved = load_safetensors(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[f"model.{name}"], master) for name, master in masters.items())


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    config = TrainConfig(steps=110, warmup=10, lr=0.5, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5
    assert rates[60] == pytest.approx(0.5 * 0.55)  # half way down
    assert 0.05 < rates[-1] < 0.0505
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, TrainConfig(steps=5, warmup=0, lr=0.5)) == 0.5


def test_load_entropy_is_0_for_one_expert_and_1_for_all():
    assert load_entropy(torch.tensor([[64.0, 0, 0, 0]])) == 0
    assert load_entropy(torch.full((3, 16), 7.0)) == pytest.approx(1)
    assert load_entropy(torch.tensor([[8.0, 8, 0, 0]])) == pytest.approx(0.5)
    assert load_entropy(torch.tensor([[1.0, 1], [2, 0]])) == pytest.approx(0.5)  # the mean over layers


CHANGES = {"grad_clip": 1e-6, "weight_decay": 1, "momentum": 0.5, "balancing": "sign", "final_lr": 0.9}


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_what_is_learned(flag, finished, tiny, call, tmp_path):
    assert call(train, *flags(**tiny | {flag: CHANGES[flag]}, out=tmp_path)).status == 0
    (losses, ours), (_, theirs) = what_was_learned(tmp_path), what_was_learned(finished.out)
    assert losses[6] < losses[1] and any(not ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("of", ["weights", "data"])
def test_the_seed_is_that_of(of, finished, tiny, call, tmp_path):
    """Untrained, on one validation text, only weights differ; from a checkpoint on, only the data."""
    start = tiny | {"lr": 1e-30} if of == "weights" else RUN | {"data": tiny["data"], "init_from": finished.out}
    for seed in (1, 2):
        assert call(train, *flags(**start | {"steps": 1, "seed": seed}, out=tmp_path / f"{seed}")).status == 0
    (one,), (two,) = log_of(tmp_path / "1"), log_of(tmp_path / "2")
    what = "val_loss" if of == "weights" else "loss"
    assert one[what] != two[what]


# ---------------------------------------------------------------------------------------------------------------------
# The order of the data


def tokens_of(folder, seed=1, block_size=16, split="train"):
    return Tokens(folder, split, block_size, seed, read_json(folder / "meta.json"))


def test_targets_are_the_inputs_one_token_later(tiny_data):
    tokens = tokens_of(tiny_data)
    inputs, targets = tokens.training_batch(12, 16, CPU)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = np.fromfile(tiny_data / "train.bin", np.uint16).tobytes()
    for row, last in zip(inputs, targets[:, -1:]):
        assert torch.cat([row, last]).numpy().astype(np.uint16).tobytes() in text


def test_a_step_is_the_same_however_it_is_cut(tiny_data):
    tokens = tokens_of(tiny_data)
    for step in (0, 1, 7, 200):  # the last in a later epoch
        whole, _ = tokens.training_batch(12 * step, 12 * step + 12, CPU)
        for pieces in (2, 3, 12):
            size = 12 // pieces
            starts = range(12 * step, 12 * step + 12, size)
            cut = [tokens_of(tiny_data).training_batch(i, i + size, CPU)[0] for i in starts]
            assert torch.equal(torch.cat(cut), whole)


def test_steps_and_seeds_differ(tiny_data):
    first, second = (tokens_of(tiny_data).training_batch(i, i + 4, CPU)[0] for i in (0, 4))
    assert not torch.equal(first, second)
    assert not torch.equal(first, tokens_of(tiny_data, seed=2).training_batch(0, 4, CPU)[0])


def test_the_next_batch_is_made_while_one_is_used():
    """In order, one ahead and no more; and what goes wrong is said where the batch is asked for."""
    made = []

    def batches():
        for number in range(3):
            made.append(number)
            yield number, number
        raise OSError("the disk is gone")

    coming = train.prefetched(batches())
    assert next(coming) == (0, 0)
    patience = time.monotonic() + 10
    while made != [0, 1] and time.monotonic() < patience:
        time.sleep(0.001)
    assert made == [0, 1]
    assert [next(coming), next(coming)] == [(1, 1), (2, 2)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_an_epoch_has_every_block_once_and_the_next_cuts_elsewhere(tiny_data):
    tokens = tokens_of(tiny_data)
    first, second = tokens.epoch(0), tokens.epoch(1)
    for starts in (first, second):
        assert len(set(starts)) == len(starts) >= tokens.blocks - 1
        assert (np.diff(np.sort(starts)) == 16).all()
        assert starts.min() >= 0 and starts.max() + 17 <= len(tokens.ids)
    assert list(first) != sorted(first)
    assert first.min() % 16 != second.min() % 16


def test_a_text_of_one_block_is_enough(tmp_path):
    np.arange(17, dtype="<u2").tofile(tmp_path / "train.bin")
    tokens = Tokens(tmp_path, "train", 16, 1, {"dtype": "uint16", "vocab_size": 17})
    assert torch.equal(tokens.training_batch(0, 2, CPU)[0], torch.arange(16).expand(2, -1))
    assert tokens.validation_starts(0) == tokens.validation_starts(5) == [0]


def test_no_token_is_too_large_to_the_end_of_a_long_text(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:
        file.seek(2 * 2**24)  # zeros, as many as are looked at in one go
        file.write(b"\x11\0")
    with pytest.raises(ValueError, match="the token id 17, the vocabulary ends at 16"):
        Tokens(tmp_path, "train", 16, 1, {"dtype": "uint16", "vocab_size": 17})


def test_validation_is_spread_over_the_text_or_all_of_it(tiny_data):
    tokens = tokens_of(tiny_data, split="val")
    assert tokens.validation_starts(0) == [16 * i for i in range(tokens.blocks)]
    few = tokens.validation_starts(4)
    assert len(few) == 4 and few[0] == 0 and few[-1] > 16 * tokens.blocks / 2


# ---------------------------------------------------------------------------------------------------------------------
# A run, from its flags to its files


def test_a_run_leaves_its_log_flags_pictures_and_checkpoints(finished):
    log = log_of(finished.out)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    for entry in log:
        assert {"loss", "lr", "grad_norm", "skipped", "tokens_per_s", "step_ms", "load_entropy", "load"} <= entry.keys()
        assert ("val_loss" in entry) == ("val_bpb" in entry) == (entry["step"] in (3, 6))
        assert entry["skipped"] == 0 and 0 <= entry["load_entropy"] <= 1
    assert log[0]["lr"] == 0.005 and log[1]["lr"] == 0.01
    assert log[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # at first every byte is as likely
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    meta = read_json(finished.out / "args.json")
    assert meta["steps"] == 6 and meta["lr"] == 0.01 and meta["hidden_size"] == 32
    for picture in ("loss.png", "experts.png"):
        assert (finished.out / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in finished.out.iterdir()) == [
        "args.json", "best", "experts.png", "log.jsonl", "loss.png", "step-0000002", "step-0000003", "step-0000004",
        "step-0000006",
    ]  # fmt: skip


def test_bits_per_byte_is_the_loss_in_another_unit(finished, tiny_data):
    bytes_per_token = read_json(tiny_data / "meta.json")["bytes_per_token"]
    for entry in log_of(finished.out):
        if "val_loss" in entry:
            assert entry["val_bpb"] == pytest.approx(entry["val_loss"] / math.log(2) / bytes_per_token)


@torch.no_grad()
def test_the_log_is_that_of_the_model(finished, tiny_data):
    """An evaluation again, with the last checkpoint; and the operations of a step."""
    model, last, text = Zaya.from_pretrained(finished.out), log_of(finished.out)[-1], tokens_of(tiny_data, split="val")
    loss = model(*text.batch(text.validation_starts(2 * 16), CPU))[1]
    counts = torch.stack([router.counts for router in model.routers])
    assert last["val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert last["val_load_entropy"] == pytest.approx(load_entropy(counts[:, :4]), abs=1e-4)  # skip is no expert
    assert [len(of_layer) for of_layer in last["load"]] == [4, 4]
    every, config = text.validation_starts(0), TrainConfig(eval_batches=0, block_size=16, micro_batch_size=4)
    loss = model(*text.batch(every, CPU))[1].item()
    assert len(every) % 4  # the last forward pass is of fewer
    assert train.evaluate(model, text, config, train.Ranks("cpu"))["val_loss"] == pytest.approx(loss, abs=1e-5)
    flops = zaya.training_flops(model.config, model.parameter_counts()[1], 16)
    assert 1e12 * last["tflops"] == pytest.approx(flops * last["tokens_per_s"])


def test_every_checkpoint_is_whole(finished):
    folders = [*finished.out.glob("step-*"), finished.out / "best"]
    for folder in folders:
        names = {p.name for p in folder.iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "trainer.safetensors", "trainer.json"} <= names
        weights = load_safetensors(folder / "model.safetensors")
        assert all(t.dtype == torch.float32 for t in weights.values())
        index = read_json(folder / "model.safetensors.index.json")  # by which vLLM knows what is not a weight
        assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
        assert Zaya.from_pretrained(folder).config.hidden_size == 32
        assert load_tokenizer(folder).decode([104, 105]) == "hi"
        step = read_json(folder / "trainer.json")["step"]
        assert folder.name in (f"step-{step:07d}", "best")
    lowest = min((entry for entry in log_of(finished.out) if "val_loss" in entry), key=lambda entry: entry["val_loss"])
    best = read_json(finished.out / "best" / "trainer.json")
    assert (best["step"], best["best"]) == (lowest["step"], lowest["val_loss"])


def test_a_run_says_what_it_does(finished):
    assert (
        "bits a byte" in finished.stdout
        and "a sample:" in finished.stdout
        and "sample.py --checkpoint" in finished.stdout
    )
    assert "6/6" in finished.stderr and "tok/s" in finished.stderr and "entropy" in finished.stderr  # the progress bar
    assert "Traceback" not in finished.stderr and "Warning" not in finished.stderr


def test_transformers_opens_a_checkpoint(finished):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ZayaForCausalLM.from_pretrained(finished.out / "step-0000006", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours = Zaya.from_pretrained(finished.out)(tokens)[0]
        torch.testing.assert_close(theirs(tokens).logits, ours, rtol=1e-4, atol=1e-4)


def test_only_the_newest_checkpoints_are_kept_and_the_best(tiny, call, tmp_path):
    done = call(train, *flags(**tiny | {"steps": 5, "save_every": 1, "keep": 2}, out=tmp_path))
    assert done.status == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["best", "step-0000004", "step-0000005"]
    assert "val_loss" in log_of(tmp_path)[-1]  # the last step is evaluated, too


def test_an_old_checkpoint_that_cannot_be_deleted_is_named_and_stays(tiny, call, tmp_path, monkeypatch):
    delete = shutil.rmtree

    def stubborn(path, **how):
        if path.name == "step-0000002":
            raise PermissionError(1, "Operation not permitted")
        delete(path, **how)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    done = call(train, *flags(**tiny, keep=1, out=tmp_path / "out"))
    assert done.status == 0 and "step-0000002 stays, it could not be deleted: Operation not permitted" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("out/step-*")) == ["step-0000002", "step-0000006"]


def test_a_best_checkpoint_that_was_being_replaced_comes_back(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "best").rename(out / ".best.old")  # and then the power went
    assert call(train, "--out", out, "--resume").status == 0
    assert (out / "best" / "config.json").exists() and not list(out.glob(".*"))


def test_the_power_may_go_before_the_best_checkpoint_is_a_step(finished, tiny, call, tmp_path, monkeypatch):
    best, replace_folder = read_json(finished.out / "best" / "trainer.json")["step"], train.replace_folder

    def fail(new, final):
        if final.name == f"step-{best:07d}":
            raise RuntimeError("no power")
        replace_folder(new, final)

    monkeypatch.setattr(train, "replace_folder", fail)
    with pytest.raises(RuntimeError, match="no power"):
        call(train, *flags(**tiny, keep=9, out=tmp_path))
    gc.collect()  # with the power goes the lock on the log, which the error's traceback still holds
    assert read_json(tmp_path / "best" / "trainer.json")["step"] == best
    monkeypatch.setattr(train, "replace_folder", replace_folder)
    assert call(train, "--out", tmp_path, "--resume").status == 0
    assert_same_run(tmp_path, finished.out)
    assert read_json(tmp_path / "best" / "trainer.json")["step"] == best and not list(tmp_path.glob(".*"))


def test_a_run_may_be_moved_and_have_other_files_in_it(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "moved")
    cut_short = out / "step-0000006" / "model.safetensors"
    cut_short.write_bytes(cut_short.read_bytes()[:100])
    shutil.copytree(out / "step-0000002", out / "step-0000002-good2")
    (out / ".notes.old").write_text("mine")
    assert call(train, "--out", out, "--resume", "--steps", 5, "--keep", 1).status == 0
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["best", "step-0000002-good2", "step-0000005"]  # the damaged one beyond it is gone, too
    assert (out / ".notes.old").read_text() == "mine" and read_json(out / "args.json")["out"] == str(out)
    assert log_of(finished.out)[-1]["step"] == 6


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """Files and their folder before, the folder around them after; and what was there is kept until then."""
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append(f"{path.name} {to.name}") or rename(path, to))
    new, final = tmp_path / "new", tmp_path / "final"
    for folder in (new, final):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    train.replace_folder(new, final)
    synced = [path.stat().st_ino for path in (final / "file", final, tmp_path)]
    assert events == [*synced[:2], "final .final.old", "new final", synced[2]]
    assert (final / "file").read_text() == "new" and [*tmp_path.iterdir()] == [final]
    with train.write_aside(final / "file") as file:
        file.write(b"newer")
    assert events[-1] == (final / "file").stat().st_ino and (final / "file").read_text() == "newer"


def test_a_folder_is_replaced_while_somebody_reads_the_one_before(tmp_path, monkeypatch):
    """On NFS what is read stays, and so does the folder around it."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    for i in range(3):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text(str(i))
        train.replace_folder(tmp_path / "new", tmp_path / "best")
        assert (tmp_path / "best" / "file").read_text() == str(i)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_a_folder_is_no_broken_disk(error, tmp_path, monkeypatch):
    def fail(file):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with nullcontext() if error == errno.EINVAL else pytest.raises(OSError, match="Input/output"):
        train.sync(tmp_path)


def test_the_log_is_on_the_disk_before_a_checkpoint_is(tiny, call, tmp_path, monkeypatch):
    synced, saved, fsync, replace_folder = [0], [], os.fsync, train.replace_folder

    def sync(file):
        if os.path.sameopenfile(file, log.fileno()):
            synced.append(len(log_of(tmp_path)))
        fsync(file)

    def replace(new, final):
        saved.append((final.name, synced[-1]))
        replace_folder(new, final)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(train, "replace_folder", replace)
    with open(tmp_path / "log.jsonl", "a") as log:
        assert call(train, *flags(**tiny, out=tmp_path)).status == 0
    steps = {name: lines for name, lines in saved if name.startswith("step")}
    assert len(steps) >= 3 and all(lines >= int(name[-1]) for name, lines in steps.items())


@pytest.mark.parametrize("free", [0, 10**15])
def test_a_save_is_of_its_step(free, finished, tiny, call, tmp_path, monkeypatch):
    """...though it goes on while the next step is made; where memory is scarce it is waited for."""
    threads = set()

    def write(saver, *rest, write=train.Saver.write):
        threads.add(threading.current_thread())
        time.sleep(0.1)
        write(saver, *rest)

    monkeypatch.setattr(train, "free_memory", lambda: free)
    monkeypatch.setattr(train.Saver, "write", write)
    assert call(train, *flags(**tiny, keep=9, out=tmp_path)).status == 0
    assert (threads == {threading.main_thread()}) == (not free) and len(threads) == 1
    assert_same_run(tmp_path, finished.out)
    before, after = (run / "step-0000002" for run in (finished.out, tmp_path))
    for file in ("model.safetensors", "trainer.safetensors"):
        assert (before / file).read_bytes() == (after / file).read_bytes()
    assert read_json(after / "trainer.json")["tokens"] == 2 * 4 * 16


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tiny, call, tmp_path, monkeypatch):
    def save(path, tensors, save=train.save_safetensors):
        if "step-0000004" in str(path):
            raise OSError(28, "No space left on device")
        save(path, tensors)

    monkeypatch.setattr(train, "save_safetensors", save)
    done = call(train, *flags(**tiny, out=tmp_path))
    last = f"could not save step 4: No space left on device; {tmp_path}/step-0000003 is the last good checkpoint"
    assert done.status == 2 and done.lines[-1].endswith(last)
    assert Zaya.from_pretrained(tmp_path / "step-0000003") and not list(tmp_path.glob(".*"))


def test_a_failed_save_in_the_background_ends_the_run(tiny, call, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(train, "sha256", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        call(train, *flags(**tiny, out=tmp_path))
    assert not list(tmp_path.glob("step-*"))


def test_eval_only_prints_and_writes_nothing(finished, tiny, call, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished.out.rglob("*")}
    val_loss = log_of(finished.out)[-1]["val_loss"]
    own = {name: value for name, value in tiny.items() if name not in SHAPE}  # the shape is the checkpoint's
    for which in (own | {"init_from": finished.out, "out": tmp_path / "new"}, {"out": finished.out, "resume": True}):
        done = call(train, *flags(**which, eval_only=True))
        assert (
            done.status == 0 and f"validation loss {val_loss:.4f} nats" in done.stdout and "bits a byte" in done.stdout
        )
    assert not (tmp_path / "new").exists()
    assert before == {p: p.stat().st_mtime_ns for p in finished.out.rglob("*")}


def test_eval_only_on_two_ranks(finished):
    stdout, _ = train_on_ranks(2, "--eval_only", "--resume", "--out", finished.out)
    loss = float(re.search(r"validation loss (\S+) nats", stdout)[1])
    assert abs(loss - log_of(finished.out)[-1]["val_loss"]) < 1e-3


def test_init_from_goes_on_with_the_weights_in_a_run_of_its_own(finished, tiny_data, call, tmp_path):
    done = call(train, *flags(
        data=tiny_data, init_from=finished.out, out=tmp_path, steps=2, batch_size=4, lr=1e-4, block_size=24,
        rope_theta=5e4, eval_every=1, eval_batches=1, device="cpu", dtype="float32",
    ))  # fmt: skip
    assert done.status == 0
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2]
    assert log[0]["loss"] == pytest.approx(log_of(finished.out)[-1]["loss"], abs=0.5)  # far below a fresh model's 5.55
    config = Zaya.from_pretrained(tmp_path).config
    assert (config.hidden_size, config.rope_theta, config.max_position_embeddings) == (32, 5e4, 24)


def test_init_from_keeps_a_chat_template(finished, tiny_data, call, tmp_path):
    start = shutil.copytree(finished.out / "step-0000006", tmp_path / "start")
    (start / "trainer.json").unlink()  # which knows of no such file
    (start / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = call(train, *flags(**RUN | {"data": tiny_data, "init_from": start, "out": tmp_path / "out", "steps": 1}))
    assert done.status == 0
    assert (tmp_path / "out" / "step-0000001" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_init_from_without_a_tokenizer_says_so(finished, tiny_data, call, tmp_path):
    start = shutil.copytree(finished.out / "step-0000006", tmp_path / "start")
    for name in ("trainer.json", "tokenizer.json"):  # as transformers' save_pretrained of a model alone
        (start / name).unlink()
    done = call(train, *flags(**RUN | {"data": tiny_data, "init_from": start, "out": tmp_path / "out", "steps": 1}))
    assert done.status == 0 and f"{start} has no tokenizer.json" in done.stderr


def test_init_from_takes_a_presets_recipe_but_not_its_model(finished, tiny_data, call, tmp_path):
    done = call(train, *flags(
        data=tiny_data, init_from=finished.out, preset="zaya1-8b", out=tmp_path, steps=1, batch_size=2, block_size=16,
        device="cpu", dtype="float32",
    ))  # fmt: skip
    assert done.status == 0 and read_json(tmp_path / "args.json")["lr"] == train.RECIPES["zaya1-8b"]["lr"]
    assert Zaya.from_pretrained(tmp_path).config.rope_theta == Zaya.from_pretrained(finished.out).config.rope_theta


def test_a_preset_brings_its_recipe_and_flags_win(tiny, call, tmp_path):
    few = {name: value for name, value in tiny.items() if name not in ("lr", "warmup")} | {"steps": 1, "warmup": 7}
    assert call(train, *flags(**few, preset="mini", out=tmp_path)).status == 0
    kept = read_json(tmp_path / "args.json") | {"sha256": None}
    recipe = train.RECIPES["mini"]
    assert (kept["lr"], kept["warmup"], kept["steps"]) == (recipe["lr"], 7, 1)
    assert call(train, "--out", tmp_path, "--resume", "--steps", 2).status == 0
    assert read_json(tmp_path / "args.json") | {"sha256": None} == kept | {"steps": 2}
    assert set(train.RECIPES) == set(PRESETS) - {"nano"}


def test_zaya1_8b_starts_as_its_report_says():
    recipe = train.RECIPES["zaya1-8b"]
    config = TrainConfig(preset="zaya1-8b", **train.flags_of(TrainConfig, recipe))
    model = train.model_config(config, recipe, vocab_size=262272, eot=None)
    assert (model.max_position_embeddings, model.rope_theta) == (4096, 1e4)
    assert config.batch_size * config.block_size == 2**24
    assert config.steps * config.batch_size * config.block_size == pytest.approx(8e12, rel=0.01)


@pytest.mark.parametrize("width, lr", [(256, None), (512, 4e-3), (768, 4e-3), (2048, 6e-4), (4096, 6e-4)])
def test_a_model_to_tune_has_the_learning_rate_of_its_width(width, lr, tmp_path):
    config = zaya.config_to_json(replace(PRESETS["nano"], hidden_size=width), "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train.recipe({"init_from": tmp_path}) == ({"lr": lr} if lr else {})
    assert train.recipe({"init_from": tmp_path, "preset": "small"})["lr"] == train.RECIPES["small"]["lr"]


def test_dense_and_conventional_twins_train_too(tiny, call, pictures, tmp_path):
    for name, twin in {"dense": {"mlp": "dense"}, "plain": {"attention": "gqa", "mlp": "dense"}}.items():
        done = call(train, *flags(**tiny | {"steps": 3}, **twin, out=tmp_path / name))
        assert done.status == 0
        log = log_of(tmp_path / name)
        assert log[-1]["loss"] < log[0]["loss"] and "load_entropy" not in log[-1]
        assert [picture.name for picture in (tmp_path / name).glob("*.png")] == ["loss.png"]


@pytest.fixture(scope="module")
def other_data(tiny_data, tmp_path_factory):
    """Another text in the same tokens."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 400, encoding="utf-8")
    words = "--tokenizer", tiny_data, "--val_fraction", "0.2", "--out", folder / "other"
    data.text.prepare.main([str(folder / "text.txt"), *map(str, words)])
    return folder / "other"


def test_another_text_from_a_checkpoint_on(tiny, tiny_data, other_data, call, tmp_path):
    """The loss becomes that text's, and the best checkpoint one of it, also where the first text was easier."""
    easy, both = tmp_path / "easy", tmp_path / "both"
    assert call(train, *flags(**tiny | {"data": other_data}, keep=9, out=easy)).status == 0
    shutil.copytree(easy, both)
    for checkpoint in ("step-0000004", "step-0000006"):
        shutil.rmtree(both / checkpoint)
    assert call(train, "--out", both, "--resume", "--data", tiny_data).status == 0
    log, before = log_of(both), log_of(easy)
    assert log[:3] == before[:3] and log[3]["loss"] != before[3]["loss"]
    assert log[2]["val_loss"] < log[5]["val_loss"]
    best = read_json(both / "best" / "trainer.json")
    assert (best["step"], best["best"]) == (6, log[5]["val_loss"])
    said = call(train, "--out", both, "--resume", "--eval_only").stdout
    assert f"validation loss {log[5]['val_loss']:.4f}" in said


def test_data_of_other_tokens_is_refused(tiny, finished, call, tmp_path):
    """As many of them, even: the vocabulary itself is compared."""
    folder, out = shutil.copytree(tiny["data"], tmp_path / "other"), shutil.copytree(finished.out, tmp_path / "run")
    spec = read_json(folder / "tokenizer.json")
    spec["model"]["vocab"] = {token: 255 - i for token, i in spec["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    for chosen in (
        RUN | {"data": folder, "init_from": finished.out, "out": tmp_path / "new"},
        {"data": folder, "out": out, "resume": True},
    ):
        done = call(train, *flags(**chosen))
        assert done.status == 2 and len(done.lines) == 1 and f"{folder} has other tokens" in done.stderr
        assert not (tmp_path / "new").exists()


def test_data_may_be_moved(tiny, finished, call, tmp_path, monkeypatch):
    """Also to a folder here that is called as one under data/; the best checkpoint is still the best on that text."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    shutil.rmtree(out / "step-0000006")
    folder = shutil.copytree(tiny["data"], tmp_path / "stdlib")
    monkeypatch.chdir(tmp_path)
    assert call(train, "--out", out, "--resume", "--data", "stdlib").status == 0
    assert_same_run(out, finished.out)
    assert read_json(out / "args.json")["data"] == str(folder)
    before, after = (read_json(run / "step-0000006" / "trainer.json") for run in (finished.out, out))
    assert before["best"] == after["best"] and before["best_of"] == after["best_of"]


def test_what_is_written_down_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, _ = train.resolve_flags({"out": "new", "init_from": "run", "preset": "nano"})
    assert given["init_from"] == str(tmp_path / "run")


def test_a_small_log(tiny, call, tmp_path):
    """--log_every 4, evaluations at 3 and 6."""
    assert call(train, *flags(**tiny, out=tmp_path, log_every=4)).status == 0
    assert [e["step"] for e in log_of(tmp_path)] == [3, 4, 6]


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of its speed


def test_a_log_with_gaps(tmp_path, capsys):
    """Where every loss was skipped there is still a picture; a reading of the power that failed is left out."""
    entries = [
        {"step": step, "loss": None, "tokens_per_s": 8, "step_ms": 9, "tflops": 6.0, "of_product": 0.5} | power
        for step, power in enumerate([{"watts": 2.0}, {}, {"watts": 2.0}])
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    train.plot(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    train.report_speed(tmp_path, 0, dict.fromkeys(("data", "evaluation", "checkpoints"), 0.0))
    assert "3 TFLOP a joule" in capsys.readouterr().out


def test_speed_in_the_log(monkeypatch):
    monkeypatch.setattr(train, "rates", lambda device, dtype: (8e12, 16e12))
    monkeypatch.setattr(train, "watts", lambda device: 500.0)
    speed = train.Speed(2e9, CPU, "float32")  # operations a token
    said = {"tokens_per_s": 2000, "step_ms": 500, "tflops": 4, "of_product": 0.25, "mfu": 0.5}
    assert speed(1000, 0.5) == said | {"watts": 500} and speed(1000, 0.5) == said  # asked for power now and then


def test_rates_of_a_device(monkeypatch):
    monkeypatch.setattr(train.timeit, "repeat", lambda *_, **__: [0.5, 2.0])
    assert train.rates(CPU, "float32") == (None, 2 * 1024**3 / 0.5)
    names = list(train.PEAK_FLOPS)  # the first that is part of a device's name counts
    assert not any(name in longer for i, name in enumerate(names) for longer in names[i + 1 :])


def test_the_last_words_on_speed(tmp_path, capsys):
    """Of this process's steps, 9 to 120, without the first tenth; and a picture of more than 100 steps."""
    entries = [
        {"step": step, "loss": 5.0, "tokens_per_s": 7 * step, "step_ms": step - 20 if step >= 20 else 1e6}
        | {"tflops": 2.0, "of_product": 0.5, "mfu": 0.25}
        for step in range(1, 121)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    spent = {"data": 1.0, "evaluation": 2.0, "checkpoints": 3.0}
    with train.timed(spent, "data"):
        pass
    train.report_speed(tmp_path, 8, spent)
    assert capsys.readouterr().out == (
        "490 tokens/s, 2 TFLOP/s a device, MFU 25.0%, 50% of a large product's rate; a step took 50 ms (p50), "
        "95 (p95), 100 (max), waiting for data 1.0 s of all; besides: evaluation 2.0 s, checkpoints 3.0 s\n"
    )
    train.plot(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_slowest_rank_is_named(capsys):
    ms = {"forward_compute": 2, "backward_compute": 3, "backward_comm": 4, "backward_compute_comm_overlap": 1}
    ddp = SimpleNamespace(_get_ddp_logging_data=lambda: {f"avg_{part}_time": 1e6 * time for part, time in ms.items()})
    others = torch.tensor([[0, 0], [7.0, 2.0]])
    ranks = SimpleNamespace(rank=0, world=2, first=True, device=CPU, sum=lambda own: own + others)
    train.report_ranks(ddp, ranks)
    assert capsys.readouterr().out.startswith(
        "the slowest is rank 1: 7.0 ms for a forward and backward pass, the fastest takes 5.0; 2.0 ms of its comm"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs beside each other


def test_plot_prints_mean_and_spread_and_draws(finished, tiny, call, tmp_path):
    """Two seeds of one run, and a dense one, whatever its name is."""
    moe_1, moe_2, dense = shutil.copytree(finished.out, tmp_path / "moe-1"), tmp_path / "moe-2", tmp_path / "$密,集"
    for out, change in ((moe_2, {"seed": 2}), (dense, {"mlp": "dense"})):
        assert call(train, *flags(**tiny, **change, keep=9, out=out)).status == 0
    done = call(train, "--plot", moe_1, dense, moe_2, "--out", tmp_path)
    assert done.status == 0 and done.stderr == "" and (tmp_path / "compare.png").stat().st_size > 20_000
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    rows = {row[0]: dict(zip(table[0], row)) for row in table[2:]}
    assert rows.keys() == {"moe", "$密,集"} and rows["moe"]["seeds"] == "2" and rows["$密,集"]["load entropy"] == ""
    losses = [log_of(run)[-1]["val_loss"] for run in (moe_1, moe_2)]
    assert rows["moe"]["validation loss"] == f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert rows["moe"]["active"] == f"{Zaya.from_pretrained(finished.out).parameter_counts()[1]:,}"


def test_plot_of_what_is_no_run(finished, call, tmp_path):
    done = call(train, "--plot", finished.out, tmp_path, "--out", tmp_path)
    assert done.status == 2 and len(done.lines) == 1 and "holds no run" in done.stderr


def test_seeds_whose_logs_share_no_step_are_refused(finished, call, tmp_path):
    runs = [finished.out, shutil.copytree(finished.out, tmp_path / "out-2")]
    rewrite(runs[1] / "args.json", seed=2)
    (runs[1] / "log.jsonl").write_text(json.dumps(log_of(runs[0])[0] | {"step": 7}) + "\n")
    done = call(train, "--plot", *runs, "--out", tmp_path / "plot")
    assert done.status == 2 and len(done.lines) == 1 and "share no step" in done.stderr


def test_runs_of_one_seed_are_no_group(finished, call, tmp_path, monkeypatch):
    """Their difference must be another: the code, say. Runs of two seeds are one row."""
    runs = [shutil.copytree(finished.out, tmp_path / name) for name in ("out", "out-mine", "out-seed")]
    rewrite(runs[2] / "args.json", seed=7)
    for run in runs:
        entries = [e | {"step_ms": 100 * e["step"], "tokens": 10_000 * e["tokens"]} for e in log_of(run)]
        (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    ends, draw = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axis, x, *rest, **how: ends.append(max(x)) or draw(axis, x, *rest, **how))
    rows = call(train, "--plot", *runs, "--out", tmp_path / "plot").stdout.splitlines()[2:4]
    rows = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[1:3] for row in rows] == [["out", "2"], ["out-mine", "1"]]
    assert [row[4:6] for row in rows] == [["3.84", "350"]] * 2  # million tokens, milliseconds
    assert ends[:3] == pytest.approx([3.84, 6 * 0.35, 3.84])  # of the curves: million tokens, seconds


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on. Equal means equal: every loss and every number of the last checkpoint, bit for bit.


@pytest.fixture(scope="module")
def long_run(tiny, tmp_path_factory):
    """Flags of a run that is long enough to be stopped somewhere, and where it went undisturbed."""
    chosen = tiny | {"steps": 60, "save_every": 10, "eval_every": 20}
    out = tmp_path_factory.mktemp("long") / "out"
    assert command("train.py", *flags(**chosen, out=out)).returncode == 0
    return SimpleNamespace(flags=chosen, out=out)


def started(plan, out):
    """A run in a process of its own that has come to some step from 11 to 30, of 60 -> it, and that step."""
    step, log = random.randint(11, 30), out / "log.jsonl"
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags(**plan, out=out)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while run.poll() is None and (not log.exists() or log.read_text().count("\n") < step):
        time.sleep(0.002)
    return run, step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stop_at_any_moment_changes_nothing(long_run, call, tmp_path, number):
    """SIGTERM and Ctrl-C save and end with status 0; kill -9 leaves the newest checkpoint. --resume does the rest."""
    out = tmp_path / "out"
    run, step = started(long_run.flags, out)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=60)
    stopped = len(log_of(out))
    assert step <= stopped < 60, f"the signal was to hit step {step}"
    if number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 0, stderr
        assert (
            (out / f"step-{stopped:07d}").is_dir()
            and f"stopped after step {stopped}" in stdout
            and "--resume" in stdout
        )
        assert (out / "loss.png").exists() and "stopping after this step" in stderr
    done = call(train, "--out", out, "--resume")
    assert done.status == 0, done.stderr
    assert_same_run(out, long_run.out)


def test_a_signal_to_the_whole_group_ends_no_compiler():
    """As Ctrl-C sends it; sleep stands for a compiler that torch.compile waits for."""
    code = """
import os, signal, subprocess, types, train
heard = train.listen(types.SimpleNamespace(first=False))
compiler = subprocess.Popen(["sleep", "1"])
os.killpg(0, signal.SIGINT)
assert compiler.wait() == 0 and heard == [signal.SIGINT]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, start_new_session=True, check=True)


def test_a_closed_terminal_changes_nothing(long_run, call, tmp_path):
    """It sends SIGHUP, and nobody reads what is printed any more."""
    out = tmp_path / "out"
    run, step = started(long_run.flags, out)
    run.stdout.close()
    run.stderr.close()
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=60) == 0
    stopped = len(log_of(out))
    assert step <= stopped < 60 and (out / f"step-{stopped:07d}").is_dir()
    assert call(train, "--out", out, "--resume").status == 0
    assert_same_run(out, long_run.out)


def test_what_nobody_reads_from_the_first_line_on_is_trained(tiny, tmp_path):
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags(**tiny, out=tmp_path / "out")],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    run.stdout.close()
    assert run.wait(timeout=60) == 0 and (tmp_path / "out" / "step-0000006").is_dir()


def test_two_processes_do_not_train_in_one_place(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    with train.open_log(out):  # as another train.py would
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        done = call(train, "--out", out, "--resume", "--steps", 7)
        assert done.status == 2 and len(done.lines) == 1 and f"another process is training in {out}" in done.stderr
        assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert call(train, "--out", out, "--resume", "--steps", 7).status == 0


@pytest.mark.parametrize("moment", ["training_batch", "evaluate", "write", "learning_rate", "report"])
def test_a_signal_in_any_part_of_a_step_saves_that_step(finished, tiny, call, tmp_path, monkeypatch, moment):
    owner = {"training_batch": Tokens, "write": train.Saver}.get(moment, train)
    original, calls = getattr(owner, moment), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 1:  # in the first evaluation, that of step 3, say
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # until it is heard
        return original(*args)

    monkeypatch.setattr(owner, moment, interrupted)
    done = call(train, *flags(**tiny | {"keep": 9, "save_every": 5}, out=tmp_path))
    assert done.status == 0
    stopped = len(log_of(tmp_path))
    assert stopped < 6 and f"stopped after step {stopped}" in done.stdout
    assert (tmp_path / f"step-{stopped:07d}").is_dir()
    monkeypatch.setattr(owner, moment, original)
    assert call(train, "--out", tmp_path, "--resume").status == 0
    assert_same_run(tmp_path, finished.out)


def test_log_lines_after_the_checkpoint_are_dropped(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    shutil.rmtree(out / "step-0000006")  # the power went between step 5 and the checkpoint of step 6,
    (out / ".step-0000006.partial").mkdir()  # while that was being written
    first, *rest = (out / "log.jsonl").read_text().splitlines(keepends=True)
    damaged = "damaged\n[1]\n" + '{"step": "x"}\n' + "[" * 100_000 + "\n"
    (out / "log.jsonl").write_text("".join([first, damaged, *rest, '{"step": 7, "loss": 1']))
    done = call(train, "--out", out, "--resume")
    assert done.status == 0
    assert [entry["step"] for entry in train.read_log(out)] == [1, 2, 3, 4, 5, 6]
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text().replace(damaged, ""))
    assert_same_run(out, finished.out)


def test_bf16_goes_on_bit_for_bit_too(tiny, call, tmp_path):
    chosen = tiny | {"dtype": "bfloat16", "steps": 4, "keep": 9}
    assert call(train, *flags(**chosen, out=tmp_path / "a")).status == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"b/step-000000{step}")
    assert call(train, "--out", tmp_path / "b", "--resume").status == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_a_run_without_a_checkpoint_starts_again_and_says_so(finished, call, tmp_path):
    shutil.copy(finished.out / "args.json", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 9.9}\n')
    done = call(train, "--out", tmp_path, "--resume")
    assert done.status == 0 and "starting at step 0" in done.stdout
    assert_same_run(tmp_path, finished.out)


def test_a_flag_given_again_wins(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    assert call(train, *flags(out=out, resume=True, steps=8, lr=0.002, eval_every=4)).status == 0
    log = log_of(out)
    assert len(log) == 8 and log[-1]["lr"] < 0.002 and "val_loss" in log[-1]
    assert log[:6] == log_of(finished.out)
    assert read_json(out / "args.json")["steps"] == 8


def test_a_finished_run_resumed_is_still_finished(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    done = call(train, "--out", out, "--resume")
    assert done.status == 0 and "a sample:" in done.stdout and f"going on from {out}/step-0000006" in done.stdout
    assert_same_run(out, finished.out)


def test_passes_are_of_what_each_step_took(finished, call, tmp_path):
    """640 of 8,831 tokens, though the last two steps have twice the sequences."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    said = call(train, *flags(out=out, resume=True, steps=8, batch_size=8)).stdout
    trained, known = log_of(out)[-1]["tokens"], read_json(out / "step-0000008" / "trainer.json")["train_tokens"]
    assert trained == 6 * 4 * 16 + 2 * 8 * 16 and f" {trained / known:.2g} passes over them" in said


@pytest.mark.parametrize("error", [OSError("the disk is full"), ImportError("no matplotlib")])
def test_a_run_without_pictures_is_a_run(error, finished, call, tmp_path, monkeypatch):
    def fail(out):
        raise error

    monkeypatch.setattr(train, "plot", fail)
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "loss.png").unlink()
    done = call(train, "--out", out, "--resume")
    assert done.status == 0 and f"no pictures: {error}" in done.stderr
    assert f"pictures: experts.png in {out}; more text: " in done.stdout


def test_a_signal_during_the_last_sample_ends_that_alone(finished, call, tmp_path, monkeypatch):
    def write(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # tokens
            time.sleep(0.01)
        raise AssertionError("nobody has heard it")

    monkeypatch.setattr(Zaya, "generate", write)
    out = shutil.copytree(finished.out, tmp_path / "out")
    assert call(train, "--out", out, "--resume").status == 0


def test_a_longer_block_is_the_models_context(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    assert call(train, "--out", out, "--resume", "--steps", 7, "--block_size", 32).status == 0
    assert Zaya.from_pretrained(out).config.max_position_embeddings == 32


@pytest.mark.parametrize("saved, same", [({}, 16), ({"num_experts": 8}, 8)], ids=["the preset's", "a flag's"])
def test_resume_keeps_the_model(tmp_path, saved, same):
    """What a flag would change is refused, what it says once more is not."""
    kept = {"preset": "nano", "init_from": None, "block_size": 32} | saved
    (tmp_path / "args.json").write_text(json.dumps(kept))
    given = {"out": str(tmp_path), "resume": True}
    known, _ = train.resolve_flags(given | {"num_experts": same, "lr": 0.1, "sliding_window": None})
    assert known["lr"] == 0.1 and "sliding_window" not in known  # which a model without windows has no flag for
    wrongs = {"num_experts": 32, "preset": "mini", "init_from": "elsewhere", "max_position_embeddings": 256}
    for name, value in wrongs.items():
        with pytest.raises(ValueError, match=f"cannot change --{name}: that would be another model"):
            train.resolve_flags(given | {name: value})


def test_another_batch_size_goes_on_in_the_same_order(tiny, call, tmp_path, monkeypatch):
    """Nothing is seen twice, nothing is left out; and the log counts the tokens."""
    seen, whole = [], Tokens.training_batch
    monkeypatch.setattr(Tokens, "training_batch", lambda self, *rest: seen.append(rest[:2]) or whole(self, *rest))
    plan = tiny | {"out": tmp_path / "out", "steps": 3, "batch_size": 4, "micro_batch_size": None}
    assert call(train, *flags(**plan)).status == 0
    assert call(train, "--out", plan["out"], "--resume", "--steps", 5, "--batch_size", 2).status == 0
    places = [i for first, last in seen for i in range(first, last)]
    assert places == [*range(3 * 4 + 2 * 2)]
    assert [e["tokens"] for e in log_of(plan["out"])] == [16 * n for n in (4, 8, 12, 14, 16)]


def test_changed_data_is_said(finished, tiny_data, call, tmp_path):
    out, data = (shutil.copytree(source, tmp_path / source.name) for source in (finished.out, tiny_data))
    with open(data / "train.bin", "ab") as file:
        file.write((data / "val.bin").read_bytes())
    done = call(train, "--out", out, "--resume", "--steps", 8, "--data", data)
    assert done.status == 0 and "other training tokens than at step 6" in done.stdout
    assert "other training tokens" not in call(train, "--out", out, "--resume", "--steps", 9).stdout


@pytest.mark.parametrize("other", [{"eval_batches": 1}, {"block_size": 32}], ids=str)
def test_the_best_is_forgotten_where_losses_would_be_of_other_tokens(other, finished, call, tmp_path):
    """And so it takes the next evaluation's checkpoint, even if that is worse."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    worse = {"resume": True, "steps": 9, "lr": 100.0, "warmup": 0}
    assert call(train, *flags(out=out, **worse)).status == 0
    assert read_json(out / "best" / "trainer.json")["step"] == 6
    done = call(train, *flags(out=out, **worse | {"steps": 12}, **other))
    assert done.status == 0 and f"checkpoint takes the place of {out}/best" in done.stdout
    assert read_json(out / "best" / "trainer.json")["step"] >= 12


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda best: (best / "model.safetensors").write_bytes(b"")])
def test_a_best_that_is_not_whole_is_said_and_made_anew(damage, finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    damage(out / "best")
    done = call(train, *flags(out=out, resume=True, steps=9, lr=100.0, warmup=0))
    assert done.status == 0 and f"{out}/best is not whole" in done.stderr
    assert read_json(out / "best" / "trainer.json")["step"] == 9
    train.check(out / "best")


def test_torchruns_restart_resumes_by_itself(finished, tiny, call, tmp_path, monkeypatch):
    """torchrun starts a crashed command again as it was, without --resume, and says so in the environment."""
    out = shutil.copytree(finished.out, tmp_path / "out")
    shutil.rmtree(out / "step-0000006")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(train, *flags(**tiny, keep=9, out=out)).status == 0
    assert_same_run(out, finished.out)
    assert call(train, *flags(**tiny, keep=9, out=tmp_path / "new")).status == 0  # crashed before there was a run
    assert_same_run(tmp_path / "new", finished.out)


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found in /proc")
def test_torchrun_starts_a_killed_rank_again_but_no_refused_run(tiny, tmp_path):
    """Both come back with TORCHELASTIC_RESTART_COUNT in the environment; only what was killed had begun its run."""
    out, plan = tmp_path / "out", tiny | {"steps": 60, "save_every": 5, "eval_every": 60}
    torchrun = "-m torch.distributed.run --standalone --local-addr=localhost --nproc_per_node=2 --max-restarts=1"
    start = [sys.executable, *torchrun.split(), ROOT / "train.py", *flags(**plan, out=out)]
    launcher = subprocess.Popen(start, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, ranks = out / "log.jsonl", Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while launcher.poll() is None and (not log.exists() or log.read_text().count("\n") < 12):
        time.sleep(0.002)
    os.kill(int(ranks.read_text().split()[-1]), signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, stderr
    assert [entry["step"] for entry in log_of(out)] == [*range(1, 61)]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = subprocess.run([*start, "--steps", "70"], env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and f"{out} holds a run already" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


# ---------------------------------------------------------------------------------------------------------------------
# Ranks and accumulation: the same batch, cut in other ways, is the same up to rounding


def assert_near(out, other, within):
    losses, tensors = what_was_learned(out)
    expected_losses, expected = what_was_learned(other)
    assert losses.keys() == expected_losses.keys()
    assert max(abs(losses[step] - expected_losses[step]) for step in losses) < within
    for name, tensor in tensors.items():
        if name.startswith("model."):
            assert (tensor - expected[name]).abs().max() < 10 * within, name


@pytest.mark.parametrize("block_size, sequences", [(16, 16), (1024, 16), (3000, 8), (4096, 8), (32768, 1), (131072, 1)])
def test_a_forward_pass_has_at_most_16_sequences_and_32768_tokens(block_size, sequences):
    assert train.sequences_at_once(64, block_size) == sequences
    assert train.sequences_at_once(6, block_size) == math.gcd(6, sequences)


def test_accumulation_is_one_batch(finished, tiny, call, tmp_path):
    for size in (1, 2):
        out = tmp_path / str(size)
        assert call(train, *flags(**tiny, micro_batch_size=size, out=out)).status == 0
        assert_near(out, finished.out, 1e-5)


def test_recomputing_changes_nothing_but_memory(finished, tiny, call, tmp_path):
    assert call(train, *flags(**tiny, recompute=True, out=tmp_path / "out")).status == 0
    assert_near(tmp_path / "out", finished.out, 1e-6)
    assert [e.get("load") for e in log_of(tmp_path / "out")] == [e.get("load") for e in log_of(finished.out)]


def test_compiled_is_the_same(tiny, finished, tmp_path):
    """Two steps, on a CPU, where the experts stay out of the graph."""
    pytest.importorskip("torch._inductor")
    out = tmp_path / "out"
    done = command("train.py", *flags(**tiny | {"steps": 2, "eval_every": 9}, compile=1, out=out), timeout=400)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(log_of(out), log_of(finished.out)):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5 and abs(ours["grad_norm"] / theirs["grad_norm"] - 1) < 1e-4


@pytest.fixture(scope="module")
def on_two_ranks(tiny, tmp_path_factory):
    """The run `finished`, on two ranks -> its folder, and what both said on stdout and on stderr."""
    out = tmp_path_factory.mktemp("two") / "out"
    return out, *train_on_ranks(2, *flags(**tiny, keep=9, out=out))


def test_two_ranks_are_one_with_two_micro_batches(on_two_ranks, finished, tiny, call, tmp_path):
    out, stdout, stderr = on_two_ranks
    assert stdout.count("a sample:") == 1  # only the first rank speaks
    assert not re.search(r"\wWarning", stderr), stderr  # a FutureWarning, say
    assert re.search(r"the slowest is rank [01]: \d+\.\d ms for a forward and backward pass", stdout)
    assert call(train, *flags(**tiny, micro_batch_size=2, out=tmp_path / "one")).status == 0
    assert_near(out, tmp_path / "one", 1e-5)
    ours, theirs = log_of(out), log_of(tmp_path / "one")
    assert [entry.get("load") for entry in ours] == [entry.get("load") for entry in theirs]  # counted over both ranks
    flops = [entry["tflops"] / entry["tokens_per_s"] for entry in (ours[0], theirs[0])]
    assert flops[0] == pytest.approx(flops[1] / 2)  # a rank does half

    # Saved on two ranks, resumed on one.
    for checkpoint in ("step-0000004", "step-0000006"):
        shutil.rmtree(out / checkpoint)
    assert call(train, "--out", out, "--resume").status == 0
    assert_near(out, finished.out, 1e-5)


def test_one_step_is_the_same_on_any_number_of_ranks(tiny, call, tmp_path):
    """Loss, gradients (in the momenta after one step), expert counts, biases and weights."""
    one_each, runs = flags(**tiny | {"steps": 1, "warmup": 0}, micro_batch_size=1), []
    assert call(train, *one_each, "--out", tmp_path / "1").status == 0
    for ranks in (2, 4):
        train_on_ranks(ranks, *one_each, "--out", tmp_path / str(ranks))
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        runs.append((log_of(out)[0], *what_was_learned(out)))
    for entry, losses, tensors in runs[1:]:
        assert entry["load"] == runs[0][0]["load"] and tensors.keys() == runs[0][2].keys()
        assert abs(losses[1] - runs[0][1][1]) < 1e-6
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, runs[0][2][name], rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}"
            )


@pytest.mark.parametrize("ranks", [1, 4])
def test_saved_on_two_ranks_resumed_on_others(ranks, on_two_ranks, finished, tmp_path):
    out = shutil.copytree(on_two_ranks[0], tmp_path / "out")
    for checkpoint in ("step-0000004", "step-0000006"):
        shutil.rmtree(out / checkpoint)
    train_on_ranks(ranks, "--out", out, "--resume")
    assert_near(out, finished.out, 1e-5)
    alone, several = (log_of(run)[-1]["val_loss"] for run in (finished.out, out))
    assert abs(alone - several) < 1e-5  # on the same part of the validation text


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_the_group_of_ranks_outlives_ddp_and_no_thread_the_group():
    """Else an exit hangs or aborts now and then, when all is done and saved."""
    code = """
import atexit, os, time, torch, train

def names():
    time.sleep(0.1)  # a thread that has ended is listed for another moment
    return [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]

atexit.register(lambda: print("at the end:", names()))
ranks = train.Ranks("cpu")
ddp = train.averaging(torch.nn.Linear(4, 4))
ddp(torch.ones(2, 4)).sum().backward()
ranks.leave()
del ddp
print("without ddp:", names())
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT | alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after_ddp, at_the_end = done.stdout.splitlines()
    assert "gloo" in after_ddp and "gloo" not in at_the_end


@pytest.mark.parametrize("differs", ["flags", "dtype", "data", "init_from", "checkpoint"])
def test_nodes_that_would_not_train_the_same_are_refused(finished, tiny, tmp_path, differs):
    own, other = (dict(tiny, out=tmp_path / "out") for _ in range(2))
    if differs == "flags":
        other["lr"] = 0.02
    elif differs == "dtype":  # which ranks with auto ask each other
        other["dtype"], differs = "auto", "flags"
    elif differs == "data":  # as many tokens, but others
        other["data"] = shutil.copytree(tiny["data"], tmp_path / "data")
        ids = np.fromfile(tmp_path / "data" / "train.bin", "<u2")
        ids[::-1].tofile(tmp_path / "data" / "train.bin")
    elif differs == "init_from":  # a run of the same shape
        for which, step in ((own, 4), (other, 6)):
            which |= {"init_from": finished.out / f"step-{step:07d}"}
            [which.pop(name) for name in SHAPE if name != "block_size"]
        differs = "checkpoint"
    else:  # a folder for each, to the second of which only the last checkpoint was copied
        for which, name in ((own, "one"), (other, "two")):
            which |= {"out": shutil.copytree(finished.out, tmp_path / name), "resume": True, "steps": 8}
        shutil.rmtree(tmp_path / "two" / "best")
    statuses, _, said = run_ranks(*([sys.executable, ROOT / "train.py", *flags(**which)] for which in (own, other)))
    assert statuses == [2, 2], said
    assert all(f"not all ranks have the {differs} of rank {rank}" in said[rank] for rank in (0, 1)), said


def test_what_ranks_must_agree_on(tiny_data, monkeypatch):
    """Also a model whose flags do not tell it, of --init_from, and the code."""
    training, record, first = tokens_of(tiny_data), {"step": 0, "best": None, "best_of": None}, []
    ranks = SimpleNamespace(rank=1, world=2, device=CPU, sum=lambda own: first.append(own) or 2 * own)
    train.refuse_disagreement(record, training, TrainConfig(), tiny_model(), ranks)
    ranks.sum = lambda own: own + first[0]
    train.refuse_disagreement(record, training, TrainConfig(), tiny_model(seed=1), ranks)
    with pytest.raises(ValueError, match="have the flags of rank 1"):
        train.refuse_disagreement(record, training, TrainConfig(), tiny_model(rope_theta=7.0), ranks)
    for owner, name, other in ((torch, "__version__", "1.0"), (train, "sha256", lambda path: path.name)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="have the code of rank 1"):
            patch.setattr(owner, name, other)
            train.refuse_disagreement(record, training, TrainConfig(), tiny_model(), ranks)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="--batch_size 4 cannot be shared evenly by 3 ranks"):
        train.resolve_defaults(TrainConfig(batch_size=4), tiny_model(), SimpleNamespace(world=3, device=CPU))


def test_how_to_go_on_after_a_stop(monkeypatch, capsys):
    for run in ("python", "torchrun ..."):
        train.farewell(None, None, TrainConfig(steps=9, out="my runs"), 3)
        assert f"stopped after step 3, which is saved; go on with: {run} train.py --out 'my runs' --resume" in (
            capsys.readouterr().out
        )
        monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}])
def test_ranks_that_cannot_be(tiny, call, monkeypatch, tmp_path, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = call(train, *flags(**tiny, out=tmp_path / "out"))
    assert done.status == 2 and "is no rank of WORLD_SIZE 2" in done.lines[-1]


def test_a_rank_that_does_not_come_is_named(monkeypatch, capsys):
    """After a minute, and after ten the others end."""
    ranks, clock = object.__new__(train.Ranks), iter(range(0, 1000, 7))
    ranks.rank, ranks.world, ranks.first, ranks.device = 0, 3, True, torch.device("cpu")
    ranks.meeting = SimpleNamespace(set=lambda *entry: None, check=lambda keys: keys != ["rank 1"])
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    with pytest.raises(ConnectionError, match="rank 0 waits for 1 in vain"):
        ranks.meet()
    assert capsys.readouterr().out.count("rank 0 waits for 1;") == 1
    assert 600 < next(clock) < 620


def test_a_rank_without_the_others_gpu_is_named():
    """One on a CPU and others on GPUs would wait for each other in two groups, for half an hour."""
    ranks = object.__new__(train.Ranks)
    ranks.rank, ranks.world, ranks.first, ranks.device = 0, 3, True, torch.device("cpu")
    ranks.meeting = dist.HashStore()
    for rank, device in ((1, "cpu"), (2, "cuda")):
        ranks.meeting.set(f"rank {rank}", device)
    with pytest.raises(ValueError, match="rank 0 is on cpu, rank 2 on cuda"):
        ranks.meet()
    ranks.meeting.set("rank 2", "cpu")
    ranks.meet()


def test_more_ranks_than_gpus(tiny, call, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = call(train, *flags(**tiny | {"device": "cuda"}, out=tmp_path / "out"))
    assert done.status == 2 and "would take GPU 1 of this machine, which shows it 1" in done.lines[-1]


def test_two_ranks_on_a_macs_gpu(tiny, call, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = call(train, *flags(**tiny | {"device": "mps"}, out=tmp_path / "out"))
    assert done.status == 2 and "a Mac's GPU is for one process alone" in done.lines[-1]


def test_an_error_on_one_of_four_ranks_ends_them_all(tiny, tmp_path):
    """...though it comes in the optimizer, where the others wait for what they send each other."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train

def fail(*args):
    raise ArithmeticError("broken")

if os.environ["RANK"] == "1":
    train.Muon.update = fail
train.run()
"""
    statuses, _, said = run_ranks(*[[sys.executable, "-c", code, *flags(**tiny, out=tmp_path / "out")]] * 4)
    assert statuses == [2, 2, 2, 2], said
    assert "error: broken" in said[1]
    assert all(f"rank {rank} has lost another" in said[rank] for rank in (0, 2, 3))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tiny, tmp_path):
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train

def evaluate(*args, original=train.evaluate):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    return original(*args)

train.evaluate = evaluate
train.run()
"""
    statuses, _, said = run_ranks(*[[sys.executable, "-c", code, *flags(**tiny, out=tmp_path / "out")]] * 2)
    assert statuses == [0, 0], said
    assert len(log_of(tmp_path / "out")) == 4  # the first evaluation is step 3's


def test_ranks_wait_for_the_first_to_prepare_data():
    store = dist.HashStore()
    first, second = (SimpleNamespace(world=2, first=first, meeting=store) for first in (True, False))
    waiting = threading.Thread(target=train.Ranks.follow_the_first, args=(second,), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    train.Ranks.follow_the_first(first)
    waiting.join(10)
    assert not waiting.is_alive()


def test_auto_is_fp32_on_a_gpu_that_only_imitates_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not train.has_bf16("cuda")


@pytest.mark.parametrize("first_says, taken", [(0, "float32"), (1, "bfloat16")])
def test_all_ranks_take_the_first_ones_dtype(first_says, taken):
    second = SimpleNamespace(device=torch.device("cpu"), first=False, sum=lambda own: own + first_says)
    assert train.faster_dtype(second) == taken


def test_every_rank_has_its_share(tmp_path):
    """Masters and momenta lie on one rank each, and none has much more to make orthogonal than another."""
    parameters = {f"{i}.o_proj.weight": torch.zeros(8, 4 * (1 + i % 3)) for i in range(20)}
    parameters |= {"large": torch.zeros(8, 71), "thin": torch.zeros(1, 900)}  # the second is little work for its size
    shards = [
        Muon(parameters, torch.bfloat16, 0.9, 0.1, SimpleNamespace(rank=rank, world=3, first=rank == 0))
        for rank in range(3)
    ]
    assert sorted(name for muon in shards for name in muon.buffer) == sorted(parameters)
    assert all(muon.buffer.keys() == muon.master.keys() for muon in shards)
    work = [sum(p.numel() * min(p.shape) for p in muon.buffer.values()) for muon in shards]
    assert max(work) < 1.2 * min(work)


# ---------------------------------------------------------------------------------------------------------------------
# Memory and operations


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "kernels, dtype, T, within",
    [("triton", torch.float32, 24, 0.2), ("eager", torch.float32, 24, 0.33), ("eager", torch.bfloat16, 700, 0.33)],
)
def test_memory_of_activations_is_as_planned(kernels, dtype, T, within, recompute):
    """What autograd keeps of a forward pass, every storage once."""
    if kernels == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    config, kept = replica(128, 3, 16, vocab_size=64), {}
    model = Zaya(config, kernels)
    plan = train.memory_plan(model, Optimizer(model, TrainConfig(recompute=recompute), dtype, ALONE), 2, T)
    if recompute:
        train.recompute(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.randint(64, (2, T)), torch.randint(64, (2, T)))[1]
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    head = 2 * 64 * 128 * 4 + (4 + 2 * dtype.itemsize) * zaya.LOGITS_AT_ONCE[False]
    assert loss.isfinite() and found == pytest.approx(plan["activations"] - head, rel=within)


def test_zaya1_8b_fits_eight_gpus():
    """In bf16, one sequence of 4,096 tokens a forward pass, or the recipe's eight, on 192 GB each."""
    made = []
    with torch.device("meta"):
        for rank in range(8):
            model = Zaya(PRESETS["zaya1-8b"])
            ranks = SimpleNamespace(rank=rank, world=8, first=rank == 0, device=torch.device("meta"))
            made.append((model, Optimizer(model, TrainConfig(), torch.bfloat16, ranks), ranks))
    with redirect_stdout(io.StringIO()) as said:
        for sequences in (1, train.sequences_at_once(train.RECIPES["zaya1-8b"]["batch_size"] // 8, 4096)):
            print(f"GB, with sequences of 4,096 tokens a forward pass: {sequences}")
            plans = [train.memory_plan(model, optimizer, sequences, 4096) for model, optimizer, _ in made]
            for plan, (*_, ranks) in zip(plans, made):
                train.say_memory(plan, ranks)
                assert sum(plan.values()) < 192e9
    assert sum(plan["optimizer"] for plan in plans) >= 8 * 8.3e9  # masters and momenta, each somewhere
    print(said.getvalue())  # README says that `pytest -s` shows it
    assert "rank 7: weights 17.68, gradients 35.37" in said.getvalue()


def test_flops_of_a_token():
    """6 a weight that multiplies, embedding left out and head counted, and attention over half the block."""
    config = PRESETS["zaya1-8b"]
    attention = 3 * 2 * 2 * 40 * 8 * 128 * 2048
    flops = 6 * (753_608_528 + 262_272 * 2048) + attention
    assert zaya.training_flops(config, 753_608_528, 4096) == flops
    sliding = replace(config, layer_types=["hybrid", "hybrid_sliding"] * 20, sliding_window=512)
    assert zaya.training_flops(sliding, 753_608_528, 4096) == flops - attention * (1 - (512 - 512**2 / 8192) / 2048) / 2
    assert zaya.positions_seen(sliding, 100) == 40 * 100 and zaya.positions_seen(sliding, 600) == 20 * (600 + 512)
    untied = replace(config, tie_word_embeddings=False)  # there the head is one of the active weights
    assert zaya.training_flops(untied, 753_608_528 + 262_272 * 2048, 4096) == flops


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps): the loss of those steps (1, 2, ...) becomes NaN on its way out of the model."""

    def install(steps):
        forward, count = Zaya.forward, iter(range(1, 1000))

        def spoiled(self, tokens, targets=None, cache=None):
            logits, loss = forward(self, tokens, targets, cache)
            training = targets is not None and torch.is_grad_enabled()
            return logits, loss * math.nan if training and next(count) in steps else loss

        monkeypatch.setattr(Zaya, "forward", spoiled)

    return install


def test_a_bad_loss_skips_the_update(tiny, call, tmp_path, spoil):
    spoil({3})
    assert call(train, *flags(**tiny | {"steps": 3, "save_every": 2}, out=tmp_path)).status == 0
    log = log_of(tmp_path)
    assert [entry["loss"] is None for entry in log] == [False, False, True]
    assert log[-1]["grad_norm"] is None and [entry["skipped"] for entry in log] == [0, 0, 1]
    for file in ("model.safetensors", "trainer.safetensors"):  # weights, momenta and counts are step 2's
        before, after = (load_safetensors(tmp_path / f"step-000000{step}" / file) for step in (2, 3))
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_json(tmp_path / "step-0000003/trainer.json")["skipped"] == 1


def test_a_bad_gradient_skips_the_update(tiny, call, tmp_path, monkeypatch):
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def overflowing(*args):
        norms.append(clip(*args))
        return norms[-1] * (math.inf if len(norms) == 2 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflowing)
    assert call(train, *flags(**tiny | {"steps": 3}, out=tmp_path)).status == 0
    log = log_of(tmp_path)
    assert [entry["skipped"] for entry in log] == [0, 1, 1] and all(entry["loss"] for entry in log)


def test_training_goes_on_after_a_bad_loss(tiny, call, pictures, tmp_path, spoil):
    spoil({2, 4})
    assert call(train, *flags(**tiny | {"steps": 12}, out=tmp_path)).status == 0
    log = log_of(tmp_path)
    assert [entry["skipped"] for entry in log] == [0, 1, 1, *[2] * 9]
    assert log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "loss.png").exists() and (tmp_path / "step-0000010").exists()  # and it is saved as before


def test_ten_bad_losses_in_a_row_stop_the_run(tiny, call, tmp_path, spoil):
    spoil(set(range(5, 100)))
    done = call(train, *flags(**tiny | {"steps": 40}, out=tmp_path))
    assert done.status == 2
    last = re.split("[\r\n]", done.stderr.strip())[-1]
    assert last.startswith("train.py: error:") and "step 14" in last and "step-0000004" in last
    assert len(log_of(tmp_path)) == 14
    assert Zaya.from_pretrained(tmp_path / "step-0000004")  # still there, and whole


def test_a_run_that_explodes_stops_with_what_it_had(tiny, call, tmp_path):
    done = call(train, *flags(**tiny | {"steps": 40, "lr": 1e30}, out=tmp_path))
    assert done.status == 2 and "not finite" in done.stderr
    log = log_of(tmp_path)
    assert log[-1]["loss"] is None and log[-1]["skipped"] == 10 and len(log) < 40
    assert all(Zaya.from_pretrained(path) for path in tmp_path.glob("step-*"))  # whatever was saved is finite
