"""A model of this project under the LM Evaluation Harness: its tasks, with token-wise skipping.

    python interop/lm_eval_adapter.py --model gateskip --model_args pretrained=runs/demo,budget=0.8 --tasks piqa

The file registers the model class "gateskip" and then is the harness's own command: every flag is the harness's.

Shapes: B rows of a batch, S tokens of the longest, N positions that are scored, V vocabulary.
"""
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from console import InputError, pick_device, run

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from flags import whole
from gates import check_budget
from generate import Sampling, generate
from load_weights import check_fit, load_model, load_tokenizer
from read_config import read_json
from savings import Savings, savings_line
from thresholds import make_policy
from tokens import chat_template, decode, encode

SELECTORS, DTYPES = ("frozen", "batch", "none"), ("float32", "bfloat16", "float64")


def count_of(name, value, most=math.inf):
    """A whole number from 1 to `most`; InputError, with the argument's name, for anything else."""
    try:
        return whole(1, most)(str(value))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def policy_of(model, selector, budget):
    """The SkipPolicy of these two arguments. InputError for what this model cannot do."""
    budget, table = check_budget(budget), model.config.gateskip.get("thresholds")
    lowest = min(map(float, table or [1.0]))
    if selector not in SELECTORS:
        raise InputError(f"selector={selector} is not one of {', '.join(SELECTORS)}")
    if budget < 1.0 and selector == "none":
        raise InputError(f"selector=none skips nothing and budget={budget} asks for it: leave one of them out")
    if budget < 1.0 and model.config.gate is None:
        raise InputError(f"budget={budget}: {model.source} has no gates to decide what to skip: leave budget out, or "
                         "train some with train.py")
    if budget < lowest and selector == "frozen":
        known = (f"thresholds only for budgets from {lowest} on: give such a budget" if table else
                 "no thresholds, which train.py measures at its end: let it finish")
        raise InputError(f"budget={budget}, selector=frozen: {model.source} has {known}, or selector=batch")
    return make_policy(model.config, selector, budget)


@register_model("gateskip")
class GateSkipLM(TemplateLM):
    """What the harness asks of a model: log-likelihoods of continuations and of texts, generated text, chat prompts.

    pretrained: a run's --out, a folder or a hub id. budget, selector: "frozen" reads the calibrated thresholds, so that
    no answer depends on the batch; "batch" is the paper's quantile of each batch, and its answers do; "none" skips
    nothing. batch_size: rows that run together. device, dtype: one of DTYPES. max_length: default, all positions of the
    model. add_bos_token: None, what the tokenizer does by itself; True or False, always or never a BOS in front.
    max_gen_toks: new tokens where a task does not say. InputError for each argument that this model cannot take.
    """

    def __init__(self, pretrained=None, budget=1.0, selector="frozen", batch_size=1, device=None, dtype="float32",
                 max_length=None, add_bos_token=None, max_gen_toks=256, **unknown):
        super().__init__()
        if unknown:
            raise InputError(f"model_args: {', '.join(unknown)} is no argument of gateskip, which takes pretrained, "
                             "budget, selector, batch_size, device, dtype, max_length, add_bos_token, max_gen_toks")
        if not pretrained:
            raise InputError("model_args: pretrained is missing: give pretrained=RUN")
        if batch_size == "auto":
            raise InputError("batch_size=auto is not known here: give a number")
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
        if add_bos_token not in (None, True, False):
            raise InputError(f"add_bos_token={add_bos_token} is neither True nor False")
        self.batch_size, self.max_gen_toks = count_of("batch_size", batch_size), count_of("max_gen_toks", max_gen_toks)
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None                                        # cuda:0 is the harness's default, GPU or not
        self._device, dtype = pick_device(device, dtype)
        self.model = load_model(str(pretrained), device=self._device, dtype=dtype)
        self.tokenizer = load_tokenizer(str(pretrained))
        check_fit(self.model, self.tokenizer)
        config, source = self.model.config, self.model.source
        self.policy, self.savings = policy_of(self.model, selector, budget), Savings(config)
        positions = config.max_position_embeddings
        self.max_length = count_of("max_length", positions if max_length is None else max_length, positions)
        self.settings = {}                                       # of the tokenizer
        if (source / "tokenizer_config.json").is_file():
            self.settings = read_json(source / "tokenizer_config.json")
        self.bos = self._special("bos_token", self.model.raw_config.get("bos_token_id"))
        self.eos = self._special("eos_token", next(iter(config.eos_ids), None))
        self.add_bos_token = add_bos_token
        if add_bos_token and self.bos is None:
            raise InputError(f"add_bos_token=True: {source} names no BOS: leave add_bos_token out")

    # Tokens. How a text is split into context and continuation is the harness's (TemplateLM._encode_pair).

    def _special(self, name, otherwise):
        """The id of the special token that tokenizer_config.json gives this name, or what config.json says."""
        token = self.settings.get(name) or ""
        number = self.tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
        return otherwise if number is None else number

    @property
    def eot_token_id(self):
        return self.eos

    @property
    def prefix_token_id(self):
        """What stands before a text that has nothing before it: BOS, or the end token of a model without one."""
        first = self.eos if self.bos is None else self.bos
        if first is None:
            raise InputError(f"{self.model.source} names neither a BOS nor an end token, and a task has a text with "
                             "nothing before it: name one in tokenizer_config.json")
        return first

    def tok_encode(self, string, add_special_tokens=None, **_):
        """str -> list[int]. None: a BOS as add_bos_token says, never a second one. False: nothing in front."""
        front = self.add_bos_token if add_special_tokens is None else add_special_tokens
        ids = encode(self.tokenizer, string, front=front is None)
        return [self.bos] + ids if front and ids[:1] != [self.bos] else ids

    @property
    def tokenizer_name(self):
        return str(self.model.source.resolve()).replace("/", "__")

    def chat_template(self, chat_template=False):
        """The source of the template, which the harness stores with the results."""
        if isinstance(chat_template, str):
            raise InputError(f"--apply_chat_template {chat_template}: only the default is read: leave its name out")
        source = self.model.side_files.get("chat_template.jinja", b"").decode() or self.settings.get("chat_template")
        return json.dumps(source) if isinstance(source, list) else source

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """[{"role": ..., "content": ...}, ...] -> the prompt. Without add_generation_prompt it ends with the words of
        the last message, the assistant's. A template that takes no system message, as Gemma's, is shown none."""
        cut = len(chat_history) if add_generation_prompt else -1
        said, words = chat_history[:cut], "".join(message["content"] for message in chat_history[cut:])
        try:
            return chat_template(self.model, said) + words
        except InputError as error:
            if said == (others := [message for message in said if message["role"] != "system"]):
                raise InputError(str(error).replace("--chat", "--apply_chat_template")) from None
        return self.apply_chat_template(others + chat_history[cut:], add_generation_prompt)

    # Log-likelihoods

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        """[((context, continuation) or None, context ids, continuation ids)] -> [(log-likelihood, is greedy)].

        Requests that read the same tokens, such as the letters A to D behind one question, are read once. What does
        not fit loses tokens on the left. InputError for a continuation without tokens, or longer than max_length.
        """
        rows, answers = {}, [None] * len(requests)               # {tokens that are read: numbers of requests}
        for i, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(f"a continuation of {len(continuation)} tokens cannot be scored with max_length="
                                 f"{self.max_length}: {texts!r:.200}")
            together = (context or [self.prefix_token_id]) + continuation
            rows.setdefault(tuple(together[-self.max_length - 1:-1]), []).append(i)
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        bar = tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm)
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start:start + self.batch_size]
            scored = [max(len(requests[i][2]) for i in rows[row]) for row in batch]
            for row, scores in zip(batch, self.log_probabilities(batch, scored)):
                for i in rows[row]:
                    target = torch.tensor(requests[i][2], device=scores.device)                 # (n,)
                    mine = scores[-len(target):]                                                # (n, V)
                    answers[i] = (mine.gather(1, target[:, None]).sum().item(),
                                  (mine.argmax(-1) == target).all().item())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(rows[row]))
        bar.close()
        return answers

    @torch.no_grad()
    def log_probabilities(self, batch, scored):
        """Rows of token ids, of any lengths, and how many positions at the end of each are wanted -> list of (n, V)."""
        longest, device = max(map(len, batch)), self._device
        ids = torch.tensor([[*row] + [0] * (longest - len(row)) for row in batch], device=device)            # (B, S)
        valid = torch.arange(longest, device=device) < torch.tensor([[len(row)] for row in batch], device=device)
        places = torch.cat([b * longest + torch.arange(len(row) - n, len(row), device=device)
                            for b, (row, n) in enumerate(zip(batch, scored))])                               # (N,)
        logits, trace = self.model(ids, valid=valid, policy=self.policy, compute="compact", places=places)   # (N, V)
        self.savings.add(trace)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).split(scored)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts; what is longer than max_length is read in windows, each token scored once."""
        windows, owners, totals = [], [], [0.0] * len(requests)
        for i, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += score
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # Generated text

    def generate_until(self, requests, disable_tqdm=False):
        """The texts that continue each context until a stop string, an end token or max_gen_toks new tokens."""
        ordered = Collator([request.args for request in requests], group_by="gen_kwargs", group_fn=lambda r: r[1],
                           sort_fn=lambda r: (-len(self.tok_encode(r[0])), r[0]))
        texts, bar = [], tqdm(total=len(requests), desc="generated texts", disable=disable_tqdm)
        for batch in ordered.get_batched(n=self.batch_size):
            for request, text in zip(batch, self.continue_all([context for context, _ in batch], batch[0][1])):
                self.cache_hook.add_partial("generate_until", request, text)
                texts.append(text)
            bar.update(len(batch))
        bar.close()
        return ordered.get_original(texts)

    def continue_all(self, contexts, asked):
        """list[str] and one gen_kwargs for all -> list[str], each without its stop string. A text that has met one
        leaves its batch. InputError for a way of decoding that is not here, and for a max_gen_toks without room."""
        asked = normalize_gen_kwargs(asked, self.max_gen_toks)
        until, room = [stop for stop in asked.pop("until") if stop], asked.pop("max_gen_toks")
        asked.pop("do_sample")                                   # where it is off, the temperature is 0 by now
        sampling = Sampling(float(asked.pop("temperature", 0.0)), int(asked.pop("top_k", 0)),
                            float(asked.pop("top_p", 1.0)))
        if asked.pop("num_beams", 1) != 1 or asked:
            raise InputError(f"gen_kwargs: {', '.join(asked) or 'num_beams'} is not known here: until, max_gen_toks, "
                             "do_sample, temperature, top_k and top_p are")
        if not 0 < room < self.max_length:
            raise InputError(f"max_gen_toks={room} must be at least 1 and leave room for a prompt in max_length="
                             f"{self.max_length}")
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[room - self.max_length:] for text in contexts]
        ends, new = {*self.model.config.eos_ids, self.eos}, [[] for _ in prompts]

        def met(i, token):
            new[i].append(token)
            text = decode(self.tokenizer, new[i], special=True) if until else ""         # a string may straddle tokens
            return any(stop in text for stop in until)

        self.savings += generate(self.model, prompts, room, self.policy, ends, sampling, on_token=met).savings
        return [postprocess_generated_text(decode(self.tokenizer, ids), until, None) for ids in new]

    def get_model_info(self):
        """What the harness stores with the results, under "config". It asks once every request is answered, and so the
        three numbers are printed here."""
        policy, report = self.policy, self.savings.report() if self.savings.sums else {}         # all from its cache
        if report:
            print(f"{policy.kind}, budget {policy.budget}: {savings_line(report)}", file=sys.stderr)
        weights = list(self.model.parameters())
        mine = {"selector": policy.kind, "budget": policy.budget, "skip": policy.skip, "kv": policy.kv}
        return {"model_num_parameters": sum(p.numel() for p in weights), "model_dtype": str(weights[0].dtype),
                "gateskip": mine | report}


def main():
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
    return 0


if __name__ == "__main__":
    run(main, out_of_memory="lower --batch_size")
