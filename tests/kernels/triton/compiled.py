"""Compile every kernel as PyTorch's functions start it, for a GPU that need not be there.

Run in a process of its own, `python compiled.py CAPABILITY ...`, where Triton is not interpreted:
prints the kernels that were compiled, by name, with how often.
"""

import collections
import sys

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
compiled = collections.Counter()


def kind_of(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


class Compiler:
    """Takes the place of `wrap_triton`: compiles, for all targets, what would be started."""

    def __init__(self, targets):
        self.targets, self.seen = targets, set()

    def __call__(self, kernel):
        return self.Launch(self, kernel)

    class Launch:
        def __init__(self, compiler, kernel):
            self.compiler, self.kernel = compiler, kernel

        def __getitem__(self, grid):
            assert all(isinstance(size, int) and size > 0 for size in grid)
            return self.compile

        def compile(self, *args, **constants):
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            fixed = {
                name: value for name, value in given.items() if value is None or name in constants
            }
            signature = {
                name: "constexpr" if name in fixed else kind_of(value)
                for name, value in given.items()
            }
            source = (self.kernel.__name__, *signature.items(), *fixed.items())
            if source in self.compiler.seen:
                return
            self.compiler.seen.add(source)
            for target in self.compiler.targets:
                triton.compile(ASTSource(self.kernel, signature, fixed), target=target)
            compiled[self.kernel.__name__] += 1


def main():
    compiler = Compiler([GPUTarget("cuda", int(each), 32) for each in sys.argv[1:]])
    for module in (dropping, learning, rows, scaling, sizes, summing):
        module.wrap_triton = compiler
    n, channels, width = 40, 300, 200
    seed, a = torch.tensor(3), torch.ones(n)
    for dtype, rank in ((torch.float32, 5), (torch.bfloat16, 32), (torch.float16, 100)):
        out, grad = (torch.zeros(n, channels, dtype=dtype) for _ in range(2))
        bias, gain = (torch.zeros(channels, dtype=dtype) for _ in range(2))
        z, up = torch.zeros(n, rank, dtype=dtype), torch.zeros(channels, rank, dtype=dtype)
        sums = kernels.measure(out, None, None, z, up, None)
        for each in ((bias, None, z, up, gain), (None, out, None, None, None)):
            kernels.measure(out, *each)
        # Of few positions other blocks.
        kernels.measure(out[:1], None, None, z[:1], up, None)
        kernels.gated_sum(out[:1], None, z[:1], up, None, a[:1])
        for weights in (a, a.bool(), None):
            for of_w in (None, gain):
                kernels.gated_sum(out, bias, z, up, of_w, weights)
        kernels.gated_sum_(out, None, z, up, None, a)
        for weights in (a, None):
            kernels.weigh(z, z, weights, torch.zeros(3, n), True, True, True)
            kernels.pass_gain(grad, out, bias, gain, weights, True)
            kernels.pass_gain(grad, out, None, gain, weights, False)
        kernels.weigh(z, z, a.bool(), None, False, True, False)
        kernels.thin(out, seed, 0.1)
        kernels.add_thinned_(out, out, seed, 0.1)
        factor, columns = torch.zeros(channels, rank), torch.zeros(rank)
        for each in (columns, None):
            kernels.scale_up(factor, each, 0.5, dtype)
            kernels.scale_down(up, factor, each, 0.5)
        weight, down = torch.zeros(channels, width, dtype=dtype), torch.zeros(rank, width)
        magnitude = torch.zeros(channels)
        for began in (magnitude, None):
            of_rows = kernels.measure_rows(weight, down, factor, 0.5, magnitude, began)
            for writes in (True, False):
                kernels.scale_rows(factor, magnitude, began, *of_rows, 0.5, dtype, writes)
        kernels.unscale_rows(up, gain, factor, magnitude, magnitude, 0.5)
    kernels.finish(sums)
    kernels.decide(sums, torch.zeros(1), torch.float32)
    kernels.decide(sums, torch.zeros(1), torch.bool)
    mu, pull = torch.zeros(n), torch.zeros(())
    for mask in (None, a.bool(), a.long(), a):
        kernels.direct(mu, a, mask, None, 0.5, torch.float32)
    kernels.direct(mu, a, None, pull, 0.0, torch.float32)
    for name, count in sorted(compiled.items()):
        print(name, count)


if __name__ == "__main__":
    main()
