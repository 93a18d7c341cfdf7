"""The seven corruptions: stated properties, one stored picture each, and as an option of a task."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fusion_merge.errors import ConfigError, DataError
from fusion_merge.pools.corruptions import CONSTANTS, CORRUPTIONS, Corruption
from fusion_merge.pools.datasets import make_task
from fusion_merge.pools.loaders import Placement, TaskImages, evaluation_loader
from fusion_merge.pools.spatter import SPATTERS, spattered

STORED = Path(__file__).parent.parent / "data" / "corruptions"
RANDOM = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)
every_severity = pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
every_set = pytest.mark.parametrize("constants", CONSTANTS)


def drawing(width: int = 64, height: int = 64) -> Image.Image:
    """Draw a picture with plains, edges and gradients: the same whatever the machine."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    sky = np.stack([90 + 60 * y, 140 + 60 * y, 235 - 40 * y], axis=-1)
    ground = np.stack([60 + 60 * x, 130 - 30 * x, 50 + 0 * x], axis=-1)
    picture = np.where((y > 0.6 + 0.1 * np.sin(9 * x))[..., None], ground, sky)
    picture[((x - 0.3) ** 2 + (y - 0.3) ** 2) < 0.03] = [250, 220, 60]
    picture[(abs(x - 0.7) < 0.15) & (abs(y - 0.6) < 0.2)] = [180, 40, 40]
    return Image.fromarray(np.rint(picture).astype(np.uint8))


def grey(value: int = 128, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def corrupted(
    image: Image.Image, name: str, severity: int = 5, constants: str = "cifar-c", index: int = 0
) -> np.ndarray:
    return np.asarray(Corruption(name, severity, constants).apply(image, "cats", index)).astype(float)


def distance(image: Image.Image, other: np.ndarray) -> float:
    return float(np.sqrt(((np.asarray(image, dtype=float) - other) ** 2).mean()))


# All of them


@every_corruption
def test_picture_is_the_one_that_was_looked_at(name):
    with Image.open(STORED / f"{name}.png") as stored:
        expected = np.asarray(stored).astype(float)
    difference = np.abs(corrupted(drawing(), name) - expected)
    assert difference.mean() < 0.5
    assert (difference > 8).mean() < 0.01


@every_corruption
@every_set
@pytest.mark.parametrize("size", [(32, 32), (50, 31), (3, 5), (1, 1)])
def test_size_and_kind_stay(name, constants, size):
    image = drawing(*size)
    before = np.array(image)
    for severity in (1, 3, 5):
        changed = Corruption(name, severity, constants).apply(image, "cats", 0)
        assert (changed.size, changed.mode) == (size, "RGB")
    assert np.array_equal(np.array(image), before)


@every_corruption
def test_same_image_of_the_same_task_and_seed_is_the_same_picture(name):
    assert np.array_equal(corrupted(drawing(), name, index=3), corrupted(drawing(), name, index=3))


@pytest.mark.parametrize("name", RANDOM)
def test_another_image_task_or_seed_is_another_picture(name):
    usual = corrupted(drawing(), name)
    assert not np.array_equal(usual, corrupted(drawing(), name, index=1))
    for seed, task in ((1, "cats"), (0, "dogs")):
        assert not np.array_equal(usual, np.asarray(Corruption(name, 5, seed=seed).apply(drawing(), task, 0)))


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in ("spatter", "pixelate")])
@every_set
def test_severities_go_from_weak_to_strong(name, constants):
    image = drawing(224, 224)
    sizes = [distance(image, corrupted(image, name, severity, constants)) for severity in (1, 2, 3, 4, 5)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1.2 * sizes[0] > 0


@every_corruption
def test_photographs_are_corrupted_more_by_the_constants_for_photographs(name):
    image = drawing(224, 224)
    weak, strong = (corrupted(image, name, 5, constants) for constants in ("cifar-c", "imagenet-c"))
    if name == "pixelate":  # whose grid for small images is coarser
        weak, strong = strong, weak
    assert distance(image, strong) > distance(image, weak)


@every_corruption
def test_images_of_other_kinds_are_the_same_pictures(name):
    image = drawing()
    expected = corrupted(image, name)
    array = np.array(image)
    for other in (array, array.transpose(2, 0, 1), torch.from_numpy(array).permute(2, 0, 1) / 255):
        assert np.array_equal(np.asarray(Corruption(name).apply(other, "cats", 0)), expected)


# One by one


@every_severity
@every_set
def test_gaussian_noise_has_mean_zero_and_the_deviation_of_its_severity(severity, constants):
    deviation = CONSTANTS[constants].deviations[severity - 1]
    noise = corrupted(grey(size=128), "gaussian_noise", severity, constants) / 255 - 128 / 255
    inside = np.clip(
        np.random.default_rng(0).normal(0, deviation, 400_000), -128 / 255, 127 / 255
    )  # as clipping leaves
    assert abs(noise.mean()) < 0.005
    assert noise.std() == pytest.approx(inside.std(), rel=0.03)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.05


@every_severity
@every_set
def test_impulse_noise_changes_its_share_of_values_to_black_or_white(severity, constants):
    values = corrupted(grey(size=128), "impulse_noise", severity, constants)
    changed = values[values != 128]
    share = CONSTANTS[constants].impulses[severity - 1]
    assert set(np.unique(changed)) == {0, 255}
    assert len(changed) / values.size == pytest.approx(share, abs=4 * np.sqrt(share / values.size) + 1e-4)
    assert (changed == 255).mean() == pytest.approx(0.5, abs=0.1)


@every_severity
@every_set
def test_contrast_scales_about_the_mean_of_each_colour(severity, constants):
    pixels = np.asarray(drawing(), dtype=float)
    mean = pixels.mean(axis=(0, 1))
    expected = mean + CONSTANTS[constants].contrasts[severity - 1] * (pixels - mean)
    assert np.abs(corrupted(drawing(), "contrast", severity, constants) - expected).max() <= 0.5 + 1e-9


@every_severity
def test_pixelate_is_piecewise_constant_and_keeps_means(severity):
    image = drawing(240, 120)
    grid = int(32 * CONSTANTS["cifar-c"].grids[severity - 1])
    pixels = corrupted(image, "pixelate", severity)
    rows, columns = (np.unique(pixels, axis=axis, return_index=True)[1] for axis in (0, 1))
    assert len(rows) <= grid
    assert len(columns) <= grid
    assert (np.diff(pixels, axis=1) != 0).any(axis=(0, 2)).sum() <= 2 * grid  # edges between blocks, and none inside
    assert len(columns) > grid / 2  # so that stronger severities have fewer and larger blocks
    assert pixels.mean() == pytest.approx(np.asarray(image).mean(), abs=1)


def test_pixelate_takes_blocks_that_the_grid_tells():
    image = drawing(448, 448)
    pixels = corrupted(image, "pixelate", 5, "imagenet-c")  # 56 × 56 blocks of 8 × 8
    blocks = pixels.reshape(56, 8, 56, 8, 3)
    assert np.ptp(blocks, axis=(1, 3)).max() == 0
    means = np.asarray(image, dtype=float).reshape(56, 8, 56, 8, 3).mean(axis=(1, 3))
    assert np.abs(blocks[:, 0, :, 0] - means).max() <= 1


@every_severity
@every_set
def test_jpeg_compression_is_pillow_s(severity, constants):
    file = io.BytesIO()
    drawing().save(file, "JPEG", quality=CONSTANTS[constants].qualities[severity - 1])
    assert np.array_equal(corrupted(drawing(), "jpeg_compression", severity, constants), np.asarray(Image.open(file)))


@every_severity
@every_set
def test_motion_blur_smears_one_point_along_a_line_and_keeps_its_light(severity, constants):
    radius, _ = CONSTANTS[constants].blurs[severity - 1]
    point = Image.new("RGB", (101, 101))
    for dx in range(3):
        for dy in range(3):
            point.putpixel((50 + dx, 50 + dy), (255, 255, 255))  # bright enough for its tail to be seen
    angles = []
    for index in range(6):
        smeared = corrupted(point, "motion_blur", severity, constants, index)[..., 0]
        assert smeared.sum() == pytest.approx(9 * 255, rel=0.05)
        y, x = np.nonzero(smeared > 1)
        assert x.max() == 52  # what is seen at p was at p + step
        assert 52 - x.min() <= 2 * radius + 2
        weights = smeared[y, x]
        dx, dy = np.average(x - 51.0, weights=weights), np.average(y - 51.0, weights=weights)
        angles.append(np.degrees(np.arctan2(dy, dx)))
    tilts = [(angle + 270) % 180 - 90 for angle in angles]
    assert max(map(abs, tilts)) < 60
    assert np.std(tilts) > 5


def test_motion_blur_leaves_what_has_no_detail():
    assert np.array_equal(corrupted(grey(77), "motion_blur"), np.asarray(grey(77)))


@every_severity
@every_set
def test_spatter_covers_a_small_part_and_leaves_the_rest(severity, constants):
    image = drawing(128, 128)
    before, after = np.asarray(image, dtype=float), corrupted(image, "spatter", severity, constants)
    share = (before != after).any(axis=-1).mean()
    assert 0.005 < share < 0.4
    if SPATTERS[constants][severity - 1].mud:
        mud = np.array([63, 42, 20])
        assert (np.minimum(before, mud) - 1 <= after).all()
        assert (after <= np.maximum(before, mud) + 1).all()
    else:
        assert (after >= before).all()  # water adds light


def test_stronger_spatter_of_one_kind_covers_more():
    image = drawing(128, 128)
    shares = [(np.asarray(image) != corrupted(image, "spatter", s)).any(axis=-1).mean() for s in (1, 2, 3, 4, 5)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[3] < shares[4]


def test_spatter_without_a_drop_changes_nothing():
    pixels = np.asarray(drawing(), dtype=float) / 255
    dry = SPATTERS["cifar-c"][0]._replace(mean=0.0)
    assert np.array_equal(spattered(pixels, dry, np.random.default_rng(0)), pixels)


# What is refused


@pytest.mark.parametrize("shape", [(1, 28, 28), (28, 28, 1), (28, 28)])
def test_images_of_one_channel_are_corrupted_too(shape):
    array = np.arange(784, dtype=np.uint8).reshape(shape)
    expected = Corruption("contrast").apply(Image.fromarray(array.reshape(28, 28)), "task", 0)
    assert np.array_equal(Corruption("contrast").apply(array, "task", 0), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "motion_blurr"}, "`corruption`='motion_blurr' is unknown; did you mean `motion_blur`?"),
        ({"name": "contrast", "severity": 6}, "`severity`=6 is not possible; choose 1-5"),
        ({"name": "contrast", "severity": True}, "`severity`=True is not possible"),
        ({"name": "contrast", "constants": "cifar_c"}, "did you mean `cifar-c`?"),
        ({"name": "contrast", "seed": -1}, "`corruption_seed`=-1 is not possible"),
    ],
)
def test_impossible_corruption_is_refused(options, message):
    with pytest.raises(ConfigError) as refused:
        Corruption(**options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"corruption": "jpg_compression"},
            "task `cats`: `corruption`='jpg_compression' is unknown; did you mean `jpeg",
        ),
        ({"severity": 3}, "task `cats` has severity of a corruption, but no `corruption`; name one"),
        (
            {"corruption": "contrast", "severty": 3},
            "`severty` is not an option of task `cats`; did you mean `severity`?",
        ),
    ],
)
def test_wrong_option_of_a_task_names_the_right_one(options, message, pool_dir):
    with pytest.raises(DataError) as refused:
        make_task("cats", {"data": pool_dir / "images" / "cats", **options})
    assert message in str(refused.value)


# As an option of a task


def flat(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


def task_images(pool_dir: Path, cache_bytes: int = 0, **options: object) -> TaskImages:
    return TaskImages(make_task("cats", {"data": pool_dir / "images" / "cats", **options}), flat, cache_bytes)


def test_images_of_a_task_are_corrupted_before_preprocessing(pool_dir):
    clean = task_images(pool_dir)
    images = task_images(pool_dir, corruption="spatter", severity=2, corruption_constants="imagenet-c")
    for index in (0, 5):
        picture = Corruption("spatter", 2, "imagenet-c").apply(clean.task.item(index)[0], "cats", index)
        assert torch.equal(images[index][0], flat(picture))
        assert images[index][1] == clean[index][1]


def test_corrupted_images_are_the_same_in_any_order_and_worker(pool_dir):
    images = task_images(pool_dir, corruption="gaussian_noise")
    backwards = [images[i][0] for i in reversed(range(len(images)))][::-1]
    loaded = [pixels for pixels, _ in evaluation_loader(images, 4, workers=1, placement=Placement())]
    assert torch.equal(torch.cat(loaded), torch.stack(backwards))


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_progress_knows_corrupted_images_from_others(pool_dir, cache_bytes):
    options = [{}, {"corruption": "contrast"}, {"corruption": "contrast", "severity": 1}, {"corruption": "pixelate"}]
    assert len({task_images(pool_dir, cache_bytes, **o).fingerprint() for o in options}) == len(options)


def test_corruption_is_the_published_severity_unless_told():
    assert (Corruption("contrast").severity, Corruption("contrast").constants) == (5, "cifar-c")
