"""What is measured in a process of its own: the memory of building a model, and of one pass of a layer.

These processes are forks of a server that has imported all this and computed nothing.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.layers import PASSES, call, make_mlps, ours, reference
from benchmarks.models import make_method
from benchmarks.settings import GEOMETRIES, Settings
from fusion_merge import CLIPVisionModelPool, MergedCLIPVisionModel
from fusion_merge.moe import moe_layers

_STATUS = Path("/proc/self/status")

Result = TypeVar("Result")


def apart(phase: Callable[..., Result], *arguments: object) -> Result:
    """Run something in a process of its own, and return its result.

    Args:
        phase: a function of a module.
        *arguments: of the function.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(phase, *arguments).result()


def resident(field: str) -> int:
    """Return how much memory of this process is in RAM, in bytes.

    Args:
        field: `VmRSS` for now, `VmHWM` for the most since `forget_peak`, `RssFile` for the mapped files of now. Where
            there is no `/proc`, each is the most since the process began.
    """
    if not _STATUS.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = _STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> bool:
    """Let the peak begin at what is resident now; tell whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak(run: Callable[[], Result]) -> tuple[Result, int, bool]:
    """Run something and see how much memory becomes resident meanwhile.

    Args:
        run: what is run.

    Returns:
        Its result; the peak above what was resident before, in bytes, at least one page; and whether earlier peaks
        are surely not counted.
    """
    gc.collect()
    fresh = forget_peak()
    before = resident("VmRSS")
    result = run()
    return result, max(resident("VmHWM") - before, resource.getpagesize()), fresh


def allocated_peak(run: Callable[[], object]) -> int:
    """Run something; return the peak of what PyTorch allocates meanwhile, in bytes.

    Args:
        run: what is run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return max(int(event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")


def bytes_of(module: nn.Module) -> int:
    """Return how many bytes the tensors of a module take.

    Args:
        module: the module.
    """
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def bytes_of_banks(model: MergedCLIPVisionModel) -> int:
    """Return how many bytes the expert banks of a model take.

    Args:
        model: the model.
    """
    layers = moe_layers(model.vision_model).values()
    return sum(bytes_of(linear.experts) for layer in layers for linear in layer.linears().values())


def bytes_of_saved_banks(folder: Path) -> int:
    """Return how many bytes the expert banks of a saved model take, from the headers of its files.

    Args:
        folder: where the model was saved.
    """
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if ".experts." in name:
                first, last = entry["data_offsets"]
                total += last - first
    return total


def open_pool(folder: Path) -> CLIPVisionModelPool:
    """Return the pool of the models in a folder, `pretrained` among them.

    Args:
        folder: one folder a model.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != "pretrained")
    return CLIPVisionModelPool(
        {"_pretrained_": str(folder / "pretrained"), **{name: str(folder / name) for name in names}}
    )


def build(
    settings: Settings, method: str, models: Path, toys: Path, save: Path | None = None, dtype: str | None = None
) -> dict[str, int]:
    """Build a model from checkpoints on disk, after a toy.

    Args:
        settings: of the run.
        method: one of `METHODS`.
        models: the folder of the models.
        toys: that of the toy's.
        save: where to save the model, to measure its banks on disk too.
        dtype: the banks', if it is not the default.
    """
    torch.set_num_threads(settings.threads)
    options = {} if dtype is None else {"expert_dtype": dtype}
    make_method(method, GEOMETRIES["toy"], **options).build(open_pool(toys))
    algorithm, pools = make_method(method, settings.geometry, **options), []

    def run() -> MergedCLIPVisionModel:
        pools.append(open_pool(models))  # stays open, so that what is mapped can still be seen
        return algorithm.build(pools[0])

    mapped = -resident("RssFile")
    model, peak, fresh = resident_peak(run)
    mapped += resident("RssFile")
    found = {"peak": peak, "fresh": fresh, "mapped": mapped, "model": bytes_of(model), "banks": bytes_of_banks(model)}
    if save is not None:
        model.save_pretrained(save)
        found["banks_on_disk"] = bytes_of_saved_banks(save)
    return found


def activation(settings: Settings, method: str, who: str) -> int | None:
    """Measure a forward and backward pass of one MLP, sample routing, after another one.

    Args:
        settings: of the run.
        method: one of `METHODS`.
        who: floor, ours or reference.

    Returns:
        The bytes allocated at the peak; None where fusion-bench is not installed.
    """
    torch.set_num_threads(settings.threads)
    base, tuned = make_mlps(settings.geometry, settings.tasks)
    make = {"ours": ours, "reference": reference}
    mlp: nn.Module | None = base if who == "floor" else make[who](method, base, tuned, settings.geometry.rank)
    if mlp is None:
        return None
    run = call(mlp, settings.geometry, PASSES[1])
    run()
    mlp.zero_grad()
    return allocated_peak(run)
