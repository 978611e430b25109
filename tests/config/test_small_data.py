"""Settings that follow from the dataset, and held-out shares."""

import pytest

from nfnet_jax import errors
from nfnet_jax.config import durations, resolve, small_data, steps, validate
from nfnet_jax.experiments.configs import digits, finetune


class Dataset:
  """A dataset of one size."""

  num_classes = 3

  def __init__(self, examples, *splits):
    self.examples, self.splits = examples, splits

  def num_examples(self, split):
    part = 0.8 if split == 'train[20%:]' else 1
    return int(self.examples * part)


def small(examples, *splits, **settings):
  config = finetune.get_config('small')
  config.dataset = 'photos'
  config.model.name = 'nfnet_pico'
  config.update_from_flattened_dict(settings)
  return steps.prepare_config(config, dataset=Dataset(examples, *splits))


@pytest.mark.parametrize('examples', [60, 300, 1000, 3000, 20_000])
def test_batches_and_length_fit_the_number_of_images(examples):
  config = small(examples, 'train', 'validation')
  units = durations.Units(config.batch_size, examples)
  validate.check_run(config, units)
  assert config.batch_size in (16, 32, 64)
  assert config.batch_size == 16 or units.steps('1 epoch') >= 30
  epochs = units.steps(config.train_for) / units.steps('1 epoch')
  assert 10 <= round(epochs) <= 50
  # The average is over a part of the run.
  assert 1 / (1 - config.ema_decay) < units.steps(config.train_for) / 5


def test_given_values_hold():
  config = small(
    1000,
    'train',
    'test',
    **{
      'batch_size': 8,
      'train_for': '40 steps',
      'ema_decay': 0.5,
      'data.eval_split': '30%',
    },
  )
  assert (config.batch_size, config.train_for) == (8, '40 steps')
  assert config.ema_decay == 0.5
  assert config.data.eval_split == 'train[:30%]'


@pytest.mark.parametrize(
  ('splits', 'expected'),
  [
    (['train', 'validation', 'test'], ('train', 'validation')),
    (['test', 'train'], ('train', 'test')),
    (['train', 'val'], ('train', 'val')),
    (['train'], ('train[20%:]', 'train[:20%]')),
  ],
)
def test_a_part_is_held_out_if_there_is_no_split_to_evaluate_on(
  splits, expected
):
  data = small(1000, *splits).data
  assert (data.train_split, data.eval_split) == expected


def test_the_size_is_that_of_the_part_to_train_on():
  assert (
    small(2000, 'train').batch_size == small(1600, 'train', 'val').batch_size
  )
  assert small(1000, 'train').batch_size == 16
  assert small(1000, 'train', 'val').batch_size == 32


def test_a_resolved_config_resolves_to_itself():
  config = small(1000, 'train')
  assert small_data.is_complete(config)
  again = resolve.resolve(config, 'cpu', 8)
  assert again.to_dict() == config.to_dict()


def held_out(train, evaluation):
  config = digits.get_config()
  config.data.train_split, config.data.eval_split = train, evaluation
  data = steps.prepare_config(config).data
  return data.train_split, data.eval_split


def test_a_share_is_held_out():
  assert held_out('train', '10%') == ('train[10%:]', 'train[:10%]')
  assert held_out('test', '99%') == ('test[99%:]', 'test[:99%]')
  assert held_out('train', 'train[:5%]') == ('train', 'train[:5%]')


@pytest.mark.parametrize(
  ('train', 'evaluation', 'message'),
  [
    ('train[:50%]', '10%', 'from a whole split'),
    ('train+test', '10%', 'from a whole split'),
    *(('train', share, 'not a share') for share in ('0%', '100%', '5.5%', '%')),
  ],
)
def test_shares_that_cannot_be_held_out(train, evaluation, message):
  with pytest.raises(errors.InputError, match=message):
    held_out(train, evaluation)
