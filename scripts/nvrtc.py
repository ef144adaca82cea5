"""Compiles CUDA units with every NVRTC of this environment and prints what ptxas makes of them. Called by nvrtc.sh.

usage: nvrtc.py UNITS ARCH...      one <kernel>.cu per kernel in UNITS; an architecture such as 90, or 13:90 for that NVRTC alone; of several
                                   joined by commas each unit has one, in turns
"""

import ctypes
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# As kernels/device/cuda.rs compiles them.
OPTIONS = ["--std=c++17", "--generate-line-info"]
# Where the packages of pip put NVRTC and ptxas, below nvidia/.
TOOLCHAINS = [("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_nvcc/bin/ptxas"), ("cu13/lib/libnvrtc.so.13", "cu13/bin/ptxas")]
COLUMNS = ["kernel", "arch", "NVRTC", "registers", "shared", "stack", "spill stores", "spill loads", "verdict"]


class Nvrtc:
    def __init__(self, path):
        # NVRTC looks for its built-ins by name: they are there when they are loaded already.
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(path))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"
        count = ctypes.c_int()
        self.check(self.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self.check(self.lib.nvrtcGetSupportedArchs(archs))
        self.archs = set(archs)

    def check(self, code):
        if code:
            raise RuntimeError("NVRTC: " + self.lib.nvrtcGetErrorString(code).decode())

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.check(getattr(self.lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.value.decode(errors="replace")

    def ptx(self, name, source, arch):
        """PTX or None, and the log."""
        program = ctypes.c_void_p()
        self.check(self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
        try:
            options = [option.encode() for option in OPTIONS + [f"--gpu-architecture=compute_{arch}"]]
            code = self.lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            log = self.text(program, "ProgramLog").strip()
            if code and not log:
                log = self.lib.nvrtcGetErrorString(code).decode()
            return (None if code else self.text(program, "PTX")), log
        finally:
            self.lib.nvrtcDestroyProgram(ctypes.byref(program))


def entry_report(log, kernel):
    """Registers, shared bytes, stack bytes, spill stores and loads of one entry in the output of `ptxas -v`."""
    parts = re.split(r"Compiling entry function '([^']+)'", log)
    for name, body in zip(parts[1::2], parts[2::2]):
        if name == kernel:

            def number(pattern):
                found = re.search(pattern, body)
                return int(found.group(1)) if found else 0

            patterns = [r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"]
            return [number(pattern) for pattern in patterns]
    return None


def spill_reason(unit):
    """The reason after `spill:` in the comment at the head of the kernel's own file, the last file of the unit."""
    files = [text for name, text in re.findall(r'^#line 1 "([^"]+)"\n(.*?)(?=^#line|\Z)', unit, re.M | re.S) if name.endswith(".cu")]
    head = re.match(r"(?:\s*//.*\n)*", files[-1] if files else unit).group(0)
    found = re.search(r"spill:[ \t]*(\S.*)", head)
    return found.group(1).strip() if found else None


def assemble(ptxas, ptx, arch):
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "unit.ptx"
        path.write_text(ptx, encoding="utf-8")
        out = subprocess.run([str(ptxas), "-v", f"-arch=sm_{arch}", "-o", os.devnull, str(path)], capture_output=True, text=True)
        return out.returncode == 0, out.stdout + out.stderr


def compile_unit(nvrtc, assembler, name, source, arch):
    """What NVRTC says, and what ptxas says of its PTX; None where there is none."""
    ptx, log = nvrtc.ptx(f"{name}.cu", source, arch)
    return ptx is not None, log, assemble(assembler, ptx, arch) if ptx is not None else (False, "")


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    units, turns = Path(sys.argv[1]), [[arch.rpartition(":") for arch in turn.split(",")] for turn in sys.argv[2:]]
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(units.glob("*.cu"))}
    if not sources:
        sys.exit(f"{units} holds no units")
    place = {source: i for i, source in enumerate(dict.fromkeys(sources.values()))}
    root = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    failures, rows, jobs = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for library, assembler in TOOLCHAINS:
            nvrtc = Nvrtc(root / library)
            # Kernels of one file and the same constants share a unit: it is compiled once.
            compiled = {}
            for kernel, source in sources.items():
                for turn in turns:
                    only, _, arch = turn[place[source] % len(turn)]
                    arch = int(arch)
                    if arch not in nvrtc.archs or only not in ("", nvrtc.version.split(".")[0]):
                        continue
                    if (source, arch) not in compiled:
                        compiled[source, arch] = pool.submit(compile_unit, nvrtc, root / assembler, kernel, source, arch)
                    jobs.append((kernel, arch, nvrtc.version, compiled[source, arch]))
        shown = set()
        for kernel, arch, version, job in jobs:
            where = f"{kernel}, sm_{arch}, NVRTC {version}"
            compiles, log, (ok, assembled) = job.result()
            if log and job not in shown:
                print(f"--- {where}\n{log}\n", flush=True)
            shown.add(job)
            if not compiles:
                failures.append(f"{where}: does not compile")
                rows.append([kernel, f"sm_{arch}", version, "", "", "", "", "", "does not compile"])
                continue
            # A unit with storage in 16 bits has its entry's name without the storage.
            entry = re.sub(r"_b?f16$", "", kernel) if "#define STORED_16\n" in sources[kernel] else kernel
            # One that simulates a market model, without the model.
            if "#define MODEL " in sources[kernel]:
                entry = re.sub(r"_[a-z]+(_futures)?$", "", kernel)
            report = entry_report(assembled, entry) if ok else None
            verdict = "ok"
            if report is None:
                print(f"--- {where}\n{assembled}\n", flush=True)
                verdict = "no entry of this name" if ok else "does not assemble"
                failures.append(f"{where}: {verdict}")
            elif report[3] or report[4]:
                reason = spill_reason(sources[kernel])
                verdict = f"spill: {reason}" if reason else "spills"
                if not reason:
                    failures.append(f"{where}: spills {report[3]} bytes; change the kernel, or explain it in the .cu's head after `spill:`")
            rows.append([kernel, f"sm_{arch}", version] + [str(value) for value in report or [""] * 5] + [verdict])
    rows.sort(key=lambda row: (row[0], int(row[1][3:]), row[2]))
    widths = [max(len(row[i]) for row in [COLUMNS] + rows) for i in range(len(COLUMNS))]
    for row in [COLUMNS] + rows:
        print("  ".join(cell.ljust(width) if i in (0, 1, 2, 8) else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip())
    print(f"{len(sources)} kernels, {len(rows)} compilations, {len(failures)} failures")
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
