"""The options of a task pool that have two names, ours and fusion_bench's, or several forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.options import LARGEST
from fusion_merge.pools.images import OnBadImage
from fusion_merge.pools.references import PROCESSORS, Reference, check_table, reference_of


def task_specs(tasks: Any, test_datasets: Any) -> dict[str, Any]:
    """Return the tasks under either name of the option.

    Args:
        tasks: a table of tasks.
        test_datasets: another one.

    Raises:
        ConfigError: if one is no table, or a task is in both.
    """
    for option, value in (("tasks", tasks), ("test_datasets", test_datasets)):
        check_table(value, option, "{TASK: {data: PATH_OR_HUB_ID}, …}")
    twice = [name for name in tasks or () if name in (test_datasets or ())]
    if twice:
        raise ConfigError(f"task `{twice[0]}` is in both `tasks` and `test_datasets`; give it once")
    return {**(tasks or {}), **(test_datasets or {})}


def clip_source(clip_model: Any, base_model: Any) -> Any:
    """Return a reference, an object, or a config that makes one; the two names of the option must agree.

    Args:
        clip_model: what was given under the one name.
        base_model: what was given under the other.

    Raises:
        ConfigError: if they disagree.
    """
    first, second = (
        None if given is None else reference_of(given, f"`{option}`") or given
        for option, given in (("clip_model", clip_model), ("base_model", base_model))
    )
    if first is not None and second is not None and first is not second and first != second:
        raise ConfigError(
            f"`clip_model`={_word(first)} and `base_model`={_word(second)} are two names of one option; give one"
        )
    return first if first is not None else second


def processor_source(processor: Any) -> Any:
    """Return a reference, an object, or a config that makes one.

    Args:
        processor: what was given.
    """
    return reference_of(processor, "`processor`", PROCESSORS) or processor


def _word(source: Any) -> str:
    return f"{str(source)!r}" if isinstance(source, Reference | Mapping) else f"a {type(source).__name__}"


def made_from(config: Mapping[str, Any], option: str) -> Any:
    """Return what a config with `_target_` makes.

    Args:
        config: the config.
        option: which option it is, for errors.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        return instantiate(dict(config))
    except Exception as error:  # what a config calls may fail in any way
        raise ConfigError(f"`{option}` cannot be made from its config: {error}") from error


def bad_image_option(given: Any, pool: str) -> OnBadImage:
    """Return what becomes of bad images.

    Args:
        given: what was given as `on_bad_image`.
        pool: whose option it is, for errors.

    Raises:
        ConfigError: if there is no such choice.
    """
    known = [choice.value for choice in OnBadImage]
    if given not in known:
        raise ConfigError(f"`on_bad_image`={given!r} of the {pool} is none of {', '.join(known)}")
    return OnBadImage(given)


def loader_options(batch_size: Any, num_workers: Any, more: Mapping[str, Any]) -> tuple[int, int]:
    """Return batch size and number of workers; fusion_bench's further options may say what is done anyway.

    Args:
        batch_size: images a batch.
        num_workers: the most worker processes.
        more: `dataloader_kwargs`.

    Raises:
        ConfigError: if an option is unknown or out of range.
    """
    check_table(more, "dataloader_kwargs", "{batch_size: 128, num_workers: 8}")
    fixed = {"pin_memory": (True, False), "drop_last": (False,), "shuffle": (False,)}
    options = {"batch_size": batch_size, "num_workers": num_workers, **more}
    known = ("batch_size", "num_workers", *fixed)
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"`{key}` is not an option of `dataloader_kwargs`; {nearest(key, known)}")
        if key in fixed and value not in fixed[key]:
            raise ConfigError(f"`{key}`={value!r} is not possible: each image is scored once, in order")
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        if type(options[key]) is not int or not least <= options[key] <= LARGEST:
            huge = isinstance(options[key], int) and abs(options[key]) > LARGEST  # too many digits to show
            raise ConfigError(
                f"`{key}`={'…' if huge else repr(options[key])} of the task pool is not a whole number of at least "
                f"{least} and at most {LARGEST}"
            )
    return options["batch_size"], options["num_workers"]
