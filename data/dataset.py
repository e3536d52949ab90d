"""From text to a folder of tokens: what the prepare.py scripts share.

A dataset is train.bin and val.bin, token ids one after the other, little-endian, no header, with the tokenizer's files
and meta.json, which is written last: a folder that has it is whole. A document is one file's text, a str.
"""

import argparse
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.bpe import train_bpe
from data.tokenizer import FILES, bpe_tokenizer, char_tokenizer, load_tokenizer, write_aside

GENERATED = {"train.bin", "val.bin", "meta.json", *FILES}


class Parser(argparse.ArgumentParser):
    """argparse, but --help says the defaults, no name is cut short, and an error is one line, without the usage before
    it; exit status 2."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def make_parser(script, description, tokenizer):
    """A parser with the options that every prepare.py has. script: its __file__; tokenizer: the default."""
    parser = Parser(description)
    parser.add_argument("--tokenizer", default=tokenizer, metavar="NAME|DIR",
                        help="bpe, chars, bytes, gpt2, or a folder with a tokenizer.json, such as a checkpoint")
    parser.add_argument("--vocab_size", type=in_range(int, 257, 2**20), default=2048, metavar="N",
                        help="tokens that bpe shall have, 257 or more; the other tokenizers have their own size")
    parser.add_argument("--val_fraction", type=in_range(float, 0.001, 0.5), default=0.1, metavar="F",
                        help="part of the bytes held out for validation, 0.001 to 0.5")
    parser.add_argument("--out", type=a_path, default=Path(script).parent, metavar="DIR", help="folder to write into")
    return parser


def a_path(text):
    """A type for argparse: a path. (Of --out=~/DIR the shell leaves ~ as it is.)"""
    return Path(os.path.expanduser(text))


def in_range(kind, low, high):
    """A type for argparse: a number of that kind from low to high."""
    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    convert.__name__ = kind.__name__  # argparse's "invalid int value" uses it
    return convert


@contextmanager
def one_line_errors(parser):
    """What a user can cause ends in one line; anything else is a bug and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not, nor has None
        sys.stdout.reconfigure(errors="replace")  # by a question mark what the terminal has no character for
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130)


def read_documents(root, out, pattern="*", skip=()):
    """The distinct texts of the files under root whose name matches pattern. ValueError if there is none.

    Left out are folders named in skip, links to folders, what is hidden, empty or not UTF-8 text (a line says how many
    of these), and an earlier dataset's files in out.
    """
    def fail(error):
        raise error

    if not Path(root).is_dir():
        raise ValueError(f"{root} does not exist")
    generated, documents, no_text = {out.resolve() / name for name in GENERATED}, {}, 0
    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if not path.match(pattern) or not path.is_file() or path.resolve() in generated:
                continue
            text = read_text(path)
            no_text += text is None
            if text:
                documents[digest(text)] = text  # a copy has the same digest, so no text stands on both sides
    left_out = f"{no_text:,} files in {root} that are not UTF-8 text"
    if not documents:
        raise ValueError(f"no text in {root}" + (f", but {left_out}" if no_text else ""))
    if no_text:
        print(f"left out: {left_out}")
    return list(documents.values())


def read_text(path):
    """A file's text, line ends untouched; "" for white space alone, None for what is not UTF-8 or holds NUL."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text if text.strip() else ""


def digest(text):
    return hashlib.sha256(text.encode()).digest()


def split_documents(documents, val_fraction):
    """Distinct documents -> (train, val), whole ones, the same whatever order they come in; neither side is empty.

    In the order of their hashes, which is as good as random, documents go to val as long as it stays within its part of
    the bytes; if none fits, the shortest does. A document alone is cut, near that place at the end of a line.
    """
    if len(documents) == 1:
        return cut(documents[0], val_fraction, at_line=True)
    documents = sorted(documents, key=digest)
    sizes = [len(text.encode()) for text in documents]
    room, held_out = val_fraction * sum(sizes), set()
    for i, size in enumerate(sizes):
        if size <= room:
            held_out.add(i)
            room -= size
    held_out = held_out or {sizes.index(min(sizes))}
    return ([text for i, text in enumerate(documents) if i not in held_out],
            [text for i, text in enumerate(documents) if i in held_out])


def cut(text, val_fraction, at_line=False):
    """One text -> ([its beginning], [the last val_fraction of its characters]), if asked from the start of a line that
    makes it no more than half as much again."""
    at = int(len(text) * (1 - val_fraction))
    if at_line:
        at = text.rfind("\n", int(len(text) * (1 - 1.5 * val_fraction)), at) + 1 or at
    if not 0 < at < len(text):
        raise ValueError("the text is too short to hold a part of it out")
    return [text[:at]], [text[at:]]


def make_tokenizer(args, train, val):
    """The tokenizer args ask for. bpe learns from train alone; chars must know every character on either side."""
    if args.tokenizer == "chars":
        return char_tokenizer(train + val)
    if args.tokenizer == "bpe":
        return bpe_tokenizer("bpe", train_bpe(train, args.vocab_size - 1))
    return load_tokenizer(args.tokenizer)


def tokenize(documents, tokenizer, name):
    """-> 1-d array of dtype_of(tokenizer): each document's ids and, where the tokenizer has one, eot after it."""
    eot = [] if tokenizer.eot is None else [tokenizer.eot]
    bar = tqdm(documents, desc=f"tokenize {name}", unit=" documents", disable=None)  # None: silent in a pipe
    return np.concatenate([np.array(tokenizer.encode(text) + eot, dtype_of(tokenizer)) for text in bar])


@contextmanager
def token_files(out):
    """Files to become train.bin and val.bin of a dataset. An error leaves the one that is there as it was."""
    with write_aside(out / "train.bin") as train, write_aside(out / "val.bin") as val:
        yield train, val
        train.flush()  # if the disk is full, here, where an earlier dataset is still untouched
        val.flush()
        (out / "meta.json").unlink(missing_ok=True)  # from here on the folder is not whole


def dtype_of(tokenizer):
    """The smaller of the two types that hold a tokenizer's ids."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")


def make_whole(out, tokenizer, counts, val_bytes):
    """Write what a dataset has beside its tokens, meta.json last, and say what it is. counts: {"train_tokens": n,
    "val_tokens": n} and more for meta.json; val_bytes: of the text that was held out."""
    meta = {"dtype": dtype_of(tokenizer).name, "vocab_size": tokenizer.n_vocab, "tokenizer": tokenizer.name,
            "bytes_per_token": val_bytes / counts["val_tokens"],  # ends of documents counted, as in the loss
            **counts}
    tokenizer.save(out)
    with write_aside(out / "meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode() + b"\n")
    end = ", none for the end of a document" if tokenizer.eot is None else ""
    print(f"{out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens; tokenizer "
          f"{meta['tokenizer']}, {meta['vocab_size']:,} ids{end}, {meta['bytes_per_token']:.2f} bytes a token")


def write_dataset(args, train, val):
    """Tokenize both lists of documents and write the dataset into args.out. Nothing is written before all is known."""
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is not a folder")
    tokenizer = make_tokenizer(args, train, val)
    train_tokens, val_tokens = (tokenize(documents, tokenizer, name)
                                for name, documents in (("train", train), ("val", val)))
    if not len(train_tokens) or not len(val_tokens):
        raise ValueError("to the tokenizer one of the two parts, to train and to validate on, is nothing")
    args.out.mkdir(parents=True, exist_ok=True)
    with token_files(args.out) as (train_file, val_file):
        train_file.write(train_tokens)
        val_file.write(val_tokens)
    counts = {"train_tokens": len(train_tokens), "val_tokens": len(val_tokens),
              "train_documents": len(train), "val_documents": len(val)}
    make_whole(args.out, tokenizer, counts, sum(len(text.encode()) for text in val))
