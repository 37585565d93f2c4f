"""What a row says of its machine."""

from __future__ import annotations

import torch

from tmbench.results import environment


def test_a_processors_name_has_single_spaces(monkeypatch):
    monkeypatch.setattr(environment, "_processor", lambda: "Intel(R) Xeon(R) CPU           E5-2670  0 @ 2.60GHz")
    here = environment.current(torch.device("cpu"))
    assert here.device_name.startswith("Intel(R) Xeon(R) CPU E5-2670 0 @ 2.60GHz, ")
    assert "  " not in here.device_name
    assert here.device.startswith("cpu-intel-xeon")
