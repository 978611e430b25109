"""Figures are written atomically."""

import pytest

from nfnet_jax import plotting


def test_figure_that_cannot_be_written_leaves_the_old_one(tmp_path):
  figure, axis = plotting.subplots()
  axis.plot([1, 2])
  plotting.save(figure, tmp_path / 'a.png')
  whole = (tmp_path / 'a.png').read_bytes()
  assert whole.startswith(b'\x89PNG')
  figure, _ = plotting.subplots()

  def fail(path, **options):
    path.write_bytes(b'half')
    raise OSError('disk full')

  figure.savefig = fail
  with pytest.raises(OSError, match='disk full'):
    plotting.save(figure, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').read_bytes() == whole
  assert [path.name for path in tmp_path.iterdir()] == ['a.png']
