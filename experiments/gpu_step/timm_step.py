"""Time training steps of one of timm's networks on a GPU; print JSON lines.

  python experiments/gpu_step/timm_step.py nfnet_f0 192 64 --forms eager

PyTorch with bfloat16 autocast and cuDNN's benchmark mode. A form is `eager` or
`compiled`; `channels-last` and `bare`, without AGC and EMA, may follow.
"""

import argparse
import json
import statistics
import time

import timm
from timm import utils
import torch

WINDOW, ROUNDS = 4, 12


class Step:
  """A step of timm's training script, on images that are on the device."""

  def __init__(self, name: str, size: int, batch: int, form: str):
    self.bare = 'bare' in form
    torch.manual_seed(0)
    layout = torch.contiguous_format
    if 'channels-last' in form:
      layout = torch.channels_last
    drop_path = {'drop_path_rate': 0.25} if 'nfnet' in name else {}
    model = timm.create_model(name, drop_rate=0.2, **drop_path)
    self.model = model.cuda().to(memory_format=layout).train()
    self.forward = self.model
    if 'compiled' in form:
      self.forward = torch.compile(self.model, dynamic=False)
    self.ema = None if self.bare else utils.ModelEmaV3(self.model, 0.99999)
    self.optimizer = torch.optim.SGD(
      self.model.parameters(),
      lr=1e-4,
      momentum=0.9,
      nesterov=True,
      weight_decay=2e-5,
    )
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    self.images = images.cuda().to(memory_format=layout)
    self.targets = torch.rand(batch, 1000).softmax(1).cuda()
    self.mean = torch.tensor([123.7, 116.3, 103.5]).cuda()[:, None, None]
    self.std = torch.tensor([58.4, 57.1, 57.4]).cuda()[:, None, None]

  def __call__(self) -> None:
    images = (self.images.float() - self.mean) / self.std
    with torch.autocast('cuda', torch.bfloat16):
      logits = self.forward(images)
      loss = torch.nn.functional.cross_entropy(logits, self.targets)
    self.optimizer.zero_grad()
    loss.backward()
    if not self.bare:
      utils.adaptive_clip_grad(self.model.parameters(), 0.01)
    self.optimizer.step()
    if not self.bare:
      self.ema.update(self.model)


def measure(step: Step) -> dict:
  """Return the median seconds per step, the peak memory, and start-up."""
  torch.cuda.reset_peak_memory_stats()
  start = time.perf_counter()
  for _ in range(6):
    step()
  torch.cuda.synchronize()
  first = time.perf_counter() - start
  times = []
  for _ in range(ROUNDS):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(WINDOW):
      step()
    torch.cuda.synchronize()
    times.append((time.perf_counter() - start) / WINDOW)
  return {
    'seconds': statistics.median(times),
    'memory_gib': f'{torch.cuda.max_memory_allocated() / 2**30:.2f}',
    'compile_s': f'{first:.0f}',
    'steps': WINDOW * ROUNDS,
    'note': f'timm {timm.__version__}, torch {torch.__version__}',
  }


def timm_name(model: str) -> str:
  """Return timm's name of a model: its `nfnet_f0` is another network."""
  model = f'dm_{model}' if model.startswith('nfnet_f') else model
  return model.removeprefix('bn_')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('model')
  parser.add_argument('pixels', type=int)
  parser.add_argument('batch', type=int)
  parser.add_argument('--forms', nargs='+', default=['eager'])
  args = parser.parse_args()
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision('high')
  for form in args.forms:
    step = Step(timm_name(args.model), args.pixels, args.batch, form)
    print(json.dumps(measure(step)), flush=True)
    del step
    torch.compiler.reset()
    torch.cuda.empty_cache()


if __name__ == '__main__':
  main()
