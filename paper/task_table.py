"""What evaluate.py says of its rows: a line for each, MMLU's subjects as one, and scores at exact savings."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sweep import interpolate
from tasks import GROUPS

WEIGHTS = {"skipped": "pairs", "skipped_per_call": "calls", "macs_saved": "macs_dense"}          # shares, of how many
AT = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.45, 0.6)      # the columns of the paper's tables, and 40%
MAIN = ("acc", "bleu", "word_perplexity")                        # what a task is known by, and what stands beside it
BESIDE = ("acc_norm", "perplexity", "flexible", "token_perplexity")
HEADER = (f"{'task':36} {'budget':>6} {'n':>6} {'score':>15} {'beside it':>26} {'skipped':>8} {'per call':>8} "
          f"{'macs_saved':>10}")


def line_of(r):
    def told(name):
        if r.get(f"{name}_stderr") is None:
            return f"{r[name]:.4g}"
        return f"{r[name]:.2%} ± {r[f'{name}_stderr']:.2%}"
    main, beside = (next((name for name in names if name in r), None) for names in (MAIN, BESIDE))
    return (f"{r['task']:36} {r['budget']:6.3f} {r['n']:6} {told(main):>15} "
            f"{f'{beside} {told(beside)}' if beside else '':>26} {r['skipped']:8.1%} {r['skipped_per_call']:8.1%} "
            f"{r['macs_saved']:+10.1%}")


def grouped(rows):
    """Rows of MMLU and its STEM subjects, where all are there: means over all their questions, pairs and MACs."""
    found = []
    for group in ("mmlu", "mmlu_stem"):
        for budget in dict.fromkeys(r["budget"] for r in rows):
            mine = [r for r in rows if r["budget"] == budget and r["task"] in GROUPS[group]]
            if len(mine) == len(GROUPS[group]):
                n = sum(r["n"] for r in mine)
                mean = lambda key, by="n": sum(r[key] * r[by] for r in mine) / sum(r[by] for r in mine)
                found.append({"task": group, "budget": budget, "n": n, "acc": mean("acc"),
                              "acc_stderr": (mean("acc") * (1 - mean("acc")) / max(n - 1, 1)) ** 0.5,
                              **{key: mean(key, by) for key, by in WEIGHTS.items()}})
    return found


def exactly(rows):
    """{"skipped": {task: its score at each of AT}, "macs_saved": the same}: linear between rows, None outside."""
    found = {"skipped": {}, "macs_saved": {}}
    for key, name in ((key, name) for key in found for name in dict.fromkeys(r["task"] for r in rows)):
        points = [(r[key], next(r[main] for main in MAIN if main in r)) for r in rows if r["task"] == name]
        found[key][name] = interpolate(points, AT)
    return found


def lines_at(rows):
    """Lines to print: what exactly() found, "-" for None."""
    lines, shares = [], {r["task"] for r in rows if "acc" in r}
    for key, scores in exactly(rows).items():
        lines += ["", f"{f'score at exactly ({key})':36}" + "".join(f"{x:>8.0%}" for x in AT)]
        for name, values in scores.items():
            told = "{:8.1%}" if name in shares else "{:8.2f}"
            lines.append(f"{name:36}" + "".join("       -" if v is None else told.format(v) for v in values))
    return lines
