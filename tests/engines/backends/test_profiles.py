import pytest
import torch

from cinecat.engines.backends.contract import Bucket, Range, StackInputs
from cinecat.engines.backends.profiles import ShapeRange, hull, input_shapes, tightest
from cinecat.engines.errors import EngineError

UNIFORM = Bucket(Range(1, 2, 2), Range(320, 320, 320), Range(16, 32, 512))
CAT = Bucket(Range(1, 1, 2), Range(40, 160, 240), Range(16, 48, 256))


def forward(rows: int, tokens: int, text: int) -> StackInputs:
    empty = torch.empty(0)
    return StackInputs(
        torch.empty(rows, tokens, 8), empty, empty, empty, torch.empty(1, rows, text, 8), empty, empty, empty, empty
    )


def test_open_dimensions_take_the_buckets_ranges_and_the_others_stay():
    assert input_shapes("tokens", (-1, -1, 256), UNIFORM) == ShapeRange((1, 320, 256), (2, 320, 256), (2, 320, 256))
    assert input_shapes("text_keys", (6, -1, -1, 256), CAT) == ShapeRange(
        (6, 1, 16, 256), (6, 1, 48, 256), (6, 2, 256, 256)
    )
    assert input_shapes("slots", (-1,), CAT) == ShapeRange((1,), (1,), (2,))
    bank = (6, 9, 32, 256)
    assert input_shapes("bank_attn1_to_q_a", bank, CAT) == ShapeRange(bank, bank, bank)


def test_an_open_dimension_that_the_contract_closes_is_refused():
    with pytest.raises(EngineError, match="bank_attn1_to_q_a leaves dimension 1 open"):
        input_shapes("bank_attn1_to_q_a", (6, -1, 32, 256), CAT)


def test_a_forward_goes_to_the_smallest_bucket_that_covers_it():
    wide = Bucket(Range(1, 1, 4), Range(8, 160, 640), Range(16, 32, 512))
    buckets = (wide, UNIFORM, CAT)
    assert tightest(buckets, forward(1, 160, 16)) == 2
    assert tightest(buckets, forward(2, 320, 512)) == 1
    assert tightest(buckets, forward(4, 320, 512)) == 0
    assert tightest((UNIFORM, CAT), forward(1, 280, 16)) is None


def test_a_hull_covers_all_buckets_and_is_best_where_the_first_is():
    assert hull((UNIFORM, CAT)) == Bucket(Range(1, 2, 2), Range(40, 320, 320), Range(16, 32, 512))
