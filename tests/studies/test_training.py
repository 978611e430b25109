import dataclasses

import pytest

from experiments.studies import training
from nfnet_jax import errors
from nfnet_jax.optim import groups

RUN = training.Run(
  labels={},
  config='digits',
  settings={
    'dataset': 'digits',
    'model.name': 'nf_resnet_pico',
    'data.image_size': 16,
    'data.eval_size': 16,
    'batch_size': 16,
    'train_for': '6 steps',
    'optimizer.warmup': '1 steps',
    'optimizer.clipping': 0.01,
  },
)


@pytest.mark.parametrize(
  ('path', 'clip'),
  [
    ('NFNet/~/nf_block_1/~/conv0/w', True),
    ('NFNet/~/linear/w', True),
    ('NFNet/~/linear/b', False),
    ('NFNet/~/nf_block_1/skip_gain', False),
  ],
)
def test_only_matching_parameters_are_clipped(path, clip):
  chosen = groups.group_of(path, training.clip_only('conv0/|linear/w'))
  assert chosen.clip == clip
  assert chosen.decay == groups.group_of(path).decay


def test_options_of_the_optimizer_define_the_run():
  other = [
    dataclasses.replace(RUN, eps=0.1),
    dataclasses.replace(RUN, clipped='conv0'),
  ]
  assert len({run.key for run in (RUN, *other)}) == 3
  assert len({run.program for run in (RUN, *other)}) == 3


@pytest.mark.slow
def test_run_starts_from_saved_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(
    training.datasets, 'weights', lambda name: tmp_path / 'new' / f'{name}.npz'
  )
  settings = {**RUN.settings, 'optimizer.clipping': 0.0}
  settings['optimizer.learning_rate'] = 1.0
  first = dataclasses.replace(RUN, settings=settings, save=True)
  ((row, _),) = training.train_together([first])
  assert row['skip_gain'] > 0  # It has left its initial weights.
  second = dataclasses.replace(
    RUN,
    settings={
      **RUN.settings,
      'model.name': None,
      'optimizer.learning_rate': 0.0,
      'weights': first.key,
    },
  )
  ((same, _),) = training.train_together([second])
  assert same['top1'] == row['top1']
  assert same['skip_gain'] == row['skip_gain']
  lost = dataclasses.replace(
    second, settings={**second.settings, 'weights': 'lost'}
  )
  with pytest.raises(errors.InputError, match='lost'):
    training.train_together([lost])
