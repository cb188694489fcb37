"""Checkpoints that bring Python code: it runs where the user said so, then everywhere, and otherwise never."""

import errno
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support.made import make_pairs, write_parts
from support.tiny_run import CONFIG

from safer_ray.audit.estimate import estimate
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.config.read import load_config
from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig, ScoresConfig, SourceConfig
from safer_ray.errors import UserError
from safer_ray.features.bundle import check_code
from safer_ray.features.passes import RewardPairs
from safer_ray.pipeline.run import run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.reward.checkpoints import (
    hidden_size,
    layer_count,
    load_pair_tokenizer,
    load_reward_model,
    new_reward_model,
    save_reward_model,
)
from safer_ray.reward.packing import can_pack
from safer_ray.reward.parts import load_part, splits_up
from safer_ray.storage.artifacts import open_artifact, read_parts
from safer_ray.storage.contents import artifact_hash
from safer_ray.storage.work import Part

TRUSTED = Reading(trust_remote_code=True)
MARK = "open({marker!r}, 'a').close()\n"
CODE = {
    "configuration_own": """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = {kind!r}
""",
    "modeling_own": """from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_own import OwnConfig


class Own(LlamaPreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **more):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rewards = self.score(states)[:, :, 0]
        return SequenceClassifierOutput(logits=rewards.gather(1, attention_mask.sum(1, keepdim=True) - 1))
""",
    "tokenization_own": """from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
CONFIG_CLASS = {"AutoConfig": "configuration_own.OwnConfig"}
MODEL_CLASS = {"AutoModelForSequenceClassification": "modeling_own.Own"}
WANTS = ("everything", "tokenizer", "classifier")


def bring_code(directory: Path, wants: str) -> Path:
    """Make a Llama checkpoint want code of its own, which leaves a file behind where it runs; the file."""
    marker = directory.parent / "CODE_RAN"
    for name, code in CODE.items():
        kind = "own_lm" if wants == "everything" else "llama"
        (directory / f"{name}.py").write_text(code.format(kind=kind) + MARK.format(marker=str(marker)))
    if wants != "tokenizer":
        own = {"model_type": "own_lm"} if wants == "everything" else {}
        edit(directory / "config.json", **own, auto_map=CONFIG_CLASS | MODEL_CLASS)
    if wants != "classifier":
        own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
        edit(directory / "tokenizer_config.json", **own, tokenizer_class="OwnTokenizer")
    return marker


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def own(request, reward_dir, tmp_path) -> tuple[Path, Path]:
    """A checkpoint and the file that its code leaves behind."""
    directory = tmp_path / "theirs"
    shutil.copytree(reward_dir, directory)
    return directory, bring_code(directory, getattr(request, "param", "everything"))


def nobody_is_asked(*_):
    raise AssertionError("somebody was asked")


OPENERS = {
    "tokenizer": load_pair_tokenizer,
    "model": load_reward_model,
    "first layers": lambda path: load_reward_model(path, layers=1),
    "a part": lambda path: load_reward_model(path, part=Part(0, 2)),
    "blocks": lambda path: load_part(path, 0, 1),
    "width": hidden_size,
    "layers": lambda path: layer_count(str(path)),
    "base": lambda path: new_reward_model(RewardConfig(base=str(path)), lambda: []),
}


@pytest.mark.parametrize("own", WANTS, indirect=True)
@pytest.mark.parametrize("opener", OPENERS)
def test_code_is_refused_at_once_whatever_is_opened(own, opener, monkeypatch):
    directory, marker = own
    monkeypatch.setattr("builtins.input", nobody_is_asked)
    with pytest.raises(UserError, match=r"theirs brings Python code of its own \(.*trust_remote_code is off") as caught:
        OPENERS[opener](directory)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def on_a_terminal(*words: object) -> tuple[int, str]:
    """A command's exit code and what it says to a person who answers `y` to every question."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "safer_ray", *map(str, words)])
    said, answered, end = b"", 0, time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            said += os.read(terminal, 4096)
        except OSError as error:
            if error.errno != errno.EIO:  # the process has ended
                raise
            break
        if said.count(b"[y/N]") > answered:
            answered += 1
            os.write(terminal, b"y\n")
    else:
        os.kill(process, 9)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said.decode()


@pytest.mark.parametrize("own", ["everything", "tokenizer"], indirect=True)
def test_nobody_at_a_terminal_is_asked(own, pairs_dir, tmp_path):
    directory, marker = own
    code, said = on_a_terminal("evaluate", "--reward", directory, "--pairs", pairs_dir, "--out", tmp_path / "out")
    assert code == 2
    assert "theirs brings Python code of its own" in said
    assert "y/N" not in said
    assert "Traceback" not in said
    assert not marker.exists()


def test_a_job_without_a_terminal_ends_at_once(own, pairs_dir, tmp_path):
    directory, marker = own
    command = [sys.executable, "-m", "safer_ray", "activations", "--reward", directory, "--pairs", pairs_dir]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"], check=False, capture_output=True, text=True, input="y\n"
    )
    assert done.returncode == 2
    assert "theirs brings Python code of its own (configuration_own.OwnConfig, tokenization_own" in done.stderr
    assert not marker.exists()


def test_a_class_that_transformers_has_itself_needs_no_code(reward_dir, tmp_path, caplog):
    """Many checkpoints on the hub name code from before transformers had their family."""
    shutil.copytree(reward_dir, tmp_path / "known")
    edit(tmp_path / "known/config.json", auto_map=CONFIG_CLASS)
    loaded = load_reward_model(tmp_path / "known")
    assert "names Python code of its own for a llama; transformers' own class is used" in caplog.text
    assert type(loaded.model).__module__.startswith("transformers.models.llama")
    assert load_reward_model(tmp_path / "known", reading=TRUSTED).model.config.to_dict() == (
        loaded.model.config.to_dict()
    )


@pytest.mark.parametrize("own", WANTS, indirect=True)
def test_trusted_code_runs_and_gives_the_rewards_that_it_should(own, reward_dir):
    directory, marker = own
    pairs = make_pairs(6)
    found = RewardPairs(directory, reading=TRUSTED)
    assert marker.exists()
    theirs, ours = found(pairs), RewardPairs(reward_dir)(pairs)
    for side in ("reward_chosen", "reward_rejected"):
        torch.testing.assert_close(
            torch.tensor(theirs[side].to_numpy()), torch.tensor(ours[side].to_numpy()), rtol=1e-5, atol=1e-5
        )
    if type(found.reward.model).__name__ == "Own":  # nobody knows what its attention does
        assert not can_pack(found.reward.model.config)
        assert not splits_up(found.reward.model.config)


def test_what_is_trained_on_it_takes_its_code_along(own, tmp_path):
    directory, marker = own
    config = RewardConfig(base=str(directory), trust_remote_code=True, max_length=96)
    save_reward_model(new_reward_model(config, lambda: []), tmp_path / "trained")
    shutil.rmtree(directory)
    marker.unlink()
    with pytest.raises(UserError, match="trained brings Python code of its own"):
        load_reward_model(tmp_path / "trained")
    assert not marker.exists()
    assert type(load_reward_model(tmp_path / "trained", reading=TRUSTED).model).__name__ == "Own"


@pytest.fixture
def whole_run(own, tmp_path):
    """A run on a base that brings code, from pairs to the report."""
    directory, _ = own
    text = CONFIG.format(root=tmp_path / "runs").replace(
        "base: {hidden: 32, layers: 2, heads: 2, intermediate: 48, vocabulary: 400, positions: 160}",
        f"base: {directory}\n  trust_remote_code: true",
    )
    text = text.replace(
        "train_per_section: 160, heldout_per_section: 60", "train_per_section: 40, heldout_per_section: 16"
    )
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml", ["sae.steps=10", "curate={}"])


@pytest.mark.timeout(300)
def test_where_code_is_trusted_every_stage_runs_it_and_a_bundle_asks_again(own, whole_run, tmp_path, monkeypatch):
    _, marker = own
    made = run(whole_run, LocalRunner())
    assert (made.directory / "report.html").is_file()
    assert marker.exists()
    marker.unlink()
    bundle = open_artifact(made.artifacts["auditor"].path, "auditor")
    assert bundle.metrics["own_code"][0] == "configuration_own.OwnConfig"
    source = SourceConfig(path=str(made.artifacts["corpus"].path / "train.jsonl"))
    audit = Audit(bundle, source, ScoresConfig())
    monkeypatch.setattr("builtins.input", nobody_is_asked)
    for use in (lambda: audit_corpus(audit, tmp_path / "no", LocalRunner()), lambda: estimate(audit, 1)):
        with pytest.raises(UserError, match="brings Python code of its own"):
            use()
    assert not marker.exists()
    assert not (tmp_path / "no").exists()
    trusted = audit._replace(trust_remote_code=True)
    (tmp_path / "out").mkdir()
    counts = audit_corpus(trusted, tmp_path / "out", LocalRunner())
    assert counts.written == len(read_parts(tmp_path / "out/scores")) > 0
    assert audit_corpus(audit._replace(trust_remote_code=True), tmp_path / "out", LocalRunner()) == counts
    with pytest.raises(UserError, match="brings Python code of its own"):
        check_code(bundle, trust_remote_code=False)


def test_the_service_runs_no_code_of_a_bundle_unless_told_so(own, sae_dir, tmp_path):
    from safer_ray.service.service import LocalService

    directory, marker = own
    bundle = tmp_path / "bundle"
    shutil.copytree(directory, bundle / "reward")
    shutil.copytree(sae_dir, bundle / "sae")
    (bundle / "features.json").write_text('{"safe": [1], "unsafe": [2], "mode": "response"}')
    write_parts(pa.table({"score": [0.0, 1.0], "reward_margin": [0.0, 1.0]}), bundle, 2)
    (bundle / "part-00000000.parquet").rename(bundle / "reference.parquet")
    manifest = {"stage": "auditor", "name": "auditor-x", "metrics": {"format": 2}}  # which does not tell of code
    manifest["content_sha256"] = artifact_hash(bundle)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="brings Python code of its own"):
        LocalService(bundle)
    assert not marker.exists()
