"""The pure core: no I/O, no clock, no tasks, no global randomness.

Time (integer milliseconds on a monotonic clock) and chance (a generator) are arguments. The daemon
and the simulator drive the very same :class:`edgemoa.core.node.Node`.
"""
