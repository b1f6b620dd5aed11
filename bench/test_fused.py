"""What SimpleNet's fused operators replace: PyTorch's chain, ours one after the other, and ours fused.

All three get the same channels-last operands (bench/gpu_check/chains.py says which). Each result is checked against
float64 before it is timed.
"""

from functools import partial

from bench.gpu_check import chains
from bench.gpu_check.chains import Operands
from bench.rows import worst_error
from bench.timing_rounds import copies_of, multiplying
from train.rehearsal import UNFUSED

BY = {"torch": chains.native, f"triton{UNFUSED}": chains.unfused, "triton": chains.ours}


def run(case, device, timed) -> None:
    """Times one row, unless its result is wrong."""
    chain, by = case.subject, BY[case.contender]
    operands = Operands.of(chain, device)
    exact = chains.native(chain, operands.double())
    with multiplying(chain):
        calls = [partial(by, chain, operands)]
        error = worst_error(calls[0](), exact)
        assert error <= case.tolerance, f"{case.contender} is wrong by {error:.1e}, so its time means nothing"
        del exact
        nbytes = sum(getattr(operands, name).nbytes for name in ("x", "w", "y", "dy"))
        calls += [partial(by, chain, Operands.of(chain, device)) for _ in range(copies_of(nbytes) - 1)]
        timed(calls, case, error=error)


def test_conv_relu(fused_case, device, timed):
    run(fused_case, device, timed)


def test_conv_relu_grad(fused_case, device, timed):
    run(fused_case, device, timed)


def test_bias_grad(fused_case, device, timed):
    run(fused_case, device, timed)


def test_relu_max_pool(fused_case, device, timed):
    run(fused_case, device, timed)


def test_relu_max_pool_grad(fused_case, device, timed):
    run(fused_case, device, timed)
