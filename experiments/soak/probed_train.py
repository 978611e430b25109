"""The command `train`, which also reports the memory that its program holds.

The file `HELD` has one line, which is replaced several times per second: the
bytes that are allocated, of which glibc keeps some for each thread, and the
number of memory blocks of Python objects.
"""

import ctypes
import os
import pathlib
import sys
import threading
import time
from xml.etree import ElementTree

from nfnet_jax.cli import command
from nfnet_jax.experiments import train

INTERVAL_S = 0.2


def allocated_bytes() -> int:
  """Return the bytes that glibc's `malloc` holds for the program."""
  libc = ctypes.CDLL(None)
  libc.open_memstream.restype = ctypes.c_void_p
  text, size = ctypes.c_char_p(), ctypes.c_size_t()
  stream = ctypes.c_void_p(
    libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
  )
  libc.malloc_info(0, stream)
  libc.fclose(stream)
  root = ElementTree.fromstring(text.value)
  libc.free(text)
  # The totals of all arenas; those of each arena lie one level deeper.
  sizes = {
    (node.tag, node.get('type')): int(node.get('size'))
    for node in root
    if node.tag in ('total', 'system')
  }
  free = sizes['total', 'fast'] + sizes['total', 'rest']
  return sizes['system', 'current'] - free + sizes['total', 'mmap']


def report(path: pathlib.Path) -> None:
  """Write what the program holds, again and again."""
  new = path.with_suffix('.new')
  while True:
    new.write_text(f'{allocated_bytes()} {sys.getallocatedblocks()}')
    new.replace(path)
    time.sleep(INTERVAL_S)


if __name__ == '__main__':
  held = pathlib.Path(os.environ['HELD'])
  threading.Thread(target=report, args=[held], daemon=True).start()
  command.run(train.main)
