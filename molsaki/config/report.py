"""The options of ``molsaki report``."""

from __future__ import annotations

import dataclasses

from molsaki.config.options import (
    DataOptions,
    check_options,
    option,
)


@dataclasses.dataclass
class ReportConfig(DataOptions):
    """``molsaki report RUN``: one HTML file about a run: curves, layer weights, maps, predictions, configuration."""

    run: str | None = option(
        None, "Output folder of molsaki distill; also as the first word: molsaki report RUN. Its options are used."
    )
    output_file: str | None = option(None, "The HTML file to write. Default: report.html in the run's folder.")
    teacher: str | None = option(
        None,
        "Folder or hub name of the teacher, run live for the map of each of its layers. Default: the folder that the "
        "run was trained with, if it still exists.",
    )
    store: str | None = option(
        None, "Folder of the teacher's stored maps. Default: that of the run, if it still exists."
    )
    student: str | None = option(
        None, "Folder or hub name of the student. Default: the run's folder, or its last checkpoint."
    )
    data_file: str | None = option(
        None, "File whose examples' maps are shown. Default: the run's eval_file, else its train_file."
    )
    predictions: list[str] = option(
        [],
        "predictions.jsonl of molsaki evaluate, or its folder: first the student's, then those of other models to "
        "show next to them, such as the student before training. Default: the one in the run's folder, if any.",
    )
    examples: int = option(
        8,
        "Number of examples whose maps are shown, the first of the data; also the number of right and of wrong "
        "predictions.",
    )
    ids: list[str] = option([], "Ids of the examples whose maps are shown, instead of the first ones.")

    def __post_init__(self) -> None:
        check_options(self, examples=0)
