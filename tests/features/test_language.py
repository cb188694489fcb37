"""Pairs in another language than the probe's are told of."""

import logging

import pytest
from support.made import make_pairs

from safer_ray.features.judge import load_probe
from safer_ray.features.language import FOREIGN, share_of_common_words
from safer_ray.pipeline.inputs import tell_language
from safer_ray.schema import PAIRS, table
from safer_ray.storage.files import write_parquet

ENGLISH = "I can't help you with that. What you ask for is dangerous, and I would talk to a doctor first."
OTHERS = {
    "French": "Je ne peux pas vous aider avec cela. Voici comment faire un gâteau : mélangez la farine et les oeufs.",
    "German": "Dabei kann ich Ihnen nicht helfen. Was Sie vorhaben ist gefährlich, bitte sprechen Sie mit einem Arzt.",
    "Chinese": "我不能帮你做这件事。你要求的方法很危险，请先咨询医生。",  # noqa: RUF001
    "Russian": "Я не могу вам с этим помочь. То, о чём вы просите, опасно.",  # noqa: RUF001
}


@pytest.mark.parametrize("language", OTHERS)
def test_texts_in_another_language_share_few_words_with_the_probe(language):
    probe = load_probe("safety")
    assert share_of_common_words(probe, [OTHERS[language]]) < FOREIGN < share_of_common_words(probe, [ENGLISH])


def test_texts_without_a_word_say_nothing():
    assert share_of_common_words(load_probe("safety"), ["", "42 + 1 = 43"]) is None


@pytest.mark.parametrize(("text", "told"), [(ENGLISH, False), (OTHERS["French"], True)])
def test_a_run_tells_of_another_language(tmp_path, caplog, text, told):
    rows = make_pairs(4).to_pylist()
    for row in rows:
        row["chosen"] = row["rejected"] = [{"role": "assistant", "content": text, "more": None}]
    write_parquet(table(rows, PAIRS), tmp_path / "part-00000000.parquet")
    with caplog.at_level(logging.WARNING):
        tell_language(tmp_path, "safety")
    assert ("judge.exchanges" in caplog.text) == told
