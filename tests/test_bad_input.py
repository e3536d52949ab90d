"""What a user gets wrong ends in one clear line, which names it, and exit status 2: no traceback, nothing written."""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, assert_same_run, command, flags, rewrite

import sample
import train
import zaya
from data.dataset import one_line_errors
from zaya import Zaya, load_safetensors, read_json, save_safetensors

TABLE = SimpleNamespace(__file__=zaya.__file__, main=zaya.cost_table)  # `python zaya.py`


def assert_refused(done, *named):
    assert done.status == 2 and len(done.lines) == 1, done.stderr
    assert "error: " in done.lines[0] and all(str(name) in done.lines[0] for name in named), done.lines[0]


WRONG_FLAGS = {
    "an unknown flag": ({"stpes": 5}, "--stpes"),
    "an abbreviated flag": ({"step": 5}, "--step"),
    "a word for a number": ({"steps": "many"}, "many"),
    "half a step": ({"steps": 2.5}, "2.5"),
    "no steps": ({"steps": 0}, "--steps"),
    "an empty batch": ({"batch_size": 0}, "--batch_size"),
    "a negative rate": ({"lr": -0.1}, "--lr"),
    "a rate that is no number": ({"lr": "nan"}, "--lr"),
    "an infinite rate": ({"balance_lr": "inf"}, "--balance_lr"),
    "a momentum of one": ({"momentum": 1}, "--momentum"),
    "a rate that fp32 does not hold": ({"lr": 1e300}, "--lr"),
    "a batch that no machine holds": ({"batch_size": 1e30}, "--batch_size"),
    "a width that no machine holds": ({"hidden_size": 1e30}, "hidden_size"),
    "layers that nobody can build": ({"num_hidden_layers": 2e9}, "num_hidden_layers"),
    "an infinite base": ({"rope_theta": "inf"}, "rope_theta"),
    "no checkpoint": ({"keep": 0}, "--keep"),
    "no clipping": ({"grad_clip": 0}, "--grad_clip"),
    "a negative seed": ({"seed": -1}, "--seed"),
    "an unknown preset": ({"preset": "giant"}, "giant"),
    "an unknown dtype": ({"dtype": "float8"}, "float8"),
    "an unknown device": ({"device": "tpu"}, "tpu"),
    "neither yes nor no": ({"compile": "perhaps"}, "perhaps"),
    "no such data": ({"data": "nowhere/at/all"}, "nowhere/at/all"),
    "a batch in uneven parts": ({"micro_batch_size": 3}, "--micro_batch_size"),
    "a block longer than the text": ({"block_size": 100_000}, "100000"),
    "heads that do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads"),
    "an odd head": ({"head_dim": 6}, "head_dim"),
    "too few layer types": ({"layer_types": "hybrid_sliding", "sliding_window": 4}, "layer_types"),
    "a window without a size": ({"layer_types": "hybrid,hybrid_sliding"}, "sliding_window"),
    "a window without a layer for it": ({"sliding_window": 4}, "--layer_types"),
    "nothing to start from": ({"init_from": "nowhere/at/all"}, "nowhere/at/all"),
    "what the data decides": ({"vocab_size": 100}, "--vocab_size"),
    "nothing to evaluate": ({"eval_only": True}, "--init_from"),
}


@pytest.mark.parametrize("wrong, named", WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_train_refuses(wrong, named, tiny, call, tmp_path):
    out = tmp_path / "out"
    assert_refused(call(train, *flags(**tiny | wrong, out=out)), named)
    assert not out.exists()


def test_a_run_is_not_overwritten_and_no_run_is_not_resumed(finished, tiny, call, tmp_path):
    assert_refused(call(train, *flags(**tiny, out=finished.out)), finished.out, "--resume")
    assert_refused(call(train, *flags(out=tmp_path / "new", resume=True)), tmp_path / "new", "--resume")


def test_a_run_does_not_go_back(finished, call):
    before = (finished.out / "args.json").read_text()
    assert_refused(call(train, *flags(out=finished.out, resume=True, steps=5)), "--steps 5", "6 steps")
    assert before == (finished.out / "args.json").read_text()


def test_fine_tuning_does_not_change_the_model(finished, tiny_data, call, tmp_path):
    chosen = dict(data=tiny_data, init_from=finished.out, out=tmp_path / "out", device="cpu")
    assert_refused(call(train, *flags(**chosen, hidden_size=64)), "--hidden_size")


DAMAGED_DATA = {
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
    "meta.json cut short": (lambda folder: (folder / "meta.json").write_text('{"dtype": '), "meta.json"),
    "an unknown type": (lambda folder: rewrite(folder / "meta.json", dtype="int8"), "int8"),
    "no vocabulary": (lambda folder: rewrite(folder / "meta.json", vocab_size=0), "vocab_size"),
    "no val.bin": (lambda folder: (folder / "val.bin").unlink(), "val.bin"),
    "another kind of JSON": (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json"),
    "half a token": (lambda folder: (folder / "val.bin").write_bytes(b"\0" * 1001), "1001"),
    "too few tokens": (lambda folder: (folder / "val.bin").write_bytes(b"\0" * 10), "val.bin"),
    "a token too large": (lambda folder: np.full(99, 257, "<u2").tofile(folder / "train.bin"), "257"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("damage, named", DAMAGED_DATA.values(), ids=DAMAGED_DATA)
def test_damaged_data_is_named(damage, named, tiny, call, tmp_path):
    folder = shutil.copytree(tiny["data"], tmp_path / "data")
    damage(folder)
    assert_refused(call(train, *flags(**tiny | {"data": folder}, out=tmp_path / "out")), named)
    assert not (tmp_path / "out").exists()


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil_a_number(file):
    tensors = {name: tensor.clone() for name, tensor in load_safetensors(file).items()}
    tensors["model.norm.weight"][3] = float("nan")
    save_safetensors(file, tensors)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[data.index(b'"tokens": ') + 10] ^= 1  # of a digit: still a number
    file.write_bytes(data)


DAMAGED_RUN = {
    "weights cut short": (cut_in_half, "model.safetensors"),
    "moments cut short": (cut_in_half, "trainer.safetensors"),
    "the step cut short": (cut_in_half, "trainer.json"),
    "another number of tokens": (flip_a_bit, "trainer.json"),
    "the shape cut short": (cut_in_half, "config.json"),
    "weights that are no numbers": (spoil_a_number, "model.safetensors"),
}


@pytest.mark.parametrize("damage, file", DAMAGED_RUN.values(), ids=DAMAGED_RUN)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, file, finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    newest = out / "step-0000006"
    damage(newest / file)
    done = call(train, "--out", out, "--resume")
    assert done.status == 0 and str(newest / file) in done.stderr and f"trying {out}/step-0000004" in done.stderr
    assert_same_run(out, finished.out)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:30], lambda text: '{"steps": "six"}', lambda text: text.replace("batch_size", "bbtch_size")],
    ids=["cut short", "a word for a number", "a byte"],
)
def test_of_a_run_with_damaged_flags_the_newest_checkpoints_are_taken(damage, finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    (out / "args.json").write_text(damage((out / "args.json").read_text()))
    done = call(train, "--out", out, "--resume", "--steps", 8)
    assert done.status == 0 and f"{out}/args.json cannot be read" in done.stderr and "step-0000006" in done.stderr
    before, after = (read_json(run / "args.json") | {"sha256": None} for run in (finished.out, out))
    assert after == before | {"steps": 8, "out": str(out)}


def test_damaged_weights_to_start_from_are_named(tiny, finished, call, tmp_path):
    start = shutil.copytree(finished.out / "step-0000006", tmp_path / "start")
    tensors = {name: -tensor for name, tensor in load_safetensors(start / "model.safetensors").items()}
    save_safetensors(start / "model.safetensors", tensors)  # of the same size
    done = call(train, *flags(data=tiny["data"], init_from=start, out=tmp_path / "out", device="cpu"))
    assert_refused(done, start / "model.safetensors", "damaged")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Mac has no /dev/full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = open(tmp_path / "log.jsonl", "w", buffering=1)
    with pytest.raises(OSError, match="log.jsonl: No space left on device; there is no checkpoint yet"):
        train.write_line(log, {"step": 1})
    with pytest.raises(OSError):
        log.close()  # what is left in its buffer cannot be written either


def test_when_all_checkpoints_are_damaged_the_newest_is_named(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    for checkpoint in (*out.glob("step-*"), out / "best"):
        cut_in_half(checkpoint / "model.safetensors")
    done = call(train, "--out", out, "--resume")
    assert done.status == 2 and "step-0000006/model.safetensors is damaged" in done.lines[-1]
    assert not list(out.glob(".*"))


def test_the_best_is_the_last_resort(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    for checkpoint in out.glob("step-*"):
        shutil.rmtree(checkpoint)
    done = call(train, "--out", out, "--resume", "--steps", 8)
    assert done.status == 0, done.stderr
    assert [entry["step"] for entry in train.read_log(out)] == [*range(1, 9)]
    best = read_json(finished.out / "best" / "trainer.json")["step"]
    assert best and train.read_log(out)[:best] == train.read_log(finished.out)[:best]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"checkpoint": "nowhere/at/all"}, "nowhere/at/all"),
        ({"checkpoint": "~nobody-of-that-name/out"}, "home directory"),
        ({"prompt": "FILE:nowhere/at/all"}, "nowhere/at/all"),
        ({"max_new_tokens": 0}, "--max_new_tokens"),
        ({"num_samples": 0}, "--num_samples"),
        ({"temperature": -1}, "--temperature"),
        ({"temperature": "nan"}, "--temperature"),
        ({"top_k": 0}, "--top_k"),
        ({"top_p": 0}, "--top_p"),
        ({"top_p": 1.5}, "--top_p"),
        ({"seed": -1}, "--seed"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu"}, "tpu"),
        ({"kolor": 1}, "--kolor"),
        ({"show_experts": 1, "num_samples": 2}, "--show_experts shows one text"),
        ({"show_experts": 9}, "--show_experts 9: no such layer of experts; layers are 0 to 1"),
        ({"compare": "one"}, "--compare takes two checkpoints, not 1"),
        ({"text": "x"}, "--text is what --compare measures"),
        ({"gpu_hour": 0}, "--gpu_hour must be positive"),
        ({"chat": True}, "has no chat template"),
    ],
    ids=str,
)
def test_sample_refuses(wrong, named, finished, call):
    done = call(sample, *flags(**{"checkpoint": finished.out} | wrong))
    assert_refused(done, named)
    assert done.stdout == ""


def test_sample_names_a_text_that_is_none(finished, call, tmp_path):
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"text \xff")
    empty.touch()
    both = "--compare", finished.out, finished.out, "--text"
    assert_refused(call(sample, "--checkpoint", finished.out, "--prompt", f"FILE:{binary}"), binary, "byte 5")
    assert_refused(call(sample, *both, binary), binary, "byte 5")
    assert_refused(call(sample, *both, empty), "--text is too short")


def test_sample_takes_the_newest_whole_checkpoint(finished, call, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "out")
    cut_in_half(out / "step-0000006" / "model.safetensors")
    done = call(sample, "--checkpoint", out, "--max_new_tokens", 2)
    assert done.status == 0 and "step-0000006/model.safetensors is damaged" in done.lines[0]
    assert f"trying {out}/step-0000004" in done.lines[0]


@pytest.mark.parametrize("damage", [cut_in_half, lambda file: file.write_text("[]")], ids=["cut", "a list"])
def test_sample_names_a_tokenizer_that_is_damaged(damage, finished, call, tmp_path):
    checkpoint = shutil.copytree(finished.out / "best", tmp_path / "best")
    damage(checkpoint / "tokenizer_config.json")
    assert_refused(call(sample, "--checkpoint", checkpoint), checkpoint / "tokenizer_config.json")


def test_a_notebooks_stream(monkeypatch):
    """%run of a script: there stdout is no file."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with zaya.stop_in_one_line(), one_line_errors(None):
        print("é")
    assert sys.stdout.getvalue() == "é\n"


def test_streams_that_are_closed(finished, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert_refused(call(sample, "--checkpoint", finished.out, "--prompt", "-"), "standard input is closed")
    monkeypatch.setattr("sys.stderr", None)
    assert "tokens/s" not in call(sample, "--checkpoint", finished.out, "--max_new_tokens", 2).stdout


def test_what_is_closed_takes_no_files_number(tmp_path):
    """Else a message would go into the next file that is opened, a log say."""
    script = "import zaya\nwith zaya.stop_in_one_line(): raise SystemExit(int(open('file', 'w').fileno() < 3))"
    closed = f"{sys.executable} -c {shlex.quote(script)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed], cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": ROOT}).returncode == 0


def test_a_reader_who_has_read_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    script = "import zaya\nwith zaya.stop_in_one_line(): print('text')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_sample_names_a_file_that_is_missing_or_damaged(file, finished, call, tmp_path):
    checkpoint = shutil.copytree(finished.out / "best", tmp_path / "best")
    cut_in_half(checkpoint / file)
    assert_refused(call(sample, "--checkpoint", checkpoint), checkpoint)
    (checkpoint / file).unlink()
    assert_refused(call(sample, "--checkpoint", checkpoint), checkpoint)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"preset": "giant"}, "giant"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"mfu": 0}, "--mfu"),
        ({"mfu": "nan"}, "--mfu"),
        ({"mfu": 35}, "--mfu"),
        ({"preset": "nano", "checkpoint": "out"}, "not both"),
        ({"context": "long"}, "long"),
    ],
    ids=str,
)
def test_the_table_refuses(wrong, named, call):
    assert_refused(call(TABLE, *flags(**wrong)), named)


def test_the_table_of_a_checkpoint(finished, call):
    done = call(TABLE, "--checkpoint", finished.out)
    total, active = Zaya.from_pretrained(finished.out).parameter_counts()
    assert done.status == 0 and f"{total:,}" in done.stdout and f"{active:,}" in done.stdout


def test_what_a_flag_may_look_like(monkeypatch):
    words = "--layer_types None --micro_batch_size none --steps 1e3 --compile FALSE --recompute --plot a,b c".split()
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    given = zaya.parse_flags("", train.TrainConfig, zaya.ZayaConfig)
    assert given == dict(
        layer_types=None, micro_batch_size=None, steps=1000, compile=False, recompute=True, plot=["a", "b", "c"]
    )


def test_too_little_memory_is_one_line_and_a_bug_is_none(call):
    def fail(error):
        raise error

    for kind in RuntimeError, torch.OutOfMemoryError, MemoryError:  # a CPU's, a GPU's, numpy's
        program = SimpleNamespace(__file__="train.py", main=lambda: fail(kind("tried to allocate 9 TB")))
        assert_refused(call(program), "9 TB")
    with pytest.raises(RuntimeError):
        call(SimpleNamespace(__file__="train.py", main=lambda: fail(RuntimeError("shapes differ"))))
    assert call(SimpleNamespace(__file__="train.py", main=lambda: fail(KeyboardInterrupt()))).status == 130


def test_a_command_of_its_own_does_the_same(tmp_path):
    """Not only the function that the other tests call: the script, its status and its one line."""
    for script in ("train.py", "sample.py", "zaya.py"):
        done = command(script, "--nonsense", cwd=tmp_path)
        assert (
            (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "--nonsense" in done.stderr
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [train, sample, TABLE], ids=["train", "sample", "zaya"])
def test_help_has_a_line_and_a_default_for_every_flag(module, call):
    done = call(module, "--help")
    assert done.status == 0 and not done.stderr
    options = done.stdout.split("\n  --")[1:]
    assert options and all("(default: " in " ".join(option.split()) for option in options)
