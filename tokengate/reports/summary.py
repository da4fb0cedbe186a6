"""A report in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tokengate.errors import listed
from tokengate.reports.module_sparsity import ModuleSparsity


def summary(
    modules: Mapping[str, ModuleSparsity], sparsity: float, std: float, token_sparsity: float
) -> str:
    """What the averages of a report are, and which of its modules are in none, or broken."""
    called = sum(not math.isnan(module.sparsity) for module in modules.values())
    parts = [
        f"sparsity {100 * sparsity:.1f} % (std {100 * std:.1f}) over {called} modules",
        f"{100 * token_sparsity:.1f} % of all positions left unmodified",
    ]
    if called < len(modules):
        parts.append(f"{len(modules) - called} modules were never called")
    broken = [f"{name} ({m.broken_tau})" for name, m in modules.items() if m.broken_tau]
    if broken:
        parts.append(f"tau is not finite in {listed(broken)}")
    return "; ".join(parts)
