"""Is a gate's value the benefit of its branch? -dCE/dg against 2 lambda c g on held-out tokens: price.py's derivation.

    python paper/gate_value.py --model RUN [RUN2 ...] --limit 1000 --out runs/gate_value.png

Training's loss is CE (mean over answer tokens) + lambda sum c g^2 / P, over the P pairs of N tokens and 2L branches. So
a gate at its optimum has  benefit := -P dCE/dg = 2 lambda c g  (L2),  or lambda c  (L1). The benefit is taken twice:
  held      the other gates keep their values, as in training with --gate-detach
  followed  later gates read what this one lets through, and follow; what they then pay more is taken off
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, pyplot, run
from flags import Parser, add_machine_flags, real, whole

import torch
import torch.nn.functional as F

from branches import picture
from data import answer_places, collate, load_examples
from disk import write, write_figure
from gates import check_budget, sparsity_loss
from load_weights import model_digest
from opened import check_own, open_with_items, settings_of
from savings import branch_costs
from thresholds import chunks, make_policy

HOW, LINE = {"held": "#440154", "followed": "#35b779"}, ("slope", "pairs", "bins", "branches")


def measure(model, items, policy, weight, kind, costs):
    """Of items (ids, loss_mask): {"gate", "value" (2 lambda c g), "due" (what the benefit should be), "held",
    "followed": (2L, N) float64; "kept"; "problem" (N,)}. Of a vector gate the mean, and the sum of benefits."""
    pairs, answers = len(costs) * sum(len(ids) for ids, _ in items), sum(sum(mask[1:]) for _, mask in items)
    m, detach = {key: [] for key in ("gate", "kept", *HOW)}, model.config.gate.detach
    device = next(model.parameters()).device
    for chunk in chunks(items, length=lambda item: len(item[0])):
        input_ids, loss_mask, valid = (x.to(device) for x in collate(chunk))     # (B, S) each
        places, targets = answer_places(input_ids, loss_mask)
        for how in HOW:
            model.config.gate.detach = how == "held"             # no gate hears of another through its input
            logits, trace = model(input_ids, valid=valid, policy=policy, places=places, keep_gates=True)
            loss = F.cross_entropy(logits.double(), targets, reduction="sum") / answers          # its part of the CE
            penalty = weight * sparsity_loss(trace.gates, valid, kind, 1.0, costs) * len(costs) * valid.sum()
            slopes = torch.autograd.grad(pairs * loss + penalty, trace.gates)        # (B, S, H) or (B, S, 1) each
            m[how].append(-torch.stack([x.sum(-1)[valid] for x in slopes]).double().cpu())       # (2L, n)
        m["gate"].append(torch.stack(trace.scores)[:, valid].detach().double().cpu())
        m["kept"].append(torch.stack(trace.keep)[:, valid].cpu())
    model.config.gate.detach = detach
    m, c = {key: torch.cat(x, -1) for key, x in m.items()}, weight * torch.tensor(costs, dtype=torch.float64)[:, None]
    due = 2 * c * m["gate"] if kind == "l2" else c.expand_as(m["gate"])          # is no part of the benefit: taken out
    return m | {"value": 2 * c * m["gate"], "due": due, **{how: m[how] + due for how in HOW},
                "problem": torch.arange(len(items)).repeat_interleave(torch.tensor([len(ids) for ids, _ in items]))}


def correlations(x, y):
    """[Pearson's, Spearman's]: the latter is Pearson's of the ranks, where equals share their mean rank."""
    ranks = lambda v: sum(torch.searchsorted(v.msort(), v.clone(), right=end) for end in (False, True)).double()
    return [torch.corrcoef(torch.stack(two))[0, 1].item() for two in ((x, y), (ranks(x), ranks(y)))]


def mean_of(y, weights, problem):
    """[weighted mean, its standard error over problems, whose pairs are not independent]."""
    mean = (y * weights).sum() / weights.sum()
    return [mean.item(), (problem.bincount((y - mean) * weights).norm() / weights.sum()).item()]


def compare(m, how):
    """Of pairs that run: correlations of benefit and value over "pairs", 20 "bins" of as many, "branches" (there a pair
    weighs g (1 - g), as in a bias); "slope" of benefit on due; "points" (branch, value, due, benefit, error)."""
    gate, value, due, benefit, problem = (m[key].expand_as(m["kept"])[m["kept"]] for key in
                                          ("gate", "value", "due", how, "problem"))
    branch, points = torch.where(m["kept"])[0], {}
    for name, groups, w in (("bins", value.argsort().tensor_split(20), torch.ones_like(gate)),
                            ("branches", [torch.where(branch == b)[0] for b in branch.unique()], gate * (1 - gate))):
        points[name] = [[int(branch[i[0]]), *(mean_of(x[i], w[i], problem[i])[0] for x in (value, due)),
                         *mean_of(benefit[i], w[i], problem[i])] for i in groups if len(i)]
    return {"slope": mean_of(benefit / due, due ** 2, problem), "pairs": correlations(value, benefit)} | {
        name: correlations(*torch.DoubleTensor(x).T[[1, 3]]) for name, x in points.items()} | {"points": points}


def draw(rows, path):
    figure, axes = pyplot().subplots(len(rows), 2, figsize=(11, 4.4 * len(rows)), layout="constrained", squeeze=False)
    for (left, right), (r, m) in zip(axes, rows):
        left.plot(*(m[key][m["kept"]][::53] for key in ("value", "held")), ",", color="#999999")         # some of them
        for how, colour in HOW.items():
            bins, by = r[how]["points"].values()
            for axis, marker, name, points in ((left, "o", "20 bins of pairs", bins),
                                               (right, "o", "attention", [p for p in by if p[0] % 2 == 0]),
                                               (right, "s", "MLP", [p for p in by if p[0] % 2 == 1])):
                if not points:                                   # --without them all
                    continue
                _, value, due, benefit, error = zip(*points)
                axis.plot(value, due, "_", color="#e07b00", ms=12, label="as derived" * (how + marker == "heldo"))
                axis.errorbar(value, benefit, error, color=colour, ls="", marker=marker, label=f"{name}, {how}")
                axis.set(xscale="log", xlabel="2 λ c g, nats", ylabel="benefit, −P ∂CE/∂g, nats", title=r["title"])
                axis.set_yscale("symlog", linthresh=0.1)
                axis.legend(fontsize=7, framealpha=0.6)
    write_figure(path, figure)


RECORDED = ("sparsity_weight", "sparsity_loss", "sparsity_cost")


def case(args, i, where):
    """(title, seed, what `measure` is given) of the i-th run. where: device and dtype. InputError for a model without
    gates, or without a known price of its branches."""
    name = args.model[i]
    model, _, items, _ = open_with_items(name, load_examples(args.data, "test", args.limit), 0, None, *where)
    if model.config.gate is None:
        raise InputError(f"--model {name} has no gates: give a model that was trained with them")
    known = settings_of(model)
    if known.get("sparsity_weight_end") is not None:             # what lambda has fallen to
        known["sparsity_weight"] = known["sparsity_weight_end"]
    weight, loss, cost = (x[i % len(x)] for x in (vars(args)[key] or [known.get(key)] for key in RECORDED))
    fits = {"weight": type(weight) in (int, float) and 0 < weight < float("inf"), "loss": loss in ("l2", "l1"),
            "cost": cost in (None, "equal", "macs")}             # older versions knew equal costs only
    if lack := ", ".join(f"--sparsity-{flag}" for flag, good in fits.items() if not good):
        raise InputError(f"{name}: {lack}: not recorded, or no price can be made of it: give it")
    costs = branch_costs(model.config) if cost == "macs" else [1.0] * 2 * model.config.num_hidden_layers
    if beyond := [b for b in args.without if b >= len(costs)]:
        raise InputError(f"--without {beyond[0]}: {name} has branches 0 to {len(costs) - 1}")
    policy = make_policy(model.config, "frozen", args.budget)
    title = f"{Path(name).name}: {loss}, λ {weight:g}, costs {cost or 'equal'}"
    return title, known.get("seed"), (model, items, policy, weight, loss, costs)


def main(argv=None):
    p = Parser("What a gate's value says of its branch: -dCE/dg against 2 lambda c g.")
    add, several = p.add_argument, dict(nargs="+", help="of all runs, or of each; default: as recorded")
    add("--model", nargs="+", required=True, help="gated models: folders or runs")
    add("--data", default="arithmetic", help="arithmetic (its test problems), or a file that was not trained on")
    add("--limit", type=whole(1), default=1000, help="problems")
    add("--budget", type=check_budget, default=1.0, help="below 1: under each run's frozen thresholds")
    add("--without", type=whole(0), nargs="+", default=[], metavar="BRANCH", help="2 x layer, its MLP + 1: left out")
    add("--out", type=picture, required=True, metavar="PNG", help="the numbers go beside it, as .json")
    add("--sparsity-weight", type=real(0.0, above=True), **several)
    add("--sparsity-loss", choices=("l2", "l1"), **several)
    add("--sparsity-cost", choices=("equal", "macs"), **several)
    add_machine_flags(p)
    args, rows = p.parse_args(argv), []
    check_own("--out", file := args.out and Path(args.out).with_suffix(".json"), "command", "runs")
    for key in RECORDED:
        if (n := len(vars(args)[key] or [0])) not in (1, len(args.model)):
            raise InputError(f"--{key.replace('_', '-')}: {n} values, {len(args.model)} runs: give one, or one per run")
    where = pick_device(args.device, args.dtype)
    for i in range(1, len(args.model)):                          # what is wrong with a later one is said before the
        case(args, i, where)                                     # first's work
    for i, name in enumerate(args.model):
        title, seed, given = case(args, i, where)
        m = measure(*given)
        m["kept"][args.without] = False
        if m["kept"].any(1).sum() < 2:
            raise InputError(f"{name}: nothing runs, or one branch: give a larger --budget, or leave out less")
        r = {"title": title, "seed": seed, "digest": model_digest(given[0].source), "gate": m["gate"].mean().item(),
             "run": m["kept"].double().mean().item(), **{how: compare(m, how) for how in HOW}}
        if not torch.tensor([x for how in HOW for key in LINE for x in r[how][key]]).isfinite().all():
            raise InputError(f"{name}: no number comes of it: give another --sparsity-weight")
        rows.append((r, m))
        for how in HOW:
            print("{}, {}: slope {:.2f} ± {:.2f}; r, rho of pairs {:.2f} {:.2f}, bins {:.2f} {:.2f}, branches {:.2f} "
                  "{:.2f}".format(r["title"], how, *(x for key in LINE for x in r[how][key])))
    numbers = {"command": " ".join(["python", *sys.argv]), **vars(args), "runs": [r for r, _ in rows]}
    draw(rows, args.out)
    write(file, json.dumps(numbers, indent=1))
    print(f"written: {args.out}, and the numbers beside it")
    return 0


if __name__ == "__main__":
    run(main)
