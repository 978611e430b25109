import pytest

from nfnet_jax.config import base, durations


@pytest.mark.parametrize(
  ('duration', 'steps'),
  [
    ('100 steps', 100),
    ('1 step', 1),
    ('5 epochs', 5 * 1_281_167 / 4096),
    ('0.5 epoch', 0.5 * 1_281_167 / 4096),
    ('8192 examples', 2),
    ('1e6 examples', 1e6 / 4096),
  ],
)
def test_durations(duration, steps):
  units = durations.Units(batch_size=4096, examples=1_281_167)
  assert units.steps(duration) == pytest.approx(steps)


@pytest.mark.parametrize('bad', ['', '5', 'epochs', '-1 steps', '1.2.3 steps'])
def test_other_durations_are_refused(bad):
  with pytest.raises(ValueError, match='is not a duration'):
    durations.Units(8, 8).steps(bad)


def test_infinite_durations_are_refused():
  with pytest.raises(ValueError, match="'1e400 epochs' is too long"):
    durations.Units(8, 8).steps('1e400 epochs')


def test_published_number_of_steps():
  units = durations.Units(batch_size=4096, examples=1_281_167)
  assert int(units.steps(base.get_config().train_for)) == 112_602
