"""DeepSpeed as the engine that applies gradients: one configuration, four ways to partition (ZeRO 0-3)."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safer_ray.config.cluster import DeepSpeedConfig
from safer_ray.distributed.partition import partition
from safer_ray.errors import UserError
from safer_ray.reward.training_steps import OptimizerOptions, decay_groups

TAG = "deepspeed"
SHARED_MEMORY = "deepspeed_shm_comm"


def deepspeed_config(config: DeepSpeedConfig, options: OptimizerOptions) -> dict[str, Any]:
    """All that DeepSpeed is told."""
    zero: dict[str, Any] = {"stage": config.stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "gradient_clipping": options.max_grad_norm or 0.0,
        "bf16": {"enabled": options.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # AdamW is torch's, the same as without DeepSpeed
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def compile_nothing() -> None:
    """Keep DeepSpeed from compiling its reduction over shared memory, for which each machine would need a C++ compiler
    and a minute: it is the one extension that this configuration loads, on CPUs, and gloo does its work."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False


class DeepSpeedEngine:
    """AdamW through DeepSpeed on a model that all workers have built alike."""

    autocast = False  # DeepSpeed computes in the dtype of its own configuration
    counts_micro_batches = True  # it applies at the last of `micro_batches`, and at none where one is missing

    def __init__(
        self,
        module: nn.Module,
        options: OptimizerOptions,
        config: DeepSpeedConfig,
        workers: int,
        device: torch.device,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        self.stage = config.stage
        self.options = options
        self.scale = workers * options.micro_batches  # DeepSpeed takes means where a step's losses are to be summed
        optimizer = torch.optim.AdamW(decay_groups(module, options.weight_decay), lr=options.learning_rate)
        if device.index is not None:  # DeepSpeed takes it for its GPU's number, which is another where a worker has
            os.environ["LOCAL_RANK"] = str(device.index)  # several GPUs, or a share of one
        compile_nothing()
        told = deepspeed_config(config, options)
        if config.stage == 3:  # after the optimizer's groups, which go by the shapes of whole weights
            partition(module, torch.bfloat16 if options.bfloat16 else torch.float32, told)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=told, dist_init_required=False
        )

    @property
    def model(self) -> Any:
        return self.engine

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.scale)
        # DeepSpeed counts micro-batches in `step`, and applies at the last one of a batch: that is ours to call, with
        # its rate set.
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * factor
        self.engine.step()

    def weights(self) -> dict[str, Tensor] | None:
        import deepspeed

        module, first = self.engine.module, torch.distributed.get_rank() == 0
        found: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            gather = deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else contextlib.nullcontext()
            with gather:
                if first:
                    found[name] = parameter.detach().cpu().clone()
        if not first:
            return None
        # Buffers that a model does not save (rotary tables) would be strange keys to who loads it.
        kept = set(module.state_dict())
        buffers = {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in kept}
        return found | buffers

    def save(self, directory: Path) -> None:
        # What is frozen is the base's, in every process alike.
        self.engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        """Read a checkpoint whose digests were checked, since DeepSpeed unpickles it.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        whole = all(parameter.requires_grad for parameter in self.engine.module.parameters())
        loaded, _ = self.engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=whole)
        if loaded is None:
            raise UserError(f"DeepSpeed cannot read its checkpoint in {directory}; delete it to train anew")

    def close(self) -> None:
        """Give back what the engine holds, so that the next training of the same worker group finds room."""
        self.engine.destroy()
