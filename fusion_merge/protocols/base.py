"""What every protocol is: options, and a program that is made of them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

from fusion_merge.options import check_options
from fusion_merge.program import FusionProgram, Report
from fusion_merge.registry import object_from_config


class Program(Interface):
    """What a command runs; see `FusionProgram`."""

    @property
    def usual(self) -> FusionProgram:
        """The run that it consists of, or that its runs are made of."""

    @property
    def runs(self) -> int:
        """How often it adapts and scores."""

    def check(self) -> None:
        """Check what can be checked before any weight is read."""

    def plan(self) -> str:
        """Return what the run is about to do, in words."""

    def run(self) -> Report:
        """Run everything, and return the report that was written."""


@dataclasses.dataclass(kw_only=True)
class Protocol(ABC):
    """A way to run and score more than once; a dataclass whose fields are the keys of its YAML."""

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is of the wrong type or out of range.
        """
        check_options(self)

    @abstractmethod
    def program(self, config: Mapping[str, Any], output_dir: Path, command: str) -> Program:
        """Return what runs it.

        Args:
            config: the resolved configuration, as in `config/config.yaml`.
            output_dir: where reports, pictures and logs go.
            command: the command that started the run, for the report.

        Raises:
            FusionMergeError: if the configuration does not hold together.
        """


def make_program(config: Mapping[str, Any], output_dir: Path, command: str) -> Program:
    """Return what a configuration says to run: one run, or its protocol.

    Args:
        config: the resolved configuration, as in `config/config.yaml`.
        output_dir: where reports, pictures and logs go.
        command: the command that started the run, for the report.

    Raises:
        FusionMergeError: if the configuration does not hold together.
    """
    if config.get("protocol") is None:
        return FusionProgram(config, output_dir, command)
    protocol: Protocol = object_from_config(config["protocol"], "protocol", Protocol)
    return protocol.program(config, output_dir, command)
