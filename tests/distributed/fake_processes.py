"""A process group with a fake key-value store, without other processes."""

from nfnet_jax.distributed import processes


class Client:
  """A key-value store like JAX's, in this process."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def blocking_key_value_get(self, key, timeout_in_ms):
    assert timeout_in_ms > 0
    return self.values[key]

  def key_value_dir_get(self, prefix):
    return [
      (key, value)
      for key, value in self.values.items()
      if key.startswith(f'{prefix}/')
    ]


def join(monkeypatch, index, count=2, client=None):
  """Make this process number `index` of `count` during a test."""
  process_group = processes.ProcessGroup(client or Client(), index, count)
  monkeypatch.setattr(processes, '_process_group', process_group)
  return process_group
