"""What a model sees of a picture is, bit for bit, what the CLIP processor makes of it; whatever its file is like."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from helpers import write_processor
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPProcessor

from fusion_merge.errors import DataError
from fusion_merge.models.clip import load_processor
from fusion_merge.models.pictures import as_bytes
from fusion_merge.pools.datasets import make_task
from fusion_merge.pools.images import TaskImages

SIZES = [(224, 224), (320, 240), (97, 403), (30, 20), (500, 375)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("processor")
    write_processor(made, size=224)
    return made


@pytest.fixture(scope="module")
def preprocess(folder) -> Any:
    return load_processor(str(folder), where="the processor").preprocess


@pytest.fixture(scope="module")
def reference(folder) -> Any:
    """What transformers itself makes of a picture, in the version that is installed."""
    own = load_processor(str(folder), where="the processor").image_processor
    whole = CLIPProcessor(own, AutoTokenizer.from_pretrained(folder))
    return lambda image: whole(images=image, return_tensors="pt")["pixel_values"][0]


def noise(size: tuple[int, int], channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth pixels (height, width, channels), so that JPEG keeps something of them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 4, channels)).astype(np.uint8)
    layers = [
        np.asarray(Image.fromarray(small[..., c]).resize(size, Image.Resampling.BICUBIC)) for c in range(channels)
    ]
    return np.stack(layers, axis=-1)


def in_mode(mode: str, size: tuple[int, int]) -> Image.Image:
    pixels = noise(size, 4)
    if mode == "L":
        return Image.fromarray(pixels[..., 0])
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(pixels[..., c].copy()) for c in (0, 3)])
    if mode in ("RGBA", "CMYK"):
        return Image.merge(mode, [Image.fromarray(pixels[..., c].copy()) for c in range(4)])
    rgb = Image.fromarray(pixels[..., :3].copy())
    if mode.startswith("P"):
        made = rgb.quantize(16)
        if mode != "P":
            made.info["transparency"] = bytes(range(0, 256, 16)) if mode == "P with bytes" else 3
        return made
    return rgb.convert(mode)


def stored(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded_here(content: bytes, tmp_path: Path, preprocess: Any, ending: str = "jpg") -> torch.Tensor:
    """Take a file the whole way: from a folder of images through a task to the tensor."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / f"0.{ending}").write_bytes(content)
    images = TaskImages(make_task("one", str(tmp_path / "images")), preprocess)
    assert images[0][0].dtype == torch.float32
    return images[0][0]


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


# As the processor


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_what_the_processor_makes_of_it(tmp_path, preprocess, reference, mode, size):
    content = stored(in_mode(mode, size), "JPEG", quality=85)
    assert opened(content).mode == mode
    assert torch.equal(decoded_here(content, tmp_path, preprocess), reference(opened(content)))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGB"])
def test_png_without_transparency_is_what_the_processor_makes_of_it(tmp_path, preprocess, reference, mode):
    content = stored(in_mode(mode, (90, 70)), "PNG")
    assert opened(content).mode == mode
    assert torch.equal(decoded_here(content, tmp_path, preprocess, "png"), reference(opened(content)))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P with one", "P with bytes"])
def test_transparency_is_dropped_as_the_published_pipeline_did(tmp_path, preprocess, reference, mode):
    """Processors of transformers 5 put white behind it, those of transformers 4 did as here."""
    content = stored(in_mode(mode, (90, 70)), "PNG")
    plain = opened(content)
    plain = plain.convert("RGBA").convert("RGB") if mode.startswith("P") else plain.convert("RGB")
    assert torch.equal(decoded_here(content, tmp_path, preprocess, "png"), reference(plain))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_palette_by_way_of_rgba_is_what_pil_makes_of_it_directly():
    image = opened(stored(in_mode("P with bytes", (20, 10)), "PNG"))
    assert np.array_equal(np.asarray(as_bytes(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation_is_taken(tmp_path, preprocess, reference, kind):
    frames = [Image.fromarray(noise((60, 50), seed=i)) for i in range(3)]
    content = stored(frames[0], kind, save_all=True, append_images=frames[1:], duration=10)
    assert opened(content).n_frames == 3
    still = opened(content)
    still.seek(0)
    expected = reference(still.convert("RGB"))
    assert torch.equal(decoded_here(content, tmp_path, preprocess, kind.lower()), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (3, 1), (7, 3), (3, 3), (4, 120), (150, 3), (3000, 2000)])
def test_any_size_will_do(tmp_path, preprocess, reference, size):
    """Heights of 1 and 3 are where transformers 4 takes rows for channels, unless it is told."""
    content = stored(Image.fromarray(noise(size)), "PNG")
    found = decoded_here(content, tmp_path, preprocess, "png")
    assert found.shape == (3, 224, 224)
    if size[1] not in (1, 3):
        assert torch.equal(found, reference(opened(content)))
        return
    short = min(size)
    image = opened(content).resize((size[0] * 224 // short, size[1] * 224 // short), Image.Resampling.BICUBIC)
    assert torch.equal(found, reference(image))


def test_pictures_from_parquet_are_those_from_files(tmp_path, preprocess):
    contents = [stored(in_mode(mode, size), "JPEG") for mode in ("RGB", "L") for size in SIZES]
    rows = {"image": [{"bytes": c, "path": None} for c in contents], "label": [0] * len(contents)}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a"])})
    data = Dataset.from_dict(rows, features=features)
    images = TaskImages(make_task("some", data), preprocess)
    for i, content in enumerate(contents):
        assert torch.equal(images[i][0], preprocess(opened(content)))


# Turned upright


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_as_datasets_does(tmp_path, preprocess, reference, orientation):
    """The published figures were made of images from `datasets`, which turns them upright since 2.18."""
    image = Image.fromarray(noise((60, 40)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(image, "JPEG", exif=exif)
    path = tmp_path / "0.jpg"
    path.write_bytes(content)
    upright = Dataset.from_dict({"image": [str(path)]}, features=Features({"image": ImageFeature()}))[0]["image"]
    assert upright.size == ((40, 60) if orientation > 4 else (60, 40))
    found = decoded_here(content, tmp_path, preprocess)
    assert torch.equal(found, reference(upright))
    assert torch.equal(found, reference(opened(content))) is (orientation == 1)


# More than 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_upper_8(tmp_path, preprocess, kind):
    """PIL would make white of everything above 255."""
    grey = noise((50, 40))[..., 0].astype(np.uint16)
    content = stored(Image.fromarray(grey * 256 + 77), kind)
    assert opened(content).mode == "I;16"
    expected = preprocess(Image.fromarray(grey.astype(np.uint8)))
    assert torch.equal(decoded_here(content, tmp_path, preprocess, kind.lower()), expected)


def test_whole_numbers_of_32_bits_must_be_bytes():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert np.array_equal(np.asarray(as_bytes(Image.fromarray(values)))[..., 0], values)
    with pytest.raises(DataError, match="holds int32 values from 0 to 510"):
        as_bytes(Image.fromarray(2 * values))


def test_floating_point_pictures_must_be_shares_of_white():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(as_bytes(Image.fromarray(values)))[..., 0], np.arange(256).reshape(16, 16))
    with pytest.raises(DataError, match="holds float32 values from 0 to 255"):
        as_bytes(Image.fromarray(255 * values))


def test_processor_is_the_one_that_auto_classes_find(folder, preprocess):
    """So that no other backend, whose rounding differs, is taken where torchvision is installed."""
    image = Image.fromarray(noise((333, 222)))
    options = (
        {"backend": "pil"} if hasattr(AutoImageProcessor.from_pretrained(folder), "backend") else {"use_fast": False}
    )
    other = AutoImageProcessor.from_pretrained(folder, **options)
    assert torch.equal(preprocess(image), other(images=image, return_tensors="pt")["pixel_values"][0])
