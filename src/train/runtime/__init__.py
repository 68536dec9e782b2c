"""The surroundings of a command's work: flags, signals, processes, work folders and saved files."""
