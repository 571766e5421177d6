"""The state of this machine for training: libraries, processor, memory, cards, cache, connections.

    in    nothing; with `measure`, half a minute
    out   findings, each ok, a warning or a problem, with advice; a problem makes training impossible

This verb must work when a library is missing or broken, so it imports each library only to examine it, and reports an import error as a
finding. `--measure` stores its results in the cache as doctor.json.
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qlora_lite import OFFLINE_ASKED, show
from qlora_lite.device.tested import CARDS, on_cards
from qlora_lite.files.cache import default_cache
from qlora_lite.files.staging import free_bytes
from qlora_lite.memory.kept import KEPT, kept_measurement
from qlora_lite.units import format_bytes

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")  # each is imported
ENOUGH_MEMORY, ENOUGH_DISK = (
    3 * 2**30,
    10 * 2**30,
)  # bytes: the quickstart's process takes 1.4 GiB; an 8B base in NF4 5.6 GiB
LOOK_S = 0.5  # observation time for other programs
BUSY = 0.3  # load average per core above which times are unreliable
Facts = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One line: `what` was examined, `found` is its state; a warning or a problem has advice."""

    what: str
    level: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Examined:
    """The state of this machine."""

    findings: tuple[Finding, ...]
    facts: Facts  # the numbers by subject

    @property
    def can_train(self) -> bool:
        return not any(finding.level == PROBLEM for finding in self.findings)

    def to_json_dict(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"can_train": self.can_train, "findings": findings, **self.facts}


def doctor(*, measure: bool) -> Examined:
    """Examine this machine and show it. Raises UserError when measuring fails."""
    with show.phase("looking at this machine"):
        examined = examine()
    kept = default_cache() / KEPT
    measured = measure_and_keep(kept) if measure and examined.can_train else kept_measurement(kept)
    of_measured = measured_findings(measured, versions=examined.facts["versions"])
    examined = Examined((*examined.findings, *of_measured), examined.facts | {"measured": measured})
    show.show_findings([(finding.what, finding.level, finding.found, finding.advice) for finding in examined.findings])
    show.say(
        "training works here" if examined.can_train else "training cannot work here: see the problems above",
        style="bold",
    )
    return examined


def examine() -> Examined:
    """Look at every subject in order."""
    findings: list[Finding] = []
    facts: Facts = {}
    facts["python"] = look_at_python(findings)
    facts["versions"] = look_at_libraries(findings)
    loaded = {finding.what for finding in findings if finding.level != PROBLEM}
    looks: list[tuple[str, Callable[[list[Finding]], Any], str | None]] = [
        ("bitsandbytes", look_at_bitsandbytes, "bitsandbytes"),
        ("kernels", look_at_kernels, "bitsandbytes"),
        ("cpu", look_at_cpu, "torch"),
        ("other_work", look_at_other_work, None),
        ("memory", look_at_memory, None),
        ("cards", look_at_cards, "torch"),
        ("cache", look_at_cache, None),
        ("connections", look_at_connections, None),
    ]
    for name, look, needs in looks:
        facts[name] = look(findings) if needs is None or needs in loaded else None
    return Examined(tuple(findings), facts)


def look_at_python(findings: list[Finding]) -> Facts:
    version, wanted = platform.python_version(), in_words(own_requirements()[0])
    findings.append(
        Finding("python", OK, f"{version}, within {wanted}")
        if SpecifierSet(wanted).contains(version, prereleases=True)
        else Finding("python", PROBLEM, f"{version}; qlora_lite needs {wanted}", f"Install Python {wanted}")
    )
    return {"version": version, "wanted": wanted, "executable": sys.executable}


def look_at_libraries(findings: list[Finding]) -> dict[str, Facts]:
    """Versions against the ranges in this package's own metadata; LIBRARIES are imported too."""
    wanted = own_requirements()[1]
    facts, num_other = {}, 0
    for name in (*LIBRARIES, *(name for name in sorted(wanted) if name not in LIBRARIES)):
        finding, version = library_finding(name, wanted.get(name, SpecifierSet()))
        facts[name] = {"version": version, "wanted": in_words(wanted.get(name, SpecifierSet())), "level": finding.level}
        if name in LIBRARIES or finding.level != OK:
            findings.append(finding)
        else:
            num_other += 1
    if wanted:
        findings.append(Finding("other libraries", OK, f"{num_other} more, within their ranges"))
    else:
        advice = "Install it to get the version ranges of its libraries: pip install -e ."
        findings.append(Finding("qlora_lite", WARNING, "runs from source, not installed", advice))
    return facts


def own_requirements() -> tuple[SpecifierSet, dict[str, SpecifierSet]]:
    """-> (version range of Python, of each library by name), from this package's metadata; empty when it is not installed."""
    try:
        own = metadata.metadata("qlora-lite")
    except metadata.PackageNotFoundError:
        return SpecifierSet(), {}
    required = [Requirement(text) for text in own.get_all("Requires-Dist") or []]
    return SpecifierSet(own["Requires-Python"]), {r.name: r.specifier for r in required if r.marker is None}


def library_finding(name: str, wanted: SpecifierSet) -> tuple[Finding, str | None]:
    """-> (finding, version). A version older than wanted is a problem; a newer, untested one is a warning."""
    needed = in_words(wanted)
    install = f'Install it with: pip install "{name}{needed}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, PROBLEM, f"not installed; needs {needed}", install), None
    error = _import_error(name) if name in LIBRARIES else None
    if error is not None:
        return Finding(name, PROBLEM, f"{version} cannot be imported: {error}", install), version
    if wanted.contains(version, prereleases=True):
        return Finding(name, OK, f"{version}, within {needed}"), version
    is_older = any(s.operator == ">=" and Version(version) < Version(s.version) for s in wanted)
    found = f"{version}, {'older' if is_older else 'newer'} than {needed}"
    return Finding(name, PROBLEM if is_older else WARNING, found, install), version


def in_words(wanted: SpecifierSet) -> str:
    """`>=2.10,<2.15`, the lower bound first."""
    return ",".join(sorted(map(str, wanted), reverse=True))


def look_at_bitsandbytes(findings: list[Finding]) -> Facts:
    """Check its native library: without one, quantization on a card fails at first use, and the CPU takes slow code paths."""
    from qlora_lite.base.bnb import native_library

    path, error = native_library()
    is_for_cards, has_card = path is not None and "_cpu" not in Path(path).name, bool(_num_cards())
    name, advice = "bitsandbytes' native library", "Reinstall bitsandbytes; `python -m bitsandbytes` says more"
    if path is None:
        level = PROBLEM if has_card else WARNING
        findings.append(Finding(name, level, f"not loaded ({error})", advice))
    elif has_card and not is_for_cards:
        findings.append(Finding(name, PROBLEM, f"{Path(path).name} supports no card, and this machine has one", advice))
    else:
        findings.append(Finding(name, OK, f"{Path(path).name} loaded"))
    return {"native_library": path, "error": error}


def look_at_kernels(findings: list[Finding]) -> Facts:
    """Check that the import of bitsandbytes did not download and run a kernel (import_guard.py)."""
    from qlora_lite.base.bnb import runs_downloaded_kernel

    is_installed, is_loaded = importlib.util.find_spec("kernels") is not None, runs_downloaded_kernel()
    package = "the package kernels is installed" if is_installed else "the package kernels is not installed"
    findings.append(
        Finding(
            "downloaded kernels", PROBLEM, f"bitsandbytes runs one; {package}", "Import qlora_lite before bitsandbytes"
        )
        if is_loaded
        else Finding("downloaded kernels", OK, f"none: {package}; bitsandbytes is imported without it")
    )
    return {"is_installed": is_installed, "is_loaded": is_loaded}


def look_at_cpu(findings: list[Finding]) -> Facts:
    import torch

    from qlora_lite.device.accelerator import cpu_multiplies_bf16

    facts = {
        "name": _cpu_name(),
        "num_cores": os.cpu_count() or 1,
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "has_bf16_products": cpu_multiplies_bf16(),
        "has_avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "has_amx": bool(torch.cpu._is_amx_tile_supported()),
    }
    cores = f"{facts['name']}, usable cores: {facts['num_usable_cores']}, torch threads: {facts['num_threads']}, {facts['capability']}"
    types = "multiplies bf16" if facts["has_bf16_products"] else "does not multiply bf16, so model.dtype: auto is fp32"
    findings.append(Finding("processor", OK, f"{cores}; {types}"))
    return facts


def look_at_other_work(findings: list[Finding]) -> Facts | None:
    """Observe for half a second: threads that wait for one another at every product lose more than the share that other programs take."""
    if _import_error("psutil") is not None:  # named above
        return None
    from qlora_lite.memory import host

    work = host.OtherWork()
    time.sleep(LOOK_S)
    cores = work.cores()
    remark = host.in_words(cores)
    if remark is None:
        findings.append(Finding("other programs", OK, f"they take {cores:.1f} cores"))
    else:
        advice = "Steps take longer and measured times are unreliable: wait, or close them"
        findings.append(Finding("other programs", WARNING, remark, advice))
    return {"cores": cores}


def look_at_memory(findings: list[Finding]) -> Facts:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, limit = _free_memory(), _container_limit(total)
    allowed = limit or total
    state = f"{format_bytes(total)}, {'unknown' if free is None else format_bytes(free)} free"
    if limit is not None:
        state += f"; this container may use {format_bytes(limit)}"
    if min(allowed, free if free is not None else allowed) < ENOUGH_MEMORY:
        advice = f"Close other programs: the smallest run needs about {format_bytes(ENOUGH_MEMORY)}, loading included"
        findings.append(Finding("memory", WARNING, state, advice))
    elif allowed < total:
        advice = "Plans for the CPU use the machine's memory as the budget: set --budget"
        findings.append(Finding("memory", WARNING, state, advice))
    else:
        findings.append(Finding("memory", OK, state))
    return {"total_bytes": total, "free_bytes": free, "container_limit_bytes": limit}


def look_at_cards(findings: list[Finding]) -> list[Facts]:
    import torch

    facts = []
    for index in range(_num_cards()):
        facts.append(card_facts(index))
        findings.append(card_finding(facts[-1], archs=torch.cuda.get_arch_list()))
    if not facts:
        findings.append(no_card_finding(torch.version.cuda))
    findings += [Finding("tested", *tested_on(card["name"])) for card in facts]
    return facts


def tested_on(name: str) -> tuple[str, str, str]:
    """-> (level, state, advice): the tests of this program on this type of card."""
    if name in CARDS:
        return OK, f"the checks of tools/gpu_check passed on {name}: {CARDS[name]}", ""
    return WARNING, f"not run on {name} yet; {on_cards()}", "From a clone, `tools/gpu_check --here` tests it"


def card_facts(index: int) -> Facts:
    """One card, as torch reports it; the query for free memory creates a context on it."""
    from qlora_lite.device.accelerator import card_at_index, free_memory

    card, (free, total) = card_at_index(index), free_memory(index)
    assert card.capability is not None
    return {
        "name": card.name,
        "compute_capability": "{}.{}".format(*card.capability),
        "total_bytes": total,
        "free_bytes": free,
        "has_bf16": card.has_bf16,
    }


def card_finding(card: Facts, *, archs: Sequence[str]) -> Finding:
    """The finding of one card; `archs` are the targets of this torch build, such as sm_80 and compute_90."""
    name = card["name"]
    state = (
        f"SM {card['compute_capability']}, {format_bytes(card['total_bytes'])}, {format_bytes(card['free_bytes'])} free"
    )
    if not has_code_for(card["compute_capability"], archs):
        advice = "Install a torch build for this card: https://pytorch.org/get-started"
        return Finding(name, PROBLEM, f"{state}; this torch has no code for it ({', '.join(archs)})", advice)
    if card["free_bytes"] < 0.8 * card["total_bytes"]:
        advice = "Other processes hold the rest (nvidia-smi lists them): close them, or set --budget"
        return Finding(name, WARNING, state, advice)
    if not card["has_bf16"]:
        advice = "Training uses fp16 with loss scaling; method: full and modules_to_save need model.dtype: fp32"
        return Finding(name, WARNING, f"{state}, no bf16", advice)
    return Finding(name, OK, f"{state}, computes in bf16")


def has_code_for(capability: str, archs: Sequence[str]) -> bool:
    """Whether a build runs on a card: binaries on later cards of their major version (sm_86 on 8.9), PTX (compute_90) on all later ones."""
    major, minor = (int(number) for number in capability.split("."))
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = int("".join(c for c in digits if c.isdigit()))
        built = number // 10, number % 10
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not archs


def no_card_finding(built_for: str | None) -> Finding:
    """The finding when torch has no card; `built_for` is its CUDA version, None for a CPU build."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if has_driver and built_for is None:
        advice = "Install a CUDA build of torch: https://pytorch.org/get-started"
        return Finding("card", WARNING, "an NVIDIA driver is installed, but this torch is a CPU build", advice)
    if has_driver:
        advice = f"The driver may be too old for CUDA {built_for}, or CUDA_VISIBLE_DEVICES hides the card"
        return Finding("card", WARNING, "an NVIDIA driver is installed, but torch finds no card it can use", advice)
    advice = "The processor can train small models, such as the quickstart's; plan for a card with plan --card rtx-4090"
    return Finding("card", WARNING, "none", advice)


def look_at_cache(findings: list[Finding]) -> Facts:
    path = default_cache()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free, is_writable = free_bytes(existing), existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    state = f"{path}, {format_bytes(free)} free"
    if not is_writable:
        advice = "Set QLORA_LITE_HOME to a writable folder"
        findings.append(Finding("cache", PROBLEM, f"{state}; {existing} cannot be written", advice))
    elif free < ENOUGH_DISK:
        advice = (
            f"Free some space, or set QLORA_LITE_HOME: a quantized 8B model and its original take {format_bytes(22e9)}"
        )
        findings.append(Finding("cache", WARNING, state, advice))
    else:
        findings.append(Finding("cache", OK, state))
    return {"path": str(path), "is_writable": is_writable, "free_bytes": free}


def look_at_connections(findings: list[Finding]) -> Facts:
    state = "only `fetch` opens one" if not OFFLINE_ASKED else "none: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    advice = "Unset it to fetch models" if OFFLINE_ASKED else ""
    findings.append(Finding("connections", OK, state, advice))
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
    told = {name: os.environ.get(name) for name in names}  # including values that this package sets for the libraries
    return {"is_offline_asked": OFFLINE_ASKED, "libraries_are_told": told}


def measure_and_keep(path: Path) -> Facts:
    """Measure the device that training would use, and replace `path` with the result atomically."""
    import torch

    from qlora_lite.commands.overheads import measure
    from qlora_lite.device.accelerator import choose_device
    from qlora_lite.files.staging import write_text_durably

    card, _ = choose_device("auto")
    measured = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_average": os.getloadavg()[0],  # of the minute before
        "num_threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        **measure(card.device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_durably(path, json.dumps(measured, indent=2) + "\n")
    return measured


def measured_findings(measured: Facts | None, *, versions: dict[str, Facts]) -> Iterator[Finding]:
    """The measured figures, and a warning when they come from another installation."""
    if measured is None:
        return
    changed = [n for n, version in measured["versions"].items() if versions.get(n, {}).get("version") != version]
    when = str(measured.get("measured_at"))
    yield (
        Finding(
            "measured",
            WARNING,
            f"{when}, with other versions of {', '.join(changed)}",
            "Measure again: doctor --measure",
        )
        if changed
        else Finding("measured", OK, f"{when}, on {measured.get('card') or measured.get('device')}")
    )
    if measured.get("load_average", 0) > BUSY * (os.cpu_count() or 1):
        state = f"on a busy machine: load average {measured['load_average']:.1f}"
        yield Finding("measured", WARNING, state, "Times are too long and vary: measure again on an idle machine")
    sizes = {
        "imports_rss_bytes": "the process before any model",
        "context_bytes": "the card's context and kernels",
        "cublas_workspace_bytes": "cuBLAS's workspace",
    }
    for key, words in sizes.items():
        if isinstance(measured.get(key), int):
            yield Finding("measured", OK, f"{words}: {format_bytes(measured[key])}")
    overhead = measured.get("allocator_overhead_bytes")
    if isinstance(overhead, dict):
        peak, more = format_bytes(measured["step_peak_bytes"]), _spread_in_words(overhead, format_bytes)
        yield Finding("measured", OK, f"a step of {peak} by the allocator takes {more} more from the system")
    if isinstance(measured.get("fragmentation_bytes"), int):
        words = f"the allocator reserves {format_bytes(measured['fragmentation_bytes'])} more than it hands out, after rows of many lengths"
        yield Finding("measured", OK, words)
    written = measured.get("disk_write_bytes_per_s")
    if isinstance(written, dict):
        words = _spread_in_words(written, lambda rate: f"{format_bytes(int(rate))}/s")
        yield Finding("measured", OK, f"durable write speed of the cache's disk: {words}")
    price = measured.get("dequantize", {}).get("dequantize_tokens")
    if isinstance(price, dict):
        words = _spread_in_words(price, lambda tokens: f"{tokens:.0f}")
        yield Finding("measured", OK, f"dequantizing a weight takes as long as its product with {words} tokens")


def _spread_in_words(spread: Facts, words: Callable[[float], str]) -> str:
    return f"{words(spread['median'])} ({words(spread['low'])} to {words(spread['high'])})"


def _import_error(name: str) -> str | None:
    """The first line of the error that its import raises, else None; warnings are suppressed here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a broken library can raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _num_cards() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver: no_card_finding reports it
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _free_memory() -> int | None:
    """Bytes that a new process could take without swapping; None outside Linux."""
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container_limit(total: int) -> int | None:
    """The control group's memory limit in bytes (v2, else v1); None when it is not below the machine's `total`."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < total else None  # v1 writes a huge number for no limit
    return None
