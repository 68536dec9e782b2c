"""The trainer: a config becomes a run, which trains, is checkpointed, watched and compared."""
