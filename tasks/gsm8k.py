"""GSM8K: grade-school word problems with a numeric answer, from the hub or a local copy of it.

A row of the data set:

    question: "A box holds 12 pens. How many pens are in 100 boxes?"
    answer:   "Each box holds 12 pens, so 100 boxes hold 12*100=<<12*100=1200>>1200 pens.\n#### 1,200"

becomes

    prompt: [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    answer: "1,200"      # the text after "####", commas kept

The user turn is the bare question. Thousands separators stay in the gold answer because the correctness reward
compares strings exactly; the flexible check compares numbers. No worked example is shown, so a model that never writes
the tags by itself earns nothing from the format rewards at first.
"""

from __future__ import annotations

from grpo.errors import UserError
from grpo.rewards.extract import final_number, hash_answer, last_number, xml_answer
from grpo.tasks.cells import GIVE_OR_LEAVE_OUT, filled, gold_text
from grpo.tasks.common import Row, Task, read_hub, read_splits

SYSTEM_PROMPT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""

REWARDS = [
    {"function": "correctness"},
    {"function": "integer"},
    {"function": "strict_format"},
    {"function": "soft_format"},
    {"function": "xml_count"},
]


def load(path: str | None = None, hub: str = "openai/gsm8k", subset: str | None = "main") -> Task:
    """GSM8K's 7,473 training and 1,319 test questions.

    `path`: a folder with train.jsonl and test.jsonl (or .parquet), instead of the hub's data set `hub`, `subset`.
    """
    columns = ("question", "answer")
    train, test = read_splits(path, columns, make=made) if path else read_hub(hub, subset, columns, make=made)
    return Task("gsm8k", train, test, rewards=REWARDS, strict=strict, flexible=flexible)


def made(row: Row, where: str) -> Row:
    """A row of the data set, which is at `where`, as a task row."""
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": filled("{question}", row, where)},
        ],
        "answer": gold_answer(gold_text(row, "answer", where), where),
    }


def gold_answer(solution: str, where: str) -> str:
    """The text after "####" in the solution of the row at `where`."""
    answer = hash_answer(solution)
    if answer is None:
        raise UserError(f"{where}: the answer has no '####' before the result; use the task 'table' instead")
    if not answer:
        raise UserError(f"{where}: the answer has nothing after '####'; {GIVE_OR_LEAVE_OUT}")
    return answer


def strict(text: str, row: Row) -> bool:
    """The text between the answer tags is the gold answer, character by character."""
    return "<answer>" in text and xml_answer(text) == row["answer"]


def flexible(text: str, row: Row) -> bool:
    """The number that the completion ends on, tagged or not, equals the gold answer as a number."""
    number = final_number(text)
    return number is not None and number == last_number(row["answer"])
