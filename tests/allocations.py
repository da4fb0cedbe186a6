"""What a step allocates, as PyTorch's profiler sees it."""

import gc

from torch.profiler import ProfilerActivity, profile


def largest_allocation(step):
    """Bytes, of all that is allocated while `step` runs."""
    return max(allocations_of(step))


def peak_allocation(step):
    """Bytes, that are held at once at most while `step` runs."""
    held = peak = 0
    for size in allocations_of(step):
        held += size
        peak = max(peak, held)
    return peak


def allocations_of(step):
    """Bytes in the order of time, negative where they are given back."""
    gc.collect()  # or what an earlier step left as garbage is given back in the middle of this one
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
