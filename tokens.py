"""Text -> token ids and back, where a tokenizer's own rules get in the way: what it puts around a text, what a token's
text is beside others, and the model's chat template.
"""
import json
import re
from contextlib import contextmanager
from datetime import datetime

from console import InputError


@contextmanager
def blame(path, what):
    """Whatever goes wrong inside is told in one line with the file. The Rust side's panics are no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, InputError)):
            raise
        raise InputError(f"{path} {what} ({' '.join(str(error).split())}): download it again") from None


def encode(tokenizer, text, front=True):
    """str -> list[int], with what the tokenizer's post-processor puts in front (a BOS), unless the text begins with it.

    What it puts behind, an end token, is left out: a prompt is not finished. front=False: nothing is added. InputError
    for half a surrogate, and for a token that has no row in the model's embedding."""
    path = getattr(tokenizer, "path", "the tokenizer")           # set by load_tokenizer, and `rows` by check_fit
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"not UTF-8 text: {text!r:.60}")
    with blame(path, f"cannot encode {text!r:.60}"):
        whole = tokenizer.encode(text, add_special_tokens=front)
        own = [i for i, added in zip(whole.ids, whole.special_tokens_mask) if not added]
        if front and not own:                                    # where does an empty text begin?
            whole = tokenizer.encode("a")
    front = whole.ids[:[*whole.special_tokens_mask, 0].index(0)]
    ids = own if own[:1] == front[:1] else front + own
    if max(ids, default=0) >= getattr(tokenizer, "rows", 2 ** 40):
        raise InputError(f"{tokenizer.id_to_token(max(ids))!r:.60} is token {max(ids)} of {path}, and the model knows "
                         f"only {tokenizer.rows}: take it out of the text {text!r:.60}")
    return ids


def decode(tokenizer, ids, special=False):
    """list[int] -> str, with the spelling of special tokens or without."""
    with blame(getattr(tokenizer, "path", "the tokenizer"), "cannot decode"):
        return tokenizer.decode(ids, skip_special_tokens=not special)


def continuation(tokenizer, prompt, new):
    """What the ids `new` add to the text of the ids `prompt`. Alone they would lose their first space in Llama 2."""
    return decode(tokenizer, prompt + new)[len(decode(tokenizer, prompt)):]


def pieces(tokenizer, ids):
    """list[int] -> list[str], equally long: what each token adds to the text, special tokens spelled out.

    Together they are the decoded whole. A character of several tokens belongs to the one that completes it."""
    whole, ends = decode(tokenizer, ids, special=True), [0]
    for i in range(1, len(ids) + 1):                             # of prefixes: a token alone would lose its space
        text, end = decode(tokenizer, ids[:i], special=True), ends[-1]
        while text[end:end + 1] == whole[end:end + 1] != "":     # half a character is none of the whole's
            end += 1
        ends.append(end)
    return [whole[a:b] for a, b in zip(ends, ends[1:])]


def chat_template(model, messages):
    """The prompt for messages, [{"role": "user", "content": "..."}, ...], by the model's own template, sandboxed and
    rendered as transformers renders it."""
    from jinja2 import ext, nodes                                # torch needs jinja2 anyway
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    class Generation(ext.Extension):
        """{% generation %} … {% endgeneration %} marks the assistant's words, for training; here they just stay."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):    # jinja's own is for HTML
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    try:
        settings = json.loads(model.side_files.get("tokenizer_config.json", b"{}"))
        template = model.side_files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
            if named and template is None:
                raise ValueError(f"none of {', '.join(named)} is called default")
        if template and isinstance(template, str):
            jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
            jinja.globals.update(raise_exception=raise_exception, strftime_now=lambda f: datetime.now().strftime(f))
            jinja.filters["tojson"] = tojson
            text = lambda token: token["content"] if isinstance(token, dict) else token
            names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
            given = {name: text(settings[name]) for name in names if settings.get(name)}
            prompt = jinja.from_string(template).render(messages=messages, tools=None, documents=None,
                                                        add_generation_prompt=True, **given)
            prompt.encode()                                      # half a surrogate is no text
            return prompt
    except Exception as error:  # a template is a stranger's program and may fail in any way
        raise InputError(f"{model.source}: its chat template failed ({' '.join(str(error).split())}): "
                         f"leave --chat out") from None
    raise InputError(f"{model.source} has no chat template: leave --chat out")
