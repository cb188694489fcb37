"""How fast conversations become text: each rendered once, against four renderings a side as `apply_chat_template` gives
them one by one.

    python -m bench.rendering --json OUT

`pairs_per_second`: pairs of two turns through a template of Llama 3's form, on one core. `once_vs_four`: how many times
as many as with four renderings a side (prompt and whole, with their texts and with marks in their place).
"""

import argparse
import json
import time
from typing import Any

from bench.common import local_path
from safer_ray.reward.templates import ChatTemplate, Conversation, Message
from safer_ray.reward.tiny_llama import train_tokenizer

PAIRS = 2000
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def conversations() -> list[Conversation]:
    """Return both sides of each pair in turn."""

    def said(role: str, content: str) -> Message:
        return {"role": role, "content": content}

    prompts = [[said("user", f"How do I keep plant number {i} alive indoors? " * 4)] for i in range(PAIRS)]
    answers = [[said("assistant", f"Give it {n} hours of light. " * 8)] for n in range(2 * PAIRS)]
    return [Conversation(prompts[i // 2], answer) for i, answer in enumerate(answers)]


def four_times(tokenizer: Any, sides: list[Conversation]) -> None:
    """Render prompt and whole of each side, as they are and again."""
    for side in sides:
        for _ in range(2):
            tokenizer.apply_chat_template(list(side.prompt), tokenize=False, add_generation_prompt=True)
            tokenizer.apply_chat_template(side.messages, tokenize=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=local_path)
    out = parser.parse_args().json
    tokenizer = train_tokenizer(lambda: [LLAMA3], 400)
    tokenizer.chat_template, tokenizer.bos_token = LLAMA3, "<|begin_of_text|>"
    sides = conversations()
    template = ChatTemplate(tokenizer, LLAMA3)
    template.render(sides[:2])
    began = time.process_time()
    template.render(sides)
    once = time.process_time() - began
    began = time.process_time()
    four_times(tokenizer, sides)
    found = {"pairs_per_second": round(PAIRS / once), "once_vs_four": (time.process_time() - began) / once}
    print(json.dumps(found))
    if out:
        out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
