"""The stage `reward` where the model is a finished one: it is recorded by content, seen to give rewards, and not
trained."""

from functools import partial
from pathlib import Path

from safer_ray.config.reading import ENDS, PRECISION
from safer_ray.config.reward import RewardConfig
from safer_ray.config.sections import RunConfig
from safer_ray.errors import UserError
from safer_ray.pipeline.inputs import base_input, lasting_name
from safer_ray.pipeline.stage import StageContext, recipe
from safer_ray.storage.artifacts import Artifact, Result

UNLIMITED = 10**9  # tokens: what the model itself reads
HEAD_RATE = 1e-3  # learning rate where a head alone is trained


def settled(config: RunConfig) -> RunConfig:
    """Return a config in which the model that is used is also what training begins with: on its frozen blocks, with a
    new head. One that trains is returned as it is.

    Raises:
        UserError: there is no such model, or what is asked for wants a model that is trained here.
    """
    reward = config.reward
    if reward.use is None:
        return config
    if config.scores.detector == "combined":
        raise UserError(
            "scores.detector: combined is fitted on margins of heads that are trained here, and a finished model "
            "(reward.use) has others; choose safer or reward_margin, or train a head on the model's blocks: "
            f"reward: {{base: {reward.use}, frozen_layers: N, new_head: true}}"
        )
    from safer_ray.reward.checkpoints import layer_count  # here, since it imports torch

    use = lasting_name(reward.use)
    said = reward.model_fields_set
    blocks = reward.frozen_layers if "frozen_layers" in said else layer_count(use, reward)
    training = {
        "use": use,
        "base": use,
        "new_head": True,
        "head": None,
        "frozen_layers": blocks,
        "max_length": reward.max_length if "max_length" in said else UNLIMITED,
        "learning_rate": reward.learning_rate if "learning_rate" in said else HEAD_RATE,
    }
    return config.model_copy(update={"reward": reward.model_copy(update=training)})


def finished(ctx: StageContext, config: RewardConfig, asked: RewardConfig) -> Artifact:
    """Return the model that a settled config uses; `asked` is what the user said of how it is read.

    Raises:
        UserError: no such model, or none that gives rewards.
    """
    from safer_ray.reward.finished import mend_links

    assert config.use is not None
    shown = {"use": asked.asked(ENDS, PRECISION)}
    if "max_length" in asked.model_fields_set:
        shown["use"]["max_length"] = asked.max_length
    made = recipe("reward", shown, model=base_input(config.use, config))
    artifact = ctx.place.make(made, partial(_write_finished, config.use, asked))
    if not ctx.place.dry:
        mend_links(artifact.path, config.use)
    return artifact


def _write_finished(use: str, asked: RewardConfig, out: Path) -> Result:
    from safer_ray.reward.finished import keep_finished

    return Result({}, {"use": use, **keep_finished(use, asked, out)})
