"""Costs of EasyRef on this machine: `python tools/bench [--parts encode,unet,load] [--quick]`.

    encode   encoding.py   time and memory of encoding a group of references
    stages   stages.py     time of each stage of encoding, cold and after another prompt
    unet     unet.py       cost of the reference term in a step of SDXL's UNet: operations, time, memory
    load     loading.py    time and memory of loading a checkpoint, size held by precision

Weights are random, of the released shapes, so nothing is downloaded; `--quick` takes small shapes, for tests.
Times are of interleaved pairs (timing.py): both ways run in turn, the order swapped every other pair, after
one unmeasured run each. A row's value is the median, its ratio the median of the pairs' own ratios, its
spread their quartiles. So other load on the machine slows both of a pair, and not one of two blocks.

A part is a module with one function,

    measure(options: Options, say: Callable[[str], None]) -> list[Row]

report.py has Options and Row. `say` takes lines of progress. A part that lacks something (a package, memory,
disk) reports that and leaves the rows out, or names in a row what was made smaller.
"""
