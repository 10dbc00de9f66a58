"""The options of ``molsaki extract``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from molsaki.config.options import (
    DATA_FILES,
    DataOptions,
    Dtype,
    MixtureOptions,
    TextOptions,
    check_options,
    option,
)


@dataclasses.dataclass
class ExtractConfig(DataOptions, TextOptions, MixtureOptions):
    """``molsaki extract``: run the teacher once over a data set and store its maps."""

    teacher: str | None = option(None, "Folder or hub name of the white-box teacher.")
    data_files: list[str] = option(
        [], f"Files with id, question, rationale and answer: {DATA_FILES}. They share one store."
    )
    store: str | None = option(None, "Folder of the store; an unfinished store is continued.")
    student: str | None = option(
        None, "Folder or hub name of the student; needed with too_long=cut and for mixtures that pair up layers."
    )
    all_layers: bool = option(False, "Store the map of every layer, so that any mixture can be used later.")
    packing: bool | None = option(
        None, "Pack the texts of a forward pass without padding. Default: on if the teacher supports it."
    )
    batch_tokens: int = option(8192, "Tokens per forward pass of the teacher, padding included.")
    shard_size: int = option(
        1024,
        "Examples per file of the store, or fewer if their maps are large (256 MiB); an interruption loses at most the "
        "work on one file.",
    )
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device_map: dict[str, Any] | str | None = option(
        None,
        "How to spread a teacher that is larger than one device, as in from_pretrained: auto (all devices, then "
        "memory, then disk), or JSON of modules and devices. Each process needs its own devices "
        "(CUDA_VISIBLE_DEVICES).",
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Load the teacher's linear layers with 8 or 4 bits (needs bitsandbytes)."
    )
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self, batch_tokens=1, shard_size=1, limit=1)
