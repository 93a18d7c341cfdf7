"""Datasets of labelled images, from wherever they come, as classification tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Value

from fusion_merge.errors import ConfigError, DataError, nearest
from fusion_merge.pools.classnames import make_classnames, published_classnames
from fusion_merge.pools.corruptions import Corruption
from fusion_merge.pools.decoding import decoded, file_name, holds_images, holds_texts, undecoded
from fusion_merge.pools.labels import label_number, labels_are_missing, labels_in_order, own_labels
from fusion_merge.pools.prompts import PromptSet, prompt_set
from fusion_merge.pools.reading import Purpose, folder_of, open_data, pick_split, zoo_task
from fusion_merge.pools.tables import check_files
from fusion_merge.zoo import SCHEME

DEFAULT_TEMPLATE = "a photo of a {}."
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "webp")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
UNLABELLED = -1
"""The label of an image that has none."""

CORRUPTION_OPTIONS = {
    "corruption": "name",
    "severity": "severity",
    "corruption_constants": "constants",
    "corruption_seed": "seed",
}
"""What a task may say about the corruption of its images, and what `Corruption` calls it."""

TASK_OPTIONS = (
    "data",
    "split",
    "prompts",
    "classnames",
    "by_position",
    "templates",
    "image_column",
    "label_column",
    *CORRUPTION_OPTIONS,
)
"""The keys of a task's spec."""


@dataclass(frozen=True)
class ImageTask:
    """One classification task.

    Attributes:
        name: what the task is called.
        data: the images and labels: items are mappings, or (image, label) pairs.
        image_column: where an item's image is: a picture, a path, or what else `decoded` takes.
        label_column: where an item's label is: an integer from 0 to the number of classes less one, or a key of
            `label_numbers`; None if there are no labels.
        classnames: one name a class.
        templates: prompts with a `{}` for the class name.
        split: the split that the data are, where it has a name.
        corruption: what is done to each image before it is preprocessed.
        folder: what relative paths of images are relative to; by default the working directory.
        label_numbers: which class each label is, where labels are not the numbers of the classes.
    """

    name: str
    data: Any
    image_column: str | int
    label_column: str | int | None
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    split: str | None = None
    corruption: Corruption | None = None
    folder: Path | None = None
    label_numbers: Mapping[Any, int] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def item(self, index: int) -> tuple[Any, int]:
        """Return one image and its label, -1 where there are no labels.

        Args:
            index: from 0 to the number of images less one.

        Raises:
            DataError: if the label is not one of the classes.
        """
        row = self.data[index]
        label = UNLABELLED
        if self.label_column is not None:
            try:
                label = label_number(row[self.label_column], len(self.classnames), self.label_numbers)
            except DataError as error:
                raise DataError(f"`{self.name}`: image {index} has {error}") from error
        return decoded(row[self.image_column], self.folder), label

    def file_name(self, index: int) -> str | None:
        """Return the path, or at least the file name, of one image, if it has one; the image is not decoded.

        Args:
            index: from 0 to the number of images less one.
        """
        try:
            return file_name(self.data[index][self.image_column], self.folder)
        except Exception:  # what is asked for an error message must not raise another
            return None


def make_task(name: str, spec: Any, *, split: str | None = None, purpose: Purpose = Purpose.SCORING) -> ImageTask:
    """Make a task from what a user wrote about it.

    Args:
        name: what the task is called.
        spec: a dataset object, a path, a hub id, or a mapping with `data` and optionally `split`, `prompts`,
            `classnames`, `by_position`, `templates`, `image_column`, `label_column`, and `corruption` with `severity`,
            `corruption_constants` and `corruption_seed`, which are those of `Corruption`. A mapping with `_target_` is
            called; any other mapping with `path` goes to `datasets.load_dataset`. `classnames` is a list or a mapping
            from the dataset's label names to prompts. A list of the dataset's own label names, in whatever order, is
            matched by name; any other list is in the order of the dataset's labels. Labels in words are classes in
            alphabetical order, unless `classnames` has them all; integers without names may be keys of `classnames`.
            With `by_position: true` the names of a list belong to the numbers of the labels, whatever the dataset calls
            them, and there may be more of them than labels.
            `prompts` names a published prompt set: its class names belong to the labels by position, whatever the
            dataset calls them, but to words and local folders as `published_classnames` says; `classnames` and
            `templates` beside it win, each for itself. An image is a picture, the bytes of a file, or a path, relative
            to the folder of the table that it is in.
        split: the split to take where the spec names none; what is the default without is said at `pick_split`.
        purpose: what the images are for; labels may be missing for adaptation alone.

    Raises:
        DataError: if the data cannot be read, are empty, have no labels, or more labels than class names.
    """
    options = _options(name, spec)
    corruption = _corruption(name, options)
    wanted = options.get("split") or split
    loaded = open_data(name, options["data"], wanted, purpose)
    data, chosen = pick_split(name, loaded, wanted, purpose)
    columns = _columns(name, data)
    for kind in ("image_column", "label_column"):
        column = options.get(kind)
        if column is not None and column not in columns:
            raise DataError(
                f"`{kind}`={column!r} is not in the dataset of `{name}`; {nearest(str(column), map(str, columns))}"
            )
    image = options.get("image_column")
    if image is None:
        image = _find_column("image", columns, _IMAGE_COLUMNS, data)
    if image is None:
        raise _no_column(name, "image", columns, "name it with `image_column`")
    label = options.get("label_column")
    if label is None:
        label = _find_column("label", columns, _LABEL_COLUMNS, data)
    prompts = _prompts(name, options)
    given = options.get("classnames")
    if label is None and (purpose is not Purpose.ADAPTATION or not (given or prompts)):
        more = "; images without labels can be adapted on, if `classnames` are given, but not scored"
        raise _no_column(name, "label", columns, f"name it with `label_column`{more}")
    folder = folder_of(options["data"])
    _check_images(name, data, image, folder)
    own, numbered = (None, True) if _by_position(name, options) else own_labels(loaded, data, label, given)
    keys = labels_in_order(own, given) if own and not numbered else None
    if prompts is not None and not given:
        labels = list(map(str, keys)) if keys else own if _are_folders(data, options["data"]) else None
        classnames = published_classnames(name, prompts.classnames, labels)
    else:
        classnames = make_classnames(name, given, own if keys is None else list(map(str, keys)))
    numbers = {key: number for number, key in enumerate(keys)} if keys is not None else None
    templates = _templates(name, options, prompts)
    if label is not None and labels_are_missing(name, data, label, numbers, len(classnames), purpose):
        label = None
    return ImageTask(
        name,
        undecoded(data, image, label),
        image,
        label,
        classnames,
        templates,
        split=chosen,
        corruption=corruption,
        folder=folder,
        label_numbers=numbers,
    )


def _options(name: str, spec: Any) -> dict[str, Any]:
    """Return the parts of a spec; what is not a table of known keys is the data themselves."""
    if spec is None:
        raise DataError(f"task `{name}` has no data; give a path, a hub id or a dataset")
    if not isinstance(spec, Mapping) or isinstance(spec, DatasetDict):
        return {"data": spec}
    if "data" not in spec and ("_target_" in spec or "path" in spec):
        return {"data": spec}
    for key in spec:
        if key not in TASK_OPTIONS:
            raise DataError(f"`{key}` is not an option of task `{name}`; {nearest(str(key), TASK_OPTIONS)}")
    if "data" not in spec:
        raise DataError(f"task `{name}` has no `data`; give a path, a hub id or a dataset")
    return dict(spec)


def _corruption(name: str, options: Mapping[str, Any]) -> Corruption | None:
    given = {CORRUPTION_OPTIONS[key]: options[key] for key in CORRUPTION_OPTIONS if options.get(key) is not None}
    if not given:
        return None
    if "name" not in given:
        raise DataError(f"task `{name}` has {' and '.join(given)} of a corruption, but no `corruption`; name one")
    try:
        return Corruption(**given)
    except ConfigError as error:
        raise DataError(f"task `{name}`: {error}") from error


def _prompts(name: str, options: Mapping[str, Any]) -> PromptSet | None:
    given = options.get("prompts")
    if given is None:
        return None
    if not isinstance(given, str):
        raise DataError(f"`prompts`={given!r} of `{name}` is not the name of a prompt set, such as cifar10")
    try:
        return prompt_set(given)
    except DataError as error:
        raise DataError(f"task `{name}`: {error}") from error


def _by_position(name: str, options: Mapping[str, Any]) -> bool:
    """Tell whether class names belong to the numbers of labels, whatever the dataset calls them."""
    given, names = options.get("by_position"), options.get("classnames")
    if given not in (None, True, False):
        raise DataError(f"`by_position`={given!r} of `{name}` is neither true nor false")
    if given and (isinstance(names, str | Mapping) or not names):
        raise DataError(f"`by_position` of `{name}` needs a list of `classnames`, in the order of the labels")
    return bool(given)


def _templates(name: str, options: Mapping[str, Any], prompts: PromptSet | None) -> tuple[str, ...]:
    given = options.get("templates") or ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"`templates`={given!r} of `{name}` is not a list; write [{given}]")
    published = prompts.templates if prompts is not None else ()
    templates = tuple(map(str, given)) or published or _own_templates(options["data"]) or (DEFAULT_TEMPLATE,)
    for template in templates:
        if "{}" not in template:
            raise DataError(f"template {template!r} of `{name}` has no `{{}}` for the class name")
    return templates


def _columns(name: str, data: Any) -> list[str | int]:
    """Return the columns of data that are not empty."""
    try:
        empty = len(data) == 0
        first = None if empty or isinstance(data, Dataset) else data[0]
        keys = [] if first is None else list(first) if isinstance(first, Mapping) else list(range(len(first)))
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"the data of `{name}` are a {type(data).__name__}, not a dataset of images and labels"
        ) from error
    if empty:
        raise DataError(f"the dataset of `{name}` is empty; give one with at least one image")
    return list(data.column_names) if isinstance(data, Dataset) else keys


def _find_column(kind: str, columns: Sequence[str | int], usual: Sequence[str], data: Any) -> str | int | None:
    for column in usual:
        if column in columns:
            return column
    if isinstance(data, Dataset):
        fits = holds_images if kind == "image" else _is_class_label
        typed = [column for column in data.features if fits(data, column)]
        if len(typed) == 1:
            return str(typed[0])
        paths = [column for column in _PATH_COLUMNS if holds_texts(data, column)] if kind == "image" else []
        return paths[0] if len(paths) == 1 else None
    return ("image", "label").index(kind) if 0 in columns and len(columns) == 2 else None


def _is_class_label(data: Dataset, column: str) -> bool:
    return isinstance(data.features[column], ClassLabel)


def _check_images(name: str, data: Any, image: str | int, folder: Path | None) -> None:
    """Refuse a column that holds no images, or paths to files that are not there."""
    if holds_texts(data, image):
        check_files(name, data.with_format(None).select_columns([image])[:][image], folder)
        return
    feature = data.features[image] if isinstance(data, Dataset) else None
    if isinstance(feature, Value) and not holds_images(data, str(image)):
        raise DataError(
            f"column `{image}` of `{name}` holds {feature.dtype} values, not images or paths to images; "
            "name another with `image_column`"
        )


def _no_column(name: str, kind: str, columns: Sequence[str | int], way_out: str) -> DataError:
    return DataError(f"the dataset of `{name}` has no {kind} column among {', '.join(map(str, columns))}; {way_out}")


def _are_folders(data: Any, source: Any) -> bool:
    """Tell whether classes are the user's own folders; those of hub datasets are in the published order."""
    place = source.get("path") if isinstance(source, Mapping) else source
    on_hub = isinstance(place, str) and "/" in place and not Path(place).expanduser().exists()
    return isinstance(data, Dataset) and data.info.builder_name == "imagefolder" and not on_hub


def _own_templates(source: Any) -> tuple[str, ...]:
    if not (isinstance(source, str) and source.startswith(SCHEME)):
        return ()
    pool, task = zoo_task(source)
    return tuple(pool.templates(task))
