"""A row of each layout of the registry that holds the same pair."""

import json

USER = {"role": "user", "content": "How are you?"}
GOOD = {"role": "assistant", "content": "Fine, thanks."}
BAD = {"role": "assistant", "content": "Go away."}
SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = "How are you?"
SIDES = {"chosen": "Fine, thanks.", "rejected": "Go away."}
HH = "\n\nHuman: How are you?\n\nAssistant: "
MATCHED = ("kto", "wildguardmix")

# Of each format a row that holds the pair of USER, GOOD and BAD.
ROWS = {
    "llmbar": {"input": ASKED, "output_1": "Go away.", "output_2": "Fine, thanks.", "label": 2},
    "hhh": {"input": ASKED, "targets": {"choices": ["Fine, thanks.", "Go away."], "labels": [1, 0]}},
    "pku_saferlhf": {
        "prompt": ASKED,
        "response_0": "Go away.",
        "response_1": "Fine, thanks.",
        "safer_response_id": 1,
        "better_response_id": 0,
    },
    "rewardbench2": {
        "id": "7",
        "prompt": ASKED,
        "chosen": ["Fine, thanks."],
        "rejected": ["Go away."],
        "subset": "Focus",
    },
    "rm_bench": {
        "id": "7",
        "prompt": ASKED,
        "chosen": ["Fine, thanks."] * 3,
        "rejected": ["Go away."] * 3,
        "domain": "chat",
    },
    "rewardbench": {"id": 7, "prompt": ASKED, **SIDES, "subset": "hep-go", "chosen_model": "a", "rejected_model": "b"},
    "helpsteer2": {"prompt": ASKED, "response_1": "Go away.", "response_2": "Fine, thanks.", "preference_strength": 2},
    "helpsteer3": {"context": [USER], "response1": "Fine, thanks.", "response2": "Go away.", "overall_preference": -1},
    "arena": {
        "prompt": json.dumps([ASKED]),
        "response_a": json.dumps(["Go away."]),
        "response_b": json.dumps(["Fine, thanks."]),
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
        "model_a": "x",
        "model_b": "y",
    },
    "arena_conversations": {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_a"},
    "shp": {
        "history": ASKED,
        "human_ref_A": "Go away.",
        "human_ref_B": "Fine, thanks.",
        "labels": 0,
        "score_A": 2,
        "score_B": 5,
    },
    "stack_exchange": {"question": ASKED, "response_j": "Fine, thanks.", "response_k": "Go away."},
    "named_responses": {
        "prompt": ASKED,
        "response_a": "Go away.",
        "response_b": "Fine, thanks.",
        "chosen": "B",
        "rejected": "A",
    },
    "matched": {"prompt": ASKED, **SIDES, "matched": "kto"},
    "ultrafeedback": {
        "prompt": ASKED,
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "score_chosen": 8,
        "score_rejected": 5,
    },
    "canonical": {"prompt": ASKED, **SIDES},
    "hh_rlhf": {"chosen": f"{HH}Fine, thanks.", "rejected": f"{HH}Go away."},
    "skywork": {"chosen": [USER, GOOD], "rejected": [USER, BAD], "source": "magpie"},
    "trl_implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "alpaca": {"instruction": ASKED, "input": "", **SIDES},
    "question": {"question": ASKED, **SIDES},
    "query": {"query": ASKED, **SIDES},
    "messages": {"messages": [USER], **SIDES},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": "Fine, thanks."},
        "rejected": {"from": "gpt", "value": "Go away."},
    },
    "conversation": {"conversation": [USER], **SIDES},
    "history": {"history": ASKED, **SIDES},
    "context": {"context": ASKED, **SIDES},
    "input": {"input": ASKED, **SIDES},
    "nectar": {
        "prompt": HH,
        "answers": [
            {"answer": "Go away.", "model": "c", "rank": 7},
            {"answer": "Fine, thanks.", "model": "a", "rank": 1},
        ],
    },
    "ultrafeedback_raw": {
        "instruction": ASKED,
        "models": ["a", "b"],
        "completions": [
            {"response": "Go away.", "model": "b", "overall_score": 2.0},
            {"response": "Fine, thanks.", "model": "a", "overall_score": 8.5},
        ],
    },
    "distilabel": {"input": ASKED, "generations": ["Go away.", "Fine, thanks."], "ratings": [1.0, 5.0]},
}
MARGINS = {"helpsteer2": 2, "helpsteer3": 1, "shp": 3, "ultrafeedback": 3, "ultrafeedback_raw": 6.5, "distilabel": 4}
