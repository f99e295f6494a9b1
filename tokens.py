"""Text -> token ids and back, where a tokenizer's own rules get in the way: what it puts around a text, and the model's
chat template.
"""
import json
from datetime import datetime

from console import InputError


def chat_template(model, messages):
    """The prompt for messages, [{"role": "user", "content": "..."}, ...], by the model's own template, sandboxed."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox      # torch needs jinja2 anyway

    def raise_exception(message):
        raise ValueError(message)

    try:
        settings = json.loads(model.side_files.get("tokenizer_config.json", b"{}"))
        template = model.side_files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
        if template and isinstance(template, str):
            jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            jinja.globals.update(raise_exception=raise_exception, strftime_now=lambda f: datetime.now().strftime(f))
            text = lambda token: token["content"] if isinstance(token, dict) else token or ""
            ends = {name: text(settings.get(name)) for name in ("bos_token", "eos_token")}
            return jinja.from_string(template).render(messages=messages, tools=None, add_generation_prompt=True, **ends)
    except Exception as error:  # a template is a stranger's program and may fail in any way
        raise InputError(f"{model.source}: its chat template failed ({' '.join(str(error).split())}): "
                         f"leave --chat out") from None
    raise InputError(f"{model.source} has no chat template: leave --chat out")
