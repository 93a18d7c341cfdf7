"""Images that cannot be decoded: named by path, and refused or left out and counted, the same in every process."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from helpers import TASKS
from PIL import Image as PILImage
from runs import own_pool, run_cli

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool
from fusion_merge.errors import BadImageError, ConfigError, DataError
from fusion_merge.pools.adaptation_pools import adaptation_pools
from fusion_merge.pools.datasets import make_task
from fusion_merge.pools.images import OnBadImage, TaskImages
from fusion_merge.pools.loaders import EndlessBatches, Placement, adaptation_loader, evaluation_loader

SKIP = OnBadImage.SKIP
BAD = (0, 3, 4)
COUNT = 10


def write_jpegs(folder: Path, count: int = COUNT) -> list[Path]:
    """Write grey JPEG images, each a shade that tells its number."""
    paths = []
    for i in range(count):
        path = folder / ("a" if i < count // 2 else "b") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(np.full((40, 40, 3), 20 * i, np.uint8)).save(path, quality=95)
        paths.append(path)
    return paths


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no image")


def shade(image: Any) -> torch.Tensor:
    """One number an image: which it is."""
    return torch.full((3, 1, 1), round(float(np.asarray(image.convert("L")).mean()) / 20))


def images_of(folder: Path, *, bad: tuple[int, ...] = BAD, on: OnBadImage = SKIP, cache_bytes: int = 0) -> TaskImages:
    paths = write_jpegs(folder)
    for i in bad:
        (cut, empty, text)[i % 3](paths[i])
    return TaskImages(make_task("greys", str(folder)), shade, cache_bytes, on_bad_image=on)


def numbers(batches: Any) -> list[list[int]]:
    return [pixels[:, 0, 0, 0].int().tolist() for pixels, _ in batches]


def evaluated(images: TaskImages, size: int = 4, *, workers: int = 0, rank: int = 0, world: int = 1) -> Any:
    return evaluation_loader(images, size, workers=workers, placement=Placement(rank=rank, world_size=world))


# Named


@pytest.mark.parametrize("spoil", [cut, empty, text])
def test_bad_file_is_named_with_its_path_and_a_way_out(tmp_path, spoil):
    path = write_jpegs(tmp_path)[3]
    spoil(path)
    images = TaskImages(make_task("greys", str(tmp_path)), shade)
    with pytest.raises(BadImageError, match=r"cannot read image 3 of `greys`.*`on_bad_image=skip`") as caught:
        images[3]
    assert f"`{path}`" in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def stored(paths: list[Path], *, with_names: bool = True) -> Dataset:
    rows = [{"bytes": path.read_bytes(), "path": path.name if with_names else None} for path in paths]
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    return Dataset.from_dict({"image": rows, "label": [0] * len(rows)}, features=features)


@pytest.mark.parametrize(
    ("with_names", "named"), [(True, r"image 3 of `greys` \(`3.jpg`\): "), (False, "image 3 of `greys`: ")]
)
def test_bad_image_in_a_table_is_named_by_its_row_and_file_name(tmp_path, with_names, named):
    paths = write_jpegs(tmp_path)
    cut(paths[3])
    stored(paths, with_names=with_names).to_parquet(tmp_path / "all.parquet")
    images = TaskImages(make_task("greys", str(tmp_path / "all.parquet")), shade)
    with pytest.raises(BadImageError, match=named + "(image file is truncated|Truncated)"):
        images[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_say_it_in_one_line_whoever_reads(tmp_path, workers):
    images = images_of(tmp_path, bad=(7,), on=OnBadImage.ERROR)
    for loader in (
        evaluated(images, workers=workers),
        adaptation_loader(images, 8, 0, workers=workers, placement=Placement()),
    ):
        batches = iter(loader)
        started = list(batches.workers)
        assert len(started) == workers
        with pytest.raises(DataError, match=r"^cannot read image 7 of `greys` \(`.*7\.jpg`\)[^\n]*$"):
            list(islice(batches, 3))
        assert not any(worker.is_alive() for worker in started)


def test_what_the_system_refuses_is_never_taken_for_a_bad_image(tmp_path):
    images = images_of(tmp_path, bad=())
    (tmp_path / "a" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"2\.jpg`\): No such file") as caught:
        list(evaluated(images))
    assert not isinstance(caught.value, BadImageError)


def test_wrong_label_is_never_taken_for_a_bad_image(tmp_path):
    data = [(PILImage.new("RGB", (4, 4)), 0), (PILImage.new("RGB", (4, 4)), 9)]
    images = TaskImages(make_task("greys", {"data": data, "classnames": ["a"]}), shade, on_bad_image=SKIP)
    with pytest.raises(DataError, match="label 9"):
        list(evaluated(images))


# Left out


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
@pytest.mark.parametrize("workers", [0, 2])
def test_scoring_leaves_bad_images_out(tmp_path, cache_bytes, workers):
    images = images_of(tmp_path, cache_bytes=cache_bytes)
    loader = evaluated(images, workers=workers)
    for _ in range(2):
        assert numbers(loader) == [[1, 2], [5, 6, 7], [8, 9]]
        assert sorted(loader.bad) == list(BAD)


def test_batch_without_a_good_image_is_left_out(tmp_path):
    images = images_of(tmp_path, bad=(4, 5, 6, 7))
    assert numbers(evaluated(images)) == [[0, 1, 2, 3], [8, 9]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_score_the_same_batches_as_one(tmp_path, world):
    images = images_of(tmp_path)
    loaders = [evaluated(images, rank=rank, world=world) for rank in range(world)]
    assert sorted(batch for loader in loaders for batch in numbers(loader)) == [[1, 2], [5, 6, 7], [8, 9]]
    assert sum(len(loader.bad) for loader in loaders) == len(BAD)


# Replaced


@pytest.mark.parametrize("workers", [0, 2])
def test_adaptation_takes_the_next_good_image(tmp_path, workers):
    images = images_of(tmp_path)
    loader = adaptation_loader(images, 4, 1, workers=workers, placement=Placement())
    good = {0: 1, 3: 5, 4: 5}
    expected = [[good.get(i, i) for i in batch] for batch in islice(EndlessBatches(COUNT, 4, 1), 7)]
    batches = iter(loader)
    assert numbers(islice(batches, 7)) == expected
    batches.close()


def test_after_the_last_image_comes_the_first(tmp_path):
    images = images_of(tmp_path, bad=(0, 8, 9))
    assert [int(images.good(i)[0][0, 0, 0]) for i in (7, 8, 9, 0)] == [7, 1, 1, 1]


@pytest.mark.parametrize("start", [0, 3])
def test_processes_and_later_starts_take_what_one_takes(tmp_path, start):
    images = images_of(tmp_path)
    whole = numbers(islice(adaptation_loader(images, 6, 1, workers=0, placement=Placement()), 8))
    shares = [
        numbers(
            islice(
                adaptation_loader(images, 3, 1, workers=0, placement=Placement(rank=rank, world_size=2), start=start),
                8 - start,
            )
        )
        for rank in range(2)
    ]
    for step, (first, second) in enumerate(zip(*shares, strict=True)):
        assert [i for pair in zip(first, second, strict=True) for i in pair] == whole[start + step]


def test_adaptation_names_the_first_bad_image_and_no_other(tmp_path, caplog):
    images = images_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        list(islice(adaptation_loader(images, 4, 1, workers=0, placement=Placement()), 9))
    (record,) = caplog.records
    assert "cannot read image" in record.getMessage()
    assert "the next good image takes its place" in record.getMessage()
    with caplog.at_level(logging.WARNING):
        list(islice(adaptation_loader(images, 4, 1, workers=0, placement=Placement()), 9))
    assert caplog.records == [record]  # once is enough


# All


def test_bad_images_alone_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none of the 10 images of `greys` can be used; cannot read image 0 .*0\.jpg"):
        images_of(tmp_path, bad=tuple(range(COUNT)))


def test_fingerprints_tell_good_from_bad(tmp_path):
    first = images_of(tmp_path / "one").fingerprint()
    assert images_of(tmp_path / "two").fingerprint() == first
    assert images_of(tmp_path / "three", bad=(0, 3)).fingerprint() != first


# Pools


@pytest.fixture
def spoilt(pool_dir, tmp_path) -> Path:
    """Images of the two tasks, three of them bad, of cats."""
    shutil.copytree(pool_dir / "images", tmp_path / "images")
    files = sorted((tmp_path / "images" / "cats").rglob("*.png"))
    for i, spoil in ((0, cut), (5, empty), (7, text)):
        spoil(files[i])
    return tmp_path / "images"


def pool_of(pool_dir: Path, images: Path, **options: Any) -> CLIPVisionModelTaskPool:
    return CLIPVisionModelTaskPool(
        {task: str(images / task) for task in TASKS}, clip_model=str(pool_dir / "pretrained"), **options
    )


def test_scores_are_those_of_the_good_images(pool_dir, spoilt, modelpool, caplog):
    tower = modelpool.load_model("cats")
    with caplog.at_level(logging.WARNING):
        pool = pool_of(pool_dir, spoilt, on_bad_image="skip")
        scores, again = pool.evaluate(tower), pool.evaluate(tower)
    assert scores == again
    for path in sorted((spoilt / "cats").rglob("*.png")):
        try:
            with PILImage.open(path) as image:
                image.load()
        except OSError:
            path.unlink()
    expected = pool_of(pool_dir, spoilt).evaluate(tower)
    assert scores["cats"]["skipped"] == 3
    assert scores["dogs"]["skipped"] == 0
    for task in TASKS:
        assert scores[task]["loss"] == pytest.approx(expected[task]["loss"], rel=1e-6)
        assert scores[task]["accuracy"] == expected[task]["accuracy"]
        assert "skipped" not in expected[task]
    (record,) = caplog.records
    assert "`cats`: 3 bad images are left out of the scores, such as: cannot read image 0" in record.getMessage()


def test_bad_images_end_a_run_by_default(pool_dir, spoilt, modelpool):
    with pytest.raises(DataError, match=rf"{spoilt}.*on_bad_image=skip"):
        pool_of(pool_dir, spoilt).evaluate(modelpool.load_model("cats"))


@pytest.mark.parametrize("value", ["ignore", True, None])
def test_other_choices_are_refused(pool_dir, value):
    with pytest.raises(ConfigError, match=f"`on_bad_image`={value!r} of the task pool is none of error, skip"):
        pool_of(pool_dir, pool_dir / "images", on_bad_image=value)
    with pytest.raises(ConfigError, match=f"`on_bad_image`={value!r} of the model pool is none of error, skip"):
        CLIPVisionModelPool({"_pretrained_": "x"}, on_bad_image=value)


def test_the_model_pool_s_own_images_follow_its_own_option(pool_dir, taskpool):
    data = {task: str(pool_dir / "images" / task) for task in TASKS}
    models = {"_pretrained_": str(pool_dir / "pretrained")} | {task: str(pool_dir / task) for task in TASKS}
    pool = CLIPVisionModelPool(models, test_datasets=data, train_datasets=data, on_bad_image="skip")
    assert pool.task_pool("train").on_bad_image is SKIP
    assert all(p is pool.task_pool() for p in adaptation_pools(pool, taskpool).values())
    assert pool.task_pool().on_bad_image is SKIP


def test_run_with_bad_images_says_how_many_in_its_report(pool_dir, spoilt, tmp_path):
    arguments = [a.replace(str(pool_dir / "images"), str(spoilt)) for a in own_pool(pool_dir)]
    options = ["method=wemoe", "method.max_steps=2", "method.batch_size=4", "taskpool.on_bad_image=skip"]
    done = run_cli(*arguments, *options, "baselines=[]", "output_dir=out", cwd=tmp_path / "run")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "out" / "report.json").read_text())
    assert (report["cats"]["skipped"], report["dogs"]["skipped"]) == (3, 0)
    adapted_on = report["run"]["provenance"]["adapted_on"]
    assert (adapted_on["cats"]["replaced"], adapted_on["dogs"]["replaced"]) == (3, 0)
    assert "`cats`: 3 bad images were replaced while adapting: cannot read image" in done.out + done.err
    written = (tmp_path / "run" / "out" / "report.md").read_text()
    assert "`cats`: 3 bad images are left out of the scores." in written
    assert "dogs`: " not in written


def test_run_that_a_bad_image_ends_says_so_in_one_line_of_its_own(pool_dir, spoilt, tmp_path):
    first, *others = sorted((spoilt / "cats").rglob("*.png"))
    for path in others:
        path.write_bytes(others[0].read_bytes())
    first.write_bytes(b"not an image")
    arguments = [a.replace(str(pool_dir / "images"), str(spoilt)) for a in own_pool(pool_dir)]
    done = run_cli(*arguments, "method=simple_average", "baselines=[]", "output_dir=out", cwd=tmp_path / "run")
    assert done.code == 1
    assert done.err == (
        f"error: cannot read image 0 of `cats` (`{first}`): it is no image of a known format; mend it or take it away, "
        "or leave such images out with `on_bad_image=skip`\n"
    )
