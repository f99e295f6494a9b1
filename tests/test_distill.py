"""Tests of distill.py: the divergence against a formula, and what --teacher does to a run.
"""
import numpy as np
import pytest
import torch

from console import InputError
from distill import kl_divergence, open_teacher
from load_weights import load_model, load_tokenizer, save_model
from toy_runs import FLAGS, Killed, at_step, folder, kill, metrics, run, same_bits, state, toy, undisturbed

TAUGHT = FLAGS | dict(schedule="uniform", budget_end=0.7, gate="scalar", threshold="global", grad_accum=2,
                      distill_weight=0.25)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another model with the same tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    model, tokenizer = toy(path)
    save_model(model, path, tokenizer)
    return path


def test_the_divergence_by_a_formula(folder, teacher):
    """The two sides swapped, a mean for the sum, padding or other places counted, gradients into the teacher."""
    model, other = load_model(folder).double(), load_model(teacher).double()
    ids, valid = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[True] * 4, [True, True, False, False]])
    places = torch.tensor([1, 2, 4])                                                             # of b * S + s
    logits, _ = model(ids, valid=valid, places=places)
    got = kl_divergence(other, logits, ids, valid, places)
    want = 0.0
    for b, s, n in ((0, 1, 4), (0, 2, 4), (1, 0, 2)):
        p, q = (m(ids[b:b + 1, :n])[0][0, s].softmax(-1).detach().numpy() for m in (other, model))
        want += float((p * (np.log(p) - np.log(q))).sum())
    assert got.item() == pytest.approx(want, rel=1e-5) and want > 1e-3
    got.backward()
    assert all(p.grad is None for p in other.parameters())
    assert model.model["embed_tokens"].weight.grad.abs().sum() > 0
    assert abs(kl_divergence(model, logits, ids, valid, places).item()) < 1e-7


def test_the_loss_of_a_run(folder, teacher, tmp_path):
    """alpha on the wrong side, KL per sequence in place of per answer token: --grad-accum would change the loss."""
    flags = TAUGHT | dict(steps=1, gate="none", threshold="branch", batch_size=4, grad_accum=1)
    assert run(folder, tmp_path / "a", teacher=teacher, **flags) == 0
    assert run(folder, tmp_path / "b", teacher=teacher, **flags | dict(batch_size=2, grad_accum=2)) == 0
    (a,), (b,) = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a["loss"] == pytest.approx(0.75 * a["ce"] + 0.25 * a["kl"], rel=1e-6)
    assert {key: b[key] for key in ("loss", "ce", "kl")} == pytest.approx(
        {key: a[key] for key in ("loss", "ce", "kl")}, rel=1e-5)
    assert run(folder, tmp_path / "self", teacher=folder, **flags | dict(distill_weight=1.0)) == 0
    assert abs(metrics(tmp_path / "self")[0]["loss"]) < 1e-6 and metrics(tmp_path / "self")[0]["ce"] > 1
    assert run(folder, tmp_path / "alone", **{k: v for k, v in flags.items() if k != "distill_weight"}) == 0
    assert "kl" not in metrics(tmp_path / "alone")[0]


@pytest.mark.parametrize("whose, cause", [("the model's", "lower --lr"), ("the teacher's", "look at --teacher")])
def test_whose_loss_is_not_finite(folder, teacher, tmp_path, monkeypatch, whose, cause):
    """The teacher blamed for a model that diverged: its divergence from the teacher is not finite either."""
    import train
    real = train.kl_divergence
    monkeypatch.setattr(train, "kl_divergence", lambda *args: real(*args) * float("nan"))
    if whose == "the model's":
        monkeypatch.setattr(train.F, "cross_entropy", lambda logits, targets, **how: logits.sum() * float("nan"))
    with pytest.raises(InputError, match=cause):
        run(folder, tmp_path / "run", teacher=teacher, **TAUGHT | dict(steps=1))


def test_a_taught_run_resumes_bit_for_bit(folder, teacher, tmp_path, monkeypatch):
    """A teacher that is trained along, or drawn from the run's own random state."""
    assert run(folder, tmp_path / "unbroken", teacher=teacher, **TAUGHT) == 0
    at_step(monkeypatch, 3, kill)
    with pytest.raises(Killed):
        run(folder, tmp_path / "run", teacher=teacher, **TAUGHT)
    undisturbed(monkeypatch)
    with pytest.raises(InputError, match="--teacher None"):
        run(folder, tmp_path / "run", "--resume", **{k: v for k, v in TAUGHT.items() if k != "distill_weight"})
    assert run(folder, tmp_path / "run", "--resume", teacher=teacher, **TAUGHT) == 0
    a, b = state(tmp_path / "unbroken"), state(tmp_path / "run")
    same_bits(a, b)
    assert a["train"]["settings"]["digests"]["teacher"]


def test_a_teacher_that_was_replaced(folder, tmp_path):
    """A run that goes on under another teacher of the same name."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    save_model(model, tmp_path / "teacher", tokenizer)
    flags = TAUGHT | dict(steps=2, save_every=1, teacher=tmp_path / "teacher")
    assert run(folder, tmp_path / "run", **flags) == 0
    model.model["norm"].weight.data += 1
    save_model(model, tmp_path / "teacher", tokenizer)
    with pytest.raises(InputError, match="--teacher .* has changed since the run started"):
        run(folder, tmp_path / "run", "--resume", **flags)


def test_teachers_that_do_not_fit(folder, tmp_path):
    """Logits of one vocabulary held against those of another."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    wide, _ = toy(tmp_path / "wide", vocab_size=500)
    save_model(wide, tmp_path / "wide", tokenizer)
    with pytest.raises(InputError, match="500 logits against 482"):
        run(folder, tmp_path / "run", teacher=tmp_path / "wide", **TAUGHT)
    tokenizer.add_tokens(["<more>"])
    save_model(model, tmp_path / "other", tokenizer)
    with pytest.raises(InputError, match="its tokenizer is not the model's"):
        open_teacher(tmp_path / "other", model, load_tokenizer(folder), 160)
    short, tokenizer = toy(tmp_path / "short", max_position_embeddings=64)
    save_model(short, tmp_path / "short", tokenizer)
    with pytest.raises(InputError, match="--seq-len 160 exceeds the 64 positions of --teacher"):
        run(folder, tmp_path / "run", teacher=tmp_path / "short", **TAUGHT)
    with pytest.raises(InputError, match="--teacher is empty"):
        run(folder, tmp_path / "run", teacher="", **TAUGHT)
    with pytest.raises(InputError, match="gone"):
        run(folder, tmp_path / "run", teacher=tmp_path / "gone", **TAUGHT)
    with pytest.raises(InputError, match="nobody to learn from"):
        run(folder, tmp_path / "run", **TAUGHT)
    assert not (tmp_path / "run").exists()
