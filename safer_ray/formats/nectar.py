"""Nectar (berkeley-nest/Nectar): a prompt with answers of several models, ranked, 1 the best."""

from itertools import combinations
from typing import Any

from safer_ray.formats.declaration import (
    Options,
    PreferenceFormat,
    Refused,
    Row,
    as_mapping,
    as_number,
    as_text,
    canonical,
    check_count,
    identity,
    type_name,
)


def nectar(row: Row, options: Options) -> list[Row]:
    """The best answer with the worst, or (`pairs: all`) each answer with every one of a worse rank.

    A pair's labels are the models and ranks of its sides. Answers whose rank others share stand for these, in the
    order of the row; the ids of several pairs end in the places of their two answers, `…/I-J`.

    Raises:
        Refused: fewer than two answers, one without text or rank, all of one rank, or too many pairs.
    """
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise Refused(f"wrong type: answers is {type_name(answers)}, wanted a list of answers")
    if len(answers) < 2:
        raise Refused(f"fewer than two answers: {len(answers)}")
    ranks = [_rank(answer, place) for place, answer in enumerate(answers)]
    if len(set(ranks)) == 1:
        raise Refused(f"no preference: all {len(answers)} answers have rank {ranks[0]:g}")
    if options.get("pairs", "best_worst") == "best_worst":
        return [_pair(row, answers, ranks.index(min(ranks)), ranks.index(max(ranks)), several=False)]
    check_count(len(answers) * (len(answers) - 1) // 2)
    order = sorted(range(len(answers)), key=ranks.__getitem__)
    return [_pair(row, answers, i, j, several=True) for i, j in combinations(order, 2) if ranks[i] < ranks[j]]


def _rank(answer: Any, place: int) -> float:
    if not isinstance(answer, dict):
        raise Refused(f"wrong type: answers[{place}] is {type_name(answer)}, wanted a mapping with answer and rank")
    if not isinstance(answer.get("answer"), str) or not answer["answer"].strip():
        raise Refused(f"empty text: answers[{place}].answer")
    if answer.get("rank") is None:
        raise Refused(f"missing rank: answers[{place}]")
    rank = as_number(answer["rank"])
    if rank is None:
        raise Refused(f"wrong type: answers[{place}].rank is {type_name(answer['rank'])}, wanted a number")
    return rank


def _pair(row: Row, answers: list[Any], best: int, worst: int, *, several: bool) -> Row:
    sides = {"chosen": answers[best], "rejected": answers[worst]}
    kept = {name: value for name, value in row.items() if name != "answers"}
    key, name = identity(row)
    if several and name is not None:
        kept[name] = f"{key}/{best}-{worst}"
    own = as_mapping(row.get("labels")) or {}
    labels = own | {
        f"{side}_{name}": as_text(answer[name])
        for side, answer in sides.items()
        for name in ("model", "rank")
        if answer.get(name) is not None
    }
    return kept | {side: answer["answer"] for side, answer in sides.items()} | {"labels": labels}


NECTAR = PreferenceFormat(
    "nectar",
    ("prompt", "answers"),
    "prompt, answers with answer, model and rank",
    canonical,
    nectar,
    options={"pairs": ("best_worst", "all")},
)
