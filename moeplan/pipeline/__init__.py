"""The corridor: one function per job, each the whole way from inputs to results.

The only room below ``validation`` that knows two workshops at once; the command line calls these two alone.
"""
