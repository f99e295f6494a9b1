"""Tests of paper/early_exit.py: the loop in which a token may stop, against the core's own forward pass."""
import sys

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import (both_ways, build, families, given, gradients, in_float32, llama, mixed, new_cache, padding, same,
                      same_masks, tokens)
from console import InputError
from gates import GateConfig, SkipPolicy
from generate import generate
from savings import count_macs, macs_of
from toy_runs import ROOT, folder, run, same_bits, state

sys.path.insert(0, str(ROOT / "paper"))
from early_exit import EarlyExit, early, training, unembed


class Sign(EarlyExit):
    """Leaves where a block has lowered channel 5: a token's own affair, about half of them at each block."""

    def leaves(self, layer, h, before, active):
        return (h - before)[..., 5] < 0, active.sum() * 7


class Second(Sign):
    """And everybody passes the second block by."""

    def sits_out(self, layer, valid):
        return valid if layer == 1 else None


def models(family, kind=Sign):
    """The same weights as the core's and as an early exit's."""
    return build(family(None)), early(build(family(None)), kind)


@families
@both_ways
@pytest.mark.parametrize("lengths", [None, (9, 4, 6)], ids=["whole", "padded"])
def test_nobody_leaves_and_it_is_the_core(family, compute, lengths):
    """A block left out, a final norm or softcap forgotten, other keys and values, padding that is looked at."""
    (dense, model), ids = models(family, EarlyExit), tokens(3, 9)
    valid, caches = lengths and padding(lengths, 9), [new_cache(dense, 3, 12) for _ in range(2)]
    for width in (9, 1):                                         # a prompt, then a step on its cache
        (a, of_core), (b, trace) = (m(ids[:, :width], valid=valid, cache=cache, compute=compute)
                                    for m, cache in zip((dense, model), caches))
        assert torch.equal(a, b) and all(map(torch.equal, caches[0].k + caches[0].v, caches[1].k + caches[1].v))
        assert macs_of(dense.config, of_core) == macs_of(dense.config, trace) and trace.scores is trace.gates is None
        valid = None


@families
@pytest.mark.parametrize("kind", [Sign, Second])
def test_whoever_left_is_skipped_by_the_core(family, kind):
    """States that go on changing, K and V of another state than the last, tokens that come back; that a block passed
    by once is not passed by for ever."""
    (dense, model), ids, valid = models(family, kind), tokens(3, 11), padding((11, 5, 8), 11)
    logits, trace = model(ids, valid=valid)
    mixed(trace.keep, valid)
    expected, _ = dense(ids, valid=valid, policy=given(trace.keep, SkipPolicy(kv="dense")))
    same(logits[valid], expected[valid])
    same_masks(trace.keep[0::2], trace.keep[1::2])               # attention and MLP leave together
    there = [keep for layer, keep in enumerate(trace.keep[0::2]) if not (kind is Second and layer == 1)]
    assert all((later <= sooner).all() for sooner, later in zip(there, there[1:])) and (there[-1] < there[-2]).any()
    if kind is Second:
        assert not trace.keep[2].any() and there[1].any()


@families
@pytest.mark.parametrize("kind", [Sign, Second])
def test_compact_is_masked(family, kind):
    """Rows gathered for one block and written back to another's places; K and V of those who left not computed."""
    (_, model), ids, valid = models(family, kind), tokens(3, 11), padding((11, 5, 8), 11)
    caches = [new_cache(model, 3, 11) for _ in range(2)]
    (a, masked), (b, compact) = (model(ids, valid=valid, cache=cache, compute=compute)
                                 for cache, compute in zip(caches, ("masked", "compact")))
    same_masks(masked.keep, compact.keep)
    same(a[valid], b[valid])
    for x, y in zip(caches[0].k + caches[0].v, caches[1].k + caches[1].v):
        same(x, y)


@families
@both_ways
def test_a_batch_mate_changes_nothing(family, compute):
    """Decisions, positions or logits that depend on left padding or on others."""
    (_, model), ids, lengths = models(family), tokens(3, 11), (11, 5, 8)
    logits, trace = model(ids, valid=padding(lengths, 11), compute=compute)
    for row, n in enumerate(lengths):
        alone, own = model(ids[row:row + 1, -n:], compute=compute)
        same(alone[0], logits[row, -n:])
        same_masks([keep[0] for keep in own.keep], [keep[row, -n:] for keep in trace.keep])


@families
@pytest.mark.parametrize("kind", [Sign, Second])
def test_step_by_step_is_one_pass(family, kind):
    """What left early lacks K and V above, or has those of another position; in float32, too."""
    (_, model), ids = models(family, kind), tokens(2, 10)
    for model, tolerance in ((model, 1e-9), (in_float32(model), 1e-5)):
        whole, trace = model(ids)
        cache, steps = new_cache(model, 2, 10), []
        for i in range(10):
            logits, own = model(ids[:, i:i + 1], cache=cache, compute="compact")
            steps.append(logits)
            same_masks([keep[:, i:i + 1] for keep in trace.keep], own.keep)
        same(torch.cat(steps, 1), whole, tolerance)


@families
def test_one_pass_decides_as_the_generation_did(family):
    """generate.py, which knows nothing of exits: its batches, its padding, sequences that end and leave the batch."""
    (_, model), prompts = models(family), [tokens(1, n, seed=n)[0].tolist() for n in (7, 3, 5)]
    ends = {generate(model, prompts[:1], 4).tokens[0][2]}        # the first one's third new token
    result = generate(model, prompts, 9, SkipPolicy(), ends)
    assert len(result.tokens[0]) <= 3 < max(map(len, result.tokens)) and len(set(sum(result.ran, []))) > 2
    for prompt, new, ran in zip(prompts, result.tokens, result.ran):
        logits, trace = model(torch.tensor([prompt + new[:-1]]))
        assert logits[0, len(prompt) - 1:].argmax(-1).tolist() == new
        assert torch.stack(trace.keep).float().mean(0)[0].tolist() == ran


def test_logits_of_some_places_only():
    """Places of another order, or the state of the last block in place of the last that ran."""
    (_, model), ids = models(llama), tokens(2, 6)
    whole, places = model(ids)[0], torch.tensor([9, 2, 3])
    same(model(ids, last=True)[0], whole[:, -1])
    some, trace = model(ids, places=places)
    same(some, whole.flatten(0, 1)[places])
    assert trace.logit_rows == 3


def test_a_question_is_paid_for():
    """What leaving costs to decide that no table counts; a question after the last block, where nobody can leave."""
    (_, model), ids = models(llama), tokens(2, 6)
    _, trace = model(ids)
    assert trace.more_macs == 7 * sum(keep.sum() for keep in trace.keep[0:6:2])              # at 3 of 4 blocks
    counted = count_macs(model.config, torch.stack(trace.keep), trace.valid, keys=6, logit_rows=12, kv="dense")
    assert macs_of(model.config, trace) == counted + trace.more_macs


@families
def test_states_of_a_training_step(family):
    """A state that is missing or counted twice; states that stay in memory at inference; blocks that are recomputed
    under other decisions."""
    (dense, model), ids, places = models(family), tokens(2, 6), torch.tensor([1, 8])
    model(ids)
    assert model.states == []
    out, grads = [], []
    for checkpointed in (False, True):
        logits, _ = model.train()(ids, places=places, checkpoint_blocks=checkpointed)
        assert model.places is places and len(model.states) == 5
        out.append(model.states)
        grads.append(gradients(model, logits, torch.linspace(-1, 1, logits.numel()).view_as(logits)))
    for a, b in zip(*out):
        assert torch.equal(a, b)
    same_bits(*grads)
    same(out[0][0], dense.begin(ids)[0])
    same(unembed(model, out[0][-1]).flatten(0, 1)[places], logits)


def test_training_without_a_change_is_train(folder, tmp_path):
    """A loss over other places, or scaled by another count; an optimizer, data or a last table that differ; what is
    patched and stays so."""
    before, steps, kinds = (train.open_model, train.budget_at, train.F), [], set()
    flags, held = dict(gate="none", grad_accum=2, eval_limit=2), []
    assert run(folder, tmp_path / "plain", **flags) == 0

    def loss(model, targets):
        steps.append((model.step, model.steps))
        kinds.add(type(model))
        held.append(model)
        h = model.states[-1].flatten(0, 1)[model.places]
        return F.cross_entropy(unembed(model, h).float(), targets, reduction="sum")

    class Named(EarlyExit):
        name = None

    with training(loss, Named, name="x"):
        assert run(folder, tmp_path / "early", **flags) == 0
    assert held and not any(model.states for model in held)      # (L + 1, B, S, H) that outlive their step
    same_bits(state(tmp_path / "plain"), state(tmp_path / "early"))
    assert steps == [(step, 6) for step in range(6) for _ in range(2)] and kinds == {Named}
    assert (train.open_model, train.budget_at, train.F) == before


def test_early_takes_the_model_as_it_is():
    """Weights that are copied, or a gated model of which the gates would be left out."""
    dense = build(llama(None))
    weight, model = dense.lm_head.weight, early(dense, Sign, threshold=3)
    assert model is dense and isinstance(model, Sign) and model.lm_head.weight is weight and model.threshold == 3
    with pytest.raises(InputError, match="--gate none"):
        early(build(llama(GateConfig())))
