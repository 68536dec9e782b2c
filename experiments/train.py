"""Trains one config: mesh, data, model, state, step, loop.

python experiments/train.py --config=experiments/configs/digits.py --config.optimizer=adam --workdir=runs/adam

Without --config it trains digits.py. A second call in the same folder goes on from the last checkpoint. --dry_run checks,
plans and ends; --profile=10:15 traces these steps.
"""

from kronmesh.train.command import command

if __name__ == '__main__':
  command()
