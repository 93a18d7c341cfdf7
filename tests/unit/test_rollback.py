"""The guard that takes adaptation back where a task degrades."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fusion_merge.adaptation.optimization import LearningRate, make_optimizer
from fusion_merge.adaptation.rollback import RollbackGuard

EVEN, ONE = torch.full((4,), 0.25), torch.tensor([0.97, 0.01, 0.01, 0.01])


class Course:
    """A parameter that says the step, and a guard that watches two tasks."""

    def __init__(self, images: int = 1000, **options) -> None:
        self.images = images
        self.parameter = nn.Parameter(torch.zeros(1))
        self.optimizer = make_optimizer("adam", [self.parameter], 0.1)
        self.guard = RollbackGuard({"cats": 4, "dogs": 4}, [self.parameter], **options)
        self.step = 0

    def go(self, cats, dogs=EVEN, agreement=None) -> None:
        before = [self.parameter.detach().clone()]
        self.parameter.grad = torch.ones(1)
        self.optimizer.step()
        self.parameter.data.fill_(float(self.step + 1))
        self.guard.update(self.step, {"cats": cats, "dogs": dogs}, agreement or {}, before, self.optimizer, self.images)
        self.step += 1


def test_tasks_that_stay_as_they_are_are_left_alone():
    course = Course()
    for _ in range(50):
        course.go(EVEN)
    assert course.guard.interventions == []
    assert course.parameter.item() == 50
    assert course.guard.weight("cats") == 1


def test_a_task_that_falls_on_one_class_is_taken_back_to_its_best():
    course = Course()
    for _ in range(14):
        course.go(EVEN)
    while not course.guard.interventions:
        course.go(ONE)
        assert course.step < 40
    (done,) = course.guard.interventions
    assert (done.task, done.measure, done.action) == ("cats", "marginal entropy", "tempered")
    assert done.best == pytest.approx(1.0)
    assert done.score < done.best - 0.05
    assert course.parameter.item() == done.back_to == 13  # the last before, when least of the noise was left
    assert not course.optimizer.state  # which belonged to what is gone
    assert course.guard.weight("cats") == course.guard.pace == done.pace == 0.25
    assert course.guard.weight("dogs") == 1


def test_a_task_with_an_expert_is_judged_by_it_and_gets_its_labels():
    course = Course(may_ask_experts=True)
    for _ in range(14):
        course.go(EVEN, agreement={"cats": 0.9, "dogs": 0.9})
    while not course.guard.interventions:
        course.go(EVEN, agreement={"cats": 0.3, "dogs": 0.9})  # spread out, and wrong
        assert course.step < 40
    (done,) = course.guard.interventions
    assert (done.task, done.measure, done.action) == ("cats", "agreement", "expert labels")
    assert course.guard.by_expert("cats")
    assert not course.guard.by_expert("dogs")
    assert course.guard.weight("cats") == 1
    while len(course.guard.interventions) == 1:  # by its own labels it would not fall: the other's loss is to blame
        course.go(EVEN, agreement={"cats": 0.3, "dogs": 0.9})
        assert course.step < 80
    assert course.guard.interventions[1].action == "expert labels for all"
    assert course.guard.by_expert("dogs")
    assert course.guard.weight("cats") == 1


@pytest.mark.parametrize("images", [16, 1000])
def test_what_breaks_in_the_first_steps_is_taken_back_to_the_start(images):
    course = Course(images, may_ask_experts=True)
    course.go(EVEN, agreement={"cats": 1.0, "dogs": 0.9})
    while not course.guard.interventions:
        course.go(EVEN, agreement={"cats": 0.1, "dogs": 0.9})
        assert course.step < 20
    (done,) = course.guard.interventions
    assert (done.task, done.back_to) == ("cats", 0)
    assert course.parameter.item() == 0


def test_a_task_taken_back_three_times_ends_adaptation():
    course = Course()
    for _ in range(14):
        course.go(EVEN)
    while course.guard.stopped is None:
        course.go(ONE)
        assert course.step < 150
    assert course.guard.stopped == "task `cats` was taken back 3 times"
    assert course.guard.weight("cats") == course.guard.pace == 0.25**3


def spread(share: float) -> torch.Tensor:
    """A mean prediction whose entropy is higher for a higher share."""
    return share * EVEN + (1 - share) * ONE


@pytest.mark.parametrize("patience", [0, 30])
def test_adaptation_never_ends_with_parameters_that_were_taken_back(patience):
    """Whoever else got better by them."""
    course = Course(patience=patience)
    while course.guard.stopped is None:
        seen = course.guard._tasks["cats"].seen
        falls = seen >= 20 and (not patience or not course.guard.interventions)
        course.go(ONE if falls else EVEN, spread(min(1.0, 0.3 + 0.006 * course.step)))
        assert course.step < 200
    ends = {0: "task `cats` was taken back 3 times", 30: "no better mean score in 30 steps"}
    assert course.guard.stopped == ends[patience]
    last = course.guard.interventions[-1]
    if patience == 0:
        assert course.parameter.item() == last.back_to < last.step
    assert course.parameter.item() <= last.back_to or course.parameter.item() > last.step


def test_what_a_task_gained_by_parameters_that_were_taken_back_is_not_expected_of_it():
    course = Course(may_ask_experts=True)
    for _ in range(14):
        course.go(EVEN, agreement={"cats": 0.9, "dogs": 0.5})
    while not course.guard.interventions:
        course.go(EVEN, agreement={"cats": 0.3, "dogs": 0.95})  # at the others' expense
        assert course.step < 60
    assert course.guard.interventions[0].task == "cats"
    for _ in range(30):
        course.go(EVEN, agreement={"cats": 0.9, "dogs": 0.5})
    assert len(course.guard.interventions) == 1


def test_adaptation_ends_where_nothing_improves():
    course = Course(patience=10)
    for agreement in torch.linspace(0.5, 0.9, 20).tolist():
        course.go(EVEN, agreement=dict.fromkeys(("cats", "dogs"), agreement))
    assert course.guard.stopped is None
    while course.guard.stopped is None:
        course.go(EVEN, agreement=dict.fromkeys(("cats", "dogs"), 0.9))
        assert course.step < 120
    assert course.guard.stopped == "no better mean score in 10 steps"
    assert course.guard.interventions == []
    assert course.parameter.item() <= course.step - 10  # the best ones are put back, not the last


@pytest.mark.parametrize("images", [4, 16, 64])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_noise_alone_is_no_reason_to_act(images, share):
    """Twenty tasks whose predictions agree with their experts as often all the time, seen in small batches."""
    generator = torch.Generator().manual_seed(0)
    tasks = {str(n): 10 for n in range(20)}
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer("adam", [parameter], 0.1)
    guard = RollbackGuard(tasks, [parameter], may_ask_experts=True)
    for step in range(300):
        hits = (torch.rand(20, images, generator=generator) < share).float().mean(dim=1)
        classes = torch.randint(10, (20, images), generator=generator)
        means = {name: torch.bincount(classes[int(name)], minlength=10) / images for name in tasks}
        agreement = {name: hits[int(name)].item() for name in tasks}
        guard.update(step, means, agreement, [torch.zeros(1)], optimizer, images)
    assert guard.interventions == []


def test_a_fall_onto_one_class_is_seen_although_the_expert_was_never_agreed_with():
    course = Course(may_ask_experts=True)
    for _ in range(14):
        course.go(EVEN, agreement={"cats": 0.2, "dogs": 0.9})
    while not course.guard.interventions:
        course.go(ONE, agreement={"cats": 0.18, "dogs": 0.9})
        assert course.step < 40
    assert course.guard.interventions[0].measure == "marginal entropy"


def test_deciding_for_what_the_expert_says_is_no_collapse():
    course = Course(may_ask_experts=True)
    for _ in range(14):
        course.go(EVEN, agreement={"cats": 0.2, "dogs": 0.9})
    for _ in range(30):  # images of one class, which the expert knows
        course.go(ONE, agreement={"cats": 0.95, "dogs": 0.9})
    assert course.guard.interventions == []


def test_a_guard_that_goes_on_does_what_the_first_would_have():
    first, second = Course(), Course()
    for course in (first, second):
        for _ in range(14):
            course.go(EVEN)
        course.go(ONE)
    state, tensors = json.loads(json.dumps(second.guard.state())), second.guard.tensors()
    resumed = RollbackGuard({"cats": 4, "dogs": 4}, [second.parameter])
    resumed.restore(state, tensors)
    second.guard = resumed
    for course in (first, second):
        for _ in range(20):
            course.go(ONE)
    assert first.guard.interventions
    assert first.guard.interventions == second.guard.interventions
    assert first.guard.pace == second.guard.pace < 1
    resumed = RollbackGuard({"cats": 4, "dogs": 4}, [second.parameter])
    resumed.restore(json.loads(json.dumps(second.guard.state())), second.guard.tensors())
    assert resumed.pace == second.guard.pace
    assert first.parameter.item() == second.parameter.item()


def test_only_states_that_may_be_put_back_are_kept():
    course = Course()
    for share in torch.linspace(0.7, 0.25, 40).tolist():
        rest = (1 - share) / 3
        course.go(torch.tensor([share, rest, rest, rest]))
    assert len(course.guard.tensors()) <= 2  # one a task


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_rises_and_falls(schedule):
    rate = LearningRate(2.0, schedule, warmup_steps=4, max_steps=20)
    values = [rate.at(step) for step in range(20)]
    assert values[0] == pytest.approx(0.5)
    assert values == sorted(values[:4]) + values[4:]
    assert max(values) <= 2.0
    if schedule == "cosine":
        assert values[10] == pytest.approx(1.0)
        assert values[4:] == sorted(values[4:], reverse=True)
        assert values[-1] < 0.02
    else:
        assert set(values[4:]) == {2.0}
