"""One page for a run: curves, layers, events, devices, config. It needs nothing but a browser.

python experiments/report.py --workdir=runs/mine

A run writes it when it ends, by itself or by a fault; this makes it anew at any time.
"""

from kronmesh.train.reporting.report import command

if __name__ == '__main__':
  command()
