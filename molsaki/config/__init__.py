"""The config dataclasses, which are also the command line: every field is a flag, with the field's help text.

`molsaki.flags` reads them. Nothing here imports torch, so that ``--help`` is fast. `DistillConfig`, which adds
`DistillOptions` to transformers' ``TrainingArguments``, therefore has a module of its own, `molsaki.training.config`.
"""

from molsaki.config.annotate import AnnotateConfig as AnnotateConfig
from molsaki.config.distill import DistillOptions as DistillOptions
from molsaki.config.evaluate import EvaluateConfig as EvaluateConfig
from molsaki.config.extract import ExtractConfig as ExtractConfig
from molsaki.config.keys import KeysConfig as KeysConfig
from molsaki.config.options import COT_TEMPLATE as COT_TEMPLATE
from molsaki.config.options import OR_YOUR_OWN as OR_YOUR_OWN
from molsaki.config.options import PREDICT_TEMPLATE as PREDICT_TEMPLATE
from molsaki.config.options import DataOptions as DataOptions
from molsaki.config.options import MixtureOptions as MixtureOptions
from molsaki.config.options import TextOptions as TextOptions
from molsaki.config.options import check_options as check_options
from molsaki.config.options import require as require
from molsaki.config.plot import PlotConfig as PlotConfig
from molsaki.config.report import ReportConfig as ReportConfig
