"""fuse(): makes the chains convolution, batch norm, ReLU, max-pool of a model that exists run as fused operators.

    convolution, [norm,] ReLU            conv(x, norm=norm, relu=True)
    convolution, norm                    conv(x, norm=norm)
    [convolution, [norm,]] ReLU, pool    pool(conv(x, norm=norm), relu=True): nobody keeps the tensor before the pool
    pool                                 pool(x): keeps a uint8 index instead of the input and an int64 index

Chains reach across containers, so they are looked for in *regions*: modules whose whole forward `torch.fx` can trace,
as large as possible. `trace` turns a forward into a graph, and refuses one that does what a graph would lose; `chains`
rewrites the graph by the table above; `analysis` does both for all of a model and makes the rewritten graphs programs.
A region's module then gets a subclass of its class whose forward runs its program (`fusing`); every module stays the
object it is. A trace freezes what the forward decided in Python: before each run `region` compares what that was with
what it is now, attributes, children and hooks, and where something has changed the module's own forward runs instead.
"""

from kernels.fusion.fusing import fuse, fusion_report
from kernels.fusion.report import Fusion

__all__ = ["Fusion", "fuse", "fusion_report"]
