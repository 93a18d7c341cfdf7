"""Bad input by the hundred: each ends in one of the library's own errors, soon, with nothing run and nothing written.

The cases are parameters, so that one that fails is named. What may be refused or not (a flipped bit that changes
nothing) is accepted only if what was read is what was there before.
"""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import typing
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers import TASKS, copied, same_state, upcycled_toy
from killed import BELONGS_TO, adapted
from PIL import Image
from runs import files_in, own_pool, random_tower, run_cli
from safetensors.torch import load_file, save_file

from fusion_merge import (
    CLIPVisionModelPool,
    CLIPVisionModelTaskPool,
    MergedCLIPVisionModel,
    TaskArithmeticAlgorithm,
    WEMoEAlgorithm,
    get_method,
    list_methods,
)
from fusion_merge.adaptation.checkpoint import load_trained, router_state, save_trained
from fusion_merge.adaptation.progress import Progress
from fusion_merge.errors import CheckpointError, ConfigError, FusionMergeError, ModelError
from fusion_merge.models.clip import save_tower
from fusion_merge.models.merged_config import fields_checksum
from fusion_merge.pools.datasets import make_task
from fusion_merge.program import FusionProgram
from fusion_merge.sealed import read_sealed, write_sealed

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of what Pillow and datasets leave open when they fail
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 10
"""How long one case may take; most take a few milliseconds."""

WEIGHTS = "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"


class TookTooLong(BaseException):
    """Not an `Exception`: nothing in the library may swallow it."""


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_open() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # here, where warnings about the files of broken images are expected


@pytest.fixture(autouse=True)
def _bounded_time() -> Iterator[None]:
    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLong(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def refused(act: Callable[[], Any]) -> bool:
    """Return whether an action ends in an error of the library's own; every other error is a failure."""
    message = None
    try:
        act()
    except FusionMergeError as error:
        message = str(error)
    assert message is None or message.strip(), "an error without a message"
    return message is not None


def must_be_refused(act: Callable[[], Any], *kinds: type[FusionMergeError]) -> None:
    """Check that an action ends in an error of the library's own."""
    with pytest.raises(kinds or FusionMergeError) as caught:
        act()
    assert str(caught.value).strip(), "an error without a message"


def flipped(content: bytes, seed: int, start: int = 0, stop: int | None = None) -> bytes:
    """Return the bytes with one bit of those between `start` and `stop` flipped."""
    draw = random.Random(seed)
    changed = bytearray(content)
    changed[draw.randrange(start, len(content) if stop is None else stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(content: bytes, share: float) -> bytes:
    """Return the first bytes."""
    return content[: int(share * len(content))]


def header_end(content: bytes) -> int:
    """Return where the tensors of a safetensors file begin."""
    return 8 + int(struct.unpack("<Q", content[:8])[0])


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path, way: str) -> None:
        self.call: tuple[Any, tuple[Any, ...]] = {
            "os.system": (os.system, (f"touch {marker}",)),
            "open": (open, (str(marker), "w")),
            "exec": (exec, (f"open({str(marker)!r}, 'w')",)),
            "mkdir": (os.mkdir, (str(marker),)),
            "touch": (Path.touch, (marker,)),
        }[way]

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


# Configurations

BAD_VALUES: dict[str, Any] = {
    "null": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus one": -1,
    "huge": 10**400,
    "hugely negative": -(10**400),
    "true": True,
    "text": "x",
    "zero byte": "\0",
    "long": "x" * 5000,
    "nobody's home": "~nobody-of-that-name/x",
    "list": [],
    "table": {},
    "unknown key": {"x": 1},
    "object": object(),
}

NEVER_RIGHT = ("object", "huge", "hugely negative")
"""What no option can be; of the rest some are right for some."""

OPTIONS = sorted(
    {option: (name, option) for name in list_methods() for option in get_method(name)().options()}.values()
)
"""Each option once, of the last method that has it: the others share its declaration."""


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize(("method", "option"), OPTIONS, ids=[".".join(o) for o in OPTIONS])
def test_value_of_a_method_s_option(method, option, value):
    def make() -> None:
        made = get_method(method)(**{option: copy.copy(BAD_VALUES[value])})
        kept = getattr(made, option)
        assert not isinstance(kept, float) or np.isfinite(kept), f"{option}={kept} was accepted"
        declared = str(typing.get_type_hints(get_method(method))[option])
        assert not isinstance(kept, list) or "list[" in declared, f"{option}={kept} was accepted"
        assert not isinstance(kept, dict) or "dict[" in declared, f"{option}={kept} was accepted"

    if not refused(make):
        assert value not in NEVER_RIGHT, f"{option}={value} was accepted"


def plain_config(pool_dir: Path, method: str = "task_arithmetic") -> dict[str, Any]:
    """Return the configuration of a run on the pool, as plain values."""
    cls = get_method(method)
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}
    data = {t: {"data": str(pool_dir / "images" / t)} for t in TASKS}
    return {
        "method": {"_target_": f"{cls.__module__}.{cls.__qualname__}"},
        "modelpool": {
            "_target_": "fusion_merge.pools.model_pool.CLIPVisionModelPool",
            "models": models,
            "processor": None,
            "train_datasets": None,
            "test_datasets": None,
            "fast_dev_run": False,
            "platform": "hf",
        },
        "taskpool": {
            "_target_": "fusion_merge.pools.task_pool.CLIPVisionModelTaskPool",
            "tasks": data,
            "test_datasets": None,
            "clip_model": None,
            "base_model": None,
            "processor": None,
            "batch_size": 8,
            "num_workers": 0,
            "dataloader_kwargs": None,
            "fast_dev_run": False,
            "split": None,
        },
        "fabric": {"devices": 1, "accelerator": "cpu", "precision": None, "strategy": "auto"},
        "seed": 0,
        "baselines": [],
    }


def deep_keys(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return the place of every value in a configuration."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from deep_keys(value, (*path, key))


PARTS = ("method", "modelpool", "taskpool")
KEYS = [key for key in deep_keys(plain_config(Path("x"))) if key[0] in PARTS and len(key) > 1]
KEYS += [("taskpool", "tasks", "cats", k) for k in ("split", "classnames", "templates", "image_column", "label_column")]
KEYS += [("modelpool", k, "cats") for k in ("test_datasets", "train_datasets")]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_value_anywhere_in_a_configuration(pool_dir, tmp_path, key, value):
    config = plain_config(pool_dir)
    *tables, last = key
    table = config
    for name in tables:
        table[name] = dict(table[name] or {})
        table = table[name]
    table[last] = copy.copy(BAD_VALUES[value])
    if not refused(lambda: FusionProgram(config, tmp_path / "out").check()):
        harmless = (None, "", [], {}, True) if "dataset" not in last else (None, {}, "x")
        unread = "test_datasets" in key[1:2] or "train_datasets" in key[1:2]  # this method adapts on no images
        assert unread or BAD_VALUES[value] in harmless or last in ("classnames", "templates"), (
            f"{'.'.join(key)}={value} was accepted"
        )
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "target",
    [
        "",
        ".",
        ".x.y",
        "x",
        "x.y",
        "os.system",
        "os.path",
        "builtins.dict",
        "builtins.print",
        "builtins.type",
        "builtins.object",
        "sys.exit",
        "torch.Tensor",
        "torch.nn.Linear",
        "pathlib.Path",
        "subprocess.Popen",
        "fusion_merge.methods.base.Method",
        "fusion_merge.methods.wemoe",
        "fusion_merge.errors.ConfigError",
        "\0.x",
        "a..b",
        "x" * 5000,
        "fusion_merge.methods.dummy.DummyAlgorithm.x",
        None,
        3,
        [],
        {},
    ],
    ids=lambda t: repr(t)[:40],
)
def test_target_of_a_configuration(pool_dir, tmp_path, part, target):
    config = plain_config(pool_dir)
    config[part] = {"_target_": target}
    must_be_refused(lambda: FusionProgram(config, tmp_path / "out"), ConfigError, FusionMergeError)
    assert files_in(tmp_path) == []


COMMANDS = [
    "method.init_lambda=nan",
    "method.init_lambda={a: 1}",
    "method.max_steps=1e3",
    "method.checkpoint=none.ckpt",
    "method.resume=true method.cache_dir=null",
    "method.unknown=1",
    "method._target_=os.system",
    "+method._target_.x=1",
    "modelpool.models=null",
    "modelpool.models={cats: x}",
    "modelpool.models={_pretrained_: null}",
    "modelpool.models.cats={path: x, y: 1}",
    "taskpool.tasks.cats=/none",
    "taskpool.tasks.cats={data: [1]}",
    "taskpool.batch_size=0",
    "taskpool.batch_size=nan",
    "taskpool.split=sideways",
    "fabric=null",
    "fabric=3",
    "fabric.devices={a: 1}",
    "fabric.accelerator=null",
    "seed=null",
    f"seed={10**30}",
    "baselines=[null]",
    "fast_dev_run=null",
    "output_dir=[a]",
    "output_dir=~nobody-of-that-name/x",
    f"output_dir={'x' * 300}",
    f"merged_model_save_path={'x' * 300}",
    f"report_save_path={'x' * 300}",
    "report_save_path=~nobody-of-that-name/x",
    "output_dir=${unknown}",
    "output_dir=${output_dir}",
    "seed=${method.seed}",
    "method.lr=${oc.env:NO_SUCH_VARIABLE}",
    "+x=1",
    "~seed",
    "~method",
    "~fabric",
    "=1",
    "é=1",
    "seed=é",
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda a: a[:60])
def test_command_line(pool_dir, tmp_path, arguments):
    typed = [arguments] if "{" in arguments else arguments.split(" ")
    done = run_cli("method=wemoe", *own_pool(pool_dir), "dry_run=true", *typed, cwd=tmp_path)
    assert done.code in (1, 2), f"exit code {done.code}: {done.err}"
    assert "Traceback" not in done.err
    assert files_in(tmp_path) == []


# Pool models


def pool_with(pool_dir: Path, **models: Any) -> CLIPVisionModelPool:
    """Return a pool whose models are those of the folder, some of them replaced."""
    paths = {"_pretrained_": str(pool_dir / "pretrained")} | {t: str(pool_dir / t) for t in TASKS}
    return CLIPVisionModelPool(paths | models)


def merge_with(pool_dir: Path, folder: Path) -> torch.nn.Module:
    """Merge the models of the pool, that in `folder` in the place of `cats`."""
    return TaskArithmeticAlgorithm(scaling_factor=1.0).run(pool_with(pool_dir, cats=str(folder)))


@pytest.fixture
def broken(pool_dir, tmp_path) -> Path:
    """A copy of one model of the pool, to be broken."""
    return Path(shutil.copytree(pool_dir / "cats", tmp_path / "broken"))


def as_torch(folder: Path, content: Any = None, *, legacy: bool = False) -> Path:
    """Put a torch file in the place of the safetensors of a model."""
    state = load_file(folder / WEIGHTS) if content is None else content
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / TORCH_WEIGHTS, _use_new_zipfile_serialization=not legacy)
    return folder / TORCH_WEIGHTS


SHARES = (0.0, 0.001, 0.05, 0.5, 0.99, 0.9999)
FORMATS = ("safetensors", "torch", "legacy torch")


def weights_in(folder: Path, kind: str) -> Path:
    """Return the weights of a model, in one of `FORMATS`."""
    return folder / WEIGHTS if kind == "safetensors" else as_torch(folder, legacy=kind == "legacy torch")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_weights(pool_dir, broken, kind, share):
    file = weights_in(broken, kind)
    file.write_bytes(truncated(file.read_bytes(), share))
    must_be_refused(lambda: merge_with(pool_dir, broken), ModelError)


def merged_or_refused(pool_dir: Path, folder: Path) -> bool:
    """Return whether a merge was refused; if it was not, all of its tensors must be finite."""
    merged: list[torch.nn.Module] = []
    if refused(lambda: merged.append(merge_with(pool_dir, folder))):
        return True
    assert all(torch.isfinite(t).all() for t in merged[0].state_dict().values())
    return False


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_header_of_weights(pool_dir, broken, seed):
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(flipped(content, seed, 0, header_end(content)))
    expected = copied(pool_with(pool_dir).load_model("cats").state_dict())
    if not merged_or_refused(pool_dir, broken):
        assert same_state(pool_with(pool_dir, cats=str(broken)).load_model("cats").state_dict(), expected)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bit_anywhere_in_weights(pool_dir, broken, kind, seed):
    file = weights_in(broken, kind)
    file.write_bytes(flipped(file.read_bytes(), seed))
    merged_or_refused(pool_dir, broken)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", FORMATS)
def test_random_bytes_in_the_place_of_weights(pool_dir, broken, kind, seed):
    file = weights_in(broken, kind)
    draw = random.Random(seed)
    content = bytearray(file.read_bytes())
    start = draw.randrange(min(len(content) - 64, 2000))
    content[start : start + 64] = draw.randbytes(64)
    file.write_bytes(content if seed % 2 else draw.randbytes(500))
    merged_or_refused(pool_dir, broken)


ODD_STATES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no tensors": lambda s: {},
    "a list": lambda s: list(s.values()),
    "a tensor": lambda s: next(iter(s.values())),
    "a number": lambda s: 3,
    "nested": lambda s: {"state_dict": s},
    "numbers for names": lambda s: dict(enumerate(s.values())),
    "a number among names": lambda s: s | {3: torch.ones(1)},
    "a tuple among names": lambda s: s | {("a", "b"): torch.ones(1)},
    "lists for tensors": lambda s: {n: t.tolist() for n, t in s.items()},
    "arrays of text": lambda s: dict.fromkeys(s, "x"),
    "sparse": lambda s: {n: t.to_sparse() for n, t in s.items()},
    "quantized": lambda s: {n: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) for n, t in s.items()},
    "meta": lambda s: {n: t.to("meta") for n, t in s.items()},
    "strided": lambda s: {n: torch.ones(1).expand(t.shape) for n, t in s.items()},
}


@pytest.mark.filterwarnings("ignore")  # of torch, about its own kinds of tensors
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("odd", ODD_STATES)
def test_torch_file_of_something_else(pool_dir, broken, odd, legacy):
    as_torch(broken, ODD_STATES[odd](load_file(broken / WEIGHTS)), legacy=legacy)
    if odd == "strided":
        merged_or_refused(pool_dir, broken)
    else:
        must_be_refused(lambda: merge_with(pool_dir, broken))


DTYPES = {
    "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8,
    "bool": torch.bool, "complex64": torch.complex64,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_a_wrong_dtype(pool_dir, broken, dtype, which, kind):
    state = load_file(broken / WEIGHTS)
    chosen = list(state) if which == "all" else [min(state)]
    state |= {name: state[name].to(DTYPES[dtype]) for name in chosen}
    if kind == "torch":
        as_torch(broken, state)
    else:
        save_file(state, broken / WEIGHTS)
    pool = pool_with(pool_dir, cats=str(broken))
    must_be_refused(pool.check, ModelError)  # from headers alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_module_of_a_wrong_dtype(pool_dir, dtype):
    tower = random_tower(1).requires_grad_(False)
    weight = next(p for n, p in tower.named_parameters() if n.endswith("fc1.weight"))
    weight.data = weight.data.to(DTYPES[dtype])
    must_be_refused(pool_with(pool_dir, cats=tower).check, ModelError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_precision_are_right(pool_dir, broken, dtype):
    save_file({n: t.to(dtype) for n, t in load_file(broken / WEIGHTS).items()}, broken / WEIGHTS)
    merge_with(pool_dir, broken)


NUMBERS = {"nan": float("nan"), "minus inf": float("-inf")}
TENSORS = ("class_embedding", "patch_embedding.weight", "0.mlp.fc1.weight", "1.mlp.fc2.bias", "post_layernorm.bias")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("number", NUMBERS)
def test_weights_that_are_no_numbers(pool_dir, broken, number, tensor, place, kind):
    state = load_file(broken / WEIGHTS)
    (name,) = [n for n in state if n.endswith(tensor)]
    state[name].view(-1)[place] = NUMBERS[number]
    if kind == "torch":
        as_torch(broken, state)
    else:
        save_file(state, broken / WEIGHTS)
    must_be_refused(lambda: merge_with(pool_dir, broken), ModelError)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 8}, {"hidden_size": 32}, {"intermediate_size": 32}, {"num_hidden_layers": 1},
        {"num_hidden_layers": 3}, {"image_size": 32}, {"patch_size": 4}, {"num_attention_heads": 1},
        {"num_channels": 1}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3},
    ],
    ids=str,
)  # fmt: skip
def test_tower_of_another_architecture(pool_dir, tmp_path, change):
    save_tower(random_tower(3, **change), tmp_path / "other")
    must_be_refused(pool_with(pool_dir, cats=str(tmp_path / "other")).check, ModelError)


WAYS = ("os.system", "exec", "touch")


def pickled(payload: Any, kind: str) -> bytes:
    """Return a file that runs code when it is unpickled, in one of several formats."""
    buffer = io.BytesIO()
    if kind == "pickle":
        return pickle.dumps(payload)
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
            archive.writestr("archive/version", "3\n")
        return buffer.getvalue()
    torch.save(payload, buffer, _use_new_zipfile_serialization=kind == "torch")
    return buffer.getvalue()


@pytest.mark.parametrize("name", [TORCH_WEIGHTS, WEIGHTS, "weights.pt"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "torch", "legacy torch"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_with_code_in_them(pool_dir, broken, tmp_path, way, kind, name):
    marker = tmp_path / "marker"
    (broken / WEIGHTS).unlink()
    (broken / name).write_bytes(pickled({"a": torch.ones(1), "b": Bomb(marker, way)}, kind))
    source = broken if name in (TORCH_WEIGHTS, WEIGHTS) else broken / name
    must_be_refused(lambda: merge_with(pool_dir, source), ModelError)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "torch", "legacy torch"])
@pytest.mark.parametrize("way", WAYS)
def test_router_checkpoint_and_progress_with_code_in_them(tmp_path, way, kind):
    marker = tmp_path / "marker"
    (tmp_path / "state").write_bytes(pickled({"b": Bomb(marker, way)}, kind))
    must_be_refused(lambda: load_trained(tmp_path / "state", router_state(upcycled_toy()), BELONGS_TO), CheckpointError)
    must_be_refused(lambda: Progress(tmp_path / "state", BELONGS_TO, 1, resume=True), CheckpointError)
    assert not marker.exists()


@pytest.mark.parametrize("way", WAYS)
def test_clip_model_with_code_in_its_text_tower(pool_dir, tmp_path, way):
    folder = Path(shutil.copytree(pool_dir / "pretrained", tmp_path / "clip"))
    as_torch(folder, {"text_model.x": Bomb(tmp_path / "marker", way)} | load_file(folder / WEIGHTS))
    pool = CLIPVisionModelTaskPool({"cats": str(pool_dir / "images" / "cats")}, clip_model=str(folder))
    must_be_refused(lambda: pool.head("cats"), ModelError)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "file", ["preprocessor_config.json", "tokenizer_config.json", "config.json", "processor_config.json"]
)
@pytest.mark.parametrize("typed", [False, True], ids=["unnamed class", "named class"])
def test_clip_model_with_a_module_of_its_own(pool_dir, tmp_path, file, typed):
    folder = Path(shutil.copytree(pool_dir / "pretrained", tmp_path / "clip"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    if not typed:
        for key in ("image_processor_type", "tokenizer_class"):
            config.pop(key, None)
    classes = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor")
    config["auto_map"] = dict.fromkeys(classes, "own.Own") | {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / file).write_text(json.dumps(config))
    pool = CLIPVisionModelTaskPool({"cats": str(pool_dir / "images" / "cats")}, clip_model=str(folder))
    refused(lambda: (pool.check(), pool.head("cats"), pool.images("cats")))
    assert not (tmp_path / "marker").exists()


# Configurations of models

JUNK: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "text": b'"x"',
    "half": b'{"model_type": "clip_vi',
    "no keys": b"{}",
    "deep": b'{"a": ' * 100_000,
    "deep lists": b"[" * 100_000,
    "not utf-8": b"\xff\xfe\x00{}",
    "other model": b'{"model_type": "bert"}',
    "no text": b'{"model_type": 3}',
    "list for a type": b'{"model_type": ["clip"]}',
    "many digits": b'{"model_type": "clip_vision_model", "hidden_size": ' + b"9" * 6000 + b"}",
}


@pytest.mark.parametrize("junk", JUNK)
def test_config_that_is_something_else(pool_dir, broken, junk):
    (broken / "config.json").write_bytes(JUNK[junk])
    must_be_refused(pool_with(pool_dir, cats=str(broken)).check, ModelError)


@pytest.mark.parametrize("junk", JUNK)
def test_index_that_is_something_else(pool_dir, broken, junk):
    (broken / WEIGHTS).unlink()
    (broken / f"{WEIGHTS}.index.json").write_bytes(JUNK[junk])
    must_be_refused(pool_with(pool_dir, cats=str(broken)).check, ModelError)


MAPS = {"text": "x", "list": [1], "nothing": {}, "numbers": {"a": 3}, "null": {"a": None}, "a folder": {"a": "."},
        "above": {"a": "../cats/model.safetensors"}, "missing": {"a": "b"}, "long": {"a": "x" * 5000},
        "zero byte": {"a": "\0"}, "config": {"a": "config.json"}}  # fmt: skip


@pytest.mark.parametrize("table", MAPS)
def test_index_that_names_something_else(pool_dir, broken, table):
    (broken / WEIGHTS).unlink()
    (broken / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": MAPS[table]}))
    must_be_refused(pool_with(pool_dir, cats=str(broken)).check, ModelError)


NUMERIC = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
           "image_size", "patch_size", "layer_norm_eps", "hidden_act", "attention_dropout",
           "projection_dim")  # fmt: skip
WRONG: dict[str, Any] = {
    "null": None,
    "zero": 0,
    "minus one": -1,
    "half": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "huge": 10**30,
    "large": 10**9,
    "text": "x",
    "list": [8, 8],
    "table": {"a": 1},
    "true": True,
}


def check_alone(folder: Path) -> Any:
    """Read a tower that stands alone."""
    pool = CLIPVisionModelPool({"_pretrained_": str(folder)})
    pool.check(0)
    return pool.load_pretrained_model()


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", NUMERIC)
def test_wrong_value_in_the_config_of_a_model(broken, key, value):
    config = json.loads((broken / "config.json").read_text())
    config[key] = WRONG[value]
    (broken / "config.json").write_text(json.dumps(config))
    unused = key in ("projection_dim", "attention_dropout", "layer_norm_eps")
    if not refused(lambda: check_alone(broken)) and not unused:
        pytest.fail(f"{key}={value} was accepted")


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_config_of_a_model(pool_dir, broken, seed):
    content = (broken / "config.json").read_bytes()
    (broken / "config.json").write_bytes(flipped(content, seed))
    merged_or_refused(pool_dir, broken)


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
@pytest.mark.parametrize("instead", ["nothing", "folder", "fifo", "dangling link", "looping link"])
def test_files_that_are_none(pool_dir, broken, missing, instead):
    file = broken / missing
    file.unlink()
    if instead == "folder":
        file.mkdir()
    elif instead == "fifo":
        os.mkfifo(file)
    elif instead == "dangling link":
        file.symlink_to("none")
    elif instead == "looping link":
        file.symlink_to(file.name)
    must_be_refused(lambda: merge_with(pool_dir, broken), ModelError)


SOURCES = ("", " ", ".", "..", "/", "//", "/none", "./none", "~", "~nobody-of-that-name/x", "\0", "a\0b", "x" * 300,
           "x" * 5000, "a/" * 3000, "a/b/c", "@main", "a/b@", "a/b@main@x", "zoo://", "zoo://tiny8", "zoo://x/y",
           "zoo://../..", "zoo://tiny8/../../..", "zoo://tiny8/" + "x" * 300, "zoo://\0", "http://localhost:1/x",
           "file:///etc/passwd", "/dev/null", "/dev/zero", "/etc/passwd", "/proc/self/mem", "owner/name", "none.pt",
           "é/ü", "-rf", "a b/c", "$HOME", "*", "\n", "\ud800")  # fmt: skip


@pytest.mark.parametrize("role", ["model", "clip_model", "processor", "data"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: ascii(s)[:30])
def test_source_that_is_none(pool_dir, tmp_path, monkeypatch, source, role):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    images = str(pool_dir / "images" / "cats")
    clip = str(pool_dir / "pretrained")
    if role == "model":
        must_be_refused(lambda: pool_with(pool_dir, cats=source).check())
    elif role == "clip_model":
        must_be_refused(lambda: CLIPVisionModelTaskPool({"cats": images}, clip_model=source).check())
    elif role == "processor":
        must_be_refused(lambda: CLIPVisionModelTaskPool({"cats": images}, clip_model=clip, processor=source).check())
    else:
        must_be_refused(lambda: CLIPVisionModelTaskPool({"cats": source}, clip_model=clip).check())
    assert files_in(tmp_path) == ["above", "above/here"]


# The CLIP model of the heads, and the processor


@pytest.fixture
def clip(pool_dir, tmp_path) -> Path:
    """A copy of the pretrained CLIP model, to be broken."""
    return Path(shutil.copytree(pool_dir / "pretrained", tmp_path / "clip"))


def score_with(pool_dir: Path, clip: Path) -> dict[str, Any]:
    """Score a tower of the pool with heads from the CLIP model in `clip`."""
    pool = CLIPVisionModelTaskPool({"cats": str(pool_dir / "images" / "cats")}, clip_model=str(clip), num_workers=0)
    pool.check()
    return pool.evaluate(pool_with(pool_dir).load_model("cats"))


def finite(report: dict[str, Any]) -> bool:
    """Return whether all scores of a report are numbers."""
    return all(np.isfinite(v) for name in ("cats", "average") for v in report[name].values())


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "tensor", ["text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight",
               "logit_scale", "text_model.final_layer_norm.bias", "text_model.encoder.layers.0.mlp.fc1.weight"],
)  # fmt: skip
def test_clip_model_whose_weights_are_no_numbers(pool_dir, clip, tensor, number):
    state = load_file(clip / WEIGHTS)
    state[tensor].view(-1)[-1] = NUMBERS[number]
    save_file(state, clip / WEIGHTS, metadata={"format": "pt"})
    must_be_refused(lambda: score_with(pool_dir, clip), ModelError)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", SHARES)
def test_truncated_clip_model(pool_dir, clip, kind, share):
    file = weights_in(clip, kind)
    file.write_bytes(truncated(file.read_bytes(), share))
    must_be_refused(lambda: score_with(pool_dir, clip), ModelError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_flipped_bit_in_a_clip_model(pool_dir, clip, seed):
    content = (clip / WEIGHTS).read_bytes()
    end = header_end(content)
    (clip / WEIGHTS).write_bytes(flipped(content, seed, 0, end if seed % 2 else None))
    refused(lambda: finite(score_with(pool_dir, clip)) or pytest.fail("scores that are no numbers"))


PROCESSOR_FILES = ("preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "config.json")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("junk", ["empty", "null", "list", "half", "no keys", "deep", "not utf-8"])
@pytest.mark.parametrize("file", PROCESSOR_FILES)
def test_processor_file_that_is_something_else(pool_dir, clip, file, junk):
    (clip / file).write_bytes(JUNK[junk])
    refused(lambda: finite(score_with(pool_dir, clip)) or pytest.fail("scores that are no numbers"))


IMAGE_KEYS = ("crop_size", "image_mean", "image_std", "rescale_factor")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("key", IMAGE_KEYS)
def test_wrong_value_in_the_config_of_a_processor(pool_dir, clip, key, value):
    file = clip / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: WRONG[value]}))
    refused(lambda: finite(score_with(pool_dir, clip)) or pytest.fail("scores that are no numbers"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("file", PROCESSOR_FILES)
def test_flipped_bit_in_a_processor(pool_dir, clip, file, seed):
    (clip / file).write_bytes(flipped((clip / file).read_bytes(), seed))
    refused(lambda: finite(score_with(pool_dir, clip)) or pytest.fail("scores that are no numbers"))


# Router checkpoints and the state of an adaptation


@pytest.fixture(scope="module")
def routers(tmp_path_factory) -> bytes:
    """A router checkpoint."""
    file = tmp_path_factory.mktemp("routers") / "routers"
    save_trained(file, router_state(upcycled_toy()), BELONGS_TO)
    return file.read_bytes()


@pytest.fixture(scope="module")
def progress(tmp_path_factory) -> bytes:
    """The state of an adaptation after two steps."""
    file = tmp_path_factory.mktemp("progress") / "state"
    adapted(Progress(file, BELONGS_TO, 1), 2)
    return file.read_bytes()


def read_routers(file: Path) -> bool:
    """Return whether a checkpoint was refused; it must leave the model alone then."""
    model = upcycled_toy(seed=7)
    before = copied(router_state(model))
    stopped = refused(lambda: load_trained(file, router_state(model), BELONGS_TO))
    if stopped:
        assert same_state(router_state(model), before)
    return stopped


def go_on_from(file: Path) -> bool:
    """Return whether an adaptation could not be gone on with."""
    return refused(lambda: adapted(Progress(file, BELONGS_TO, 1, resume=True), 3))


READERS: dict[str, Callable[[Path], bool]] = {"routers": read_routers, "progress": go_on_from}


@pytest.fixture(params=READERS)
def sealed(request, tmp_path) -> tuple[Path, bytes, Callable[[Path], bool]]:
    """A place for a sealed file, what belongs there, and what reads it."""
    return tmp_path / "sealed", request.getfixturevalue(request.param), READERS[request.param]


def test_sealed_file_that_is_whole(sealed):
    file, content, read = sealed
    file.write_bytes(content)
    assert not read(file)


@pytest.mark.parametrize("share", SHARES)
def test_truncated_sealed_file(sealed, share):
    file, content, read = sealed
    file.write_bytes(truncated(content, share))
    assert read(file)


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_a_sealed_file(sealed, seed):
    file, content, read = sealed
    changed = flipped(content, seed, 0, header_end(content) if seed % 2 else None)
    file.write_bytes(changed)
    assert read(file) or seed % 2, "a change of the values was not noticed"


def resealed(content: bytes, file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Write a sealed file whose tensors and description were changed by somebody who made a right checksum."""
    file.write_bytes(content)
    tensors, about = read_sealed(file, "file")
    change(tensors, about)
    write_sealed(file, tensors, about)


ABOUT_VALUES = {
    "null": None,
    "text": "x",
    "minus one": -1,
    "huge": 10**30,
    "list": [],
    "table": {},
    "nan": float("nan"),
}


@pytest.mark.parametrize("value", ABOUT_VALUES)
@pytest.mark.parametrize("key", ["step", "seconds", "guard", "precision", "belongs_to"])
def test_progress_that_says_something_else(progress, tmp_path, key, value):
    resealed(progress, tmp_path / "state", lambda _, about: about.update({key: ABOUT_VALUES[value]}))
    stopped = go_on_from(tmp_path / "state")
    assert stopped or (key, value) in (("precision", "table"), ("seconds", "minus one"), ("seconds", "huge"))


@pytest.mark.parametrize("value", ABOUT_VALUES)
@pytest.mark.parametrize("key", ["recent", "steps", "first", "collapsed"])
def test_progress_whose_guard_saw_something_else(progress, tmp_path, key, value):
    resealed(progress, tmp_path / "state", lambda _, about: about["guard"].update({key: ABOUT_VALUES[value]}))
    assert go_on_from(tmp_path / "state") or (value == "table" and key in ("first", "collapsed"))


TENSOR_CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda t: t[:0] if t.ndim else t.new_zeros(0),
    "scalar": lambda t: t.flatten()[0],
    "longer": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    "bool": lambda t: t.bool(),
    "nan": lambda t: torch.full(t.shape, float("nan")),
}


@pytest.mark.parametrize("change", [*TENSOR_CHANGES, "missing"])
@pytest.mark.parametrize("prefix", ["parameter.0", "optimizer.0.exp_avg", "optimizer.0.step", "random", "loss.cats"])
def test_progress_of_other_tensors(progress, tmp_path, prefix, change):
    def alter(tensors: dict[str, Any], _about: dict[str, Any]) -> None:
        name = min(n for n in tensors if n.startswith(prefix))
        if change == "missing":
            del tensors[name]
        elif TENSOR_CHANGES[change](tensors[name]).shape == tensors[name].shape and change in ("scalar", "empty"):
            tensors[name] = tensors[name].new_zeros(0)
        else:
            tensors[name] = TENSOR_CHANGES[change](tensors[name])

    resealed(progress, tmp_path / "state", alter)
    assert go_on_from(tmp_path / "state")


@pytest.mark.parametrize("change", [*TENSOR_CHANGES, "missing", "more"])
def test_routers_of_other_tensors(routers, tmp_path, change):
    def alter(tensors: dict[str, Any], _about: dict[str, Any]) -> None:
        name = min(tensors)
        if change == "missing":
            del tensors[name]
        elif change == "more":
            tensors["x"] = torch.ones(1)
        else:
            tensors[name] = TENSOR_CHANGES[change](tensors[name])

    resealed(routers, tmp_path / "routers", alter)
    assert read_routers(tmp_path / "routers")


# Merged models


@pytest.fixture(scope="module")
def merged_files(pool_dir, tmp_path_factory) -> Path:
    """The files of a merged model."""
    folder = tmp_path_factory.mktemp("merged")
    WEMoEAlgorithm(max_steps=0).run(pool_with(pool_dir)).save_pretrained(folder)
    return folder


@pytest.fixture
def merged(merged_files, tmp_path) -> Path:
    """A copy of a merged model, to be broken."""
    return Path(shutil.copytree(merged_files, tmp_path / "merged"))


@pytest.mark.parametrize("share", SHARES)
def test_truncated_merged_model(merged, share):
    (merged / WEIGHTS).write_bytes(truncated((merged / WEIGHTS).read_bytes(), share))
    must_be_refused(lambda: MergedCLIPVisionModel.from_pretrained(merged))


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_header_of_a_merged_model(merged_files, merged, seed):
    content = (merged / WEIGHTS).read_bytes()
    (merged / WEIGHTS).write_bytes(flipped(content, seed, 0, header_end(content)))
    read: list[torch.nn.Module] = []
    if not refused(lambda: read.append(MergedCLIPVisionModel.from_pretrained(merged))):
        assert same_state(read[0].state_dict(), MergedCLIPVisionModel.from_pretrained(merged_files).state_dict())


@pytest.mark.parametrize("junk", JUNK)
def test_config_of_a_merged_model_that_is_something_else(merged, junk):
    (merged / "config.json").write_bytes(JUNK[junk])
    must_be_refused(lambda: MergedCLIPVisionModel.from_pretrained(merged))


MERGED_KEYS = [("vision_config", k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
               "image_size")] + [(k,) for k in ("vision_config", "moe", "shared_router", "tasks", "method_options")] + [
    ("moe", "encoder.layers.0.mlp"), ("moe", "encoder.layers.0.mlp", "router"),
    ("moe", "encoder.layers.0.mlp", "router", "kind"), ("moe", "encoder.layers.0.mlp", "linears", "fc1"),
    ("moe", "encoder.layers.0.mlp", "linears", "fc1", "kind"), ("moe", "encoder.layers.0.mlp", "routing"),
    ("moe", "encoder.layers.0.mlp", "selection"), ("moe", "encoder.layers.9.mlp")]  # fmt: skip


def read_merged(folder: Path) -> None:
    """Read a merged model."""
    MergedCLIPVisionModel.from_pretrained(folder)


@pytest.mark.parametrize("value", ["null", "minus one", "large", "text", "table", "list"])
@pytest.mark.parametrize("key", MERGED_KEYS, ids="/".join)
def test_wrong_value_in_the_config_of_a_merged_model(merged, key, value):
    config = json.loads((merged / "config.json").read_text())
    table = config
    for name in key[:-1]:
        table = table[name]
    table[key[-1]] = WRONG[value]
    (merged / "config.json").write_text(json.dumps(config))
    if (key[-1], value) != ("selection", "null"):  # as it was
        must_be_refused(lambda: read_merged(merged))  # its checksum is another
    config["config_checksum"] = fields_checksum(config)
    (merged / "config.json").write_text(json.dumps(config))
    if not refused(lambda: read_merged(merged)):
        unread = ("shared_router", "tasks", "method_options")
        assert key[-1] in unread or (key[-1], value) == ("selection", "null"), f"{'/'.join(key)}={value} was accepted"


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bit_in_the_config_of_a_merged_model(merged_files, merged, seed):
    (merged / "config.json").write_bytes(flipped((merged / "config.json").read_bytes(), seed))
    read: list[MergedCLIPVisionModel] = []
    if not refused(lambda: read.append(MergedCLIPVisionModel.from_pretrained(merged))):
        written = MergedCLIPVisionModel.from_pretrained(merged_files).config
        assert read[0].config.config_checksum == written.config_checksum


# Images and data sets


def image_bytes(kind: str) -> bytes:
    """Return a picture as a file."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")


def read_images(pool_dir: Path, folder: Path) -> None:
    """Read every image of a folder as an adaptation does, and score on them."""
    pool = CLIPVisionModelTaskPool({"cats": str(folder)}, clip_model=str(pool_dir / "pretrained"), num_workers=0)
    images = pool.images("cats")
    for index in range(len(images)):
        assert torch.isfinite(images[index][0]).all()


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of two classes with one good image in each."""
    for name in ("tabby", "siamese"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "good.png").write_bytes(image_bytes("PNG"))
    return tmp_path / "images"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_image(pool_dir, pictures, kind, share):
    (pictures / "tabby" / f"x.{kind.lower()}").write_bytes(truncated(image_bytes(kind), share))
    must_be_refused(lambda: read_images(pool_dir, pictures))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_in_an_image(pool_dir, pictures, kind, seed):
    (pictures / "tabby" / f"x.{kind.lower()}").write_bytes(
        flipped(image_bytes(kind), seed, 0, 100 if seed % 2 else None)
    )
    refused(lambda: read_images(pool_dir, pictures))


def png_of(width: int, height: int) -> bytes:
    """Return a PNG that says to be of another size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        image_bytes("PNG")[:8]
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + image_bytes("PNG")[33:]
    )


ODD_IMAGES = {
    "a bomb": png_of(40_000, 40_000),
    "a warning": png_of(12_000, 9_000),
    "no width": png_of(0, 10),
    "too wide": png_of(2**31 - 1, 1),
    "text": b"not an image",
    "zeros": bytes(1000),
    "a pickle": pickle.dumps([1]),
    "html": b"<html>404</html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("odd", ODD_IMAGES)
def test_file_that_is_no_image(pool_dir, pictures, odd):
    (pictures / "tabby" / "x.png").write_bytes(ODD_IMAGES[odd])
    must_be_refused(lambda: read_images(pool_dir, pictures))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "I;16"])
def test_image_of_an_unusual_kind(pool_dir, pictures, mode, size):
    kind = "tiff" if mode in ("CMYK", "F", "I") else "png"
    Image.new(mode, size).save(pictures / "tabby" / f"x.{kind}")
    refused(lambda: read_images(pool_dir, pictures))


def table_file(folder: Path, kind: str) -> Path:
    """Write a data set of images and labels into one file."""
    data = {"image": [{"bytes": image_bytes("PNG"), "path": None}] * 4, "label": [0, 1, 0, 1]}
    dataset = Dataset.from_dict(data, Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])}))
    if kind == "parquet":
        dataset.to_parquet(folder / "x.parquet")
        return folder / "x.parquet"
    dataset.save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    return arrow


def read_table(pool_dir: Path, file: Path) -> None:
    """Read every image of a parquet file or a saved data set."""
    read_images(pool_dir, file if file.suffix == ".parquet" else file.parent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_truncated_table(pool_dir, tmp_path, kind, share):
    file = table_file(tmp_path, kind)
    file.write_bytes(truncated(file.read_bytes(), share))
    must_be_refused(lambda: read_table(pool_dir, file))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_flipped_bit_in_a_table(pool_dir, tmp_path, kind, seed):
    file = table_file(tmp_path, kind)
    file.write_bytes(flipped(file.read_bytes(), seed))
    refused(lambda: read_table(pool_dir, file))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("file", ["state.json", "dataset_info.json"])
def test_saved_data_set_that_says_something_else(pool_dir, tmp_path, file, junk):
    arrow = table_file(tmp_path, "arrow")
    (arrow.parent / file).write_bytes(JUNK[junk])
    refused(lambda: read_table(pool_dir, arrow))


LABELS: dict[str, list[Any]] = {
    "some text": ["a", None], "numbers with fractions": [0.5, 1.0], "nan": [float("nan"), 0.0], "negative": [0, -1],
    "too large": [0, 7], "huge": [0, 2**62], "null": [None, None], "some null": [None, 0], "lists": [[0], [1]],
    "lists of other lengths": [[0], [1, 2]], "tables": [{"a": 1}, {"a": 2}], "bytes": [b"a", b"b"],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", ["parquet", "object", "pairs"])
def test_labels_that_are_none(pool_dir, tmp_path, labels, kind):
    picture = Image.new("RGB", (8, 8))
    values = LABELS[labels]
    if kind == "pairs":
        data: Any = list(zip([picture, picture], values, strict=True))
    else:
        data = Dataset.from_dict({"image": [{"bytes": image_bytes("PNG"), "path": None}] * 2, "label": values})
        if kind == "parquet":
            data.to_parquet(tmp_path / "x.parquet")
            data = str(tmp_path / "x.parquet")
    spec = {"data": data, "classnames": ["a", "b"]}
    pool = CLIPVisionModelTaskPool({"cats": spec}, clip_model=str(pool_dir / "pretrained"), num_workers=0)
    must_be_refused(lambda: [pool.images("cats")[i] for i in range(2)])


PIXELS: dict[str, Any] = {
    "null": None, "number": 3, "text": "x", "list": [], "lists": [[1, 2], [3]], "nan": np.full((8, 8, 3), np.nan),
    "flat": np.zeros(12, np.uint8), "no pixels": np.zeros((0, 0, 3), np.uint8),
    "five channels": np.zeros((8, 8, 5), np.uint8), "four dimensions": np.zeros((2, 2, 8, 8), np.uint8),
    "complex": np.zeros((8, 8, 3), complex), "object": np.array([object()]), "negative": -np.ones((8, 8, 3), int),
    "table": {"a": 1}, "bytes": b"x", "meta": torch.zeros(3, 8, 8, device="meta"), "sparse": torch.eye(8).to_sparse(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pixels", PIXELS)
def test_pixels_that_are_none(pool_dir, pixels):
    spec = {"data": [(PIXELS[pixels], 0)], "classnames": ["a", "b"]}
    pool = CLIPVisionModelTaskPool({"cats": spec}, clip_model=str(pool_dir / "pretrained"), num_workers=0)
    must_be_refused(lambda: pool.images("cats")[0])


DATA: dict[str, Any] = {
    "number": 3, "empty list": [], "list of numbers": [1, 2], "list of null": [None], "text in a list": ["x"],
    "short items": [(1,)], "long items": [(1, 2, 3)], "generator": iter([]), "object": object(), "class": dict,
    "function": len, "bytes": b"x", "empty table": {}, "empty data set": Dataset.from_dict({}), "nan": float("nan"),
    "set": {1}, "target": {"_target_": "x.y"}, "path": {"path": "/none"}, "path of nothing": {"path": None},
    "json": {"path": "json", "data_files": "/none"}, "unknown": {"data": "x", "y": 1}, "strings": "\0",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", DATA)
def test_data_that_are_none(data):
    must_be_refused(lambda: make_task("cats", DATA[data]))


# Numbers that run away


@pytest.mark.parametrize("factor", [1e30, 1e38, -1e38, 1e300])
def test_merge_that_is_no_model(pool_dir, modelpool, taskpool, factor):
    def score() -> None:
        model = TaskArithmeticAlgorithm(scaling_factor=factor).run(modelpool)
        assert finite(taskpool.evaluate(model)), "scores that are no numbers"

    must_be_refused(score, ModelError)


def test_run_whose_loss_becomes_nan_keeps_the_last_good_routers_and_names_the_task(pool_dir, tmp_path):
    done = run_cli(
        "method=wemoe", *own_pool(pool_dir), "method.lr=1e36", "method.max_steps=5", "method.batch_size=4",
        "method.save_checkpoint=routers", "merged_model_save_path=merged", "report_save_path=report.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 1
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: the loss of task `"), last
    assert any(f"`{task}` is nan at step" in last for task in TASKS)
    kept = load_file(tmp_path / "routers")
    assert all(torch.isfinite(t).all() for t in kept.values())
    written = [f for f in files_in(tmp_path) if not f.startswith("outputs")]
    assert written == ["routers"]
    assert not list((tmp_path / "outputs").rglob("report.*"))
