"""Every reward is that of the model's own tokenizer, template and forward pass, one unpadded sequence at a time."""

# ruff: noqa: RUF001  # texts in other scripts

import json
import shutil
from functools import cache

import jinja2
import pytest
import torch
from support.reward_models import KINDS, save_reward_model_of

from safer_ray.reward.checkpoints import SETTINGS, load_reward_model
from safer_ray.reward.forward import forward, forward_pairs
from safer_ray.reward.text import both_sides

QUICK = (
    "Llama 3 without a pad token",
    "Llama 2",
    "Qwen 3",
    "Gemma 2",
    "Phi 3",
    "GPT-2",
    "BERT",
    "DeBERTa v3",
    "RoBERTa",
)
LIMIT = 40  # tokens, of the truncated ones


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
    "long": pair([user("Is it dry? " * 20)], "Water it, and give it light. " * 6, "Rain taps the roof. " * 9),
}

kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.long]) for kind in KINDS]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by kind, made when they are first asked for."""
    return cache(lambda kind: save_reward_model_of(kind, tmp_path_factory.mktemp("model")))


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


@kinds
def test_the_tokens_are_the_models_own(models, kind):
    directory = models(kind)
    own = own_sides(directory)
    reward = load_reward_model(directory)
    for name, tokens in zip(own, reward.pairs(rows(own)), strict=True):
        for side, inputs in zip((tokens.chosen, tokens.rejected), own[name], strict=True):
            assert side.ids.tolist() == inputs["input_ids"][0].tolist(), name


@kinds
def test_the_rewards_are_the_models_own(models, kind):
    """All pairs at once: padded, and packed where the model takes that; and one by one."""
    directory = models(kind)
    own = own_sides(directory)
    assert len(own) >= 8
    reward = load_reward_model(directory)
    pairs = reward.pairs(rows(own))
    wanted = own_rewards(directory, [inputs for sides in own.values() for inputs in sides])
    assert len(set(wanted.tolist())) >= len(own)
    assert_exact(forward_pairs(reward, pairs).rewards, wanted)
    assert_exact(forward_pairs(reward, pairs, budget=100_000).rewards, wanted)
    assert_exact(torch.cat([forward_pairs(reward, [one]).rewards for one in pairs]), wanted)


@kinds
def test_the_rewards_of_the_tokens_that_are_read_are_the_models_own(models, kind, tmp_path):
    """Cut or not, padded or packed."""
    directory = models(kind)
    whole = load_reward_model(directory)
    shutil.copytree(directory, tmp_path / "cut")
    (tmp_path / "cut" / SETTINGS).write_text(json.dumps({"max_length": LIMIT}))
    cut = load_reward_model(tmp_path / "cut")
    names = list(own_sides(directory))
    for reward in (whole, cut):
        pairs = reward.pairs(rows(names))
        sides = [side.ids for side in both_sides(pairs)]
        wanted = own_rewards(directory, [{"input_ids": torch.from_numpy(ids)[None]} for ids in sides])
        assert_exact(forward(reward, sides).rewards, wanted)
        assert_exact(forward_pairs(reward, pairs, budget=100_000).rewards, wanted)
        if reward is cut:
            assert max(len(ids) for ids in sides) <= LIMIT
            assert pairs[names.index("long")].truncated
