"""The functions that the subcommands run; they use api, worker, protocol and engine."""
