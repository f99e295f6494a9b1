"""Text that a model writes itself (data.py --write-with MODEL): gates can learn on it without any data set.

A text starts from the model's own first token, or from a prompt of --prompts, and ends where the model ends it, or
after --max-new-tokens. Out comes a file for --data, one row per text, decoded without special tokens:

    {"text": ...}                      prompt and continuation; "cut": true where the model had not ended it
    {"question": ..., "answer": ...}   where the prompt is a question: the loss will cover what the model wrote only

Training puts an end behind cut texts too. Left out: empty texts, and answers without their end or "#### 72".
FILE.state/ tells how far the file is: the same command goes on there, after a kill too, to the same bytes.
"""
import hashlib
import json
import random
import time
from collections import Counter
from pathlib import Path

from console import InputError, pick_device, run

import torch
from tqdm import tqdm

from data import load_examples, parse_args, prompt_text
from disk import only_one, sync, write
from generate import Sampling, generate
from load_weights import check_fit, load_model, load_tokenizer, model_digest, read_json
from tokens import continuation, encode


def bos_of(model):
    """[id]: the bos_token_id of generation_config.json or config.json. InputError if there is none."""
    configs = json.loads(model.side_files.get("generation_config.json", b"{}")), model.raw_config
    bos = [config["bos_token_id"] for config in configs if type(config.get("bos_token_id")) is int][:1]
    if not bos or not 0 <= bos[0] < model.config.vocab_size:
        raise InputError(f"{model.source} has no bos_token_id for a text to start from: give --prompts")
    return bos


def row_of(start, text, ended):
    """The row of what the model wrote after `start`, an Example or a str; None where it is of no use."""
    if isinstance(start, str):
        return {"text": start + text} | ({} if ended else {"cut": True}) if text.strip() else None
    _, mark, answer = text.rpartition("####")
    return {"question": start.question, "answer": text.strip()} if ended and mark and answer.strip() else None


def progress_of(path, state, settings, overwrite):
    """How far the file is, a dict. InputError where it is of other settings, not ours, or no longer what we wrote."""
    if overwrite or not path.exists():
        return {"settings": settings, "counts": {}, "sha256": hashlib.sha256().hexdigest()}
    way_out = "choose another --out, or --overwrite it"
    if not state.is_file():
        raise InputError(f"--out {path} is there, but not {state}, which would tell how it was written: {way_out}")
    try:
        progress = read_json(state)
        was, counts, digest = (progress[key] for key in ("settings", "counts", "sha256"))
        size, drawn, texts, tokens, ended = (counts.get(key, 0) for key in "bytes drawn texts tokens ended".split())
        if not (len(digest) == 64 and all(isinstance(n, int) and n >= 0 for n in counts.values())
                and len(counts) in (0, 5) and max(texts, ended) <= drawn <= min(was["n"], tokens) and texts <= size):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--out {path}: {state} is damaged: {way_out}") from None
    if changed := [f"{key} {was.get(key)}, now {now}" for key, now in settings.items() if was.get(key) != now]:
        raise InputError(f"--out {path} was begun with other settings ({'; '.join(changed)}): {way_out}")
    content, torn = path.read_bytes(), min(settings["batch_size"], settings["n"] - drawn)        # lines at most
    if hashlib.sha256(content[:size]).hexdigest() != digest or len(content[size:].splitlines()) > torn:
        raise InputError(f"--out {path} is no longer what was written there: {way_out}")
    return progress


def write_texts(path, state, progress, model, tokenizer, starts, args):
    """Append the texts that the file lacks, batch by batch; returns the counts. starts: (ids, Example or str), ..."""
    counts, eos_ids = Counter(progress["counts"]), set(model.config.eos_ids)
    total = hashlib.sha256(path.read_bytes()[:counts["bytes"]] if path.exists() else b"")
    for first in tqdm(range(counts["drawn"], args.n, args.batch_size), desc=path.name):
        batch = [starts[i % len(starts)] for i in range(first, min(first + args.batch_size, args.n))]
        seed = random.Random(f"{args.seed} {first}").getrandbits(63)             # of this batch, whatever came before
        draw = Sampling(args.temperature, generator=torch.Generator(model.lm_head.weight.device).manual_seed(seed))
        written = generate(model, [ids for ids, _ in batch], args.max_new_tokens, None, eos_ids, draw).tokens
        lines = b""
        for (ids, start), new in zip(batch, written):
            ended = new[-1] in eos_ids
            row = row_of(start, continuation(tokenizer, ids, new[:-1] if ended else new), ended)
            lines += (json.dumps(row, ensure_ascii=False) + "\n").encode() if row else b""
            counts.update(drawn=1, texts=int(row is not None), tokens=len(new), ended=int(ended))
        if first == 0:                                           # an old file is there until now. Without a file the
            path.resolve().unlink(missing_ok=True)               # state counts for nothing: a kill in between leaves
            sync(path.resolve().parent)                          # the old file and its state, or a fresh start
            write(state, json.dumps(progress))
        with open(path, "r+b" if first else "wb") as file:
            file.seek(file.truncate(counts["bytes"]))            # without the rows of a batch that was not finished
            counts["bytes"] += file.write(lines)
        total.update(lines)
        sync(path)
        write(state, json.dumps(progress | {"counts": counts, "sha256": total.hexdigest()}))
    return counts


def main(argv=None):
    args = parse_args(argv)
    path, state = Path(args.out or ""), Path(f"{args.out}.state", "progress.json")
    if (path.suffix != ".jsonl" or path.exists() and not path.is_file() or not path.parent.is_dir()
            or path.resolve() == Path(args.prompts or "").resolve()):
        raise InputError(f"--out {args.out}: --write-with needs a .jsonl file in a folder: no pipe, and not --prompts")
    examples = load_examples(args.prompts, "train", args.n, args.seed) if args.prompts is not None else [""]
    device, dtype = pick_device(args.device, args.dtype)
    model, tokenizer = load_model(args.write_with, device=device, dtype=dtype), load_tokenizer(args.write_with)
    check_fit(model, tokenizer)
    starts = [(encode(tokenizer, e if isinstance(e, str) else prompt_text(e.question)) or bos_of(model), e)
              for e in examples]
    if args.max_new_tokens > (room := max(0, model.config.max_position_embeddings - max(len(s[0]) for s in starts))):
        raise InputError(f"--max-new-tokens {args.max_new_tokens}: the longest prompt leaves the model room for {room}")
    settings = {key: vars(args)[key] for key in ("n", "max_new_tokens", "batch_size", "seed", "temperature", "dtype")}
    settings |= {"device": device.type, "model": model_digest(model.source),
                 "prompts": hashlib.sha256(repr(starts).encode()).hexdigest()[:16]}
    try:
        with only_one(state.parent):
            progress, started = progress_of(path, state, settings, args.overwrite), time.monotonic()
            counts = write_texts(path, state, progress, model, tokenizer, starts, args)
    except OSError as error:                                     # of a full disk: it names no file
        raise InputError(f"--out {path}: {error.strerror}: with that mended, the same command goes on") from None
    speed = (counts["tokens"] - progress["counts"].get("tokens", 0)) / (time.monotonic() - started)
    left_out = f", {args.n - counts['texts']} of no use left out" * (counts["texts"] < args.n)
    done = "already complete" if counts == progress["counts"] else "written"
    print(f"{done}: {path}: {counts['texts']} texts{left_out}; "
          f"{counts['tokens']:,} tokens, {speed:.0f} tokens/s; {counts['ended']} of {args.n} ended by the model")
    return 0


if __name__ == "__main__":
    run(main, interrupted="interrupted: the same command goes on (without --overwrite)")
