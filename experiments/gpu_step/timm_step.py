"""Time a training step of one of timm's networks on a GPU; print JSON.

  python experiments/gpu_step/timm_step.py dm_nfnet_f0 192 64

Eager PyTorch with bfloat16 autocast, channels-last, cuDNN's benchmark mode.
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

  def __init__(self, name: str, size: int, batch: int, full: bool):
    self.full = full
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.25, drop_rate=0.2)
    self.model = model.cuda().to(memory_format=torch.channels_last).train()
    self.ema = utils.ModelEmaV3(self.model, decay=0.99999) if full else None
    self.optimizer = torch.optim.SGD(
      self.model.parameters(),
      lr=1e-4,
      momentum=0.9,
      nesterov=True,
      weight_decay=2e-5,
    )
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    self.images = images.cuda().to(memory_format=torch.channels_last)
    self.targets = torch.rand(batch, 1000).softmax(1).cuda()
    self.mean = torch.tensor([123.7, 116.3, 103.5]).cuda()[:, None, None]
    self.std = torch.tensor([58.4, 57.1, 57.4]).cuda()[:, None, None]

  def __call__(self) -> None:
    images = (self.images.float() - self.mean) / self.std
    with torch.autocast('cuda', torch.bfloat16):
      logits = self.model(images)
      loss = torch.nn.functional.cross_entropy(logits, self.targets)
    self.optimizer.zero_grad()
    loss.backward()
    if self.full:
      utils.adaptive_clip_grad(self.model.parameters(), 0.01)
    self.optimizer.step()
    if self.full:
      self.ema.update(self.model)


def measure(step: Step) -> dict:
  """Return the median seconds per step and the peak memory."""
  torch.cuda.reset_peak_memory_stats()
  for _ in range(6):
    step()
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
    'steps': WINDOW * ROUNDS,
    'note': f'timm {timm.__version__}, torch {torch.__version__}',
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name')
  parser.add_argument('pixels', type=int)
  parser.add_argument('batch', type=int)
  args = parser.parse_args()
  torch.backends.cudnn.benchmark = True
  results = {}
  for form, full in {'eager': True, 'eager, no AGC or EMA': False}.items():
    step = Step(args.name, args.pixels, args.batch, full)
    results[form] = measure(step)
    del step
    torch.cuda.empty_cache()
  print(json.dumps(results))


if __name__ == '__main__':
  main()
