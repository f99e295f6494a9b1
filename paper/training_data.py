"""The paper's training data as files for train.py --data: reasoning traces, web text, translations.

    python paper/training_data.py traces --out data/traces.jsonl --held-out data/traces-held-out.jsonl
    python paper/training_data.py fineweb --n 50000 --out data/fineweb.jsonl
    python paper/training_data.py wmt16 --n 100000 --out data/wmt16.jsonl

traces: GSM8K and CommonsenseQA with the reasoning of Nemotron-70B (Table 14), merged in an order drawn by --seed; a
tenth, rounded down, is held out: 7,473 + 9,741 - 1,721 = 15,493 examples, the steps of Table 15. fineweb: documents of
sample-10BT, read row group by row group, so that no whole file of it is downloaded. wmt16: English to Romanian in the
paper's template, as plain text: the loss covers the prompt too, where the paper's covers the translation.
"""
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser, real, seed_number, whole

from tqdm import tqdm

from disk import check_writable, write
from problems import Example
from read_data import read_examples

TRACES = {"gsm8k": "multi-domain-reasoning/gsm8k", "commonsense_qa": "multi-domain-reasoning/commonsense_qa"}
FINEWEB = "HuggingFaceFW/fineweb@9bb295ddab0e05d785b879661af7260fed5140fc/sample/10BT"      # its version 1.4.0
WMT16 = "wmt/wmt16/ro-en"


def newest(repo):
    """The newest commit of a data set on the hub. It is printed: tomorrow it may be another."""
    from huggingface_hub import HfApi
    commit = HfApi().dataset_info(repo).sha
    tqdm.write(f"reading {repo}@{commit}")
    return commit


def from_hub(repo, split="train"):
    """Paths of a data set's parquet files of one split, downloaded into the hub's cache. InputError if it cannot be."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        at = dict(repo_type="dataset", revision=newest(repo))
        names = sorted(name for name in HfApi().list_repo_files(repo, **at)
                       if name.endswith(".parquet") and split in name)
        if not names:
            raise FileNotFoundError(f"no .parquet file of {split}")
        return [hf_hub_download(repo, name, **at) for name in names]
    except Exception as error:  # of many kinds: no network, no such data set, a licence
        raise InputError(f"{repo} cannot be had from the hub ({' '.join(str(error).split())[:120]}): download its "
                         "files and name them by --gsm8k and --commonsense-qa") from None


def merged(examples, seed):
    """list of Example -> (those to train on, the tenth that is held out), in an order drawn by seed."""
    examples = list(examples)
    random.Random(seed).shuffle(examples)
    held = len(examples) // 10
    return examples[held:], examples[:held]


def lines(examples):
    """Examples, or plain texts, as the lines of a file that read_data.py reads back."""
    rows = (example._asdict() if isinstance(example, Example) else {"text": example} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def row_groups(folder):
    """The rows of all parquet files in a folder of the hub, dicts, in order; only what is asked for is transferred."""
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile
    owner, repo, inside = folder.split("/", 2)
    if "@" not in repo:
        folder = f"{owner}/{repo}@{newest(f'{owner}/{repo}')}/{inside}"
    files = HfFileSystem()
    for name in sorted(files.glob(f"datasets/{folder}*.parquet") or files.glob(f"datasets/{folder}/*.parquet")):
        with files.open(name) as file:
            table = ParquetFile(file)
            for group in range(table.num_row_groups):
                columns = [c for c in table.schema_arrow.names if c in ("text", "translation")]
                yield from table.read_row_group(group, columns=columns).to_pylist()


class Cut(Exception):
    """The hub failed, or Ctrl-C came, before all texts had: str(self) says which; self.found, what had come."""


def texts(folder, n, seconds, least, of_row):
    """Up to n texts, of_row of each row, of at least `least` characters, or those of the first `seconds`. Rows without
    one are left out. Cut where that ends early."""
    found, until, bar = [], time.monotonic() + seconds, tqdm(total=n, desc=folder, smoothing=0)
    try:
        for row in row_groups(folder):
            text = of_row(row)
            if text and len(text) >= least:
                found.append(text)
                bar.update()
            if len(found) == n or time.monotonic() > until:
                return found
    except (Exception, KeyboardInterrupt) as error:  # of the hub, of the network, of pyarrow: what has come is of use
        cut = Cut(" ".join(str(error).split())[:120] or type(error).__name__)
        cut.found = found
        raise cut from None
    finally:
        bar.close()
    return found


def translation(row):
    pair = row["translation"] or {}
    return f"translate English to Romanian: {pair['en']}\n{pair['ro']}" if pair.get("en") and pair.get("ro") else ""


def parse_args(argv):
    p = Parser("The paper's training data as files for train.py --data.")
    add = p.add_argument
    add("what", choices=("traces", "fineweb", "wmt16"), help="which data")
    add("--out", required=True, metavar="JSONL", help="the file to write")
    add("--held-out", metavar="JSONL", help="traces: the file of the tenth that is not trained on")
    add("--gsm8k", metavar="FILE", help="traces: a .jsonl or .parquet file; default: from the hub")
    add("--commonsense-qa", metavar="FILE", help="traces: a .jsonl or .parquet file; default: from the hub")
    add("--seed", type=seed_number, default=1, help="traces: of their order, and so of what is held out")
    add("--n", type=whole(1), default=50_000, help="fineweb, wmt16: texts at most")
    add("--minutes", type=real(0.0, above=True), default=60.0, help="fineweb, wmt16: and no longer than this")
    add("--min-chars", type=whole(0), default=2000, help="fineweb: shorter documents are left out")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.held_out is not None and Path(args.out).resolve() == Path(args.held_out).resolve():
        raise InputError(f"--held-out {args.held_out} is --out, too: one would take the place of the other")
    for flag, path in (("--out", args.out), ("--held-out", args.held_out)):
        if path is not None and (Path(path).suffix != ".jsonl" or Path(path).exists()):
            raise InputError(f"{flag} {path}: give the name of a new .jsonl file")
        if path is not None:
            check_writable(Path(path).parent)
    if args.what != "traces":
        if args.held_out or args.gsm8k or args.commonsense_qa:
            raise InputError(f"--held-out, --gsm8k and --commonsense-qa are for traces, not for {args.what}")
        folder, least, of_row = ((FINEWEB, args.min_chars, lambda row: row["text"]) if args.what == "fineweb" else
                                 (f"{WMT16}/train", 0, translation))
        try:
            found = texts(folder, args.n, 60 * args.minutes, least, of_row)
        except Cut as cut:
            if cut.found:
                write(f"{args.out}.part", lines(cut.found))
            kept = f"; {len(cut.found)} texts are in {args.out}.part, to be renamed if they do" * bool(cut.found)
            raise InputError(f"{folder} cannot be read from the hub to its end ({cut}){kept}") from None
        if not found:
            raise InputError(f"{folder}: no text of --min-chars {least} came in --minutes {args.minutes:g}")
        write(args.out, lines(found))
        print(f"written: {args.out}: {len(found)} texts")
        return 0
    files = {name: [given] if given else from_hub(TRACES[name])
             for name, given in (("gsm8k", args.gsm8k), ("commonsense_qa", args.commonsense_qa))}
    examples = {name: [e for path in paths for e in read_examples(path)] for name, paths in files.items()}
    if plain := [name for name, mine in examples.items() if isinstance(mine[0], str)]:
        raise InputError(f"{' and '.join(files[plain[0]])}: plain text; questions with answers are needed")
    if bare := {name: n for name, mine in examples.items() if (n := sum(not e.reasoning for e in mine))}:
        print("CAUTION: without reasoning: " + ", ".join(f"{n} of {name}" for name, n in bare.items()), file=sys.stderr)
    rest, held = merged([e for mine in examples.values() for e in mine], args.seed)
    write(args.out, lines(rest))
    if args.held_out:
        write(args.held_out, lines(held))
    print(", ".join(f"{len(mine)} of {name}" for name, mine in examples.items()))
    print(f"written: {args.out}: {len(rest)} examples; held out: {len(held)}"
          + f", in {args.held_out}" * bool(args.held_out))
    return 0


if __name__ == "__main__":
    run(main, interrupted="interrupted: nothing was written")
