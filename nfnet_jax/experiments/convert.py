r"""Write a trained network to a file that other programs read.

  python -m nfnet_jax.experiments.convert --weights=runs/digits \
    --to=digits.safetensors

The ending chooses plain .npz (flat names, no pickle) or .safetensors, with the
published names under `params/` and `state/`. `--layout=timm` gives an NFNet the
names and layouts of timm, for

  timm.create_model('dm_nfnet_f0', checkpoint_path='F0.safetensors')
"""

from __future__ import annotations

from absl import flags

from nfnet_jax import errors
from nfnet_jax.cli import command, common_flags

for _name in ('weights', 'timm_forward', 'size', 'to'):
  flags.declare_key_flag(_name)
_LAYOUT = flags.DEFINE_enum(
  'layout', 'haiku', ['haiku', 'timm'], 'Names and layouts of the arrays.'
)


def main() -> None:
  """Write `--weights` to the file `--to`."""
  from nfnet_jax.models import complexity
  from nfnet_jax.weights import save

  to = common_flags.get_to()
  weights = common_flags.get_weights()
  with errors.as_input_error((ValueError, OSError)):
    save.save_weights(to, weights, _LAYOUT.value)
  count = complexity.count_parameters(weights.params)
  print(f'{to}: {weights.model}, {count:,} parameters')


if __name__ == '__main__':
  command.run(main)
