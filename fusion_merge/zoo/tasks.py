"""What the embedded tasks are made of: class names, prompts, and a function that draws or reads the images.

Images are 32×32 RGB; the same call always gives the same images. Training and test splits share no source:
other samples of the digit sets, other fonts, other regions of the photographs, other random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, final
from zlib import crc32

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from PIL.Image import Image

    from fusion_merge.zoo.drawing import Colours

    Samples = Iterator[tuple[Image, int]]

SPLITS: tuple[str, ...] = ("train", "test")
SIZE = 32

Maker = Callable[["np.random.Generator", bool], "Samples"]
"""Gives the images and labels of the test split, or of the training split."""

Style = tuple["Colours", "Colours"]
"""Ink and paper, each from darkest to lightest: like real datasets, the tasks differ in style."""


@dataclass(frozen=True)
class EmbeddedTask:
    """One task, as data.

    Attributes:
        pool: the pool that the task was first part of; its random draws begin with it.
        classnames: the names of the classes, in the order of the labels.
        templates: the prompts; each has one `{}` for the class name.
        make: gives the images.
        more_classnames: names of classes that only pretraining sees, after the task's own.
        make_more: gives the images of all of them, where there are such classes.
        by_colour: whether the classes are told apart by colour, so that pretraining must not change it.
    """

    pool: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    make: Maker
    more_classnames: tuple[str, ...] = ()
    make_more: Maker | None = None
    by_colour: bool = False


@final
class EmbeddedTasks:
    """The tasks of an embedded pool, made offline from data inside packages on PyPI.

    Args:
        pool: what the pool is called.
        tasks: the tasks by name.
    """

    def __init__(self, pool: str, tasks: Mapping[str, EmbeddedTask]) -> None:
        self.pool = pool
        self._tasks = dict(tasks)

    def __getitem__(self, task: str) -> EmbeddedTask:
        """Return a task by its name; a ValueError says what there is."""
        return self._tasks[self._known(task, "task", self._tasks)]

    def classnames(self, task: str, *, pretraining: bool = False) -> list[str]:
        """Give the class names of a task, in the order of its labels.

        Args:
            task: one of the pool's tasks.
            pretraining: with the classes that only pretraining sees, after the task's own.

        Raises:
            ValueError: if there is no such task.
        """
        made = self[task]
        return [*made.classnames, *(made.more_classnames if pretraining else ())]

    def templates(self, task: str) -> list[str]:
        """Give the prompt templates of a task; each has one `{}` for the class name.

        Args:
            task: one of the pool's tasks.

        Raises:
            ValueError: if there is no such task.
        """
        return list(self[task].templates)

    def load_task(self, task: str, split: str, *, pretraining: bool = False) -> Dataset:
        """Make one split of a task: the columns are `image` (32×32 RGB) and `label`, in a fixed mixed order.

        Args:
            task: one of the pool's tasks.
            split: "train" or "test".
            pretraining: with the classes that only pretraining sees.

        Raises:
            ValueError: if there is no such task or split.
            ImportError: if a package which holds the data is missing.
        """
        names, made = self.classnames(task, pretraining=pretraining), self[task]
        test = self._known(split, "split", SPLITS) == "test"
        for package in ("PIL", "numpy"):
            folder(package)
        import numpy as np
        from datasets import ClassLabel, Dataset, Features, Image

        rng = np.random.default_rng(crc32(f"{made.pool}/{task}/{split}".encode()))
        make = made.make_more if pretraining and made.make_more else made.make
        samples = list(make(rng, test))
        order = rng.permutation(len(samples))
        columns = {"image": [samples[k][0] for k in order], "label": [samples[k][1] for k in order]}
        return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))

    def _known(self, value: str, what: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
        if value not in valid:
            raise ValueError(f"there is no {what} {value!r} in {self.pool}; choose one of: {', '.join(valid)}")
        return value


def folder(package: str) -> Path:
    """Find the folder of an installed package without importing it, which takes seconds for some.

    Args:
        package: its name.

    Raises:
        ImportError: if it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the embedded tasks need the package {package!r}: pip install 'fusion_merge[tiny8]'",
            name=package,
        )
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Drawn:
    """A maker of images that one function draws.

    Attributes:
        module: the function's module in `fusion_merge.zoo`, which is imported when images are made.
        function: its name; it is called as `function(value, rng, ink, paper)`.
        values: what it draws, one a class.
        style: ink and paper.
        per_class: images of a class in the training and the test split.
    """

    module: str
    function: str
    values: Sequence[Any]
    style: Style
    per_class: tuple[int, int]

    def __call__(self, rng: np.random.Generator, test: bool) -> Samples:
        """Draw the images of one split, class by class."""
        draw = getattr(import_module(f"fusion_merge.zoo.{self.module}"), self.function)
        for label in _labels(len(self.values), self.per_class[test]):
            yield draw(self.values[label], rng, *self.style), label


@dataclass(frozen=True)
class Script:
    """A maker of images of characters in matplotlib's fonts.

    Attributes:
        characters: the characters, one a class.
        style: ink and paper.
        per_class: images of a class in the training and the test split.
        train_fonts: names of the font files of the training split, without their ending.
        test_fonts: those of the test split.
    """

    characters: Sequence[str]
    style: Style
    per_class: tuple[int, int]
    train_fonts: Sequence[str]
    test_fonts: Sequence[str]

    def __call__(self, rng: np.random.Generator, test: bool) -> Samples:
        """Draw the images of one split, class by class."""
        from fusion_merge.zoo.drawing import glyph

        place = folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
        fonts = [str(place / f"{name}.ttf") for name in (self.test_fonts if test else self.train_fonts)]
        for label in _labels(len(self.characters), self.per_class[test]):
            yield glyph(self.characters[label], fonts[int(rng.integers(len(fonts)))], rng, *self.style), label


def named(names: str, characters: str) -> dict[str, str]:
    """Pair the words of a text with the characters of another.

    Args:
        names: words with spaces between; an underscore stands for a space within a name.
        characters: as many characters.
    """
    words = (word.replace("_", " ") for word in names.split())
    return dict(zip(words, characters, strict=True))


def _labels(classes: int, per_class: int) -> Iterator[int]:
    return (label for label in range(classes) for _ in range(per_class))
