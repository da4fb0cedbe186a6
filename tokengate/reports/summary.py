"""A report in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tokengate.reports.module_sparsity import ModuleSparsity

_SHOWN = 5


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
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        parts.append(f"tau is not finite in {', '.join(broken[:_SHOWN])}{more}")
    return "; ".join(parts)
