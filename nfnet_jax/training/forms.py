"""What the forms of a step are called."""

from collections.abc import Mapping

# Setting of a faster form -> its name.
NAMES = {
  'fast_stem': 'fast stem',
  'fused_blocks': 'fused blocks',
  'fast_convs': 'fast convolutions',
  'shard_update': 'sharded update',
}


def savings(settings: Mapping[str, object]) -> list[str]:
  """Says how a step saves memory, by its `accumulate` and `remat`."""
  said = {
    f'in {settings["accumulate"]} parts': settings['accumulate'] > 1,
    'blocks computed again': settings['remat'],
  }
  return [saving for saving, chosen in said.items() if chosen]


def names(settings: Mapping[str, object]) -> list[str]:
  """Names the faster forms that a step takes."""
  return [name for form, name in NAMES.items() if settings[form]]
