"""Checkpoints that a power cut does not take back.

Orbax writes a checkpoint into a temporary folder, renames that, and then removes older checkpoints. The system decides when
any of this reaches the disk. Here the content is on the disk before the folder gets its name, and the name before anything
older is removed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from orbax.checkpoint.path import atomicity

from kronmesh import files

_UNFINISHED = '.orbax-checkpoint-tmp'
_ROWS = ('metrics.jsonl', 'events.jsonl', 'layers.jsonl')


class TemporaryFolder(atomicity.AtomicRenameTemporaryPath):
  """The folder in which Orbax writes a checkpoint, synced to the disk before and after it gets its name."""

  async def finalize(self) -> None:
    if _UNFINISHED in str(self.get_final()):  # a part of a checkpoint, which is synced as a whole
      return await super().finalize()
    await asyncio.to_thread(files.sync_tree, self.get())
    await super().finalize()  # which adds two small files before the rename
    await asyncio.to_thread(files.sync_tree, self.get_final())
    await asyncio.to_thread(files.sync_folder, self.get_final().parent)


def sync_rows(workdir: Path) -> None:
  """Waits until what a run has measured so far is on the disk: a run that goes on from a checkpoint keeps those rows."""
  for name in _ROWS:
    files.sync_file(workdir / name)
  files.sync_folder(workdir)
