"""Tests of tokens.py: what a tokenizer adds to a text, what single tokens mean, foreign tokenizers, chat templates."""
import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from conftest import complaint
from data import make_tokenizer
from tokens import chat_template, continuation, decode, encode, pieces


@pytest.fixture(scope="module")
def embedded():
    """The tokenizer of the built-in problems: bytes, and <bos> in front."""
    return make_tokenizer().to_str()


def llama2():
    """As SentencePiece's become: "▁" for a space, one put in front and taken off again, bytes for the unknown."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Tehimostu", "▁T", "▁h", "▁s"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "T"), ("▁", "h"), ("▁", "s")],
                                unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(words[:3])
    made.post_processor = around("<s> $A", ("<s>", 1))
    return made


def around(single, *special):
    """A post-processor that puts special tokens around a text."""
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=list(special))


# What a tokenizer puts around a text.

BOS, EOS = ("<bos>", 0), ("<eos>", 1)
AROUND = {"nothing": (around("$A"), []), "front": (around("<bos> $A", BOS), [0]),
          "behind": (around("$A <eos>", EOS), []), "both": (around("<bos> $A <eos>", BOS, EOS), [0]),
          "two": (around("<bos> <eos> $A <eos>", BOS, EOS), [0, 1]),
          "roberta": (processors.RobertaProcessing(EOS, BOS), [0]),
          "llama 3": (processors.Sequence([processors.ByteLevel(), around("<bos> $A", BOS)]), [0])}


@pytest.mark.parametrize("kind", AROUND)
def test_the_front_stays_and_the_end_goes(kind, embedded):
    """An end token between prompt and answer, where nothing sensible follows; two of them at a document's end; a BOS
    that is lost with it, doubled where the text spells it, or missing where the text is empty."""
    plain, tokenizer = Tokenizer.from_str(embedded), Tokenizer.from_str(embedded)
    tokenizer.post_processor, front = AROUND[kind]
    for text in ("Tom has 12 eggs.", "Tom has", "x", " <bos>x", "<eos>", "the <bos> and the <eos>", ""):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert encode(tokenizer, text) == front + ids and encode(tokenizer, text, front=False) == ids, text
    for text in ("<bos>Tom has", "<bos>", "<bos><bos>Tom", "<bos>Tom<eos>"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert encode(tokenizer, text) == encode(tokenizer, text, front=False) == ids, text


def test_the_space_that_llama_2_puts_in_front():
    """The "▁" that its tokenizer puts in front taken for a token of the post-processor."""
    ids = encode(llama2(), "Tom")
    assert ids[0] == 1 and ids == encode(llama2(), "<s>Tom") and llama2().decode(ids) == "Tom"
    assert encode(llama2(), "Tom", front=False) == ids[1:]


def test_what_no_model_can_read(embedded):
    """A TypeError for half a character; an index out of range, on a GPU a dead process, for a token without a row."""
    tokenizer = Tokenizer.from_str(embedded)
    assert "not UTF-8 text: 'a\\ud800b'" in complaint(encode, tokenizer, "a\ud800b")
    tokenizer.add_special_tokens(["[PAD]"])
    assert encode(tokenizer, "x [PAD]")[-1] == 482               # a model without a limit has been asked for
    tokenizer.rows, tokenizer.path = 482, "some/tokenizer.json"
    assert encode(tokenizer, "x")
    text = complaint(encode, tokenizer, "x [PAD] y")
    assert all(word in text for word in ("'[PAD]'", "482", "some/tokenizer.json", "take it out"))


def damaged(embedded, **parts):
    """A tokenizer with parts of its file replaced."""
    made = Tokenizer.from_str(json.dumps({**json.loads(embedded), **parts}))
    made.path = "some/tokenizer.json"
    return made


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}


@pytest.mark.parametrize("parts", [
    dict(post_processor={**TEMPLATE, "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}]}),
    dict(post_processor={**TEMPLATE, "single": [{"Sequence": {"id": "B", "type_id": 0}}]}),
    dict(pre_tokenizer={"type": "FixedLength", "length": 0}),
    dict(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
    dict(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
])
def test_a_tokenizer_that_cannot_encode(parts, embedded):
    """The Rust side's panics, which `except Exception` lets through, and what it raises otherwise: a traceback."""
    text = complaint(encode, damaged(embedded, **parts), "Tom has 12 eggs")
    assert text.startswith("some/tokenizer.json cannot encode 'Tom has 12 eggs' (") and "download it again" in text


def test_a_tokenizer_that_cannot_decode(embedded):
    """The same on the way back, after the whole text has been generated."""
    tokenizer = damaged(embedded, decoder={"type": "Strip", "content": "x", "start": 1, "stop": 1})
    text = complaint(decode, tokenizer, encode(tokenizer, "x", front=False))
    assert text.startswith("some/tokenizer.json cannot decode (")


def test_ctrl_c_is_not_the_tokenizers_fault():
    """An interrupt in the middle of a long document told as a damaged file."""
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        encode(SimpleNamespace(encode=interrupt), "x")


# What single tokens mean.

TEXTS = ["Tom has 12 eggs", "  two  spaces ", "<s>Tom</s> this", "naïve 5 € 😀 Tom", "this\n\nthat", "", " "]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(text, embedded):
    """Spaces that vanish where Llama 2's tokens are decoded one by one, question marks for half characters, special
    tokens that no longer show."""
    for tokenizer in (llama2(), Tokenizer.from_str(embedded)):
        ids = encode(tokenizer, text)
        for some in (ids, ids[:-1], ids[1:], ids[2:]):           # also with torn characters at both ends
            parts = pieces(tokenizer, some)
            assert "".join(parts) == tokenizer.decode(some, skip_special_tokens=False) and len(parts) == len(some)


def test_pieces_stand_where_they_belong():
    """A shade on the neighbour's word: a space given to the token before it, a character to its first byte."""
    ids = encode(llama2(), "Tom his é")
    assert pieces(llama2(), ids) == ["<s>", " T", "o", "m", " h", "i", "s", " ", "", "é"]
    assert pieces(llama2(), ids[1:]) == ["T", "o", "m", " h", "i", "s", " ", "", "é"]        # as its decoder begins


def test_a_continuation_keeps_its_first_space(embedded):
    """"Tomhas": the decoder takes the first space off a text, and so off an answer that is decoded alone."""
    for tokenizer in (llama2(), Tokenizer.from_str(embedded)):
        prompt, whole = encode(tokenizer, "Tom"), encode(tokenizer, "Tom his ée")
        assert whole[:len(prompt)] == prompt
        texts = [continuation(tokenizer, prompt, whole[len(prompt):end]) for end in range(len(prompt), len(whole) + 1)]
        assert texts[0] == "" and texts[-1] == " his ée"
        assert all(" his ée".startswith(text.rstrip("\ufffd")) for text in texts)


# Chat templates.

def chat(template=None, **settings):
    """chat_template on a stand-in for a model, with a chat_template.jinja and tokenizer_config fields."""
    files = {"tokenizer_config.json": json.dumps(settings).encode()} if settings else {}
    files.update({"chat_template.jinja": template.encode()} if template is not None else {})
    model = SimpleNamespace(source="folder", side_files=files)
    return chat_template(model, [{"role": "user", "content": "a <b> & 'c'"}])


CHAT = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[bot]{% endif %}")


def test_chat_template_renders():
    """A template not found, rendered as HTML, without its special tokens, or without the turn that the model begins."""
    want = "<s>[user]a <b> & 'c'</s>\n[bot]"
    assert chat(CHAT, bos_token="<s>", eos_token={"content": "</s>"}) == want
    assert chat(chat_template=CHAT, bos_token={"content": "<s>"}, eos_token="</s>") == want
    assert chat(CHAT, chat_template="old", bos_token="<s>", eos_token="</s>") == want      # the file is the newer place
    assert chat(CHAT, bos_token=None) == chat(CHAT) == "[user]a <b> & 'c'\n[bot]"
    assert chat("{% if true %}\n  {% set x = 1 %}\nx{{ x }}{% endif %}") == "x1"           # trim_blocks, lstrip_blocks
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{% if tools is not none %}tools{% endif %}{{ strftime_now('%Y')|int > 2000 }}") == "True"


def test_broken_tokenizer_config():
    """A traceback from --chat for a tokenizer_config.json that is no JSON, or holds something else."""
    for content in (b"{", b"[]", b"\xff"):
        model = SimpleNamespace(source="folder", side_files={"tokenizer_config.json": content})
        assert "folder" in complaint(chat_template, model, [])
    for nothing in (None, "", []):
        assert "no chat template" in complaint(chat, "", chat_template=nothing)


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('only system\nfirst') }}", "only system first"), ("{% if %}", "Expected"),
    ("{{ nobody.name }}", "nobody"), ("{{ 1 / 0 }}", "division"), ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ strftime_now.__globals__.keys() }}", "unsafe"), ("{{ lipsum.__globals__['os'].getcwd() }}", "unsafe"),
    ("{{ raise_exception.__globals__['__builtins__'] }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"), ("{% set _ = messages[0].update(x=1) %}", "unsafe"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"), ("{% include '/etc/passwd' %}", "no loader")])
def test_chat_templates_are_not_trusted(template, words):
    """A template is a program from the hub: an escape from the sandbox, or a traceback when it refuses a chat."""
    text = complaint(chat, template)
    assert text.startswith("folder: its chat template failed") and words in text


def test_named_templates():
    """A tokenizer_config.json with several templates said to have none, or another one taken than `default`."""
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].role }}"}]
    assert chat(chat_template=several) == chat(chat_template=several[::-1]) == "user"
    assert chat("file", chat_template=several) == "file"
    text = complaint(chat, chat_template=[several[0], {"name": "rag", "template": "x"}])
    assert "tool_use, rag" in text and "default" in text
    for wrong in (["x"], [{"name": "default"}], [[]]):
        assert "its chat template failed" in complaint(chat, chat_template=wrong)


def test_generation_blocks():
    """Templates that mark the assistant's words, for training, said to have an unknown tag."""
    template = ("{% for m in messages %}\n  {% generation %}\n{{ m.content }}{{ loop.index }}\n  {% endgeneration %}\n"
                "{% endfor %}{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}")
    assert chat(template) == "a <b> & 'c'1\nFalse"               # a block of its own, as of transformers
    assert "endgeneration" in complaint(chat, "{% generation %}")


def test_json_is_not_html():
    """jinja's own filter writes \\u003c for < and \\u00e9 for é: another prompt than the model was trained on."""
    assert chat("{{ (messages[0].content + 'é')|tojson }}") == '"a <b> & \'c\'é"'
    assert chat("{{ {'b': 1, 'a': [2]}|tojson(indent=2) }}") == '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'
    assert chat("{{ {'b': 1, 'a': 'é'}|tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}") == (
        '{"a":"\\u00e9","b":1}')


def test_what_a_template_is_given():
    """Names that are not there although transformers gives them, or are there although they are not set."""
    assert chat("{{ pad_token }}{{ unk_token }}", pad_token="<p>", unk_token={"content": "<u>"}) == "<p><u>"
    assert chat("{{ documents is none }}{{ bos_token is defined }}{{ add_generation_prompt }}") == "TrueFalseTrue"


@pytest.mark.parametrize("place", ["output", "settings", "file"])
def test_half_a_character_in_a_template(place):
    """A UnicodeEncodeError when the prompt is printed or encoded, or a UnicodeDecodeError when the file is read."""
    template = {"output": "{{ '\\ud800' }}", "settings": "\ud800"}.get(place)
    if place == "file":
        model = SimpleNamespace(source="folder", side_files={"chat_template.jinja": b"\xed\xa0\x80"})
        text = complaint(chat_template, model, [])
    else:
        text = complaint(chat, chat_template=template)
    assert text.startswith("folder: its chat template failed")
