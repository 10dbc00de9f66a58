"""The options of ``molsaki plot``."""

from __future__ import annotations

import dataclasses

from molsaki.config.options import (
    DataOptions,
    MixtureOptions,
    TextOptions,
    check_options,
    option,
)


@dataclasses.dataclass
class PlotConfig(DataOptions, TextOptions, MixtureOptions):
    """``molsaki plot``: draw the losses and layer weights of a run, and the maps of texts."""

    run: str | None = option(
        None, "Output folder of molsaki distill: draw its log, and use its options and router for the maps."
    )
    data_file: str | None = option(None, "File with the examples whose maps are drawn.")
    teacher: str | None = option(None, "Folder or hub name of the teacher, which runs live if no store is given.")
    store: str | None = option(None, "Folder of the teacher's stored maps.")
    student: str | None = option(None, "Folder or hub name of the student, or a checkpoint with its router.")
    examples: int = option(3, "Number of examples to draw, the first ones of the data.")
    ids: list[str] = option([], "Ids of the examples to draw, instead of the first ones.")
    output_dir: str | None = option(None, "Folder of the pictures. Default: plots in the run's folder.")
    format: list[str] = option(
        ["png", "svg"],
        "File formats: png for slides and chats, svg for the web and papers (its text can be searched), pdf for LaTeX.",
        choices=("png", "svg", "pdf"),
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not isinstance(self.format, list) or not self.format or {*self.format} - {"png", "svg", "pdf"}:
            raise ValueError(f"format: expected some of png, svg and pdf in a list, got {self.format!r}")
