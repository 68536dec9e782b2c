"""Trains a config with several settings, in processes of this machine or on Slurm, and compares them.

python experiments/sweep.py --config=experiments/configs/digits.py --sweep='kfac.damping=1e-3,1e-2;seed=0..4' --workers=2
python experiments/sweep.py --config=experiments/configs/digits.py --cluster=slurm --slurm=partition=gpu,gpus_per_node=1

Without --sweep the config's own `sweep()` says which. Every member is a run of its own under `members/`. A second call goes
on: members that are done stay, others are resumed. One that fails does not stop the others. `table.txt`, `sweep.json` and
`sweep.html` are made anew whenever a member ends.
"""

from kronmesh.train.sweeps.sweep import command_line

if __name__ == '__main__':
  command_line()
