"""The one state that Accelerate keeps for the whole process."""

from accelerate.state import AcceleratorState, GradientState


def reset():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
