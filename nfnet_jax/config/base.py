"""The settings of an experiment: names, defaults, ranges and descriptions.

A configuration is a locked `ConfigDict` with exactly these settings. Those
under `run` may change when a run is resumed: intervals, folders, and how a step
is computed. All others define the experiment; a run refuses to resume with
other values.

A setting is declared here and nowhere else, with three exceptions that declare
theirs where they are used: the options of a model are the keyword arguments of
its family's constructor, augmentations are the fields of
`preprocessing.Augmentation`, and what evaluation does to an image is the fields
of `preprocessing.EvalPreprocessing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import typing
from typing import Any, NamedTuple, TYPE_CHECKING, TypeVar

import ml_collections
from ml_collections import config_dict

from nfnet_jax import preprocessing
from nfnet_jax.models import registry
from nfnet_jax.optim import clipping

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')


class Setting(NamedTuple):
  """One setting.

  Attributes:
    default: of the published ImageNet recipe; None for a value that
      `config.resolve` fills in, or for a part that is left out.
    description: one line for people.
    interval: the numbers that it may be, such as '[0, 1)'.
    choices: the strings that it may be.
    type: of its values, if the default is None.
  """

  default: Any
  description: str
  interval: str | None = None
  choices: Sequence[str] | None = None
  type: Any = None


_COUNT, _SIZE, _SHARE = '[1, inf)', '[0, inf)', '[0, 1)'
_DURATION = "in steps, epochs or examples ('5 epochs')"

_EXPERIMENT = {
  'seed': Setting(0, 'Root of all random draws.', '[0, 2147483648)'),
  'dataset': Setting(
    'imagenet2012', 'Name in TFDS, or a folder of images by class.'
  ),
  'weights': Setting(None, 'Trained network to start from.', type=str),
  'batch_size': Setting(4096, 'Examples per step, on all devices.', _COUNT),
  'train_for': Setting('360 epochs', f'Length of the run, {_DURATION}.'),
  'compute_dtype': Setting(
    'auto',
    'Dtype of the forward and backward pass; auto: float32 on CPUs, else '
    'bfloat16.',
    choices=('auto', 'float32', 'bfloat16'),
  ),
  'label_smoothing': Setting(
    0.1, 'Share of the target spread over all classes.', _SHARE
  ),
  'ema_decay': Setting(
    0.99999, 'Largest decay of the moving average of the weights.', _SHARE
  ),
}
_OPTIMIZER = {
  'learning_rate': Setting(
    None,
    'Peak learning rate; by default base_rate * batch_size / 256.',
    _SIZE,
    type=float,
  ),
  'base_rate': Setting(0.1, 'Learning rate per 256 examples.', _SIZE),
  'warmup': Setting('5 epochs', f'Linear warm-up, {_DURATION}.'),
  'final_learning_rate': Setting(0.0, 'Where the cosine ends.', _SIZE),
  'decay_every': Setting(
    None, f'Step decay instead of the cosine, {_DURATION}.', type=str
  ),
  'decay_factor': Setting(0.97, 'Factor of the step decay.', _SHARE),
  'momentum': Setting(0.9, 'Momentum of SGD.', _SHARE),
  'nesterov': Setting(True, 'Use Nesterov momentum.'),
  'rms_decay': Setting(
    None,
    'Decay of the mean square: RMSProp instead of SGD.',
    _SHARE,
    type=float,
  ),
  'weight_decay': Setting(
    2e-5, 'Weight decay of kernels, added to the clipped gradient.', _SIZE
  ),
  'clipping': Setting(
    None,
    "Clipping threshold; 0 for no clipping, by default the rule's own.",
    _SIZE,
    type=float,
  ),
  'clip_by': Setting('unit', 'Clipping rule.', choices=tuple(clipping.RULES)),
  'clip_statistics': Setting(
    'group',
    'Log the shares of clipped units by parameter group or by layer.',
    choices=tuple(clipping.STATISTICS),
  ),
  'trust_coefficient': Setting(
    None, 'Coefficient of layer-wise rates, as in LARS.', _SIZE, type=float
  ),
  'sam_rho': Setting(0.0, 'Radius of SAM; 0 for no SAM.', _SIZE),
  'sam_share': Setting(
    0.2, "Share of a device's examples for SAM's ascent.", '(0, 1]'
  ),
}
_DATA = {
  'train_split': Setting('train', 'TFDS split to train on.'),
  'eval_split': Setting(
    'validation',
    "TFDS split to evaluate on, or a share of train_split to hold out ('10%').",
  ),
  'image_size': Setting(
    None,
    "Image size in training, px; by default the model's.",
    _COUNT,
    type=int,
  ),
}
# The published values of augmentations; None where the model has its own.
_RECIPE_AUGMENTATION = {
  'crop': 'distorted',
  'flip': True,
  'mixup': True,
  'cutmix': True,
  'randaugment_layers': 4,
  'randaugment_magnitude': None,
}
_DATA_ORDER = {
  'shards': Setting(
    None,
    'Data shards; batches do not depend on the number of devices.',
    _COUNT,
    type=int,
  ),
  'shuffle_buffer': Setting(
    65_536, 'Records that are shuffled together, over all shards.', _COUNT
  ),
}
_RUN = {
  'data_dir': Setting(
    None, "Folder of TFDS datasets; by default TFDS's own.", type=str
  ),
  'max_bad_records': Setting(0, 'Unusable records to pass over.', _SIZE),
  'eval_batch_size': Setting(
    None,
    'Examples per evaluation step; by default batch_size.',
    _COUNT,
    type=int,
  ),
  'log_every': Setting(
    '100 steps', f'Interval of progress lines, {_DURATION}.'
  ),
  'eval_every': Setting('5 epochs', f'Interval of evaluations, {_DURATION}.'),
  'checkpoint_every': Setting(
    '1 epoch', f'Interval of checkpoints, {_DURATION}.'
  ),
  'keep_checkpoints': Setting(3, 'Newest checkpoints to keep.', _COUNT),
  'remat': Setting(
    None,
    'Recompute blocks in the backward pass, to save memory; by default where '
    'the model needs it on these devices.',
    type=bool,
  ),
  'accumulate': Setting(
    None,
    'Microbatches per step and device, to save memory; by default what the '
    'model needs on these devices.',
    _COUNT,
    type=int,
  ),
  'fast_paths': Setting(
    'auto',
    'Faster ways to compute a step: auto, none, or names separated by commas.',
  ),
}
# Of the options that act in training; others are free.
_MODEL_INTERVALS = {
  'stochdepth_rate': _SHARE,
  'dropout_rate': _SHARE,
  'se_ratio': _SIZE,
}
_RECIPE_MODEL = {'stochdepth_rate': 0.25}


def settings() -> dict[str, Setting]:
  """Return all settings by their dotted names, in the order of the tables.

  Examples:
    >>> settings()['optimizer.momentum'].default
    0.9
  """
  return _settings(tuple(registry.list_models()))


@functools.cache
def _settings(models: tuple[str, ...]) -> dict[str, Setting]:
  sections = {
    '': _EXPERIMENT,
    'model.': _model_settings(models),
    'optimizer.': _OPTIMIZER,
    'data.': {
      **_DATA,
      **_fields(preprocessing.Augmentation, '', _RECIPE_AUGMENTATION),
      **_fields(preprocessing.EvalPreprocessing, 'eval_', None),
      **_DATA_ORDER,
    },
    'run.': _RUN,
  }
  return {
    section + name: setting
    for section, table in sections.items()
    for name, setting in table.items()
  }


def _model_settings(models: Sequence[str]) -> dict[str, Setting]:
  """Return the name and the options of all families."""
  table = {'name': Setting('nfnet_f0', 'Name of the model.')}
  for model in models:
    for name, option in registry.get_model_spec(model).options.items():
      table.setdefault(
        name,
        Setting(
          _RECIPE_MODEL.get(name),
          option.description,
          _MODEL_INTERVALS.get(name),
          type=option.type,
        ),
      )
  return table


def _fields(
  kind: type, prefix: str, values: Mapping[str, Any] | None
) -> dict[str, Setting]:
  """Return the fields of a dataclass as settings.

  Args:
    kind: the dataclass; see `preprocessing.option`.
    prefix: of the settings' names.
    values: defaults that differ from the fields'; None if all defaults depend
      on the model.
  """
  types = typing.get_type_hints(kind)
  table = {}
  for field in dataclasses.fields(kind):
    default = None if values is None else values.get(field.name, field.default)
    table[prefix + field.name] = Setting(
      default, **field.metadata, type=types[field.name]
    )
  return table


def read_fields(
  kind: type[T], section: ml_collections.ConfigDict, prefix: str = ''
) -> T:
  """Return the dataclass whose fields are settings of a section.

  Examples:
    >>> data = get_config().data
    >>> read_fields(preprocessing.Augmentation, data).mixup
    True
  """
  names = [field.name for field in dataclasses.fields(kind)]
  return kind(**{name: section[prefix + name] for name in names})


def get_config() -> ml_collections.ConfigDict:
  """Return the published ImageNet settings.

  Source: arXiv 2102.06171, appendix A.
  """
  config: dict[str, Any] = {}
  for name, setting in settings().items():
    *sections, last = name.split('.')
    place = config
    for section in sections:
      place = place.setdefault(section, {})
    default = setting.default
    if default is None:
      default = config_dict.placeholder(setting.type)
    place[last] = default
  return ml_collections.ConfigDict(config).lock()


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return the values of a configuration by their dotted names."""
  return _flat(config.to_dict())


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  values: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      values |= _flat(value, f'{prefix}{key}.')
    else:
      values[prefix + key] = value
  return values
