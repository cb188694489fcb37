"""A fit that the disk has no room for ends before it begins; too little memory is told."""

import logging

import pytest

from safer_ray.errors import UserError
from safer_ray.pipeline.fit import Estimate, check_room

SMALL = Estimate(3, 4, 64, 4, 100, 1000, 1000, 0.1, 0.001, 0.001)


def test_a_disk_without_room_is_refused(tmp_path):
    check_room(SMALL, tmp_path)
    with pytest.raises(UserError, match=r"about 1000000\.0 GB are wanted in .*, and its disk has .* GB free"):
        check_room(SMALL._replace(disk_gb=1e6), tmp_path)


def test_too_little_memory_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_room(SMALL, tmp_path)
        assert not caplog.records
        check_room(SMALL._replace(memory_gb=1e6), tmp_path)
    assert "GB of memory will be used" in caplog.text
