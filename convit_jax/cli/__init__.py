"""The command line: one module a command, `options` for what they share, `main` to choose one."""
