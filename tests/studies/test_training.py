import dataclasses

import pytest

from experiments.studies import training
from nfnet_jax import errors

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


def test_eps_defines_the_run():
  other = dataclasses.replace(RUN, eps=0.1)
  assert other.key != RUN.key
  assert other.program != RUN.program


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
