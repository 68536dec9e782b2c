"""The subcommands of `kronmesh`, one module each; `main` finds them by name."""
