"""Times F0's plain form and its fused blocks side by side on a CPU.

Prints a table; takes three minutes on two cores:

  JAX_PLATFORMS=cpu python experiments/fast_step/cpu.py
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

import nfnet_jax

FORMS = {'plain': {}, 'fused blocks': {'fused_blocks': True}}


def make_gradient(
  name: str, options: dict, params: dict, images: jax.Array, labels: jax.Array
):
  """Compiles the gradient of the cross-entropy, as a call without arguments."""
  model = nfnet_jax.create(name, **options)

  def loss(params):
    key = jax.random.key(1)
    logits = model.apply(params, {}, key, images, True)[0]
    scores = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], 1))

  gradient = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
  return lambda: jax.block_until_ready(gradient(params))


def measure(name: str, batch: int, size: int, rounds: int) -> dict:
  """Returns seconds of each round by form; rounds take the forms in turn."""
  model = nfnet_jax.create(name)
  images = jax.random.normal(jax.random.key(2), (batch, size, size, 3))
  labels = jnp.arange(batch)
  params, _ = jax.jit(lambda key: model.init(key, images, False))(
    jax.random.key(0)
  )
  calls = {
    form: make_gradient(name, options, params, images, labels)
    for form, options in FORMS.items()
  }
  for call in calls.values():
    call()
  seconds = {form: [] for form in FORMS}
  for _ in range(rounds):
    for form, call in calls.items():
      start = time.perf_counter()
      call()
      seconds[form].append(time.perf_counter() - start)
  return seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='nfnet_f0')
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--size', type=int, default=192)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  seconds = measure(args.model, args.batch, args.size, args.rounds)
  print('| form | seconds | of plain (least to most) |')
  print('| --- | ---: | ---: |')
  for form, times in seconds.items():
    ratios = [here / plain for here, plain in zip(times, seconds['plain'])]
    print(
      f'| {form} | {statistics.median(times):.2f} | '
      f'{statistics.median(ratios):.3f} '
      f'({min(ratios):.3f} to {max(ratios):.3f}) |'
    )


if __name__ == '__main__':
  main()
