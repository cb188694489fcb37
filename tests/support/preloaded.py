"""Processes that are forked from one which has loaded torch and transformers: their work begins at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LOADED = ["safer_ray.cli.app", "safer_ray.pipeline.run", "safer_ray.reward.train", "safer_ray.sae.train"]
LOADED += ["safer_ray.features.passes", "safer_ray.reward.plain_text", "transformers.models.llama.modeling_llama"]
LOADED += ["scipy.stats"]
forks = multiprocessing.get_context("forkserver")  # not this process: it has threads
forks.set_forkserver_preload(LOADED)


def started(work: Callable[..., Any], *arguments: Any, said: Path) -> BaseProcess:
    """Begin work in a process that writes to `said`, with as many threads as this one."""
    process = forks.Process(target=_begin, args=(work, arguments, said, torch.get_num_threads()))
    process.start()
    return process


def _begin(work: Callable[..., Any], arguments: tuple[Any, ...], said: Path, threads: int) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(threads)
    work(*arguments)


def command(*words: object) -> None:
    """`safer-ray WORDS`, in this process."""
    from safer_ray.cli.app import main

    sys.argv = ["safer-ray", *map(str, words)]
    main()
