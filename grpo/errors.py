"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the file, line or key, and the remedy.

    The command line prints it without a traceback and exits with code 2 (`grpo.command`); nothing has been written by
    then. It stays one line where it repeats text of several.
    """

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.split()) if "\n" in sentence else sentence)
