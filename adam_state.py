"""A saved optimizer put back, once it is known to be this run's: load_state_dict compares nothing."""
import torch


def restore(optimizer, state, ranks=None):
    """Put the optimizer and the random state of a train_state back. ValueError, or what comes of other types, unless
    they are this optimizer's after state["step"] updates."""
    _check_fit(optimizer, state["optimizer"], state["step"])
    if ranks:                                                    # each keeps its part (shards.py)
        ranks.cut(optimizer, state["optimizer"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])


def _check_fit(optimizer, saved, step):
    pairs = list(zip(optimizer.param_groups, saved["param_groups"], strict=True))
    trained = [named for group, _ in pairs for named in zip(group["param_names"], group["params"])]
    places = [place for _, was in pairs for place in was["params"]]
    if not places == list(saved["state"]) == list(range(len(trained))) or any(
            was.get("param_names", group["param_names"]) != group["param_names"] for group, was in pairs):
        raise ValueError("it is of other parameters")            # older versions stored no names
    for group, was in pairs:
        for key in ("betas", "eps", "weight_decay", "amsgrad", "maximize"):
            if was[key] != group[key]:
                raise ValueError(f"{key} was {was[key]} and is {group[key]}")
    for (name, p), entry in zip(trained, saved["state"].values()):
        if entry["step"].item() != step:
            raise ValueError(f"{name} has had {entry['step'].item()} updates, not {step}")
        for key in ("exp_avg", "exp_avg_sq"):
            if (entry[key].shape, entry[key].dtype) != (p.shape, p.dtype):
                raise ValueError(f"{key} of {name} has another shape or dtype")
            low, high = (value.item() for value in entry[key].aminmax())
            if not -torch.inf < low <= high < torch.inf or key == "exp_avg_sq" and low < 0:
                raise ValueError(f"{key} of {name} reaches from {low} to {high}")
