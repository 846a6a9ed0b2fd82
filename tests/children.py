"""Stages in processes of their own, forked from a server that has imported the libraries.

The imports take longer than a short run does.
"""

import importlib
import multiprocessing
import os
import socket

import torch

import common

SLOW = ("open_clip", "peft", "accelerate", "matplotlib.figure")
SLOW += ("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",)

for library in SLOW:
    importlib.import_module(library)


def run_stage(stage, flags, env):
    os.environ.update(env)
    os.chdir(common.ROOT)
    torch.set_num_threads(1)  # a forked process has no thread pool
    module = importlib.import_module(stage)
    module.main(module.parse_args(flags))


def start(stage, *flags, **env):
    """A process that runs a stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["children"])
    flags = [str(f) for f in flags]
    process = context.Process(target=run_stage, args=(stage, flags, env), daemon=True)
    process.start()
    return process


def run_two(stage, *flags):
    """Two gloo processes in the environment that accelerate launch and torchrun set."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = [start(stage, *flags, RANK=r, LOCAL_RANK=r, **shared) for r in "01"]
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
