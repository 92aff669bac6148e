"""Short texts on which the layers of a model are compared when `model.keep_16bit = "auto"` chooses among them.

Mathematics, code, dialogue and prose, written for this purpose: a choice does not depend on the task, and none of it is
in anybody's test set. For how they are used see `keep_16bit.py`.
"""

TEXTS = (
    """\
A train leaves the station at 9:15 and arrives at 11:45 after covering 210 kilometres. It travelled for two and a half \
hours, so its mean speed was 210 / 2.5 = 84 kilometres an hour. Had it left twenty minutes later and still arrived on \
time, its speed would have been 210 / (130 / 60), which is about 97 kilometres an hour.
""",
    """\
Let n be an odd number. Then n = 2k + 1 for some whole number k, and n^2 = 4k^2 + 4k + 1 = 4k(k + 1) + 1. One of k and \
k + 1 is even, so 8 divides 4k(k + 1). Therefore the square of every odd number leaves the remainder 1 when it is \
divided by 8.
""",
    """\
<reasoning>
Mira has 3 boxes with 12 candles each, and 5 candles are broken. She has 3 * 12 = 36 candles, of which 36 - 5 = 31 can \
be sold. At $2 each they bring 31 * 2 = $62.
</reasoning>
<answer>
62
</answer>
""",
    '''\
def moving_average(values, width):
    """Means of every `width` neighbouring values."""
    if width < 1:
        raise ValueError("width must be positive")
    total = sum(values[:width])
    means = [total / width]
    for new, old in zip(values[width:], values):
        total += new - old
        means.append(total / width)
    return means
''',
    """\
User: My sourdough never rises properly. What am I doing wrong?
Assistant: Most often the starter is not active enough. Feed it twice a day for three days, keep it at about 25 \
degrees, and use it when it has doubled in size. A small piece should float in water; if it sinks, wait another hour \
before you mix the dough.
User: And how long should the dough rest?
Assistant: About four hours at room temperature, or a night in the fridge.
""",
    """\
The harbour was quiet in the early morning. Two fishermen mended their nets beside the old lighthouse, while gulls \
circled above the boats. By noon the market would be full of people, and the smell of fresh bread would drift from the \
bakery on the corner. Anna had come here every summer since she was a child, and she still knew each of the narrow \
streets by name.
""",
    """\
Plants take up water through their roots and carbon dioxide through small openings in their leaves. With the energy of \
sunlight they turn both into sugar and oxygen. At night, when there is no light, they breathe as animals do: they use \
some of the sugar, and give carbon dioxide back to the air.
""",
)
