"""sample.py: text from a checkpoint, repeatable, streamed in whole characters."""

import io
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import command, flags
from matplotlib.axes import Axes

import sample
import train
import zaya
from data.tokenizer import load_tokenizer
from zaya import PRESETS, Zaya, load_safetensors


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
    number = r"[\d.]+(?:e[+-]\d+)?"
    assert re.fullmatch(
        rf"\d+ prompt tokens, the first new one after \d+ ms; \d+ new ones at {number} tokens/s, "
        rf"{number} GB/s read, \d+% of the {number} GB/s to be had; cpu, float32\n",
        done.stderr,
    )


def test_a_prompt_comes_from_the_command_line_a_file_or_standard_input(write, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("3 times – ", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("3 times – ".encode()), "utf-8"))
    texts = {write("--prompt", prompt).stdout for prompt in ("3 times – ", f"FILE:{file}", "-")}
    assert len(texts) == 1


def test_a_file_keeps_its_line_ends(tmp_path):
    """As in the data, on which --text must give what --eval_only gives."""
    (tmp_path / "text.txt").write_bytes(b"a\r\nb\n")
    assert sample.utf8_text(tmp_path / "text.txt") == "a\r\nb\n"


def test_temperature_0_takes_the_likeliest_token_whatever_the_seed(write, finished):
    texts = {write("--prompt", "3 times", "--temperature", 0, "--seed", seed).stdout for seed in (1, 2)}
    texts.add(write("--prompt", "3 times", "--top_k", 1).stdout)
    texts.add(write("--prompt", "3 times", "--top_p", 1e-9).stdout)
    texts.add(write("--prompt", "3 times", "--temperature", 1e-45).stdout)  # as cold as a float can be
    assert len(texts) == 1


def test_several_samples_are_one_batch(write, finished, monkeypatch):
    batches = []
    stream = Zaya.next_tokens
    monkeypatch.setattr(
        Zaya, "next_tokens", lambda self, tokens, *rest: batches.append(tokens.shape) or stream(self, tokens, *rest)
    )
    done = write("--prompt", "3 times", "--num_samples", 3, "--temperature", 1.2)
    eot = load_tokenizer(finished.out / "step-0000006").eot
    assert batches == [(3, len("3 times") + (eot is not None))]
    assert re.findall(r"^--- (\d)$", done.stdout, re.MULTILINE) == ["1", "2", "3"]
    texts = re.split(r"^--- \d\n", done.stdout, flags=re.MULTILINE)[1:]
    assert all(text.startswith("3 times") for text in texts) and len(set(texts)) == 3
    assert re.search(r"; \d+ new ones at", done.stderr)
    assert done.stdout == write("--prompt", "3 times", "--num_samples", 3, "--temperature", 1.2).stdout


def test_a_checkpoint_saved_in_the_legacy_form_writes_the_same_text(finished, call, write, tmp_path):
    folder = tmp_path / "legacy"
    done = call(sample, "--checkpoint", finished.out, "--save_legacy", folder)
    assert done.status == 0 and "in the original code's form" in done.stdout
    assert any(".zaya_block." in name for name in load_safetensors(folder / "model.safetensors"))
    assert write("--checkpoint", folder, "--prompt", "3").stdout == write("--prompt", "3").stdout
    into_the_run = call(sample, "--checkpoint", finished.out, "--save_legacy", finished.out)
    assert into_the_run.status == 2 and "is not empty" in into_the_run.stderr


@pytest.mark.parametrize("free, warns", [(1000, True), (10**9, False), (0, False)])
def test_a_model_larger_than_the_free_memory_is_named_before_it_is_read(finished, monkeypatch, capsys, free, warns):
    """0: where nobody knows. (What ends such a process says nothing.)"""
    monkeypatch.setattr(zaya, "free_memory", lambda: free)
    Zaya.from_pretrained(finished.out)
    assert ("GB in torch.float32" in capsys.readouterr().err) == warns


def test_flags_reach_the_model(finished):
    for graph, kernels, dtype in (True, "auto", "float32"), (False, "eager", "bfloat16"):
        config = sample.SampleConfig(device="cpu", graph=graph, kernels=kernels, dtype=dtype)
        model = sample.Writer(finished.out, config).model
        assert (model.graph, model.kernels, model.head.dtype) == (graph, kernels, getattr(torch, dtype))


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
def test_only_whole_characters_are_shown(text):
    tokenizer = load_tokenizer("bytes")
    pieces = sample.Detokenizer(tokenizer)
    shown = [pieces.add(token) for token in tokenizer.encode(text)]  # a byte at a time
    assert "".join(shown) == text and pieces.rest() == ""


def test_half_a_character_at_the_end_is_shown_at_last():
    pieces = sample.Detokenizer(load_tokenizer("bytes"))
    assert [pieces.add(token) for token in b"a\xe2\x80"] == ["a", "", ""] and pieces.rest() == "\ufffd"
    pieces = sample.Detokenizer(load_tokenizer("bytes"))  # what never becomes a character is shown when that is certain
    assert [pieces.add(token) for token in b"\xe2\x80b"] == ["", "", "\ufffdb"]


def test_a_long_text_is_not_decoded_again_for_each_token():
    pieces = sample.Detokenizer(load_tokenizer("bytes"))
    shown = [(pieces.add(token), len(pieces.ids)) for token in "naïve 日本".encode() * 20]
    assert "".join(piece for piece, _ in shown) == "naïve 日本" * 20 and max(count for _, count in shown) == 5


def test_bytes_that_only_count_together():
    """As byte fallback has it: where one byte of several is missing or too many, none of them is a character."""

    def decode(ids):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(ids)

    pieces = sample.Detokenizer(SimpleNamespace(decode=decode))
    assert "".join(pieces.add(token) for token in "naïve 日本".encode()) == "naïve 日本"


def test_a_continuations_first_word_has_its_space():
    """Of a tokenizer that, as Llama's, writes none at the beginning of a text."""
    tokenizer = SimpleNamespace(decode=lambda ids: "".join([" a", " b", " c"][i] for i in ids).removeprefix(" "))
    assert "".join(sample.pieces_of(tokenizer, [1, 2, 0], [0])) == " b c a"


def test_a_text_ends_where_the_model_ends_it(write, finished, monkeypatch):
    eot = load_tokenizer(finished.out / "step-0000006").eot
    tokens = [ord("o"), ord("k"), eot]
    monkeypatch.setattr(Zaya, "next_tokens", lambda self, *rest: iter([torch.tensor([token]) for token in tokens]))
    assert write("--prompt", "3 ").stdout == "3 ok\n"
    columns = [[ord("o"), ord("x")], [ord("k"), eot], [eot, eot]]
    monkeypatch.setattr(Zaya, "next_tokens", lambda self, *rest: iter([torch.tensor(column) for column in columns]))
    assert write("--prompt", "3 ", "--num_samples", 2).stdout == "--- 1\n3 ok\n--- 2\n3 x\n"


@pytest.mark.parametrize(
    "texts, changes, idle, unread, positions",
    [
        (1, {}, 15 / 16, 0, 20),  # positions: half-way through the new ones
        (3, {}, (15 / 16) ** 3, 0, 20),
        (1, {"max_position_embeddings": 12, "tie_word_embeddings": False}, 15 / 16, 100 * 256, 12),  # the embedding
        (1, {"mlp": "dense"}, 0, 0, 20),
    ],
    ids=["a text", "several", "untied, with a short context", "dense"],
)
def test_bytes_read_for_a_token(texts, changes, idle, unread, positions):
    """By hand for one step: every weight but the idle experts', once; and keys and values of the texts so far."""
    model = Zaya(replace(PRESETS["nano"], vocab_size=100, num_hidden_layers=2, **changes))
    speed = sample.Speed(model, sample.SampleConfig(device="cpu", num_samples=texts), prompt_tokens=10)
    speed.kept = [texts] * 20
    read = sum(p.numel() for p in model.parameters()) - unread - idle * 16 * 2 * 3 * 256 * 256  # 2 layers, 3 matrices
    cached = texts * positions * 2 * 2 * 1 * 32  # keys and values, 2 layers, one head of 32
    assert speed.bytes_a_step() == pytest.approx(4 * (read + cached), rel=1e-9)


def test_speed_is_that_of_decoding(monkeypatch):
    """By a clock of our own: the first tokens are the prompt's, and before the second ones decoding is made ready."""
    monkeypatch.setattr(sample, "watts", lambda device: 2.0)
    monkeypatch.setattr(sample, "read_bandwidth", lambda device: 4e9)
    monkeypatch.setattr(sample.Speed, "bytes_a_step", lambda self: 1e9)
    speed = sample.Speed(SimpleNamespace(routers=[1]), sample.SampleConfig(device="cpu", num_samples=2), 10)
    speed.times, speed.kept = [0.0, 3.0, 8.0, 8.5, 9.0], [2, 2, 2, 1]
    assert speed.report() == (
        "10 prompt tokens, the first new one after 3000 ms; 7 new ones at 3.0 tokens/s, 2 GB/s read, 50% of the 4 GB/s "
        "to be had (if all experts are equally busy), 1.5 tokens a joule; cpu, float32"
    )
    speed.times, speed.kept = speed.times[:3], [2, 2]
    assert "4 new ones at 0.5 tokens/s, 0.25 tokens a joule; cpu" in speed.report()


def test_bandwidth_is_all_that_was_read_over_its_time(monkeypatch):
    read = []
    vector = SimpleNamespace(numel=lambda: 100, element_size=lambda: 4, sum=lambda: read.append(400) or torch.tensor(0))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: vector)
    monkeypatch.setattr(sample.timeit, "repeat", lambda statement, **_: [9.0, statement() + 2.0])
    assert sample.read_bandwidth("cpu") == sum(read) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Which expert each token went to


def test_experts_are_those_that_wrote_the_text(finished):
    """The choices shown are the ones that a forward over the text makes, layer by layer."""
    model = Zaya.from_pretrained(finished.out)
    ids = [1, 2, 3, 4, 5]
    chosen, probability = sample.choices(model, ids)
    assert chosen.shape == probability.shape == (2, 5)
    x = []
    handle = model.layers[1].mlp.gate.register_forward_pre_hook(lambda module, args: x.append(args))
    model(torch.tensor([ids]))
    handle.remove()
    p, choice, _ = model.layers[1].mlp.gate(*x[0])
    assert choice.equal(chosen[1]) and torch.allclose(p, probability[1])
    long = list(range(20))  # the context is 16 tokens
    pieces = [sample.choices(model, piece)[0] for piece in (long[:16], long[16:])]
    assert sample.choices(model, long)[0].equal(torch.cat(pieces, dim=1))
    assert not any(router._forward_hooks for router in model.routers)


def test_each_of_zaya1s_experts_has_a_colour_of_its_own(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert len({sample.in_color("", expert) for expert in range(17)}) == 17  # with skip


@pytest.mark.parametrize("plain", [False, True], ids=["colours", "NO_COLOR"])
def test_show_experts_prints_the_text_a_legend_and_draws(write, tmp_path, monkeypatch, plain):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    done = write("--prompt", "3 times", "--show_experts", 1, "--temperature", 0)
    text = write("--prompt", "3 times", "--temperature", 0).stdout
    assert done.status == 0 and (tmp_path / "experts.png").stat().st_size > 5000
    shown, legend = done.stdout.split("\nlayer 1: tokens of the text by expert\n")
    assert re.sub(r"\[\d\]" if plain else r"\x1b\[[\d;]*m", "", shown).strip() == text.strip()
    counts = [int(n) for n in re.findall(r"(?:expert +\d+|skipped) +(\d+)", legend)]
    assert sum(counts) == 20


def test_experts_are_shown_of_the_new_tokens_in_the_layer_asked_for(finished, monkeypatch, capsys):
    writer, drawn = sample.Writer(finished.out, sample.SampleConfig(device="cpu")), []
    chosen = torch.tensor([[0, 1, 2, 3, 0], [1, 1, 0, 2, 4]])
    monkeypatch.setattr(sample, "choices", lambda model, ids: (chosen, chosen / 10))
    monkeypatch.setattr(
        sample, "draw_experts", lambda pieces, chosen, probability, *_: drawn.extend([chosen, probability])
    )
    monkeypatch.setenv("NO_COLOR", "1")
    sample.show_experts(writer, [256, 97], [98, 98, 100], 1)
    first, _, _, *legend = capsys.readouterr().out.splitlines()
    assert first == "b[0]b[2]d[4]" and [line.split()[-1] for line in legend[:3]] == ["'b'", "'b'", "'d'"]
    assert drawn[0].equal(chosen[:, 2:]) and drawn[1].equal(chosen[:, 2:] / 10)


def test_the_picture_has_the_layer_asked_for(tmp_path, monkeypatch):
    """Of forty layers it shows nine at most."""
    names, name = [], Axes.set_ylabel
    monkeypatch.setattr(Axes, "set_ylabel", lambda axis, text, **how: names.append(text) or name(axis, text, **how))
    chosen = torch.zeros(40, 3, dtype=torch.long)
    sample.draw_experts(list("abc"), chosen, chosen + 0.5, 4, 21, tmp_path / "experts.png")
    layers = [int(text.split()[1]) for text in names if text.startswith("layer")]
    assert layers == sorted(layers) and {0, 21, 39} < set(layers) and len(layers) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Two checkpoints side by side


def test_compare_shows_both_their_costs_and_texts(finished, tiny, call, tmp_path, monkeypatch):
    text, dense = tmp_path / "text.txt", tmp_path / "dense"
    assert call(train, *flags(**tiny, mlp="dense", out=dense)).status == 0
    text.write_text("3 times 3 is 9 – and so on;\n" * 20, encoding="utf-8")
    args = ("--device", "cpu", "--prompt", "3 times", "--max_new_tokens", 20, "--temperature", 0)
    costs = zaya.token_costs
    monkeypatch.setattr(sample, "token_costs", lambda c, length: (*costs(c, 1)[:2], 1e6 * length, costs(c, 1)[3]))
    done = call(sample, "--compare", finished.out, dense, "--text", text, "--gpu_hour", 3600, *args)
    assert done.status == 0, done.stderr
    table = {line.split("  ")[0].strip(): line.split()[-2:] for line in done.stdout.splitlines() if "  " in line}
    for i, out in enumerate((finished.out, dense)):
        model = Zaya.from_pretrained(out)
        total, active = model.parameter_counts()
        assert table["parameters"][i] == f"{total:,}" and table["active a token"][i] == f"{active:,}"
        assert table["MFLOP a token"][i] == "16.0"  # at the end of the text, which is longer than the context
        assert table["KV-cache bytes a token, bf16"][i] == f"{costs(model.config, 1)[3]:,}"
        rate, dollars = (table[name][i].replace(",", "") for name in ("tokens/s", "$ a million tokens, $3600/hour"))
        assert float(dollars) == pytest.approx(1e6 / float(rate), rel=0.01)
        alone = call(sample, "--checkpoint", out, *args).stdout
        column = "".join(re.split(r" \| ", line)[i] if " | " in line else "" for line in done.stdout.splitlines()[12:])
        assert re.sub(r"\s", "", alone) in re.sub(r"\s", "", column)
    assert all(2 < float(bits) < 12 for bits in table["bits a byte of --text"])


def test_folded_lines():
    assert sample.folded("a\n\n\tbcd efg\n", 8) == ["a", "", "    bcd ", "efg", ""]
    assert sample.folded("\x1b[1m\u3000漢字\x08", 8) == ["\ufffd[1m\u3000\0漢\0", "字\0\ufffd"]


@pytest.mark.parametrize("other, decoders", [("sparse", 2), ("dense", 0)])
def test_compare_lets_both_decode_the_same_way(finished, tiny, call, monkeypatch, tmp_path, other, decoders):
    """By Decoder, which takes ZAYA1s alone, or by the general step."""
    made = []
    monkeypatch.setattr(zaya, "Decoder", lambda model, cache, make=zaya.Decoder: made.append(1) or make(model, cache))
    out = finished.out
    if other == "dense":
        out = tmp_path / "dense"
        assert call(train, *flags(**tiny | {"steps": 1}, mlp="dense", out=out)).status == 0
        made.clear()
    done = call(sample, "--compare", finished.out, out, "--device", "cpu", "--max_new_tokens", 3, "--prompt", "3")
    assert done.status == 0 and len(made) == decoders
    assert ("short cuts" in done.stdout) == (other == "dense")
    table = done.stdout.split("\n(" if other == "dense" else "\n\n")[0].splitlines()
    assert len({len(row) for row in table}) == 1  # though a path is longer than any number


@pytest.mark.parametrize("text", ["3 times 3 is 9", "3 times 3 is 9 – and so on;\n" * 2], ids=["a block", "several"])
@torch.no_grad()
def test_bits_a_byte_are_those_of_the_loss(finished, text):
    """Token by token after the bos, each with what stands before it in its block of 16."""
    writer = sample.Writer(finished.out, sample.SampleConfig(device="cpu"))
    ids, bits = writer.ids(text), 0.0
    assert ids[0] == writer.tokenizer.eot
    for i, token in enumerate(ids[1:]):
        logits = writer.model(torch.tensor([ids[i - i % 16 : i + 1]]))[0]
        bits -= logits[0, -1].log_softmax(dim=-1)[token].item() / math.log(2)
    assert sample.bits_a_byte(writer, text) == pytest.approx(bits / len(text.encode()), rel=1e-5)


def test_bits_a_byte_count_the_bytes_of_the_text(finished, monkeypatch):
    """Whatever the tokenizer makes of them: one that ignores case and spaces, say."""
    writer = sample.Writer(finished.out, sample.SampleConfig(device="cpu"))
    text, encode = "3 TIMES  3 is 9", writer.tokenizer.encode
    bits = sample.bits_a_byte(writer, "3times3is9") * len("3times3is9")
    monkeypatch.setattr(writer.tokenizer, "encode", lambda text: encode(text.lower().replace(" ", "")))
    assert sample.bits_a_byte(writer, text) == pytest.approx(bits / len(text))


def test_a_text_of_ids_that_the_model_does_not_have_is_refused(finished, monkeypatch):
    writer = sample.Writer(finished.out, sample.SampleConfig(device="cpu"))
    monkeypatch.setattr(writer.tokenizer, "encode", lambda text: [3, 257])
    with pytest.raises(ValueError, match="--text has the token id 257, the model knows 257"):
        sample.bits_a_byte(writer, "ab")


def test_a_chat_stops_at_either_end(finished, monkeypatch, capsys):
    """The model's own end of text, and the end of its turn; nothing is shown after the first of them."""
    writer = sample.Writer(finished.out, sample.SampleConfig(device="cpu", num_samples=2))
    eos, end = 256, 7
    writer.ends = [eos, end]
    columns = [[5, 6], [eos, 6], [5, 6], [5, end], [5, 5]]
    monkeypatch.setattr(Zaya, "next_tokens", lambda self, *rest: (torch.tensor(column) for column in columns))
    shown = []
    rows, speed = writer.write([1, 2], shown.append)
    assert rows == [[5], [6, 6, 6]] and shown == [5] and speed.kept == [2, 2, 1, 1]


def test_a_text_begins_with_one_bos(finished):
    """The template of a chat writes it by itself, or has none."""
    writer = sample.Writer(finished.out, sample.SampleConfig(device="cpu"))
    writer.model.config = replace(writer.model.config, bos_token_id=9)
    writer.tokenizer = SimpleNamespace(encode=list, beginning=lambda: [4], turns=lambda question: ([8, 5, 6], 7))
    assert writer.ids((5, 6)) == [9, 5, 6] and writer.ids(()) == [9] and 7 not in writer.ends
    writer.model.config = replace(writer.model.config, bos_token_id=None)
    assert writer.ids(()) == [4]
    writer.config.chat = True
    assert writer.ids("") == [8, 5, 6] and 7 in writer.ends  # the end of a turn
    writer.tokenizer.turns = lambda question: ([5, 257], None)
    with pytest.raises(ValueError, match="the token id 257, the model knows 257"):
        writer.ids("")


def test_a_character_belongs_to_the_token_that_completes_it():
    tokenizer = load_tokenizer("bytes")
    assert sample.pieces_of(tokenizer, tokenizer.encode("é–x")) == ["", "é", "", "", "–", "x"]
    assert sample.pieces_of(tokenizer, list(b"a\xe2")) == ["a", "\ufffd"]
