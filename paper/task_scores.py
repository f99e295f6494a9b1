"""One benchmark at one budget: what the model reads of its questions, and the score of each.

Log-likelihoods of choices, last words and whole texts, by score.py; generated answers; then the figures of a task with
their standard errors. evaluate.py is the command.
"""
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError

from tqdm import tqdm

from generate import generate
from score import encode_pair, log_likelihoods
from tasks import extract
from tokens import decode, encode


def score_choices(task, docs, answers):
    """acc: the likeliest choice is right (the first of equals); acc_norm: the likeliest per character."""
    first = lambda values: max(range(len(values)), key=values.__getitem__)
    metrics = {"acc": [], "acc_norm": []} if task.norm else {"acc": []}
    for doc, found in zip(docs, answers):
        scores = [score for score, _ in found]
        metrics["acc"].append(float(first(scores) == doc.gold))
        if task.norm:
            per = [score / (len(rest) - 1) for score, (_, rest) in zip(scores, doc.pairs)]       # without the space
            metrics["acc_norm"].append(float(first(per) == doc.gold))
    return metrics


def windows(ids, before, most):
    """Cut a text's ids into (context, continuation) so that each is scored once, behind up to `most` ids in all."""
    found = [([before], ids[:most])]
    for start in range(most, len(ids), most):                    # the last is short, and sees all that fits before it
        end = min(start + most, len(ids))
        found.append((ids[end - most - 1:start], ids[start:end]))
    return found


def asked_of(model, tokenizer, task, docs, args):
    """(what the model reads: per question its (context, continuation) ids, or the ids of its prompt; in how many pairs
    a token straddled the border). InputError, with the number of the question, for what it has no positions for."""
    most, bos = model.config.max_position_embeddings, args.bos_id if args.bos else None
    before, found = args.bos_id if args.bos_id is not None else next(iter(model.config.eos_ids), None), []
    straddled = 0
    for number, doc in enumerate(docs, 1):
        if task.kind == "answer":
            ids = encode(tokenizer, doc.prompt)
            found.append(ids if bos is None or ids[:1] == [bos] else [bos] + ids)
            if len(found[-1]) + args.max_new_tokens > most:
                raise InputError(f"{task.rows}, question {number}: {len(found[-1])} tokens and --max-new-tokens "
                                 f"{args.max_new_tokens} exceed the model's {most} positions: lower it, or --limit")
        elif task.kind == "text":
            found.append(windows(encode(tokenizer, doc.pairs[0][1], front=False), before, most))
        else:
            pairs = [encode_pair(tokenizer, *pair, bos=bos) for pair in doc.pairs]
            if max(len(rest) for _, rest, _ in pairs) > most:
                raise InputError(f"{task.rows}, question {number}: a choice has more tokens than the model's {most} "
                                 "positions: lower --limit to leave it out")
            found.append([(context or [before], rest) for context, rest, _ in pairs])
            straddled += sum(straddles for _, _, straddles in pairs)
        if before is None:
            raise InputError("the model names neither a bos_token_id nor an end token for a text to start from")
    return found, straddled


def log_scores(model, task, docs, questions, policy, args, savings):
    """(metrics, what each question scored: lists of log-likelihoods) of a task without generation."""
    found = log_likelihoods(model, policy, questions, args.batch_size, savings)
    sums = [[score for score, _ in mine] for mine in found]
    if task.kind == "choice":
        return score_choices(task, docs, found), sums
    if task.kind == "word":
        return {"acc": [float(greedy) for ((_, greedy),) in found], "log_likelihood": [mine[0] for mine in sums]}, sums
    return {"log_likelihood": [sum(mine) for mine in sums], "tokens": [sum(len(r) for _, r in q) for q in questions],
            "words": [len(re.split(r"\s+", doc.size)) for doc in docs],
            "bytes": [len(doc.size.encode()) for doc in docs]}, sums


def written(model, tokenizer, prompts, room, policy, stops, savings):
    """Continue prompts (lists of ids) greedily -> their texts, cut at the first stop string, where a text leaves its
    batch: what would come behind is neither ranked nor counted."""
    ends, new = set(model.config.eos_ids), [[] for _ in prompts]

    def met(i, token):
        new[i].append(token)
        return any(stop in decode(tokenizer, new[i], special=True) for stop in stops)

    savings += generate(model, prompts, room, policy, ends, on_token=met).savings
    texts = [decode(tokenizer, [token for token in ids if token not in ends], special=True) for ids in new]
    return [re.split("|".join(map(re.escape, stops)), text)[0] for text in texts]


def generated_scores(model, tokenizer, task, docs, prompts, policy, args, savings):
    """(metrics, texts) of a generative task, longest prompts first, in batches of --batch-size."""
    order, texts = sorted(range(len(docs)), key=lambda i: (-len(prompts[i]), i)), [None] * len(docs)
    for start in tqdm(range(0, len(order), args.batch_size), desc="answers", leave=False):
        batch = order[start:start + args.batch_size]
        for i, text in zip(batch, written(model, tokenizer, [prompts[i] for i in batch], args.max_new_tokens, policy,
                                          task.stops, savings)):
            texts[i] = text
    if task.bleu:
        return {}, texts
    strict, loose = ([extract(text, pattern, last) for text in texts]
                     for pattern, last in ((task.strict, False), (task.loose, True)))
    right = lambda found: [float(answer == doc.gold) for answer, doc in zip(found, docs)]
    return {"acc": right(strict), "flexible": right(loose),
            "invalid": [float(answer == "[invalid]") for answer in strict]}, texts


def exp(x):
    return math.exp(x) if x < 700 else math.inf


def summary(task, docs, metrics, texts):
    """{metric: value, "..._stderr": its standard error (sample deviation over root n)} from values per question."""
    out, n = {}, len(docs)
    for name in ("acc", "acc_norm", "flexible", "invalid"):
        if name in metrics:
            mean = sum(metrics[name]) / n
            out[name] = mean
            out[f"{name}_stderr"] = (sum((x - mean) ** 2 for x in metrics[name]) / max(n - 1, 1) / n) ** 0.5
    total = sum(metrics.get("log_likelihood", ()))
    if task.kind == "word":
        out["perplexity"] = exp(-total / n)                      # of a word, not of a token
    if task.kind == "text":
        out |= {f"{unit}_perplexity": exp(-total / sum(metrics[f"{unit}s"])) for unit in ("token", "word", "byte")}
    if task.bleu:
        out["bleu"] = bleu(texts, [doc.gold for doc in docs])
    return out


def bleu(texts, references):
    """Corpus BLEU, 0 to 100. InputError without sacrebleu."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        raise InputError("BLEU needs sacrebleu: pip install sacrebleu") from None
    return corpus_bleu(texts, [references]).score
