"""Findings that differ in their subject only are printed as one sentence."""

from __future__ import annotations

import pytest

from pipeline.errors import Refused
from pipeline.results.findings import merged, refuse
from stages.job import Finding


def finding(subject: str | None, predicate: str, **more: str) -> Finding:
    advice = f"{subject} {predicate}" if subject else predicate
    return Finding(
        **{
            "rule": "constant",
            "severity": "warn",
            "stage": "rl1",
            "evidence": {},
            "subject": subject,
            "advice": advice,
            **more,
        }
    )


def test_subjects_of_several_words_are_named_in_full():
    found = [finding("left part", "is 0 for all 326 answers"), finding("right part", "is 0 for all 326 answers")]
    (one,) = merged(found)
    assert one.advice == "each of left part, right part is 0 for all 326 answers"


def test_what_differs_in_more_than_its_subject_stays_apart():
    found = [
        finding("left part", "is 0 for all 326 answers"),
        finding("right part", "is 1 for all 326 answers"),
        finding("right part", "is 0 for all 326 answers", rule="sparse"),
        finding("right part", "is 0 for all 326 answers", stage="rl2"),
    ]
    assert merged(found) == found


def test_what_is_about_the_stage_is_never_joined():
    found = [finding(None, "it differs"), finding(None, "it differs")]
    assert merged(found) == found


def test_a_finding_that_stops_a_run_is_a_refusal():
    with pytest.raises(Refused, match="rl1: left part is 0"):
        refuse([finding("right part", "is 0"), finding("left part", "is 0", severity="stop")])
