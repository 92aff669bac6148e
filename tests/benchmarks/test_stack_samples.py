"""benchmarks/common/stack_samples.py: phases of a start by what was on the stack."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.stack_samples import Place, phases

MAIN, INNER, OUTER = Place("/x/main.py", "<module>"), Place("/x/a/inner.py", "load"), Place("/x/a/outer.py", "__init__")
IMPORTED = Place("/x/site-packages/thing/__init__.py", "<module>")
MARKS = {"inner": ("a/inner.py", "load"), "outer": ("a/outer.py", "__init__"), "imports": ("", "<module>")}
PLACES = st.lists(st.sampled_from([INNER, OUTER, IMPORTED]), max_size=4)


@given(st.lists(st.tuples(st.floats(0.01, 2.0), PLACES), max_size=20))
def test_every_look_belongs_to_the_first_mark_on_its_stack(looks):
    clock, given_looks = 100.0, []
    for spent, places in looks:
        clock += spent
        given_looks.append((clock, spent, (MAIN, *places)))
    found = phases(given_looks, MARKS)
    assert abs(sum(spent for _, spent in found.values()) - sum(spent for spent, _ in looks)) < 1e-6
    for name, place in (("inner", INNER), ("outer", OUTER), ("imports", IMPORTED)):
        before = {"inner": [], "outer": [INNER], "imports": [INNER, OUTER]}[name]
        of_phase = [
            (at, spent)
            for at, spent, stack in given_looks
            if place in stack[1:] and not any(b in stack for b in before)
        ]
        assert (name in found) == bool(of_phase)
        if of_phase:
            assert abs(found[name][0] - (of_phase[0][0] - of_phase[0][1])) < 1e-9
            assert abs(found[name][1] - sum(spent for _, spent in of_phase)) < 1e-6
