"""A run's metrics: its lines and curves."""
import json
import math
from contextlib import suppress

from console import pyplot
from disk import write_figure


def add_line(metrics, row):
    """Write a row, without its None, as the next line of an open metrics.jsonl. OSError with the file's name."""
    try:
        metrics.write(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")
        metrics.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(metrics.name)) from None


def metrics_lines(out):
    """The lines of out/metrics.jsonl, line i of step i, up to the first that is missing or damaged."""
    lines = []
    with suppress(OSError, ValueError, OverflowError, RecursionError):
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
            row = json.loads(line)
            if not (isinstance(row, dict) and {"loss", "ce", "budget", "skipped"} <= row.keys()
                    and all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
                    and row.get("step") == len(lines)):
                break
            lines.append(line)
    return lines


def plot_metrics(out, name="metrics.png"):
    """out/metrics.jsonl as curves."""
    plt = pyplot()
    if plt is None:
        return
    rows = [{**r, "kept": 1 - r["skipped"], "cross-entropy": r["ce"]} for r in map(json.loads, metrics_lines(out))]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    dots, line = dict(linewidth=0, marker=".", markersize=3), dict(linewidth=1)
    for axis, keys, title, style in zip(axes, (("loss", "cross-entropy"), ("gate_mean",), ("budget", "kept")),
                                        ("loss", "mean gate", "budget, and share of pairs kept"), (line, line, dots)):
        for key in keys:
            axis.plot([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r],
                      label=key.replace("_", " "), **style)
        axis.set(xlabel="step", title=title)
        axis.legend()
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_yscale("log")
    write_figure(out / name, figure)
