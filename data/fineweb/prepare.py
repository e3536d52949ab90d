"""FineWeb, 10 billion tokens of web pages in GPT-2's tokens, published as kjj0/fineweb10B-gpt2 on the Hugging Face hub:
103 shards of 100 million tokens to train on (200 MB each), of which --shards are taken, and one to validate on.

A download that breaks off goes on where it stopped, also when this is started again.
"""

import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, wherever this is called from
from data.dataset import Parser, a_path, dtype_of, in_range, make_whole, one_line_errors, token_files
from data.tokenizer import load_tokenizer, sha256

URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4  # a shard begins with 256 int32: these two, the number of tokens, zeros
GPT2_TOKENS = 50257  # ids from there on are none
TIMEOUT = 30  # seconds without a byte
WAITS = [1, 2, 4, 8]  # seconds before each retry; from the start again after one that brought something
BUSY = 408, 429  # "timeout", "too many requests": of HTTP's 4xx those that pass
PIECE = 2**24  # bytes or tokens that are in memory at a time


class Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the header with a file's SHA-256: the hub sends it along with the redirect to its storage."""

    sha256 = None

    def redirect_request(self, request, response, code, message, headers, url):
        self.note(headers)
        return super().redirect_request(request, response, code, message, headers, url)

    def note(self, headers):
        if match := re.fullmatch(r'(W/)?"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag") or "", re.IGNORECASE):
            self.sha256 = match[2].lower()


def download(url, path):
    """The file at url, complete and checked, at path. OSError after the last retry, ValueError if it is damaged."""
    partial = path.with_name(f".{path.name}.partial")
    most, waits = size_of(partial), iter(WAITS)
    while True:
        try:
            expected = fetch_rest(url, partial)
            break
        except (OSError, http.client.HTTPException) as error:
            if size_of(partial) > most:  # it went on, so its patience begins anew
                most, waits = size_of(partial), iter(WAITS)
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in BUSY
            wait = next(waits, None)
            if wait is None or refused:  # asking again would not help
                raise OSError(f"{url}: {error}; what came is kept, start again to go on") from None
            time.sleep(wait)
    if expected and sha256(partial) != expected:
        partial.unlink()
        raise ValueError(f"{url} came damaged (another SHA-256); it is removed, start again")
    os.replace(partial, path)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def fetch_rest(url, partial):
    """What partial still lacks of url, with a progress bar -> the whole's SHA-256 by the server, or None."""
    start, redirects = size_of(partial), Redirects()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        partial.unlink()  # it is all of the file, still to be checked, or more: both are rare
        raise OSError("the file ends where it was to go on; what was there is removed") from None
    with response, open(partial, "ab") as file:
        redirects.note(response.headers)
        if response.status != 206:  # the server sends all of it, whatever we have
            start = 0
            file.seek(0)
            file.truncate()
        if not response.headers.get("Content-Length", "").isdecimal():
            raise OSError("the server does not say how many bytes it sends")
        total = start + int(response.headers["Content-Length"])
        bar = tqdm(total=total, initial=start, desc=partial.name, unit="B", unit_scale=True, disable=None)
        with bar:
            while block := response.read(2**16):
                file.write(block)
                bar.update(len(block))
        size = file.tell()
    if size != total:
        raise OSError(f"only {size:,} of {total:,} bytes came")
    return redirects.sha256


def read_shard(path):
    """A shard's tokens, mapped, (count) uint16. ValueError, and the file is removed, if it is no whole shard."""
    header = np.fromfile(path, "<i4", 3)
    ours = len(header) == 3 and tuple(header[:2]) == (MAGIC, VERSION) and header[2] > 0
    if ours and path.stat().st_size == HEADER + 2 * int(header[2]):
        tokens = np.memmap(path, "<u2", "r", HEADER, (int(header[2]),))
        if tokens.max() < GPT2_TOKENS:
            return tokens
    path.unlink()
    raise ValueError(f"{path.name} is no whole shard of version {VERSION}; it is removed, start again")


def pieces(shard, gpt2, tokenizer):
    """A shard's tokens piece by piece, in the tokenizer asked for; in another than GPT-2's, document by document."""
    if tokenizer is gpt2:
        yield from (shard[start : start + PIECE] for start in range(0, len(shard), PIECE))
        return
    ends = np.flatnonzero(shard == gpt2.eot)  # it stands before each document
    starts = [0, *(ends + 1).tolist()]
    for start, end in zip(tqdm(starts, unit=" documents", disable=None), [*ends.tolist(), len(shard)]):
        if end > start:
            ids = tokenizer.encode(gpt2.decode(shard[start:end].tolist()))
            yield np.array(ids + ([] if tokenizer.eot is None else [tokenizer.eot]), "<u4")


def write_tokens(file, shards, gpt2, tokenizer):
    """All shards' tokens in one file -> how many."""
    count = 0
    for shard in shards:
        for ids in pieces(shard, gpt2, tokenizer):
            file.write(ids.astype(dtype_of(tokenizer)))
            count += len(ids)
    return count


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=in_range(int, 1, 103), default=10, metavar="N",
                        help="shards to train on, 1 to 103, of 100 million tokens each")
    parser.add_argument("--tokenizer", default="gpt2", metavar="gpt2|DIR",
                        help="gpt2, or a folder with a tokenizer.json, such as a checkpoint, to write the text in")
    parser.add_argument("--out", type=a_path, default=Path(__file__).parent, metavar="DIR", help="folder to write into")
    parser.add_argument("--url", default=URL, help="address of the folder with the shards")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        gpt2 = load_tokenizer("gpt2")
        tokenizer = gpt2 if args.tokenizer == "gpt2" else load_tokenizer(args.tokenizer)
        (args.out / "shards").mkdir(parents=True, exist_ok=True)
        names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, args.shards + 1))]
        shards = []
        for path in (args.out / "shards" / name for name in names):
            if not path.exists():
                download(f"{args.url}/{path.name}", path)
            shards.append(read_shard(path))  # complains at once, not after the last download
        with token_files(args.out) as (train_file, val_file):
            counts = {"val_tokens": write_tokens(val_file, shards[:1], gpt2, tokenizer),
                      "train_tokens": write_tokens(train_file, shards[1:], gpt2, tokenizer)}
        lengths = np.array([0 if i == gpt2.eot else len(gpt2.decode_bytes([i])) for i in range(gpt2.n_vocab)])
        val_bytes = sum(int(lengths[piece].sum()) for piece in pieces(shards[0], gpt2, gpt2))
        make_whole(args.out, tokenizer, counts, val_bytes)
    print(f"{args.out / 'shards'} may be deleted; with it more shards can be added later without loading these again.")


if __name__ == "__main__":
    main()
