#!/usr/bin/env python3
"""Reports what nvcc made of the kernels, as Markdown: docs/kernels.md holds its output.

    tools/kernel_report.py [LIBRARY]      default: build-cuda/kernels/libpt_kernels_cuda.a

One line a kernel: registers a thread, bytes of stack and of static shared memory,
instructions that touch local memory (LDL, STL: a spill, or an array the compiler could not keep in
registers), global loads (asynchronous copies to shared memory among them) and stores of 16 bytes
among all of them, and matrix instructions of tensor cores. Needs cuobjdump and nvdisasm
(of a toolkit, or of deploy/setup.sh --cuda). Exits 1 if a kernel touches local memory.
"""

import collections
import glob
import os
import re
import shutil
import subprocess
import sys

TYPES = ["f32", "f16", "bf16", "f8_e4m3", "f8_e5m2", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def tool_folder() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return os.path.dirname(found)
    pattern = os.path.join(ROOT, "build/tools/cuda/lib/python3*/site-packages/nvidia/cu13/bin")
    for folder in ["/usr/local/cuda/bin", *glob.glob(pattern)]:
        if os.path.exists(os.path.join(folder, "cuobjdump")):
            return folder
    sys.exit("kernel_report: no cuobjdump: install a CUDA toolkit, or run deploy/setup.sh --cuda")


def demangle(names: list[str]) -> dict[str, str]:
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True,
                         check=True).stdout.split("\n")
    short = {}
    for mangled, name in zip(names, out):
        name = re.sub(r"pagetide::kernels::|\(anonymous namespace\)::|^void ", "", name)
        name = re.sub(r"\(.*", "", re.sub(r"\((\w+)\)(\d+)", r"\2", name))
        # The only integer argument of these two is the KvType.
        short[mangled] = re.sub(r"^(ConvertRowsKernel<|RopeShiftKernel<)(\d+)",
                                lambda match: match[1] + TYPES[int(match[2])], name)
        # Whether bf16, warps of 16 or 64 query rows, how wide the values.
        short[mangled] = re.sub(
            r"<device::(?:FloatMath|TensorMath<(\w+), (\d), \d, (\d)>) ?>",
            lambda match: "<f32>" if match[1] is None else
            f"<{'bf16' if match[1] in ('true', '1') else 'f16'}, {'16' if match[2] == '1' else '64'}"
            f" rows, {64 * int(match[3])} wide>", short[mangled])
    return short


def main() -> None:
    library = sys.argv[1] if len(sys.argv) > 1 else os.path.join(
        ROOT, "build-cuda/kernels/libpt_kernels_cuda.a")
    folder = tool_folder()
    environment = {**os.environ, "PATH": folder + ":" + os.environ["PATH"]}

    def cuobjdump(option: str) -> str:
        return subprocess.run([os.path.join(folder, "cuobjdump"), option, library], env=environment,
                              capture_output=True, text=True, check=True).stdout

    rows = collections.defaultdict(dict)  # (kernel, architecture) -> column -> value
    arch = kernel = ""
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+?):?$", line):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            rows[kernel, arch].update(registers=match[1], stack=match[2], shared=match[3])
    counts = collections.defaultdict(collections.Counter)
    for line in cuobjdump("-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", line):
            opcode = match[1].split(".")
            if opcode[0] in ("LDL", "STL"):
                counts[kernel, arch]["local"] += 1
            elif opcode[0] in ("HMMA", "IMMA"):
                counts[kernel, arch]["matrix"] += 1
            elif opcode[0] in ("LDG", "LDGSTS", "STG", "LD", "ST"):  # LD, ST: space not known
                name = opcode[0][:2] + "G"
                counts[kernel, arch][name] += 1
                counts[kernel, arch][name + ".128"] += "128" in opcode
    if not rows:
        sys.exit(f"kernel_report: no kernels in {library}")
    names = demangle(sorted({kernel for kernel, _ in rows}))
    kernels = sorted({kernel for kernel, _ in rows}, key=lambda kernel: names[kernel])
    archs = sorted({arch for _, arch in rows}, key=lambda arch: int(arch[3:]))

    def each(kernel, value):
        values = [str(value(rows[kernel, arch], counts[kernel, arch])) for arch in archs]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    print("Columns with several values give them for " + " / ".join(archs) + ".\n")
    print("| kernel | registers | stack | shared | local accesses | 16-byte loads of all | "
          "16-byte stores of all | matrix |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel in kernels:
        columns = [f"`{names[kernel]}`"]
        columns += [each(kernel, lambda row, _, c=c: row[c])
                    for c in ("registers", "stack", "shared")]
        columns.append(each(kernel, lambda _, count: count["local"]))
        for opcode in ("LDG", "STG"):
            columns.append(each(kernel, lambda _, count, o=opcode:
                                f"{count[o + '.128']} of {count[o]}"))
        columns.append(each(kernel, lambda _, count: count["matrix"]))
        print("| " + " | ".join(columns) + " |")
    if any(count["local"] for count in counts.values()):
        sys.exit("kernel_report: a kernel touches local memory")


if __name__ == "__main__":
    main()
