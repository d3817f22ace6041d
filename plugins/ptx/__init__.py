"""A PTX machine: the compiled kernels on a CPU, every access checked and counted.

It runs the PTX that the assembler turned into a chip's image, all lanes of all CTAs of a launch at once, and reports accesses out of
bounds or misaligned, reads of what nobody wrote, races within and between CTAs, two values that one instruction stores to one
address, and reads of asynchronous copies in flight. With `profile` it also counts what a launch issues.

    memory = GlobalMemory()
    address = memory.allocate("query", query_bytes, writable=False)
    kernel = Kernel(ptx_text, shared_bytes=49152)
    kernel.launch(memory, grid=(3, 4, 1), arguments=[address, 5, 0.125])
    memory.reports.faults  # empty for a kernel without a fault

`python -m fna.plugins.ptx check` runs every kernel that the build compiled, `count` counts what a call issues.
"""

from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.memory import GlobalMemory
from fna.plugins.ptx.parsing import UnmodelledInstructionError
from fna.plugins.ptx.reports import Fault, Report, Reports

__all__ = ["Fault", "GlobalMemory", "Kernel", "Report", "Reports", "UnmodelledInstructionError"]
