"""Prices a stage at published size, without weights or data: what --dry-run of every stage starts.

    python 05_dps.py --dry-run --preset paper --backbone flux --reward hpsv2 --tflops 200

The published models are built on PyTorch's meta device, which has shapes and no numbers, and the
stage's own step functions run on them (cases.py). TFLOP are 2 x multiply-adds of matrix products,
convolutions and attention, the latter as flash attention, which is what a GPU runs. peak_gib is the
largest sum of all storages that are alive at once in a step: loaded_gib of models and what else is
there before it, saved_gib more when its backward pass begins, and transients. What CUDA's libraries
take besides is not counted. The preset is 24gb where none or mini is given. The last line printed
is the table as one JSON object.
"""

import argparse
import contextlib
import gc
import importlib
import json
import sys
import weakref
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cases  # noqa: E402
from sizes import CONFIGS, random_reward  # noqa: E402

import common  # noqa: E402

aten = torch.ops.aten


# ---------------------------------------------------------------------------- counting
@cache
def is_pure(call):
    """Whether an operator makes one new tensor and does nothing else."""
    schema = call._schema
    aliases = [x.alias_info for x in (*schema.arguments, *schema.returns)]
    return not any(aliases) and [str(x.type) for x in schema.returns] == ["Tensor"]


def form(x):
    """What the form of a pure operator's result depends on, of an argument."""
    if isinstance(x, (list, tuple)):
        return tuple(map(form, x))
    return (x.shape, x.stride(), x.dtype, x.device) if torch.is_tensor(x) else (type(x), x)


class Meter(TorchDispatchMode):
    """Counts what runs under it: FLOP by dtype, and bytes of the storages alive on a device.

    It makes a card of the meta device: what is copied to the CPU arrives there, though not set, and
    any number that is read is 1.
    """

    def __init__(self, device="meta"):
        super().__init__()
        self.device = device
        self.known = set()
        self.live = self.peak = 0
        self.flop = Counter()
        self.seen = {}  # the form of what a pure operator gave on meta, and its FLOP

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and torch.is_tensor(args[0]) and args[0].is_meta:
            if call is aten._local_scalar_dense.default:
                return 1
            if call is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        key = call, form(args), form([*kwargs.items()])
        if key in self.seen:  # meta computes it in Python, slowly: once is enough
            *size, dtype, flop = self.seen[key]
            found = torch.empty_strided(*size, dtype=dtype, device="meta")
        else:
            found = call(*args, **kwargs)
            formula = flop_registry.get(call.overloadpacket)
            flop = formula(*args, **kwargs, out_val=found) if formula else 0
            if is_pure(call) and found.is_meta:
                self.seen[key] = found.shape, found.stride(), found.dtype, flop
        if flop:
            self.flop[next(x.dtype for x in args if torch.is_tensor(x))] += flop
        self.add(tree_leaves(found))
        return found

    def add(self, tensors):
        """Tensors that are there; those that are made under the meter it finds itself."""
        for x in tensors:
            if not torch.is_tensor(x) or x.device.type != self.device:
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)

    def drop(self, address, size):
        self.known.remove(address)
        self.live -= size

    def cost(self, run):
        """The Cost of run(), under this meter."""
        gc.collect()
        self.flop = Counter()
        self.peak = start = self.live
        saved = [0]
        backward = torch.Tensor.backward

        def note(loss, *args, **kwargs):
            saved.append(self.live - start)
            backward(loss, *args, **kwargs)

        with mock.patch.object(torch.Tensor, "backward", note):
            run()
        gib = (x / cases.GIB for x in (start, max(saved), self.peak))
        return cases.Cost(self.flop, *gib)


def flash(query, key, value, *_, **__):
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


# what CUDA's autocast runs in bfloat16, of what towers and values use, and what in float32
LOWER = [(F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention")]
LOWER += [(torch.Tensor, "__matmul__")]
HIGHER = [(F, "layer_norm"), (F, "interpolate")]


@contextlib.contextmanager
def autocast(device, dtype):
    """common.autocast as CUDA has it, for the meta device, which has none."""
    copies = {}  # of weights that learn; they are kept to the end, others while they are used

    def cast(x, to):
        if not torch.is_tensor(x) or x.dtype == to:
            return x
        if not (x.is_leaf and x.requires_grad and to == torch.bfloat16):
            return x.to(to)
        if id(x) not in copies:
            copies[id(x)] = x.to(to)
        return copies[id(x)]

    def casting(call, to):
        def cast_call(*args, **kwargs):
            kwargs = {k: cast(x, to) for k, x in kwargs.items()}
            return call(*(cast(x, to) for x in args), **kwargs)

        return cast_call

    with contextlib.ExitStack() as stack:
        for names, to in ((LOWER, dtype), (HIGHER, torch.float32)):
            for owner, name in names if dtype == torch.bfloat16 else ():
                call = casting(getattr(owner, name), to)
                stack.enter_context(mock.patch.object(owner, name, call))
        yield


@contextlib.contextmanager
def counting():
    """A Meter, under which the meta device is a card with CUDA's attention and autocast."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        mock.patch.object(common, "autocast", autocast),
        mock.patch.object(common, "Reward", random_reward),
        Meter() as meter,
    ):
        yield meter


def counted(stage, args):
    """The stage's cases, their steps counted on the meta device."""
    with counting() as meter:
        for case in cases.cases_of(stage, args, "meta"):
            for step in case.times:
                step.cost = step.cost or meter.cost(step)
                step.run = None  # what it holds can go
            yield case


# ---------------------------------------------------------------------------- the shell
def parse(argv):
    """The stage's module and its flags."""
    p = argparse.ArgumentParser("price.py", add_help=False, allow_abbrev=False)
    p.add_argument("stage", help="file of a stage")
    p.add_argument("--dry-run", action="store_true")
    p.add_argument("--preset", default="24gb")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--tflops", type=float, default=150, help="what a card sustains")
    own, rest = p.parse_known_args(argv)
    stage = importlib.import_module(Path(own.stage).stem)
    given = ["--preset", own.preset.replace("mini", "24gb"), "--dtype", own.dtype, *rest]
    with mock.patch.object(common, "claim"):  # a run in the same folder is not disturbed
        args = stage.parse_args([*given, "--device", "cpu"])
    args.tflops = own.tflops
    short = {hub: name for name, hub in common.HUB.items()}
    args.backbone = short.get(args.backbone, args.backbone)
    if args.backbone not in CONFIGS:
        known = ", ".join(CONFIGS)
        common.fail(f"--dry-run knows the published sizes of {known}, not {args.backbone}")
    return stage, args


def main(argv):
    stage, args = parse(argv)
    gc.freeze()  # what is there by now is no garbage, and need not be looked through at every cost
    rows = [case.row(args.tflops) for case in counted(stage, args)]
    print(f"{args.backbone} + {args.reward} at {args.resolution} px, published size, {args.dtype}")
    keys = ("method", "unit", "tflop", "loaded_gib", "saved_gib", "peak_gib", "fits", "n", "hours")
    common.print_table(rows, keys)
    speeds = (
        f"{args.tflops:g} TFLOP/s (--tflops) in bfloat16, half of it in float32 (the VAE's TF32)"
    )
    print(f"hours at {speeds}, {cases.ON_CPU} in float64 on the CPU")
    most = max(rows, key=lambda row: row["peak_gib"])
    print(f"peak of the stage: {most['peak_gib']:.1f} GiB ({most['method']})")
    about = dict(backbone=args.backbone, reward=args.reward, resolution=args.resolution)
    print(json.dumps(dict(stage=stage.__name__, **about, cases=rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
