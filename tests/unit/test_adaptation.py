"""Test-time adaptation: objectives, the guard, the loop, and Fabric."""

from __future__ import annotations

import copy
import csv
import errno
import logging
import os
import signal
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from helpers import copied, random_linear, same_state, upcycled_toy
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from torch import nn

from fusion_merge.adaptation.guard import CollapseGuard
from fusion_merge.adaptation.loop import AdaptationRecord, adapt
from fusion_merge.adaptation.objectives import entropy, make_objective, mean_entropy
from fusion_merge.adaptation.optimization import LearningRate, Update, make_optimizer
from fusion_merge.adaptation.passes import TaskStream
from fusion_merge.adaptation.rollback import RollbackGuard
from fusion_merge.adaptation.runtime import make_fabric, placement_of
from fusion_merge.errors import AdaptationError, ConfigError
from fusion_merge.moe import Routing, SoftTopK
from fusion_merge.moe.layer import router_parameters

TASKS = ("cats", "dogs")


def _batches(seed: int, size: int = 8) -> Iterator[tuple[torch.Tensor, None]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(size, 3, 6, generator=generator), None


def _streams(**replaced: Iterator) -> dict[str, TaskStream]:
    heads = [random_linear(6, 4, seed=i).requires_grad_(False) for i in range(len(TASKS))]
    for head in heads:
        head.weight.mul_(0.2)  # predictions that are not certain yet
    return {task: TaskStream(replaced.get(task, _batches(i)), heads[i], num_classes=4) for i, task in enumerate(TASKS)}


def _adapt(model: nn.Module, streams=None, parameters=None, fabric=None, **options) -> AdaptationRecord:
    options = {"objective": mean_entropy, "lr": 1e-2, "max_steps": 5} | options
    return adapt(
        model,
        router_parameters(model) if parameters is None else parameters,
        streams or _streams(),
        fabric=fabric or make_fabric(accelerator="cpu"),
        **options,
    )


def _logged(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(file.read_text().splitlines()))


def _routers(model: nn.Module) -> dict[str, torch.Tensor]:
    return copied({n: p for n, p in model.named_parameters() if ".router." in n})


def test_entropy_is_the_published_formula():
    logits = 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    p = logits.double().exp() / logits.double().exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(entropy(logits).double(), -(p * p.log()).sum(dim=-1), atol=1e-6, rtol=1e-5)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_the_number_of_classes():
    torch.testing.assert_close(entropy(torch.zeros(2, 10)), torch.full((2,), 10.0).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_and_its_gradient_are_finite_for_extreme_logits(dtype):
    logits = torch.tensor([[6e4, -6e4, 0.0], [0.0, -6e4, -6e4]], dtype=dtype, requires_grad=True)
    value = mean_entropy(logits)
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_entropy_is_formed_in_full_precision_from_half_precision_logits():
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).half()
    assert entropy(logits).dtype == torch.float32
    torch.testing.assert_close(entropy(logits), entropy(logits.float()))


def test_the_objective_is_the_mean_over_the_batch():
    logits = torch.randn(5, 7)
    torch.testing.assert_close(make_objective("entropy")(logits), entropy(logits).mean())


def test_an_unknown_objective_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"`objective`='entrpy': there is no .* `entrpy`; did you mean `entropy`"):
        make_objective("entrpy")


def _one_class(label: int, size: int = 16) -> torch.Tensor:
    return torch.full((size,), label)


def _mixed(size: int = 16) -> torch.Tensor:
    return torch.arange(size) % 4


def test_the_guard_warns_once_when_a_task_collapses_and_says_since_when(caplog):
    guard = CollapseGuard({"cats": 4}, window=64, threshold=0.8)
    for step in range(3):
        guard.update(step, "cats", _mixed())
    with caplog.at_level(logging.WARNING):
        for step in range(3, 12):
            guard.update(step, "cats", _one_class(2))
    (warning,) = caplog.messages
    assert "task `cats` collapses: since step 3, nearly all of its predictions are class 2" in warning
    assert guard.collapsed == {"cats": 3}


@pytest.mark.parametrize(("batch", "healthy"), [(4, 1), (1, 6), (16, 1), (128, 1)])
def test_the_guard_notices_a_collapse_within_the_first_steps(batch, healthy):
    guard = CollapseGuard({"cats": 10})
    for step in range(200):
        guard.update(step, "cats", torch.arange(batch) + step if step < healthy else _one_class(7, batch))
    assert abs(guard.collapsed["cats"] - healthy) <= max(1, 8 // batch)


def test_the_guard_does_not_accuse_a_task_of_one_class_from_the_start(caplog):
    guard = CollapseGuard({"cats": 4}, window=64, threshold=0.8)
    for step in range(9):
        guard.update(step, "cats", _one_class(1))
    assert not guard.collapsed
    assert not caplog.messages


def test_the_guard_does_not_judge_by_too_few_predictions():
    guard = CollapseGuard({"cats": 4})
    shares = [guard.update(step, "cats", _mixed(4) if step == 0 else _one_class(0, 4)) for step in range(7)]
    assert shares[0] == 0.25
    assert shares[-1] == 25 / 28
    assert not guard.collapsed


def test_the_guard_watches_tasks_apart():
    guard = CollapseGuard({"cats": 4, "dogs": 4}, window=32, threshold=0.8)
    for step in range(4):
        guard.update(step, "cats", _mixed() if step == 0 else _one_class(3))
        guard.update(step, "dogs", _mixed())
    assert guard.collapsed == {"cats": 1}


@pytest.mark.parametrize("kind", ["dense", "sparse", "low_rank"])
@pytest.mark.parametrize("routing", list(Routing))
def test_adaptation_lowers_the_entropy(kind, routing):
    streams = _streams(**{task: repeat(next(_batches(seed))) for seed, task in enumerate(TASKS)})
    record = _adapt(upcycled_toy(kind, routing=routing), streams, max_steps=40)
    first, *_, last = [sum(record.losses[task][step] for task in TASKS) for step in range(40)]
    assert last < 0.9 * first


def test_only_the_given_parameters_change():
    model = upcycled_toy()
    before = copied(model.state_dict())
    given = model.layers[1].router.out.bias
    _adapt(model, parameters=[given])
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"layers.1.router.out.bias"}


def test_heads_do_not_change():
    streams = _streams()
    before = {task: copied(s.head.state_dict()) for task, s in streams.items()}
    _adapt(upcycled_toy(), streams)
    assert all(same_state(s.head.state_dict(), before[task]) for task, s in streams.items())


def test_one_batch_of_each_task_is_taken_a_step():
    taken = []

    def counted(task: str, seed: int) -> Iterator:
        for batch in _batches(seed):
            taken.append(task)
            yield batch

    _adapt(upcycled_toy(), _streams(cats=counted("cats", 0), dogs=counted("dogs", 1)), max_steps=3)
    assert taken == ["cats", "dogs"] * 3


def test_labels_are_never_looked_at():
    class Unreadable:
        def __getattr__(self, name: str):
            raise AssertionError("a label was looked at")

    def labelled() -> Iterator:
        for pixels, _ in _batches(0):
            yield pixels, Unreadable()

    assert _adapt(upcycled_toy(), _streams(cats=labelled())).steps == 5


def test_gradient_accumulation_gives_the_same_gradients():
    gradients = []
    for accumulate in (True, False):
        model = upcycled_toy()
        _adapt(model, optimizer="sgd", lr=1.0, max_steps=1, use_grad_accumulate=accumulate)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n in gradients[0] if ".router." in n}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_the_gradient_is_that_of_the_sum_over_tasks():
    model, reference = upcycled_toy(), upcycled_toy()
    loss = sum(mean_entropy(s.head(reference(next(s.batches)[0]))) for s in _streams().values())
    loss.backward()
    _adapt(model, optimizer="sgd", lr=1.0, max_steps=1)
    torch.testing.assert_close(model.layers[0].router.out.weight.grad, reference.layers[0].router.out.weight.grad)


def test_after_a_task_was_taken_back_steps_are_of_a_quarter_of_the_rate(monkeypatch):
    rates = []
    monkeypatch.setattr(Update, "take", lambda self, step, pace: rates.append((step, pace)))

    def update(self: RollbackGuard, step: int, *_: object) -> bool:
        if step == 1:
            self._take_back("cats", "marginal entropy", step)
        return step == 1

    def watched(self: RollbackGuard, step: int, means, agreement, before, *_: object) -> bool:
        if step == 0:
            for task, mean in means.items():
                self._take_in(task, mean, None)
                self._remember(task, step, [p.detach().clone() for p in self._parameters], 16)
        return update(self, step)

    monkeypatch.setattr(RollbackGuard, "update", watched)
    _adapt(upcycled_toy(), max_steps=4, rollback=True)
    assert rates == [(0, 1.0), (1, 1.0), (2, 0.25), (3, 0.25)]
    rates.clear()
    _adapt(upcycled_toy(), max_steps=2)
    assert rates == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize("pace", [1.0, 0.25])
def test_a_step_is_as_long_as_its_pace(pace):
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer = torch.optim.SGD([parameter], lr=7.0)
    Update([parameter], optimizer, LearningRate(0.5), "routers").take(0, pace)
    torch.testing.assert_close(parameter.detach(), -0.5 * pace * parameter.grad)


def test_gradients_do_not_pile_up_over_steps():
    model, reference = upcycled_toy(), upcycled_toy()
    _adapt(model, optimizer="sgd", lr=1e-30, max_steps=3)
    streams = _streams()
    for _ in range(3):
        reference.zero_grad()
        sum(mean_entropy(s.head(reference(next(s.batches)[0]))) for s in streams.values()).backward()
    torch.testing.assert_close(model.layers[0].router.out.weight.grad, reference.layers[0].router.out.weight.grad)


@pytest.mark.parametrize("accumulate", [True, False])
def test_the_same_seed_gives_the_same_routers_bit_for_bit(accumulate):
    model = upcycled_toy(depth=2)
    again = copy.deepcopy(model)
    first = _adapt(model, use_grad_accumulate=accumulate)
    torch.rand(3)
    second = _adapt(again, use_grad_accumulate=accumulate)
    assert same_state(_routers(model), _routers(again))
    assert first.losses == second.losses


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_optimizers_go_by_name(optimizer):
    model = upcycled_toy()
    before = _routers(model)
    _adapt(model, optimizer=optimizer)
    assert not same_state(_routers(model), before)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_no_optimizer_decays_weights(optimizer):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    make_optimizer(optimizer, [parameter], lr=1.0).step()
    assert torch.equal(parameter.data, torch.ones(3))


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"`optimizer`='adamm' is unknown; did you mean `adam`"):
        _adapt(upcycled_toy(), optimizer="adamm")


def test_no_steps_change_nothing():
    model = upcycled_toy()
    before = _routers(model)
    record = _adapt(model, max_steps=0)
    assert same_state(_routers(model), before)
    assert (record.steps, record.losses) == (0, {"cats": [], "dogs": []})


def _broken_at(step: int, value: float) -> Iterator:
    for index, (pixels, labels) in enumerate(_batches(1)):
        yield (torch.full_like(pixels, value) if index == step else pixels), labels


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_the_task_and_keeps_the_last_routers_with_which_all_were(accumulate, value):
    model, reference = upcycled_toy(), upcycled_toy()
    with pytest.raises(AdaptationError, match="task `dogs` is nan at step 2"):
        _adapt(model, _streams(dogs=_broken_at(2, value)), use_grad_accumulate=accumulate)
    _adapt(reference, max_steps=1, use_grad_accumulate=accumulate)
    assert same_state(_routers(model), _routers(reference))


def test_a_gradient_that_is_no_number_stops_before_routers_are_spoilt():
    class NanGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    calls = []

    def objective(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = mean_entropy(logits)
        return NanGradient.apply(loss) if len(calls) == 2 * len(TASKS) else loss  # the last of two steps

    model, reference = upcycled_toy(), upcycled_toy()
    with pytest.raises(AdaptationError, match="would not be finite after step 1; they are kept as they were"):
        _adapt(model, objective=objective, max_steps=2)
    _adapt(reference, max_steps=1)
    assert same_state(_routers(model), _routers(reference))


def test_banks_are_not_kept_expanded_for_the_gradient():
    """A sparse bank would otherwise cost a dense one for each layer and task."""
    kept = []
    model = upcycled_toy("sparse", routing=Routing.BATCH)
    known = {t.data_ptr() for t in model.state_dict().values()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(2, 3, 6)).sum()
    assert max(kept) < 3 * 6 * 10  # tasks, width, hidden


def _interrupting_at(*steps: int) -> Iterator:
    for index, batch in enumerate(_batches(0)):
        if index in steps:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


def test_ctrl_c_ends_after_the_step_under_way_and_keeps_the_routers(caplog):
    model, reference = upcycled_toy(), upcycled_toy()
    record = _adapt(model, _streams(cats=_interrupting_at(2)), max_steps=10)
    _adapt(reference, max_steps=3)
    assert record.interrupted
    assert record.steps == len(record.losses["cats"]) == 3
    assert same_state(_routers(model), _routers(reference))
    assert "interrupted after step 3 of 10" in caplog.text


def test_a_second_ctrl_c_interrupts_for_good():
    def twice() -> Iterator:
        for batch in _batches(0):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        _adapt(upcycled_toy(), _streams(cats=twice()))


@pytest.mark.parametrize("ends_by", ["itself", "error"])
def test_ctrl_c_means_again_what_it_meant_before(ends_by):
    before = signal.getsignal(signal.SIGINT)
    if ends_by == "itself":
        _adapt(upcycled_toy(), max_steps=1)
    else:
        with pytest.raises(AdaptationError):
            _adapt(upcycled_toy(), _streams(dogs=_broken_at(0, float("nan"))))
    assert signal.getsignal(signal.SIGINT) is before


def test_an_undisturbed_adaptation_records_every_step():
    record = _adapt(upcycled_toy(), max_steps=4)
    assert (record.interrupted, record.steps, record.collapsed) == (False, 4, {})
    assert [len(values) for values in record.losses.values()] == [4, 4]


def test_the_adapted_model_is_the_plain_module_it_was_in_eval_mode():
    model = upcycled_toy()
    names = list(model.state_dict())
    _adapt(model)
    assert list(model.state_dict()) == names
    assert not model.training
    pixels, _ = next(_batches(3))
    assert torch.equal(copy.deepcopy(model)(pixels), model(pixels))


def test_a_collapsed_task_is_recorded():
    class Collapsing(nn.Module):
        calls = 0

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            spread = torch.eye(4)[torch.arange(len(pooled)) % 4]
            logits = spread if self.calls == 1 else torch.eye(4)[0].expand(len(pooled), 4)
            return logits + 0.0 * pooled[:, :4]

    streams = {"cats": TaskStream(_batches(0, size=128), Collapsing(), 4)}
    assert _adapt(upcycled_toy(), streams, max_steps=3).collapsed == {"cats": 1}


def test_metrics_are_logged_for_each_task_and_step(tmp_path):
    record = _adapt(upcycled_toy(), fabric=make_fabric(accelerator="cpu", log_dir=tmp_path), max_steps=4)
    rows = _logged(tmp_path)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    for task in TASKS:
        assert [float(row[f"entropy/{task}"]) for row in rows] == pytest.approx(record.losses[task])
        assert all(0 < float(row[f"top_class_share/{task}"]) <= 1 for row in rows)
    mean = [sum(record.losses[task][i] for task in TASKS) / 2 for i in range(4)]
    assert [float(row["entropy/mean"]) for row in rows] == pytest.approx(mean)


def test_logs_of_a_run_before_are_replaced_without_a_warning(tmp_path):
    for steps in (4, 2):
        _adapt(upcycled_toy(), fabric=make_fabric(accelerator="cpu", log_dir=tmp_path), max_steps=steps)
    assert len(_logged(tmp_path)) == 2


def test_an_interrupted_adaptation_has_its_logs_written(tmp_path):
    fabric = make_fabric(accelerator="cpu", log_dir=tmp_path)
    _adapt(upcycled_toy(), _streams(cats=_interrupting_at(1)), fabric=fabric)
    assert len(_logged(tmp_path)) == 2


def test_a_failed_adaptation_has_its_logs_written(tmp_path):
    fabric = make_fabric(accelerator="cpu", log_dir=tmp_path)
    with pytest.raises(AdaptationError):
        _adapt(upcycled_toy(), _streams(dogs=_broken_at(2, float("nan"))), fabric=fabric)
    assert len(_logged(tmp_path)) == 2


def test_mixed_precision_keeps_routers_in_full_precision():
    model, exact = upcycled_toy(), upcycled_toy()
    options = {"optimizer": "sgd", "lr": 1e-2, "max_steps": 3}
    _adapt(model, fabric=make_fabric(accelerator="cpu", precision="bf16-mixed"), **options)
    before = _routers(exact)
    _adapt(exact, **options)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in _routers(exact).items():
        moved = (value - before[name]).norm()
        assert (_routers(model)[name] - value).norm() < 0.1 * moved  # in the same direction, to bfloat16's rounding


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_routers_in_half_precision_are_refused(precision):
    with pytest.raises(ConfigError, match=f"`fabric.precision`={precision} stores what is trained in half precision"):
        _adapt(upcycled_toy(), fabric=make_fabric(accelerator="cpu", precision=precision))


def test_coefficients_are_averaged_and_selected_in_full_precision():
    model = upcycled_toy("low_rank", selection=SoftTopK(2))
    layer, tokens = model.layers[0], torch.randn(4, 200, 6, generator=torch.Generator().manual_seed(0))
    layer.router.out.weight.data *= 0.01
    exact = layer.coefficients(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.coefficients(tokens)
    torch.testing.assert_close(mixed, exact)  # float32 both


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator": "nonsense"},
        {"accelerator": "mps"},
        {"accelerator": "cpu", "devices": 0},
        {"accelerator": "cpu", "devices": "many"},
        {"accelerator": "cpu", "precision": "17-true"},
        {"accelerator": "cpu", "strategy": "nonsense"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_what_the_machine_does_not_have_is_refused(options):
    name, value = list(options.items())[-1]
    with pytest.raises(ConfigError, match=f"`fabric` cannot have .*{name}={value!r}"):
        make_fabric(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_cuda_is_refused_where_there_is_none(accelerator):
    with pytest.raises(ConfigError, match=f"accelerator='{accelerator}'"):
        make_fabric(accelerator=accelerator)


def test_a_single_process_has_all_of_the_work():
    placement = placement_of(make_fabric(accelerator="cpu"))
    assert (placement.device, placement.rank, placement.world_size) == (torch.device("cpu"), 0, 1)


class _FullDisk(Logger):
    """A logger that cannot write from its second line on."""

    name, version, root_dir = "full", "", "logs"

    def __init__(self) -> None:
        self.lines = 0

    def log_metrics(self, metrics, step=None) -> None:
        self.lines += 1
        if self.lines > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def log_hyperparams(self, *_args, **_options) -> None: ...


def test_a_log_that_cannot_be_written_costs_nothing_else(caplog):
    logger = _FullDisk()
    fabric = Fabric(accelerator="cpu", loggers=[logger])
    full, expected = upcycled_toy(), upcycled_toy()
    assert _adapt(full, fabric=fabric, max_steps=4).losses == _adapt(expected, max_steps=4).losses
    assert same_state(full.state_dict(), expected.state_dict())
    assert logger.lines == 2
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == "logs in `logs` cannot be written (No space left on device): going on without them"
