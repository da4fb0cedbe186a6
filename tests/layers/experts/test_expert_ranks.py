"""DDP and FSDP2: two processes train experts as one does on the whole batch."""

import expert_ranks
import torch
import two_ranks


def test_two_processes_are_one(processes, tmp_path):
    two_ranks.wait_for(two_ranks.start(processes, expert_ranks.both, tmp_path))
    taus, values = expert_ranks.training("")
    assert (taus[-1] - taus[0]).abs().max() > 1e-3
    for found_taus, found in torch.load(tmp_path / "found.pt").values():
        torch.testing.assert_close(found_taus, taus)
        assert found.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(found[name], value)
