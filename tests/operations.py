"""The operations that run, counted as a device is asked for them."""

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "reshape", "select",
    "slice", "split", "squeeze", "t", "transpose", "unflatten", "unsqueeze", "view",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """The names of all operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return f(*args, **(kwargs or {}))
