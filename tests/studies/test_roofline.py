"""What the roofline of a GPU's step counts."""

import pytest

from experiments.gpu_step import roofline
from nfnet_jax.planning import hlo

# Of a step on an H100, shortened. The convolution is 3 x 3 with stride 2 and
# two groups, from 8 to 16 channels.
PROGRAM = hlo.parse("""HloModule step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (a: bf16[4,6,8], b: bf16[8,10]) -> f32[4,6] {
  %a = bf16[4,6,8]{2,1,0} parameter(0)
  %b = bf16[8,10]{1,0} parameter(1)
  %dot = f32[4,6,10]{2,1,0} dot(%a, %b), lhs_contracting_dims={2}, rhs_contracting_dims={0}
  %zero = f32[] constant(0)
  %tanh = f32[4,6,10]{2,1,0} tanh(%dot)
  ROOT %reduce = f32[4,6]{1,0} reduce(%tanh, %zero), dimensions={2}, to_apply=%add
}

ENTRY %main (images: bf16[2,12,12,8], kernel: bf16[16,3,3,4], output: bf16[2,6,6,16], a: bf16[4,6,8], b: bf16[8,10]) -> f32[4,6] {
  %images = bf16[2,12,12,8]{3,2,1,0} parameter(0)
  %kernel = bf16[16,3,3,4]{3,2,1,0} parameter(1)
  %output = bf16[2,6,6,16]{3,2,1,0} parameter(2)
  %a.1 = bf16[4,6,8]{2,1,0} parameter(3)
  %b.1 = bf16[8,10]{1,0} parameter(4)
  %forward = (bf16[2,6,6,16]{3,2,1,0}, u8[131]{0}) custom-call(%images, %kernel), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %by_input = (bf16[2,12,12,8]{3,2,1,0}, u8[99]{0}) custom-call(%output, %kernel), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %by_kernel = (bf16[16,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%images, %output), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %fusion = f32[4,6]{1,0} fusion(%a.1, %b.1), kind=kCustom, calls=%fused
}
""")  # noqa: E501
OPS = {
  name: op
  for computation in PROGRAM.computations.values()
  for name, op in computation.ops.items()
}
IMAGES, KERNEL, OUTPUT = 2 * 12 * 12 * 8, 16 * 3 * 3 * 4, 2 * 6 * 6 * 16


@pytest.mark.parametrize('name', ['forward', 'by_input', 'by_kernel'])
def test_convolution_and_its_gradients_cost_the_same(name):
  # Each of 16 channels of 2 x 6 x 6 positions multiplies 3 x 3 x 4 values.
  operations = roofline.count_operations(PROGRAM, OPS, OPS[name])
  assert operations == 2 * OUTPUT * 3 * 3 * 4
  assert roofline.count_bytes(OPS, OPS[name]) == 2 * (IMAGES + KERNEL + OUTPUT)


def test_fused_operations_are_counted():
  fusion = OPS['fusion']
  product, elements = 2 * 4 * 6 * 8 * 10, 4 * 6 * 10
  operations = roofline.count_operations(PROGRAM, OPS, fusion)
  assert operations == product + 2 * elements  # tanh and the sum.
  moved = roofline.count_bytes(OPS, fusion)
  assert moved == 2 * (4 * 6 * 8 + 8 * 10) + 4 * 4 * 6


def test_least_time_is_the_larger_one():
  rates = {'tflops': 100, 'tbytes': 2}
  assert roofline.least_ms(1e12, 1e9, True, **rates) == 10
  assert roofline.least_ms(1e10, 1e9, True, **rates) == 0.5
  assert roofline.least_ms(1e12, 1e9, False, **rates) == 0.5
