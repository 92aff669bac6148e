"""Environments: programs that talk to the policy in turns, run in processes of their own.

`pool.py` starts and ends those processes and is all that the trainer sees of them; `fork_server.py` and `program.py`
are what runs inside. There nothing is imported but the standard library, so that another interpreter can run it.
"""
