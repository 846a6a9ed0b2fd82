"""Stages in processes of their own, forked from one server that has imported the libraries: that takes longer than a short run does."""
import importlib
import multiprocessing
import os
import socket

import torch

import common

for library in ("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "matplotlib.pyplot", "open_clip", "peft"):
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
    process = context.Process(target=run_stage, args=(stage, [str(f) for f in flags], env), daemon=True)
    process.start()
    return process


def run_two(stage, *flags):
    """Two gloo processes in the environment that torchrun and accelerate launch set."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    processes = [start(stage, *flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    for process in processes:
        process.join(300)
    assert [p.exitcode for p in processes] == [0, 0]
