"""The bench of near duplicates, on few pairs."""

import json

from bench import data


def test_planted_near_duplicates_are_found(tmp_path, capsys):
    data.make_pairs(tmp_path / "pairs", 1200)
    data.run(tmp_path)
    told = json.loads(capsys.readouterr().out)
    assert told["recall"] > 0.95
    assert told["found"]["pair_near"]["clusters"] <= 60
    assert told["found"]["conflict"]["pairs"] == 0
