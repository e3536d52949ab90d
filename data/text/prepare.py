"""Any text of yours as a dataset: a folder, divided by file, or one file, whose last lines are held out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, wherever this is called from
from data.dataset import a_path, make_parser, one_line_errors, read_documents, read_text, split_documents, write_dataset


def main(argv=None):
    parser = make_parser(__file__, __doc__, tokenizer="bpe")
    parser.add_argument("path", type=a_path, metavar="PATH", help="a text file, or a folder: every UTF-8 file in it is "
                        "taken, except hidden ones, ones with NUL bytes and those behind links to folders")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        one_file = args.path.exists() and not args.path.is_dir()  # or a pipe
        documents = [read_text(args.path)] if one_file else read_documents(args.path, args.out)
        if not any(documents):
            raise ValueError(f"{args.path} holds no UTF-8 text")
        write_dataset(args, *split_documents(documents, args.val_fraction))


if __name__ == "__main__":
    main()
