"""Batches of images."""

from __future__ import annotations

import os
import signal
from itertools import chain, islice

import numpy as np
import pytest
import torch

from fusion_merge.errors import DataError
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.loaders import (
    EndlessBatches,
    Placement,
    TaskImages,
    adaptation_loader,
    evaluation_loader,
    fitting_workers,
)


class Pixels:
    """Images whose every pixel is their index; keeps which were read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.broken: int | None = None
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.reads.append(index)
        if index == self.broken:
            raise OSError("image file is truncated")
        return np.full((2, 2, 3), index), index % 2


def _images(size: int = 10, cache_bytes: int = 10**6, preprocess=None) -> TaskImages:
    task = ImageTask("numbers", Pixels(size), 0, 1, ("even", "odd"), ("{}",))
    to_tensor = preprocess or (lambda image: torch.tensor(image).permute(2, 0, 1).float())
    return TaskImages(task, to_tensor, cache_bytes)


def _indices(loader, batches: int | None = None) -> list[list[int]]:
    return [pixels[:, 0, 0, 0].int().tolist() for pixels, _ in islice(iter(loader), batches)]


def _items(sampler: EndlessBatches, count: int) -> list[int]:
    return list(islice(chain.from_iterable(sampler), count))


def _epochs(sampler: EndlessBatches, count: int) -> list[list[int]]:
    size = sampler.num_items
    items = _items(sampler, count * size)
    return [items[i * size : (i + 1) * size] for i in range(count)]


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (10, 5), (4, 16), (1, 1)])
def test_every_epoch_is_a_permutation(size, batch):
    for epoch in _epochs(EndlessBatches(size, batch, seed=0), 4):
        assert sorted(epoch) == list(range(size))


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (3, 8)])
def test_all_batches_are_full_and_run_on_into_the_next_epoch(size, batch):
    assert [len(b) for b in islice(EndlessBatches(size, batch, seed=0), 6)] == [batch] * 6


def test_epochs_are_shuffled_anew():
    first, second = _epochs(EndlessBatches(50, 10, seed=0), 2)
    assert first != second
    assert first != sorted(first)


def test_the_order_depends_on_the_seed_alone():
    first = list(islice(EndlessBatches(20, 3, seed=4), 15))
    np.random.seed(1)
    torch.manual_seed(1)
    assert list(islice(EndlessBatches(20, 3, seed=4), 15)) == first
    assert list(islice(EndlessBatches(20, 3, seed=5), 15)) != first


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_start_skips_exactly_so_many_batches(start):
    whole = list(islice(EndlessBatches(10, 3, seed=2), 20))
    assert list(islice(EndlessBatches(10, 3, seed=2, start=start), 20 - start)) == whole[start:]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(("size", "ranks"), [(12, 3), (12, 1), (8, 4), (10, 4), (7, 2), (2, 5)])
def test_the_batches_of_all_ranks_are_those_of_a_single_process(size, ranks, start):
    shares = [list(islice(EndlessBatches(size, 2, 0, rank=r, world_size=ranks, start=start), 9)) for r in range(ranks)]
    single = list(islice(EndlessBatches(size, 2 * ranks, 0, start=start), 9))
    for step, batch in enumerate(single):
        interleaved = chain.from_iterable(zip(*(share[step] for share in shares), strict=True))
        assert list(interleaved) == batch


def test_more_ranks_than_images_still_give_each_rank_a_batch():
    assert [next(iter(EndlessBatches(2, 4, 0, rank=r, world_size=5))) for r in range(5)]


def test_adaptation_loaders_are_endless_and_seeded():
    first = _indices(adaptation_loader(_images(), 4, seed=1, workers=0, placement=Placement()), 7)
    again = _indices(adaptation_loader(_images(), 4, seed=1, workers=0, placement=Placement()), 7)
    assert first == again == list(islice(EndlessBatches(10, 4, seed=1), 7))


def test_adaptation_loaders_give_each_rank_its_share():
    placement = Placement(rank=1, world_size=2)
    loader = adaptation_loader(_images(), 4, seed=1, workers=0, placement=placement)
    assert _indices(loader, 3) == list(islice(EndlessBatches(10, 4, seed=1, rank=1, world_size=2), 3))


def test_making_and_reading_a_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    _indices(adaptation_loader(_images(), 4, seed=1, workers=0, placement=Placement()), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_processes_do_not_change_the_order(workers):
    images = _images(cache_bytes=0)
    loader = adaptation_loader(images, 4, seed=1, workers=workers, placement=Placement())
    assert _indices(loader, 4) == list(islice(EndlessBatches(10, 4, seed=1), 4))


def test_ctrl_c_does_not_end_worker_processes():
    loader = adaptation_loader(_images(cache_bytes=0), 4, 0, workers=1, placement=Placement())
    batches = iter(loader)
    expected = _indices(adaptation_loader(_images(), 4, 0, workers=0, placement=Placement()), 6)
    found = [next(batches)]
    for worker in batches.workers:
        os.kill(worker.pid, signal.SIGINT)
    found += islice(batches, 5)
    assert [pixels[:, 0, 0, 0].int().tolist() for pixels, _ in found] == expected


def test_evaluation_gives_every_image_once_in_order():
    loader = evaluation_loader(_images(), 4, workers=0, placement=Placement())
    assert _indices(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_evaluation_covers_each_image_once_over_all_ranks(ranks):
    seen = []
    for rank in range(ranks):
        loader = evaluation_loader(_images(), 4, workers=0, placement=Placement(rank=rank, world_size=ranks))
        seen += chain.from_iterable(_indices(loader))
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_a_batch_to_score_is_the_same_however_many_ranks_there_are(ranks):
    single = _indices(evaluation_loader(_images(), 3, workers=0, placement=Placement()))
    shares = [
        _indices(evaluation_loader(_images(), 3, workers=0, placement=Placement(rank=rank, world_size=ranks)))
        for rank in range(ranks)
    ]
    assert sorted(chain.from_iterable(shares)) == sorted(single)


@pytest.mark.parametrize(("limit", "ranks"), [(3, 1), (5, 2), (99, 1)])
def test_a_limit_counts_the_images_of_all_ranks(limit, ranks):
    seen = []
    for rank in range(ranks):
        placement = Placement(rank=rank, world_size=ranks)
        loader = evaluation_loader(_images(), 4, workers=0, placement=placement, limit=limit)
        seen += chain.from_iterable(_indices(loader))
    assert sorted(seen) == list(range(min(limit, 10)))


def test_labels_come_with_their_images():
    ((pixels, labels),) = evaluation_loader(_images(), 10, workers=0, placement=Placement())
    assert torch.equal(labels, pixels[:, 0, 0, 0].long() % 2)


def test_small_datasets_are_read_once():
    images = _images()
    images.task.data.reads.clear()
    for _ in range(3):
        _indices(evaluation_loader(images, 4, workers=0, placement=Placement()))
    assert images.cached
    assert sorted(images.task.data.reads) == list(range(10))


def test_large_datasets_are_not_kept():
    images = _images(cache_bytes=10)
    images.task.data.reads.clear()
    for _ in range(2):
        _indices(evaluation_loader(images, 4, workers=0, placement=Placement()))
    assert not images.cached
    assert sorted(images.task.data.reads) == sorted(2 * list(range(10)))


def test_a_dataset_is_kept_if_it_just_fits():
    one_image = 3 * 2 * 2 * 4
    assert _images(cache_bytes=10 * one_image).cached
    assert not _images(cache_bytes=10 * one_image - 1).cached


def test_cached_images_need_no_worker_processes():
    assert adaptation_loader(_images(), 4, 0, workers=2, placement=Placement()).num_workers == 0
    assert adaptation_loader(_images(cache_bytes=0), 4, 0, workers=2, placement=Placement()).num_workers == 2


def test_an_image_that_cannot_be_preprocessed_is_named():
    def fail_on_three(image):
        if image[0, 0, 0] == 3:
            raise ValueError("mean must have 1 elements")
        return torch.tensor(image)

    images = _images(preprocess=fail_on_three)
    with pytest.raises(DataError, match=r"image 3 of `numbers`.*mean must"):
        images[3]


def test_an_image_that_cannot_be_decoded_is_named():
    images = _images()
    images.task.data.broken = 3
    with pytest.raises(DataError, match=r"image 3 of `numbers`.*truncated"):
        images[3]


def test_a_label_outside_the_classes_is_named():
    task = ImageTask("numbers", [(np.zeros((2, 2, 3)), 2)], 0, 1, ("even", "odd"), ("{}",))
    with pytest.raises(DataError, match="image 0 has label 2, but there are 2 classes"):
        TaskImages(task, torch.tensor)


def test_an_image_of_another_range_is_named():
    def refuse(_image):
        raise DataError("an image holds float64 values from 0 to 255")

    with pytest.raises(DataError, match=r"image 0 of `numbers`: an image holds"):
        _images(preprocess=refuse)


def test_images_without_labels_make_batches():
    task = ImageTask("numbers", Pixels(4), 0, None, ("even", "odd"), ("{}",))
    images = TaskImages(task, lambda image: torch.tensor(image).permute(2, 0, 1).float())
    ((_, labels),) = evaluation_loader(images, 4, workers=0, placement=Placement())
    assert labels.tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("wanted", "loaders", "cores", "expected"),
    [(16, 1, 8, 8), (4, 1, 8, 4), (16, 8, 2, 0), (16, 2, 8, 3), (1, 2, 8, 1), (0, 1, 8, 0), (16, 8, 64, 7)],
)
def test_workers_fit_the_machine(monkeypatch, wanted, loaders, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert fitting_workers(wanted, loaders) == expected


def test_images_are_known_by_what_a_model_sees_of_them():
    def fingerprint(change: int = 0, cache_bytes: int = 0, size: int = 40) -> str:
        data = [(float(i + (change if i == 21 else 0)), 0) for i in range(size)]
        task = ImageTask("toy", data, 0, 1, ("a",), ("{}",))
        images = TaskImages(task, lambda value: torch.full((3, 2, 2), value), cache_bytes)
        return images.fingerprint()

    assert fingerprint() == fingerprint()
    assert fingerprint(size=41) != fingerprint()
    assert fingerprint(change=1) != fingerprint()
    assert fingerprint(change=1, cache_bytes=10**6) != fingerprint(cache_bytes=10**6)
