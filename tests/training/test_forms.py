from nfnet_jax.training import forms


def test_what_is_said_of_a_step():
  plain = {'accumulate': 1, 'remat': False, **dict.fromkeys(forms.NAMES, False)}
  assert forms.savings(plain) == forms.names(plain) == []
  assert forms.savings(plain | {'accumulate': 2}) == ['in 2 parts']
  assert forms.savings(plain | {'remat': True}) == ['blocks computed again']
  fast = plain | {'fast_stem': True, 'shard_update': True}
  assert forms.names(fast) == ['fast stem', 'sharded update']
