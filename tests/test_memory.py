"""Memory: sizes read, peaks measured, rows chosen within a limit, and fewer of them after running out."""

import math

import pytest
import torch
from prefdyn.lens import alignment, memory
from prefdyn.lens.batch import Batch
from toys.models import build, random_batch

MB = 10**6


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("512 MB", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 3kb ", 3000),
        ("2 KiB", 2048),
        ("1TiB", 2**40),
        ("0.5tb", 5 * 10**11),
        ("7B", 7),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert memory.parse(text) == size


@pytest.mark.parametrize("text", ["20", "GB", "20 G", "-1GB", "0MB", "1e3MB", "nanGB", "20GB/s", "", "1,5GB"])
def test_other_texts_are_refused_and_what_is_allowed_is_said(text):
    with pytest.raises(ValueError, match=r"memory='.*': must be a positive number and a unit, such as 20GB or 512MiB"):
        memory.parse(text)


def test_sizes_are_said_in_a_unit_that_suits():
    said = {0: "0.0 B", 999: "999.0 B", 1500: "1.5 KB", 2 * 10**9: "2.0 GB", 3 * 10**15: "3000.0 TB"}
    assert {size: memory.readable(size) for size in said} == said


def touched(megabytes: int) -> torch.Tensor:
    """A tensor of this size, every page of it in use."""
    return torch.ones(megabytes * MB // 4)


def test_a_peak_is_what_was_in_use_at_once_above_the_start():
    """Not what is left, not what came before, and not the sum of what came one after the other."""
    kept = touched(100)

    def in_turn():
        for _ in range(4):
            touched(60)

    peak = memory.peak(in_turn, "cpu")
    assert 55 * MB < peak < 90 * MB
    assert 110 * MB < memory.peak(lambda: (touched(60), touched(60)), "cpu") < 150 * MB
    assert memory.peak(lambda: None, "cpu") < 5 * MB
    assert memory.peak(in_turn, "cpu") > 55 * MB  # again, though the pages may be the same
    assert memory.held("cpu") > 100 * MB and len(kept)


def test_where_a_peak_cannot_be_reset_it_is_bounded_from_below(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(memory, "_most_resident", iter([100, 250, 250, 250]).__next__)
    assert memory.peak(lambda: None, "cpu") == 150
    assert memory.peak(lambda: None, "cpu") == 0


def planted(monkeypatch, need):
    """Let a pass of n rows need `need(n)` bytes; returns the list of passes made."""
    made: list[int] = []
    monkeypatch.setattr(memory, "peak", lambda function, device=None: function())

    def cost(rows: int) -> int:
        made.append(rows)
        return need(rows)

    return cost, made


def test_rows_by_hand(monkeypatch):
    """100 MB and 10 MB a row, of 1 GB a tenth left free: (900 - 100) / 10 = 80 rows; more than 30 are not asked for."""
    cost, made = planted(monkeypatch, lambda n: (100 + 10 * n) * MB)
    found = memory.rows_within(1000 * MB, cost, most=500)
    assert made == [1, 1, 4] and found.measured == {1: 110 * MB, 4: 140 * MB}
    assert (found.rows, found.fixed, found.each) == (80, 100 * MB, 10 * MB)
    assert found.expected == 900 * MB
    assert str(found) == (
        "80 rows a pass, expected to need 900.0 MB of 1.0 GB (10% is left free; measured: 110.0 MB at 1, 140.0 MB at 4)"
    )
    assert memory.rows_within(1000 * MB, cost, most=30).rows == 30
    assert memory.rows_within(1000 * MB, cost, most=3).measured.keys() == {1, 3}


@pytest.mark.parametrize("limit", [120, 130, 200, 333, 1000, 54321])
@pytest.mark.parametrize(("fixed", "each"), [(100, 10), (0, 17), (7, 40.5), (119, 1)])
def test_the_largest_number_within_the_limit_by_trying_all(monkeypatch, limit, fixed, each):
    cost, _ = planted(monkeypatch, lambda n: int((fixed + each * n) * MB))
    fitting = [n for n in range(1, 400) if (fixed + each * n) * MB <= (1 - memory.SAFETY) * limit * MB]
    found = memory.rows_within(limit * MB, cost, most=399)
    assert found.rows == max([1, *fitting])  # one alone may go into what is left free
    assert cost(found.rows) <= limit * MB


def test_what_a_row_adds_is_looked_for_among_noise(monkeypatch):
    """Pages and work spaces of +- 1 MB hide 0.2 MB a row at 4 rows, not at 64."""
    noise = {1: 1.0, 4: -1.0, 16: 0.5, 64: -1.0}
    cost, made = planted(monkeypatch, lambda n: int((50 + 0.2 * n + noise[n]) * MB))
    found = memory.rows_within(1000 * MB, cost, most=10**5)
    assert made == [1, 1, 4, 16, 64]
    assert found.rows == pytest.approx((900 - 50) / 0.2, rel=0.2)
    cost, made = planted(monkeypatch, lambda n: 50 * MB)
    assert memory.rows_within(1000 * MB, cost, most=100).rows == 100  # no row adds anything
    assert made == [1, 1, 4, 16, 64, 100]


def test_one_row_that_does_not_fit_is_an_error_with_numbers(monkeypatch):
    cost, made = planted(monkeypatch, lambda n: (1200 + n) * MB)
    with pytest.raises(memory.DoesNotFit, match=r"one row needs 1\.2 GB, and the limit is 1\.0 GB"):
        memory.rows_within(1000 * MB, cost, most=8)
    assert set(made) == {1}

    def out(rows: int):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    with pytest.raises(memory.DoesNotFit, match=r"one row does not fit: out of memory \(CUDA out of memory.* 3 GiB\)"):
        memory.rows_within(1000 * MB, out, most=8)
    for limit, most in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=rf"limit={limit}, most={most}: must be at least 1"):
            memory.rows_within(limit, cost, most)


def test_one_row_is_the_answer_where_two_run_out(monkeypatch):
    def need(rows: int) -> int:
        if rows > 1:
            raise MemoryError
        return 700 * MB

    cost, made = planted(monkeypatch, need)
    assert memory.rows_within(1000 * MB, cost, most=8).rows == 1 and made == [1, 1, 2]

    def wrong(rows: int) -> int:
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        memory.rows_within(1000 * MB, wrong, most=8)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_rows_are_halved_until_they_fit(error):
    tried = []

    def function(rows: int) -> str:
        tried.append(rows)
        if rows > 5:
            raise error
        return f"with {rows}"

    assert memory.fitting(function, 45) == ("with 5", 5)
    assert tried == [45, 22, 11, 5]
    assert memory.fitting(function, 3) == ("with 3", 3)


def test_what_torch_says_on_a_cpu_is_understood():
    """The real error of a real allocation of 2 EB."""
    assert memory.fitting(lambda rows: torch.empty(rows * 2**53).numel() if rows > 1 else 0, 64) == (0, 1)


def test_what_was_tried_is_said_when_nothing_fits():
    def function(rows: int):
        raise ERRORS[0]

    said = r"out of memory with 7 rows, then 3 rows, then 1 row a pass: CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(memory.DoesNotFit, match=said):
        memory.fitting(function, 7)
    with pytest.raises(ValueError, match="rows=0: must be at least 1"):
        memory.fitting(function, 0)


def test_other_errors_are_not_swallowed():
    tried = []

    def function(rows: int):
        tried.append(rows)
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        memory.fitting(function, 8)
    assert tried == [8]


def test_what_the_failed_try_held_is_free_before_the_next():
    held = []

    class Large:
        def __del__(self):
            held.remove(id(self))

    def function(rows: int) -> int:
        assert not held
        large = Large()
        held.append(id(large))
        if rows > 1:
            raise MemoryError
        return rows

    assert memory.fitting(function, 4) == (1, 1)


def test_rows_of_a_real_measurement_stay_within_the_limit():
    """Scores of a tiny model on rows of 48 tokens with a wide vocabulary: fit on few rows, tried with those chosen."""
    model = build("llama", vocab_size=4000)
    rng = torch.Generator().manual_seed(0)
    shape = (512, 48)
    response = (torch.arange(48) >= 8).expand(shape)
    rows = Batch(torch.randint(1, 4000, shape, generator=rng), torch.ones(shape, dtype=torch.bool), response)
    direction = alignment.target_direction(model, random_batch(4, seed=2))

    def cost(n: int) -> None:
        alignment.token_scores(model, rows.rows(slice(0, n)), direction, size=n)

    limit = 120 * MB
    found = memory.rows_within(limit, cost, most=len(rows), device="cpu")
    need = memory.peak(lambda: cost(found.rows), "cpu")
    assert 4 < found.rows < len(rows)
    assert 0.5 * limit < need <= limit
    assert not math.isnan(found.expected) and abs(need - found.expected) < 0.4 * limit
