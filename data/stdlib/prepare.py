"""The source text of Python's own standard library as a dataset: there wherever Python is, no network needed."""

import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, wherever this is called from
from data.dataset import make_parser, one_line_errors, read_documents, split_documents, write_dataset

# Installed packages are not the standard library; its tests are as long as itself, and duller.
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def main(argv=None):
    parser = make_parser(__file__, __doc__, tokenizer="bpe")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        documents = read_documents(sysconfig.get_paths()["stdlib"], args.out, "*.py", SKIP)
        write_dataset(args, *split_documents(documents, args.val_fraction))


if __name__ == "__main__":
    main()
