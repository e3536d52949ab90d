"""Text to token ids and back. tiktoken runs every vocabulary of ours; on disk each is a Hugging Face tokenizer.json.

    gpt2    GPT-2's 50,257 tokens, downloaded at first use
    bytes   the 256 bytes and <|endoftext|>
    bpe     a small byte-pair encoding trained here: 256 bytes, merges, <|endoftext|>
    chars   one id per character of a text, as in nanoGPT; no <|endoftext|>

A folder with anybody else's tokenizer.json opens too, through the optional package tokenizers.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import tiktoken

from data.bpe import SPLIT, last_merge

EOT = "<|endoftext|>"
ONE_CHARACTER = r"[\s\S]"  # how chars splits a text; it also tells such a vocabulary from the others

# GPT-2's printable stand-in for each byte, in which tokenizer.json spells tokens: itself, or the next from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}

# What a tokenizer may consist of on disk; ours is the first two.
FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]

SPECIAL = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]  # what a chat template may ask for
OWN_TEMPLATE = "write one of your own as chat_template.jinja there"


class Tokenizer:
    """A tiktoken.Encoding. name; n_vocab; eot: the id between documents, or None. Special tokens in a text are text."""

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot = encoding._special_tokens.get(EOT)
        # Over the bytes tiktoken knows every text; over characters an unknown one would be a panic in Rust.
        self.known = {c.decode() for c in encoding._mergeable_ranks} if encoding._pat_str == ONE_CHARACTER else None

    def encode(self, text):
        """str -> list of ids. ValueError where the vocabulary is of characters and lacks one of the text's."""
        if self.known is not None and (unknown := set(text) - self.known):
            raise ValueError(f"the tokenizer does not know the character {min(unknown)!r}")
        return self.encoding.encode_ordinary(text)

    def beginning(self):
        """What a text of nothing begins with: a line break, or the first id where the vocabulary has none."""
        return self.encode("\n") if self.known is None or "\n" in self.known else [0]

    def decode(self, ids):
        """ids -> str; half a character becomes U+FFFD. What is no id adds nothing: a model may know more of them."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """ids -> bytes, which can be joined from piece to piece where str cannot."""
        return self.encoding.decode_bytes([i for i in ids if i < self.n_vocab])

    def turns(self, question):
        raise ValueError(f"the tokenizer {self.name} has no chat template: it belongs to no model that chats")

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        e = self.encoding
        config = {"name": self.name, "tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
        if self.eot is not None:
            config["bos_token"] = config["eos_token"] = EOT
        spec = to_json(e._pat_str, e._mergeable_ranks, e._special_tokens)
        write_files(folder, {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
                             "tokenizer_config.json": json.dumps(config, indent=1).encode()})


class ForeignTokenizer:
    """Somebody else's tokenizer.json, with Tokenizer's names, run by the package tokenizers."""

    def __init__(self, folder):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ImportError(f"{folder}: this tokenizer.json needs a package more: pip install tokenizers") from None
        self.folder = folder
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        try:
            self.backend = Backend.from_str(self.files["tokenizer.json"].decode())
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{folder}/tokenizer.json: {error}") from None
        self.backend.encode_special_tokens = True  # misleading name: it stops special tokens being found in a text
        self.backend.no_truncation()
        self.backend.no_padding()
        try:
            config = json.loads(self.files.get("tokenizer_config.json", b"{}"))
            self.name = config.get("name") or folder.resolve().name
            named = json.loads(self.files.get("special_tokens_map.json", b"{}")) | config  # older files have both
            self.special = {name: text_of(named[name]) for name in SPECIAL if named.get(name)}
            ids = {name: self.backend.token_to_id(text) for name, text in self.special.items()}
            self.eot = ids.get("eos_token")
            if not config.get("tokenizer_class"):  # AutoTokenizer takes Gemma's for a ZAYA1 then, and finds other ids
                named_class = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
                self.files["tokenizer_config.json"] = json.dumps(named_class, indent=1).encode()
            template = config.get("chat_template")
            if isinstance(template, list):  # several, by name
                template = {one["name"]: one["template"] for one in template}.get("default")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            files = "tokenizer_config.json or special_tokens_map.json"
            raise ValueError(f"{folder}: {files} is damaged: {error!r}") from None
        self.template = self.files.get("chat_template.jinja", b"").decode(errors="replace") or template or ""
        self.n_vocab = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, text):
        """str -> list of ids. ValueError where the vocabulary has no token for what it does not know."""
        try:
            # (Of a batch, though of one: in half the time, for it leaves out where in the text each token stood.)
            return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:
            raise ValueError(f"{self.folder}/tokenizer.json: {error}") from None

    def beginning(self):
        return self.encode("\n") or [0]

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def render(self, *turns, **more):
        """The text of a chat of turns, (role, content) each, as transformers makes it of the chat template."""
        from jinja2.ext import Extension, loopcontrols  # torch brings jinja2 along
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %}, around what the model says: it changes no text."""

            tags = {"generation"}

            def parse(self, parser):
                next(parser.stream)
                return parser.parse_statements(["name:endgeneration"], drop_needle=True)

        def fail(message):
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
        # jinja2's own would write < and & for HTML
        environment.filters["tojson"] = lambda x, **how: json.dumps(x, **{"ensure_ascii": False} | how)
        messages = [{"role": role, "content": content} for role, content in turns]
        more |= {"tools": None, "documents": None, "strftime_now": lambda form: datetime.now().strftime(form)}
        more |= self.special
        try:
            return environment.from_string(self.template).render(messages=messages, raise_exception=fail, **more)
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"{self.folder}: its chat template fails: {error}; {OWN_TEMPLATE}") from None

    def turns(self, question):
        """A chat's first turn and the beginning of its second, as transformers makes them -> (ids, the id that ends the
        answer). ValueError without a template that takes a question, or if it fails."""
        chat, other = (self.render(("user", text), add_generation_prompt=True) for text in (question, f"{question}?"))
        if chat == other:
            raise ValueError(f"{self.folder} has no chat template that takes a question; {OWN_TEMPLATE}")
        answer = "forty-two"  # behind which the end of its turn stands
        _, _, after = self.render(("user", question), ("assistant", answer)).rpartition(answer)
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self.backend.encode_special_tokens = False  # here they are found
        ids, ids_after = self.encode(chat), self.encode(after)
        self.backend.encode_special_tokens = True
        return ids, next((i for i in ids_after if i in special), self.eot)

    def save(self, folder):
        write_files(folder, self.files)


def text_of(token):
    """A special token's text from a tokenizer_config.json, which writes it so or as an object."""
    return token["content"] if isinstance(token, dict) else token


def load_tokenizer(name_or_folder):
    """The tokenizer "gpt2", "bytes", a folder's or a run directory's. ValueError, OSError or ImportError, each with a
    one-line message."""
    if str(name_or_folder) == "bytes":
        return bpe_tokenizer("bytes", {bytes([b]): b for b in range(256)})
    if str(name_or_folder) == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        except OSError as error:  # requests' errors are OSErrors
            raise OSError(f"gpt2's vocabulary is downloaded at first use, and that failed ({type(error).__name__}); "
                          "data/text/prepare.py with --tokenizer bpe or bytes needs no network") from None
    folder = Path(os.path.expanduser(name_or_folder))
    if not (folder / "tokenizer.json").is_file() and (folder / "best").is_dir():
        folder = folder / "best"
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer {name_or_folder}: neither a known name nor a folder with a tokenizer.json")
    try:
        spec = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return from_json(spec, folder) or ForeignTokenizer(folder)


def char_tokenizer(texts):
    """The vocabulary of every character in texts, sorted."""
    chars = sorted(set().union(*texts))
    ranks = {c.encode(): i for i, c in enumerate(chars)}
    return Tokenizer(tiktoken.Encoding("chars", pat_str=ONE_CHARACTER, mergeable_ranks=ranks, special_tokens={}))


def bpe_tokenizer(name, ranks):
    """The vocabulary of ranks = {token: id} and, last, <|endoftext|>."""
    return Tokenizer(tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}))


def to_json(pattern, ranks, special):
    """tokenizer.json as the package tokenizers itself writes it. ranks: {token: id}, special: {text: id}."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == ONE_CHARACTER:
        pre_tokenizer, decoder = split, {"type": "Fuse"}
        model = {"type": "WordLevel", "vocab": {c.decode(): i for c, i in ranks.items()}, "unk_token": "<unk>"}
    else:
        spell = {token: "".join(BYTE_TO_CHAR[b] for b in token) for token in sorted(ranks, key=ranks.get)}
        merges = [[spell[part] for part in last_merge(token, ranks)] for token in spell if len(token) > 1]
        pre_tokenizer, decoder = {"type": "Sequence", "pretokenizers": [split, byte_level]}, byte_level
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                 "vocab": {spell[token]: i for token, i in ranks.items()}, "merges": merges}
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for text, i in special.items()]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


def from_json(spec, folder):
    """The Tokenizer of a tokenizer.json that is ours, else None. Ours is what to_json would write again the same, and
    has no chat template."""
    try:
        if spec["model"]["type"] == "WordLevel":
            name, pattern = "chars", ONE_CHARACTER
            ranks = {c.encode(): i for c, i in spec["model"]["vocab"].items()}
        else:
            name, pattern = "bpe", spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            ranks = {bytes(CHAR_TO_BYTE[c] for c in token): i for token, i in spec["model"]["vocab"].items()}
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        if spec["post_processor"] and not spec["post_processor"]["special_tokens"]:
            spec = {**spec, "post_processor": None}  # transformers adds one that does nothing when it saves
        ours = set(special) <= {EOT} and to_json(pattern, ranks, special) == spec
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        ours = False
    if not ours or name == "bpe" and not all(bytes([b]) in ranks for b in range(256)):
        return None
    path, config = folder / "tokenizer_config.json", {}
    if path.is_file():
        try:
            config = json.loads(path.read_text("utf-8"))
            name = config.get("name", name)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    if (folder / "chat_template.jinja").is_file() or "chat_template" in config:
        return None  # for ForeignTokenizer, which knows what to do with one
    return Tokenizer(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def write_files(folder, files):
    """files: {name: bytes}. A tokenizer's file that is not among them is removed, it would be another tokenizer's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if name in files:
            with write_aside(folder / name) as file:
                file.write(files[name])
        else:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def write_aside(path):
    """A binary file to write. It takes path's place once whole and on the disk; an error leaves path as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sha256(path):
    """A file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
