"""Faults of a model are told in one line with their remedy, before any row is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import save_adapter
from support.templates import CHAT_TEMPLATE

from safer_ray.config.reading import Reading
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.features.bundle import check_auditor
from safer_ray.pipeline.inputs import base_input
from safer_ray.pipeline.roles import open_as
from safer_ray.reward.checkpoints import layer_count, load_pair_tokenizer, load_reward_model, new_reward_model
from safer_ray.reward.loaded import check_loaded
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.work import Part

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 123456789\n"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def model(reward_dir, tmp_path):
    return shutil.copytree(reward_dir, tmp_path / "model")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def trains(folder):
    return new_reward_model(RewardConfig(base=str(folder), max_length=64), lambda: [])


BEFORE_ROWS = {  # whatever a folder is given to
    "a role": lambda folder: open_as("reward", folder),
    "a base": lambda folder: base_input(str(folder)),
    "a run": lambda folder: layer_count(str(folder)),
    "evaluate": load_reward_model,
    "training": trains,
    "a part": lambda folder: load_reward_model(folder, part=Part(0, 2)),
}


def refused(folder, told, openers=tuple(BEFORE_ROWS)):
    for name in openers:
        with pytest.raises(UserError, match=told) as caught:
            BEFORE_ROWS[name](folder)
        assert "\n" not in str(caught.value)


# Files


def of_torch(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")


def empty(name):
    return lambda folder: (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        (
            of_torch,
            r"no model\.safetensors, but pytorch_model\.bin \(PyTorch weights\); convert .*save_pretrained.*or set "
            r"bin_weights: true \(--read bin_weights=true\)",
        ),
        (empty("model-q4.gguf"), r"but model-q4\.gguf \(weights for llama\.cpp\); pass that file itself"),
        (empty("tf_model.h5"), r"but tf_model\.h5 \(TensorFlow weights\); convert them .*from_tf=True"),
        (empty("flax_model.msgpack"), r"flax_model\.msgpack \(Flax weights\)"),
        (empty("model.onnx"), r"model\.onnx \(an ONNX graph\)"),
        (empty("last.pt"), r"last\.pt \(PyTorch weights\)"),
        (empty("consolidated.00.pth"), r"consolidated\.00\.pth \(weights in their maker's own layout\)"),
        (empty("zero_to_fp32.py"), r"a DeepSpeed checkpoint\); run python zero_to_fp32\.py"),
        (
            empty("model-00001-of-00002.safetensors"),
            r"model-00001-of-00002\.safetensors, but no model\.safetensors\.ind",
        ),
        (empty("adapter.safetensors"), r"but adapter\.safetensors; rename it so if it holds the whole model"),
        (empty("training_args.bin"), r"has no model\.safetensors; copy the model again"),
        (
            lambda folder: (folder / WEIGHTS).symlink_to("../blobs/ab"),
            r"is a link to \.\./blobs/ab, which is not there",
        ),
    ],
)
def test_weights_of_another_kind_are_named_with_the_remedy(model, instead, told):
    if instead is of_torch:
        instead(model)
    (model / WEIGHTS).unlink()
    if instead is not of_torch:
        instead(model)
    refused(model, told)


def test_weights_of_another_kind_beside_no_config_are_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path, r"no model in .* \(config\.json is missing\), but model\.gguf \(weights for llama\.cpp\)")


def test_a_folder_of_checkpoints_names_them(model):
    (model.parent / "checkpoint").mkdir()
    shutil.copytree(model, model.parent / "checkpoint/checkpoint-10")
    refused(model.parent / "checkpoint", r"but there is one in its checkpoint-10; pass that folder")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_told_as_one(model, name):
    (model / name).write_text(POINTER)
    refused(model, rf"{name} is a Git LFS pointer, not the file itself; run `git lfs pull` in ")


def test_a_bundle_of_pointers_is_told_as_one(model):
    (model / "reward").mkdir()
    (model / "reward" / WEIGHTS).write_text(POINTER)
    with pytest.raises(UserError, match=r"reward/model\.safetensors is a Git LFS pointer"):
        check_auditor(Artifact(model, "auditor", {"metrics": {"format": 2}}))


def split(folder):
    load_reward_model(folder).model.save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))


def test_weights_in_several_files_are_all_there(model):
    files = split(model)
    assert len(files) > 2
    load_reward_model(model)
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    refused(model, rf"corrupt weights: .*{files[1].name}: .*; train or copy the model again")
    files[1].write_text(POINTER)
    files[2].write_text(POINTER)
    refused(model, rf"{files[1].name} is a Git LFS pointer, not the file itself, one of 2; run")
    files[1].unlink()
    files[2].unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": files[0].name, "b": files[1].name}}))
    refused(model, rf"has no {files[1].name}, which {INDEX} names \(1 such files of 2\)")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": files[0].name}}))
    refused(model, rf"{files[0].name} has no a, which {INDEX} says is in it")
    (model / INDEX).write_text("[]")
    refused(model, r"index\.json is not readable")


def test_of_two_sets_of_weights_the_one_is_read_that_transformers_reads(model, caplog):
    whole = load_file(model / WEIGHTS)
    split(model)
    save_file({name: weight * 2 for name, weight in whole.items()}, model / WEIGHTS, metadata={"format": "pt"})
    for opened in (load_reward_model(model), load_reward_model(model, part=Part(2, 3))):
        torch.testing.assert_close(opened.model.score.weight.data, whole["score.weight"] * 2)
    assert "the first is read" in caplog.text


def test_what_a_merge_left_behind_is_not_read(model):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "them/theirs"}')
    assert load_reward_model(model)
    assert trains(model)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_weights_is_refused(model, weights):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "them/theirs"}')
    shutil.copy(model / WEIGHTS, model / weights)
    refused(
        model, r"holds an adapter .* beside weights, and which of both is meant is not known; move the adapter into"
    )


def test_a_config_that_is_none_is_named(model):
    (model / "config.json").write_text("[1")
    refused(model, r"config\.json is not a JSON object; copy the file again")


# Pickled weights


class Evil:
    """What a file of weights could be made to run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


PICKLED = Reading(bin_weights=True)


def pickled(folder, shards=1):
    """The folder with its weights in PyTorch's own files."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    where = {name: f"pytorch_model-0000{i % shards + 1}-of-0000{shards}.bin" for i, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in weights if where[name] == file}, folder / file)
    tree = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_weights_are_read_where_their_user_says_so(model, reward_dir, shards):
    folder = pickled(model, shards)
    wanted = load_reward_model(reward_dir).model.state_dict()
    assert open_as("reward", folder, PICKLED)
    assert base_input(str(folder), PICKLED)
    base = RewardConfig(base=str(folder), max_length=64, bin_weights=True)
    for opened in (load_reward_model(folder, reading=PICKLED), new_reward_model(base, list)):
        for name, weight in opened.model.state_dict().items():
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=0)
    assert len(load_reward_model(folder, reading=PICKLED, layers=2).blocks()) == 3
    with pytest.raises(UserError, match="only a whole model in safetensors is cut into parts"):
        load_reward_model(folder, reading=PICKLED, part=Part(0, 2))


def test_safetensors_are_read_rather_than_pickled_weights(model, tmp_path):
    torch.save({"evil": Evil(tmp_path / "ran")}, model / "pytorch_model.bin")
    assert load_reward_model(model, reading=PICKLED)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["pytorch_model.bin", "adapter_model.bin"])
def test_nothing_that_is_pickled_beside_numbers_runs(model, tmp_path, where):
    weights = load_file(model / WEIGHTS) | {"evil": Evil(tmp_path / "ran")}
    folder = model
    if where.startswith("adapter"):
        folder = tmp_path / "adapter"
        save_adapter(model, folder)
        (folder / "adapter_model.safetensors").unlink()
    else:
        (model / WEIGHTS).unlink()
    torch.save(weights, folder / where)
    for opened in (
        lambda: load_reward_model(folder, reading=PICKLED),
        lambda: new_reward_model(RewardConfig(base=str(folder), max_length=64, bin_weights=True), list),
    ):
        with pytest.raises(UserError, match=r"hold more than numbers \(io\.open\); nothing of that was run") as caught:
            opened()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_a_file_of_pickled_weights_that_is_torn_or_old_is_refused(model, content):
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    for opened in (lambda: open_as("reward", model, PICKLED), lambda: load_reward_model(model, reading=PICKLED)):
        with pytest.raises(UserError, match=r"pytorch_model\.bin is torn, or of a PyTorch before 1\.6"):
            opened()


def test_an_adapter_in_a_pickle_is_merged_where_its_user_says_so(model, tmp_path):
    save_adapter(model, tmp_path / "adapter")
    wanted = load_reward_model(tmp_path / "adapter").model.state_dict()
    file = tmp_path / "adapter/adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter/adapter_model.bin")
    file.unlink()
    found = load_reward_model(tmp_path / "adapter", reading=PICKLED).model.state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


# Tokenizers

READERS = {"tokenizer": load_pair_tokenizer, "model": load_reward_model, "base": trains}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", '"x"', "{"])
def test_a_config_that_is_no_object_is_named(model, name, text):
    (model / name).write_text(text)
    refused(model, rf"{name} is not a JSON object; copy the file again")


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("config.json", {"architectures": True}, r"architectures is True, wanted a list of names"),
        ("config.json", {"num_hidden_layers": 0}, r"num_hidden_layers is 0, wanted a whole number from 1 on"),
        ("config.json", {"sliding_window": "x"}, r"sliding_window is 'x', wanted a whole number"),
        ("config.json", {"output_hidden_states": [1]}, r"output_hidden_states is \[1\], wanted true or false"),
        ("config.json", {"text_config": {"architectures": 1}}, r"text_config\.architectures is 1, wanted a list"),
        ("config.json", {"auto_map": {"AutoConfig": 5}}, r"auto_map is \{'AutoConfig': 5\}, wanted names of classes"),
        ("tokenizer_config.json", {"auto_map": 5}, r"auto_map is 5, wanted names of classes"),
        ("tokenizer_config.json", {"model_max_length": "x"}, r"model_max_length is 'x', wanted a number"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_key(model, name, values, told):
    edit(model / name, **values)
    refused(model, rf"{name}: {told}")


def unreadable(folder, told):
    for reader in READERS.values():
        with pytest.raises(UserError, match=told) as caught:
            reader(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "Qwen2", "BERT", "GPT-2"])
@pytest.mark.parametrize("settings", [True, False])
def test_a_tokenizer_is_never_made_up(model, kind, settings):
    if kind != "LlamaForSequenceClassification":
        from transformers import BertConfig, GPT2Config, Qwen2Config

        {"Qwen2": Qwen2Config, "BERT": BertConfig, "GPT-2": GPT2Config}[kind]().save_pretrained(model)
    (model / "tokenizer.json").unlink()
    if not settings:
        (model / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json is missing\): save there the one"):
        load_pair_tokenizer(model)


def test_half_a_tokenizer_is_refused(model):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate("abcdefgh")}))
    with pytest.raises(UserError, match=r"has half a tokenizer \(merges\.txt is missing\)"):
        load_pair_tokenizer(model)


def test_a_tokenizer_that_knows_no_text_is_refused(model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {"[UNK]": 0, "[PAD]": 1, "strangeword": 2}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(model)
    unreadable(model, r"its tokenizer \(.*, 3 tokens\) makes unknown tokens alone of text: save there the one")


# Templates


@pytest.fixture
def templated(model):
    (model / "safer_ray.json").unlink()
    return model


def name_templates(folder, *names):
    templates = [{"name": name, "template": CHAT_TEMPLATE} for name in names]
    edit(folder / "tokenizer_config.json", chat_template=templates)


def test_named_templates_need_a_default(templated):
    name_templates(templated, "rag", "default")
    assert load_pair_tokenizer(templated).template == "chat"
    name_templates(templated, "rag", "tool_use")
    unreadable(templated, r"none of its chat templates \(rag, tool_use\) is the default; keep the one")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}{{ m['content'] }", r"its chat template has a syntax error in line 1: .*; mend it"),
        ("{{ raise_exception('wants tools') }}", r"its chat template renders no conversation: wants tools; mend it"),
        ("{{ nothing.there.at_all }}", r"its chat template renders no conversation: .*undefined.*; mend it"),
        ("{% set a = 1 %}", r"its chat template renders no conversation: it writes nothing; mend it"),
        (POINTER, r"chat_template\.jinja is a Git LFS pointer"),
    ],
)
def test_a_template_that_renders_nothing_is_quoted(templated, template, told):
    (templated / "chat_template.jinja").write_text(template)
    unreadable(templated, told)


def test_a_template_that_takes_no_system_message_is_none_of_these(templated):
    said = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    (templated / "chat_template.jinja").write_text(said)
    assert load_pair_tokenizer(templated).template == "chat"


# Quantised weights, attention


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\): .*bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\): .*optimum.*; or pass the model as it was before"),
        ({"quant_method": "hqq"}, r"quantised \(hqq\): "),
        ({"quant_method": "new"}, r"quantised \(new\): .*[Uu]nknown"),
        ({"bits": 4}, r"quantised \(\?\): "),
    ],
)
def test_quantised_weights_name_the_package_that_they_need(model, settings, told):
    edit(model / "config.json", quantization_config=settings)
    refused(model, told, ("evaluate", "training"))


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_read_here_is_refused_with_the_remedy(model, name):
    edit(model / "config.json", **{name: "flash_attention_2"})
    refused(model, r"asks for the attention flash_attention_2, .*; delete attn_implementation from it", LOADERS)
    edit(model / "config.json", **{name: "eager"})
    assert load_reward_model(model)


# Weights


def rewrite(folder, change):
    weights = load_file(folder / WEIGHTS)
    changed = {change(name): weight for name, weight in weights.items() if change(name)}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})


LOADERS = ("evaluate", "training", "a part")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda name: f"module.{name}",
            r"`module\.` is in the names of a model in DistributedDataParallel or DeepSpeed",
        ),
        (lambda name: f"_fsdp_wrapped_module.{name}", r"`_fsdp_wrapped_module\.` is in the names of a model in FSDP"),
        (lambda name: f"policy.{name}", r"its names begin with `policy\.`; take that off"),
        (lambda name: f"base_model.model.{name}", r"of an adapter of peft; merge it into the model"),
        (lambda name: name.replace("mlp", "mlp._orig_mod"), r"mlp\._orig_mod\.\S+ `_orig_mod\.` is in the names"),
        (lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"), r"of an adapter of peft; merge"),
        (
            lambda name: name.replace("down_proj.weight", "down_proj.qweight"),
            r"which is quantised, though config\.json",
        ),
        (lambda name: name.replace("down_proj", "w2"), r"but for model\.layers\.0\.mlp\.w2\.weight; rename them"),
        (
            lambda name: "" if ".layers.0." in name else name,
            r"no weights for model\.layers\.0\.\S+ \(9 such\); copy all",
        ),
        (lambda name: "" if ".norm." in name else name, r"no weights for model\.norm\.weight \(1 such\); copy all"),
        (lambda name: "" if "embed" in name else name, r"no weights for model\.embed_tokens\.weight \(1 such\)"),
    ],
)
def test_weights_that_a_model_lacks_are_never_made_anew(model, change, told):
    rewrite(model, change)
    parts = () if "norm" in told else ("a part",)  # the first part has no norm
    refused(model, told, ("evaluate", "training", *parts))


@pytest.mark.parametrize("change", [lambda name: f"model.{name}", lambda name: name.removeprefix("model.")])
def test_a_prefix_that_transformers_knows_is_none_that_is_missed(model, reward, change):
    rewrite(model, change)
    for name, weight in load_reward_model(model).model.state_dict().items():
        torch.testing.assert_close(weight, reward.model.state_dict()[name])


def test_a_shape_that_does_not_fit_is_named(model):
    weights = load_file(model / WEIGHTS)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 99)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    refused(model, r"mlp\.down_proj\.weight is \(32, 99\), by config\.json \(32, 48\); copy both", LOADERS)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(0)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    refused(model, r"down_proj\.weight is empty, as DeepSpeed's stage 3 saves it; gather the weights", LOADERS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tensor_without_a_finite_value_is_named(model, value):
    weights = load_file(model / WEIGHTS)
    weights["model.layers.0.mlp.up_proj.weight"].fill_(value)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    refused(model, r"layers\.0\.mlp\.up_proj\.weight is NaN or infinite all over; copy the model again", LOADERS)
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    assert load_reward_model(model)


def test_tensors_that_a_model_has_no_use_for_are_told(model, caplog):
    weights = load_file(model / WEIGHTS)
    more = {f"extra.{i}": torch.ones(2) for i in range(5)} | {"lm_head.weight": torch.ones(3, 32)}
    save_file(weights | more, model / WEIGHTS, metadata={"format": "pt"})
    load_reward_model(model)
    (line,) = [each for each in caplog.messages if "left out" in each]
    assert "a LlamaForSequenceClassification has no use for are left out: extra.0, extra.1, extra.2 and 2 more" in line
    assert "lm_head" not in line


def test_a_head_of_another_name_is_told_and_not_made_anew(model, caplog):
    rewrite(model, lambda name: name.replace("score", "reward_head"))
    refused(
        model, r"no weights for score\.weight, but for reward_head\.weight, which a llama does not use", ("evaluate",)
    )
    trains(model)
    assert "left out: reward_head.weight" in caplog.text


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (
            "LlamaForCausalLM",
            r"since a LlamaForCausalLM writes text, and a judge that writes its verdict cannot be read",
        ),
        ("T5ForConditionalGeneration", r"since a T5ForConditionalGeneration writes text, which cannot be read"),
        ("LlamaModel", r"has no weights for score\.weight; train one on it with stage `reward`"),
    ],
)
def test_what_writes_text_is_no_reward_model(model, kind, told):
    rewrite(model, lambda name: name.replace("score", "lm_head"))
    edit(model / "config.json", architectures=[kind])
    refused(model, told, ("evaluate",))
    assert trains(model)


def test_weights_that_cannot_be_converted_are_named(reward):
    found = {"mismatched_keys": set(), "missing_keys": set(), "unexpected_keys": set()}
    with pytest.raises(UserError, match=r"model: a\.b cannot be converted: too few"):
        check_loaded("model", reward.model, {**found, "conversion_errors": {"a.b": "too few"}}, whole=True)


def test_a_family_without_a_classifier_is_named(model):
    from transformers import MambaConfig

    MambaConfig().save_pretrained(model)
    refused(model, r"transformers has no AutoModelForSequenceClassification of a mamba; pass", ("evaluate", "training"))
