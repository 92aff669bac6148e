"""Functions whose schemas are compared with those that transformers makes."""

from typing import Any, Literal, Optional


def plain(a: int, b: float, c: str, d: bool = True) -> str:
    """
    Does something.

    Args:
        a: First.
        b: Second, which goes on
            over two lines.
        c: Third (choices: ["tea", "coffee"])
        d: Fourth.

    Returns:
        Something.
    """
    return ""


def nested(a: list[int], b: dict[str, list[float]], c: tuple[int, str], d: Any, e: list, f: dict) -> dict[str, int]:
    """Several lines
    of description.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
        e: E.
        f: F.
    """
    return {}


def unions(a: int | None, b: int | str, c: list[int] | str, d: Literal["x", "y"], e: Optional[str] = None):  # noqa: UP045
    """Unions.

    Args:
        a: A.
        b: B.
        c: C.
        d: D.
        e: E.
    """


def nothing() -> None:
    """Takes nothing."""


FUNCTIONS = [plain, nested, unions, nothing]
