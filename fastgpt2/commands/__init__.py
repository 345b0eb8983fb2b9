"""What the subcommands run; uses every other folder."""
