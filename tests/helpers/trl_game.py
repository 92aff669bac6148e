"""An environment as users of TRL write them for `environment_factory`: nothing here knows this project."""

from __future__ import annotations

from typing import Any


class Counting:
    """Counts to 3."""

    def reset(self, **kwargs: Any) -> str:
        self.total, self.asked = 0, 0
        return " Count to 3."

    def up(self, by: int) -> str:
        """
        Counts up.

        Args:
            by: How far.
        """
        self.total += by
        self.asked += 1
        return f"at {self.total}"

    def get_reward(self) -> float:
        return 1.0 / (1 + abs(3 - self.total)) + 0.01 * self.asked


ROWS = [{"prompt": [{"role": "user", "content": "Play."}]}, {"prompt": [{"role": "user", "content": "Play again."}]}]
