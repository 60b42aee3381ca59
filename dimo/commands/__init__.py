"""The `dimo` command and its subcommands."""
