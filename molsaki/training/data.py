"""Converts the data given to a trainer into data sets, and logs their contents and labels."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch.utils.data import IterableDataset

from molsaki.batches.dataset import DistillDataset, as_examples
from molsaki.batches.streamed import Peeked, StreamedDataset, StreamedFiles
from molsaki.batches.tokenized import Tokenization
from molsaki.method.objectives import Objective
from molsaki.store.map_store import Store
from molsaki.text.examples import read_examples
from molsaki.training.config import DistillConfig

logger = logging.getLogger(__name__)


class TrainingData:
    """Prepares training and evaluation data alike.

    Attributes:
        mostly_thinks: whether most training examples have a thinking trace; set by `for_training`.
    """

    def __init__(self, config: DistillConfig, objective: Objective, tokenization: Tokenization, store: Store | None):
        self.config, self.objective, self.tokenization, self.store = config, objective, tokenization, store
        self.mostly_thinks = False

    def for_training(self, given: Any) -> DistillDataset | StreamedDataset | None:
        """The training data, from ``given`` or else the config's files; None if there are none.

        Raises:
            ValueError, TypeError: no example can be used, none has a key word although the loss needs them, or an
                option is incompatible with streamed data.
        """
        config, name, files = self.config, "train_dataset", self.config.train_file
        if given is None and files:
            given = StreamedFiles(files) if config.streaming else read_examples(files, data_format=config.data_format)
        data: DistillDataset | StreamedDataset | None
        if given is not None and (config.streaming or _is_stream(given)):
            data, peeked = self._streamed(given, name)
            first, thinking, count = peeked.first, peeked.thinking, peeked.used
        elif (data := self.whole(given, name, config.limit)) is not None:
            first, thinking, count = data[0][0], data.thinking, len(data)
        else:
            return None
        self.mostly_thinks = 2 * thinking > count
        if config.process_index == 0:
            logger.info("%s", self.tokenization.describe_labels(first))
        return data

    def for_evaluation(self, given: Any) -> DistillDataset | dict[str, DistillDataset | None] | None:
        """The evaluation data, from ``given`` (possibly several data sets by name) or else from the config's files."""
        config = self.config
        if given is None and config.eval_file:
            given = read_examples(config.eval_file, data_format=config.data_format)
        if config.eval_accuracy and config.process_index == 0:
            if given is None:
                logger.warning(
                    "eval_accuracy: not computed, since there is no evaluation data (--eval_file, eval_dataset)"
                )
            elif getattr(config.eval_strategy, "value", config.eval_strategy) == "no":
                logger.warning(
                    "eval_accuracy: only evaluate() computes it, with --eval_strategy no; use steps or epoch"
                )
        if isinstance(given, Mapping):
            return {name: self.whole(data, f"eval_dataset[{name!r}]") for name, data in given.items()}
        return self.whole(given, "eval_dataset")

    def whole(self, given: Any, name: str, limit: int | None = None) -> DistillDataset | None:
        """A sequence of examples or of dicts, tokenized once; ``name`` is the argument's name in messages."""
        found: DistillDataset | None
        if given is None or isinstance(given, DistillDataset):
            found = given
        else:
            examples = as_examples(given, name, self.config.data_format)[:limit]
            found = DistillDataset(examples, self.tokenization, self.store)
            if self.config.process_index == 0:
                logger.log(logging.WARNING if found.left_out else logging.INFO, "%s: %s", name, found.summary())
        if found is not None:
            self._need_words(found.without_words, len(found), str(len(found)), name)
        return found

    def _streamed(self, given: Any, name: str) -> tuple[StreamedDataset, Peeked]:
        """The stream, and the properties of its first examples, which are checked."""
        config = self.config
        _check_streaming(config)
        rows = cast("Iterable[Any]", given)
        stream = StreamedDataset(rows, name, self.tokenization, self.store, config.data_format, config.limit)
        peeked = stream.peek()
        self._need_words(peeked.without_words, peeked.used, f"first {peeked.used}", name)
        return stream, peeked

    def _need_words(self, without: int, count: int, counted: str, name: str) -> None:
        if self.objective.maps and without == count:
            raise ValueError(
                f"key: {self.config.key} finds no key word in any of the {counted} examples of {name}, so objective "
                f"{self.config.objective} has no attention loss; use another --key or --objective dss, or give the "
                "examples their keywords (--key keywords) or key_spans (--key given; molsaki keys writes them)"
            )


def _is_stream(data: Any) -> bool:
    """Whether the rows have no length, so that they can only be read in order."""
    return isinstance(data, IterableDataset) or (not hasattr(data, "__len__") and hasattr(data, "__iter__"))


def _check_streaming(config: DistillConfig) -> None:
    """Refuse options that need all examples of a stream in advance."""
    if config.max_steps <= 0:
        raise ValueError(f"max_steps: expected the number of steps to train on streamed data, got {config.max_steps}")
    accelerator_config = copy.copy(cast(Any, config.accelerator_config))
    accelerator_config.dispatch_batches = False  # the batches are nested
    config.accelerator_config = accelerator_config
    sampling = getattr(config, "train_sampling_strategy", "random")  # transformers 4 has group_by_length
    if sampling == "group_by_length" or getattr(config, "group_by_length", False):
        raise ValueError(
            "train_sampling_strategy: expected no group_by_length with streamed data, whose lengths are not known"
        )
