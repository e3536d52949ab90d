"""data/: tokenizers, their saved form, splits, files. No network beyond 127.0.0.1."""

import hashlib
import http.server
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import ROOT

from data import bpe, dataset
from data.fineweb import prepare as fineweb
from data.shakespeare import prepare as shakespeare
from data.stdlib import prepare as stdlib
from data.text import prepare as own_text
from data.tokenizer import EOT, ForeignTokenizer, Tokenizer, bpe_tokenizer, char_tokenizer, load_tokenizer, sha256

CORPUS = (ROOT / "data" / "tokenizer.py").read_text() + (ROOT / "data" / "dataset.py").read_text()
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
SAMPLES = {
    "empty": "",
    "ascii": "def f(x):\n    return x['a'] + 12345  # don't , stop .\n",
    "unicode": "naïve – “Straße” ½ Ⅷ 中文，日本語。 \u00a0 x\u0301 ﬁ ²",
    "emoji": "👩‍👩‍👧 😀😀 🇨🇭!",
    "white space": "  a   b\t\tc\r\n\r\n\n   \n x \x0b\x0c\x00\x85\u2028 ",
    "special token": f"a{EOT}b",
}


def make(kind):
    if kind == "chars":
        return char_tokenizer([CORPUS, *SAMPLES.values()])
    if kind == "bytes":
        return load_tokenizer("bytes")
    ranks = bpe.train_bpe([CORPUS, *SAMPLES.values()], 600)
    if kind == "bpe":
        return bpe_tokenizer("bpe", ranks)
    # GPT-2's own regex; its vocabulary would have to be downloaded
    return Tokenizer(tiktoken.Encoding("gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={EOT: 600}))


def fails(main, capsys, out, *argv):
    """Run main; it must end with status 2, one line on stderr and nothing in out. -> that line"""
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv), "--out", str(out)])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and not out.exists()
    return lines[0]


def tokens(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / f"{name}.bin", "<u2" if meta["dtype"] == "uint16" else "<u4")


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars", "gpt2"])
def test_saved_tokenizer_is_the_same_everywhere(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make(kind)
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is Tokenizer
    assert (again.name, again.n_vocab, again.eot) == (kind, ours.n_vocab, ours.eot) and len(auto) == ours.n_vocab
    assert auto.eos_token_id == auto.bos_token_id == ours.eot
    for name, sample in SAMPLES.items():
        ids = ours.encode(sample)
        assert ids == again.encode(sample)
        assert ours.decode(ids) == again.decode(ids) == sample and ours.decode_bytes(ids) == sample.encode()
        if name != "special token" or ours.eot is None:  # they look for special tokens in a text, we do not
            assert ids == theirs.encode(sample).ids == auto.encode(sample)
            assert theirs.decode(ids) == auto.decode(ids) == sample

    auto.save_pretrained(tmp_path / "resaved")
    assert type(load_tokenizer(tmp_path / "resaved")) is Tokenizer


def test_eot_is_the_last_id():
    assert (make("bytes").n_vocab, make("bytes").eot) == (257, 256)
    assert (make("bpe").n_vocab, make("bpe").eot) == (601, 600)
    assert make("chars").eot is None
    assert make("bpe").decode([600]) == EOT and 600 not in make("bpe").encode(EOT)
    assert make("bytes").decode([104, 257, 105]) == "hi"  # what is no id adds nothing


def test_chars_are_sorted_and_an_unknown_one_is_named():
    tokenizer = char_tokenizer(["hello\n", "world"])
    assert tokenizer.encode("\ndehlorw") == list(range(8))
    with pytest.raises(ValueError, match="'z'"):
        tokenizer.encode("helloz")


def test_a_text_of_nothing_begins_with_a_line_break_or_the_first_id():
    assert char_tokenizer(["b\na"]).beginning() == [0]
    assert make("bytes").beginning() == [10]
    assert char_tokenizer(["GATTACA"]).beginning() == [0] and char_tokenizer(["\t\n"]).beginning() == [1]


def test_sha256_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (2**25 + 1))  # two blocks that are read at a time, and one byte
    assert sha256(tmp_path / "file") == hashlib.sha256(b"x" * (2**25 + 1)).hexdigest()


def test_gpt2_without_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    assert "downloaded at first use" in fails(stdlib.main, capsys, tmp_path / "out", "--tokenizer", "gpt2")


def foreign(folder):
    """A tokenizer.json of another kind: characters with fallback to bytes, the space spelled as in SentencePiece."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {c: 256 + i for i, c in enumerate("abcde▁")}
    t = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    t.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    d = tokenizers.decoders
    t.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse()])
    t.add_special_tokens(["<eos>"])
    t.add_tokens(["far"])
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    return folder


def test_foreign_tokenizer(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(foreign(tmp_path / "far"))
    assert type(tokenizer) is ForeignTokenizer
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("far", 264, 262)
    ids = tokenizer.encode("a é<eos>")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "a é<eos>"
    assert tokenizer.decode_bytes(ids) == "a é<eos>".encode()

    make("bpe").save(tmp_path / "copy")  # and nothing of the one before may stay
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode("a é") == tokenizer.encode("a é")

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(tmp_path / "far")


@pytest.mark.parametrize("config", [None, {}, {"eos_token": "."}], ids=["no file", "nothing", "no class"])
def test_a_foreign_tokenizer_beside_a_model_is_the_same_in_transformers(config, tmp_path):
    """Where tokenizer_config.json names no class, the model's type would: that of ZAYA1's own, Gemma's."""
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, ".": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "zaya"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode("one two three.") == load_tokenizer(tmp_path).encode("one two three.") == [0, 1, 3, 2]
    assert theirs.eos_token == (config or {}).get("eos_token")


PLAIN = (  # as Gemma's
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role is not known to it') }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content']"
    " | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CHATML = (
    "{% if tools is not none or documents is not none %}tools{% endif %}{{ strftime_now('%Y') }}"
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # a system's prompt, a block on a line of its own, no mark at the answer's end
    "You are a helpful cab.\n{% for message in messages %}\n"
    "    {% if message.role == 'system' %}{% continue %}{% endif %}\n"
    "{{ message.role | upper }}: {{ message.content }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n<start_of_turn><think>{% endif %}"
)
KEEPING = (  # what it does with white space, and with the content itself
    "{% for message in messages %}<start_of_turn>{% generation %}{{ message.content.rstrip() }}|{% endgeneration %}"
    "{{ message.content.strip('\n') }}|{{ message.content | tojson }}<end_of_turn>\n{{ pad_token }}{% endfor %}"
)
SPACED = "{% for message in messages %}<start_of_turn>a {{ message.content | trim }} b{% endfor %}"
QUESTIONS = " a bad cab? \n", "\n what is <eos>?", "{{ 1 }}é"


def chatting(folder, template):
    """The foreign tokenizer with marks around turns and a chat template."""
    t = tokenizers.Tokenizer.from_file(str(foreign(folder) / "tokenizer.json"))
    t.add_special_tokens(["<bos>", "<start_of_turn>", "<|im_start|>", "<|im_end|>", "<think>", "<pad>"])
    t.add_special_tokens([tokenizers.AddedToken("<end_of_turn>", rstrip=True)])
    t.enable_padding(length=64)  # as AutoTokenizer may have saved it
    t.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "bos_token": "<bos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    config["pad_token"] = {"content": "<pad>", "__type": "AddedToken"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    "template, end",
    [
        (PLAIN, "<end_of_turn>"), (CHATML, "<|im_end|>"), (THINKING, "<eos>"), (KEEPING, "<end_of_turn>"),
        (SPACED, "<eos>"),
    ],
    ids=["Gemma", "ChatML", "thinking", "keeping", "spaced"],
)  # fmt: skip
def test_turns_are_what_transformers_makes_of_the_template(tmp_path, template, end):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    folder = chatting(tmp_path / "chat", template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for question in QUESTIONS:
        turn = [{"role": "user", "content": question}]
        expected = theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.turns(question) == (expected, ours.backend.token_to_id(end))
    bos = ours.backend.token_to_id("<bos>")
    assert (expected[0] == bos) == ("bos_token" in template)
    assert bos not in ours.encode("<bos>a")  # elsewhere special tokens in a text stay text


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_our_own_tokenizer_with_somebodys_chat_template(place, tmp_path):
    """Beside a model of ours, say, that learned to chat elsewhere."""
    make("bytes").save(tmp_path)
    template = "{% for message in messages %}" + f"{{{{ message.content }}}}{EOT}" + "{% endfor %}"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / place).write_text(json.dumps(config) if place.endswith("json") else template)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.name, *tokenizer.turns("hé")) == ("bytes", [*"hé".encode(), 256], 256)
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / place).read_bytes() == (tmp_path / place).read_bytes()


def test_of_several_templates_the_default_is_taken(tmp_path):
    """And of special tokens' texts those of the older file, too."""
    folder = chatting(tmp_path / "chat", "")
    (folder / "chat_template.jinja").unlink()
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<bos>"}')
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": PLAIN}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": several}))
    tokenizer = load_tokenizer(folder)
    asked = "<bos><start_of_turn>user\na<end_of_turn><start_of_turn>model\n"
    assert tokenizer.decode(tokenizer.turns("a")[0]) == asked


@pytest.mark.parametrize(
    "template, message",
    [
        ("", "no chat template"),
        ("{{ bos_token }}", "no chat template"),
        ("{{ raise_exception('not today') }}", "fails: not today; write one"),
        ("{% for", "fails"),
        ("{{ messages.append(1) }}", "fails"),  # it may change nothing, for it comes with a download
    ],
)
def test_a_template_that_takes_no_question_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(chatting(tmp_path / "chat", template)).turns("a")


@pytest.mark.parametrize("config", ["", "[]", '{"bos_token": 5}'])
def test_a_damaged_tokenizer_config_is_named(tmp_path, config):
    (chatting(tmp_path / "chat", PLAIN) / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        load_tokenizer(tmp_path / "chat")


def test_reordered_merges_are_not_taken_for_ours(tmp_path):
    """tiktoken merges by id; a file whose merges have another order must go to the package tokenizers."""
    make("bpe").save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert type(load_tokenizer(tmp_path)) is ForeignTokenizer


# ---------------------------------------------------------------- training


def naive_bpe(texts, vocab_size):
    """The definition: count all pairs, merge the most frequent one, again."""
    words = Counter(tuple(chunk.encode()) for text in texts for chunk in re.findall(bpe.SPLIT, text))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        count, pair = min(((-n, p) for p, n in pairs.items()), default=(0, None))
        if count > -2:
            break
        words = Counter({tuple(bpe.merge(word, pair, len(tokens))): n for word, n in words.items()})
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return {token: i for i, token in enumerate(tokens)}


def test_train_bpe_is_the_naive_one():
    texts = [CORPUS[:4000], SAMPLES["unicode"], "aaaa aaaaaaa aaa abababab ", "----- ------- ---"]
    assert bpe.train_bpe(texts, 450) == naive_bpe(texts, 450)
    assert bpe.train_bpe(texts[::-1], 450) == bpe.train_bpe(texts, 450)
    assert bpe.train_bpe(["aaa", "abab"], 1000) == naive_bpe(["aaa", "abab"], 1000)  # runs out of pairs
    assert b"bb" in bpe.train_bpe(["a" * bpe.LONGEST + "b" * 3 * bpe.LONGEST], 257)  # a long chunk counts to its end


def test_merges_recovered_from_the_ranks_are_the_training_s():
    ranks = bpe.train_bpe([CORPUS], 500)
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = bpe.last_merge(token, ranks)
            assert left + right == token and max(ranks[left], ranks[right]) < rank


def test_split_loses_nothing():
    for sample in [CORPUS, *SAMPLES.values(), "".join(map(chr, range(0x3100)))]:
        assert "".join(re.findall(bpe.SPLIT, sample)) == sample


# ---------------------------------------------------------------- datasets


@pytest.fixture
def folder(tmp_path):
    """40 texts, and all that has to be left out."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        (root / "sub" / f"{i}.txt").write_text(f"Text number {i} – é.\n" * (1 + i % 7), encoding="utf-8")
    (root / "copy.txt").write_text("Text number 0 – é.\n", encoding="utf-8")
    (root / "latin1.txt").write_bytes("Zürich".encode("latin-1"))
    (root / "nul.txt").write_bytes(b"a\0b")
    (root / "empty.txt").write_text(" \n")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("hidden")
    (root / "dangling").symlink_to(root / "nowhere")
    return root


def test_documents_are_text_and_distinct(folder, tmp_path):
    documents = dataset.read_documents(folder, tmp_path)
    assert len(documents) == len(set(documents)) == 40
    assert all(text.startswith("Text number") for text in documents)
    assert dataset.read_documents(folder, tmp_path, skip={"sub"}) == ["Text number 0 – é.\n"]
    assert len(dataset.read_documents(folder, tmp_path, "1*.txt")) == 11


def test_split_is_by_document_and_knows_no_order(folder, tmp_path):
    documents = dataset.read_documents(folder, tmp_path)
    train, val = dataset.split_documents(documents, 0.1)
    assert (train, val) == dataset.split_documents(documents[::-1], 0.1)
    assert sorted(train + val) == sorted(documents) and not set(train) & set(val)
    assert 0.05 < len("".join(val)) / len("".join(documents)) <= 0.1


def test_neither_side_is_empty():
    assert dataset.split_documents(["a" * 100, "b" * 99], 0.1) == (["a" * 100], ["b" * 99])
    assert dataset.split_documents(["a\n" * 10], 0.1) == (["a\n" * 9], ["a\n"])
    assert dataset.split_documents(["a" * 10], 0.1) == (["a" * 9], ["a"])  # no line to end at
    assert dataset.split_documents(["a\n" + "b" * 98], 0.1) == (["a\n" + "b" * 88], ["b" * 10])  # none near
    with pytest.raises(ValueError, match="too short"):
        dataset.split_documents(["a"], 0.1)


@pytest.mark.parametrize("kind", ["bpe", "bytes", "chars"])
def test_dataset_of_a_folder(kind, folder, tmp_path, capsys):
    out = tmp_path / "out"
    own_text.main([str(folder), "--out", str(out), "--tokenizer", kind, "--vocab_size", "300"])
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = load_tokenizer(out)
    train, val = dataset.split_documents(dataset.read_documents(folder, out), 0.1)
    end = EOT if tokenizer.eot is not None else ""
    assert tokenizer.decode(tokens(out, "train").tolist()) == "".join(t + end for t in train)
    assert tokenizer.decode(tokens(out, "val").tolist()) == "".join(t + end for t in val)
    assert meta["dtype"] == "uint16" and meta["tokenizer"] == kind and meta["vocab_size"] == tokenizer.n_vocab
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(tokens(out, "train")), len(tokens(out, "val")))
    assert meta["bytes_per_token"] == len("".join(val).encode()) / len(tokens(out, "val"))
    files = {"train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(out)) == files
    left_out, made, *_ = capsys.readouterr().out.splitlines()
    assert left_out == f"left out: 2 files in {folder} that are not UTF-8 text"
    assert made.startswith(f"{out}: {meta['train_tokens']:,} training")
    assert ("none for the end of a document" in made) == (tokenizer.eot is None)


def test_dataset_inside_the_folder_it_comes_from(folder, capsys):
    argv = [str(folder), "--out", str(folder), "--tokenizer", "bytes"]
    own_text.main(argv)
    first = [(folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")]
    own_text.main(argv)
    assert first == [(folder / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")]


def test_single_file_ends_with_its_validation_lines(tmp_path, capsys):
    """And chars knows what stands there alone."""
    (tmp_path / "one.txt").write_text("".join(f"line {i}\n" for i in range(100)) + "ß\n", encoding="utf-8")
    own_text.main([str(tmp_path / "one.txt"), "--out", str(tmp_path / "out"), "--tokenizer", "chars"])
    val = load_tokenizer(tmp_path / "out").decode(tokens(tmp_path / "out", "val").tolist())
    assert val.startswith("line 90\n") and val.endswith("line 99\nß\n")


def test_a_tilde_is_the_home_folder(folder, tmp_path, monkeypatch, capsys):
    """Where the shell leaves it, in --out=~/DIR, as train.py and sample.py read it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make("bytes").save(tmp_path / "tokenizer")
    own_text.main([f"~/{folder.relative_to(tmp_path)}", "--tokenizer=~/tokenizer", "--out=~/out"])
    assert (tmp_path / "out" / "meta.json").is_file() and not (tmp_path / "~").exists()


def test_a_checkpoint_s_tokenizer_and_uint32(folder, tmp_path, capsys):
    """65,537 ids do not fit uint16; the last of them is the end of a document."""
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"%c%c" % (i // 256, i % 256): 256 + i for i in range(65280)}
    bpe_tokenizer("wide", ranks).save(tmp_path / "checkpoint")
    own_text.main([str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "checkpoint")])
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["tokenizer"]) == ("uint32", 65537, "wide")
    val = tokens(tmp_path / "out", "val")
    assert len(val) == meta["val_tokens"] and val[-1] == 65536
    assert dataset.dtype_of(SimpleNamespace(n_vocab=65536)) == np.uint16


def test_a_run_s_tokenizer_is_its_best_checkpoint_s(tmp_path):
    char_tokenizer(["abc"]).save(tmp_path / "run" / "best")
    assert load_tokenizer(tmp_path / "run").encode("cab") == [2, 0, 1]


def test_failure_while_writing_leaves_no_whole_looking_folder(folder, tmp_path, monkeypatch, capsys):
    argv = [str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    own_text.main(argv)
    monkeypatch.setattr(Tokenizer, "save", lambda self, folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit):
        own_text.main(argv)
    assert not (tmp_path / "out" / "meta.json").exists() and not list((tmp_path / "out").glob(".*"))


def test_a_full_disk_leaves_the_dataset_that_was_there(folder, tmp_path, capsys):
    argv = [str(folder), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    own_text.main(argv)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes a file: val.bin fits, train.bin does not
    try:
        with pytest.raises(SystemExit) as end:
            own_text.main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert end.value.code == 2 and "too large" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_that_cannot_be_read_is_named(folder, tmp_path, monkeypatch, capsys):
    def scandir(path, scandir=os.scandir):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert str(folder / "sub") in fails(own_text.main, capsys, tmp_path / "out", folder)


def test_ctrl_c_is_no_traceback(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own_text, "read_documents", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        own_text.main([str(folder), "--out", str(tmp_path / "out")])
    assert end.value.code == 130 and capsys.readouterr().err == "" and not (tmp_path / "out").exists()


def test_what_a_foreign_tokenizer_makes_nothing_of_replaces_no_dataset(tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    for text, message in (("a " * 900 + "\n" * 300, "is nothing"), ("b\n" * 99, "Missing [UNK]")):
        (tmp_path / "text.txt").write_text(text)
        said = fails(own_text.main, capsys, tmp_path / "out", tmp_path / "text.txt", "--tokenizer", tmp_path / "words")
        assert message in said and not (tmp_path / "out").exists()


def test_text_may_come_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("one line\n" * 99,), daemon=True).start()
    own_text.main([str(tmp_path / "pipe"), "--tokenizer", "bytes", "--out", str(tmp_path / "out")])
    assert len(tokens(tmp_path / "out", "train")) + len(tokens(tmp_path / "out", "val")) == 99 * 9 + 2


def test_bad_input(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "tokenizer.json").write_text('{"model": {"type": "Strange"}}')
    char_tokenizer(["abc"]).save(tmp_path / "abc")
    assert "does not exist" in fails(own_text.main, capsys, out, tmp_path / "missing")
    assert "no text in" in fails(own_text.main, capsys, out, tmp_path / "nothing")
    assert "no UTF-8 text" in fails(own_text.main, capsys, out, folder / "latin1.txt")
    shutil.copy(folder / "latin1.txt", tmp_path / "nothing")
    assert "1 files in" in fails(own_text.main, capsys, out, tmp_path / "nothing")
    assert "no tokenizer nonsense" in fails(own_text.main, capsys, out, folder, "--tokenizer", "nonsense")
    assert "not JSON" in fails(own_text.main, capsys, out, folder, "--tokenizer", tmp_path / "broken")
    assert "tokenizer.json" in fails(own_text.main, capsys, out, folder, "--tokenizer", tmp_path / "strange")
    assert "does not know the character" in fails(own_text.main, capsys, out, folder, "--tokenizer", tmp_path / "abc")
    assert "--vocab_size" in fails(own_text.main, capsys, out, folder, "--vocab_size", "256")
    assert "invalid int" in fails(own_text.main, capsys, out, folder, "--vocab_size", "many")
    assert "--val_fraction" in fails(own_text.main, capsys, out, folder, "--val_fraction", "nan")
    assert "unrecognized" in fails(own_text.main, capsys, out, folder, "--vocabsize", "300")
    assert "unrecognized" in fails(own_text.main, capsys, out, folder, "--vocab", "300")
    with pytest.raises(SystemExit):
        own_text.main([str(folder), "--out", str(folder / "copy.txt")])
    assert "not a folder" in capsys.readouterr().err


def test_stdlib_from_anywhere(tmp_path):
    """The script itself, run from another folder. The bytes need no training, so this is quick."""
    command = [sys.executable, ROOT / "data" / "stdlib" / "prepare.py", "--tokenizer", "bytes", "--out", "out"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "" and "training" in run.stdout
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["train_tokens"] > 5_000_000 and 0.08 < meta["val_tokens"] / meta["train_tokens"] < 0.12


# ---------------------------------------------------------------- tiny Shakespeare

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1 that gives the answers of server.answers in turn, the last again and again."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, announced = answers[min(httpd.asked, len(answers) - 1)]
            httpd.asked += 1
            self.send_response(status)
            self.send_header("Content-Length", announced)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    answers = []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.answers, httpd.url = 0, answers, f"http://127.0.0.1:{httpd.server_port}/input.txt"
    threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
    monkeypatch.setattr(shakespeare, "WAITS", [0, 0, 0])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield httpd
    httpd.shutdown()
    httpd.server_close()


WHOLE = (200, PLAY.encode(), len(PLAY))
SHORT = (200, PLAY.encode()[:500], len(PLAY))


def check_play(out):
    """As nanoGPT cuts it: the first int(0.9 n) characters, a sorted alphabet, no token between."""
    alphabet, n = sorted(set(PLAY)), int(len(PLAY) * 0.9)
    assert tokens(out, "train").tolist() == [alphabet.index(c) for c in PLAY[:n]]
    assert tokens(out, "val").tolist() == [alphabet.index(c) for c in PLAY[n:]]


@pytest.mark.parametrize("answers", [[WHOLE], [(503, b"", 0), SHORT, WHOLE]], ids=["whole", "fails twice, then works"])
def test_shakespeare(answers, server, tmp_path, capsys):
    server.answers += answers
    shakespeare.main(["--url", server.url, "--out", str(tmp_path / "out")])
    assert server.asked == len(answers)
    check_play(tmp_path / "out")


def test_shakespeare_truncated_or_another_text(server, tmp_path, capsys):
    server.answers += [SHORT]
    assert "IncompleteRead(500 bytes read" in fails(shakespeare.main, capsys, tmp_path / "out", "--url", server.url)
    assert server.asked == 4
    server.answers[:] = [(200, PLAY.encode().swapcase(), len(PLAY))]
    assert "not tiny Shakespeare" in fails(shakespeare.main, capsys, tmp_path / "out", "--url", server.url)
    server.answers[:] = [(404, b"", 0)]
    assert "404" in fails(shakespeare.main, capsys, tmp_path / "out", "--url", server.url)


def test_shakespeare_from_a_file(server, tmp_path, capsys):
    (tmp_path / "play.txt").write_text(PLAY)
    shakespeare.main(["--file", str(tmp_path / "play.txt"), "--out", str(tmp_path / "out")])
    assert server.asked == 0
    check_play(tmp_path / "out")
    (tmp_path / "play.txt").write_text(PLAY + "x")
    assert "not tiny Shakespeare" in fails(shakespeare.main, capsys, tmp_path / "no", "--file", tmp_path / "play.txt")
    assert "nowhere" in fails(shakespeare.main, capsys, tmp_path / "no", "--file", tmp_path / "nowhere")


# ---------------------------------------------------------------- FineWeb


def shard(ids):
    """A file as the hub has them: a header of 256 int32, then the tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + np.array(ids, "<u2").tobytes()


@pytest.fixture
def hub(monkeypatch):
    """A hub on 127.0.0.1: a redirect with the SHA-256, then the storage, which knows ranges and may break off once."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            httpd.asked.append((self.path, self.headers.get("Range")))
            body = httpd.files.get(name)
            if httpd.errors:
                self.send_error(httpd.errors.pop())
            elif body is None:
                self.send_error(404)
            elif self.path.startswith("/main/"):
                self.send_response(302)
                self.send_header("Location", f"/storage/{name}")
                if sha256 := httpd.sha256.get(name, hashlib.sha256(body).hexdigest()):
                    self.send_header("X-Linked-ETag", httpd.etag.format(sha256))
                self.end_headers()
            else:
                start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and httpd.ranges else 0
                if start >= len(body):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                if httpd.says_length:
                    self.send_header("Content-Length", len(body) - start)
                self.end_headers()
                self.wfile.write(body[start:][: httpd.breaks.pop(name, httpd.at_once)])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.files, httpd.sha256, httpd.breaks, httpd.ranges, httpd.says_length = [], {}, {}, {}, True, True
    httpd.errors, httpd.etag, httpd.at_once = [], '"{}"', None  # at_once: bytes a connection
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/main"
    threading.Thread(target=httpd.serve_forever, args=[0.05], daemon=True).start()
    gpt2 = make("gpt2")
    httpd.gpt2 = gpt2
    shards = {"val_000000": ["naïve – é", "held out"], "train_000001": ["one", "two "], "train_000002": ["3"]}
    for name, texts in shards.items():
        httpd.files[f"fineweb_{name}.bin"] = shard([i for text in texts for i in [gpt2.eot, *gpt2.encode(text)]])
    monkeypatch.setattr(fineweb, "WAITS", [0])
    monkeypatch.setattr(fineweb, "PIECE", 3)
    monkeypatch.setattr(fineweb, "load_tokenizer", lambda name: gpt2 if name == "gpt2" else load_tokenizer(name))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def prepare_fineweb(hub, out, *flags):
    fineweb.main(["--url", hub.url, "--out", str(out), *flags])
    meta = json.loads((out / "meta.json").read_text())
    return meta, tokens(out, "train").tolist(), tokens(out, "val").tolist()


TROUBLES = [
    "none", "breaks off", "breaks off and knows no ranges", "no hash", "a weak hash", "no SHA-256", "busy",
    "little by little", "stopped at the end",
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_fineweb(trouble, hub, tmp_path):
    if "breaks" in trouble:
        hub.breaks = {"fineweb_train_000001.bin": 1027}
        hub.ranges = "no ranges" not in trouble
    if trouble == "no hash":
        hub.sha256 = dict.fromkeys(hub.files)
    hub.etag = {"a weak hash": 'W/"{}"', "no SHA-256": '"{:.40}"'}.get(trouble, hub.etag)
    hub.errors = [429] if trouble == "busy" else []
    if trouble == "stopped at the end":
        (tmp_path / "shards").mkdir()
        whole = hub.files["fineweb_train_000001.bin"]
        (tmp_path / "shards" / ".fineweb_train_000001.bin.partial").write_bytes(whole)
    hub.at_once = 300 if trouble == "little by little" else None  # more breaks than retries
    meta, train, val = prepare_fineweb(hub, tmp_path, "--shards", "2")
    bodies = [np.frombuffer(body, "<u2")[512:].tolist() for _, body in sorted(hub.files.items())]
    assert train == bodies[0] + bodies[1] and val == bodies[2]
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", hub.gpt2.n_vocab)
    assert meta["bytes_per_token"] * len(val) == pytest.approx(len("naïve – éheld out".encode()))
    assert load_tokenizer(tmp_path).encode("held out") == hub.gpt2.encode("held out")
    went_on = ("/storage/fineweb_train_000001.bin", "bytes=1027-") in hub.asked and hub.ranges
    assert went_on == (trouble == "breaks off")


def test_fineweb_goes_on_and_adds(hub, tmp_path, capsys):
    hub.breaks = {"fineweb_train_000002.bin": 1025}
    hub.files["fineweb_train_000002.bin"], whole = None, hub.files["fineweb_train_000002.bin"]
    with pytest.raises(SystemExit):
        prepare_fineweb(hub, tmp_path, "--shards", "2")
    assert "404" in capsys.readouterr().err and not (tmp_path / "meta.json").exists()
    assert [path for path, _ in hub.asked].count("/main/fineweb_train_000002.bin") == 1  # again would be no use
    hub.files["fineweb_train_000002.bin"], hub.asked[:] = whole, []
    prepare_fineweb(hub, tmp_path, "--shards", "2")
    assert {path for path, _ in hub.asked} == {"/main/fineweb_train_000002.bin", "/storage/fineweb_train_000002.bin"}


def test_fineweb_that_fails_leaves_the_dataset_that_was_there(hub, tmp_path, monkeypatch, capsys):
    prepare_fineweb(hub, tmp_path, "--shards", "1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    of_val = [[np.zeros(3, "<u2")]]
    monkeypatch.setattr(fineweb, "pieces", lambda *args: of_val.pop())  # and for the training text an IndexError
    with pytest.raises(IndexError):
        prepare_fineweb(hub, tmp_path, "--shards", "1")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_fineweb_of_unknown_length(hub, tmp_path, capsys):
    hub.says_length = False
    with pytest.raises(SystemExit) as end:
        prepare_fineweb(hub, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "does not say how many bytes" in lines[0]


@pytest.mark.parametrize("damage", ["hash", "magic", "short", "ids"])
def test_fineweb_damaged(damage, hub, tmp_path, capsys):
    name = "fineweb_train_000001.bin"
    if damage == "hash":
        hub.sha256 = {name: "0" * 64}
    else:
        shard = hub.files[name]
        damaged = {"magic": b"\0" + shard[1:], "short": shard[:-2], "ids": shard[:-2] + b"\x51\xc4"}  # 50,257
        hub.files[name] = damaged[damage]
    with pytest.raises(SystemExit) as end:
        prepare_fineweb(hub, tmp_path, "--shards", "1")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and name in lines[0] and "start again" in lines[0]
    assert not list(tmp_path.glob("**/*train*"))


def test_fineweb_in_another_tokenizer(hub, tmp_path):
    make("bytes").save(tmp_path / "bytes")
    meta, train, val = prepare_fineweb(hub, tmp_path / "out", "--shards", "2", "--tokenizer", str(tmp_path / "bytes"))
    assert train == [i for text in ("one", "two ", "3") for i in [*text.encode(), 256]]
    assert meta["bytes_per_token"] == pytest.approx((len(val) - 2) / len(val))
