"""Tables that are to hold the same rows, numbers within a tolerance."""

import numpy as np
import pyarrow as pa

from support.tiny_run import tables


def leaves(column):
    array = column.combine_chunks()
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return array


def assert_same_rows(one, other, where):
    assert one.schema.equals(other.schema), where
    assert len(one) == len(other), where
    for name in one.column_names:
        a, b = leaves(one[name]), leaves(other[name])
        if pa.types.is_floating(a.type):
            tolerance = 2e-3 if pa.types.is_float16(a.type) else 1e-5
            left, right = (x.to_numpy(zero_copy_only=False) for x in (a, b))
            size = max(1.0, float(np.nanmax(np.abs(right), initial=0)))  # sums and differences round as their terms do
            np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance * size, err_msg=f"{where}: {name}")
        elif not pa.types.is_struct(a.type):
            assert a.equals(b), (where, name)


def assert_same_tables(ours, theirs):
    """All Parquet rows below two directories are equal."""
    found, wanted = tables(ours), tables(theirs)
    assert set(found) == set(wanted)
    for folder, rows in wanted.items():
        assert_same_rows(found[folder], rows, f"{theirs.name}/{folder}")
