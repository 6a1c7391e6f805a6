"""Records, chat templates and files that several training tests use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "experiments" / "data"

VICUNA = (
    "{{ 'A chat. ' }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # strings only, the beginning-of-sequence token in the template
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


def image_bytes(size: tuple[int, int] = (64, 64), value: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def conversation(*turns: str, images: int = 1) -> dict:
    """A canonical record: question, answer, question, ...; the images come before the first question."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": words} for n, words in enumerate(turns)]
    messages[0]["content"] = "<image>" * images + messages[0]["content"]
    return {
        "source": "test",
        "id": "",
        "messages": messages,
        "images": [{"path": None, "bytes": image_bytes(value=50 * n)} for n in range(images)],
    }


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
