"""sample.py: text from a checkpoint, repeatable, streamed in whole characters."""

import io
import re

import pytest
import torch
from conftest import command

import sample
from data.tokenizer import load_tokenizer
from zaya import Zaya


@pytest.fixture
def write(finished, call):
    """write(flags...) -> what sample.py does with the finished run."""
    return lambda *args: call(sample, "--checkpoint", finished.out, "--device", "cpu", "--max_new_tokens", 20, *args)


def test_the_same_seed_writes_the_same_text(write):
    first, again, other = (write("--prompt", "3 times", "--seed", seed).stdout for seed in (7, 7, 8))
    assert first == again != other
    assert first.startswith("3 times") and len(first) > len("3 times\n")


def test_the_command_streams_from_standard_input_and_reports_its_speed(finished, write):
    """In a process of its own the text is the same to the last byte."""
    args = "--checkpoint", finished.out, "--device", "cpu", "--max_new_tokens", 20, "--prompt", "-", "--seed", 7
    done = command("sample.py", *args, input="3 times – ")
    assert done.returncode == 0
    assert done.stdout == write("--prompt", "3 times – ", "--seed", 7).stdout
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s, cpu, float32\n", done.stderr)


def test_a_prompt_comes_from_the_command_line_a_file_or_standard_input(write, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("3 times – ", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("3 times – ".encode()), "utf-8"))
    texts = {write("--prompt", prompt).stdout for prompt in ("3 times – ", f"FILE:{file}", "-")}
    assert len(texts) == 1


def test_no_prompt_is_a_text_from_its_beginning(write):
    done = write()
    assert done.status == 0 and len(done.stdout) > 1


def test_a_run_directory_means_its_newest_checkpoint(finished, call):
    args = ("--device", "cpu", "--max_new_tokens", 20, "--temperature", 1, "--prompt", "3")
    newest, of_run, first = (call(sample, "--checkpoint", path, *args).stdout for path in (
        finished.out / "step-0000006", finished.out, finished.out / "step-0000002"))  # fmt: skip
    assert newest == of_run != first
    assert call(sample, "--checkpoint", finished.out / "best", *args).status == 0


def test_temperature_0_takes_the_likeliest_token_whatever_the_seed(write, finished):
    texts = {write("--prompt", "3 times", "--temperature", 0, "--seed", seed).stdout for seed in (1, 2)}
    texts.add(write("--prompt", "3 times", "--top_k", 1).stdout)
    texts.add(write("--prompt", "3 times", "--top_p", 1e-9).stdout)
    texts.add(write("--prompt", "3 times", "--temperature", 1e-45).stdout)  # as cold as a float can be
    assert len(texts) == 1


def test_several_samples_are_one_batch(write, finished, monkeypatch):
    batches = []
    stream = Zaya.stream
    monkeypatch.setattr(
        Zaya, "stream", lambda self, tokens, *rest: batches.append(tokens.shape) or stream(self, tokens, *rest)
    )
    done = write("--prompt", "3 times", "--num_samples", 3, "--temperature", 1.2)
    eot = load_tokenizer(finished.out / "step-0000006").eot
    assert batches == [(3, len("3 times") + (eot is not None))]
    assert re.findall(r"^--- (\d)$", done.stdout, re.MULTILINE) == ["1", "2", "3"]
    texts = re.split(r"^--- \d\n", done.stdout, flags=re.MULTILINE)[1:]
    assert all(text.startswith("3 times") for text in texts) and len(set(texts)) == 3
    assert re.match(r"\d+ tokens in", done.stderr)
    assert done.stdout == write("--prompt", "3 times", "--num_samples", 3, "--temperature", 1.2).stdout


def test_a_prompt_longer_than_the_context_says_so_and_writes_on(write):
    done = write("--prompt", "3 times 3 is 9 – and so on;")  # the context is 16 tokens
    assert done.status == 0 and len(done.lines) == 2
    assert "the prompt has" in done.lines[0] and "16" in done.lines[0] and "context" in done.lines[0]
    assert done.stdout.startswith("3 times 3 is 9 – and so on;")
    short = write("--prompt", "3 times")
    assert len(short.lines) == 1  # the context fills up while writing: no remark


@pytest.mark.parametrize(
    "text", ["naïve – ½ 中文 👩‍👩‍👧", "a\ufffdb", "x"], ids=["many bytes", "a real U+FFFD", "ascii"]
)
def test_only_whole_characters_are_shown(text, capsys):
    tokenizer = load_tokenizer("bytes")
    printer, pieces = sample.Printer(tokenizer), []
    for token in tokenizer.encode(text):  # a byte at a time
        printer.add(token)
        pieces.append(capsys.readouterr().out)
    printer.finish()
    rest = capsys.readouterr().out
    assert "".join(pieces) == text and rest == ""


def test_half_a_character_at_the_end_is_shown_at_last(capsys):
    printer = sample.Printer(load_tokenizer("bytes"))
    for token in b"a\xe2\x80":
        printer.add(token)
    assert capsys.readouterr().out == "a"
    printer.finish()
    assert capsys.readouterr().out == "\ufffd"
    printer = sample.Printer(load_tokenizer("bytes"))
    for token in b"\xe2\x80b":  # what never becomes a character is shown when that is certain
        printer.add(token)
    assert capsys.readouterr().out == "\ufffdb"


def test_a_text_ends_where_the_model_ends_it(write, finished, monkeypatch):
    eot = load_tokenizer(finished.out / "step-0000006").eot
    tokens = [ord("o"), ord("k"), eot]
    monkeypatch.setattr(Zaya, "stream", lambda self, *rest: iter([torch.tensor([token]) for token in tokens]))
    assert write("--prompt", "3 ").stdout == "3 ok\n"
    columns = [[ord("o"), ord("x")], [ord("k"), eot], [eot, eot]]
    monkeypatch.setattr(Zaya, "stream", lambda self, *rest: iter([torch.tensor(column) for column in columns]))
    assert write("--prompt", "3 ", "--num_samples", 2).stdout == "--- 1\n3 ok\n--- 2\n3 x\n"
