"""The machinery that runs reward functions, each in a process of its own."""
