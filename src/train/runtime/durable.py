"""Checkpoints that survive a power cut.

Orbax writes a checkpoint into a temporary folder, renames the folder, and then removes older checkpoints. The operating
system decides when each of these reaches the disk. This module syncs the content to the disk before the folder is
renamed, and syncs the new name before any older checkpoint is removed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from orbax.checkpoint.path import atomicity

from ... import files

_UNFINISHED = '.orbax-checkpoint-tmp'
_ROWS = ('metrics.jsonl', 'events.jsonl', 'layers.jsonl')


class TemporaryFolder(atomicity.AtomicRenameTemporaryPath):
  """The folder into which Orbax writes a checkpoint, synced to the disk before and after its rename."""

  async def finalize(self) -> None:
    if _UNFINISHED in str(self.get_final()):  # a part; the checkpoint is synced as a whole
      return await super().finalize()
    await asyncio.to_thread(files.sync_tree, self.get())
    await super().finalize()  # adds two small files before the rename
    await asyncio.to_thread(files.sync_tree, self.get_final())
    await asyncio.to_thread(files.sync_folder, self.get_final().parent)


def sync_rows(workdir: Path) -> None:
  """Waits until the rows that a run has logged so far are on the disk.

  A run that resumes from a checkpoint keeps these rows.
  """
  for name in _ROWS:
    files.sync_file(workdir / name)
  files.sync_folder(workdir)
