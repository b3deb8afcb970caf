"""What a training step costs on devices that need not be there.

`compiled` compiles the real step, and `hlo` reads the compiled program. `arithmetic`, `traffic` and
`collectives` count what a step computes, moves and sends. `roofline` makes a bound of its time from
that and from the figures of `chips`. `report` prints it.
"""
