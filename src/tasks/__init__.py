"""The tasks that can be trained, by their names in `train.registry`; a config loads the module of the task it names."""
