"""The command line: `main` chooses a command, each command is a module, and all share `options`."""
