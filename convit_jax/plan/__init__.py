"""What a training step costs on devices that may not be there: memory, arithmetic, traffic, time.

`compiled` compiles the real step, `hlo` reads the compiled program, and `traffic`, `collectives` and
`arithmetic` count what it moves, sends and computes. `roofline` makes a bound of the time from
that and from the figures of `chips`. `report` prints it.
"""
