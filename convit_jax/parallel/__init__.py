"""Processes and devices of a run.

`launcher` finds out how this process was started, `processes` connects it with the others,
`sharding` splits arrays over devices, and `signals` makes SIGTERM and Ctrl-C stop all processes.
"""
