"""Which models and data sets can be had: asked before a long command needs them, and nothing is downloaded.

    python paper/can_be_had.py --model meta-llama/Llama-3.2-1B --data data/paper --tasks generative loglikelihood
    python paper/can_be_had.py --model meta-llama/Llama-3.2-1B --training-data
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, run
from flags import Parser

from task_rows import find_local, source_of
from tasks import TASKS, expand
from training_data import FINEWEB, TRACES, WMT16


def on_the_hub(repo, kind):
    """ "" if the files of a repository may be read, else why not, in a few words."""
    try:
        from huggingface_hub import HfApi
        HfApi().auth_check(repo, repo_type=kind)
        return ""
    except Exception as error:  # of many kinds: no network, no such name, a licence that was not accepted
        return " ".join(str(error).split())[:120] or type(error).__name__


def main(argv=None):
    p = Parser("Which models and data sets can be had.")
    add = p.add_argument
    add("--model", required=True, help="folder, or hub id")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="of evaluate.py")
    add("--data", metavar="DIR", help="folder with files of data sets")
    add("--training-data", action="store_true", help="also what training_data.py makes, where --data lacks it")
    args = p.parse_args(argv)
    if Path(args.model).exists() and not (Path(args.model) / "config.json").is_file() and not (
            Path(args.model) / "latest").is_file():
        raise InputError(f"--model {args.model!r} is no folder of a model, nor a run's --out")
    if unknown := [name for name in expand(args.tasks) if name not in TASKS]:
        raise InputError(f"--tasks {' '.join(unknown)}: not known; evaluate.py --help lists them")
    wanted = {}                                                  # (kind, repository) -> what needs it, if no file does
    if not Path(args.model).is_dir():
        wanted["model", args.model] = ["--model"]
    for name in expand(args.tasks):
        task = TASKS[name]
        for split in filter(None, (task.split, task.shots * (task.kind == "choice"))):           # as --shots defaults
            if not find_local(task.rows, split, args.data):
                wanted.setdefault(("dataset", source_of(task.rows).repo), []).append(f"{task.rows} {split}")
    for file, repos in (("traces", TRACES.values()), ("fineweb", [FINEWEB]), ("wmt16", [WMT16])) * args.training_data:
        if not (args.data and (Path(args.data) / f"{file}.jsonl").exists()):
            for repo in repos:
                wanted.setdefault(("dataset", "/".join(repo.split("/")[:2]).split("@")[0]), []).append(f"{file}.jsonl")
    missing = 0
    for (kind, repo), needs in wanted.items():
        why = on_the_hub(repo, kind)
        missing += bool(why)
        print(f"{'NO ' if why else 'yes'} {kind:8} {repo:44} for {', '.join(dict.fromkeys(needs)):.60}"
              + f": {why}" * bool(why))
    print(f"\n{len(wanted) - missing} of {len(wanted)} can be had"
          + ": accept the licences at their pages, then `hf auth login`; or put files into --data" * bool(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    run(main)
