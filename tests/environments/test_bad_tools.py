"""Tools that no call could use are refused before a run, each with one sentence that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.environments.pool import EnvironmentPool
from grpo.environments.ways_in import WAYS_IN
from grpo.errors import UserError

HEAD = """import functools
class Env:
    def reset(self, **row): return None
    def look(self, at: int, /) -> str:
        '''Look.

        Args:
            at: where
        '''
"""
DOC = '    """Do.\n\n    Args:\n        a: number\n    """\n'


def refused(folder: Path, source: str, name: str = "f", way: str = "tools") -> str:
    (folder / "mine.py").write_text(HEAD + source)
    reference = f"{folder / 'mine.py'}:{name}"
    with pytest.raises(UserError) as caught:
        WAYS_IN[way]([reference] if way == "tools" else reference, {}, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (f"def f(*a: int) -> str:\n{DOC}", "its argument 'a' cannot be given by name"),
        (f"def f(a: int, /) -> str:\n{DOC}", "its argument 'a' cannot be given by name"),
        (f"def f(a: int) -> str:\n{DOC}    yield a\n", "tool 'f' yields its answer in pieces; return it whole"),
        (f"async def f(a: int) -> str:\n{DOC}    yield a\n", "yields its answer in pieces"),
        ("f = 5\n", "is a int; name a function"),
        ("class f:\n    '''Do.'''\n", "is a class; name a function"),
        ("f = functools.partial(print, 1)\n", "is a partial; name a function"),
        ("f = lambda a: a\n", "has no docstring"),
        (f"def f(a) -> str:\n{DOC}", "its argument 'a' has no type hint"),
        (f"def f(a: set[int]) -> str:\n{DOC}", "the type hint set[int] has no JSON schema"),
    ],
)
def test_a_tool_that_no_call_can_use_is_refused(tmp_path: Path, source: str, sentence: str) -> None:
    assert sentence in refused(tmp_path, source)


def test_so_is_a_method_of_an_environment(tmp_path: Path) -> None:
    assert "tool 'look': its argument 'at' cannot be given by name" in refused(tmp_path, "", "Env", "factory")


def test_what_says_itself_what_to_do_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + "f = 5\n")
    with pytest.raises(UserError) as caught:
        EnvironmentPool(
            "tools", "tools", [f"{tmp_path / 'mine.py'}:f"], {},
            python=None, processes=1, timeout=5.0, memory_limit=1 << 30, on_output=print,
        )  # fmt: skip
    assert str(caught.value).startswith("tool '") and str(caught.value).endswith("with type hints and a docstring")


KINDS = ("{n}: int", "{n}: int = 1", "*{n}: int", "**{n}: int", "*, {n}: int", "{n}: int, /")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
def test_a_tool_is_taken_just_where_all_it_offers_can_be_given_by_name(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str]
) -> None:
    parameters = ", ".join(kind.format(n=f"a{number}") for number, kind in enumerate(kinds))
    described = "".join(f"        a{number}: number\n" for number in range(len(kinds)))
    source = f'def f({parameters}) -> str:\n    """Do.\n\n    Args:\n{described}    """\n'
    try:
        compile(source, "mine.py", "exec")
    except SyntaxError:
        return
    by_name = not any(kind.endswith("/") or (kind.startswith("*{") and "**" not in kind) for kind in kinds)
    folder = tmp_path_factory.mktemp("tool")
    if not by_name:
        assert "cannot be given by name" in refused(folder, source)
        return
    (folder / "mine.py").write_text(source)
    (schema,) = WAYS_IN["tools"]([f"{folder / 'mine.py'}:f"], {}, {}).facts["tools"]
    assert list(schema["function"]["parameters"]["properties"]) == [f"a{number}" for number in range(len(kinds))]
