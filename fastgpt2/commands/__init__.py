"""What the subcommands do; each module is imported by the command that needs it. `cli.py` lists them."""
