"""Tiny Shakespeare, 1.1 MB of plays, character by character as in nanoGPT: the first 90 % train, the rest validates."""

import hashlib
import http.client
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, wherever this is called from
from data.dataset import a_path, cut, make_parser, one_line_errors, write_dataset

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30  # seconds without a byte
WAITS = [1, 2, 4]  # seconds before each retry


def download(url):
    """The bytes at url, in memory, so that no half a file can be left. OSError after the last retry."""
    for wait in [*WAITS, None]:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                return response.read()
        except (OSError, http.client.HTTPException) as error:
            if wait is None:
                raise OSError(f"{url}: {error}; a copy you have can be given with --file") from None
            time.sleep(wait)


def main(argv=None):
    parser = make_parser(__file__, __doc__, tokenizer="chars")
    parser.add_argument("--file", type=a_path, help="a copy of the text on this machine; nothing is downloaded")
    parser.add_argument("--url", default=URL, help="address to download the text from")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        data = args.file.read_bytes() if args.file else download(args.url)
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise ValueError(f"{args.file or args.url} is not tiny Shakespeare ({len(data):,} bytes, another SHA-256); "
                             "for a text of your own there is data/text/prepare.py")
        write_dataset(args, *cut(data.decode(), args.val_fraction))


if __name__ == "__main__":
    main()
