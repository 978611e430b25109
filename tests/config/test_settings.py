import pathlib

import pytest

from nfnet_jax import errors
from nfnet_jax.config import base, lookup, settings, steps, validate

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'settings.md'


def test_the_page_of_settings_is_current():
  assert PAGE.read_text() == settings.format_page(), (
    'run: python -m nfnet_jax.config.settings > docs/settings.md'
  )


def test_every_setting_has_a_description():
  for name, setting in base.settings().items():
    assert setting.description.endswith('.'), name
    assert len(setting.description) < 120, name


def test_print_config_tells_where_values_come_from():
  overrides = {'optimizer.weight_decay': 1e-4}
  resolved = steps.prepare_config(lookup.load('digits', overrides))
  origins = settings.sources(
    base.get_config(), lookup.load('digits'), overrides, resolved
  )
  assert origins['optimizer.weight_decay'] == 'command line'
  assert origins['batch_size'] == 'config'
  assert origins['seed'] == 'default'
  assert origins['data.image_size'] == 'derived'
  lines = settings.format_config(resolved, origins).splitlines()
  (line,) = [line for line in lines if line.startswith('batch_size ')]
  assert line.split()[:3] == ['batch_size', '64', 'config']


@pytest.mark.parametrize(
  ('interval', 'inside', 'outside'),
  [
    ('[0, 1)', (0, 0.5), (1, -0.1)),
    ('(0, 1]', (1, 0.5), (0, 1.1)),
    ('[1, inf)', (1, 1e9), (0,)),
  ],
)
def test_intervals(interval, inside, outside):
  assert all(validate.in_interval(value, interval) for value in inside)
  outside = (*outside, float('nan'))
  assert not any(validate.in_interval(value, interval) for value in outside)


@pytest.mark.parametrize('name', ['f3', 'f0_plus', 'f5_sam'])
def test_a_config_of_the_table_has_its_name(name):
  model = f'nfnet_{name.removesuffix("_sam")}'
  assert lookup.load(name).model.name == model


def test_a_config_of_the_table_takes_no_argument():
  with pytest.raises(errors.InputError, match='takes no argument'):
    lookup.find('f3:x')
