"""Chat templates by their names, from models, files and texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from merging.errors import InputError, OptionError, nearest, option
from merging.hub.address import local_path
from merging.plan.tokens.settings import names_file
from merging.sources import Checkpoint
from merging.sources.small_files import is_there, read_json, read_text

__all__ = ["CHAT_TEMPLATES", "pin_chat_template", "read_chat_template", "resolve_chat_template"]

CHAT_TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama3": """\
{{ bos_token }}
{%- for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """\
{{ bos_token }}
{%- set system = namespace(text='') %}
{% for message in messages %}
{% if message['role'] == 'system' %}
{% set system.text = message['content'] + '\\n\\n' %}
{% elif message['role'] == 'user' %}
{{ '[INST] ' + system.text + message['content'] + ' [/INST]' }}
{%- set system.text = '' %}
{% else %}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif %}
{% endfor %}
""",
    "alpaca": """\
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- else %}
{{ '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\\n' }}
{%- endif %}
""",
    "exaone": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '[|user|]' + message['content'] | trim + '\\n' }}
{%- else %}
{{ '[|' + message['role'] + '|]' + message['content'] | trim + '[|endofturn|]\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '[|assistant|]' }}
{%- endif %}
""",
}
"""Templates of well-known formats, by name."""

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Marks of the assistant's words, which only transformers knows."""


def resolve_chat_template(template: str, models: Sequence[Checkpoint]) -> str | None:
    """Return the text of a chat template: of a named one, the commonest among models, or the text itself.

    Args:
        template: ``auto``, a name, or the text.
        models: the models, the base first; of equally common templates the first one's is taken.

    Returns:
        The text; None for ``auto`` where no model has a template.

    Raises:
        OptionError: for another name, and a text that is not Jinja.
    """
    if template == "auto":
        found = [text for model in models if (text := read_chat_template(model)) is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template]
    if "{" not in template:
        known = ["auto", *CHAT_TEMPLATES]
        raise OptionError(
            f"there is no chat template {template!r}{nearest(template, known)}: use {', '.join(known)}, a file that "
            f"ends in .jinja, or a Jinja text"
        )
    return _check_syntax(template, option("chat_template"))


def pin_chat_template(template: str) -> str:
    """Return the text of a file for its path; anything else stays as it is.

    Raises :class:`~merging.errors.InputError` for a file that does not exist.
    """
    if not names_file(template):
        return template
    path = local_path(template)
    if not path.is_file():
        raise InputError(f"{template}: there is no such file, and {option('chat_template')} names it")
    text = read_text(path, given=True)
    if "{" not in text:
        raise OptionError(f"{template}: is not a Jinja template: it has no expression")
    return text


def read_chat_template(model: Checkpoint) -> str | None:
    """Return a model's chat template, None if it has none."""
    folder = model.folder
    if folder is None:
        return None
    if is_there(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "tokenizer_config.json"):
        stated = read_json(folder / name).get("chat_template") if is_there(folder / name) else None
        if isinstance(stated, list):
            named = {each.get("name"): each.get("template") for each in stated if isinstance(each, dict)}
            stated = named.get("default")
        if isinstance(stated, str):
            return stated
    return None


def _check_syntax(text: str, where: str) -> str:
    """Return a template. Raises :class:`~merging.errors.OptionError` for a text that is not Jinja."""
    from jinja2 import Environment, TemplateSyntaxError  # imported late: most merges need no template

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(_GENERATION.sub("", text))
    except TemplateSyntaxError as error:
        raise OptionError(f"{where}: is not a Jinja template: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise OptionError(f"{where}: is nested too deeply to be a Jinja template") from None
    return text
