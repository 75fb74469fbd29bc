"""Chat templates of public models: Jinja programs that write a conversation as the model was trained to read it."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxlm.data import tokenization
from jaxlm.errors import UserError, reason
from jaxlm.io import utf8

FILE, KEY = "chat_template.jinja", "chat_template"


def find(folder: str) -> tuple[str, dict[str, str]]:
    """Return the chat template in a folder of a model, and its special tokens by name, such as bos_token.

    Raises UserError if there is none, or if it cannot be read.
    """
    path, values = Path(folder), dict[str, Any]()
    config = path / tokenization.TOKENIZER_CONFIG
    try:
        for name in reversed(tokenization.BESIDE[:2]):
            if (path / name).is_file():
                values |= utf8.read_json(path / name)
        template: Any = utf8.read(path / FILE) if (path / FILE).is_file() else values.get(KEY)
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: cannot be read ({reason(error)}); copy or download it again") from error
    if isinstance(template, list):  # several by name
        template = next(
            (x.get("template") for x in template if isinstance(x, dict) and x.get("name") == "default"), None
        )
    if not isinstance(template, str):
        raise UserError(f"--chat: the model has no chat template ({path / FILE}, or {KEY} in {config}); leave it out")
    tokens = {key: token.get("content") if isinstance(token, dict) else token for key, token in values.items()}
    return template, {key: x for key, x in tokens.items() if key.endswith("_token") and isinstance(x, str)}


def rendered(template: str, text: str, tokens: dict[str, str]) -> str:
    """Return a message of the user as a template puts it, up to where the answer begins. Raises UserError.

    The template can reach nothing but what it is given: it is a program of the model's publisher.
    """
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("--chat: needs Jinja, which is not installed: pip install jinja2") from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    messages = [{"role": "user", "content": text}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"--chat: the model's chat template fails: {reason(error)}; leave --chat out") from error
