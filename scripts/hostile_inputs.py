"""The inputs of scripts/hostile.py, files and folders that a stranger might hand out, and their readers."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[[Path], Any]

_IDX = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte', 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')


def hold(folder: Path) -> list[tuple[str, int]]:
  """Returns the names and sizes of everything beside the folder 'inside'."""
  return sorted((p.name, p.lstat().st_size) for p in folder.iterdir() if p.name != 'inside')


def made(kind: str, number: int, folder: Path) -> None:
  """Makes an input in a folder."""
  list(KINDS[kind].values())[number](folder)


def tried(kind: str, number: int, folder: Path) -> str:
  """Reads an input as a command would, and returns a line that says what was read."""
  del number
  return READERS[kind](folder)


def _sparse(path: Path, size: int) -> None:
  with path.open('wb') as file:
    file.truncate(size)


# Pictures


def _png(width: int, height: int, rows: bytes) -> bytes:
  chunk = lambda name, raw: struct.pack('>I', len(raw)) + name + raw + struct.pack('>I', zlib.crc32(name + raw))  # noqa: E731
  head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def _pictures(folder: Path, *odd: tuple[str, bytes]) -> None:
  from PIL import Image

  for split in ('train', 'test'):
    for label in 'ab':
      (folder / split / label).mkdir(parents=True, exist_ok=True)
      for k in range(6):
        Image.new('RGB', (16, 16), (40 * k, 90, 200)).save(folder / split / label / f'{k}.png')
  for name, content in odd:
    (folder / 'train/a' / name).write_bytes(content)


def _bomb(side: int, count: int) -> Make:
  def make(folder: Path) -> None:
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    rows = b''.join(packer.compress(row) for _ in range(side)) + packer.flush()
    _pictures(folder, *((f'bomb{k}.png', _png(side, side, rows)) for k in range(count)))

  return make


def _device(folder: Path) -> None:
  _pictures(folder)
  (folder / 'train/a/zero.png').symlink_to('/dev/zero')
  os.mkfifo(folder / 'train/a/pipe.png')


def _postscript(folder: Path) -> None:
  """Makes an EPS picture whose program has Ghostscript write a file, so Ghostscript must not run."""
  program = f'({folder.parent}/written) (w) file dup (x) writestring closefile showpage'
  _pictures(folder, ('eps.jpg', f'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n{program}\n'.encode()))


def _read_pictures(folder: Path) -> str:
  from kronmesh import data

  source = data.record_source('image_folder', 'train', folder=str(folder))
  batches = data.record_batches(source, 8, seed=0, size=8, train=True, classes=2)
  for _, batch in zip(range(6), data.stream(batches, threads=8), strict=False):
    mean = float(batch['inputs'].mean())
  return f'{len(source)} pictures, mean {mean:.3f}'


# Arrays


def _head(shape: tuple[int, ...], kind: str = '|u1') -> bytes:
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, {'descr': kind, 'fortran_order': False, 'shape': shape})
  return file.getvalue()


def _npz(image: bytes, label: bytes = b'') -> Make:
  def make(folder: Path) -> None:
    with zipfile.ZipFile(folder / 'train.npz', 'w', zipfile.ZIP_DEFLATED) as file:
      file.writestr('image.npy', image)
      file.writestr('label.npy', label or _head((4,)) + bytes(4))

  return make


def _packed_zeros(folder: Path) -> None:
  """Makes an array of 4 GB of zeros, packed into 4 MB."""
  with zipfile.ZipFile(folder / 'train.npz', 'w', zipfile.ZIP_DEFLATED) as file:
    with file.open('image.npy', 'w', force_zip64=True) as member:
      member.write(_head((4_000_000, 1024)))
      for _ in range(4000):
        member.write(bytes(1_024_000))
    file.writestr('label.npy', _head((4_000_000,)) + bytes(4_000_000))


def _objects(folder: Path) -> None:
  class Runs:
    def __reduce__(self):
      return os.system, (f'touch {folder.parent}/written',)

  value = np.empty(1, object)
  value[0] = Runs()
  np.savez(folder / 'train.npz', image=value, label=np.zeros(1, int))


def _read_arrays(folder: Path) -> str:
  from kronmesh import data

  arrays = data.load_arrays('arrays', 'train', source=str(folder))
  return f'images {arrays.inputs.shape}'


# IDX


def _idx(name: str, content: bytes) -> Make:
  def make(folder: Path) -> None:
    for k, file in enumerate(_IDX):
      x = np.zeros((4, 28, 28) if k % 2 == 0 else (4,), np.uint8)
      (folder / file).write_bytes(b'\0\0\x08' + bytes([x.ndim]) + struct.pack(f'>{x.ndim}I', *x.shape) + x.tobytes())
    (folder / name).write_bytes(content)

  return make


def _zeros_by_gzip(count: int) -> bytes:
  file = io.BytesIO()
  with gzip.GzipFile(fileobj=file, mode='wb') as packed:
    packed.write(b'\0\0\x08\3' + struct.pack('>3I', count, 28, 28))
    for _ in range(count // 1000):
      packed.write(bytes(784_000))
  return file.getvalue()


def _read_idx(folder: Path) -> str:
  from kronmesh import data

  arrays = data.load_arrays('fashion_mnist', 'train', folder=str(folder / 'prepared'), source=str(folder))
  return f'{len(arrays.label)} pictures'


# Films


def _films(folder: Path, name: str, content: bytes) -> None:
  from kronmesh.data import write_video

  for split in ('train', 'test'):
    for label in 'ab':
      (folder / split / label).mkdir(parents=True)
      write_video(folder / split / label / 'good.mp4', [np.full((32, 32, 3), 90, np.uint8)] * 10, 10)
  (folder / 'train/a' / name).write_bytes(content)


def _far(folder: Path) -> None:
  """Makes a film whose last frame is shown in a thousand years."""
  from fractions import Fraction

  import av

  file = io.BytesIO()
  with av.open(file, 'w', format='matroska') as container:
    stream = container.add_stream('libx264', rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
    stream.codec_context.time_base = Fraction(1, 1000)
    for stamp in (0, 100, 200, 31_536_000_000_000):
      frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format='rgb24')
      frame.pts, frame.time_base = stamp, Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  _films(folder, 'far.mkv', file.getvalue())


def _neighbours(folder: Path) -> None:
  secret = folder.parent / 'secret.mp4'
  _films(folder, 'list.mp4', f"ffconcat version 1.0\nfile '{secret}'\n".encode())
  (folder / 'train/a/list.ts').write_bytes(f'#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n'.encode())


def _wide(folder: Path) -> None:
  raw = b'YUV4MPEG2 W16000 H16000 F10:1 C420\nFRAME\n' + bytes(1000)
  _films(folder, 'wide.y4m', raw)


def _endless(folder: Path) -> None:
  _films(folder, 'empty.avi', b'')
  (folder / 'train/a/zero.mp4').symlink_to('/dev/zero')
  os.mkfifo(folder / 'train/a/pipe.mkv')


def _noise(folder: Path) -> None:
  rng = np.random.default_rng(0)
  good = b'RIFF' + struct.pack('<I', 2**32 - 1) + b'AVI LIST' + rng.bytes(100_000)
  _films(folder, 'noise.avi', good)


def _read_films(folder: Path) -> str:
  from kronmesh import data

  builder = data.prepared('video_folder', str(folder), folder / 'prepared', rate=5.0, short_side=16)
  return f'{builder.info.splits["train"].num_examples} films of train'


# Text


def _graph(train: str | bytes, ending: str = 'txt') -> Make:
  def make(folder: Path) -> None:
    raw = train if isinstance(train, bytes) else train.encode()
    (folder / f'train.{ending}').write_bytes(raw)
    small = '<http://a> <http://r> <http://b> .\n' if ending == 'nt' else 'a\tr\tb\n'
    for split in ('valid', 'test'):
      (folder / f'{split}.{ending}').write_text(small)

  return make


def _large_text(folder: Path) -> None:
  _graph('a\tr\tb\n')(folder)
  _sparse(folder / 'train.txt', 3 * 2**30)


def _read_graph(folder: Path) -> str:
  from kronmesh.data.triples import load_triples

  graph = load_triples('triples', source=str(folder))
  return f'{len(graph.entities)} entities'


def _table(text: bytes) -> Make:
  return lambda folder: (folder / 'x.csv').write_bytes(text)


def _read_table(folder: Path) -> str:
  from kronmesh import data

  return f'{len(data.read_table(folder / "x.csv"))} rows'


def _judged(run: bytes, judged: bytes = b'a 0 d 1\n') -> Make:
  def make(folder: Path) -> None:
    (folder / 'run.txt').write_bytes(run)
    (folder / 'q.txt').write_bytes(judged)

  return make


def _read_runs(folder: Path) -> str:
  from kronmesh.tasks.video import trec

  scores = trec.score(trec.read_run(folder / 'run.txt'), trec.read_judgements(folder / 'q.txt'))
  return f'{len(scores)} topics'


# Work folders


def _work(**contents: bytes) -> Make:
  """Makes a finished run's files, some of them replaced. Names have _ for the dot."""

  def make(folder: Path) -> None:
    from experiments.configs import digits
    from kronmesh.train import jsonfile
    from kronmesh.train.runtime.workdir import as_json

    (folder / 'config.json').write_text(jsonfile.dumps(as_json(digits.get_config())))
    rows = [{'step': k, 'loss': 1.0 / k} for k in range(1, 50)]
    (folder / 'metrics.jsonl').write_text(''.join(jsonfile.dumps(row) + '\n' for row in rows))
    for name, raw in contents.items():
      (folder / name.replace('_', '.')).write_bytes(raw)

  return make


def _sparse_rows(folder: Path) -> None:
  _work()(folder)
  _sparse(folder / 'metrics.jsonl', 3 * 2**30)


def _sparse_config(folder: Path) -> None:
  _work()(folder)
  _sparse(folder / 'config.json', 3 * 2**30)


def _linked(name: str) -> Make:
  def make(folder: Path) -> None:
    (folder.parent / 'precious').write_text('precious')
    (folder / name).symlink_to(folder.parent / 'precious')

  return make


def _read_page(folder: Path) -> str:
  from kronmesh.train.reporting.report import write_report

  return f'a page of {write_report(folder).stat().st_size} bytes'


def _begin_run(folder: Path) -> str:
  from experiments.configs import digits
  from kronmesh.train.runtime.workdir import check_config, claimed

  with claimed(folder):
    check_config(digits.get_config(), folder)
  return 'begun'


# Exports and checkpoints


def _export(change: Callable[[Path], Any]) -> Make:
  def make(folder: Path) -> None:
    import jax
    import orbax.checkpoint as ocp

    variables = {'params': {'kernel': jax.numpy.ones((4, 4))}}
    handler = ocp.CompositeCheckpointHandler(variables=ocp.PyTreeCheckpointHandler(), about=ocp.JsonCheckpointHandler())
    items = ocp.args.Composite(
      variables=ocp.args.PyTreeSave(variables), about=ocp.args.JsonSave({'config': {}, 'step': 1})
    )
    with ocp.Checkpointer(handler) as writer:
      writer.save((folder / 'export').absolute(), args=items)
    change(folder / 'export')

  return make


def _claims(export: Path) -> None:
  """Makes a small array claim to be a large one, whose values count as zeros where none are stored."""
  import tensorstore

  store = {'driver': 'ocdbt', 'base': f'file://{export}/variables', 'path': 'params.kernel'}
  array = tensorstore.open({'driver': 'zarr', 'kvstore': store}).result()
  array.resize(exclusive_max=[500_000_000, 4], resize_metadata_only=True).result()


def _emptied(export: Path) -> None:
  for path in export.rglob('*'):
    if path.is_file():
      path.write_bytes(b'')


def _piped(export: Path) -> None:
  for path in list(export.rglob('*')):
    if path.is_file() and path.name.startswith('_'):
      path.unlink()
      os.mkfifo(path)


def _pickled(export: Path) -> None:
  for path in export.rglob('*'):
    if path.is_file():
      path.write_bytes(pickle.dumps({'a': 1}))


def _outward(export: Path) -> None:
  for path in list(export.rglob('*')):
    if path.is_file():
      path.unlink()
      path.symlink_to('/dev/zero')


def _read_export(folder: Path) -> str:
  from kronmesh.train.checkpoints import load_export

  variables, about = load_export(folder / 'export')
  return f'{len(variables)} collections of step {about["step"]}'


_DEEP = b'[' * 200_000 + b']' * 200_000

KINDS: dict[str, dict[str, Make]] = {
  'pictures': {
    'sixteen of 13,000 x 13,000': _bomb(13_000, 16),
    'one of 9,000 x 9,000': _bomb(9000, 1),
    'a header of 60,000 x 60,000': lambda f: _pictures(f, ('x.png', _png(60_000, 60_000, zlib.compress(bytes(100))))),
    'devices and pipes': _device,
    'a program in EPS': _postscript,
  },
  'arrays': {
    '4 GB in 4 MB': _packed_zeros,
    'a header of 4 billion': _npz(_head((1 << 32,)) + bytes(10)),
    'a header of more than numbers hold': _npz(_head((1 << 62, 1 << 62)) + bytes(10)),
    'an object that runs a program': _objects,
    'a pipe': lambda f: os.mkfifo(f / 'train.npz'),
  },
  'idx': {
    '3 GB by gzip': lambda f: _idx(_IDX[0] + '.gz', _zeros_by_gzip(4_000_000))(f),
    'a header of 4 billion': _idx(_IDX[0], b'\0\0\x08\3' + struct.pack('>3I', 2**32 - 1, 28, 28)),
    '255 axes': _idx(_IDX[0], b'\0\0\x08\xff' + struct.pack('>I', 1) * 255),
    'noise by gzip': _idx(_IDX[0] + '.gz', b'\x1f\x8b' + os.urandom(1000)),
    'half a header': _idx(_IDX[0], b'\0\0\x08\3\0\0'),
  },
  'films': {
    'a frame in a thousand years': _far,
    'lists of neighbours': _neighbours,
    'frames of 16,000 x 16,000': _wide,
    'devices and pipes': _endless,
    'noise behind a header': _noise,
  },
  'triples': {
    '3 GB of zeros': _large_text,
    'a line of 50 MB': lambda f: _graph(b'a\tr\t' + b'x' * 50_000_000)(f),
    'a device': lambda f: [_graph('')(f), (f / 'train.txt').unlink(), (f / 'train.txt').symlink_to('/dev/zero')],
    'many names': lambda f: _graph(''.join(f'e{k}\tr\te{k + 1}\n' for k in range(300_000)) + 'a\tr\tc\n')(f),
    'terminal codes': _graph('a\tr\tb\x1b]0;title\x07\na\tr\tb\n'),
  },
  'N-triples': {
    'no end of a literal': _graph('<http://a> <http://r> "' + 'x' * 1_000_000, 'nt'),
    'escapes that are none': _graph('<http://a> <http://r> "\\uD800" .\n', 'nt'),
    'blank nodes': _graph('_:a <http://r> _:b .\n<http://a> <http://s> <http://b> .\n', 'nt'),
    'zeros': _graph(bytes(100_000), 'nt'),
    'names of files': _graph('<file:///etc/passwd> <http://r> <http://b> .\n', 'nt'),
  },
  'tables': {
    'a quote without end': _table(b'a,b\n"' + b'x' * 1_000_000),
    'a hundred thousand columns': lambda f: _table(b','.join(b'c%d' % k for k in range(100_000)) + b'\n')(f),
    'a field of 30 MB': lambda f: _table(b'a,b\n' + b'x' * 30_000_000 + b',1\n')(f),
    'UTF-16': _table('a,b\n1,2\n'.encode('utf-16')),
    'zeros': _table(bytes(1_000_000)),
  },
  'runs and judgements': {
    'scores that are none': _judged(b'a Q0 d 1 nan t\n'),
    'huge numbers': _judged(b'a Q0 d 1 1e999 t\n', b'a 0 d 99999999999999999999\n'),
    'a document twice': _judged(b'a Q0 d 1 1 t\na Q0 d 2 1 t\n'),
    'a line of 30 MB': lambda f: _judged(b'a Q0 ' + b'd' * 30_000_000 + b' 1 1 t\n')(f),
    'many lines': lambda f: _judged(b''.join(b'a Q0 d%d 1 1 t\n' % k for k in range(200_000)))(f),
  },
  'rows of a run': {
    'deep brackets': _work(metrics_jsonl=_DEEP + b'\n{"step": 1, "loss": 2.0}\n'),
    '3 GB of zeros': _sparse_rows,
    'many rows': lambda f: _work(metrics_jsonl=b'{"step": 1, "loss": 2.0}\n' * 300_000)(f),
    'HTML in names and words': _work(
      events_jsonl=b'{"step": 1, "time": "<script>", "kind": "<script>", "words": "<script>alert(1)</script>"}\n'
    ),
    'numbers beyond all': _work(
      metrics_jsonl=b'{"step": 1e999, "loss": 1}\n{"step": 2, "loss": 1' + b'0' * 5000 + b'}\n'
    ),
  },
  'configs of a run': {
    'deep brackets': _work(config_json=_DEEP),
    '3 GB of zeros': _sparse_config,
    'a list': _work(config_json=b'[1, 2]'),
    'values of other types': _work(config_json=b'{"data": 1, "model": [], "steps": "x", "optimizer": {}}'),
    'not UTF-8': _work(config_json=b'\xff\xfe\x00{'),
  },
  'links in a work folder': {
    'config.json': _linked('config.json'),
    'the lock': _linked('.lock'),
    'metrics.jsonl': _linked('metrics.jsonl'),
    'checkpoints': _linked('checkpoints'),
    'the name of a new file': _linked('config.json.new'),
  },
  'exports': {
    'claims of two billion values': _export(_claims),
    'empty files': _export(_emptied),
    'pipes': _export(_piped),
    'pickles': _export(_pickled),
    'links to a device': _export(_outward),
  },
}

READERS: dict[str, Callable[[Path], str]] = {
  'pictures': _read_pictures,
  'arrays': _read_arrays,
  'idx': _read_idx,
  'films': _read_films,
  'triples': _read_graph,
  'N-triples': _read_graph,
  'tables': _read_table,
  'runs and judgements': _read_runs,
  'rows of a run': _read_page,
  'configs of a run': _read_page,
  'links in a work folder': _begin_run,
  'exports': _read_export,
}
