"""Processes and devices of a run.

`launcher` finds out how this process was started, `processes` connects it with the others,
`sharding` splits arrays over devices, and `signals` turns SIGTERM and Ctrl-C into a request to stop.
"""
