"""State-dict algebra."""

from __future__ import annotations

import pytest
import torch
from helpers import copied, same_state

from fusion_merge.errors import ConfigError, ModelError
from fusion_merge.task_vectors import (
    check_same_shapes,
    difference,
    magnitude_prune,
    shapes_of,
    simple_average,
    static_merge,
    task_arithmetic,
    truncated_svd,
)


def _states(num_models: int = 3) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "scale": ()}

    def draw(step: int) -> dict[str, torch.Tensor]:
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return state | {"steps": torch.tensor([step, 7])}

    return draw(100), [draw(i) for i in range(num_models)]


def test_difference_is_finetuned_minus_pretrained():
    pretrained, (finetuned, *_) = _states()
    vector = difference(finetuned, pretrained)
    assert torch.equal(vector["fc.weight"], finetuned["fc.weight"] - pretrained["fc.weight"])


def test_difference_leaves_out_integer_buffers():
    pretrained, (finetuned, *_) = _states()
    assert set(difference(finetuned, pretrained)) == {"fc.weight", "fc.bias", "scale"}


def test_task_arithmetic_adds_the_scaled_sum_of_task_vectors():
    pretrained, finetuned = _states()
    merged = task_arithmetic(pretrained, finetuned, 0.3)
    for name in ("fc.weight", "fc.bias", "scale"):
        expected = pretrained[name] + 0.3 * sum(state[name] - pretrained[name] for state in finetuned)
        torch.testing.assert_close(merged[name], expected)


def test_task_arithmetic_with_zero_scaling_is_the_pretrained_model():
    pretrained, finetuned = _states()
    assert same_state(task_arithmetic(pretrained, finetuned, 0.0), pretrained)


def test_task_arithmetic_of_one_model_with_scaling_one_is_that_model():
    pretrained, (finetuned, *_) = _states()
    merged = task_arithmetic(pretrained, [finetuned], 1.0)
    torch.testing.assert_close(merged["fc.weight"], finetuned["fc.weight"])


def test_simple_average_is_the_mean_of_the_finetuned_models():
    pretrained, finetuned = _states()
    merged = simple_average(pretrained, finetuned)
    for name in ("fc.weight", "fc.bias", "scale"):
        torch.testing.assert_close(merged[name], torch.stack([s[name] for s in finetuned]).mean(dim=0))


def test_static_merge_hands_over_base_sum_and_count():
    pretrained, finetuned = _states(2)
    seen = []

    def combine(base: torch.Tensor, total: torch.Tensor, count: int) -> torch.Tensor:
        seen.append(count)
        return total - base

    merged = static_merge(pretrained, finetuned, combine)
    total = sum(s["fc.bias"] - pretrained["fc.bias"] for s in finetuned)
    torch.testing.assert_close(merged["fc.bias"], total - pretrained["fc.bias"])
    assert seen == [2, 2, 2]


def test_static_merge_accepts_a_generator_of_models():
    pretrained, finetuned = _states()
    assert same_state(simple_average(pretrained, iter(finetuned)), simple_average(pretrained, finetuned))


def test_static_merge_without_models_is_refused():
    with pytest.raises(ModelError, match="at least one"):
        simple_average(_states()[0], [])


def test_integer_buffers_are_those_of_the_pretrained_model():
    pretrained, finetuned = _states()
    assert torch.equal(task_arithmetic(pretrained, finetuned, 0.3)["steps"], torch.tensor([100, 7]))


def test_merging_changes_no_input_and_shares_no_memory_with_them():
    pretrained, finetuned = _states()
    before = [copied(s) for s in (pretrained, *finetuned)]
    for merged in (task_arithmetic(pretrained, finetuned, 0.0), simple_average(pretrained, finetuned)):
        for tensor in merged.values():
            tensor.zero_()
    assert all(same_state(s, b) for s, b in zip((pretrained, *finetuned), before, strict=True))


def test_a_finetuned_state_in_half_precision_merges_in_the_precision_of_the_pretrained_one():
    pretrained, (finetuned, *_) = _states()
    half = {n: t.half() if t.is_floating_point() else t for n, t in finetuned.items()}
    assert task_arithmetic(pretrained, [half], 0.3)["fc.weight"].dtype == torch.float32


@pytest.mark.parametrize("merge", [difference, lambda f, p: task_arithmetic(p, [f], 0.3)], ids=["difference", "merge"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "lacks `fc.bias`"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpectedly, `extra`"),
        (lambda s: s.update({"fc.weight": torch.zeros(4, 3)}), r"`fc.weight` of shape \(4, 3\).*\(3, 4\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_states_that_do_not_fit_are_refused_by_tensor_name(merge, change, message):
    pretrained, (finetuned, *_) = _states()
    change(finetuned)
    with pytest.raises(ModelError, match=message):
        merge(finetuned, pretrained)


def test_many_missing_tensors_are_counted_not_listed():
    reference = {f"layer{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(ModelError, match="and 3 more"):
        check_same_shapes(reference, {})


def test_the_shapes_of_a_lazy_state_are_read_without_its_tensors():
    class Lazy(dict):
        shapes = {"fc.weight": (3, 4)}  # noqa: RUF012

        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError("a tensor was read")

    assert shapes_of(Lazy({"fc.weight": None})) == {"fc.weight": (3, 4)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(1,), (7,), (11, 10), (5, 3, 4)])
def test_pruning_keeps_what_lies_above_the_quantile(shape, ratio):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    kept = tensor.abs() > torch.quantile(tensor.abs(), ratio)
    assert torch.equal(magnitude_prune(tensor, ratio), tensor * kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_pruning_at_ratio_zero_still_drops_exactly_the_smallest_entry(dtype):
    tensor = (torch.arange(7, 16, dtype=torch.float64) / 10).to(dtype)  # 0.7 in float32 is below 0.7
    pruned = magnitude_prune(tensor, 0.0)
    assert torch.equal(pruned[1:], tensor[1:])
    assert pruned[0] == 0
    assert pruned.dtype == dtype


def test_pruning_drops_all_entries_that_tie_with_the_threshold():
    tensor = torch.tensor([1.0, -2.0, 2.0, 2.0, -3.0])
    assert torch.equal(magnitude_prune(tensor, 0.5), torch.tensor([0.0, 0.0, 0.0, 0.0, -3.0]))


def test_pruning_half_precision_keeps_an_entry_just_above_an_interpolated_threshold():
    tensor = torch.tensor([1.0, 1.0 + 2**-10], dtype=torch.float16)  # neighbours in float16
    assert torch.equal(magnitude_prune(tensor, 0.9), torch.tensor([0.0, 1.0 + 2**-10], dtype=torch.float16))


def test_pruning_equal_entries_leaves_nothing():
    assert not magnitude_prune(torch.ones(8), 0.0).any()


def test_pruning_keeps_signs_and_rescales_nothing():
    tensor = torch.tensor([0.1, -5.0, 0.2, 4.0])
    assert torch.equal(magnitude_prune(tensor, 0.5), torch.tensor([0.0, -5.0, 0.0, 4.0]))


def test_pruning_an_empty_tensor_gives_an_empty_tensor():
    assert magnitude_prune(torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_pruning_goes_beyond_the_size_that_torch_quantile_takes():
    tensor = torch.arange(2**24 + 8, dtype=torch.int32).float()
    assert magnitude_prune(tensor, 0.75).count_nonzero().item() == tensor.numel() // 4


def test_pruning_does_not_change_its_input():
    tensor = torch.randn(20)
    before = tensor.clone()
    magnitude_prune(tensor, 0.5).zero_()
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_pruning_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ConfigError, match=r"`prune_ratio`=.* outside \[0, 1\)"):
        magnitude_prune(torch.ones(3), ratio)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("rank", [1, 3, -1])
def test_truncated_svd_is_the_best_approximation_of_its_rank(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, right = truncated_svd(matrix, rank)
    u, s, vh = torch.linalg.svd(matrix)
    k = min(shape) if rank == -1 else rank
    assert (left.shape, right.shape) == ((shape[0], k), (k, shape[1]))
    torch.testing.assert_close(left @ right, u[:, :k] @ s[:k].diag() @ vh[:k], atol=1e-5, rtol=1e-5)


def test_truncated_svd_gives_orthonormal_columns_and_descending_scaled_rows():
    matrix = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    left, right = truncated_svd(matrix, 4)
    torch.testing.assert_close(left.T @ left, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(right.norm(dim=1), torch.linalg.svdvals(matrix)[:4])


def test_truncated_svd_of_zero_adds_nothing():
    left, right = truncated_svd(torch.zeros(4, 3), 2)
    assert not (left @ right).any()


def test_truncated_svd_gives_contiguous_factors_in_the_dtype_of_the_matrix():
    left, right = truncated_svd(torch.randn(4, 3).to(torch.bfloat16), 2)
    assert left.dtype == right.dtype == torch.bfloat16
    assert left.is_contiguous()
    assert right.is_contiguous()


@pytest.mark.parametrize("rank", [0, -2, 4])
def test_impossible_ranks_are_refused_with_the_possible_ones(rank):
    with pytest.raises(ConfigError, match=rf"`rank`={rank} .*\(5, 3\).*1-3 or -1"):
        truncated_svd(torch.zeros(5, 3), rank)


def _with_spectrum(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator)).Q
    return left * values @ right.T


SPECTRA = {
    "fast": torch.logspace(0, -6, 256),
    "slow": torch.linspace(1.0, 0.5, 256),
    "power law": torch.arange(1, 257) ** -0.5,
    "steps": torch.cat([torch.full((10,), 5.0), torch.full((246,), 0.1)]),
    "low rank": torch.cat([torch.linspace(2.0, 1.0, 8), torch.zeros(248)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_truncated_svd_of_a_large_matrix_is_the_best_approximation_to_a_ten_thousandth(spectrum, rows_first, rank):
    matrix = _with_spectrum(SPECTRA[spectrum], 512, 256)
    matrix = matrix if rows_first else matrix.T.contiguous()
    left, right = truncated_svd(matrix, rank)
    best = torch.linalg.svdvals(matrix.double())[rank:].norm()
    residual = (matrix.double() - left.double() @ right.double()).norm()
    assert residual <= best * (1 + 1e-4) + 2e-6 * matrix.norm()
    torch.testing.assert_close(left.T @ left, torch.eye(rank), atol=1e-4, rtol=0)
    norms = right.norm(dim=1)
    assert (norms.diff() <= 1e-4 * norms[0]).all()


def test_truncated_svd_of_a_large_matrix_is_the_same_every_time():
    matrix = _with_spectrum(SPECTRA["power law"], 512, 256)
    first = truncated_svd(matrix, 8)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(matrix, 8), strict=True))


@pytest.mark.parametrize(("spectrum", "whole"), [("low rank", True), ("power law", False), ("fast", False)])
def test_the_whole_decomposition_is_made_only_where_iteration_does_not_do(monkeypatch, spectrum, whole):
    shapes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, *a: (shapes.append(min(m.shape)), svd(m, *a))[1])
    truncated_svd(_with_spectrum(SPECTRA[spectrum], 512, 256), 16)
    assert (256 in shapes) == whole


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_truncated_svd_of_a_large_matrix_of_nearly_nothing(value):
    left, right = truncated_svd(torch.full((512, 256), value), 8)
    assert torch.isfinite(left).all()
    assert (left @ right).abs().max() <= 2 * value
