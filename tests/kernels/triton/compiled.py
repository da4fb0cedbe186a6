"""Compile every kernel as PyTorch's functions start it, for GPUs that need not be there.

Run in a process of its own, where Triton is not interpreted: prints the kernels that were compiled,
by name, with how often.
"""

import collections

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokengate.kernels import triton as kernels
from tokengate.kernels.triton import dropping, learning, rows, scaling, sizes, summing

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
# Bytes of shared memory that consumer cards have for a block.
SHARED = 99 * 1024
compiled = collections.Counter()


def kind_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


class Compiler:
    """Takes the place of `wrap_triton`: compiles what would be started, for one capability."""

    def __init__(self):
        self.capability, self.seen = 80, set()

    def __call__(self, kernel):
        return self.Launch(self, kernel)

    class Launch:
        def __init__(self, compiler, kernel):
            self.compiler, self.kernel = compiler, kernel

        def __getitem__(self, grid):
            assert all(isinstance(size, int) and size > 0 for size in grid)
            return self.compile

        def compile(self, *args, **constants):
            options = {"num_warps": constants.pop("num_warps", 4)}
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            fixed = {
                name: value for name, value in given.items() if value is None or name in constants
            }
            signature = {
                name: "constexpr" if name in fixed else kind_of(value)
                for name, value in given.items()
            }
            key = (self.kernel.__name__, *signature.items(), *fixed.items(), *options.items())
            if key in self.compiler.seen:
                return
            self.compiler.seen.add(key)
            target = GPUTarget("cuda", self.compiler.capability, 32)
            source = ASTSource(self.kernel, signature, fixed)
            made = triton.compile(source, target=target, options=options)
            assert made.metadata.shared <= SHARED
            compiled[self.kernel.__name__] += 1


def main():
    compiler = Compiler()
    for module in (dropping, learning, rows, scaling, sizes, summing):
        module.wrap_triton = compiler
    n, channels, width = 40, 300, 200
    seed, a = torch.tensor(3), torch.ones(n)
    # Of each way through a kernel one.
    for dtype, rank, compiler.capability in ((torch.float32, 5, 80), (torch.bfloat16, 100, 90)):
        gained = dtype == torch.float32
        out, grad = (torch.zeros(n, channels, dtype=dtype) for _ in range(2))
        bias, gain = (torch.zeros(channels, dtype=dtype) if gained else None for _ in range(2))
        z, up = torch.zeros(n, rank, dtype=dtype), torch.zeros(channels, rank, dtype=dtype)
        sums = kernels.measure(out, bias, None, z, up, gain)
        kernels.gated_sum(out, bias, z, up, gain, a if gained else None)
        kernels.weigh(z, z, a, torch.zeros(3, n) if gained else None, True, True, True)
        kernels.thin(out, seed, 0.1)
        factor, columns = torch.zeros(channels, rank), torch.zeros(rank)
        kernels.scale_up(factor, None if gained else columns, 0.5, dtype)
        kernels.scale_down(up, factor, None if gained else columns, 0.5)
        weight, down = torch.zeros(channels, width, dtype=dtype), torch.zeros(rank, width)
        magnitude = torch.zeros(channels)
        began = magnitude if gained else None
        of_rows = kernels.measure_rows(weight, down, factor, 0.5, magnitude, began)
        kernels.scale_rows(factor, magnitude, began, *of_rows, 0.5, dtype, gained)
        kernels.unscale_rows(up, up[:, 0].contiguous(), factor, magnitude, magnitude, 0.5)
        if gained:
            kernels.pass_gain(grad, out, bias, gain, a, True)
            continue
        kernels.measure(out, None, out, None, None, None)
        # Of few positions other blocks.
        kernels.measure(out[:1], None, None, z[:1], up, None)
        kernels.gated_sum_(out[:1], None, z[:1], up, None, a[:1].bool())
        kernels.weigh(z, z, None, None, False, True, False)
        kernels.pass_gain(grad, out, None, up[:, 0].contiguous(), None, False)
        kernels.add_thinned_(out, out, seed, 0.1)
    kernels.finish(sums)
    kernels.decide(sums, torch.zeros(1), torch.float32)
    kernels.decide(sums, torch.zeros(1), torch.bool)
    mu = torch.zeros(n)
    kernels.direct(mu, a, a.bool(), torch.zeros(()), 0.0, torch.float32)
    kernels.direct(mu, a, None, None, 0.5, torch.float32)
    for name, count in sorted(compiled.items()):
        print(name, count)


if __name__ == "__main__":
    main()
