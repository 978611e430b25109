"""Use AGC, a model, its weights and predictions where no extra is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nfnet_jax

assert importlib.util.find_spec('tensorflow') is None
model = nfnet_jax.create_model('nfnet_pico', num_classes=10)
images = jnp.zeros((1, 32, 32, 3))
params, state = model.init(jax.random.key(0), images, False)
optimizer = optax.chain(nfnet_jax.agc(0.01), optax.sgd(0.1))
gradients = jax.tree.map(jnp.ones_like, params)
updates, _ = optimizer.update(gradients, optimizer.init(params), params)
assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
path = 'weights.npz'
np.savez(
  path,
  **{
    f'{m}/{n}': leaf
    for m, leaves in params.items()
    for n, leaf in leaves.items()
  },
)
(guesses,) = nfnet_jax.predict(path, np.full((40, 60, 3), 128, np.uint8))
assert len(guesses) == 5
print('Works without extras.')
