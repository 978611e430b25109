"""When collectives run, and how much of them computation hides."""

import pytest

from nfnet_jax.planning import costs, hlo, overlap

CYCLES = 'backend_config={"estimated_cycles":"%d"}'
NAME = 'metadata={op_name="a/%s"}'
GROUP = 'replica_groups={{0,1,2,3}}'
# %late and %early are summed together, once both are known; only %end needs
# the sum. Four devices send 1.5 bytes per byte.
COMBINED = f"""ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  %early = f32[100]{{0}} copy(%x), {CYCLES % 1000}, {NAME % 'early'}
  %late = f32[50]{{0}} copy(%early), {CYCLES % 1000}, {NAME % 'late'}
  %sum = (f32[100]{{0}}, f32[50]{{0}}) all-reduce(%early, %late), {GROUP}
  %rest = f32[100]{{0}} copy(%x), {CYCLES % 2000}
  %first = f32[100]{{0}} get-tuple-element(%sum), index=0
  %second = f32[50]{{0}} get-tuple-element(%sum), index=1
  ROOT %end = f32[100]{{0}} copy(%first, %second, %rest), {CYCLES % 500}
}}"""
ASYNC = f"""ENTRY %main (x: f32[100]) -> f32[100] {{
  %x = f32[100]{{0}} parameter(0)
  %given = f32[100]{{0}} copy(%x), {CYCLES % 1000}
  %start = f32[100]{{0}} all-reduce-start(%given), {GROUP}
  %rest = f32[100]{{0}} copy(%x), {CYCLES % 500}
  %done = f32[100]{{0}} all-reduce-done(%start)
  %last = f32[100]{{0}} copy(%x), {CYCLES % 300}
  ROOT %end = f32[100]{{0}} copy(%done, %last, %rest), {CYCLES % 200}
}}"""


# As on TPU v5e: %begin and %end compute beside the collective.
FUSED = f"""%one (p: f32[25], q: f32[9]) -> f32[9] {{
  %p = f32[25]{{0}} parameter(1)
  %q = f32[9]{{0}} parameter(0)
  %gather = f32[100]{{0}} all-gather(%p), {GROUP}, attributes={{chain_id="7"}}
  ROOT %call = f32[9]{{0}} custom-call(%gather), target="AsyncCollectiveStart"
}}

%two (r: f32[9]) -> f32[100] {{
  %r = f32[25]{{0}} parameter(0)
  %again = f32[100]{{0}} all-gather(%r), {GROUP}, attributes={{chain_id="7"}}
  ROOT %call.1 = f32[100]{{0}} custom-call(%again), target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[25]) -> f32[100] {{
  %x = f32[25]{{0}} parameter(0)
  %own = f32[9]{{0}} copy(%x), {CYCLES % 100}
  %begin = f32[9]{{0}} fusion(%own, %x), calls=%one, {CYCLES % 1000}
  %end = f32[100]{{0}} fusion(%begin), calls=%two, {CYCLES % 500}
  ROOT %last = f32[100]{{0}} copy(%end), {CYCLES % 10}
}}"""


# As on TPU7x.
OFFLOADED = f"""%called (p: f32[25]) -> f32[100] {{
  %p = f32[25]{{0}} parameter(0)
  ROOT %gather = f32[100]{{0}} all-gather(%p), {GROUP}
}}, execution_thread="sparsecore"

ENTRY %main (x: f32[25]) -> f32[100] {{
  %x = f32[25]{{0}} parameter(0)
  %ready = token[] custom-call()
  %own = f32[25]{{0}} copy(%x), {CYCLES % 100}
  %start = (f32[25]{{0}}, f32[9]) call-start(%own, %ready), to_apply=%called
  %rest = f32[9]{{0}} copy(%x), {CYCLES % 1000}
  %done = f32[100]{{0}} call-done(%start)
  ROOT %last = f32[100]{{0}} copy(%done, %rest), {CYCLES % 10}
}}"""

# A sum of which each device keeps a part.
SCATTERED = f"""%all-reduce-scatter.1 (q: f32[90], p: f32[90]) -> f32[25] {{
  %q = f32[90]{{0}} parameter(0)
  %p = f32[90]{{0}} parameter(1)
  %pad = f32[100]{{0}} pad(%p), padding=0_10
  %sum = f32[100]{{0}} all-reduce(%pad), {GROUP}
  ROOT %part = f32[25]{{0}} dynamic-slice(%sum)
}}

ENTRY %main (x: f32[90]) -> f32[25] {{
  %x = f32[90]{{0}} parameter(0)
  %own = f32[90]{{0}} copy(%x), {CYCLES % 100}
  ROOT %part.1 = f32[25]{{0}} fusion(%x, %own), calls=%all-reduce-scatter.1
}}"""


def test_transfers_of_an_offloaded_collective():
  found = overlap.read(OFFLOADED, devices=4)
  assert found.cycles == 1110
  assert found.scheduled == (overlap.Transfer('', 100, 1100, 300.0),)
  (gathered,) = costs.collectives(hlo.parse(OFFLOADED), devices=4)
  assert gathered == costs.Collective('all-gather', 1, 400, 300.0)


def test_transfers_of_a_sum_of_which_each_device_keeps_a_part():
  found = overlap.read(SCATTERED, devices=4)
  assert found.scheduled == (overlap.Transfer('', 100, 100, 270.0),)
  (summed,) = costs.collectives(hlo.parse(SCATTERED), devices=4)
  assert summed == costs.Collective('reduce-scatter', 1, 400, 300.0)


def test_transfers_of_a_collective_inside_fusions():
  found = overlap.read(FUSED, devices=4)
  assert found.scheduled == (overlap.Transfer('', 100, 1100, 300.0),)
  assert found.possible == (overlap.Transfer('', 0, 1600, 300.0),)
  (summed,) = costs.collectives(hlo.parse(FUSED), devices=4)
  assert summed == costs.Collective('all-gather', 1, 400, 300.0)


def test_transfers_of_a_synchronous_collective():
  found = overlap.read(COMBINED, devices=4)
  assert found.cycles == 4500
  assert found.scheduled == (overlap.Transfer('', 2000, 2000, 900.0),)
  assert found.possible == (
    overlap.Transfer('a/early', 1000, 4000, 600.0),
    overlap.Transfer('a/late', 2000, 4000, 300.0),
  )
  assert overlap.waiting(found.scheduled, 2) == 1800
  assert overlap.waiting(found.possible, 2) == 0
  # At 4 cycles per byte: from 1000 to 3400, then to 4600.
  assert overlap.waiting(found.possible, 4) == 600


def test_transfers_of_an_asynchronous_collective():
  found = overlap.read(ASYNC, devices=4)
  assert found.scheduled == (overlap.Transfer('', 1000, 1500, 600.0),)
  assert found.possible == (overlap.Transfer('', 1000, 1800, 600.0),)
  assert overlap.waiting(found.scheduled, 1) == 100


@pytest.mark.parametrize(
  ('transfers', 'expected'),
  [
    ([], 0),
    # The second waits for the link, and the first has delayed the step.
    ([(0, 10, 20), (5, 30, 20)], 10),
    ([(0, 10, 20), (5, 20, 20)], 20),
    ([(0, 0, 20), (20, 20, 5)], 25),
  ],
)
def test_links_send_one_transfer_at_a_time(transfers, expected):
  made = [overlap.Transfer('', *each) for each in transfers]
  assert overlap.waiting(made, 1) == expected
  assert overlap.waiting(reversed(made), 1) == expected
