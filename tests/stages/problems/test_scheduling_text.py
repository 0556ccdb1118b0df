"""The text form of scheduling against the reference it is after: its regular expressions, its rules and rewards, its
generator's statistics.

The oracles are written from evaluation/eval.py and train_grpo.ipynb of github.com/anakin87/qwen-scheduler-grpo, on
short texts, because theirs backtrack."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import combinations, pairwise

import pytest

from stages.errors import BadInput
from stages.problems.base import Answer, Judgement
from stages.problems.scheduling import text
from stages.problems.scheduling.intervals import clock, overlaps, touches
from stages.problems.scheduling.problem import Scheduling

REFERENCE = Scheduling("text", reward_overlap="touching")
LINE = {
    "events": [
        ["Talk", "09:00", "10:30"],
        ["Lunch", "10:00", "10:45"],
        ["Walk", "10:30", "11:30"],
        ["Party", "23:40", "24:10"],
    ],
    "priority_events": ["Lunch", "Party"],
    "optimal_score": 210,
    "prompt": "Events: ...",
}
ROW = REFERENCE.row(LINE)
ARABIC = "\u0660\u0669:\u0660\u0660"
"""09:00 in digits that \\d matches and int() reads."""
TIMES = {name: (start, end) for name, start, end in LINE["events"]}


def book(*names: str) -> str:
    return "\n".join(
        f"<event>\n<name>{name}</name>\n<start>{TIMES[name][0]}</start>\n<end>{TIMES[name][1]}</end>\n</event>"
        for name in names
    )


def schedule(*names: str) -> str:
    return f"<think>\nhm\n</think>\n<schedule>\n{book(*names)}\n</schedule>"


def judged(completion: str, problem: Scheduling = REFERENCE) -> Judgement:
    (judgement,) = problem.judge([Answer(ROW, completion)])
    return judgement


T = r"\d{2}:\d{2}"
JUDGED = re.compile(
    rf".*<schedule>.*<event>.*<name>.*</name>.*<start>{T}</start>.*<end>{T}</end>.*</event>.*</schedule>.*", re.DOTALL
)
REWARDED = re.compile(
    rf"<think>.+</think>.*<schedule>.*(<event>.*<name>.+</name>.*<start>{T}</start>.*<end>{T}</end>.*</event>)+.*</schedule>",
    re.DOTALL,
)
CAPTURED = re.compile(rf"<event>\s*<name>([^<]+)</name>\s*<start>({T})</start>\s*<end>({T})</end>\s*</event>")


def minutes(time: str) -> int:
    hours, rest = map(int, time.split(":"))
    return 60 * hours + rest


def weight(events) -> int:
    return sum((end - start) * (2 if name in LINE["priority_events"] else 1) for name, start, end in events)


def oracle_of_the_score(completion: str) -> tuple[str, float]:
    """What evaluation/eval.py says of one answer."""
    if not JUDGED.match(completion):
        return "format", 0.0
    said = CAPTURED.findall(completion)
    if len(said) < 2:
        return "less_than_2", 0.0
    if len({one for one in said if list(one) in LINE["events"]}) < len(said):
        return "non_existing", 0.0
    events = [(name, minutes(start), minutes(end)) for name, start, end in said]
    if not all(a[1] < b[1] for a, b in pairwise(events)):
        return "unsorted", 0.0
    if any(a[1] < b[2] and a[2] > b[1] for a, b in combinations(events, 2)):
        return "overlap", 0.0
    return "valid", weight(events) / LINE["optimal_score"]


def oracle_of_the_rewards(completion: str) -> dict[str, float]:
    """What the three reward functions of train_grpo.ipynb say, as shares of 10, 20 and 70."""
    said = CAPTURED.findall(completion)
    starts = [minutes(start) for _, start, _ in said]
    real = {one for one in said if list(one) in LINE["events"]}
    score = 0.0
    if len(real) == len(said) and len(real) >= 2:
        events = [(name, minutes(start), minutes(end)) for name, start, end in real]
        clashing = {one for a, b in combinations(events, 2) if a[1] <= b[2] and a[2] >= b[1] for one in (a, b)}
        score = weight(one for one in events if one not in clashing) / LINE["optimal_score"]
    in_order = len(said) >= 2 and all(a < b for a, b in pairwise(starts))
    return {"format": float(bool(REWARDED.match(completion))), "sorted": float(in_order), "score": score}


PIECES = [
    "<think>",
    "</think>",
    "<schedule>",
    "</schedule>",
    "<event>",
    "</event>",
    "<name>",
    "</name>",
    "<start>",
    "</start>",
    "<end>",
    "</end>",
    "\n",
    " ",
    "x",
    "<start>10:30</start>",
    "<start>1:30</start>",
    "<end>9:75</end>",
    "<end>09:75</end>",
    "<name>\n</name>",
    "<name></name>",
    "<",
    "\u2003",
    ARABIC,
    "09:00",
    "10:30",
    book("Talk"),
    book("Walk"),
    book("Lunch", "Walk"),
    book("Talk").replace("10:30", "09:90"),
    book("Talk").replace("09:00", ARABIC),
    book("Party").replace("24:10", "00:10"),
]


def mutated(rng: random.Random) -> str:
    """An answer with up to four pieces put in, taken out or turned round."""
    names = rng.sample(list(TIMES), rng.randint(0, 4))
    parts = re.split(r"(<[^>]*>)", schedule(*(sorted(names, key=TIMES.get) if rng.random() < 0.7 else names)))
    for _ in range(rng.randint(0, 4)):
        i = rng.randrange(len(parts))
        change = rng.random()
        if change < 0.4:
            parts[i] = rng.choice(PIECES)
        elif change < 0.7:
            parts.insert(i, rng.choice(PIECES))
        elif change < 0.9 and len(parts) > 1:
            del parts[i]
        else:
            j = rng.randrange(len(parts))
            parts[i], parts[j] = parts[j], parts[i]
    return "".join(parts)


def test_answers_and_near_misses_are_read_as_the_reference_reads_them():
    rng = random.Random(0)
    seen = Counter[str]()
    for _ in range(20_000):
        completion = mutated(rng)
        judgement = judged(completion)
        assert (judgement.outcome, judgement.score) == oracle_of_the_score(completion), completion
        assert judgement.rewards == oracle_of_the_rewards(completion), completion
        assert judgement.well_formed == (judgement.outcome != "format")
        seen[judgement.outcome] += 1
        seen[f"format reward {judgement.rewards['format']:.0f}"] += 1
    assert min(seen[name] for name in (*REFERENCE.outcomes, "format reward 1", "format reward 0")) > 300, seen


def test_random_rows_of_tags_are_read_as_the_reference_reads_them():
    rng = random.Random(1)
    tags = [*PIECES[:8], "<start>09:00</start>", "<end>10:30</end>", "x", "\n"]
    order = [
        "<think>",
        "x",
        "</think>",
        "<schedule>",
        "<event>",
        "<name>",
        "x",
        "</name>",
        "<start>09:00</start>",
        "<end>10:30</end>",
        "</event>",
        "</schedule>",
    ]
    for i in range(10_000):
        some = [tag for tag in order if rng.random() < 0.95] if i % 2 else []
        for _ in range(rng.randint(0, 3) if some else 12):
            some.insert(rng.randint(0, len(some)), rng.choice(tags))
        completion = "".join(some)
        judgement = judged(completion)
        assert judgement.well_formed == bool(JUDGED.match(completion)), completion
        assert judgement.rewards["format"] == bool(REWARDED.match(completion)), completion


@pytest.mark.parametrize(
    ("completion", "outcome", "score"),
    [
        ("I would go to the talk.", "format", 0.0),
        ("<schedule></schedule>", "format", 0.0),
        (schedule("Talk"), "less_than_2", 0.0),
        (schedule("Talk", "Walk").replace("09:00", "09:01"), "non_existing", 0.0),
        (schedule("Talk", "Talk"), "non_existing", 0.0),
        (schedule("Walk", "Talk"), "unsorted", 0.0),
        (schedule("Talk", "Lunch"), "overlap", 0.0),
        (schedule("Talk", "Walk"), "valid", 150 / 210),
        (schedule("Talk", "Walk", "Party"), "valid", 1.0),
        (f"no thinking <schedule>{book('Talk', 'Party')}</schedule> and more", "valid", 150 / 210),
    ],
)
def test_the_first_broken_rule_is_the_outcome(completion, outcome, score):
    judgement = judged(completion)
    assert (judgement.outcome, judgement.score) == (outcome, pytest.approx(score))


def test_another_spelling_of_the_same_time_is_another_event():
    for spelling in ("08:60", ARABIC):
        assert judged(schedule("Talk", "Walk").replace("09:00", spelling)).outcome == "non_existing"


def test_the_optimum_may_touch_and_may_pass_midnight():
    """90 + 60 + 2 x 30; the reference's training reward takes both that touch away."""
    assert ROW.optimum == 210
    best = schedule("Talk", "Walk", "Party")
    assert judged(best).rewards["score"] == pytest.approx(60 / 210)
    assert judged(best, Scheduling("text")).rewards["score"] == 1.0


def test_a_line_of_a_file_is_a_row_with_its_own_prompt_and_comes_back_as_it_was():
    assert ROW.prompt == "Events: ..." and ROW.columns() == {"id": ROW.id, **LINE}
    unsaid = REFERENCE.row({"events": LINE["events"], "priority_events": LINE["priority_events"]})
    assert unsaid.prompt == text.prompt(ROW.instance)
    assert unsaid.prompt.startswith("Events:\n- Talk (09:00 - 10:30)\n- Lunch") and unsaid.prompt.endswith(
        "- Party (23:40 - 24:10)\n\nPriorities:\n- Lunch\n- Party"
    )
    for row in (*REFERENCE.rows("train", 0, 50, seed=0), *Scheduling("compact").rows("train", 0, 50, seed=0)):
        problem = REFERENCE if "Priorities" in row.prompt else Scheduling("compact")
        assert problem.row(row.columns()) == row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimal_score": 209}, "optimal_score: found 209, but the best schedule has 210"),
        ({"priority_events": ["Tea"]}, "priority_events: 'Tea' is none of the events"),
        ({"events": []}, "events: found none"),
        ({"events": [["Talk", "09:00", "10:30"]] * 2, "priority_events": []}, "one that is there twice"),
        ({"events": [["Talk", "10:30", "09:00"]], "priority_events": []}, "ends before it has started"),
        ({"events": [["Talk", "9:00", "10:30"]], "priority_events": []}, "found the time '9:00'"),
        ({"events": [["Talk", ARABIC, "10:30"]], "priority_events": []}, "found the time"),
        ({"events": [["A < B", "09:00", "10:30"]], "priority_events": []}, "no answer in the text form can name"),
        ({"events": [["", "09:00", "10:30"]], "priority_events": []}, "no answer in the text form can name"),
        ({"events": "Talk"}, "events: input should be a valid list"),
        ({"events": [["Talk", 9, 10]]}, "events.0.1: input should be a valid string"),
        ({"prompt": 3}, "prompt: input should be a valid string"),
    ],
)
def test_a_line_that_is_no_row_says_why(change, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        REFERENCE.row(LINE | change)


def test_instances_have_the_statistics_of_the_reference():
    """Of its 500 training rows: 4 to 8 events 102/113/110/79/96; 1 to 3 priorities 286/185/29; 1 to 3 overlapping
    pairs 259/192/49."""
    instances = [row.instance for row in REFERENCE.rows("train", 0, 2000, seed=0)]
    pairs = [sum(touches(a, b) for a, b in combinations(one.events, 2)) for one in instances]
    for found, reference in (
        (Counter(len(one.events) for one in instances), {4: 102, 5: 113, 6: 110, 7: 79, 8: 96}),
        (Counter(len(one.priority) for one in instances), {1: 286, 2: 185, 3: 29}),
        (Counter(pairs), {1: 259, 2: 192, 3: 49}),
    ):
        assert set(found) == set(reference)
        assert all(abs(found[n] / 2000 - count / 500) < 0.06 for n, count in reference.items()), found
    for one in instances:
        assert list(one.events) == sorted(one.events, key=lambda event: event.start)
        assert all((event.end - event.start) in range(15, 121, 15) for event in one.events)
        assert len({event.name for event in one.events}) == len(one.events)


def test_an_answer_is_read_back_and_names_what_each_event_weighs():
    for row in REFERENCE.rows("train", 0, 50, seed=1):
        instance = row.instance
        completion = text.answer(instance, instance.events)
        assert text.read(completion) == (True, True, list(instance.events))
        for event in instance.events:
            assert (
                f"{event.name} {'2 x ' if event.name in instance.priority else ''}{event.end - event.start}"
                in completion
            )
            assert f"{event.name} ({clock(event.start)} - {clock(event.end)})" in row.prompt


def test_every_baseline_is_what_its_name_says():
    rng, problem = random.Random(0), Scheduling("text")
    expected = {
        "gold": {"valid"},
        "greedy": {"valid"},
        "random_valid": {"valid"},
        "one_item": {"less_than_2"},
        "format_broken": {"format"},
        "non_existing": {"non_existing"},
        "duplicate": {"non_existing"},
        "unsorted": {"unsorted"},
        "overlapping": {"overlap", "unsorted"},
        "everything": {"overlap", "unsorted", "valid"},
    }
    for row in problem.rows("train", 0, 200, seed=0):
        played = problem.baselines(row, rng)
        judgements = dict(zip(played, problem.judge([Answer(row, said) for said in played.values()]), strict=True))
        assert all(judgement.outcome in expected[name] for name, judgement in judgements.items())
        assert judgements["gold"].solved and set(expected) - set(played) <= {"overlapping"}
        assert ("overlapping" in played) == any(overlaps(a, b) for a, b in combinations(row.instance.events, 2))


def test_copying_every_event_is_well_paid_and_worth_nothing_until_overlaps_cost_the_score_reward():
    rows = REFERENCE.rows("held_out", 0, 300, seed=0)

    def mean(problem: Scheduling) -> tuple[float, float]:
        answers = [Answer(row, problem.baselines(row, random.Random(0))["everything"]) for row in rows]
        judgements = problem.judge(answers)
        rewards = [sum(w * one.rewards[name] for name, w in problem.reward_weights.items()) for one in judgements]
        return sum(rewards) / len(rows), sum(one.score for one in judgements) / len(rows)

    assert mean(REFERENCE)[0] > 0.6 and mean(REFERENCE)[1] < 0.05
    assert mean(Scheduling("text", overlap="zero"))[0] < 0.35
