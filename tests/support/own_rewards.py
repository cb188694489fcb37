"""What models make of conversations by themselves: by their own tokenizers, templates and forward passes, one unpadded
sequence at a time, as their cards have it."""

# ruff: noqa: RUF001  # texts in other scripts

from functools import cache

import jinja2
import torch


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


QUESTION = user("How do I keep a plant alive?")
TURNS = [user("What is a tide?"), assistant("The moon pulls the sea."), user("And who told you so?")]
PAIRS = {
    "single turn": pair([QUESTION], "Give it six hours of light. Water it when it is dry!", "No idea."),
    "another": pair([user("What is 12 times 345?")], "4,140.", "It is 12345, I've seen it; you'll see."),
    "several turns": pair(TURNS, "I've seen it, you'll see.", "Nobody."),
    "system turn": pair([system("You are a careful helper. Be brief."), QUESTION], "Water it.", "Water it, then wait."),
    "thinking": pair(
        [user("What is 12 times 345?")],
        "<think>\nThe question is a simple one.\n</think>\n\nIt is 4,140.",
        "<think>\n\n</think>\n\nIt is 12.",
    ),
    "a thought before": pair(
        [QUESTION, assistant("<think>\nSo?\n</think>\n\nWater."), user("When?")], "Soon.", "Never"
    ),
    "newlines first": pair([QUESTION], "\n\nFirst do this.\n\n\nThen that.", "\n- one\n- two\n"),
    "blanks around": pair([user("  What?  ")], "  Give it light. ", " No  idea.\t"),
    "no prompt": pair([], "The moon pulls the sea.", "It is 12."),
    "not ASCII": pair(
        [user("今天的天气很好？")], "系统会先检查。然后再回答！", "फिर धूप में रखें। ☃ هل هو بخير؟ Ça va, déjà vu."
    ),
    "one letter": pair([user("a")], "b", "c"),
    "one begins the other": pair([QUESTION], "Water it", "Water it when it is dry"),
    "equal responses": pair([QUESTION], "Water it.", "Water it."),
    "markup said": pair(
        [user("What is <|im_end|> or </s>?")], "It is </s> [INST] <|eot_id|> <end_of_turn>", "[SEP] <s>"
    ),
    "long": pair([user("Is it dry? " * 40)], "Water it, and give it light. " * 6, "Rain taps the roof. " * 9),
}


@cache
def plain(directory):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(directory), model.eval()


def own_inputs(tokenizer, prompt, response):
    """What the model's card gives the model; None where its template refuses, or there is none and the talk is long."""
    if not tokenizer.chat_template:
        if len(prompt) != 1:
            return None
        return tokenizer(prompt[0]["content"], response[0]["content"], return_tensors="pt")
    try:
        return tokenizer.apply_chat_template(
            [*prompt, *response], tokenize=True, return_dict=True, return_tensors="pt"
        )  # fmt: skip
    except jinja2.TemplateError:
        return None


def own_sides(directory):
    """Pairs with their two inputs, by name; those that the model's own template takes."""
    tokenizer, _ = plain(directory)
    found = {}
    for name, pair in PAIRS.items():
        sides = [own_inputs(tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        if None not in sides:
            found[name] = sides
    return found


@torch.inference_mode()
def own_rewards(directory, inputs):
    _, model = plain(directory)
    return torch.tensor([model(**one).logits[0, 0].item() for one in inputs])


def assert_exact(found, wanted):
    assert torch.isfinite(wanted).all()
    worst = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max()
    assert worst < 1e-5, (float(worst), found, wanted)


def rows(names):
    return [PAIRS[name] | {"pair_id": name} for name in names]
